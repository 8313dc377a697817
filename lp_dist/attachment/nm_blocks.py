"""Which parameters have N:M blocks, and which are left out since they can have none."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.optim import nm
from lp_dist.optim.batching import local_values
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.input_dims import input_dims, listed, share_left_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockPlan:
    """Which parameters have N:M blocks.

    Args:
        input_dims: {name: dimension of inputs}, of those that have.
        left_out: {name: weights}, of those that were to decay in blocks, and stay dense.
    """

    input_dims: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def plan_blocks(module: nn.Module, decaying: list[tuple[Shard, dict[str, Any]]], pattern: str | None) -> BlockPlan:
    """Finds the blocks of the parameters that decay, and warns once of those that can have none.

    Args:
        module: the unwrapped model.
        decaying: shards of the parameters that decay, with their hyperparameters.
        pattern: of a target, for all of them; None: that of the hyperparameters.
    Raises:
        UsageError: none of them can have blocks, or one could if its weights lay otherwise.
    """
    patterns, shards = {}, {}
    named: dict[str, int | None] = {}
    for shard, values in decaying:
        shard_pattern = pattern or values.get("pattern")
        if shard_pattern:
            patterns[shard.name], shards[shard.name] = shard_pattern, shard
            named[shard.name] = values.get("input_dim")
    if not patterns:
        return BlockPlan()
    known = input_dims(module, patterns, named)
    reasons = dict(known.reasons)
    for name, dim in known.dims.items():
        shard = shards[name]
        _refuse_layout(shard, patterns[name])
        reason = nm.why_no_blocks(shard.shape, shard.start, 1, dim)
        m = nm.parse_pattern(patterns[name])[1]
        if (
            shard.region is not None
            and shard.region.divided(dim, m) is None
            and shard.length < shard.region.sizes.numel()
        ):
            reason = f"tensor parallelism cuts its blocks of {m} inputs, and ZeRO what is left of them"
        if reason is not None:
            reasons[name] = reason
    in_words = " and ".join(sorted(set(patterns.values())))
    if len(reasons) == len(patterns):
        raise UsageError(
            f"no parameter that decays can have pattern={in_words!r}: {listed(reasons)}. Name others (names=), or"
            " leave the pattern out"
        )
    sizes = {name: shard.shape.numel() for name, shard in shards.items()}
    if reasons:
        logger.warning(
            "pattern=%r is not for %s, which stay dense: %s. Its share of zeros is one of all others",
            in_words,
            share_left_out(sizes, reasons),
            listed(reasons),
        )
    dims = {name: dim for name, dim in known.dims.items() if name not in reasons}
    return BlockPlan(dims, {name: sizes[name] for name in reasons})


def _refuse_layout(shard: Shard, pattern: str) -> None:
    """Raises UsageError for weights that could have blocks, and don't lie where or how a step needs it."""
    reason = None
    if shard.is_on_disk:
        reason = "it lies on the disk (NVMe offload)"
    elif not local_values(shard.tensor).is_contiguous():
        reason = "it does not lie in memory row by row"
    if reason is not None:
        raise UsageError(
            f"{shard.name} can't have pattern={pattern!r}: {reason}. Leave it out by an override,"
            f" {{{shard.name!r}: {{'weight_decay': 0.0}}}}"
        )
