"""Merges an adapter into a sparse model without losing its zeros: `W + mask·ΔW` instead of `W + ΔW`. The mask is 0
where W is zero.

A plain merge gives nearly every weight of the layers with an adapter a value (elsewhere 40 % of zeros became 32.7 %).
The mask leaves out a part of the adapter. That loss is measured: as the fraction of the adapter's change (of ‖ΔW‖²),
and as perplexity where there is a text.

What an adapter brings in the place of a tensor of the base, such as a head that was trained beside it, is masked and
measured in the same way.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lp_dist.errors import UsageError, in_one_line
from lp_dist.export.output_directory import atomic_directory, check_output_directory
from lp_dist.report.console import print_table, say
from lp_dist.report.numbers import percent, perplexity
from lp_dist.sparsity.measure import kind_of

if TYPE_CHECKING:
    from lp_dist.export.adapters import AdaptedModel, Adapter


@dataclass
class MergedLayer:
    """What the merge did to one weight.

    Args:
        elements: of the weight.
        zeros: of the base.
        revived: how many of them a plain merge gives a value.
        change: ‖ΔW‖².
        lost: what of it falls on the zeros.
        new_rows: tokens that the base has all zeros for, and the merged model a value.
    """

    elements: int
    zeros: int
    revived: int
    change: float
    lost: float
    new_rows: int = 0


@dataclass
class MergeResult:
    """A merged model.

    Args:
        model: the plain model, without adapters. All of it is trainable.
        layers: {name of a merged weight in that model: what the merge did to it}.
        perplexity: {model, in words: its perplexity}, where there was a text.
        notes: what else the adapter has changed, in sentences.
    """

    model: nn.Module
    layers: dict[str, MergedLayer]
    perplexity: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> float:
        """The fraction of the adapter's change, ‖ΔW‖² over all layers, that falls on zeros of the base."""
        return sum(layer.lost for layer in self.layers.values()) / max(
            sum(layer.change for layer in self.layers.values()), 1e-300
        )


class _Slot(NamedTuple):
    """Where a parameter is: modules outlive the merge, and parameters do not."""

    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.key)


class _Record(NamedTuple):
    slot: _Slot
    layer: MergedLayer


def merge_adapter(model: nn.Module, *, keep_zeros: bool = True) -> MergeResult:
    """Merges peft's active adapter into the weights, and returns the plain model.

    Works with every adapter that peft can merge, by what its `merge` changes: of linear layers, of fused experts
    (`target_parameters`), of tokens (`trainable_token_indices`). Modules that were trained as such beside the adapter
    (`modules_to_save`) replace those of the base, in the base's dtype. Where a matrix of the base has zeros, what
    replaces it has them too. All-zero matrices, and all-zero rows of embeddings and output heads, are not taken for
    zeros of a sparse model then: that is how heads and unused tokens are initialised.

    Beside the model, a copy of one layer's weights is in memory at a time.

    Args:
        model: a `PeftModel`, in memory and not sharded. Its base is changed.
        keep_zeros: keep weights of the base that are exactly zero; False is peft's own merge, measured as well.
    Raises:
        UsageError: it has no adapter, one that can't be merged, is sharded, or its base is quantized.
    """
    plain, records = _merged(model, keep_zeros)
    return MergeResult(plain, _layers(plain, records))


