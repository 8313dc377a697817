"""What a step works on: the local part of each tensor, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements that one pass of the foreach step takes at a time, so that its temporaries stay in the cache of a CPU and
# never grow with the model. A multiple of every vector width, so that a slice changes no value.
_SLICE = {"cpu": 1 << 16}
_SLICE_ACCELERATOR = 1 << 24


Row = tuple[Tensor | float, ...]  # weight, gradient, state tensors of one parameter (or a slice of it), step count


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank; other tensors are whole. The step is elementwise, so local is
    enough.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def limit(device: torch.device) -> int:
    """Elements of a slice."""
    return _SLICE.get(device.type, _SLICE_ACCELERATOR)


def pieces(values: Tensor) -> tuple[Tensor, ...]:
    """`values` in flat slices of bounded size; what can't be viewed flat is copied."""
    return values.reshape(-1).split(limit(values.device))


def count_zeros(values: Tensor) -> Tensor:
    """Exact zeros, as an int64 scalar on the device of `values`, so that no host waits."""
    # Casting to bool is what torch does fastest on a CPU, by far: 10 times as fast as a comparison, and up to 50 times
    # as count_nonzero. A slice has fewer elements than an int32 can count, and bytes are summed in vectors.
    counts = [piece.bool().view(torch.int8).sum(dtype=torch.int32) for piece in pieces(values)]
    alive = counts[0] if len(counts) == 1 else torch.stack(counts).sum(dtype=torch.int64)
    return values.numel() - alive.long()


def batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows in batches of bounded size: large tensors come in slices (flat views), small ones together."""
    batch, size = [], 0
    for row in rows:
        tensors = row[:-1]
        most = limit(tensors[0].device)
        for piece in _slices(tensors, most):
            batch.append((*piece, row[-1]))
            size += piece[0].numel()
            if size >= most:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _slices(tensors: tuple[Tensor, ...], most: int) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].numel() <= most or not all(t.is_contiguous() for t in tensors):
        return iter((tensors,))  # what can't be viewed flat is taken whole: right, if larger
    return zip(*(t.view(-1).split(most) for t in tensors))
