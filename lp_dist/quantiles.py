"""The weights that a target looks at: order statistics of x over all ranks, from sums of histograms and never from gathered weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_dist import decay, slices
from lp_dist.engines import summed
from lp_dist.shards import Piece, Shard

# A positive fp32 has 31 bits, and their order is that of the numbers: 11 of them, then 10, then 10 more.
_BITS = (11, 10, 10)
_INFINITY = 0x7F800000  # nan lies beyond it
# Weights of a scope that are enough to see where its x lie: a share of them is that of all within 0.003 (one standard deviation).
_SAMPLE = 1 << 15


@dataclass(frozen=True)
class Part:
    """What this rank looks at of one parameter.

    Args:
        scope: the name of what shares a threshold with it.
        weights: the fp32 masters, a view; those that this rank counts, a sample of them, or all that lie here.
        second: Adam's v of them where x is preconditioned, else None.
        values: p, precondition, betas and eps that hold for it. step: Adam's.
    """

    scope: str
    weights: Tensor
    second: Tensor | None
    values: dict[str, Any]
    step: float

    @classmethod
    def of(cls, scope: str, shard: Shard, values: dict[str, Any], whole: bool = False, stride: int = 1) -> Part:
        """whole: all that lies on this rank, also what another rank counts. stride: every so many weights of the parameter; they are the
        same ones however it is sharded (unless a shard is no contiguous range of it)."""
        def mine(tensor: Tensor) -> Tensor:
            if whole:
                return tensor
            piece = Piece(tensor, shard.start, shard.replica, shard.replicas)
            return piece.share if stride == 1 else piece.share.reshape(-1)[-(piece.first or 0) % stride::stride]

        second = step = None
        if values.get("precondition") and shard.length:
            second, step = mine(shard.state["exp_avg_sq"]), float(shard.state_of(shard.tensor)["step"])
        return cls(scope, mine(shard.piece.values), second, values, step or 0.0)

    def x(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices of the weights (views where they are contiguous) and their x, as the decay would compute it now."""
        seconds = slices.pieces(self.second) if self.second is not None else None
        for i, weights in enumerate(slices.pieces(self.weights)):
            x = decay.resistance([weights], self.values["p"])
            if seconds is not None:
                beta2 = float(self.values["betas"][1])
                denom = (seconds[i].sqrt() / (1 - beta2**self.step) ** 0.5).add_(self.values["eps"])
                decay.precondition_(x, [denom], self.values["precondition"])
            yield weights, x[0].float()


