"""What ranks hold of a parameter is found out, and counted once, or refused with what each of them holds."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from lp_dist import LpAdamW, SparsityTarget, attach, measure_sparsity, param_groups
from lp_dist.errors import UsageError
from lp_dist.optim.region import Region
from lp_dist.sharding.replicas import HeldRange, Replica, check_coverage, count_replicas
from lp_dist.sharding.shards import local_shard

SHAPE = torch.Size([4, 3])
FULL = Region.full(SHAPE)
COLUMNS = [Region(SHAPE, ((range(4),), (run,))) for run in (range(2), range(2, 3))]
# By case, what each of two ranks holds: of a region, from an element on, so many.
HELD = {
    "replicas": [(FULL, 0, 12), (FULL, 0, 12)],
    "rows": [(FULL, 0, 6), (FULL, 6, 6)],
    "columns": [(COLUMNS[0], 0, 8), (COLUMNS[1], 0, 4)],
    "nothing on one": [(FULL, 0, 12), (FULL, 12, 0)],
    "the same rows twice": [(FULL, 0, 6), (FULL, 0, 6)],
    "overlapping": [(FULL, 0, 6), (FULL, 5, 6)],
    "as many elsewhere": [(FULL, 0, 6), (FULL, 5, 5)],
    "one column too few": [(COLUMNS[0], 0, 8), (COLUMNS[0], 0, 8)],
}


def held_on(rank: int, world_size: int, case: str) -> tuple[Replica, str]:
    ranges = {"w": HeldRange(*HELD[case][rank], axes="as told"), "v": HeldRange(FULL, 0, 12, "a plain tensor")}
    replicas = count_replicas(ranges)
    assert replicas["v"] == Replica(rank, 2)
    try:
        check_coverage(ranges, replicas)
    except UsageError as error:
        return replicas["w"], str(error)
    return replicas["w"], ""


@pytest.mark.parametrize("case", HELD)
def test_every_element_is_held_once_or_refused(case, rank_pool):
    results = rank_pool(held_on, case)
    fits = case in ("replicas", "rows", "columns", "nothing on one")
    are_copies = case in ("replicas", "the same rows twice", "one column too few")
    assert [replica for replica, _ in results] == [Replica(i, 2) if are_copies else Replica(0, 1) for i in range(2)]
    for _, message in results:
        assert fits == (not message)
        if not fits:
            assert "elements of w, which has 12" in message and "as told" in message and "rank" in message


def different_names(rank: int, world_size: int) -> str:
    names = ["a", "b"] if rank else ["a", "c"]
    with pytest.raises(UsageError) as error:
        count_replicas({name: HeldRange(FULL, 0, 12, "a plain tensor") for name in names})
    return str(error.value)


def test_layers_that_are_spread_over_ranks_are_refused_by_name(rank_pool):
    for message in rank_pool(different_names):
        assert "known to one of the ranks 0 and 1 alone" in message and "pipeline" in message


def cut_by_hand(rank: int, world_size: int, is_cut: bool) -> Any:
    """A plain tensor that is another part of a matrix on each rank, and one that is the same."""
    torch.manual_seed(0)
    complete = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(complete[4 * rank : 4 * rank + 4] if is_cut else complete[:4])
    optimizer = LpAdamW(param_groups(model, 0.0), lr=1e-3)
    try:
        attach(model, optimizer, target=SparsityTarget(0.5), total_steps=30)
    except UsageError as error:
        return str(error)
    return measure_sparsity(model).elements


def test_what_is_cut_by_hand_is_not_taken_for_replicas(rank_pool):
    for message in rank_pool(cut_by_hand, True):
        assert "0.weight should be the same" in message and "device_mesh" in message
    assert rank_pool(cut_by_hand, False) == [32, 32]


def uneven_strips(rank: int, world_size: int) -> str:
    """What torch 2.7 answers for six rows in strips for two ranks of tensor parallelism, and torch 2.13 does not."""
    mesh = init_device_mesh("cpu", (world_size,))
    strips = [_StridedShard(0, split_factor=2)]
    weight = DTensor.from_local(torch.zeros(3, 2), mesh, strips, run_check=False, shape=(6, 2), stride=(2, 1))
    answer = AssertionError("_StridedShard currently only allows even sharding")
    with patch.object(_StridedShard, "_split_tensor", side_effect=answer), pytest.raises(UsageError) as error:
        local_shard(weight)
    return str(error.value)


def test_shards_that_torch_does_not_locate_are_refused_in_its_words(rank_pool):
    for message in rank_pool(uneven_strips):
        assert "(6, 2)" in message and "only allows even sharding" in message and torch.__version__ in message
