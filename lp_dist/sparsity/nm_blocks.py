"""Slices of parameters with N:M blocks, for the quantiles of their saliency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lp_dist.optim import nm
from lp_dist.optim.nm import BlockEntries, CompleteRun, SplitBlocks
from lp_dist.optim.region import Region
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


class _SplitEntries(NamedTuple):
    """Entries of split blocks: at the ends of a shard, or at the borders of the inputs that a rank has.

    Args:
        scope: of the shard.
        shard: of the parameter.
        layout: of the blocks.
        offsets: where they lie in the shard, taken flat; int64.
    """

    scope: str
    shard: Shard
    layout: _Layout
    offsets: Tensor

    @property
    def positions(self) -> Tensor:
        """Where they lie in the parameter, taken flat."""
        return self.shard.grid.positions(self.shard.start + self.offsets)

    def slices(self, flags: Tensor, all_local: bool, values: dict[str, Any]) -> Iterator[ScoredSlice]:
        """Of the entries, those in the sample: as views if all weights on this rank are meant, which are written to.

        Args:
            flags: which entries are kept; bool [entries].
            all_local: see `scored_blocks`.
            values: see `ScoredSlice`.
        """
        if all_local:
            shifts = (self.offsets - torch.arange(len(self.offsets))).tolist()  # equal for neighbours
            for (kept, _), run in groupby(range(len(self.offsets)), list(zip(flags.tolist(), shifts)).__getitem__):
                of_run = list(run)
                yield self._slice(_range(int(self.offsets[of_run[0]]), len(of_run)), kept, values)
            return
        positions, stride = self.positions, self.layout.stride
        sampled = (positions // self.layout.size * stride + positions % stride) % self.layout.interval == 0
        for kept in (True, False):
            index = self.offsets[sampled & (flags == kept)]
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
    ends: list[_SplitEntries] = []
    for scope, shard in scoped:
        inputs = input_dim(shard.name)
        assert inputs is not None
        stride = nm.block_stride(shard.shape, inputs)
        blocks_of_row = shard.shape[inputs] // m * stride
        interval = sample_stride(elements[scope], blocks_of_row) if elements is not None else 1
        layout = _Layout(m, stride, interval)
        blocks = shard.grid.divided(inputs, m)
        if blocks is None:
            takes = [
                _complete_run(shard, inputs, run, layout, all_local) for run in nm.complete_runs(shard.grid, inputs, m)
            ]
            splits = [nm.split_entries(shard.grid, inputs, m)]
        else:
            local_stride = nm.block_stride(shard.grid.sizes, inputs)
            head, middle = nm.split_at_blocks(shard.start, shard.length, m * local_stride)
            takes = [_complete_blocks(shard, blocks, head, middle, local_stride, layout, all_local)]
            splits = [torch.arange(0, head), torch.arange(head + middle, shard.length)]
        slices += [ScoredSlice.from_shard(scope, shard, values_of(shard), take=take, pattern=(n, m)) for take in takes]
        ends += [_SplitEntries(scope, shard, layout, index) for index in splits if len(index)]
    if split_blocks is None:
        return slices
    entries = []
    for end in ends:
        scored = ScoredSlice.from_shard(end.scope, end.shard, values_of(end.shard), take=_selection(end.offsets))
        saliency = torch.cat([tile.saliency for tile in scored.saliency()])
        entries.append(BlockEntries(end.shard.name, end.positions, nm.ranking_keys(saliency)))
    patterns = {shard.name: (n, m) for _, shard in scoped}
    for end, flags in zip(ends, split_blocks.kept(patterns, entries)):
        # Of ranks that hold the same shard the first counts them.
        if all_local or not end.shard.replica:
            slices += end.slices(flags, all_local, values_of(end.shard))
    return slices


def _range(offset: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[offset : offset + length]


def _selection(index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[index.to(tensor.device)]


def _complete_blocks(
    shard: Shard, blocks: Region, head: int, middle: int, stride: int, layout: _Layout, all_local: bool
) -> Callable[[Tensor], Tensor]:
    """Selects the complete blocks of a shard, those in the sample: flat, or with the last dimension that of a block.

    Of a shard that several ranks hold each takes an equal part, unless `all_local` is set. The selection is a view
    then, which the final pruning writes to.

    Args:
        shard: of the parameter.
        blocks: the region of which it is a range, as a grid of blocks.
        head: elements of the shard before its first complete block.
        middle: elements in complete blocks.
        stride: elements between two weights of a block in the rank's tensor.
        layout: of the blocks in the parameter.
        all_local: all complete blocks on this rank.
    """
    m, interval = layout.m, layout.interval
    counted = _counted_blocks(shard, middle // m, all_local)
    # Blocks that lie between each other are numbered one after the other.
    sampled = _sampled(blocks, (shard.start + head) // m, counted, interval)

    def take(tensor: Tensor) -> Tensor:
        if stride == 1:
            selected = tensor.reshape(-1)[head + counted.start * m : head + counted.stop * m]
            return selected if sampled is None else selected.view(-1, m)[sampled].reshape(-1)
        view = tensor.reshape(-1)[head : head + middle].view(-1, m, stride).transpose(1, 2)
        if all_local:
            return view
        selected = view.reshape(-1, m)[counted.start : counted.stop]
        return selected if sampled is None else selected[sampled]

    return take


def _complete_run(
    shard: Shard, inputs: int, run: CompleteRun, layout: _Layout, all_local: bool
) -> Callable[[Tensor], Tensor]:
    """As `_complete_blocks`, of neighbouring inputs that are complete blocks where others are not."""
    m, grid = layout.m, shard.grid
    runs = (*grid.runs[:inputs], (range(run.start, run.start + run.length),), *grid.runs[inputs + 1 :])
    blocks = Region(grid.shape, runs).divided(inputs, m)
    assert blocks is not None
    counted = _counted_blocks(shard, blocks.sizes.numel(), all_local)
    sampled = _sampled(blocks, 0, counted, layout.interval)

    def take(tensor: Tensor) -> Tensor:
        narrowed = tensor.reshape(grid.sizes).narrow(inputs, run.first, run.length)
        view = narrowed.unflatten(inputs, (-1, m)).movedim(inputs + 1, -1)
        if all_local:
            return view
        selected = view.reshape(-1, m)[counted.start : counted.stop]
        return selected if sampled is None else selected[sampled]

    return take


def _counted_blocks(shard: Shard, count: int, all_local: bool) -> range:
    """Which of a shard's complete blocks this rank counts."""
    if all_local:
        return range(count)
    assert shard.replica is not None
    return range(count * shard.replica // shard.replicas, count * (shard.replica + 1) // shard.replicas)


def _sampled(blocks: Region, first: int, counted: range, interval: int) -> slice | Tensor | None:
    """Which blocks of a range are in the sample; None: all.

    Args:
        blocks: of which it is a range.
        first: the range's first block in it.
        counted: blocks of the range that are meant.
        interval: the sample has each so many-th block of the parameter.
    """
    if interval == 1:
        return None
    first += counted.start
    if blocks.is_full:
        return slice(-first % interval, None, interval)
    local = blocks.local(torch.arange(0, blocks.shape.numel(), interval)) - first
    return local[(local >= 0) & (local < len(counted))]