def stride_of(shard: Shard, elements: int) -> int:
    """For `Part.of`: a sample of a scope of `elements` weights, evenly over the columns of each parameter, since whole columns may be small."""
    width = shard.shape[-1] if len(shard.shape) else 1
    return next(stride for stride in range(max(1, elements // _SAMPLE), 0, -1) if math.gcd(stride, width) == 1)


def smallest(parts: list[Part], ranks: dict[str, int], passes: int, elements: dict[str, int] | None = None) -> dict[str, float]:
    """For each scope the smallest threshold at or below which `ranks[scope]` weights have their x; 0.0 for a rank of 0.

    elements: of each scope, where the parts are samples of it: a rank is then taken in proportion. Each pass reads the weights once and sums one histogram over the ranks. After two the threshold is exact to a part in 8,192 and not
    below the exact one; after three it is the exact one.
    """
    scopes = list(ranks)
    prefix, left, used = [0] * len(scopes), [ranks[scope] for scope in scopes], 0
    for bits in _BITS[:passes]:
        shift = 31 - used - bits
        counts = torch.zeros(len(scopes), 1 << bits, dtype=torch.int64)
        for part in parts:
            row = scopes.index(part.scope)
            for _, x in part.x():
                pattern = x.view(torch.int32)
                if used:
                    pattern = pattern[(pattern >> (31 - used)) == prefix[row]]
                counts[row] += torch.bincount((pattern >> shift) & ((1 << bits) - 1), minlength=1 << bits).cpu()
        below = summed(counts).cumsum(1).cpu()
        if elements is not None and not used:
            left = [round(ranks[scope] * int(below[row, -1]) / elements[scope]) for row, scope in enumerate(scopes)]
        for row in range(len(scopes)):
            bin_ = int(torch.searchsorted(below[row], left[row]))
            left[row] -= int(below[row, bin_ - 1]) if bin_ else 0
            prefix[row] = prefix[row] << bits | bin_
        used += bits
    uppermost = [min((p + 1 << 31 - used) - 1, _INFINITY) for p in prefix]  # the largest number with these first bits
    found = torch.tensor(uppermost, dtype=torch.int32).view(torch.float32).tolist()
    return {scope: value if ranks[scope] else 0.0 for scope, value in zip(scopes, found)}


def share_below(parts: list[Part], thresholds: dict[str, float]) -> dict[str, float]:
    """For each scope the share of what its parts hold, over all ranks, with x at or below its threshold."""
    scopes = list(thresholds)
    counts = torch.zeros(len(scopes), 2, dtype=torch.int64)
    for part in parts:
        row = scopes.index(part.scope)
        for _, x in part.x():
            counts[row] += torch.tensor([int((x <= thresholds[part.scope]).sum()), x.numel()])
    return {scope: below / max(1, all_) for scope, (below, all_) in zip(scopes, summed(counts).tolist())}


@torch.no_grad()
def zero_below(parts: list[Part], thresholds: dict[str, float]) -> None:
    """Sets the weights with x ≤ the threshold of their scope to zero, in place."""
    for part in parts:
        if thresholds[part.scope] > 0.0:
            if not part.weights.is_contiguous():
                raise RuntimeError(f"the part of {part.scope} on this rank is not contiguous: this way of sharding is not supported")
            for weights, x in part.x():
                weights.masked_fill_(x <= thresholds[part.scope], 0.0)


@dataclass(frozen=True)
class Census:
    """counts: zeros and elements of each shard's parameter. dead, rows: rows (output channels of a linear layer) that are all zeros, and all.

    All over all ranks. Where a shard is no contiguous range of its parameter, no rows are known.
    """

    counts: list[tuple[int, int]]
    dead: int
    rows: int


def census(shards: list[Shard]) -> Census:
    """Counts in one pass over the weights, and two reductions: of two numbers a parameter, and of one a row."""
    alive, counts = [torch.zeros(0, dtype=torch.int32)], []
    for shard in shards:
        piece = shard.piece
        values = piece.share.reshape(-1)
        if piece.first is None or not len(shard.shape):
            nonzero = values.numel() - slices.count_zeros(values)
        else:
            rows = torch.zeros(shard.shape[0], dtype=torch.int32, device=values.device)
            nonzero = _count_rows(values, piece.first, shard.shape.numel() // max(1, shard.shape[0]), rows)
            alive.append(rows.cpu())
        counts.append([values.numel() - int(nonzero), values.numel()])
    found, every = summed(torch.tensor(counts, dtype=torch.int64).view(-1, 2)), summed(torch.cat(alive))
    return Census([(zeros, elements) for zeros, elements in found.tolist()], int((every == 0).sum()), every.numel())


def _count_rows(values: Tensor, start: int, width: int, rows: Tensor) -> Tensor:
    """Writes the non-zero weights of each row into `rows`, and returns their number. values: a range of the parameter that begins at `start`."""
    if values.numel():
        first, last = start // width, (start + values.numel() - 1) // width
        some = torch.zeros((last - first + 1) * width, dtype=torch.bool, device=values.device)  # whole rows
        some[start - first * width:][: values.numel()].copy_(values)  # a cast, several times as fast as a comparison
        rows[first:last + 1] = some.view(torch.int8).view(-1, width).sum(1, dtype=torch.int32)
    return rows.sum()
