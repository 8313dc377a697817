"""DeepSpeed's expert parallelism on four ranks, two of which share the experts: AutoEP comes to one process, and
`deepspeed.moe` to data parallelism, with a target, a pattern and groups. Each element is counted once, and runs are
resumed bit for bit.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.deepspeed_axes import (
    AUTOEP,
    EXPERT_CASES,
    EXPERTS,
    LONG_EXPERT_CASES,
    VOCABULARY,
    ExpertCase,
    NativeMixture,
    marked_groups,
    mixture,
    with_all_experts,
)
from helpers.engines import Engine, deepspeed_config, ended, gathered, quiet
from lp_dist import LpAdamW, SparsityTarget, attach, measure_sparsity, param_groups
from lp_dist.attachment.attachment import Attachment

STEPS, HALF = 15, 8
NATIVE = "moe.deepspeed_moe.experts.deepspeed_experts"


FAST, LONG = EXPERT_CASES, LONG_EXPERT_CASES
RESUMED = [ExpertCase("autoep", "zero2"), ExpertCase("native", "zero1")]


def each(cases: list[ExpertCase]) -> Any:
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=[pytest.mark.long] if case in LONG else []) for case in cases], ids=str
    )


def engine_of(case: ExpertCase) -> Engine:
    import deepspeed

    config = deepspeed_config(case.stage, **({"expert_parallel": AUTOEP} if case.kind == "autoep" else {}))
    model = mixture() if case.kind == "autoep" else NativeMixture(case.ep_size)
    experts = {id(param) for name, param in model.named_parameters() if ".experts." in name}
    groups = marked_groups(param_groups(model, 0.0), experts, f"ep_size_{case.ep_size}")
    optimizer = LpAdamW(groups if case.stage in ("zero1", "zero2") else param_groups(model, 0.0), lr=5e-3, eps=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return Engine(engine, optimizer)


def attached_to(engine: Engine, case: ExpertCase) -> Attachment:
    others = {} if hasattr(engine.handle, "load_checkpoint") else {"optimizer": engine.optimizer}
    if ":" in case.what:
        target = SparsityTarget(pattern=case.what, scope="global", update_every=2)
    elif case.what != "weights":
        target = SparsityTarget(0.5, groups=case.what, update_every=2)
    else:
        target = SparsityTarget(0.5, scope="global", update_every=2)
    return attach(engine.handle, target=target, total_steps=STEPS, **others)


def loss_of(model: Any, kind: str, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    if kind == "native":
        return model(torch.randn(16, 8, generator=generator)).square().mean()
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
    return model(input_ids=tokens, labels=tokens).loss


def train(engine: Engine, attachment: Attachment, case: ExpertCase, steps: range, rank: int) -> None:
    for step in steps:
        engine.step(loss_of(engine.handle, case.kind, step, rank))
        attachment.after_step()


def masters_of(attachment: Attachment) -> dict[str, list[tuple[int, Tensor]]]:
    return {
        shard.name: [(shard.start, values.flatten().clone()) for values in (shard.local.values, *shard.state.values())]
        for shard in attachment.shards
        if shard.length
    }


def on_a_rank(
    rank: int, world_size: int, directory: Path, cases: list[ExpertCase]
) -> dict[ExpertCase, dict[str, Any]]:
    quiet()
    results = {}
    for number, case in enumerate(cases):
        place = directory / str(number)
        engine = engine_of(case)
        attachment = attached_to(engine, case)
        train(engine, attachment, case, range(HALF), rank)
        if case in RESUMED:
            engine.save(place, "half")
        train(engine, attachment, case, range(HALF, STEPS), rank)
        results[case] = {
            "masters": masters_of(attachment),
            "shapes": {shard.name: shard.shape for shard in attachment.shards},
            "model": gathered(engine),
            "counts": measure_sparsity(engine.handle).counts,
            "of masters": measure_sparsity(engine.handle, engine.handle.optimizer).counts,
            "all": measure_sparsity(engine.handle, names=[shard.name for shard in attachment.shards]).counts,
        }
        ended(engine)
        if case in RESUMED:
            engine = engine_of(case)
            attachment = attached_to(engine, case)
            engine.load(place, "half")
            train(engine, attachment, case, range(HALF, STEPS), rank)
            results[case]["resumed"] = masters_of(attachment)
            ended(engine)
    return results


@pytest.fixture(scope="module")
def fast_results(module_ranks, tmp_path_factory) -> list[dict[ExpertCase, dict[str, Any]]]:
    return module_ranks(on_a_rank, 4, tmp_path_factory.mktemp("saved"), FAST)


@pytest.fixture(scope="module")
def long_results(module_ranks, tmp_path_factory) -> list[dict[ExpertCase, dict[str, Any]]]:
    return module_ranks(on_a_rank, 4, tmp_path_factory.mktemp("saved"), LONG)


@pytest.fixture
def results(case: ExpertCase, request) -> list[dict[ExpertCase, dict[str, Any]]]:
    """Of each rank, the cases that ran together with this one."""
    return request.getfixturevalue("fast_results" if case in FAST else "long_results")


@cache
def alone(what: str) -> dict[str, Any]:
    """AutoEP's modules in one process, with all experts."""
    model = with_all_experts()
    optimizer = LpAdamW(param_groups(model, 0.0), lr=5e-3, eps=1e-3)
    engine = Engine(model, optimizer)
    attachment = attached_to(engine, ExpertCase("autoep", "plain", what))
    for step in range(STEPS):
        for rank in range(3):
            (loss_of(model, "autoep", step, rank) / 4).backward()
        engine.step(loss_of(model, "autoep", step, 3) / 4)
        attachment.after_step()
    return {"model": gathered(engine), "counts": measure_sparsity(model).counts}


