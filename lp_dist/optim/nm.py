"""N:M sparsity: in each block of M consecutive inputs of a layer, the N weights of largest saliency do not decay.

The weights of a block belong to one output, and of a convolution to one place of its kernel. In a matrix [outputs,
inputs] they lie one after the other. In other layouts (inputs before outputs, as in GPT-2's Conv1D and the experts of
some models; convolutions) they are `block_stride` elements apart, and as many blocks lie between each other.

The saliency is that of the step (`decay.py`): of the weights before it, and preconditioned by the v̂ with which the
step itself divides. Between equal ones the earlier is kept. Blocks are those of the parameter, whatever shards it. A
block that lies on several ranks is ranked by what these ranks exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lp_dist.optim.region import Region

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
# Of a span whose weights are all kept: entries of blocks that lie on several ranks.
ALL_KEPT = "1:1"
LARGEST_BLOCK = 8
_ABSENT = torch.iinfo(torch.int64).min


def check_pattern(pattern: object) -> None:
    """Raises ValueError for what is no pattern; None is allowed, and means none."""
    if pattern is not None and pattern not in PATTERNS:
        raise ValueError(
            f"pattern={pattern!r} must be one of {', '.join(PATTERNS)}, non-zero weights of each block along the"
            " input, or None"
        )


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N and M of a pattern."""
    return (1, 1) if pattern == ALL_KEPT else PATTERNS[pattern]


def block_stride(shape: torch.Size, inputs: int) -> int:
    """How many elements apart two inputs lie that follow each other.

    Args:
        shape: of the whole parameter.
        inputs: its dimension of inputs.
    """
    return math.prod(shape[inputs + 1 :])


def why_no_blocks(shape: torch.Size, start: int | None, m: int, inputs: int | None, groups: int = 1) -> str | None:
    """Why a parameter has no blocks of M, or None where it has.

    Args:
        shape: of the whole parameter.
        start: the first element of the shard on this rank; None: it is not known where the shard lies.
        m: weights of a block.
        inputs: its dimension of inputs; None: not known.
        groups: of a convolution, among which that dimension is divided.
    """
    if inputs is None:
        return f"it is not known which dimension of its shape {tuple(shape)} the inputs are"
    if not 0 <= inputs < len(shape) or len(shape) < 2:
        return f"it has the shape {tuple(shape)}, in which dimension {inputs} can't be the inputs of a matrix"
    count = shape[inputs] // groups
    if count % m:
        return f"its number of inputs, {count}, is no multiple of {m}"
    if start is None:
        return "which elements of it lie on this rank is not known"
    return None


def split_at_blocks(start: int, length: int, m: int) -> tuple[int, int]:
    """Splits a range at the borders of blocks of M.

    Args:
        start: of the range, in the parameter taken flat.
        length: of the range.
        m: elements of a block. Where blocks lie between each other, of as many as lie so together.
    Returns:
        The elements that belong to a block which began before the range, and after them the elements in complete
        blocks. The rest of the range begins a block that ends after it.
    """
    head = min(length, -start % m)
    return head, (length - head) // m * m


def is_kept(blocks: Tensor, n: int | Tensor) -> Tensor:
    """Which entries are among the N largest of their block. Of equal ones the earlier, so they are never more than N
    (nan aside).

    Args:
        blocks: [..., M], any dtype that can be compared.
        n: N, or a tensor [...] with the N of each block.
    Returns:
        bool [..., M].
    """
    columns = blocks.movedim(-1, 0).contiguous()  # entry by entry, so that each comparison is one over all blocks
    rank = torch.empty(columns.shape, dtype=torch.int8, device=blocks.device)  # how many of its block are larger
    for j, column in enumerate(columns):
        rank[j] = len(columns) - 1 - j
        for i, earlier in enumerate(columns[:j]):
            not_smaller = (earlier >= column).view(torch.int8)
            rank[j] += not_smaller
            rank[i] -= not_smaller
    return (rank < n).movedim(0, -1)


def keep_largest_(x: Iterable[Tensor], n: int, m: int) -> None:
    """x ← inf for the N largest of each block of M, in place, so that these do not decay.

    Args:
        x: saliencies ≥ 0; tensors of complete blocks along the last dimension.
        n: N.
        m: M.
    """
    for t in x:
        if m == 1:
            t.fill_(math.inf)
        elif t.numel():
            blocks = t.unflatten(-1, (-1, m))
            blocks.masked_fill_(is_kept(blocks, n), math.inf)


def ranking_keys(x: Tensor, smallest: bool = False) -> Tensor:
    """int64 numbers, of x's shape, in the order of x ≥ 0; with `smallest` in that of −x. They compare over ranks to
    the bit.
    """
    bits = x.double().view(torch.int64)
    return -bits if smallest else bits


class CompleteRun(NamedTuple):
    """Neighbouring inputs on a rank that are complete blocks.

    Args:
        first: the first of them, in the rank's tensor.
        length: inputs.
        start: the first of them, in the parameter.
    """

    first: int
    length: int
    start: int


