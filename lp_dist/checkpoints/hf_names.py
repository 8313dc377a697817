"""From the tensors of a checkpoint to Hugging Face names: the names and forms in which `from_pretrained` looks for
weights.

An engine saves a model as it is in memory. transformers (`transformers/core_model_loading.py`, from version 5) keeps
some models' weights in another form in memory than on disk, and converts them back when it saves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.checkpoints.entries import Checkpoint, Entry
from lp_dist.errors import UsageError, first_line


@dataclass(frozen=True)
class HfTensor:
    """A tensor under its Hugging Face name, or a few tensors that are read together.

    Args:
        nbytes: of what is read.
        shapes: {Hugging Face name: shape}.
        read: reads them, {Hugging Face name: tensor}.
    """

    nbytes: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[], dict[str, Tensor]]


def hf_tensors(checkpoint: Checkpoint, config: Path | None, trust_remote_code: bool = False) -> list[HfTensor]:
    """The checkpoint's tensors under Hugging Face names, in the order of the checkpoint.

    Args:
        checkpoint: of any form.
        config: directory of the model's config.json, which says what an engine's checkpoint must hold.
        trust_remote_code: run code that comes with the model.
    Raises:
        UsageError: an engine's checkpoint is not of that model, or lacks some of its tensors.
    """
    if not checkpoint.runtime_names:
        duplicates = _tied_duplicates(checkpoint, config, trust_remote_code)
        return [
            HfTensor(entry.nbytes, {name: entry.shape}, partial(_read_unchanged, name, entry))
            for name, entry in checkpoint.entries.items()
            if name not in duplicates
        ]
    if config is None:
        raise UsageError(
            f"no config.json is in {checkpoint.path} or above it, so it is not known of which model its weights are;"
            " give the model's directory or hub id: --config MODEL"
        )
    model = meta_model(config, trust_remote_code)
    return to_hf_tensors(model, model_entries(checkpoint, model))


def _tied_duplicates(checkpoint: Checkpoint, config: Path | None, trust_remote_code: bool) -> set[str]:
    """The second names of tied tensors that were saved under both names, bit for bit the same.

    ZeRO-3 makes Trainer save the output head twice.
    """
    try:
        model = meta_model(config, trust_remote_code) if config is not None else nn.Module()
    except UsageError:
        # These names need no class that reads them.
        return set()
    first: dict[int, str] = {}
    return {
        name
        for name, param in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(param), name) != name
        and _equal_bits(checkpoint.entries.get(name), checkpoint.entries.get(first[id(param)]))
    }


def _equal_bits(entry: Entry | None, other: Entry | None) -> bool:
    if entry is None or other is None or (entry.shape, entry.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(as_bytes(entry.read()), as_bytes(other.read()))


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor by its bytes, (bytes,) uint8. In it -0 is not 0, and nan equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in this dtype. Other tensors, and all where it is None, are returned as they are."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _read_unchanged(name: str, entry: Entry) -> dict[str, Tensor]:
    return {name: entry.read()}


def model_class(config: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model's class, and its configuration.

    Args:
        config: directory of its config.json.
        trust_remote_code: run code that comes with the model.
    Raises:
        UsageError: transformers does not know the model.
    """
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the class of a config may raise anything
        raise UsageError(
            f"transformers {transformers.__version__} does not read {config}/config.json"
            f" ({type(error).__name__}: {first_line(error)}); give the directory or hub id of the model by --config"
            " MODEL, and --trust-remote-code where its code comes with it"
        ) from error
    named = settings.architectures or [None]
    if not isinstance(named, list):
        raise UsageError(
            f"{config}/config.json has {named!r} for architectures, which is a list of names; copy or download it anew"
        )
    name = named[0]
    auto_map = getattr(settings, "auto_map", {}) if trust_remote_code else {}
    cls = getattr(
        transformers,
        next((auto for auto, code in auto_map.items() if str(code).endswith(f".{name}")), str(name)),
        None,
    )
    if cls is None:
        raise UsageError(
            f"{config}/config.json is of the architecture {name}, which transformers {transformers.__version__} does"
            " not know; install the version that the model was trained with, or pass --trust-remote-code where its"
            " code comes with it"
        )
    return cls, settings


