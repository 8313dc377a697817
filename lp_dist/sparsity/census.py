"""Zeros and dead rows of the shards, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lp_dist.optim import batching
from lp_dist.sharding.collectives import summed
from lp_dist.sharding.shards import Shard


@dataclass(frozen=True)
class Census:
    """counts: zeros and elements of each shard's parameter. dead, rows: rows (output channels of a linear layer) that
    are all zeros, and all.

    All over all ranks. Where a shard is no contiguous range of its parameter, no rows are known.
    """

    counts: list[tuple[int, int]]
    dead: int
    rows: int


def census(shards: list[Shard]) -> Census:
    """Counts in one pass over the weights, and two reductions: of two numbers a parameter, and of one a row."""
    numel, by_row, alone = [], {}, {}  # non-zero weights: of each row, and of shards whose rows are not known
    for i, shard in enumerate(shards):
        piece = shard.piece
        values = piece.share.reshape(-1)
        numel.append(values.numel())
        if piece.first is None or not len(shard.shape):
            alone[i] = values.numel() - batching.count_zeros(values)
        else:
            by_row[i] = _by_row(values, piece.first, shard.shape[0], shard.shape.numel() // max(1, shard.shape[0]))
    alive = _on_host(list(by_row.values()), torch.int32)
    nonzero = dict(zip(alone, _on_host([count.view(1) for count in alone.values()], torch.int64).tolist()))
    nonzero |= {i: int(rows.sum()) for i, rows in zip(by_row, alive.split([len(rows) for rows in by_row.values()]))}
    found = summed(torch.tensor([[n - nonzero[i], n] for i, n in enumerate(numel)], dtype=torch.int64).view(-1, 2))
    every = summed(alive)
    return Census([(zeros, elements) for zeros, elements in found.tolist()], int((every == 0).sum()), every.numel())


def _on_host(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One after the other, by one wait; they may lie on several devices where some of the weights are offloaded."""
    return torch.cat([t.to(tensors[0].device) for t in tensors] or [torch.zeros(0, dtype=dtype)]).cpu()


def _by_row(values: Tensor, start: int, height: int, width: int) -> Tensor:
    """Non-zero weights of each of `height` rows, int32. values: a range of the parameter that begins at `start`, taken
    flat.
    """

    def counted(some: Tensor) -> Tensor:
        return some.view(torch.int8).view(-1, width).sum(1, dtype=torch.int32)

    if values.numel() == height * width and values.numel():
        return counted(values.bool())  # a cast, several times as fast as a comparison
    rows = torch.zeros(height, dtype=torch.int32, device=values.device)
    if values.numel():
        first, last = start // width, (start + values.numel() - 1) // width
        some = torch.zeros((last - first + 1) * width, dtype=torch.bool, device=values.device)  # whole rows
        some[start - first * width :][: values.numel()].copy_(values)
        rows[first : last + 1] = counted(some)
    return rows
