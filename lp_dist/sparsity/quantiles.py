"""Quantiles of the saliency over all ranks, from sums of histograms and never from gathered weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lp_dist.optim import batching, decay, nm
from lp_dist.optim.latent import with_latents
from lp_dist.optim.region import Region
from lp_dist.sharding.collectives import all_reduce_sum
from lp_dist.sharding.shards import LocalShard, Shard

# A positive fp32 has 31 bits, and their order is that of the numbers. The passes read 11 of them, then 10, then 10.
_BITS = (11, 10, 10)
# Nan has larger bits.
_INFINITY = 0x7F800000
MAX_SALIENCY = torch.finfo(torch.float32).max
# Weights of a scope that are enough to estimate a quantile. The fraction of a sample below a threshold is that of all
# weights within 0.003 (one standard deviation).
SAMPLE_SIZE = 1 << 15
# The most weights of small slices that are scored together. They take about 50 bytes each meanwhile.
_JOINED_SIZE = 1 << 20


class ScoredTile(NamedTuple):
    """A tile of a `ScoredSlice`: its tensors are of equal shape, and flat if the slice is contiguous.

    Args:
        weights: a view.
        latents: a view; None without latent weights.
        saliency: fp32.
    """

    weights: Tensor
    latents: Tensor | None
    saliency: Tensor


@dataclass(frozen=True)
class ScoredSlice:
    """Weights of one parameter on this rank, from which their saliency can be computed.

    Args:
        scope: the name of the set of weights that share a threshold.
        weights: the fp32 masters, a view; those that this rank counts, a sample of them, or all on this rank. With a
            pattern they may be of any strides, and the last dimension is that of a block.
        exp_avg_sq: Adam's second moment of them, if the saliency is preconditioned; else None.
        values: the p, precondition, betas and eps of the parameter.
        step: Adam's step count.
        latents: Adam's first moment of them, if it holds the latent values of weights that are zero (see
            `lp_dist.optim.latent`); else None.
        pattern: N and M, if the weights are complete blocks of a pattern. Kept weights then have a saliency of inf,
            and all others a finite one. (1, 1) keeps all. None: no blocks.
    """

    scope: str
    weights: Tensor
    exp_avg_sq: Tensor | None
    values: dict[str, Any]
    step: float
    latents: Tensor | None = None
    pattern: tuple[int, int] | None = None

    @classmethod
    def from_shard(
        cls,
        scope: str,
        shard: Shard,
        values: dict[str, Any],
        all_local: bool = False,
        stride: int = 1,
        latent: bool = False,
        take: Callable[[Tensor], Tensor] | None = None,
        pattern: tuple[int, int] | None = None,
    ) -> ScoredSlice:
        """Takes the weights of a shard, and the optimizer's state of them.

        Args:
            scope: see `ScoredSlice`.
            shard: of the parameter.
            values: see `ScoredSlice`.
            all_local: all weights on this rank, also those that another rank counts.
            stride: take every `stride`-th weight of the parameter. These are the same weights however it is sharded.
            latent: weights that are zero may be latent.
            take: selects the weights from a tensor of the shard, instead of `all_local` and `stride`.
            pattern: see `ScoredSlice`.
        """

        def select(tensor: Tensor) -> Tensor:
            if take is not None:
                return take(tensor)
            if all_local:
                return tensor
            local = LocalShard(tensor, shard.start, shard.replica, shard.replicas)
            if stride == 1:
                return local.counted
            counted, first = local.counted.reshape(-1), local.counted_start
            if shard.region is None:
                return counted[-first % stride :: stride]
            sampled = sampled_elements(shard.region, stride) - first
            return counted[sampled[(sampled >= 0) & (sampled < len(counted))].to(counted.device)]

        weights, exp_avg_sq, step = select(shard.local.values), None, 0.0
        state = shard.state if shard.length else {}
        latents = select(state["exp_avg"]) if latent and state else None
        if values.get("precondition") and shard.length:
            if state:
                exp_avg_sq, step = select(state["exp_avg_sq"]), float(shard.state_of(shard.tensor)["step"])
            else:
                # Without a gradient so far there is no state, and √v̂ is 0.
                exp_avg_sq, step = torch.zeros_like(weights), 1.0
        return cls(scope, weights, exp_avg_sq, values, step, latents, pattern)

    def saliency(self) -> Iterator[ScoredTile]:
        """Computes the saliency tile by tile, as the decay would compute it now."""
        exp_avg_sq = None if self.exp_avg_sq is None else _tiles(self.exp_avg_sq)
        latents = None if self.latents is None else _tiles(self.latents)
        for i, w in enumerate(_tiles(self.weights)):
            latent_w = None if latents is None else latents[i]
            x = decay.saliency([with_latents(w, latent_w).contiguous()], self.values["p"])
            if exp_avg_sq is not None:
                beta2 = float(self.values["betas"][1])
                roots = exp_avg_sq[i].contiguous().sqrt()
                denom = (roots / (1 - beta2**self.step) ** 0.5).add_(self.values["eps"])
                decay.precondition_(x, [denom], self.values["precondition"])
            saliency = x[0].float()
            if self.pattern is not None:
                nm.keep_largest_([saliency.clamp_(max=MAX_SALIENCY)], *self.pattern)
            yield ScoredTile(w, latent_w, saliency)


@lru_cache(maxsize=64)
def sampled_elements(region: Region, stride: int) -> Tensor:
    """Where every `stride`-th element of a parameter lies in a region, taken flat. Kept, since the layers of a model
    are alike, and so are its updates.
    """
    return region.local(torch.arange(0, region.shape.numel(), stride))


def _tiles(values: Tensor) -> tuple[Tensor, ...]:
    """As `batching.tiles`; what is not contiguous is divided along its first dimension, and not copied."""
    if values.is_contiguous() or not values.numel():
        return batching.tiles(values)
    of_first = values.numel() // len(values)
    return values.split(max(1, batching.tile_size(values.device) // of_first))


def sample_stride(elements: int, width: int, size: int | None = None) -> int:
    """The stride that samples a scope evenly over the columns of a parameter, since whole columns may be small.

    Args:
        elements: weights of the scope over all ranks.
        width: weights in a row of the parameter; or blocks, to take each so many-th block.
        size: of the sample; None: `SAMPLE_SIZE`.
    Returns:
        For `ScoredSlice.from_shard`.
    """
    longest = max(1, elements // (size or SAMPLE_SIZE))
    return next(stride for stride in range(longest, 0, -1) if math.gcd(stride, width) == 1)


def thresholds_at(
    slices: list[ScoredSlice], ranks: dict[str, int], passes: int, elements: dict[str, int] | None = None
) -> dict[str, float]:
    """The threshold of each scope at or below which a given number of weights have their saliency.

    Each pass reads the weights once, and sums one histogram over the ranks. Collective.

    Args:
        slices: of the weights that this rank counts.
        ranks: by scope, how many weights are to be at or below its threshold; the same on every rank.
        passes: 2 or 3. After two passes a threshold is at most 1/8,192 of itself above the exact one, and not below
            it. After three it is the smallest one, exactly.
        elements: by scope, its weights over all ranks, if the slices are samples; `ranks` are then scaled down.
    Returns:
        By scope; 0.0 where its rank is 0.
    """
    scopes = list(ranks)
    remaining = torch.tensor([ranks[scope] for scope in scopes])
    # The first bits of each scope's threshold, as far as they are known, and how many these are.
    prefixes, known_bits = [0] * len(scopes), 0
    for bits in _BITS[:passes]:
        shift, width = 31 - known_bits - bits, 1 << bits
        counts = torch.zeros(len(scopes), width, dtype=torch.int64)
        for rows, saliency, row_of in _scores(slices, scopes, join=elements is not None):
            fp32_bits = saliency.view(torch.int32)
            bins = (fp32_bits >> shift) & (width - 1)
            if row_of is not None:
                bins = bins + width * row_of
            if known_bits:
                # Only the numbers that begin with the known bits.
                prefix = torch.tensor([prefixes[row] for row in rows], dtype=torch.int32)
                expected = int(prefix) if row_of is None else prefix.to(saliency.device)[row_of]
                bins = bins[(fp32_bits >> (31 - known_bits)) == expected]
            counts[rows] += torch.bincount(bins, minlength=len(rows) * width).view(len(rows), width).cpu()
        cumulative = all_reduce_sum(counts).cumsum(1).cpu()
        if elements is not None and not known_bits:
            sampled = cumulative[:, -1].tolist()
            remaining = torch.tensor(
                [round(ranks[scope] * count / elements[scope]) for scope, count in zip(scopes, sampled)]
            )
        bin_of = torch.searchsorted(cumulative, remaining[:, None])
        remaining = remaining - cumulative.gather(1, (bin_of - 1).clamp(0))[:, 0] * (bin_of[:, 0] > 0)
        prefixes = [prefix << bits | bin_ for prefix, bin_ in zip(prefixes, bin_of[:, 0].tolist())]
        known_bits += bits
    # The largest number that begins with these bits.
    uppermost = [min((prefix + 1 << 31 - known_bits) - 1, _INFINITY) for prefix in prefixes]
    thresholds = torch.tensor(uppermost, dtype=torch.int32).view(torch.float32).tolist()
    return {scope: value if ranks[scope] else 0.0 for scope, value in zip(scopes, thresholds)}


def fraction_at_or_below(slices: list[ScoredSlice], thresholds: dict[str, float]) -> dict[str, float]:
    """The fraction of the weights of each scope with a saliency at or below its threshold, over all ranks.

    Collective: one reduction.

    Args:
        slices: of the weights that this rank counts, or samples of them.
        thresholds: by scope.
    Returns:
        By scope, 0 to 1.
    """
    scopes = list(thresholds)
    counts = torch.zeros(len(scopes), 2, dtype=torch.int64)
    for rows, saliency, row_of in _scores(slices, scopes, join=True):
        row_of = torch.zeros_like(saliency, dtype=torch.int64) if row_of is None else row_of
        limits = torch.tensor([thresholds[scopes[row]] for row in rows], device=saliency.device)
        below = row_of[saliency <= limits[row_of]]
        counts[rows] += torch.stack(
            [torch.bincount(numbers, minlength=len(rows)) for numbers in (below, row_of)], dim=1
        ).cpu()
    return {scope: below / max(1, total) for scope, (below, total) in zip(scopes, all_reduce_sum(counts).tolist())}


class _Scores(NamedTuple):
    """Saliencies of one or several scopes.

    Args:
        rows: numbers of these scopes.
        saliency: fp32 [weights].
        row_of: int64 [weights], the position in `rows` of each weight's scope. None if there is one scope.
    """

    rows: list[int]
    saliency: Tensor
    row_of: Tensor | None


def _scores(slices: list[ScoredSlice], scopes: list[str], join: bool) -> Iterator[_Scores]:
    """The saliencies of all slices.

    Args:
        slices: of any of the scopes.
        scopes: their positions are the numbers of scopes.
        join: score small slices together: on an accelerator a call takes longer than the weights of many of them. Not
            joined, each slice is scored as `zero_at_or_below` does it, with the same bits.
    """
    number = {scope: i for i, scope in enumerate(scopes)}
    for batch in _batches(slices) if join else ([scored] for scored in slices):
        numbers, lengths = [number[scored.scope] for scored in batch], [scored.weights.numel() for scored in batch]
        joined = batch[0]
        if len(batch) > 1:
            joined = ScoredSlice(
                joined.scope,
                torch.cat([scored.weights.reshape(-1) for scored in batch]),
                _joined(scored.exp_avg_sq for scored in batch),
                joined.values,
                joined.step,
                _joined(scored.latents for scored in batch),
                joined.pattern,
            )
        rows = sorted(set(numbers))
        row_of = None
        if len(rows) > 1:
            # Slices are joined up to the size of a tile, so there is one tile.
            repeats = torch.tensor([[rows.index(row) for row in numbers], lengths]).to(joined.weights.device)
            row_of = torch.repeat_interleave(*repeats, output_size=sum(lengths))
        yield from (_Scores(rows, tile.saliency.view(-1), row_of) for tile in joined.saliency())


def _joined(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """The tensors in one, flat; None where there are none."""
    present = [tensor.reshape(-1) for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _batches(slices: list[ScoredSlice]) -> Iterator[list[ScoredSlice]]:
    """Slices whose saliency is computed alike: as many as may be joined, or a single larger one."""
    kinds: dict[tuple[Any, ...], list[ScoredSlice]] = {}
    for scored in slices:
        if scored.weights.numel():
            kind = (
                scored.weights.device,
                scored.weights.dtype,
                *(str(scored.values.get(key)) for key in ("p", "precondition", "betas", "eps")),
                scored.exp_avg_sq is None,
                scored.latents is None,
                scored.step,
                scored.pattern,
            )
            kinds.setdefault(kind, []).append(scored)
    for alike in kinds.values():
        batch: list[ScoredSlice] = []
        size = 0
        for scored in alike:
            most = min(_JOINED_SIZE, batching.tile_size(scored.weights.device))
            if batch and size + scored.weights.numel() > most:
                yield batch
                batch, size = [], 0
            batch.append(scored)
            size += scored.weights.numel()
        yield batch


def count_not_finite(slices: list[ScoredSlice]) -> int:
    """How many weights, or second moments of them, are nan or infinite, over all ranks. Collective: one reduction."""
    tensors = [t for scored in slices for t in (scored.weights, scored.exp_avg_sq) if t is not None and t.numel()]
    counts = [t.isfinite().logical_not_().sum().cpu() for t in tensors]
    return int(all_reduce_sum(torch.stack([*counts, torch.zeros((), dtype=torch.int64)]).sum().view(1)))


@torch.no_grad()
def zero_at_or_below(slices: list[ScoredSlice], thresholds: dict[str, float]) -> None:
    """Sets weights to zero whose saliency is at or below the threshold of their scope, in place.

    Their latent values, if there are any, become zero too: the first moment is no momentum of a weight that is zero.

    Args:
        slices: of all weights on this rank.
        thresholds: by scope; 0.0 or less changes nothing.
    Raises:
        RuntimeError: the weights on this rank are not contiguous.
    """
    for scored in slices:
        if thresholds[scored.scope] > 0.0:
            _check_views(scored)
            for weights, latents, saliency in scored.saliency():
                below = saliency <= thresholds[scored.scope]
                for tensor in (weights, latents) if latents is not None else (weights,):
                    tensor.masked_fill_(below, 0.0)


@torch.no_grad()
def restore_latent(slices: list[ScoredSlice], thresholds: dict[str, float]) -> None:
    """Writes latent weights back into the model, in place, if their saliency is above the threshold of their scope.

    The other latent weights are lost. Adam's first moment is zero afterwards for all weights that were zero before.

    Args:
        slices: of all weights on this rank. Those without latents are left alone.
        thresholds: by scope.
    Raises:
        RuntimeError: the weights on this rank are not contiguous.
    """
    for scored in slices:
        # No weight of it is latent, or none is on this rank.
        if scored.latents is None:
            continue
        _check_views(scored)
        for weights, latents, saliency in scored.saliency():
            assert latents is not None
            was_latent = weights == 0
            weights.copy_(torch.where(was_latent & (saliency > thresholds[scored.scope]), latents, weights))
            latents.masked_fill_(was_latent, 0.0)


def _check_views(scored: ScoredSlice) -> None:
    if scored.pattern is None and not scored.weights.is_contiguous():
        raise RuntimeError(
            f"the part of {scored.scope} on this rank is not contiguous: this way of sharding is not supported"
        )
