"""What no gradient reaches, on shards: a layer and single experts stay dense under every engine, and the others come
to the weights of one process, bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import Tensor, nn

from helpers.engines import in_two_starts, make, quiet
from helpers.mixtures import mixture_model
from helpers.snapshots import check_one_process, results_of
from helpers.target_runs import Case, optimizer_of, scheduler_of, trained
from helpers.targets import decaying
from lp_dist import attach

STEPS, START, LATE = 24, 4, 14
UNREACHED = [1, 4]
EXPERTS = ("2.experts.alpha", "2.experts.omega")
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2 offload", "zero3 offload")
CASES = [Case(engine, steps=STEPS, scope=scope) for engine in ENGINES for scope in ("global", "layer")]


class WithUnused(nn.Sequential):
    """The last layer has gradients of zeros. Experts 1 and 4 get no tokens, and 4 gets some from step LATE on."""

    def __init__(self) -> None:
        super().__init__(*mixture_model(), nn.Linear(7, 7))
        self.passes = 0
        self[2].offset[UNREACHED] = -1e4

    def forward(self, rows: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes > self.late:
            self[2].offset[4] = 0.0
        for layer in list(self)[:-1]:
            rows = layer(rows)
        return rows + 0.0 * self[-1](rows)

    late = LATE


def followed(case: Case) -> dict[str, Any]:
    model = WithUnused()
    if case.engine == "plain":
        model.late = 2 * LATE  # one process takes the batches of both ranks
    engine = make(case.engine, model, optimizer_of(case), scheduler_of(case))
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    target = decaying(0.5, scope=case.scope, precondition=1.0, update_every=2, start=START, end=STEPS - 2)
    attachment = attach(engine.handle, target=target, total_steps=STEPS, **others)
    trained(engine, attachment, case, 0, STEPS)
    attachment.finish()
    return results_of(engine, attachment)


@cache
def alone(case: Case) -> dict[str, Any]:
    return followed(replace(case, engine="plain"))


def on_a_rank(rank: int, world_size: int, cases: list[Case]) -> dict[Case, Any]:
    quiet()
    return {case: followed(case) for case in cases}


_results: dict[tuple[str, ...], list[dict[Case, Any]]] = {}


@pytest.fixture(params=in_two_starts(ENGINES))
def results(request, run_ranks) -> list[dict[Case, Any]]:
    """By rank the results of the runs with some engines, run once."""
    if request.param not in _results:
        cases = [case for case in CASES if case.engine in request.param]
        _results[request.param] = run_ranks(on_a_rank, 2, cases)
    return _results[request.param]


def test_every_engine_comes_to_the_weights_of_one_process(results):
    check_one_process(results, [*results[0]], alone)


def test_what_no_gradient_reaches_stays_dense_and_the_target_holds_of_the_rest(results):
    for case in results[0]:
        model, state = results[0][case]["model"], json.loads(results[0][case]["state"])["weights"]
        assert state["without_gradient"] == {**dict.fromkeys(EXPERTS, UNREACHED), "4.weight": None}, case
        assert state["told_late"], case
        assert model["4.weight"].all() and all(model[name][UNREACHED].all() for name in EXPERTS), case
        reached = [i for i in range(5) if i not in UNREACHED]
        rest = [model["0.weight"], model["3.weight"], *(model[name][reached] for name in EXPERTS)]
        zeros, elements = (sum(int(n) for n in column) for column in zip(*(((w == 0).sum(), w.numel()) for w in rest)))
        assert abs(zeros - 0.5 * elements) <= (2 if case.scope == "layer" else 1), case
        if case.scope == "layer":
            assert all(abs(int((weights == 0).sum()) - 0.5 * weights.numel()) <= 1 for weights in rest), case
