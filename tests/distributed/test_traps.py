"""What DeepSpeed, Accelerate and FSDP2 do to an optimizer that is passed in: one test for each trap, named after it.

Traps 1, 3 and 4 (whose optimizer is it) are in test_attach.py; 11, 13 and 15 (skipped steps and checkpoints) in
test_checkpoints.py, test_world_size.py and test_skipped_steps.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.engines import deepspeed_config, gathered, make
from lp_dist import LpAdamW, attach, measure_sparsity, param_groups
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.deepspeed import check_deepspeed_config
from lp_dist.sharding.shards import locate_shards
from lp_dist.sparsity.selection import matrix_names


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False), nn.Linear(5, 3), nn.Linear(3, 1)
    )


def optimizer_of(model: nn.Module) -> LpAdamW:
    return LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0)


def train(engine, steps: int = 3, dtype: torch.dtype = torch.float32) -> None:
    for step in range(steps):
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(step))
        engine.step(engine(x.to(dtype)).float().square().mean())


# -- on three ranks, all in one group of them ---------------------------------


def trap_2(rank: int) -> str:
    import deepspeed

    config = {key: value for key, value in deepspeed_config("zero1").items() if key != "zero_allow_untested_optimizer"}
    model = model_of()
    try:
        deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config, dist_init_required=False)
    except AssertionError as error:
        return str(error)
    return ""


def trap_5(rank: int) -> dict:
    seen = {}
    for kind in ("zero1", "zero3"):
        engine = make(kind, model_of(), optimizer_of)
        optimizer, calls = engine.optimizer, []
        step = optimizer.step
        optimizer.step = lambda: (calls.append([len(group["params"]) for group in optimizer.param_groups]), step())[1]
        attach(engine.handle)
        train(engine)
        seen[kind] = (calls, steps_taken(optimizer))
    return seen


def trap_6(rank: int) -> dict:
    import deepspeed

    engine = make("zero1", model_of(), optimizer_of)
    attach(engine.handle)
    everything = [name for name, _ in model_of().named_parameters()]
    counts = measure_sparsity(engine.handle, engine.handle.optimizer, names=everything)
    flats = {id(shard.tensor): shard.tensor for shard in locate_shards(engine.handle)}.values()
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config("zero3")):
        sharded = model_of()
    return {
        "elements": counts.elements,
        "in flat shards": sum(flat.numel() for flat in flats),
        "ndim": {p.ndim for p in sharded.parameters()},
        "names": sorted(matrix_names(sharded)),
    }


def trap_7(rank: int) -> dict:
    """The last layer's one row lies on one rank; on the others the local part is empty, and `any()` of it is False."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0)  # made on the sharded model
    decays = [
        name
        for name, param in model.named_parameters()
        if any(param is p for p in optimizer.param_groups[0]["params"])
    ]
    for _ in range(2):  # without attach as well: the first step searches for what is all zeros
        model(torch.ones(3, 7)).square().mean().backward()
        optimizer.step()
    return {"decays": decays, "local": model[4].weight.to_local().numel()}


def trap_8(rank: int) -> dict:
    outcome = {}
    for through in ("model", "master"):
        engine = make("zero2", model_of(), optimizer_of, bf16={"enabled": True})
        attached = attach(engine.handle)
        train(engine, 1, torch.bfloat16)
        if through == "model":
            with torch.no_grad():
                engine.handle.module[0].weight.zero_()
        else:
            for shard in attached.shards:
                if shard.name == "0.weight" and shard.length:
                    shard.local.values.zero_()
        train(engine, 1, torch.bfloat16)
        outcome[through] = int((gathered(engine)["0.weight"] == 0).sum())
    return outcome


def trap_9(rank: int) -> dict:
    def with_an_empty_group(model):
        return LpAdamW(
            [{"params": [], "weight_decay": 7.0, "p": 0.0}, *param_groups(model, 0.1)], lr=1e-2, precondition=0.0
        )

    engine = make("zero2", model_of(), with_an_empty_group)
    attached = attach(engine.handle)
    return {
        "groups": [(group["weight_decay"], group["p"]) for group in attached.optimizer.param_groups],
        "decayed": sorted(attached.decayed),
    }


def trap_10(rank: int) -> str:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    optimizer = LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0)
    fully_shard(model)
    try:
        attach(model, optimizer)
    except ValueError as error:
        return str(error)
    return ""


TRAPS = {f.__name__: f for f in (trap_2, trap_5, trap_6, trap_7, trap_8, trap_9, trap_10)}


def on_a_rank(rank: int, world_size: int) -> dict:
    return {name: trap(rank) for name, trap in TRAPS.items()}


_per_rank: list[dict] = []


@pytest.fixture
def per_rank(run_ranks) -> list[dict]:
    """What each trap did on each of three ranks; run once for the whole file."""
    if not _per_rank:
        _per_rank.extend(run_ranks(on_a_rank, 3))
    return _per_rank


def test_trap_2_deepspeed_wants_leave_for_an_untested_optimizer(per_rank):
    for rank in per_rank:
        assert '"zero_allow_untested_optimizer": true' in rank["trap_2"]


def test_trap_5_step_is_called_once_per_group_or_sub_group(per_rank):
    for rank in per_rank:
        calls, steps = rank["trap_5"]["zero1"]
        assert calls == [[1]] * 6 and steps == 3  # one-group lists, twice a step
        calls, steps = rank["trap_5"]["zero3"]
        assert len(calls) > 6 and all(sorted(call) == [0, 1] for call in calls) and steps == 3


def test_trap_6_padding_does_not_count_and_shapes_are_those_of_the_parameters(per_rank):
    elements = sum(param.numel() for param in model_of().parameters())
    assert sum(rank["trap_6"]["in flat shards"] for rank in per_rank) > elements  # there is padding
    for rank in per_rank:
        assert rank["trap_6"]["elements"] == elements
        assert rank["trap_6"]["ndim"] == {1} and rank["trap_6"]["names"] == sorted(matrix_names(model_of()))


def test_trap_7_a_statistic_of_an_unsharded_tensor_is_not_taken_on_a_shard(per_rank):
    assert sorted(rank["trap_7"]["local"] for rank in per_rank) == [0, 0, 3]
    for rank in per_rank:
        assert rank["trap_7"]["decays"] == ["0.weight", "2.weight", "3.weight", "4.weight"]


def test_trap_8_zeros_are_written_through_the_master_weights(per_rank):
    for rank in per_rank:
        assert rank["trap_8"]["model"] < 5  # the master came back over it
        assert rank["trap_8"]["master"] == 63  # zero absorbs


def test_trap_9_empty_groups_are_dropped_and_the_others_keep_their_values(per_rank):
    for rank in per_rank:
        assert rank["trap_9"] == {
            "groups": [(0.1, 0.5), (0.0, 0.5)],
            "decayed": ["0.weight", "2.weight", "3.weight", "4.weight"],
        }


def test_trap_10_an_optimizer_made_before_sharding_is_refused(per_rank):
    for rank in per_rank:
        assert "steps none of the model's trainable parameters" in rank["trap_10"] and "fully_shard" in rank["trap_10"]


# -- alone --------------------------------------------------------------------


def test_trap_12_the_state_has_the_names_that_universal_checkpoints_carry():
    model = model_of()
    optimizer = LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=1.0, cutoff=1.0)
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_trap_14_zero_3_without_gathering_on_save_is_refused():
    with pytest.raises(ValueError, match='"stage3_gather_16bit_weights_on_model_save": true'):
        check_deepspeed_config({"zero_optimization": {"stage": 3}})
    check_deepspeed_config({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}})
