"""Merges an adapter into a sparse model without losing its zeros: `W + mask·ΔW` instead of `W + ΔW`. The mask is 0
where W is zero.

A plain merge gives nearly every weight of the layers with an adapter a value (elsewhere 40 % of zeros became 32.7 %).
The mask leaves out a part of the adapter. That loss is measured: as the fraction of the adapter's change (of ‖ΔW‖²),
and as perplexity where there is a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.checkpoints.entries import read_json
from lp_dist.errors import UsageError, in_one_line
from lp_dist.export.output_directory import atomic_directory, check_output_directory
from lp_dist.report.console import print_table, say
from lp_dist.report.numbers import percent, perplexity
from lp_dist.sparsity.measure import kind_of


@dataclass
class MergedLayer:
    """What the merge did to one weight.

    Args:
        elements: of the weight.
        zeros: of the base.
        revived: how many of them a plain merge gives a value.
        change: ‖ΔW‖².
        lost: what of it falls on the zeros.
    """

    elements: int
    zeros: int
    revived: int
    change: float
    lost: float


@dataclass
class MergeResult:
    """A merged model.

    Args:
        model: the plain model, without adapters. All of it is trainable.
        layers: {name of a merged weight in that model: what the merge did to it}.
        perplexity: {model, in words: its perplexity}, where there was a text.
    """

    model: nn.Module
    layers: dict[str, MergedLayer]
    perplexity: dict[str, float] = field(default_factory=dict)

    @property
    def left_out(self) -> float:
        """The fraction of the adapter's change, ‖ΔW‖² over all layers, that falls on zeros of the base."""
        return sum(layer.lost for layer in self.layers.values()) / max(
            sum(layer.change for layer in self.layers.values()), 1e-300
        )


def merge_adapter(model: nn.Module, *, keep_zeros: bool = True) -> MergeResult:
    """Merges peft's active adapter into the weights, and returns the plain model.

    Works with every adapter that peft can merge, by what its `merge` changes. Beside the model, a copy of one layer's
    weights is in memory at a time.

    Args:
        model: a `PeftModel`, in memory and not sharded. Its base is changed.
        keep_zeros: keep weights of the base that are exactly zero; False is peft's own merge, measured as well.
    Raises:
        UsageError: it has no adapter, is sharded, or its base is quantized.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "merge") and hasattr(module, "get_base_layer")
    ]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no adapter's layers to merge; load one by"
            " peft.PeftModel.from_pretrained(model, adapter)"
        )
    # All layers are checked before the first one is changed.
    for name, module in layers:
        if getattr(module, "merged", False):
            raise UsageError(
                f"{name} has its adapter merged already, so the zeros of its base are not known any more; call"
                " model.unmerge_adapter() first"
            )
        _refuse_sharded_or_quantized(name, _weights(module))
    merged: dict[int, MergedLayer] = {}
    for _, module in layers:
        weights = _weights(module)
        with torch.no_grad():
            before = [weight.detach().clone() for weight in weights]
            module.merge()
            for weight, old in zip(weights, before):
                merged[id(weight)] = _restore_zeros(weight, old, keep_zeros)
    # peft leaves the base frozen.
    plain = model.unload().requires_grad_(True)
    names = {id(param): name for name, param in plain.named_parameters()}
    return MergeResult(plain, {names[key]: layer for key, layer in merged.items() if key in names})


def _weights(module: Any) -> list[Tensor]:
    """The matrices inside of a layer of peft."""
    return [weight for weight in module.get_base_layer().parameters() if weight.ndim >= 2]


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


def _restore_zeros(weight: Tensor, old: Tensor, keep_zeros: bool) -> MergedLayer:
    """Writes the zeros of `old` into `weight` if `keep_zeros`, and measures what that loses."""
    dead = old == 0
    square = (weight.float() - old.float()).square()
    layer = MergedLayer(
        weight.numel(),
        int(dead.sum()),
        int(torch.count_nonzero(weight[dead])),
        float(square.sum(dtype=torch.float64)),
        float(square[dead].sum(dtype=torch.float64)),
    )
    if keep_zeros:
        weight[dead] = 0.0
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
) -> MergeResult:
    """`lp-dist merge`: merges an adapter into a sparse model, and writes the model and its tokenizer to `out`.

    Args:
        base: directory or hub id of the sparse model. All of it is in memory.
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
    Raises:
        UsageError: bad arguments, files that are damaged, or an adapter that is not of this base.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UsageError("lp-dist merge needs peft, which wrote the adapter: pip install peft") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = check_output_directory(out, overwrite, *(Path(path) for path in (base, adapter) if Path(path).is_dir()))
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype} is none of auto, float32, bfloat16, float16; auto is the base's own")
    if Path(adapter).is_dir():
        _check_adapter(Path(adapter))
    with in_one_line(
        f"{base} can't be read as a language model with its tokenizer: reading it ended with",
        "name its directory or hub id",
    ):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=dtype), AutoTokenizer.from_pretrained(base)
    text = None
    if dataset is not None:
        text = held_out(tokenizer, dataset, dataset_config, dataset_split, text_column, blocks, block_size)
    perplexity = {} if text is None else {"base": perplexity_of(model, text)}
    with in_one_line(
        f"the adapter {adapter} is not there, or not one of {base}: reading it ended with",
        "name the directory or hub id of an adapter of this base",
    ):
        # Nothing of the sizes that its config gives is made before its tensors are there.
        adapted = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)
    missing = next((name for name, param in adapted.named_parameters() if param.is_meta), None)
    if missing is not None:
        raise UsageError(
            f"the adapter {adapter} has no weights for {missing}, which its adapter_config.json adds to the model;"
            " copy or download it anew"
        )
    # Of kinds that can't be merged, such as aLoRA, peft says so when it should.
    with in_one_line(f"the adapter {adapter} can't be merged: merging it ended with", "take one that peft can merge"):
        if text is not None:
            perplexity["with the adapter"] = perplexity_of(adapted, text)
        merged = merge_adapter(adapted)
    if text is not None:
        perplexity["merged, zeros kept"] = perplexity_of(merged.model, text)
    merged.perplexity = perplexity
    with atomic_directory(out) as partial:
        merged.model.save_pretrained(partial)
        # Of a template whose name leads out of the directory Transformers says so by a ValueError.
        with in_one_line(f"the tokenizer of {base} can't be saved: saving it ended with", "take another base"):
            tokenizer.save_pretrained(partial)
    return merged


def _check_adapter(directory: Path) -> None:
    """Checks the files of an adapter before peft reads them.

    Raises:
        UsageError: one is damaged, its weights name classes that are not known, or its config has Megatron imported.
    """
    # Imported late: `import lp_dist` comes here by `merge_adapter`, and needs no NumPy.
    from lp_dist.checkpoints.files import TorchFile, safetensors

    with in_one_line(f"the adapter {directory} is damaged: reading it ended with", "copy or download it anew"):
        config = directory / "adapter_config.json"
        if not config.is_file():
            raise UsageError(
                f"{directory} has no adapter_config.json, so it is no adapter; name what peft's save_pretrained wrote"
            )
        if read_json(config).get("megatron_config") is not None:
            # peft imports a module by a name of the file then.
            raise UsageError(f"{config} is of an adapter for Megatron; make one of the base in Transformers")
        if (directory / "adapter_model.safetensors").is_file():
            safetensors(directory / "adapter_model.safetensors")
        elif (directory / "adapter_model.bin").is_file():
            file = TorchFile(directory / "adapter_model.bin")
            for name, tensor in file.content.items():
                file.check_fits(name, tensor)


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
