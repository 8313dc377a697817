"""Where the weights of groups lie on this rank: as tiles of the matrices whose rows and columns the groups are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lp_dist.errors import UsageError
from lp_dist.optim import batching
from lp_dist.sharding.deepspeed_slices import is_local_expert
from lp_dist.sharding.shards import Shard
from lp_dist.structured.groups import WeightGroups

# The most elements of a tile of one row. Norms take about 28 bytes of each meanwhile.
LONGEST_TILE = 1 << 22


class Block(NamedTuple):
    """A box of a stack of matrices.

    Args:
        start: its first element in the flat values.
        values: a view, (matrices, rows, columns).
        numbers: {0: the numbers of the groups of its rows, (matrices, rows, 1); 1: those of its columns, (matrices, 1,
            columns)}, or one of both; int32.
    """

    start: int
    values: Tensor
    numbers: dict[int, Tensor]


@dataclass(frozen=True)
class MatrixShard:
    """One parameter on this rank, taken as a stack of matrices: of one, or of one for each expert.

    Args:
        shard: where it lies.
        shape: (matrices, rows, columns), of the parameter or the region of it that the shard is a range of.
        row_numbers: the number of the group of each row, among the groups of all sets; int32, (matrices, rows). A row
            of no group has the number after the last group's. None: rows are of no groups.
        column_numbers: those of the columns, (matrices, columns).
    """

    shard: Shard
    shape: tuple[int, int, int]
    row_numbers: Tensor | None = None
    column_numbers: Tensor | None = None

    def blocks(self, values: Tensor, start: int, max_elements: int | None = 0) -> Iterator[Block]:
        """A contiguous range of the parameter, as boxes.

        Args:
            values: the range, flat.
            start: its first element in the parameter or region.
            max_elements: as of `tiles`.
        """
        _, rows, columns = self.shape
        for tile in tiles(values, start, columns, max_elements, rows if self._is_stack else None):
            first, row = divmod(tile.rows.start, rows)
            count = max(1, (tile.rows.stop - tile.rows.start) // rows)
            rows_of_each = slice(row, row + (tile.rows.stop - tile.rows.start) // count)
            numbers = {}
            if self.row_numbers is not None:
                numbers[0] = self.row_numbers[first : first + count, rows_of_each, None]
            if self.column_numbers is not None:
                numbers[1] = self.column_numbers[first : first + count, None, tile.columns]
            yield Block(tile.start, tile.values.view(count, -1, tile.values.shape[1]), numbers)

    @property
    def _is_stack(self) -> bool:
        return self.shape[0] > 1


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


def tiles(
    values: Tensor, start: int, row_length: int, max_elements: int | None = 0, rows_of_each: int | None = None
) -> Iterator[Tile]:
    """A contiguous range of a matrix, as rectangles.

    Args:
        values: the range, flat.
        start: its first element in the matrix.
        row_length: elements of a row of the matrix.
        max_elements: of a tile of several rows. 0: as many as fit in a cache. None: any number. Unless it is None, a
            row of more than `LONGEST_TILE` is divided: it may be a whole expert.
        rows_of_each: rows of each of several matrices that lie one after the other. A tile then is a part of one of
            them, or several of them.
    """
    position, max_elements = 0, batching.tile_size(values.device) if max_elements == 0 else max_elements
    while position < values.numel():
        row, column = divmod(start + position, row_length)
        remaining = values.numel() - position
        longest = row_length if max_elements is None else LONGEST_TILE
        if column or remaining < row_length or row_length > longest:
            rows, columns = 1, min(row_length - column, remaining, longest)
        else:
            rows, columns = remaining // row_length, row_length
            if max_elements is not None:
                rows = min(rows, max(1, max_elements // row_length))
            if rows_of_each is not None:
                remaining_rows = rows_of_each - row % rows_of_each
                complete = remaining_rows == rows_of_each and rows >= rows_of_each
                rows = rows // rows_of_each * rows_of_each if complete else min(rows, remaining_rows)
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
    matrices: dict[tuple[str, bool], tuple[int, int, int]] = {}
    numbers: dict[tuple[str, bool, bool], Tensor] = {}
    total, first = sum(groups.count for groups in sets), 0
    for groups in sets:
        for member in groups.members:
            shard = shard_of.get(member.name)
            _check_shard(groups.label, member.name, shard)
            assert shard is not None
            # Whole experts are rows of one matrix; channels are rows or columns of the matrix of their expert.
            of_experts = member.expert is not None
            leading = shard.shape[: 1 + of_experts]
            shape = matrices.setdefault(
                (member.name, of_experts),
                (leading[0] if of_experts else 1, leading[-1], shard.shape.numel() // max(1, leading.numel())),
            )
            is_row = member.dim == int(of_experts)
            if not is_row and (member.dim != int(of_experts) + 1 or len(shard.shape) != member.dim + 1):
                raise UsageError(
                    f"{groups.label} have weights along dimension {member.dim} of {member.name}, which is"
                    f" {list(shard.shape)}: only rows and columns of matrices can be groups"
                )
            size = shape[1] if is_row else shape[2]
            number = numbers.setdefault(
                (member.name, of_experts, is_row), torch.full((shape[0], size), total, dtype=torch.int32)
            )
            number[member.expert or 0, member.start : member.stop] = (
                first + member.first + torch.arange(member.stop - member.start) // member.width
            )
        first += groups.count

    def in_region(name: str, of_experts: bool, shape: tuple[int, int, int]) -> MatrixShard:
        shard = shard_of[name]
        rows, columns = (numbers.get((name, of_experts, is_row)) for is_row in (True, False))
        if shard.region is not None:
            # Dimensions of the parameter that are taken as columns together are flattened.
            region, first = shard.region, int(of_experts)
            width = region.sizes[first + 1 :].numel() if region.sizes.numel() else 0
            in_row = region.positions(torch.arange(width)) % shape[2]
            matrices_here = region.indices(0) if of_experts else torch.zeros(1, dtype=torch.int64)
            rows = None if rows is None else rows[matrices_here][:, region.indices(first)]
            columns = None if columns is None else columns[matrices_here][:, in_row]
            shape = (len(matrices_here), region.sizes[first], width)
        device = shard.tensor.device
        return MatrixShard(
            shard,
            shape,
            None if rows is None else rows.to(device),
            None if columns is None else columns.to(device),
        )

    return [in_region(name, of_experts, shape) for (name, of_experts), shape in matrices.items()]


def _check_shard(label: str, name: str, shard: Shard | None) -> None:
    """Raises UsageError if weights of groups lie on this rank in a way that is not supported."""
    if shard is None:
        raise UsageError(
            f"{label} have weights in {name}, which this optimizer does not step; unfreeze it, or leave these groups"
            " out"
        )
    if is_local_expert(shard.param):
        raise UsageError(
            f"{label} have weights of {name}, and that is of different experts on different ranks (deepspeed.moe), so"
            " that no group lies in it; leave its module out, or use AutoEP"
        )
    if shard.is_on_disk:
        raise UsageError(
            f"{label} have weights in {name}, which NVMe offload keeps on the disk, so norms can't be taken; offload"
            " to the CPU instead"
        )
    if not shard.local.values.is_contiguous():
        raise UsageError(
            f"{label} have weights in {name}, which does not lie in memory row by row (transposed, or channels last);"
            " make it so by .contiguous() before the optimizer is made, or leave these groups out"
        )
