"""From the tensors of a checkpoint to those of a published model: under the names, and in the pieces, in which
`from_pretrained` looks for them.
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
from lp_dist.errors import UsageError


@dataclass(frozen=True)
class Published:
    """A tensor of a checkpoint, or a few, and what becomes of it: mostly one tensor of the same name. read() → {name:
    tensor}; shapes: of these.
    """

    nbytes: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[], dict[str, Tensor]]


def published(checkpoint: Checkpoint, config: Path | None, trust_remote_code: bool = False) -> list[Published]:
    """What to write, in the order of the checkpoint.

    Args:
        config: directory of the model's config.json, which says what an engine's checkpoint must hold.
    Raises:
        UsageError: an engine's checkpoint is not of that model, or has not all of it.
    """
    if not checkpoint.live:
        twice = _twice(checkpoint, config, trust_remote_code)
        return [
            Published(entry.nbytes, {name: entry.shape}, partial(_same, name, entry))
            for name, entry in checkpoint.entries.items()
            if name not in twice
        ]
    if config is None:
        raise UsageError(
            f"no config.json is in {checkpoint.path} or above it, so it is not known of which model its weights are;"
            " give the model's directory or hub id: --config MODEL"
        )
    model = meta_model(config, trust_remote_code)
    return _reverted(model, of_model(checkpoint, model))


def _twice(checkpoint: Checkpoint, config: Path | None, trust_remote_code: bool) -> set[str]:
    """Tied tensors that were written under both of their names (as ZeRO-3 makes Trainer do with the output head), bit
    for bit the same.
    """
    try:
        model = meta_model(config, trust_remote_code) if config is not None else nn.Module()
    except UsageError:  # what is published already needs no class that reads it
        return set()
    first: dict[int, str] = {}
    return {
        name
        for name, param in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(param), name) != name
        and _alike(checkpoint.entries.get(name), checkpoint.entries.get(first[id(param)]))
    }


def _alike(one: Entry | None, other: Entry | None) -> bool:
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(bits(one.read()), bits(other.read()))


def bits(tensor: Tensor) -> Tensor:
    """A tensor by its bytes: -0 is not 0, and nan equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in this dtype; any other, and where it is None, the tensor itself."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _same(name: str, entry: Entry) -> dict[str, Tensor]:
    return {name: entry.read()}


