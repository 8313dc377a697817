"""Which indices of a parameter a rank has, where these are no contiguous range of it taken flat: tensor parallelism
gives it some columns, or some rows of each of several matrices that lie in one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A grid of elements: all whose index along each dimension is one of those that the rank has along it. The rank's
    tensor has them in the same order.

    Args:
        shape: of the parameter.
        runs: along each dimension, the ranges of indices, in order.
    """

    # Checksums of all ranks are added in int64.
    MODULUS: ClassVar[int] = (1 << 40) - 87

    shape: torch.Size
    runs: tuple[tuple[range, ...], ...]

    @classmethod
    def full(cls, shape: torch.Size) -> Region:
        """All elements."""
        return cls(shape, tuple((range(size),) for size in shape))

    @classmethod
    def of_indices(cls, shape: torch.Size, indices: Sequence[Tensor]) -> Region:
        """The elements with these indices along each dimension, ascending: int64 [size]."""
        runs = []
        for along in indices:
            borders = [0, *((along.diff() != 1).nonzero().flatten() + 1).tolist(), len(along)]
            runs.append(
                tuple(range(int(along[i]), int(along[j - 1]) + 1) for i, j in zip(borders, borders[1:]) if j > i)
                or (range(0),)
            )
        return cls(shape, tuple(runs))

    @cached_property
    def sizes(self) -> torch.Size:
        """The shape of the rank's tensor."""
        return torch.Size([sum(map(len, runs)) for runs in self.runs])

    @property
    def is_full(self) -> bool:
        """Whether it has all elements."""
        return self.sizes == self.shape

    def contiguous_start(self) -> int | None:
        """The first element in the parameter, taken flat, where its elements are a contiguous range of it."""
        if not self.sizes.numel():
            return 0
        is_single = True  # whether all dimensions before have one index
        for dim, runs in enumerate(self.runs):
            if self.sizes[dim] != self.shape[dim] and (not is_single or len([run for run in runs if run]) > 1):
                return None
            is_single &= self.sizes[dim] == 1
        return sum(stride * next(run.start for run in runs if run) for stride, runs in zip(self._strides, self.runs))

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """Elements of the parameter between neighbours along each dimension."""
        return tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    def indices(self, dim: int) -> Tensor:
        """The indices along a dimension: int64 [sizes[dim]]."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self.runs[dim]] or [torch.arange(0)])

    def position(self, local: int) -> int:
        """Where an element lies in the parameter, taken flat, by where it lies in the rank's tensor, taken flat."""
        if self.is_full:
            return local
        position = 0
        for dim in reversed(range(len(self.shape))):
            local, index = divmod(local, self.sizes[dim])
            for run in self.runs[dim]:
                if index < len(run):
                    position += run[index] * self._strides[dim]
                    break
                index -= len(run)
        return position

    def positions(self, local: Tensor) -> Tensor:
        """Where elements lie in the parameter, taken flat.

        Args:
            local: where they lie in the rank's tensor, taken flat; int64.
        """
        if self.is_full:
            return local
        result = torch.zeros_like(local)
        for dim in reversed(range(len(self.shape))):
            result += self.indices(dim)[local % self.sizes[dim]] * self._strides[dim]
            local = local // self.sizes[dim]
        return result

    def local(self, positions: Tensor) -> Tensor:
        """Where elements lie in the rank's tensor, taken flat; without those that the rank has not.

        Args:
            positions: where they lie in the parameter, taken flat; int64.
        """
        if self.is_full:
            return positions
        result = torch.zeros_like(positions)
        for dim in range(len(self.shape)):
            index = positions // self._strides[dim] % self.shape[dim]
            known = self.indices(dim)
            if not len(known):
                return positions[:0]
            at = torch.searchsorted(known, index).clamp_(max=len(known) - 1)
            is_here = known[at] == index
            positions, at, result = positions[is_here], at[is_here], result[is_here]
            result = result * self.sizes[dim] + at
        return result

    def section(self, start: int, stop: int) -> Region:
        """What it has of the indices from `start` to `stop` along the first dimension, which are taken for a parameter
        of their own.
        """
        cut = (range(max(run.start, start), min(run.stop, stop)) for run in self.runs[0])
        first = tuple(range(run.start - start, run.stop - start) for run in cut if run) or (range(0),)
        return Region(torch.Size([stop - start, *self.shape[1:]]), (first, *self.runs[1:]))

    def divided(self, dim: int, size: int) -> Region | None:
        """The same of a grid in which `size` neighbours along a dimension are one; None where not all neighbours of
        one lie here.
        """
        if any(bound % size for run in self.runs[dim] for bound in (run.start, run.stop) if run):
            return None
        runs = tuple(range(run.start // size, run.stop // size) for run in self.runs[dim])
        shape = (*self.shape[:dim], self.shape[dim] // size, *self.shape[dim + 1 :])
        return Region(torch.Size(shape), (*self.runs[:dim], runs, *self.runs[dim + 1 :]))

    def checksum(self, start: int, length: int) -> int:
        """The sum of the positions in the parameter of a range of the rank's tensor, taken flat, modulo a prime.

        Args:
            start: of the range.
            length: of the range.
        """
        return (self._sum_before(start + length) - self._sum_before(start)) % self.MODULUS

    def _sum_before(self, count: int, dim: int = 0) -> int:
        """The sum of the positions of the first `count` elements, by the dimensions from `dim` on."""
        if dim == len(self.shape):
            return 0
        inner = math.prod(self.sizes[dim + 1 :])
        complete, rest = divmod(count, max(1, inner))
        total, remaining = 0, complete
        for run in self.runs[dim]:
            taken = run[: min(len(run), remaining)]
            total += self._strides[dim] * inner * (len(taken) * (taken.start + taken.stop - 1) // 2)
            if remaining < len(run) and rest:
                total += self._strides[dim] * run[remaining] * rest
                break
            remaining -= len(taken)
        return total + complete * self._sum_before(inner, dim + 1) + (self._sum_before(rest, dim + 1) if rest else 0)

    def __str__(self) -> str:
        words = [
            " and ".join(f"{run.start}:{run.stop}" for run in runs if run) or "none"
            for runs, size, full in zip(self.runs, self.sizes, self.shape)
        ]
        return f"[{', '.join(words)}] of {list(self.shape)}"
