"""The weights that a target looks at: order statistics of x over all ranks, from sums of histograms and never from
gathered weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_dist.optim import batching, decay, latent, nm
from lp_dist.sharding.collectives import summed
from lp_dist.sharding.shards import Piece, Shard

# A positive fp32 has 31 bits, and their order is that of the numbers: 11 of them, then 10, then 10 more.
_BITS = (11, 10, 10)
_INFINITY = 0x7F800000  # nan lies beyond it
LARGEST = torch.finfo(torch.float32).max
# Weights of a scope that are enough to see where its x lie: a share of them is that of all within 0.003 (one standard
# deviation).
_SAMPLE = 1 << 15
_TOGETHER = 1 << 20  # weights of small parts that are joined at most, for about 50 bytes each while they are looked at


@dataclass(frozen=True)
class Part:
    """What this rank looks at of one parameter.

    Args:
        scope: the name of what shares a threshold with it.
        weights: the fp32 masters, a view; those that this rank counts, a sample of them, or all that lie here.
        second: Adam's v of them where x is preconditioned, else None.
        values: p, precondition, betas and eps that hold for it. step: Adam's.
        memory: Adam's m of them where weights that are zero may be latent in it (see `latents.py`), else None.
        pattern: N and M where they are whole blocks: the x of those that are spared is inf, and finite of all others.
            None: no blocks.
    """

    scope: str
    weights: Tensor
    second: Tensor | None
    values: dict[str, Any]
    step: float
    memory: Tensor | None = None
    pattern: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        scope: str,
        shard: Shard,
        values: dict[str, Any],
        whole: bool = False,
        stride: int = 1,
        latent: bool = False,
        take: Callable[[Tensor], Tensor] | None = None,
        pattern: tuple[int, int] | None = None,
    ) -> Part:
        """whole: all that lies on this rank, also what another rank counts. latent: zeros may hide weights. stride:
        every so many weights of the parameter; they are the same ones however it is sharded (unless a shard is no
        contiguous range of it). take: gives these from what lies here, instead of the two.
        """

        def mine(tensor: Tensor) -> Tensor:
            if take is not None:
                return take(tensor)
            if whole:
                return tensor
            piece = Piece(tensor, shard.start, shard.replica, shard.replicas)
            return piece.share if stride == 1 else piece.share.reshape(-1)[-(piece.first or 0) % stride :: stride]

        weights, second, step = mine(shard.piece.values), None, 0.0
        state = shard.state if shard.length else {}
        memory = mine(state["exp_avg"]) if latent and state else None
        if values.get("precondition") and shard.length:
            # Without a gradient so far there is no state, and √v̂ is 0
            second, step = (
                (mine(state["exp_avg_sq"]), float(shard.state_of(shard.tensor)["step"]))
                if state
                else (torch.zeros_like(weights), 1.0)
            )
        return cls(scope, weights, second, values, step, memory, pattern)

    def x(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Slices of the weights and of the memory (views where they are contiguous) and their x, as the decay would
        compute it now.
        """
        seconds, memories = (batching.pieces(t) if t is not None else None for t in (self.second, self.memory))
        for i, weights in enumerate(batching.pieces(self.weights)):
            memory = memories[i] if memories is not None else None
            x = decay.resistance([latent.seen(weights, memory)], self.values["p"])
            if seconds is not None:
                beta2 = float(self.values["betas"][1])
                denom = (seconds[i].sqrt() / (1 - beta2**self.step) ** 0.5).add_(self.values["eps"])
                decay.precondition_(x, [denom], self.values["precondition"])
            found = x[0].float()
            if self.pattern is not None:
                nm.spare_([found.clamp_(max=LARGEST)], *self.pattern)
            yield weights, memory, found