def _merged(model: Any, keep_zeros: bool) -> tuple[nn.Module, list[_Record]]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper
    except ImportError:
        raise UsageError("merging an adapter needs peft, which makes them: pip install peft") from None

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    replaced = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters
    ]
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise UsageError(
            f"an adapter of the type {config.peft_type.value!s} adds tokens to the input and changes no weights, so"
            " nothing can be merged; use it beside the model"
        )
    if not layers and not replaced:
        raise UsageError(
            f"{type(model).__name__} has no adapter's layers to merge; load one by"
            " peft.PeftModel.from_pretrained(model, adapter)"
        )
    # All layers are checked before the first one is changed.
    for name, module in layers:
        if module.merged:
            raise UsageError(
                f"{name} has its adapter merged already, so the zeros of its base are not known any more; call"
                " model.unmerge_adapter() first"
            )
        _refuse_sharded_or_quantized(name, [slot.tensor for slot in _matrices(module)])
    for name, wrapper in replaced:
        _refuse_sharded_or_quantized(name, [slot.tensor for pair in _replacements(wrapper) for slot in pair])
    tokens = _token_modules(model)
    records = []
    with torch.no_grad():
        for _, wrapper in replaced:
            for base, slot in _replacements(wrapper):
                slot.tensor.data = slot.tensor.data.to(base.tensor.dtype)
                records += _replaced(slot, base.tensor, base.module in tokens, keep_zeros)
        for _, module in layers:
            # An attention layer has merged its output projection too.
            if module.merged:
                continue
            slots = list(_matrices(module))
            before = [slot.tensor.detach().clone() for slot in slots]
            module.merge()
            for slot, old in zip(slots, before):
                rows = slot.module in tokens
                layer = _restore_zeros(slot.tensor, old, _zeros(old, rows), keep_zeros, rows)
                # Tied tokens get the same values once more.
                if getattr(module, "tied_adapter", None) is None:
                    records.append(_Record(slot, layer))
    with warnings.catch_warnings():
        # All is merged already, which peft warns of. It takes its layers out, and unties embeddings in the config
        # where only one side was trained.
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    # peft leaves the base frozen.
    return plain.requires_grad_(True), records


def _layers(plain: nn.Module, records: list[_Record]) -> dict[str, MergedLayer]:
    """{name in the plain model: what was done to it, by all that was merged into it}."""
    names = {id(param): name for name, param in plain.named_parameters()}
    layers: dict[str, MergedLayer] = {}
    for slot, layer in records:
        name = names.get(id(slot.tensor))
        if name is None:
            continue
        before = layers.setdefault(name, layer)
        if before is not layer:
            before.revived, before.new_rows = max(before.revived, layer.revived), before.new_rows + layer.new_rows
            before.change, before.lost = before.change + layer.change, before.lost + layer.lost
    return layers


def _matrices(module: Any) -> Iterator[_Slot]:
    """The matrices inside of a layer of peft that its `merge` may change."""
    base, key = module.get_base_layer(), getattr(module, "parameter_name", None)
    for owner in base.modules() if key is None else [base]:
        for name, param in owner.named_parameters(recurse=False):
            if param.ndim >= 2 and key in (None, name):
                yield _Slot(owner, name)


def _replacements(wrapper: Any) -> Iterator[tuple[_Slot, _Slot]]:
    """Pairs of a parameter of the base and of the one that was trained in its place. There are no adapters within."""
    original, trained = wrapper.original_module, wrapper.modules_to_save[wrapper.active_adapter]
    for path, module in original.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield _Slot(module, name), _Slot(trained.get_submodule(path), name)


