"""Counting zeros on the shards of every engine: the same as on the gathered weights, padding left out."""

from __future__ import annotations

import json

import torch
from torch import nn

from helpers.models import SMALL_MATRICES, small_model
from lp_dist import LpAdamW, measure_sparsity, param_groups


def config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def count_in_engines(rank: int, world_size: int) -> dict:
    """For each engine: what is counted after two steps, and what the gathered weights say."""
    import deepspeed
    from torch.distributed.fsdp import fully_shard

    results = {}

    def steps(model, backward, step):
        for i in range(2):
            torch.manual_seed(10 * i + rank)
            backward(model(torch.randn(2, 7)).square().mean())
            step()

    def optimizer(model):
        return LpAdamW(param_groups(model, 0.5), lr=1e-2, precondition=0.0)

    def full(named):
        return {name: (int((p == 0).sum()), p.numel()) for name, p in named if name in SMALL_MATRICES}

    model = small_model()
    ddp, opt = nn.parallel.DistributedDataParallel(model), optimizer(model)
    steps(ddp, lambda loss: loss.backward(), opt.step)
    results["ddp"] = (measure_sparsity(ddp).counts, full(model.named_parameters()))

    for stage in (1, 2, 3):
        model = small_model()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer(model), config=config(stage), dist_init_required=False
        )
        steps(engine, engine.backward, engine.step)
        counts = measure_sparsity(engine).counts
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            results[f"zero{stage}"] = (counts, full((n, p.detach().clone()) for n, p in model.named_parameters()))

    model = small_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    opt = optimizer(model)
    steps(model, lambda loss: loss.backward(), opt.step)
    results["fsdp2"] = (
        measure_sparsity(model).counts,
        full((n, p.full_tensor()) for n, p in model.named_parameters()),
    )
    return results


def test_shards_of_every_engine_count_as_the_gathered_weights_do(run_ranks):
    first, second = run_ranks(count_in_engines, 2)
    assert set(first) == {"ddp", "zero1", "zero2", "zero3", "fsdp2"}
    assert json.dumps(first) == json.dumps(second)  # the same on every rank
    for engine, (counted, gathered) in first.items():
        assert counted == gathered, engine
        assert sum(elements for _, elements in counted.values()) == 53, engine
        # Adam's first steps move every weight by about lr, so what is zero now was kept there by the decay.
        assert sum(zeros for zeros, _ in counted.values()) >= 10, engine
