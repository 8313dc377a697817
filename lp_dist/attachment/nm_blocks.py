"""Which parameters can have N:M blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lp_dist.errors import UsageError
from lp_dist.optim import nm
from lp_dist.optim.batching import to_local
from lp_dist.sharding.shards import Shard


def check_blocks(module: nn.Module, decaying: list[tuple[Shard, dict[str, Any]]], pattern: str | None) -> None:
    """Raises UsageError for a parameter that is to decay in blocks, and has none.

    Args:
        module: the unwrapped model.
        decaying: shards of the parameters that decay, with their hyperparameters.
        pattern: of a target, for all of them; None: that of the hyperparameters.
    """
    owners = {id(param): child for child in module.modules() for param in child.parameters(recurse=False)}
    for shard, values in decaying:
        shard_pattern = pattern or values.get("pattern")
        if not shard_pattern:
            continue
        m = nm.parse_pattern(shard_pattern)[1]
        reason = why_no_blocks(owners[id(shard.param)], shard.shape, m, start=shard.start)
        if reason is None and shard.is_on_disk:
            reason = "it lies on the disk (NVMe offload)"
        elif reason is None and not to_local(shard.tensor.detach()).is_contiguous():
            reason = "it does not lie in memory row by row"
        if reason is not None:
            raise UsageError(
                f"{shard.name} can't have pattern={shard_pattern!r}: {reason}. Leave it out by an override,"
                f" {{{shard.name!r}: {{'weight_decay': 0.0}}}}"
            )


def why_no_blocks(owner: nn.Module, shape: torch.Size, m: int, start: int | None = 0) -> str | None:
    """Why a parameter can't have blocks of M; None where it can.

    Args:
        owner: the module that has it.
        shape: of the parameter before sharding.
        m: weights of a block.
        start: as of `lp_dist.optim.nm.why_no_blocks`.
    """
    return nm.why_no_blocks(shape, start, m) or _why_not_linear(owner)


def _why_not_linear(owner: nn.Module) -> str | None:
    """Along which dimension the inputs lie is known of linear layers alone."""
    if isinstance(owner, (nn.Linear, nn.MultiheadAttention)) or "Linear" in type(owner).__name__:
        return None
    return (
        f"it is of a module of the kind {type(owner).__name__}, and blocks are those of the weight [outputs, inputs]"
        " of a linear layer"
    )
