"""Which part of a model's parameter each tensor of its files holds: transformers saves some models' weights in another
form than it has them in memory, as the experts of a layer one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SavedSlice:
    """A tensor of the files, of the elements of one parameter.

    Args:
        name: of the tensor in the files.
        along: of each dimension of the parameter, the dimension of the tensor that it is; None where the tensor is of
            one index alone.
        indices: of each dimension of the parameter, the indices that the tensor holds, in its order; int64.
        prefix: what the files have before the name that transformers would give it.
        removed_prefix: what of that name the files lack.
    """

    name: str
    along: tuple[int | None, ...]
    indices: tuple[Tensor, ...]
    prefix: str = ""
    removed_prefix: str = ""


def saved_slices(
    model: nn.Module, names: set[str], shapes: dict[str, tuple[int, ...]] | None
) -> dict[str, list[SavedSlice]]:
    """The tensors of the files that parameters and buffers are saved as.

    Args:
        model: on any device.
        names: of the parameters and buffers.
        shapes: {name: shape} of the tensors in the files. None: all are taken as transformers would save them.
    Returns:
        {name: its tensors}, of those of which the files have all.
    """
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    base = f"{getattr(model, 'base_model_prefix', '')}."
    results = {}
    for name in names & state.keys():
        in_files = [
            located
            for saved in _as_saved(model, name, state[name])
            if (located := _in_files(saved, shapes, base)) is not None
        ]
        if in_files and sum(_numel(saved) for saved in in_files) == torch.Size(state[name]).numel():
            results[name] = in_files
    return results


def _numel(saved: SavedSlice) -> int:
    return torch.Size([len(indices) for indices in saved.indices]).numel()


def _in_files(saved: SavedSlice, shapes: dict[str, tuple[int, ...]] | None, base: str) -> SavedSlice | None:
    """With the name that the files have for it; None if they have none of this shape. What was saved without the
    model's head lacks the prefix.
    """
    if shapes is None:
        return saved
    size = {dim: len(indices) for dim, indices in zip(saved.along, saved.indices) if dim is not None}
    shape = tuple(size[dim] for dim in sorted(size))
    for name, prefix, removed in (
        (saved.name, "", ""),
        (saved.name.removeprefix(base), "", base),
        (base + saved.name, base, ""),
    ):
        if shapes.get(name) == shape:
            return SavedSlice(name, saved.along, saved.indices, prefix, removed)
    return None


def _as_saved(model: nn.Module, name: str, shape: tuple[int, ...]) -> list[SavedSlice]:
    """What transformers saves a tensor as: it is given the index along each dimension in the place of the values."""
    identity = SavedSlice(name, tuple(range(len(shape))), tuple(torch.arange(size) for size in shape))
    by_dim: list[dict[str, Tensor]] = []
    for dim, size in enumerate(shape):
        # Takes no memory, whatever the shape.
        probe = torch.arange(size, device="cpu").view([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)
        converted = _converted(model, name, probe)
        if converted is None:
            return [identity]
        by_dim.append(converted)
    slices = []
    for saved_name in by_dim[0]:
        along: list[int | None] = []
        indices: list[Tensor] = []
        for converted in by_dim:
            values = converted[saved_name]
            lines = [_line(values, dim) for dim in range(values.ndim)]
            varying = [dim for dim, line in enumerate(lines) if len(line.unique()) > 1]
            along.append(varying[0] if varying else None)
            indices.append(lines[varying[0]] if varying else values.reshape(-1)[:1])
        slices.append(SavedSlice(saved_name, _with_single(along, indices, by_dim[0][saved_name].ndim), tuple(indices)))
    return slices


def _with_single(along: list[int | None], indices: list[Tensor], ndim: int) -> tuple[int | None, ...]:
    """Dimensions of size 1 do not vary: they are the tensor's dimensions that are left, in their order."""
    free = [dim for dim in range(ndim) if dim not in along]
    missing = [i for i, dim in enumerate(along) if dim is None]
    # Of what was split off, as single experts, the first dimension is none of the tensor's.
    for i, dim in zip(reversed(missing), reversed(free)):
        along[i] = dim
    return tuple(along)


def _line(values: Tensor, dim: int) -> Tensor:
    """The values along one dimension, at the first index of the others."""
    for other in reversed(range(values.ndim)):
        if other != dim:
            values = values.select(other, 0)
    return values


def _converted(model: nn.Module, name: str, probe: Tensor) -> dict[str, Tensor] | None:
    """What transformers makes of a tensor when it saves it; None where it needs others for that."""
    from transformers.core_model_loading import revert_weight_conversion

    if not hasattr(model, "config"):
        return None
    try:
        return revert_weight_conversion(model, {name: probe})
    except Exception:  # a conversion that lacks its other tensors may raise anything
        return None
