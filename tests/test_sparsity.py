"""Counting zeros: on the shards of every engine the same as on the gathered weights, padding left out."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lp_dist import LpAdamW, measure_sparsity, param_groups
from lp_dist.optim import batching
from lp_dist.sparsity.measure import Sparsity, kind_of


def small_model() -> nn.Sequential:
    """Odd sizes, so that every split over two ranks is uneven or padded; a third of the weights are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False), nn.Linear(3, 1))
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand_like(param) < 1 / 3] = 0
    return model


@pytest.mark.parametrize("most", [1, 7, 1000])
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(0),
        torch.tensor(0.0),
        torch.randn(6, 5).relu(),
        torch.randn(5, 6).relu().t(),
        torch.randn(21).bfloat16().relu(),
    ],
    ids=lambda values: str(tuple(values.shape)),
)
def test_zeros_are_counted_over_all_slices(values, most, monkeypatch):
    monkeypatch.setitem(batching._SLICE, "cpu", most)
    found = batching.count_zeros(values)
    assert int(found) == int((values == 0).sum()) and found.dtype == torch.int64 and found.ndim == 0


DECAYED = {"0.weight", "2.weight", "3.weight"}


def test_counts_are_those_of_the_weights():
    model = small_model()
    params = dict(model.named_parameters())
    result = measure_sparsity(model)
    assert set(result.counts) == DECAYED
    for name, (zeros, elements) in result.counts.items():
        assert (zeros, elements) == (int((params[name] == 0).sum()), params[name].numel())
    assert result.elements == 35 + 15 + 3
    assert result.total == result.zeros / result.elements
    assert 0 < result.zeros < result.elements


def test_a_tensor_that_died_still_counts():
    model = small_model()
    with torch.no_grad():
        model[2].weight.zero_()
    assert measure_sparsity(model).counts["2.weight"] == (15, 15)


def test_names_choose_what_counts_and_unknown_ones_raise():
    model = small_model()
    assert set(measure_sparsity(model, names=["1.weight"]).counts) == {"1.weight"}
    with pytest.raises(ValueError, match="'9.weight'.*named_parameters"):
        measure_sparsity(model, names=["0.weight", "9.weight"])


def test_kinds_of_layers():
    assert kind_of("model.layers.3.mlp.up_proj.weight") == "up_proj"
    assert kind_of("0.weight") == "weight"
    assert kind_of("model.layers.0.experts.gate_up_proj") == "gate_up_proj"
    counts = Sparsity({"a.0.q.weight": (1, 4), "a.1.q.weight": (2, 4), "a.0.v.weight": (3, 3)})
    assert counts.by_kind() == {"q": (3, 8), "v": (3, 3)}
    assert Sparsity({}).total == 0.0


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
        return {name: (int((p == 0).sum()), p.numel()) for name, p in named if name in DECAYED}

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
