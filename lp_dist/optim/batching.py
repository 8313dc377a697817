"""What a step works on: rows of local tensors, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements that one pass of the foreach step takes at a time. Its temporaries then stay in the cache of a CPU and never
# grow with the model. A multiple of every vector width, so that cutting a tensor into tiles changes no value.
TILE_SIZE = {"cpu": 1 << 16}
TILE_SIZE_ACCELERATOR = 1 << 24
# Elements that are stepped in a copy at a time, where they lie in memory in another order than a step needs.
COPIED_SIZE, COPIED_SIZE_ACCELERATOR = {"cpu": 1 << 18}, 1 << 22


class StepRow(NamedTuple):
    """What one step updates at a time: a parameter on this rank, or a part of it.

    Args:
        weights: floating point, any shape; updated in place.
        grads: like `weights`, in any floating-point dtype.
        states: the base optimizer's state tensors in the order of `state_names`, like `weights`; updated in place.
        step: the steps taken, this one among them; a number, or a one-element tensor on the device (`capturable`).
        span: (first, length) of the elements that are updated, where these are not all; the tensors, which are
            contiguous, taken flat.
    """

    weights: Tensor
    grads: Tensor
    states: tuple[Tensor, ...]
    step: float | Tensor
    span: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """How many elements are updated."""
        return self.weights.numel() if self.span is None else self.span[1]

    def cut(self) -> StepRow:
        """The row with tensors that have the updated elements alone. A fused step needs none: it goes by addresses."""
        if self.span is None:
            return self
        first, length = self.span
        return self.with_tensors(tuple(t.view(-1)[first : first + length] for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weights, gradients and states."""
        return (self.weights, self.grads, *self.states)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> StepRow:
        """The row with other `tensors`, and the same step."""
        return StepRow(tensors[0], tensors[1], tuple(tensors[2:]), self.step)


def to_local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank; other tensors are whole. The step is elementwise, so local is
    enough.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_values(tensor: Tensor) -> Tensor:
    """As `to_local`, without a graph: a view to read and write. A DTensor is not detached itself, which takes several
    times as long.
    """
    with torch.no_grad():
        return to_local(tensor).detach()


def tile_size(device: torch.device) -> int:
    """The most elements of a tile on `device`."""
    return TILE_SIZE.get(device.type, TILE_SIZE_ACCELERATOR)


def tiles(values: Tensor) -> tuple[Tensor, ...]:
    """`values` as flat tiles of bounded size, in order; what can't be viewed flat is copied."""
    return values.reshape(-1).split(tile_size(values.device))


def count_zeros(values: Tensor) -> Tensor:
    """Exact zeros of a tensor of any shape, as an int64 scalar on its device, so that no host waits."""
    # Casting to bool is what torch does fastest on a CPU: 10 times as fast as a comparison, and up to 50 times as
    # count_nonzero. A tile has fewer elements than an int32 can count, and bytes are summed in vectors.
    counts = [tile.bool().view(torch.int8).sum(dtype=torch.int32) for tile in tiles(values)]
    nonzero = counts[0] if len(counts) == 1 else torch.stack(counts).sum(dtype=torch.int64)
    return values.numel() - nonzero.long()


def batches(rows: list[StepRow]) -> Iterator[list[StepRow]]:
    """Rows in batches of bounded size: large tensors come as tiles (flat views), small ones together."""
    batch: list[StepRow] = []
    size = 0
    for row in rows:
        limit = tile_size(row.weights.device)
        for tile in _row_tiles(row, limit):
            batch.append(tile)
            size += tile.weights.numel()
            if size >= limit:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _row_tiles(row: StepRow, limit: int) -> Iterator[StepRow]:
    if row.weights.numel() <= limit or not all(t.is_contiguous() for t in row.tensors):
        # What can't be viewed flat is taken whole: correct, if larger.
        return iter((row,))
    return (row.with_tensors(tensors) for tensors in zip(*(t.view(-1).split(limit) for t in row.tensors)))


class RowCopy(NamedTuple):
    """A part of a row that is stepped in a copy, in which it lies in another order.

    Args:
        tensors: of the row, which are not to be stepped themselves; views of any strides.
        positions: in the row, taken flat, of the elements that the copy has; int64. None: all, in the order of the
            row's dimensions.
        row: the copy; contiguous.
    """

    tensors: tuple[Tensor, ...]
    positions: Tensor | None
    row: StepRow

    @classmethod
    def of(cls, row: StepRow, positions: Tensor | None = None) -> RowCopy:
        """A copy of a row, or of some elements of a contiguous one."""
        copies = (t.contiguous() if positions is None else t.reshape(-1)[positions] for t in row.tensors)
        return cls(row.tensors, positions, row.with_tensors(tuple(copies)))

    def write_back(self) -> None:
        """Writes the stepped weights and states to where they were copied from."""
        stepped = zip((self.tensors[0], *self.tensors[2:]), (self.row.weights, *self.row.states))
        for target, values in stepped:
            if self.positions is None:
                target.copy_(values)
            else:
                target.view(-1)[self.positions] = values


def copies(row: StepRow) -> Iterator[RowCopy]:
    """A row in contiguous copies of bounded size, in the order of its dimensions. The last one is never divided."""
    limit = COPIED_SIZE.get(row.weights.device.type, COPIED_SIZE_ACCELERATOR)
    for tensors in _parts_of_size(row.tensors, limit):
        yield RowCopy.of(row.with_tensors(tensors))


def _parts_of_size(tensors: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    shape = tensors[0].shape
    dim = next((dim for dim in range(len(shape) - 1) if shape[dim] > 1), None)
    if dim is None or tensors[0].numel() <= limit:
        yield tensors
        return
    slice_size = tensors[0].numel() // shape[dim]
    for chunks in zip(*(t.split(max(1, limit // slice_size), dim) for t in tensors)):
        yield from _parts_of_size(chunks, limit)