def model_class(config: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model's class, and its configuration.

    Raises:
        UsageError: transformers does not know it.
    """
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config's class raises what it likes
        raise UsageError(
            f"transformers {transformers.__version__} does not read {config}/config.json ({_line(error)}); give the"
            " directory or hub id of the model by --config MODEL, and --trust-remote-code where its code comes"
            " with it"
        ) from error
    name = (settings.architectures or [None])[0]
    own = getattr(settings, "auto_map", {}) if trust_remote_code else {}
    cls = getattr(
        transformers, next((auto for auto, code in own.items() if str(code).endswith(f".{name}")), str(name)), None
    )
    if cls is None:
        raise UsageError(
            f"{config}/config.json is of the architecture {name}, which transformers {transformers.__version__} does"
            " not know; install the version that the model was trained with, or pass --trust-remote-code where its"
            " code comes with it"
        )
    return cls, settings


def meta_model(config: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights: names and shapes, on the meta device."""
    return made_on_meta(*model_class(config, trust_remote_code), f"{config}/config.json")


def made_on_meta(cls: Any, settings: Any, source: str) -> nn.Module:
    """A model of this class without its weights. source: where its configuration is from, for the UsageError where it
    can't be made.
    """
    try:
        with torch.device("meta"):
            return (
                cls.from_config(settings, trust_remote_code=True)
                if hasattr(cls, "from_config")
                else cls._from_config(settings)
            )
    except Exception as error:  # so does a model's, on a config that is not its own or for want of a package
        raise UsageError(
            f"{cls.__name__} can't be made from {source} ({_line(error)}); give the config of the model that was"
            " trained: --config MODEL"
        ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def of_model(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Entry]:
    """The checkpoint's entries under the model's own names, tied ones once.

    Raises:
        UsageError: one is missing, of another shape, or not of this model.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = _prefix(checkpoint, wanted)
    params = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, param in params.items():
        names_of.setdefault(id(param), []).append(name)
    found: dict[str, Entry] = {}
    for name, shape in wanted.items():
        names = names_of[id(params[name])] if name in params else [name]
        if name != names[0]:
            continue
        known = [prefix + alias for alias in names]
        known += [checkpoint.tied[alias] for alias in known if alias in checkpoint.tied]
        entry = next((checkpoint.entries[alias] for alias in known if alias in checkpoint.entries), None)
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
        found[name] = entry
    # What stands beside the model in a script's checkpoint is the script's own.
    foreign = sorted(
        name for name in checkpoint.entries if name.startswith(prefix) and name.removeprefix(prefix) not in wanted
    )
    if foreign:
        raise UsageError(
            f"{len(foreign)} tensors in {checkpoint.path} are not of {type(model).__name__}, such as {foreign[0]}; "
            f"{_advice(checkpoint)}"
        )
    return found


def names_in(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """{name of a parameter: its name among published tensors}, of those that have the same shape in both. (What was
    saved without the model's head, as GPT-2 on the hub, has not its prefix; others are saved under other names than
    they have in memory.)

    Args: shapes: of the published tensors, by name.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for name, param in model.named_parameters():
        known = next(
            (alias for alias in (name, name.removeprefix(prefix), prefix + name) if alias in shapes), None
        ) or _saved_name(model, name, param)
        if shapes.get(known) == tuple(param.shape):
            names[name] = known
    return names


def _saved_name(model: nn.Module, name: str, param: Tensor) -> str:
    """Under which transformers saves a parameter, as `_reverted`; its own where it is no tensor of its own there."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved = list(
            revert_weight_conversion(model, {name: torch.empty(param.shape, dtype=param.dtype, device="meta")})
        )
    except Exception:  # whatever a conversion raises that lacks its other tensors
        saved = []
    return saved[0] if len(saved) == 1 else name


def _prefix(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> str:
    """What stands before the model's names: nothing, or the name under which a script kept the model ("model.")."""

    def fits(prefix: str) -> int:
        return sum(prefix + name in checkpoint.entries for name in wanted)

    first = next(iter(wanted))
    candidates = {""} | {name.removesuffix(first) for name in checkpoint.entries if name.endswith("." + first)}
    return max(sorted(candidates, key=len), key=fits)


def _advice(checkpoint: Checkpoint) -> str:
    if any("lora_" in name for name in checkpoint.entries):
        return (
            "it has LoRA's adapters in it: save the adapter by peft's save_pretrained, and merge it by lp-dist merge"
        )
    return "give the config of the model that was trained: --config MODEL"


def _reverted(model: nn.Module, entries: dict[str, Entry]) -> list[Published]:
    """transformers joins or splits some models' weights while it loads them (a layer's experts into one tensor), and
    takes that back when it saves them; here that is done for as few tensors at a time as it can be done for.

    Raises:
        UsageError: for no few of them it comes to the same as for all.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def shapes(metas: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(meta.shape)) for name, meta in revert_weight_conversion(model, metas).items()]

    def read(names: list[str]) -> dict[str, Tensor]:
        return revert_weight_conversion(model, {name: entries[name].read() for name in names})

    metas = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    groups: dict[str, list[str]] = {}  # those that go into one published tensor, by its name
    try:
        for name, meta in metas.items():
            groups.setdefault(min(shapes({name: meta}))[0], []).append(name)
        apart = [shapes({name: metas[name] for name in names}) for names in groups.values()]
    except Exception:  # whatever a conversion raises that lacks its other tensors
        apart = []
    if sorted(shape for group in apart for shape in group) != sorted(shapes(metas)):
        raise UsageError(
            f"{type(model).__name__}'s weights are published in another form than in memory, which can't be made of a"
            " few tensors at a time; export from the training itself: trainer.save_model()"
        )
    return [
        Published(sum(entries[name].nbytes for name in names), dict(made), partial(read, names))
        for names, made in zip(groups.values(), apart)
    ]


def loadable(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json of the model in `dtype`, and without what a loader would take for compressed weights (vLLM refuses a
    `sparsity_config`).

    dtype: None leaves it as it is.
    """
    name = str(dtype).removeprefix("torch.")

    def rewritten(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: name if dtype and key in ("dtype", "torch_dtype") else rewritten(value)
            for key, value in part.items()
            if key not in ("sparsity_config", "compression_config", "quantization_config")
        }

    return {**rewritten(config), **({"dtype": name} if dtype else {})}
