"""DeepSpeed's checkpoints: the fp32 master weights of ZeRO 1 to 3, read from the ranks' files one parameter at a time.

The format is DeepSpeed's: `latest` names a tag, whose directory has `*_model_states.pt` and `*_optim_states.pt`. Keys
and layout are those that `deepspeed/utils/zero_to_fp32.py` and `deepspeed/checkpoint/constants.py` use. The universal
form (`deepspeed/checkpoint/ds_to_universal.py`) has a directory `zero/NAME` with `fp32.pt` for each parameter.

zero_to_fp32 relies on the same layout (the order of `param_shapes`), but holds all of ZeRO-1/2's weights in memory at
once. ds_to_universal relies on `param_slice_mappings`, which DeepSpeed 0.19 makes in another order than the weights
have under round_robin_gradients.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lp_dist.checkpoints.entries import Checkpoint, Entry, check_inside, unwrapped
from lp_dist.checkpoints.files import TorchFile
from lp_dist.errors import UsageError

_PARALLEL = re.compile(r"mp_rank_(?!00)\d\d|expp_rank|^layer_")


def find(path: Path, trust_pickles: bool = False) -> Checkpoint | None:
    """The DeepSpeed checkpoint in this directory, or of its latest tag; None if there is none.

    Raises:
        UsageError: it is not complete, was saved with another kind of parallelism, or names classes that are not
            known, unless it is trusted.
    """
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text().strip()
        check_inside(latest, tag)
        if not (path / tag).is_dir():
            raise UsageError(
                f"{latest} names {tag!r}, which is not there; name the directory of another tag in {path}"
            )
        path = path / tag
    optim, files = _sorted(path, "*_optim_states.pt"), _sorted(path, "*_model_states.pt")
    universal = (path / "zero").is_dir() and not any("zero_pp_rank" in file.name for file in optim)
    if not universal and not optim and not files:
        return None
    if not files:
        raise UsageError(f"{path} has no *_model_states.pt, so it is not complete; copy or convert it anew")
    if not universal and any(_PARALLEL.search(file.name) for file in path.iterdir()):
        raise UsageError(
            f"{path} was written with tensor, pipeline or expert parallelism, which lp_dist does not read; convert it"
            " with DeepSpeed's ds_to_universal first, and export that"
        )
    models = [TorchFile(file, trust_pickles) for file in files]
    if universal:
        masters = _universal(path / "zero", models[0], trust_pickles)
        return _checkpoint(path, "DeepSpeed universal", masters, models)
    if optim:
        return _zero(path, [TorchFile(file, trust_pickles) for file in optim], models)
    if models[0].content.get("param_shapes"):
        raise UsageError(
            f"{path} was saved under ZeRO, but its *_optim_states.pt, which have the weights, are not there; copy it"
            " anew, from every node"
        )
    # The weights are those of the module, in 16 bits where it has them.
    return _checkpoint(path, "DeepSpeed without ZeRO", {}, models)


def _sorted(path: Path, pattern: str) -> list[Path]:
    """The ranks' files in the order of ranks: rank 10 after rank 9."""
    return sorted(path.glob(pattern), key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def _checkpoint(path: Path, form: str, masters: dict[str, Entry], models: list[TorchFile]) -> Checkpoint:
    """The checkpoint of these master weights, with what is not trained: buffers and frozen parameters."""
    first = models[0].content
    # In stages 1 and 2 the module is complete. In stage 3 it has only buffers, and every rank has an equal shard of
    # each frozen parameter.
    entries = {name: _joined(name, [(models[0], tensor)], tensor.shape) for name, tensor in first["module"].items()}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        entries[name] = _joined(
            name, [(model, model.content["frozen_param_fragments"][name].view(-1)) for model in models], shape
        )
    entries |= masters
    tied = {unwrapped(name): unwrapped(target) for name, target in dict(first.get("shared_params") or {}).items()}
    return Checkpoint(
        path,
        form,
        {unwrapped(name): entry for name, entry in entries.items() if unwrapped(name) not in tied},
        runtime_names=True,
        tied=tied,
    )


def _zero(path: Path, optim: list[TorchFile], models: list[TorchFile]) -> Checkpoint:
    states = [(file, file.content["optimizer_state_dict"]) for file in optim]
    # BF16_Optimizer, a stage 1, does not say its stage.
    stage, world = int(states[0][1].get("zero_stage", 1)), states[0][1]["partition_count"]
    world = max(world) if isinstance(world, list) else world
    for what, count in (("optimizer", len(states)), ("model", len(models) if stage == 3 else world)):
        if count != world:
            raise UsageError(
                f"{path} was saved by {world} ranks, but the {what} states of {count} are there; copy it anew, from"
                " every node"
            )
    masters = (_stage_3 if stage == 3 else _stage_1_or_2)(states, models[0].content["param_shapes"])
    return _checkpoint(path, f"DeepSpeed ZeRO-{stage}, {world} rank{'s' if world > 1 else ''}", masters, models)


def _stage_1_or_2(
    states: list[tuple[TorchFile, dict[str, Any]]], param_shapes: list[dict[str, Any]]
) -> dict[str, Entry]:
    """Stages 1 and 2, and BF16_Optimizer: each param group is a flat tensor, of which every rank has an equal shard,
    with padding at its end.
    """
    entries = {}
    for group, shapes in enumerate(param_shapes):
        flats = [(file, state["single_partition_of_fp32_groups"][group]) for file, state in states]
        aligned, offset = states[0][1].get("param_alignment_paddings"), 0
        for (name, shape), padding in zip(shapes.items(), aligned[group] if aligned else [0] * len(shapes)):
            entries[name] = _joined(name, _slices(flats, offset, offset + math.prod(shape)), shape)
            offset += math.prod(shape) + padding
    return entries


def _slices(flats: list[tuple[TorchFile, Tensor]], start: int, end: int) -> list[tuple[TorchFile, Tensor]]:
    """The slices of the ranks' flat tensors, taken one after the other, that hold the elements [start, end)."""
    slices, before = [], 0
    for file, flat in flats:
        if start < before + flat.numel() and before < end:
            slices.append((file, flat[max(0, start - before) : end - before]))
        before += flat.numel()
    return slices


def _stage_3(states: list[tuple[TorchFile, dict[str, Any]]], param_shapes: list[dict[str, Any]]) -> dict[str, Entry]:
    """Stage 3: every rank has an equal shard of each parameter, one after the other in each sub-group."""
    entries, world = {}, len(states)
    if any(
        partition.get("partition_count", world) != world
        for _, state in states
        for partition in state.get("ds_zero_partition_groups") or []
    ):
        raise UsageError(
            "the checkpoint is of MiCS or expert parallelism, where a parameter lies on some of the ranks only, which"
            " lp_dist does not read; convert it with DeepSpeed's ds_to_universal first, and export that"
        )
    for group, shapes in enumerate(param_shapes):
        offset = 0
        for name, shape in shapes.items():
            length = math.ceil(math.prod(shape) / world)
            entries[name] = _joined(
                name,
                [(file, state["fp32_flat_groups"][group][offset : offset + length]) for file, state in states],
                shape,
            )
            offset += length
    return entries


def _universal(folder: Path, first: TorchFile, trust_pickles: bool) -> dict[str, Entry]:
    """The universal form: a directory for each parameter. After stages 1 and 2 frozen parameters have one too, but in
    another dtype than in the module.
    """
    shapes = {name: tuple(shape) for group in first.content["param_shapes"] for name, shape in group.items()}
    entries = {}
    for name, shape in shapes.items():
        check_inside(first.file, name)
        file = folder / name / "fp32.pt"
        if not file.is_file():
            raise UsageError(f"there is no {file}, so the universal checkpoint is not complete; convert it anew")
        torch_file = TorchFile(file, trust_pickles)
        tensor = torch_file.content["param"] if isinstance(torch_file.content, dict) else torch_file.content
        # Flat after stage 3, and larger than the ranks' after tensor parallelism.
        entry = _joined(name, [(torch_file, tensor)], shape if tensor.numel() == math.prod(shape) else tensor.shape)
        weight = first.content["module"].get(name)
        if weight is not None and tuple(weight.shape) == entry.shape:
            entries[name] = Entry(entry.shape, entry.dtype, partial(_checked, name, entry, first, weight))
        else:
            entries[name] = entry
    return entries


def _checked(name: str, entry: Entry, first: TorchFile, weight: Tensor) -> Tensor:
    """A master weight, once it is known to equal the module's own weight. DeepSpeed's conversion does not check it.

    Raises:
        UsageError: they differ.
    """
    master = entry.read()
    if not torch.equal(master.to(weight.dtype), first.read(weight)):
        raise UsageError(
            f"{name} in the universal checkpoint is not what the model had in {first.file}: DeepSpeed 0.19 mixes"
            " parameters up when it converts what was saved under round_robin_gradients; export the checkpoint that"
            " it was converted from"
        )
    return master


def _joined(name: str, slices: list[tuple[TorchFile, Tensor]], shape: Any) -> Entry:
    """The tensor of these flat slices, in this order; elements beyond its end are padding.

    Raises:
        UsageError: the slices have fewer elements than the tensor.
    """
    for file, values in slices:
        file.check_fits(name, values)
    shape, elements = tuple(shape), sum(values.numel() for _, values in slices)
    if elements < math.prod(shape):
        raise UsageError(
            f"only {elements:,} of the {math.prod(shape):,} elements of {name} are in the ranks' files; where they are"
            " on another disk (NVMe offload), let the engine save a universal checkpoint or its own 16-bit weights"
        )
    dtype = slices[0][1].dtype if slices else torch.float32
    return Entry(shape, dtype, partial(_join, slices, shape, dtype))


def _join(slices: list[tuple[TorchFile, Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor, filled = torch.empty(math.prod(shape), dtype=dtype), 0
    for file, meta in slices:
        values = file.read(meta).view(-1)[: len(tensor) - filled]
        tensor[filled : filled + len(values)] = values
        filled += len(values)
    return tensor.view(shape)