def stride_of(shard: Shard, elements: int, block: int = 1) -> int:
    """For `Part.of`: a sample of a scope of `elements` weights, evenly over the columns (or blocks of them) of each
    parameter, since whole columns may be small."""
    width = shard.shape[-1] // block if len(shard.shape) else 1
    return next(stride for stride in range(max(1, elements // _SAMPLE), 0, -1) if math.gcd(stride, width) == 1)


def smallest(
    parts: list[Part], ranks: dict[str, int], passes: int, elements: dict[str, int] | None = None
) -> dict[str, float]:
    """For each scope the smallest threshold at or below which `ranks[scope]` weights have their x; 0.0 for a rank of
    0.

    elements: of each scope, where the parts are samples of it: a rank is then taken in proportion. Each pass reads the
    weights once and sums one histogram over the ranks. After two the threshold is exact to a part in 8,192 and not
    below the exact one; after three it is the exact one.
    """
    scopes = list(ranks)
    prefix, left, used = [0] * len(scopes), torch.tensor([ranks[scope] for scope in scopes]), 0
    for bits in _BITS[:passes]:
        shift, width = 31 - used - bits, 1 << bits
        counts = torch.zeros(len(scopes), width, dtype=torch.int64)
        for rows, x, which in _xs(parts, scopes, together=elements is not None):
            pattern = x.view(torch.int32)
            bins = (pattern >> shift) & (width - 1)
            if which is not None:
                bins = bins + width * which
            if used:  # the numbers that begin as found so far
                begun = torch.tensor([prefix[row] for row in rows], dtype=torch.int32)
                bins = bins[(pattern >> (31 - used)) == (int(begun) if which is None else begun.to(x.device)[which])]
            counts[rows] += torch.bincount(bins, minlength=len(rows) * width).view(len(rows), width).cpu()
        below = summed(counts).cumsum(1).cpu()
        if elements is not None and not used:
            left = torch.tensor(
                [round(ranks[scope] * seen / elements[scope]) for scope, seen in zip(scopes, below[:, -1].tolist())]
            )
        found = torch.searchsorted(below, left[:, None])
        left = left - below.gather(1, (found - 1).clamp(0))[:, 0] * (found[:, 0] > 0)
        prefix = [old << bits | bin_ for old, bin_ in zip(prefix, found[:, 0].tolist())]
        used += bits
    uppermost = [min((p + 1 << 31 - used) - 1, _INFINITY) for p in prefix]  # the largest number with these first bits
    thresholds = torch.tensor(uppermost, dtype=torch.int32).view(torch.float32).tolist()
    return {scope: value if ranks[scope] else 0.0 for scope, value in zip(scopes, thresholds)}


def share_below(parts: list[Part], thresholds: dict[str, float]) -> dict[str, float]:
    """For each scope the share of what its parts hold, over all ranks, with x at or below its threshold."""
    scopes = list(thresholds)
    counts = torch.zeros(len(scopes), 2, dtype=torch.int64)
    for rows, x, which in _xs(parts, scopes, together=True):
        which = torch.zeros_like(x, dtype=torch.int64) if which is None else which
        limits = torch.tensor([thresholds[scopes[row]] for row in rows], device=x.device)
        counts[rows] += torch.stack(
            [torch.bincount(of, minlength=len(rows)) for of in (which[x <= limits[which]], which)], dim=1
        ).cpu()
    return {scope: below / max(1, all_) for scope, (below, all_) in zip(scopes, summed(counts).tolist())}


def _xs(parts: list[Part], scopes: list[str], together: bool) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Numbers of scopes, x, and which of these scopes each x is of; None where there is one.

    together: small parts are joined, as for samples: on an accelerator a call takes longer than the weights of many
    parts. Else each part is taken as `zero_below` takes it, whose x are to be the same bits.
    """
    number = {scope: i for i, scope in enumerate(scopes)}
    for batch in _batches(parts) if together else ([part] for part in parts):
        rows, lengths = [number[part.scope] for part in batch], [part.weights.numel() for part in batch]
        one = batch[0]
        if len(batch) > 1:
            weights, second, memory = (
                torch.cat([t.reshape(-1) for t in ts]) if ts[0] is not None else None
                for ts in zip(*((part.weights, part.second, part.memory) for part in batch))
            )
            one = Part(one.scope, weights, second, one.values, one.step, memory, one.pattern)
        distinct = sorted(set(rows))
        which = None
        if len(distinct) > 1:  # then it is one slice
            runs = torch.tensor([[distinct.index(row) for row in rows], lengths]).to(one.weights.device)
            which = torch.repeat_interleave(*runs, output_size=sum(lengths))
        yield from ((distinct, x, which) for _, _, x in one.x())


def _batches(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts whose x is computed alike, as many as may be joined, or one that is more."""
    kinds: dict[tuple, list[Part]] = {}
    for part in parts:
        if part.weights.numel():
            values = tuple(str(part.values.get(key)) for key in ("p", "precondition", "betas", "eps"))
            kinds.setdefault(
                (
                    part.weights.device,
                    part.weights.dtype,
                    *values,
                    part.second is None,
                    part.memory is None,
                    part.step,
                    part.pattern,
                ),
                [],
            ).append(part)
    for alike in kinds.values():
        batch: list[Part] = []
        size = 0
        for part in alike:
            if batch and size + part.weights.numel() > min(_TOGETHER, batching.limit(part.weights.device)):
                yield batch
                batch, size = [], 0
            batch.append(part)
            size += part.weights.numel()
        yield batch


@torch.no_grad()
def zero_below(parts: list[Part], thresholds: dict[str, float]) -> None:
    """Sets the weights with x ≤ the threshold of their scope to zero, in place, and their memory if they have one: it
    is no momentum of a zero.
    """
    for part in parts:
        if thresholds[part.scope] > 0.0:
            _check_contiguous(part)
            for weights, memory, x in part.x():
                dead = x <= thresholds[part.scope]
                for tensor in (weights, memory) if memory is not None else (weights,):
                    tensor.masked_fill_(dead, 0.0)


@torch.no_grad()
def settle(parts: list[Part], thresholds: dict[str, float]) -> None:
    """Ends the hiding, in place: latent weights with x above the threshold of their scope are weights again, the
    others are lost. The memory of all zeros is empty then."""
    for part in parts:
        if part.memory is None:  # nothing of it is latent, or on this rank
            continue
        _check_contiguous(part)
        for weights, memory, x in part.x():
            hidden = weights == 0
            weights.copy_(torch.where(hidden & (x > thresholds[part.scope]), memory, weights))
            memory.masked_fill_(hidden, 0.0)


def _check_contiguous(part: Part) -> None:
    if not part.weights.is_contiguous():
        raise RuntimeError(
            f"the part of {part.scope} on this rank is not contiguous: this way of sharding is not supported"
        )