def _token_modules(model: Any) -> set[nn.Module]:
    """The modules whose rows are tokens: embeddings, and the output head."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    get: Any = getattr(base, "get_output_embeddings", None)
    head = get() if get is not None else None
    while isinstance(head, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        head = head.original_module if isinstance(head, AuxiliaryTrainingWrapper) else head.get_base_layer()
    return {module for module in model.modules() if isinstance(module, nn.Embedding)} | ({head} if head else set())


def _refuse_sharded_or_quantized(name: str, weights: list[Tensor]) -> None:
    for weight in weights:
        if not weight.is_floating_point():
            raise UsageError(
                f"{name} is quantized ({weight.dtype}); load the base in bfloat16 or float32 to merge into it"
            )
        if hasattr(weight, "ds_id") or hasattr(weight, "to_local"):
            raise UsageError(
                f"{name} is sharded; save the adapter (save_pretrained), and merge it in one process: lp-dist merge"
                " BASE ADAPTER OUT"
            )


def _zeros(old: Tensor, tokens: bool) -> Tensor:
    """The zeros of a sparse model in a weight of the base, bool. Rows of tokens that are all zero are unused ones."""
    zeros = old == 0
    return zeros & ~zeros.flatten(1).all(1).view(-1, *[1] * (old.ndim - 1)) if tokens else zeros


def _replaced(slot: _Slot, old: Tensor, tokens: bool, keep_zeros: bool) -> list[_Record]:
    """Puts the zeros of a matrix of the base into what replaces it, unless it was all zero. None for vectors: biases
    start at zero.
    """
    if old.ndim < 2:
        return []
    zeros = _zeros(old, tokens) if bool(old.any()) else torch.zeros_like(old, dtype=torch.bool)
    return [_Record(slot, _restore_zeros(slot.tensor, old, zeros, keep_zeros, tokens))]


def _restore_zeros(weight: Tensor, old: Tensor, zeros: Tensor, keep_zeros: bool, tokens: bool) -> MergedLayer:
    """Writes `zeros` of `old` into `weight` if `keep_zeros`, and measures what that loses."""
    square = (weight.float() - old.float()).square()
    new_rows = (~old.flatten(1).any(1) & weight.flatten(1).any(1)).sum() if tokens else 0
    layer = MergedLayer(
        weight.numel(),
        int(zeros.sum()),
        int(torch.count_nonzero(weight[zeros])),
        float(square.sum(dtype=torch.float64)),
        float(square[zeros].sum(dtype=torch.float64)),
        int(new_rows),
    )
    if keep_zeros:
        weight.data[zeros] = 0.0
    return layer


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str = "text",
    blocks: int = 32,
    block_size: int = 512,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> MergeResult:
    """`lp-dist merge`: merges an adapter into a sparse model, and writes the model to `out`, with the tokenizer and
    the other files of the base or, where it has its own, of the adapter.

    Args:
        base: directory or hub id of the sparse model, for any task. All of it is in memory.
        adapter: directory or hub id of what peft's `save_pretrained` wrote.
        out: directory to write.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        dataset: text by which the perplexity of the base, of the base with its adapter, and of the merged model is
            measured; this and the next arguments are those of `load_text`. None: it is not measured.
        dataset_config: of the data set.
        dataset_split: of the data set; its last tenth is used.
        text_column: of the data set.
        blocks: how many blocks of tokens are used.
        block_size: tokens of a block.
        overwrite: replace an earlier output.
        trust_remote_code: run code that comes with the base.
    Raises:
        UsageError: bad arguments, files that are damaged, an adapter that is not of this base, or weights that neither
            of them has.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError("lp-dist merge needs peft, which wrote the adapter: pip install peft") from None
    from transformers import AutoTokenizer

    from lp_dist.export.adapters import check_tokenizer
    from lp_dist.export.model_files import copy_files_of_merged

    out = check_output_directory(out, overwrite, *(Path(path) for path in (base, adapter) if Path(path).is_dir()))
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype} is none of auto, float32, bfloat16, float16; auto is the base's own")
    inputs = _read_configs(base, adapter, measured=dataset is not None, trust_remote_code=trust_remote_code)
    model = _read_base(inputs, dtype, trust_remote_code)
    tied = _is_tied(model)
    check_tokenizer(inputs.adapter, _rows(model))
    text = None
    if dataset is not None:
        with in_one_line(f"the tokenizer of {base} can't be read: reading it ended with", "take another base"):
            tokenizer = AutoTokenizer.from_pretrained(inputs.base_directory, trust_remote_code=False)
        text = held_out(tokenizer, dataset, dataset_config, dataset_split, text_column, blocks, block_size)
    perplexities = {} if text is None else {"base": perplexity_of(model, text)}
    adapted, records = _with_adapter(model, inputs)
    # Of kinds that can't be merged, such as aLoRA, peft says so when it should.
    with in_one_line(f"the adapter {adapter} can't be merged: merging it ended with", "take one that peft can merge"):
        if text is not None:
            perplexities["with the adapter"] = perplexity_of(adapted, text)
        plain, more = _merged(adapted, keep_zeros=True)
    merged = MergeResult(plain, _layers(plain, records + more), perplexities, list(inputs.expected.notes))
    if text is not None:
        perplexities["merged, zeros kept"] = perplexity_of(plain, text)
    if (rows := inputs.expected.vocabulary) is not None:
        merged.notes.append(f"The embeddings have {rows:,} rows, as the adapter was trained with.")
    if tied and not _is_tied(plain):
        merged.notes.append("Embeddings and output head are no longer tied, as the adapter has one without the other.")
    with atomic_directory(out) as partial:
        plain.save_pretrained(partial)
        taken = copy_files_of_merged(inputs.base_directory, inputs.adapter.path, partial, with_code=trust_remote_code)
    if taken:
        merged.notes.append(f"From the adapter: {', '.join(taken)}.")
    return merged


