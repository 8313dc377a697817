"""A few steps under each engine: the native optimizer and `add_lp_decay` give the same weights there, and those of one
process.
"""

from __future__ import annotations

import torch
from torch import nn

from lp_dist import LpAdamW, add_lp_decay, param_groups

STEPS, LR, LAMBDA, P = 6, 1e-2, 0.5, 0.5


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 1))


def batch_of(step: int, rank: int) -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def native(model: nn.Module) -> LpAdamW:
    return LpAdamW(
        param_groups(model, LAMBDA), lr=LR, p=P, precondition=0.0, implementation="foreach"
    )  # the hooks decay as it does, bit for bit


def hooked(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(param_groups(model, LAMBDA), lr=LR, foreach=True)
    add_lp_decay(optimizer, p=P)
    return optimizer


def hooked_with_a_copy(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(param_groups(model, LAMBDA), lr=LR, foreach=True)
    add_lp_decay(optimizer, p=P, one_at_a_time=False)
    return optimizer


MAKERS = {"native": native, "hooked": hooked, "copy": hooked_with_a_copy}


def zero(stage: int, make, rank: int) -> list[torch.Tensor]:
    import deepspeed

    model = model_of()
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 50},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make(model), config=config, dist_init_required=False)
    for step in range(STEPS):
        engine.backward(engine(batch_of(step, rank)).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return [p.detach().clone() for p in model.parameters()]


def fsdp2(make, rank: int) -> list[torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = make(model)
    for step in range(STEPS):
        model(batch_of(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() for p in model.parameters()]


def on_a_rank(rank: int, world_size: int) -> dict[str, list[torch.Tensor]]:
    engines = {f"zero{stage}": lambda make, stage=stage: zero(stage, make, rank) for stage in (1, 2, 3)}
    engines["fsdp2"] = lambda make: fsdp2(make, rank)
    return {f"{engine}/{name}": run(make) for engine, run in engines.items() for name, make in MAKERS.items()}


def in_one_process(world_size: int) -> list[torch.Tensor]:
    model = model_of()
    optimizer = native(model)
    for step in range(STEPS):
        loss = sum(model(batch_of(step, rank)).square().mean() for rank in range(world_size)) / world_size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_native_and_hooked_agree_in_every_engine_and_with_one_process(run_ranks):
    results = run_ranks(on_a_rank, 2)
    wanted = in_one_process(2)
    decayed = [0, 4, 5]  # the matrices among the parameters
    assert any((wanted[i] == 0).any() for i in decayed), "nothing became zero, so zeros are not compared"
    for rank, result in enumerate(results):
        assert len(result) == 12
        for cell, weights in result.items():
            native_of_engine = result[cell.split("/")[0] + "/native"]
            assert all(torch.equal(a, b) for a, b in zip(weights, native_of_engine)), (
                f"rank {rank}: {cell} is not the native step"
            )
            for a, b in zip(weights, wanted):
                # Gradients are averaged in another order than in one process: rounding, no more.
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m: f"rank {rank}: {cell}: {m}")
                assert torch.equal(a == 0, b == 0), f"rank {rank}: {cell}: other zeros than in one process"
