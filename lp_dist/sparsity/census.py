"""Zeros and dead rows of the shards, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lp_dist.optim.batching import count_zeros
from lp_dist.sharding.collectives import all_reduce_sum
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

    It takes two reductions: of two numbers a parameter, and of one number a row.

    Args:
        shards: of the parameters to count, the same ones on every rank.
    """
    numel: list[int] = []
    # Non-zero weights: of each row, and of each shard that has no rows.
    by_row: dict[int, Tensor] = {}
    by_shard: dict[int, Tensor] = {}
    for i, shard in enumerate(shards):
        local = shard.local
        values = local.counted.reshape(-1)
        numel.append(values.numel())
        if not len(shard.shape):
            by_shard[i] = values.numel() - count_zeros(values)
            continue
        height = shard.grid.sizes[0]
        width = shard.grid.sizes.numel() // max(1, height)
        rows = _nonzero_by_row(values, local.counted_start, height, width)
        by_row[i] = rows
        if height != shard.shape[0]:
            by_row[i] = rows.new_zeros(shard.shape[0]).index_copy_(0, shard.grid.indices(0).to(rows.device), rows)
    row_counts = concatenate_on_host(list(by_row.values()), torch.int32)
    shard_counts = concatenate_on_host([count.view(1) for count in by_shard.values()], torch.int64)
    nonzero: dict[int, int] = dict(zip(by_shard, shard_counts.tolist()))
    nonzero |= {
        i: int(rows.sum()) for i, rows in zip(by_row, row_counts.split([len(rows) for rows in by_row.values()]))
    }
    counts = torch.tensor([[n - nonzero[i], n] for i, n in enumerate(numel)], dtype=torch.int64).view(-1, 2)
    counts = all_reduce_sum(counts)
    row_counts = all_reduce_sum(row_counts)
    return Census(
        [ZeroCount(zeros, elements) for zeros, elements in counts.tolist()],
        int((row_counts == 0).sum()),
        row_counts.numel(),
    )


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


def _nonzero_by_row(values: Tensor, start: int, height: int, width: int) -> Tensor:
    """Non-zero weights of each row of a matrix: int32 [height], on the device of `values`.

    Args:
        values: a range of the matrix, taken flat.
        start: the first element of the range.
        height: rows of the matrix.
        width: elements of a row.
    """

    def count(nonzero: Tensor) -> Tensor:
        return nonzero.view(torch.int8).view(-1, width).sum(1, dtype=torch.int32)

    if values.numel() == height * width and values.numel():
        # A cast, several times as fast as a comparison.
        return count(values.bool())
    rows = torch.zeros(height, dtype=torch.int32, device=values.device)
    if values.numel():
        first, last = start // width, (start + values.numel() - 1) // width
        # The range, filled up to complete rows.
        nonzero = torch.zeros((last - first + 1) * width, dtype=torch.bool, device=values.device)
        nonzero[start - first * width :][: values.numel()].copy_(values)
        rows[first : last + 1] = count(nonzero)
    return rows
