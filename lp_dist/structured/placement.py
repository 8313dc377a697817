"""Where the weights of groups lie on this rank: as tiles of the matrices whose rows and columns the groups are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lp_dist.errors import UsageError
from lp_dist.optim import batching
from lp_dist.sharding.shards import Shard
from lp_dist.structured.groups import WeightGroups


@dataclass(frozen=True)
class MatrixShard:
    """One parameter on this rank, taken as a matrix.

    Args:
        shard: where it lies.
        group_numbers: {dimension: the number of the group of each index along it, among the groups of all sets}. The
            index of no group has the number after the last group's. int64, (size of that dimension,).
    """

    shard: Shard
    group_numbers: dict[int, Tensor]

    @property
    def row_length(self) -> int:
        """Elements of a row of the matrix."""
        return self.shard.shape.numel() // max(1, self.shard.shape[0])


class Tile(NamedTuple):
    """A rectangle of a matrix.

    Args:
        start: its first element in the flat values.
        values: a view, (rows, columns).
        rows: of the matrix.
        columns: of the matrix.
    """

    start: int
    values: Tensor
    rows: slice
    columns: slice


def tiles(values: Tensor, start: int, row_length: int, max_elements: int | None = 0) -> Iterator[Tile]:
    """A contiguous range of a matrix, as rectangles.

    Args:
        values: the range, flat.
        start: its first element in the matrix.
        row_length: elements of a row of the matrix.
        max_elements: of a tile of several rows. 0: as many as fit in a cache. None: any number.
    """
    position, max_elements = 0, batching.tile_size(values.device) if max_elements == 0 else max_elements
    while position < values.numel():
        row, column = divmod(start + position, row_length)
        remaining = values.numel() - position
        if column or remaining < row_length:
            rows, columns = 1, min(row_length - column, remaining)
        else:
            rows, columns = remaining // row_length, row_length
            if max_elements is not None:
                rows = min(rows, max(1, max_elements // row_length))
        yield Tile(
            position,
            values[position : position + rows * columns].view(rows, columns),
            slice(row, row + rows),
            slice(column, column + columns),
        )
        position += rows * columns


def matrix_shards(sets: list[WeightGroups], shards: list[Shard]) -> list[MatrixShard]:
    """Where the groups' weights lie on this rank.

    Args:
        sets: the groups.
        shards: of all parameters that the optimizer steps.
    Raises:
        UsageError: a group has weights that the optimizer does not step, or that lie on this rank in a way that is
            not supported.
    """
    shard_of = {shard.name: shard for shard in shards}
    numbers: dict[str, dict[int, Tensor]] = {}
    total, first = sum(groups.count for groups in sets), 0
    for groups in sets:
        for member in groups.members:
            shard = shard_of.get(member.name)
            if shard is None:
                raise UsageError(
                    f"{groups.label} have weights in {member.name}, which this optimizer does not step; unfreeze it,"
                    " or leave these groups out"
                )
            if shard.is_on_disk:
                raise UsageError(
                    f"{groups.label} have weights in {member.name}, which NVMe offload keeps on the disk, so norms"
                    " can't be taken; offload to the CPU instead"
                )
            if shard.start is None:
                raise UsageError(
                    f"{groups.label} have weights in {member.name}, of which this rank has no contiguous range: this"
                    " way of sharding is not supported. Shard by the first dimension (FSDP2), or use ZeRO"
                )
            if not shard.local.values.is_contiguous():
                raise UsageError(
                    f"{groups.label} have weights in {member.name}, which does not lie in memory row by row"
                    " (transposed, or channels last); make it so by .contiguous() before the optimizer is made, or"
                    " leave these groups out"
                )
            by_dim = numbers.setdefault(member.name, {})
            number = by_dim.setdefault(member.dim, torch.full((shard.shape[member.dim],), total))
            number[member.start : member.stop] = first + torch.arange(member.stop - member.start) // member.width
        first += groups.count
    return [
        MatrixShard(shard_of[name], {dim: number.to(shard_of[name].tensor.device) for dim, number in by_dim.items()})
        for name, by_dim in numbers.items()
    ]