@dataclass(frozen=True)
class _Inputs:
    """A base and its adapter, of which the configurations are read."""

    base: str | Path
    base_directory: Path
    adapter: Adapter
    expected: AdaptedModel


def _read_configs(base: str | Path, adapter: str | Path, *, measured: bool, trust_remote_code: bool) -> _Inputs:
    """Reads no weights of the base, of which a hub id is not downloaded before."""
    from transformers import AutoConfig

    from lp_dist.export.adapters import adapted_model, read_adapter
    from lp_dist.export.model_files import ADAPTER_FILES, CODE, MODEL_FILES, directory_of
    from lp_dist.export.model_task import other_than_causal

    with _of_this_base(adapter, base):
        files = read_adapter(directory_of(adapter, [*ADAPTER_FILES, *MODEL_FILES]))
    with in_one_line(
        f"{base} can't be read as a model: reading its config.json ended with", "name its directory or hub id"
    ):
        directory = directory_of(base, [*MODEL_FILES, *([CODE] if trust_remote_code else [])])
        settings = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if measured and (other := other_than_causal(settings)) is not None:
        raise UsageError(
            f"--dataset measures the perplexity of causal language models, and {base} is {other}; leave it out"
        )
    with _of_this_base(adapter, base):
        return _Inputs(base, directory, files, adapted_model(directory, settings, files, trust_remote_code))


def _of_this_base(adapter: str | Path, base: str | Path) -> AbstractContextManager[None]:
    return in_one_line(
        f"the adapter {adapter} is not there, or not one of {base}: reading it ended with",
        "name the directory or hub id of an adapter of this base",
    )


def _read_base(inputs: _Inputs, dtype: str, trust_remote_code: bool) -> Any:
    """The base, with as many rows of embeddings as the adapter has."""
    base, expected = inputs.base, inputs.expected
    with in_one_line(f"{base} can't be read as a model: reading it ended with", "name its directory or hub id"):
        model, loading = expected.cls.from_pretrained(
            base,
            config=expected.settings,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
        absent = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
        if expected.vocabulary is not None:
            model.resize_token_embeddings(expected.vocabulary, mean_resizing=False)
    absent -= inputs.adapter.shapes.keys()
    if absent:
        raise UsageError(
            f"{base} has no weights for {min(absent)}, which {type(model).__name__} needs, and the adapter"
            f" {inputs.adapter.path} brings none, so they would be random; name the base that the adapter was trained"
            " on, or train it with that module in modules_to_save"
        )
    return model


def _with_adapter(model: Any, inputs: _Inputs) -> tuple[Any, list[_Record]]:
    """The base with its adapter, and what was done to the tensors of the base that the adapter has other values for,
    such as embeddings with more tokens.
    """
    from peft import PeftModel

    adapter = inputs.adapter.path
    before = [
        (_Slot(module, key), param)
        for module in model.modules()
        for key, param in module.named_parameters(recurse=False)
    ]
    with _of_this_base(adapter, inputs.base):
        # Nothing of the sizes that its config gives is made before its tensors are there.
        adapted: Any = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)
        # Of the first load peft does not say what it has left out.
        unexpected = adapted.load_adapter(adapter, adapted.active_adapter, low_cpu_mem_usage=True).unexpected_keys
    left_out = {name for name in unexpected if not _is_saved_twice(adapted, name)}
    missing = next((name for name, param in adapted.named_parameters() if param.is_meta), None)
    if missing is not None:
        raise UsageError(
            f"the adapter {adapter} has no weights for {missing}, which its adapter_config.json adds to the model;"
            " copy or download it anew"
        )
    if left_out:
        raise UsageError(
            f"the adapter {adapter} has {len(left_out)} tensors that {type(model).__name__} has no place for, such as"
            f" {min(left_out)}; name the base that it was trained on"
        )
    tokens, records = _token_modules(adapted), []
    replaced = {id(old): slot.tensor for slot, old in before if slot.tensor is not old}
    done: set[int] = set()
    with torch.no_grad():
        for slot, old in before:
            if id(old) not in replaced:
                continue
            # Loaded one by one, tied tensors would be tied no longer.
            setattr(slot.module, slot.key, replaced[id(old)])
            if id(old) not in done:
                done.add(id(old))
                slot.tensor.data = slot.tensor.data.to(old.dtype)
                records += _replaced(slot, old, slot.module in tokens, keep_zeros=True)
    return adapted, records