def all_weights(results: list[dict[ExpertCase, dict[str, Any]]], case: ExpertCase) -> dict[str, Tensor]:
    """The parameters of the model with all experts, in the order of experts: of the first ranks' copies."""
    models = [rank[case]["model"] for rank in results[: case.ep_size]]
    weights = {}
    for name, weight in models[0].items():
        if case.kind == "autoep":
            weights[name] = torch.cat([model[name] for model in models]) if ".experts." in name else weight
        elif name.startswith(NATIVE):
            index, _, rest = name.removeprefix(f"{NATIVE}.").partition(".")
            for rank, model in enumerate(models):
                weights[f"{NATIVE}.{rank * EXPERTS // case.ep_size + int(index)}.{rest}"] = model[name]
        else:
            weights[name] = weight
    return weights


@each([case for case in [*FAST, *LONG] if case.ep_size > 1])
def test_experts_on_two_ranks_are_those_of_one_process(results, case):
    weights = all_weights(results, case)
    expected = (
        alone(case.what)["model"]
        if case.kind == "autoep"
        else all_weights(results, case._replace(stage="zero0", ep_size=1))
    )
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
        assert torch.equal(weight == 0, expected[name] == 0), name


@each([*FAST, *LONG])
def test_each_expert_is_counted_once(results, case):
    weights = all_weights(results, case)
    for rank in results:
        assert rank[case]["counts"] == rank[case]["of masters"]
        assert {name: elements for name, (_, elements) in rank[case]["all"].items()} == {
            name: shape.numel() for name, shape in rank[case]["shapes"].items()
        }
        assert sum(n for _, n in rank[case]["all"].values()) == sum(weight.numel() for weight in weights.values())
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        assert sum(count for count, _ in rank[case]["all"].values()) == zeros > 100


@each(RESUMED)
def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(results, case):
    for rank in results:
        masters, resumed = rank[case]["masters"], rank[case]["resumed"]
        assert masters.keys() == resumed.keys() and masters
        for name, parts in masters.items():
            for (start, values), (start_, values_) in zip(parts, resumed[name], strict=True):
                assert start == start_ and values.equal(values_), name
