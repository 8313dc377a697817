"""From the names of parameters in memory (runtime names) to those in files (Hugging Face names), and back: the one
place that maps them.

An engine saves a model as it is in memory. transformers (`transformers/core_model_loading.py`, from version 5) keeps
some models' weights in another form in memory than on disk, and converts them back when it saves them. Which form a
file has is what `from_pretrained` makes of it, so a file of any age, and of a class with or without a head, is read by
the same rules.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
        model = meta_model(config, trust_remote_code) if config is not None else None
    except UsageError:
        # These names need no class that reads them.
        return set()
    names = name_map(model, {name: entry.shape for name, entry in checkpoint.entries.items()})
    return {
        name
        for name, param in names.duplicates.items()
        if any(
            _equal_bits(checkpoint.entries[name], checkpoint.entries[first])
            for first in names.by_param[param].hf_shapes
        )
    }


def _equal_bits(entry: Entry, other: Entry) -> bool:
    if (entry.shape, entry.dtype) != (other.shape, other.dtype):
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
    return class_of_config(settings, f"{config}/config.json", trust_remote_code), settings


def class_of_config(settings: Any, source: str, trust_remote_code: bool = False) -> Any:
    """The class that a configuration names for its model.

    Args:
        settings: the configuration.
        source: where it is from, for the message.
        trust_remote_code: run code that comes with the model.
    Raises:
        UsageError: transformers does not know the class.
    """
    import transformers

    named = settings.architectures or [None]
    if not isinstance(named, list):
        raise UsageError(
            f"{source} has {named!r} for architectures, which is a list of names; copy or download it anew"
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
            f"{source} is of the architecture {name}, which transformers {transformers.__version__} does"
            " not know; install the version that the model was trained with, or pass --trust-remote-code where its"
            " code comes with it"
        )
    return cls


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


@dataclass(frozen=True)
class Conversion:
    """Parameters of a model, and the tensors in its files that hold the same weights.

    It is mostly one of each. A fused parameter, such as all experts of a layer, is many tensors in the files of some
    models, and several parameters are one tensor in those of others.

    Args:
        shapes: {runtime name: shape}, of parameters and of buffers that are saved. A tied one has its first name.
        hf_shapes: {Hugging Face name: shape}.
        is_renaming: whether it is one tensor of each, and they differ in the name alone.
        to_memory: makes the tensors of the model: {Hugging Face name: tensor} → {runtime name: tensor}.
    """

    shapes: dict[str, tuple[int, ...]]
    hf_shapes: dict[str, tuple[int, ...]]
    is_renaming: bool
    to_memory: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    @property
    def is_of_one_param(self) -> bool:
        """Whether the tensors hold the weights of one parameter and nothing else, in any order."""
        numel = sum(map(math.prod, self.shapes.values()))
        return len(self.shapes) == 1 and numel == sum(map(math.prod, self.hf_shapes.values()))


@dataclass(frozen=True)
class NameMap:
    """Which tensors in files hold which parameters of a model.

    Args:
        conversions: what the model does not read, or what is not complete in the files, is in none of them.
        duplicates: {Hugging Face name: runtime name} of tensors beside the first one of a tied parameter.
    """

    conversions: list[Conversion]
    duplicates: dict[str, str]

    @cached_property
    def by_param(self) -> dict[str, Conversion]:
        """{runtime name: its conversion}."""
        return {name: conversion for conversion in self.conversions for name in conversion.shapes}

    @cached_property
    def by_tensor(self) -> dict[str, Conversion]:
        """{Hugging Face name: its conversion}."""
        return {name: conversion for conversion in self.conversions for name in conversion.hf_shapes}

    @cached_property
    def renamed(self) -> dict[str, str]:
        """{runtime name: Hugging Face name}, of the tensors that are the same in memory and in files."""
        return {
            name: hf_name
            for conversion in self.conversions
            if conversion.is_renaming
            for name, hf_name in zip(conversion.shapes, conversion.hf_shapes)
        }


def name_map(model: Any, hf_shapes: dict[str, tuple[int, ...]], *, runtime_names: bool = False) -> NameMap:
    """Maps the parameters of a model to the tensors of files, by the rules of `from_pretrained`.

    Args:
        model: on any device, not sharded; None: it is not known, and has what the files have.
        hf_shapes: {name: shape}, of all tensors in the files.
        runtime_names: the files are an engine's, with the names and forms of the model in memory.
    """
    runtime_names = runtime_names or model is None
    shapes = hf_shapes if model is None else {key: tuple(value.shape) for key, value in model.state_dict().items()}
    first_names = {} if model is None else _first_names(model)
    conversions: dict[str, Conversion] = {}
    duplicates: dict[str, str] = {}
    for conversion in _conversions(model, shapes, hf_shapes, runtime_names):
        if any(shapes.get(name) != shape for name, shape in conversion.shapes.items()):
            continue
        # What is tied is mostly saved once, by either name.
        named = replace(
            conversion, shapes={first_names.get(name, name): shape for name, shape in conversion.shapes.items()}
        )
        key = min(named.shapes)
        if key not in conversions:
            conversions[key] = named
        elif key in conversion.shapes:
            duplicates |= dict.fromkeys(conversions[key].hf_shapes, key)
            conversions[key] = named
        else:
            duplicates |= dict.fromkeys(named.hf_shapes, key)
    return NameMap(list(conversions.values()), duplicates)


def _first_names(model: nn.Module) -> dict[str, str]:
    """{name: the first name of the same parameter}, of all names that parameters have."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(param), name) for name, param in model.named_parameters(remove_duplicate=False)}


