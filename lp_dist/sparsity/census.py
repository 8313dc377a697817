"""Zeros and dead rows of the shards, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lp_dist.optim.batching import count_zeros
from lp_dist.sharding.collectives import all_reduce_max, all_reduce_sum
from lp_dist.sharding.shards import Shard


class ZeroCount(NamedTuple):
    """Exact zeros among some weights, and how many weights they are."""

    zeros: int
    elements: int


@dataclass(frozen=True)
class Census:
    """What was counted over all ranks.

    Args:
        counts: of each shard's parameter.
        dead_rows: rows (output channels of a linear layer) that are all zeros.
        rows: dead or not.
    """

    counts: list[ZeroCount]
    dead_rows: int
    rows: int


def census(shards: list[Shard]) -> Census:
    """Counts zeros and dead rows of the masters in one pass over the weights. Collective.

    It takes one reduction of three numbers a parameter, and a second one where rows are divided between ranks: of a
    byte for each row of such a parameter. (FSDP2 divides none, and tensor parallelism some.)

    Args:
        shards: of the parameters to count, the same ones on every rank.
    """
    numel: list[int] = []
    # Non-zero weights: of each row here, and of each shard that has no rows.
    by_row: dict[int, _Rows] = {}
    by_shard: dict[int, Tensor] = {}
    for i, shard in enumerate(shards):
        local = shard.local
        values = local.counted.reshape(-1)
        numel.append(values.numel())
        if not len(shard.shape):
            by_shard[i] = values.numel() - count_zeros(values)
        else:
            by_row[i] = _rows(values, local.counted_start, shard)
    row_counts = concatenate_on_host([rows.nonzero for rows in by_row.values()], torch.int32)
    shard_counts = concatenate_on_host([count.view(1) for count in by_shard.values()], torch.int64)
    nonzero: dict[int, int] = dict(zip(by_shard, shard_counts.tolist()))
    is_divided = torch.zeros(len(row_counts), dtype=torch.bool)
    ends = torch.tensor([len(rows.nonzero) for rows in by_row.values()], dtype=torch.int64).cumsum(0).tolist()
    divided_rows = [0] * len(shards)
    for (i, rows), end in zip(by_row.items(), ends):
        is_divided[end - len(rows.nonzero) + rows.divided] = True
        divided_rows[i] = len(rows.divided)
    cumulative = torch.nn.functional.pad(row_counts.cumsum(0, dtype=torch.int64), (1, 0))
    nonzero |= dict(zip(by_row, cumulative[[0, *ends]].diff().tolist()))
    counts = [[n - nonzero[i], n, divided_rows[i]] for i, n in enumerate(numel)]
    alive = int(((row_counts > 0) & ~is_divided).sum())
    sums = all_reduce_sum(torch.tensor([*(count for triple in counts for count in triple), alive])).tolist()
    counts, alive = [sums[3 * i : 3 * i + 3] for i in range(len(shards))], sums[-1]
    are_divided = {i: rows for i, rows in by_row.items() if counts[i][2]}
    if are_divided:
        alive += _alive_divided_rows(shards, are_divided, row_counts, dict(zip(by_row, ends)))
    total_rows = sum(shards[i].shape[0] for i in by_row)
    return Census([ZeroCount(zeros, elements) for zeros, elements, _ in counts], total_rows - alive, total_rows)


def count_copies(shards: list[Shard]) -> list[ZeroCount]:
    """Zeros and elements of each parameter in the model's own copy, which a save of the model writes. Collective: one
    reduction.

    Without an engine it is what the optimizer steps; DeepSpeed has fp32 masters beside it.

    Args:
        shards: of the parameters to count, the same ones on every rank.
    """
    copies = [shard.copy.counted for shard in shards]
    zeros = concatenate_on_host([count_zeros(values).view(1) for values in copies], torch.int64)
    counts = torch.stack([zeros, torch.tensor([values.numel() for values in copies], dtype=torch.int64)], 1)
    return [ZeroCount(*pair) for pair in all_reduce_sum(counts).tolist()]


def concatenate_on_host(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenates vectors on the CPU with one wait for the device.

    Args:
        tensors: vectors of `dtype`, on several devices where some of the weights are offloaded.
        dtype: of the result if there are no tensors.
    """
    return torch.cat([t.to(tensors[0].device) for t in tensors] or [torch.zeros(0, dtype=dtype)]).cpu()


class _Rows(NamedTuple):
    """The rows of a parameter, taken as a matrix, of which this rank counts something.

    Args:
        first: the first of them among the rows of the shard's grid.
        nonzero: non-zero weights of each, among those that are counted here; int32 [rows], where the weights are.
        divided: which of them other ranks have something of too: positions in `nonzero`, ascending; int64.
    """

    first: int
    nonzero: Tensor
    divided: Tensor


def _rows(values: Tensor, start: int, shard: Shard) -> _Rows:
    """The rows in a range of a shard's grid.

    Args:
        values: the range, flat.
        start: its first element in the grid, taken flat.
        shard: of a parameter of one dimension at least.
    """
    numel, width = values.numel(), shard.grid.sizes[1:].numel()
    # A cast, several times as fast as a comparison.
    nonzero = values.bool().view(torch.int8)
    if not numel:
        return _Rows(0, nonzero.int(), torch.zeros(0, dtype=torch.int64))
    # Elements of a row that begins before the range, and those of complete rows after it.
    head = min(-start % width, numel)
    body = (numel - head) // width * width
    counts = [nonzero[head : head + body].view(-1, width).sum(1, dtype=torch.int32)]
    divided: list[int] = []
    if head:
        counts.insert(0, nonzero[:head].sum(dtype=torch.int32).view(1))
        divided.append(0)
    if head + body < numel:
        divided.append(bool(head) + body // width)
        counts.append(nonzero[head + body :].sum(dtype=torch.int32).view(1))
    of_each = torch.cat(counts) if divided else counts[0]
    if width != shard.shape[1:].numel():
        # The grid has some of the columns.
        divided = list(range(len(of_each)))
    return _Rows(start // width, of_each, torch.tensor(divided, dtype=torch.int64))


def _alive_divided_rows(
    shards: list[Shard], by_row: dict[int, _Rows], row_counts: Tensor, ends: dict[int, int]
) -> int:
    """How many of the rows that lie on several ranks have a weight that is not zero. Collective: one reduction.

    Args:
        shards: of all parameters.
        by_row: those that have such rows on any rank, by their number among `shards`.
        row_counts: of `census`, on the host.
        ends: where those of each parameter end in it.
    """
    flags = []
    for i, rows in by_row.items():
        of_shard = torch.zeros(shards[i].shape[0], dtype=torch.uint8)
        if len(rows.divided):
            is_alive = row_counts[ends[i] - len(rows.nonzero) + rows.divided] > 0
            of_shard[shards[i].grid.indices(0)[rows.first + rows.divided]] = is_alive.byte()
        flags.append(of_shard)
    return int(all_reduce_max(torch.cat(flags)).sum())