def meta_model(config: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights, on the meta device. Arguments and errors are those of `model_class`."""
    return build_on_meta(*model_class(config, trust_remote_code), f"{config}/config.json")


def build_on_meta(cls: Any, settings: Any, source: str) -> nn.Module:
    """A model without its weights, on the meta device.

    Args:
        cls: as of `model_class`.
        settings: as of `model_class`.
        source: where its configuration is from, for the message.
    Raises:
        UsageError: the class can't be made from this configuration.
    """
    from transformers.modeling_utils import set_zero3_state

    try:
        # Under ZeRO-3 it would be sharded, but for this mark of a model that is sharded already.
        with torch.device("meta"), set_zero3_state():
            return (
                cls.from_config(settings, trust_remote_code=True)
                if hasattr(cls, "from_config")
                else cls._from_config(settings)
            )
    except Exception as error:  # so may the class of a model, on another model's config or where a package is missing
        raise UsageError(
            f"{cls.__name__} can't be made from {source} ({type(error).__name__}: {first_line(error)}); give the"
            " config of the model that was trained: --config MODEL"
        ) from error


def model_entries(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Entry]:
    """The checkpoint's entries under the model's own names, tied ones once.

    Args:
        checkpoint: of an engine.
        model: on any device.
    Raises:
        UsageError: an entry is missing, has another shape, or is not of this model.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = _prefix(checkpoint, expected)
    params = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, param in params.items():
        names_of.setdefault(id(param), []).append(name)
    entries: dict[str, Entry] = {}
    for name, shape in expected.items():
        names = names_of[id(params[name])] if name in params else [name]
        if name != names[0]:
            continue
        aliases = [prefix + alias for alias in names]
        aliases += [checkpoint.tied[alias] for alias in aliases if alias in checkpoint.tied]
        entry = next((checkpoint.entries[alias] for alias in aliases if alias in checkpoint.entries), None)
        if entry is None:
            raise UsageError(
                f"{checkpoint.path} ({checkpoint.form}) has no {prefix + name}, which {type(model).__name__} needs; "
                f"{_advice(checkpoint)}, and save frozen parameters too (exclude_frozen_parameters=False)"
            )
        if entry.shape != shape:
            raise UsageError(
                f"{name} has the shape {list(entry.shape)} in {checkpoint.path}, and {list(shape)} by the model's"
                f" config.json; {_advice(checkpoint)}"
            )
        entries[name] = entry
    # Tensors without the prefix are what a script saved beside the model.
    foreign = sorted(
        name for name in checkpoint.entries if name.startswith(prefix) and name.removeprefix(prefix) not in expected
    )
    if foreign:
        raise UsageError(
            f"{len(foreign)} tensors in {checkpoint.path} are not of {type(model).__name__}, such as {foreign[0]}; "
            f"{_advice(checkpoint)}"
        )
    return entries


def hf_names(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The Hugging Face names of a model's parameters, of those that have the same shape in both.

    What was saved without the model's head, as GPT-2 on the hub, lacks the prefix. Other models are saved under other
    names than they have in memory.

    Args:
        model: on any device.
        shapes: {Hugging Face name: shape}, of the checkpoint.
    Returns:
        {name of the parameter: Hugging Face name}.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for name, param in model.named_parameters():
        hf_name = next(
            (alias for alias in (name, name.removeprefix(prefix), prefix + name) if alias in shapes), None
        ) or _saved_name(model, name, param)
        if shapes.get(hf_name) == tuple(param.shape):
            names[name] = hf_name
    return names


def _saved_name(model: nn.Module, name: str, param: Tensor) -> str:
    """The name under which transformers saves a parameter, as `to_hf_tensors`; the parameter's own name where it is
    not saved as one tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved = list(
            revert_weight_conversion(model, {name: torch.empty(param.shape, dtype=param.dtype, device="meta")})
        )
    except Exception:  # a conversion that lacks its other tensors may raise anything
        saved = []
    return saved[0] if len(saved) == 1 else name


def _prefix(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> str:
    """What is before the model's names in the checkpoint: nothing, or the name of the model in a script ("model.")."""

    def matches(prefix: str) -> int:
        return sum(prefix + name in checkpoint.entries for name in expected)

    first = next(iter(expected))
    candidates = {""} | {name.removesuffix(first) for name in checkpoint.entries if name.endswith("." + first)}
    return max(sorted(candidates, key=len), key=matches)


def _advice(checkpoint: Checkpoint) -> str:
    if any("lora_" in name for name in checkpoint.entries):
        return (
            "it has LoRA's adapters in it: save the adapter by peft's save_pretrained, and merge it by lp-dist merge"
        )
    return "give the config of the model that was trained: --config MODEL"


def to_hf_tensors(model: nn.Module, entries: dict[str, Entry]) -> list[HfTensor]:
    """The tensors as transformers saves them, converted back for as few tensors at a time as possible.

    transformers joins or splits some models' weights while it loads them (a layer's experts into one tensor), and
    converts them back when it saves them.

    Raises:
        UsageError: the conversion of a few tensors at a time gives others than that of all.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def shapes(metas: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(meta.shape)) for name, meta in revert_weight_conversion(model, metas).items()]

    def read(names: list[str]) -> dict[str, Tensor]:
        return revert_weight_conversion(model, {name: entries[name].read() for name in names})

    metas = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    sources: dict[str, list[str]] = {}  # {Hugging Face name: the tensors that it is made of}
    try:
        for name, meta in metas.items():
            sources.setdefault(min(shapes({name: meta}))[0], []).append(name)
        converted = [shapes({name: metas[name] for name in names}) for names in sources.values()]
    except Exception:  # a conversion that lacks its other tensors may raise anything
        converted = []
    if sorted(shape for results in converted for shape in results) != sorted(shapes(metas)):
        raise UsageError(
            f"{type(model).__name__}'s weights are saved in another form than in memory, which can't be made of a few"
            " tensors at a time; export from the training itself: trainer.save_model()"
        )
    return [
        HfTensor(sum(entries[name].nbytes for name in names), dict(results), partial(read, names))
        for names, results in zip(sources.values(), converted)
    ]


def loadable_config(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The model's config.json for plain weights, without what a loader would take for compressed weights (vLLM refuses
    a `sparsity_config`).

    Args:
        config: the model's config.json.
        dtype: what it says of the weights; None leaves that as it is.
    """
    name = str(dtype).removeprefix("torch.")

    def rewritten(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: name if dtype and key in ("dtype", "torch_dtype") else rewritten(entry)
            for key, entry in value.items()
            if key not in ("sparsity_config", "compression_config", "quantization_config")
        }

    return {**rewritten(config), **({"dtype": name} if dtype else {})}
