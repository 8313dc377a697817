"""N:M sparsity: in each block of M consecutive inputs of a linear layer the N weights of largest x feel no Lp pull,
the others decay.

x is that of the step (`decay.py`): of the weights before it, and preconditioned by the v̂ with which the step itself
divides. Between equal ones the earlier is spared. Blocks are those of the parameter, whatever shards it: one that lies
on several ranks is ranked by what these tell each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

CHOICES = {"2:4": (2, 4), "4:8": (4, 8)}
SPARED = "1:1"  # of a run whose weights are all spared: entries of blocks that lie on several ranks
LARGEST_BLOCK = 8
_ABSENT = torch.iinfo(torch.int64).min


def check(pattern: object) -> None:
    """Raises ValueError for what is no pattern; None is none."""
    if pattern is not None and pattern not in CHOICES:
        raise ValueError(
            f"pattern={pattern!r} must be one of {', '.join(CHOICES)}, non-zero weights of each block along the input,"
            " or None"
        )


def parse(pattern: str) -> tuple[int, int]:
    """N and M."""
    return (1, 1) if pattern == SPARED else CHOICES[pattern]


def misfit(shape: torch.Size, start: int | None, m: int) -> str | None:
    """Why a parameter of this shape has no blocks of M, or None. start: where the piece on this rank begins; None if
    it is no contiguous range.
    """
    if len(shape) != 2:
        return f"it has the shape {tuple(shape)}, and blocks are those of a matrix [outputs, inputs]"
    if shape[-1] % m:
        return f"its {shape[-1]} inputs are no multiple of {m}"
    if start is None:
        return "what lies on this rank is no contiguous range of it (rows in several strips)"
    return None


def spans(start: int, length: int, m: int) -> tuple[int, int]:
    """How much of a range lies in a block that began before it, and how much after that is whole blocks; what is left
    begins one that ends later.
    """
    head = min(length, -start % m)
    return head, (length - head) // m * m


def spared(blocks: Tensor, n: int | Tensor) -> Tensor:
    """Which entries are among the N largest of their block: bool [..., M]. Of equal ones the earlier, so there are
    never more than N (nan aside).

    blocks: [..., M], any dtype that can be compared. n: N, or [...] of each block.
    """
    columns = blocks.movedim(-1, 0).contiguous()  # entry by entry, so that each comparison is one over all blocks
    ahead = torch.empty(
        columns.shape, dtype=torch.int8, device=blocks.device
    )  # how many of its block go ahead of each
    for j, own in enumerate(columns):
        ahead[j] = len(columns) - 1 - j
        for i, earlier in enumerate(columns[:j]):
            one = (earlier >= own).view(torch.int8)
            ahead[j] += one
            ahead[i] -= one
    return (ahead < n).movedim(0, -1)


def spare_(x: Iterable[Tensor], n: int, m: int) -> None:
    """x ← inf for the N largest of each block of M, in place: the decay has no pull on them. Tensors of whole blocks
    along the last dimension.
    """
    for t in x:
        if m == 1:
            t.fill_(math.inf)
        elif t.numel():
            blocks = t.unflatten(-1, (-1, m))
            blocks.masked_fill_(spared(blocks, n), math.inf)


def keys_of(x: Tensor, smallest: bool = False) -> Tensor:
    """Whole numbers, int64 and of x's shape, in the order of x ≥ 0 (of −x): what is compared over ranks is each number
    itself, to the bit.
    """
    bits = x.double().view(torch.int64)
    return -bits if smallest else bits


class Straddling:
    """The blocks that lie on several ranks, and what is spared in them. Every rank has the same, and does the same at
    the same time.

    Args:
        starts: elements of a parameter, taken flat, with which some rank's piece of it begins inside of a block of 8;
            by name.
        names: of the parameters that lie in a tensor which the optimizer steps, on this rank or another, in one order
            on all.
        largest: gives the elementwise maximum over all ranks of an int64 tensor on the CPU.
    """

    def __init__(
        self, starts: dict[str, list[int]], names: dict[Tensor, list[str]], largest: Callable[[Tensor], Tensor]
    ) -> None:
        self._starts, self._largest = starts, largest
        self._names = WeakIdKeyDictionary()
        for tensor, found in names.items():
            self._names[tensor] = tuple(name for name in found if name in starts)

    def names(self, tensor: Tensor) -> tuple[str, ...]:
        """Parameters in `tensor` of which some block may lie on several ranks."""
        return self._names.get(tensor, ())

    def spared(self, patterns: dict[str, tuple[int, int]], mine: list[tuple[str, int, Tensor]]) -> list[list[bool]]:
        """What is spared of this rank's entries. One small reduction, if there is such a block; its size is that of
        these blocks, eight numbers each.

        patterns: N and M by name, of all parameters that take part, the same on every rank. mine: runs of entries of
        such blocks: the name, the first element in the whole parameter, the keys (see `keys_of`).
        """
        places: dict[tuple[str, int], int] = {}
        counts = []
        for name, (n, m) in patterns.items():
            for block in sorted({start // m for start in self._starts.get(name, ()) if start % m}):
                places[name, block] = len(counts)
                counts.append(n)
        if not counts:
            return []
        table = torch.full((len(counts), LARGEST_BLOCK), _ABSENT, dtype=torch.int64)
        at = [
            LARGEST_BLOCK * places[name, i // m] + i % m
            for name, first, keys in mine
            for m in [patterns[name][1]]
            for i in range(first, first + len(keys))
        ]
        if at:
            table.view(-1)[at] = torch.cat([keys.cpu() for _, _, keys in mine])
        marks = spared(self._largest(table), torch.tensor(counts)).reshape(-1)
        return [marks.tolist() for marks in marks[at].split([len(keys) for _, _, keys in mine])]