def _conversions(
    model: Any, shapes: dict[str, tuple[int, ...]], hf_shapes: dict[str, tuple[int, ...]], runtime_names: bool
) -> Iterator[Conversion]:
    """What `convert_and_load_state_dict_in_model` of transformers would do with files that hold these tensors."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    transforms = [] if runtime_names else _transforms(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    patterns: dict[str, dict[str, str]] = {}  # {runtime name: {Hugging Face name: the pattern that it matched}}
    # The order in which a converter gets the experts, and in which grouped renamings must come.
    for hf_name in sorted(hf_shapes, key=dot_natural_key):
        name, pattern = (hf_name, None) if runtime_names else _renamed(model, hf_name, shapes, renamings, converters)
        if name not in shapes:
            continue
        if pattern is None:
            yield Conversion({name: hf_shapes[hf_name]}, {hf_name: hf_shapes[hf_name]}, True, partial(_rename, name))
        else:
            patterns.setdefault(name, {})[hf_name] = pattern
    for name, pattern_of in patterns.items():
        convert = partial(_convert, model, by_pattern[next(iter(pattern_of.values()))], name, pattern_of)
        metas = {hf_name: torch.empty(hf_shapes[hf_name], device="meta") for hf_name in pattern_of}
        try:
            converted = {name: tuple(tensor.shape) for name, tensor in convert(metas).items()}
        except Exception:  # an operation that lacks some of its tensors may raise anything
            continue
        yield Conversion(converted, {hf_name: hf_shapes[hf_name] for hf_name in pattern_of}, False, convert)


def _transforms(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def _renamed(
    model: Any, hf_name: str, shapes: dict[str, Any], renamings: list[Any], converters: list[Any]
) -> tuple[str, str | None]:
    """The runtime name, of which a converter has several the first; and the converter's pattern, if it has one."""
    from transformers.core_model_loading import rename_source_key

    prefix = getattr(model, "base_model_prefix", None)
    name, pattern = rename_source_key(hf_name, renamings, converters, prefix, shapes)
    if name not in shapes and hf_name in shapes:
        name, pattern = rename_source_key(hf_name, [], [], prefix, shapes)
    return name, pattern


def _rename(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    (tensor,) = tensors.values()
    return {name: tensor}


def _convert(
    model: Any, converter: Any, name: str, pattern_of: dict[str, str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Runs a converter of transformers.

    Args:
        model: to which the tensors belong.
        converter: is left as it is.
        name: the first runtime name.
        pattern_of: {Hugging Face name: the converter's pattern that it matches}.
        tensors: {Hugging Face name: tensor}.
    """
    filled = copy.deepcopy(converter)
    for hf_name, pattern in pattern_of.items():
        filled.add_tensor(name, hf_name, pattern, tensors[hf_name])
    converted = filled.convert(name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def skeleton_of(model: Any) -> nn.Module:
    """The same model without its weights, on the meta device, which is saved in the same form.

    Args:
        model: of transformers, unwrapped, sharded or not.
    Raises:
        UsageError: its class can't be made a second time.
    """
    skeleton = build_on_meta(type(model), copy.deepcopy(model.config), "its configuration")
    # A model is saved as it was loaded.
    if getattr(model, "_weight_conversions", None) is not None:
        skeleton._weight_conversions = model._weight_conversions
    return skeleton


def hf_shapes_of(skeleton: nn.Module) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of what `save_pretrained` will write.

    Args:
        skeleton: of the model.
    Raises:
        UsageError: transformers can't convert this model back.
    """
    from transformers.core_model_loading import revert_weight_conversion

    left_out = getattr(skeleton, "_keys_to_ignore_on_save", None) or ()
    first_names = _first_names(skeleton)
    metas = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in skeleton.state_dict().items()
        if first_names.get(name, name) == name and name not in left_out
    }
    try:
        return {name: tuple(meta.shape) for name, meta in revert_weight_conversion(skeleton, metas).items()}
    except Exception as error:  # an operation may raise anything
        raise UsageError(
            f"{type(skeleton).__name__} can't be brought into the form of its files ({type(error).__name__}:"
            f" {first_line(error)}); load it from files that transformers {_version()} saves again"
        ) from error


def _version() -> str:
    import transformers

    return transformers.__version__


def check_saved_names(skeleton: nn.Module, names: Iterable[str]) -> None:
    """Checks before a run that all of its parameters can be read back from the files that it will save.

    Args:
        skeleton: of the model.
        names: runtime names of parameters.
    Raises:
        UsageError: one can't be.
    """
    missing = sorted(set(names) - name_map(skeleton, hf_shapes_of(skeleton)).by_param.keys())
    if missing:
        raise UsageError(
            f"{len(missing)} parameters of {type(skeleton).__name__} can't be read back from the files that"
            f" transformers {_version()} saves, such as {missing[0]}; load the model from files that it has saved"
        )


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
    reverted = shapes(metas)
    position = {name: i for i, name in enumerate(entries)}
    sources = sorted(
        (
            sorted(conversion.shapes, key=position.__getitem__)
            for conversion in name_map(model, dict(reverted)).conversions
        ),
        key=lambda names: position[names[0]],
    )
    try:
        converted = [shapes({name: metas[name] for name in names}) for names in sources]
    except Exception:  # a conversion that lacks its other tensors may raise anything
        converted = []
    if sorted(shape for results in converted for shape in results) != sorted(reverted):
        raise UsageError(
            f"{type(model).__name__}'s weights are saved in another form than in memory, which can't be made of a few"
            " tensors at a time; export from the training itself: trainer.save_model()"
        )
    return [
        HfTensor(sum(entries[name].nbytes for name in names), dict(results), partial(read, names))
        for names, results in zip(sources, converted)
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
