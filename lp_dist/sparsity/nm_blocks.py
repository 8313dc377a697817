"""Slices of parameters with N:M blocks, for the quantiles of their saliency."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from lp_dist.optim import nm
from lp_dist.optim.nm import BlockEntries, SplitBlocks
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.quantiles import ScoredSlice, sample_stride


class _ShardEnd(NamedTuple):
    """Entries of one split block, at the beginning or the end of a shard.

    Args:
        scope: of the shard.
        shard: of the parameter.
        start: the first entry in the parameter, taken flat.
        stride: of the sample of blocks.
        offset: the first entry in the shard.
        length: entries.
    """

    scope: str
    shard: Shard
    start: int
    stride: int
    offset: int
    length: int


def scored_blocks(
    scoped: list[tuple[str, Shard]],
    values_of: Callable[[Shard], dict[str, Any]],
    pattern: str,
    split_blocks: SplitBlocks | None,
    all_local: bool,
    elements: dict[str, int] | None = None,
) -> list[ScoredSlice]:
    """Slices of all shards with a pattern, in which kept weights have a saliency of inf.

    Collective if there are split blocks.

    Args:
        scoped: scopes and shards, the same ones on every rank.
        values_of: gives the hyperparameters of a shard's parameter, see `ScoredSlice`.
        pattern: "2:4" or "4:8".
        split_blocks: the blocks that lie on several ranks; None if there are none.
        all_local: all weights on this rank, also those that another rank counts.
        elements: by scope, its weights over all ranks, to take a sample. It consists of complete blocks, and of the
            same ones however the parameters are sharded.
    """
    n, m = nm.parse_pattern(pattern)
    slices: list[ScoredSlice] = []
    ends: list[_ShardEnd] = []
    for scope, shard in scoped:
        # `attach` has refused shards that are no contiguous range.
        assert shard.start is not None
        stride = sample_stride(shard, elements[scope], m) if elements is not None else 1
        head, middle = nm.split_at_blocks(shard.start, shard.length, m)
        take = _complete_blocks(shard, shard.start, head, middle, m, all_local, stride)
        slices.append(ScoredSlice.from_shard(scope, shard, values_of(shard), take=take, pattern=(n, m)))
        ends += [
            _ShardEnd(scope, shard, shard.start + offset, stride, offset, length)
            for offset, length in ((0, head), (head + middle, shard.length - head - middle))
            if length
        ]
    if split_blocks is None:
        return slices
    entries = []
    for end in ends:
        take = _range(end.offset, end.length)
        (tile,) = ScoredSlice.from_shard(end.scope, end.shard, values_of(end.shard), take=take).saliency()
        entries.append(BlockEntries(end.shard.name, end.start, nm.ranking_keys(tile.saliency)))
    patterns = {shard.name: (n, m) for _, shard in scoped}
    for end, flags in zip(ends, split_blocks.kept(patterns, entries)):
        # The entries of an end are of one block. It may be left out of the sample.
        if end.start // m % end.stride:
            continue
        for kept, run in groupby(range(end.length), flags.__getitem__):
            positions = list(run)
            slices.append(
                ScoredSlice.from_shard(
                    end.scope,
                    end.shard,
                    values_of(end.shard),
                    take=_range(end.offset + positions[0], len(positions)),
                    pattern=(1, 1) if kept else None,
                )
            )
    return slices


def _range(offset: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[offset : offset + length]


def _complete_blocks(
    shard: Shard, start: int, head: int, middle: int, m: int, all_local: bool, stride: int
) -> Callable[[Tensor], Tensor]:
    """Selects the complete blocks of a shard, every `stride`-th of the parameter.

    Of a shard that several ranks hold each takes an equal part, unless `all_local` is set.

    Args:
        shard: of the parameter.
        start: the first element of the shard in the parameter, taken flat.
        head: elements of the shard before its first complete block.
        middle: elements in complete blocks.
        m: elements of a block.
        all_local: all complete blocks on this rank.
        stride: of the sample of blocks.
    """
    blocks = middle // m
    first, last = 0, blocks
    if not all_local:
        first, last = blocks * shard.replica // shard.replicas, blocks * (shard.replica + 1) // shard.replicas
    number = (start + head) // m + first

    def take(tensor: Tensor) -> Tensor:
        selected = tensor.reshape(-1)[head + first * m : head + last * m]
        return selected if stride == 1 else selected.view(-1, m)[-number % stride :: stride].reshape(-1)

    return take
