"""Whether an engine's fp32 masters are those of the weights that the model computes with, by value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lp_dist.sharding.deepspeed import is_tested_deepspeed, unknown_layout
from lp_dist.sharding.engines import wrapper_of
from lp_dist.sharding.shards import Shard

# Of a shard; another order of the parameters shows in the first few.
_COMPARED = 4096


def check_masters(optimizer: Any, shards: list[Shard]) -> None:
    """Compares some masters of each shard with the model's weights, under a DeepSpeed that was not tested.

    Ranges that fit and counts that are right do not show that parameters lie in another order. Values do. It holds
    from when an engine was made until something writes to its masters alone, so `attach` calls it before it changes
    anything.

    Args:
        optimizer: the wrapper by DeepSpeed, or another one.
        shards: of the model's parameters on this rank.
    Raises:
        UsageError: names the first parameter whose weights are others.
    """
    if wrapper_of(optimizer) is None or is_tested_deepspeed():
        return
    for shard in shards:
        # ZeRO-0 in 16 bits has a master of the same shape for each parameter, and has stepped it once by now.
        if not shard.length or shard.is_on_disk or shard.tensor.shape == shard.param.shape:
            continue
        copy = shard.copy
        first = shard.start - copy.start
        masters = _sample(shard.local.values)
        weights = _sample(copy.values.reshape(-1)[first : first + shard.length])
        # Weights that NVMe offload has swapped out are not there.
        if len(weights) == len(masters) and not _rounds_to(masters, weights):
            raise unknown_layout(f"steps other weights than the model's where {shard.name} should lie")


def _sample(values: Tensor) -> Tensor:
    return values[:: max(1, values.numel() // _COMPARED)]


def _rounds_to(masters: Tensor, weights: Tensor) -> bool:
    rounded = masters.to(weights.device, weights.dtype)
    return bool(((rounded == weights) | weights.isnan()).all())
