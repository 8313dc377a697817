"""Experts and their channels on shards: under every engine they come to the weights of one process, bit for bit, and
become zero in the masters and in the model alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from helpers.engines import in_two_starts, make, quiet
from helpers.mixtures import mixture_model
from helpers.snapshots import check_one_process, joined, results_of
from helpers.target_runs import Case, optimizer_of, scheduler_of, trained
from lp_dist import GroupDecay, SparsityTarget, attach
from lp_dist.sharding.engines import unwrap
from lp_dist.structured.resolve import resolve_groups

STEPS = 20
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2 offload", "zero3 offload")


@dataclass(frozen=True)
class ExpertCase(Case):
    """What is requested: a target for a kind of groups, or a λ for it."""

    kind: str = "experts"
    has_target: bool = True


RUNS = [
    ExpertCase(engine, steps=STEPS, kind=kind, has_target=has_target)
    for i, engine in enumerate(ENGINES)
    for kind, has_target in [("experts", True), ("expert_channels", True), ("expert_channels", False)][: 2 + i % 2]
]


def followed(case: ExpertCase) -> dict[str, Any]:
    engine = make(case.engine, mixture_model(), optimizer_of(case), scheduler_of(case))
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    if case.has_target:
        target = SparsityTarget(0.4, groups=case.kind, precondition=1.0, update_every=2, end=12, start=2)
        attachment = attach(engine.handle, target=target, total_steps=STEPS, **others)
    else:
        sets = resolve_groups(unwrap(engine.handle), case.kind)
        attachment = attach(engine.handle, groups=GroupDecay(sets, 0.5, precondition=1.0), **others)
    trained(engine, attachment, case, 0, STEPS)
    attachment.finish()
    return results_of(engine, attachment)


@cache
def alone(case: ExpertCase) -> dict[str, Any]:
    return followed(replace(case, engine="plain"))


def on_a_rank(rank: int, world_size: int, cases: list[ExpertCase]) -> dict[ExpertCase, Any]:
    quiet()
    return {case: followed(case) for case in cases}


_results: dict[tuple[str, ...], list[dict[ExpertCase, Any]]] = {}


@pytest.fixture(params=in_two_starts(ENGINES))
def results(request, run_ranks) -> list[dict[ExpertCase, Any]]:
    """By rank the results of the runs with some engines, run once."""
    if request.param not in _results:
        cases = [case for case in RUNS if case.engine in request.param]
        _results[request.param] = run_ranks(on_a_rank, 2, cases)
    return _results[request.param]


def test_every_engine_comes_to_the_weights_of_one_process(results):
    check_one_process(results, [*results[0]], alone)


def test_as_many_are_dead_as_requested_in_the_model_and_in_the_masters(results):
    for case in (case for case in results[0] if case.has_target):
        masters, model = joined([{"shards": rank[case]["shards"]} for rank in results]), results[0][case]["model"]
        for name, weights in model.items():
            assert (weights.flatten() == 0).equal(masters[name].flatten() == 0), f"{case}: {name}"
        zero = {name: model[f"2.experts.{name}"] == 0 for name in ("alpha", "beta", "omega", "psi")}
        if case.kind == "experts":
            gone = torch.stack([zero[name].flatten(1).all(1) for name in zero])
            assert gone.sum(1).tolist() == [2] * 4 and (gone == gone[0]).all(), case
        else:
            # 3 of the 7 channels of each of 5 experts, each its own ones: rounded from 2.8.
            dead = zero["omega"].all(2)
            assert dead.sum(1).tolist() == [3] * 5 and len(dead.unique(dim=0)) > 1, case
            assert zero["alpha"].all(1).view(5, 7, 2).all(2).equal(dead), case
            assert zero["beta"].view(5, 7, 2).all(2).equal(dead), case
