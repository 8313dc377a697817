"""Slices of parameters with N:M blocks, for the quantiles of their saliency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lp_dist.optim import nm
from lp_dist.optim.nm import BlockEntries, SplitBlocks
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.quantiles import ScoredSlice, sample_stride


class _Layout(NamedTuple):
    """How the blocks of a parameter lie.

    Args:
        m: weights of a block.
        stride: elements between two weights of a block, see `nm.block_stride`; as many blocks lie between each other.
        interval: the sample has each so many-th block; 1: all blocks.
    """

    m: int
    stride: int
    interval: int

    @property
    def size(self) -> int:
        """Elements of the blocks that lie between each other."""
        return self.m * self.stride


class _ShardEnd(NamedTuple):
    """Entries of one split block, or of several that lie between each other, at the beginning or the end of a shard.

    Args:
        scope: of the shard.
        shard: of the parameter.
        start: the first entry in the parameter, taken flat.
        layout: of the blocks.
        offset: the first entry in the shard.
        length: entries.
    """

    scope: str
    shard: Shard
    start: int
    layout: _Layout
    offset: int
    length: int

    def slices(self, flags: Tensor, all_local: bool, values: dict[str, Any]) -> Iterator[ScoredSlice]:
        """Of the entries, those in the sample: as views if all weights on this rank are meant, which are written to.

        Args:
            flags: which entries are kept; bool [length].
            all_local: see `scored_blocks`.
            values: see `ScoredSlice`.
        """
        stride = self.layout.stride
        if all_local or stride == 1:
            # The entries of an end are of one block. It may be left out of the sample.
            if self.start // self.layout.m % self.layout.interval and stride == 1:
                return
            for kept, run in groupby(range(self.length), flags.tolist().__getitem__):
                of_run = list(run)
                take = _range(self.offset + of_run[0], len(of_run))
                yield self._slice(take, kept, values)
            return
        positions = torch.arange(self.start, self.start + self.length)
        sampled = (positions // self.layout.size * stride + positions % stride) % self.layout.interval == 0
        for kept in (True, False):
            index = self.offset + (sampled & (flags == kept)).nonzero().flatten()
            if len(index):
                yield self._slice(_selection(index), kept, values)

    def _slice(self, take: Callable[[Tensor], Tensor], kept: bool, values: dict[str, Any]) -> ScoredSlice:
        pattern = (1, 1) if kept else None
        return ScoredSlice.from_shard(self.scope, self.shard, values, take=take, pattern=pattern)


def scored_blocks(
    scoped: list[tuple[str, Shard]],
    values_of: Callable[[Shard], dict[str, Any]],
    pattern: str,
    split_blocks: SplitBlocks | None,
    input_dim: Callable[[str], int | None],
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
        input_dim: gives the dimension of inputs of a parameter by its name.
        all_local: all weights on this rank, also those that another rank counts.
        elements: by scope, its weights over all ranks, to take a sample. It consists of complete blocks, and of the
            same ones however the parameters are sharded.
    """
    n, m = nm.parse_pattern(pattern)
    slices: list[ScoredSlice] = []
    ends: list[_ShardEnd] = []
    for scope, shard in scoped:
        # `attach` has refused shards that are no contiguous range.
        inputs = input_dim(shard.name)
        assert shard.start is not None and inputs is not None
        stride = nm.block_stride(shard.shape, inputs)
        blocks_of_row = shard.shape[inputs] // m * stride
        interval = sample_stride(elements[scope], blocks_of_row) if elements is not None else 1
        layout = _Layout(m, stride, interval)
        head, middle = nm.split_at_blocks(shard.start, shard.length, layout.size)
        take = _complete_blocks(shard, shard.start, head, middle, layout, all_local)
        slices.append(ScoredSlice.from_shard(scope, shard, values_of(shard), take=take, pattern=(n, m)))
        ends += [
            _ShardEnd(scope, shard, shard.start + offset, layout, offset, length)
            for offset, length in ((0, head), (head + middle, shard.length - head - middle))
            if length
        ]
    if split_blocks is None:
        return slices
    entries = []
    for end in ends:
        take = _range(end.offset, end.length)
        scored = ScoredSlice.from_shard(end.scope, end.shard, values_of(end.shard), take=take)
        saliency = torch.cat([tile.saliency for tile in scored.saliency()])
        entries.append(BlockEntries(end.shard.name, end.start, nm.ranking_keys(saliency)))
    patterns = {shard.name: (n, m) for _, shard in scoped}
    for end, flags in zip(ends, split_blocks.kept(patterns, entries)):
        slices += end.slices(flags, all_local, values_of(end.shard))
    return slices


def _range(offset: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[offset : offset + length]


def _selection(index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[index.to(tensor.device)]


def _complete_blocks(
    shard: Shard, start: int, head: int, middle: int, layout: _Layout, all_local: bool
) -> Callable[[Tensor], Tensor]:
    """Selects the complete blocks of a shard, those in the sample: flat, or with the last dimension that of a block.

    Of a shard that several ranks hold each takes an equal part, unless `all_local` is set. The selection is a view
    then, which the final pruning writes to.

    Args:
        shard: of the parameter.
        start: the first element of the shard in the parameter, taken flat.
        head: elements of the shard before its first complete block.
        middle: elements in complete blocks.
        layout: of the blocks.
        all_local: all complete blocks on this rank.
    """
    m, stride, interval = layout
    blocks = middle // m
    first, last = 0, blocks
    if not all_local:
        first, last = blocks * shard.replica // shard.replicas, blocks * (shard.replica + 1) // shard.replicas
    # Blocks that lie between each other are numbered one after the other.
    number = (start + head) // layout.size * stride + first

    def take(tensor: Tensor) -> Tensor:
        if stride == 1:
            selected = tensor.reshape(-1)[head + first * m : head + last * m]
            return selected if interval == 1 else selected.view(-1, m)[-number % interval :: interval].reshape(-1)
        view = tensor.reshape(-1)[head : head + middle].view(-1, m, stride).transpose(1, 2)
        return view if all_local else view.reshape(-1, m)[first:last][-number % interval :: interval]

    return take