@lru_cache(maxsize=1024)
def complete_runs(region: Region, inputs: int, m: int) -> tuple[CompleteRun, ...]:
    """What a rank has of complete blocks, where it has some of the inputs alone.

    Args:
        region: of the parameter.
        inputs: its dimension of inputs.
        m: weights of a block.
    """
    runs, at = [], 0
    for run in region.runs[inputs]:
        head, complete = split_at_blocks(run.start, len(run), m)
        if complete:
            runs.append(CompleteRun(at + head, complete, run.start + head))
        at += len(run)
    return tuple(runs)


@lru_cache(maxsize=1024)
def split_entries(region: Region, inputs: int, m: int) -> Tensor:
    """Where all that is not in `complete_runs` lies in the rank's tensor, taken flat; int64."""
    is_split = torch.ones(region.sizes[inputs], dtype=torch.bool)
    for run in complete_runs(region, inputs, m):
        is_split[run.first : run.first + run.length] = False
    stride = math.prod(region.sizes[inputs + 1 :])
    outer = torch.arange(math.prod(region.sizes[:inputs]))[:, None, None] * region.sizes[inputs]
    return ((outer + is_split.nonzero().view(1, -1, 1)) * stride + torch.arange(stride)).flatten()


class BlockEntries(NamedTuple):
    """Entries of split blocks on one rank.

    Args:
        name: of the parameter.
        positions: where they lie in the whole parameter, taken flat; int64 [entries].
        keys: `ranking_keys` of the entries, int64 [entries].
    """

    name: str
    positions: Tensor
    keys: Tensor


class SplitBlocks:
    """The blocks that lie on several ranks, and what is kept in them. Every rank has the same object, and makes the
    same calls in the same order.

    Args:
        starts: by parameter name, the elements (the parameter taken flat) with which what some rank has begins inside
            of a block of 8, or of several that lie between each other.
        names: by tensor that the optimizer steps, the parameters that lie in it on any rank, in one order on all
            ranks.
        all_reduce_max: gives the elementwise maximum over all ranks of an int64 tensor on the CPU.
        strides: `block_stride` by parameter name, where it is not 1.
    """

    def __init__(
        self,
        starts: Mapping[str, Sequence[int] | Tensor],
        names: dict[Tensor, list[str]],
        all_reduce_max: Callable[[Tensor], Tensor],
        strides: dict[str, int] | None = None,
    ) -> None:
        self._starts = {name: torch.as_tensor(positions) for name, positions in starts.items()}
        self._all_reduce_max, self._strides = all_reduce_max, strides or {}
        # By name and elements of the blocks that lie between each other: which of these are split, in order.
        self._numbers: dict[tuple[str, int], Tensor] = {}
        self._names = WeakIdKeyDictionary()
        for tensor, in_tensor in names.items():
            self._names[tensor] = tuple(name for name in in_tensor if name in starts)

    def names(self, tensor: Tensor) -> tuple[str, ...]:
        """Parameters in `tensor` of which some block may lie on several ranks."""
        return self._names.get(tensor, ())

    def kept(self, patterns: dict[str, tuple[int, int]], entries: list[BlockEntries]) -> list[Tensor]:
        """Which of this rank's entries of split blocks are kept. One small reduction where there are such blocks, of
        eight numbers for each block.

        Args:
            patterns: N and M by name, of all parameters that take part; the same on every rank.
            entries: of this rank.
        Returns:
            For each of `entries`, which of its keys; bool [entries], on the CPU.
        """
        first_block: dict[str, int] = {}
        counts: list[Tensor] = []
        blocks = 0
        for name, (n, m) in patterns.items():
            stride = self._strides.get(name, 1)
            first_block[name] = blocks
            counts.append(torch.full((len(self._split(name, m * stride)) * stride,), n))
            blocks += len(counts[-1])
        if not blocks:
            return []
        table = torch.full((blocks, LARGEST_BLOCK), _ABSENT, dtype=torch.int64)
        positions = [torch.zeros(0, dtype=torch.int64)]
        for name, index, _ in entries:
            m, stride = patterns[name][1], self._strides.get(name, 1)
            number = torch.searchsorted(self._split(name, m * stride), index // (m * stride))
            block = first_block[name] + number * stride + index % stride
            positions.append(LARGEST_BLOCK * block + index // stride % m)
        at = torch.cat(positions)
        if len(at):
            table.view(-1)[at] = torch.cat([keys.cpu() for _, _, keys in entries])
        kept = is_kept(self._all_reduce_max(table), torch.cat(counts)).reshape(-1)
        return list(kept[at].split([len(keys) for _, _, keys in entries]))

    def _split(self, name: str, size: int) -> Tensor:
        """Numbers of the split blocks of `size` elements, ascending; several that lie between each other are one."""
        if (name, size) not in self._numbers:
            starts = self._starts.get(name, torch.zeros(0, dtype=torch.int64))
            self._numbers[name, size] = (starts[starts % size != 0] // size).unique()
        return self._numbers[name, size]
