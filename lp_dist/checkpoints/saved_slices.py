"""Which part of a model's parameter each tensor of its files holds: transformers saves some models' weights in another
form than it has them in memory, as the experts of a layer one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lp_dist.checkpoints.hf_names import Conversion, NameMap


@dataclass(frozen=True)
class SavedSlice:
    """A tensor of the files, of the elements of one parameter.

    Args:
        name: of the tensor in the files.
        along: of each dimension of the parameter, the dimension of the tensor that it is; None where the tensor is of
            one index alone.
        indices: of each dimension of the parameter, the indices that the tensor holds, in its order; int64.
        saved_as: the name that transformers would save it under. Files may have another one: what was saved without
            the model's head lacks a prefix.
    """

    name: str
    along: tuple[int | None, ...]
    indices: tuple[Tensor, ...]
    saved_as: str

    def renamed(self, saved_as: str) -> str:
        """The name in the files of a tensor that transformers would save under another name than this one."""
        if saved_as == self.saved_as:
            return self.name
        if self.name.endswith(self.saved_as):
            return self.name.removesuffix(self.saved_as) + saved_as
        return saved_as.removeprefix(self.saved_as.removesuffix(self.name))


def saved_slices(model: nn.Module, names: set[str], in_files: NameMap | None) -> dict[str, list[SavedSlice]]:
    """The tensors of the files that parameters and buffers are saved as.

    Args:
        model: on any device.
        names: of the parameters and buffers.
        in_files: which tensors of the files hold them. None: all are taken as transformers would save them.
    Returns:
        {name: its tensors}, of those of which the files have all.
    """
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    results = {}
    for name in names & state.keys():
        as_saved = _as_saved(model, name, state[name])
        if in_files is not None:
            conversion = in_files.by_param.get(name)
            if conversion is None:
                continue
            as_saved = _in_files(name, as_saved, conversion)
        if as_saved:
            results[name] = as_saved
    return results


def _in_files(name: str, as_saved: list[SavedSlice], conversion: Conversion) -> list[SavedSlice]:
    """With the names that the files have for them; empty where one is not in the files, or not for itself."""
    if conversion.is_renaming:
        (hf_name,) = conversion.hf_shapes
        saved_as = as_saved[0].saved_as if len(as_saved) == 1 else name
        return [_unchanged(hf_name, conversion.shapes[name], saved_as)]
    as_read = _as_read(name, as_saved, conversion)
    if as_read is not None:
        return [as_read]
    results = []
    for saved in as_saved:
        named = [
            hf_name
            for hf_name in conversion.hf_shapes
            if hf_name.endswith(saved.saved_as) or saved.saved_as.endswith(hf_name)
        ]
        if len(conversion.shapes) > 1 or len(named) != 1 or not _fits(saved, conversion.hf_shapes[named[0]]):
            return []
        results.append(replace(saved, name=named[0]))
    return results


def _fits(saved: SavedSlice, hf_shape: tuple[int, ...]) -> bool:
    return all(
        along is None or (along < len(hf_shape) and hf_shape[along] == len(indices))
        for along, indices in zip(saved.along, saved.indices)
    )


def _as_read(name: str, as_saved: list[SavedSlice], conversion: Conversion) -> SavedSlice | None:
    """A tensor that is one parameter in another order, as loading it shows: files may have an order in which they are
    not saved any more. None where it is not so.
    """
    shape = conversion.shapes[name]
    (hf_name, hf_shape), *others = conversion.hf_shapes.items()
    if others or len(as_saved) != 1 or not conversion.is_of_one_param or len(hf_shape) != len(shape):
        return None
    along: list[int | None] = [None] * len(shape)
    indices = [torch.zeros(1, dtype=torch.int64) for _ in shape]
    for hf_dim in range(len(hf_shape)):
        values = conversion.to_memory({hf_name: _probe(hf_shape, hf_dim)})[name]
        lines = [_line(values, dim) for dim in range(len(shape))]
        varying = [dim for dim, line in enumerate(lines) if len(line.unique()) > 1]
        if len(varying) > 1:
            return None
        for dim in varying:
            if along[dim] is not None or len(lines[dim]) != hf_shape[hf_dim]:
                return None
            along[dim], indices[dim] = hf_dim, lines[dim].argsort()
    return SavedSlice(hf_name, _with_single(along, indices, len(hf_shape)), tuple(indices), as_saved[0].saved_as)


def _probe(shape: tuple[int, ...], dim: int) -> Tensor:
    """The index along one dimension in the place of each value. It takes no memory, and copies of it take little."""
    dtype = torch.int16 if shape[dim] <= torch.iinfo(torch.int16).max else torch.int32
    indices = torch.arange(shape[dim], dtype=dtype, device="cpu")
    return indices.view([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)


def _unchanged(name: str, shape: tuple[int, ...], saved_as: str) -> SavedSlice:
    """A tensor that is the parameter."""
    return SavedSlice(name, tuple(range(len(shape))), tuple(torch.arange(size) for size in shape), saved_as)


def _as_saved(model: nn.Module, name: str, shape: tuple[int, ...]) -> list[SavedSlice]:
    """What transformers saves a tensor as: it is given the index along each dimension in the place of the values."""
    by_dim: list[dict[str, Tensor]] = []
    for dim in range(len(shape)):
        converted = _converted(model, name, _probe(shape, dim))
        if converted is None:
            return [_unchanged(name, shape, name)]
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
            indices.append(lines[varying[0]] if varying else values.reshape(-1)[:1].long())
        dims = _with_single(along, indices, by_dim[0][saved_name].ndim)
        slices.append(SavedSlice(saved_name, dims, tuple(indices), saved_name))
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
    return values.long()


def _converted(model: nn.Module, name: str, probe: Tensor) -> dict[str, Tensor] | None:
    """What transformers makes of a tensor when it saves it; None where it needs others for that."""
    from transformers.core_model_loading import revert_weight_conversion

    if not hasattr(model, "config"):
        return None
    try:
        return revert_weight_conversion(model, {name: probe})
    except Exception:  # a conversion that lacks its other tensors may raise anything
        return None
