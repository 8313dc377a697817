"""Slices of parameters with blocks: each weight is counted once, whatever holds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lp_dist.optim.nm import SplitBlocks
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.nm_blocks import scored_blocks


def shard_of(weight: Tensor, start: int, length: int, replica: int, replicas: int) -> Shard:
    """A range of a parameter, taken flat."""
    local = weight.flatten()[start : start + length].clone()
    param = nn.Parameter(weight)
    return Shard("w", param, weight.shape, start, local, 0, length, 0, lambda _: {}, replica, replicas)


@pytest.mark.parametrize("inputs", [0, 1])
@pytest.mark.parametrize("all_local", [False, True])
def test_ranks_with_the_same_shard_count_each_weight_once(inputs, all_local):
    """As where FSDP2 shards in groups of ranks; the shard begins and ends inside of blocks."""
    weight = torch.arange(1.0, 97.0).view((16, 6) if inputs == 0 else (6, 16))
    start, length, stride = 9, 70, 6 if inputs == 0 else 1
    taken = []
    for replica in range(3):
        shard = shard_of(weight, start, length, replica, 3)
        split = SplitBlocks({"w": [start, start + length]}, {shard.tensor: ["w"]}, lambda table: table, {"w": stride})
        slices = scored_blocks([("all", shard)], lambda _: {"p": 0.5}, "2:4", split, lambda _: inputs, all_local, None)
        taken.append(torch.cat([scored.weights.flatten() for scored in slices]))
    expected = torch.arange(10.0, 80.0)
    if all_local:
        assert all(weights.sort().values.equal(expected) for weights in taken)
    else:
        assert torch.cat(taken).sort().values.equal(expected)
        assert all(len(weights) < length for weights in taken)