def _is_saved_twice(adapted: Any, name: str) -> bool:
    """Whether an adapter's tensor is one of those that peft saves twice, with resized embeddings, and reads once: of
    what replaces embeddings, and of trained tokens in an output head that is tied to them.
    """
    from peft.utils.other import ModulesToSaveWrapper

    modules = dict(adapted.named_modules())
    wrapper, owner = modules.get(name.partition(".modules_to_save.")[0]), modules.get(name.rpartition(".")[0])
    return isinstance(wrapper, ModulesToSaveWrapper) or getattr(owner, "tied_adapter", None) is not None


def _rows(model: Any) -> int | None:
    """How many tokens a model has embeddings for; None if it embeds none."""
    embeddings = _embeddings(model)
    return embeddings.weight.shape[0] if isinstance(embeddings, nn.Embedding) else None


def _is_tied(model: Any) -> bool:
    """Whether the output head is the embeddings."""
    embeddings, head = _embeddings(model), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", head) is getattr(embeddings, "weight", None)


def _embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # of models that embed no tokens
        return None


def held_out(
    tokenizer: Any, dataset: str, config: str | None, split: str, text_column: str, blocks: int, block_size: int
) -> Any:
    """The first blocks of the last tenth of a text, or of a random tenth of documents."""
    from lp_dist.data.text import load_text, pack

    text = load_text(dataset, config, split, text_column, None, 0.1, seed=0)["eval"]
    packed = pack(text, tokenizer, block_size, separate=not dataset.endswith((".txt", ".md")))
    return packed.select(range(min(blocks, len(packed))))


def perplexity_of(model: nn.Module, blocks: Any) -> float:
    """exp of the cross-entropy per token, as Trainer evaluates it."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    args = TrainingArguments(
        per_device_eval_batch_size=1,
        report_to=[],
        prediction_loss_only=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    return math.exp(
        min(
            Trainer(model, args, eval_dataset=blocks, data_collator=default_data_collator).evaluate()["eval_loss"],
            700.0,
        )
    )


def show(merged: MergeResult, out: str | Path) -> None:
    """Prints what was kept, what a plain merge would have lost, and what the mask costs."""
    kinds: dict[str, list[MergedLayer]] = {}
    for name, layer in merged.layers.items():
        kinds.setdefault(kind_of(name), []).append(layer)
    print_table(
        "The adapter, merged with the zeros kept",
        ("layer", "weights", "zeros", "share", "by a plain merge", "ΔW² left out"),
        (_table_row(kind, layers) for kind, layers in kinds.items()),
    )
    if merged.perplexity:
        values = ", ".join(f"{model} {perplexity(value)}" for model, value in merged.perplexity.items())
        say(f"Perplexity on held-out text: {values}.")
    rows = sum(layer.new_rows for layer in merged.layers.values())
    if rows:
        say(f"{rows:,} rows of tokens that were all zero in the base have values now.")
    for note in merged.notes:
        say(note)
    say(
        f"{percent(merged.left_out, 1)} of the adapter's change fell on zeros and was left out. Saved to {out}; loads"
        " with from_pretrained."
    )


def _table_row(kind: str, layers: list[MergedLayer]) -> tuple[str, ...]:
    elements = sum(layer.elements for layer in layers)
    zeros = sum(layer.zeros for layer in layers)
    revived = sum(layer.revived for layer in layers)
    left_out = sum(layer.lost for layer in layers) / max(sum(layer.change for layer in layers), 1e-300)
    return (
        kind,
        f"{elements:,}",
        f"{zeros:,}",
        percent(zeros / elements),
        percent((zeros - revived) / elements),
        percent(left_out, 1),
    )
