"""Where the weights of groups lie on this rank, as rectangles of the matrices that they are rows and columns of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_dist.errors import UsageError
from lp_dist.optim import batching
from lp_dist.sharding.shards import Shard
from lp_dist.structured.groups import Groups


@dataclass(frozen=True)
class Place:
    """One parameter's part on this rank. of: for a dimension, the number of the group of each index along it, among
    all; the last number is none's.
    """

    shard: Shard
    of: dict[int, Tensor]

    @property
    def width(self) -> int:
        """Of a row, the parameter taken as a matrix."""
        return self.shard.shape.numel() // max(1, self.shard.shape[0])


def blocks(values: Tensor, start: int, width: int, most: int | None = 0) -> Iterator[tuple[int, Tensor, slice, slice]]:
    """A range of a matrix whose rows have `width` elements, as rectangles: its first element in `values`, a view, its
    rows and its columns.

    Args:
        values: flat; start: its first element in the matrix. most: elements of a rectangle of several rows; 0: as many
            as fit in a cache, None: any number.
    """
    at, most = 0, batching.limit(values.device) if most == 0 else most
    while at < values.numel():
        row, column = divmod(start + at, width)
        left = values.numel() - at
        if column or left < width:
            rows, columns = 1, min(width - column, left)
        else:
            rows, columns = left // width if most is None else min(left // width, max(1, most // width)), width
        yield (
            at,
            values[at : at + rows * columns].view(rows, columns),
            slice(row, row + rows),
            slice(column, column + columns),
        )
        at += rows * columns


def places_of(sets: list[Groups], shards: list[Shard]) -> list[Place]:
    """Where the groups' weights are on this rank; what holds nothing of them is left out."""
    known, numbers, first = {shard.name: shard for shard in shards}, {}, 0
    total = sum(groups.count for groups in sets)
    for groups in sets:
        for member in groups.members:
            shard = known.get(member.name)
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
            if not shard.piece.values.is_contiguous():
                raise UsageError(
                    f"{groups.label} have weights in {member.name}, which does not lie in memory row by row"
                    " (transposed, or channels last); make it so by .contiguous() before the optimizer is made, or"
                    " leave these groups out"
                )
            of = numbers.setdefault(member.name, {})
            number = of.setdefault(member.dim, torch.full((shard.shape[member.dim],), total))
            number[member.start : member.stop] = first + torch.arange(member.stop - member.start) // member.width
        first += groups.count
    return [
        Place(known[name], {dim: number.to(known[name].tensor.device) for dim, number in of.items()})
        for name, of in numbers.items()
    ]
