"""A SparsityTarget on shards: a covering part of the grid of target_grid.py, every engine against one process, and
what may not go wrong.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.engines import ended, gathered, in_two_starts, make, quiet
from helpers.snapshots import joined, local_shards_of, snapshot
from helpers.target_grid import PS, SCOPES, TARGETS
from helpers.target_runs import FORMS, Case, attached_to, engine_of, model_of, reached, trained
from lp_dist import LpAdamW, attach
from lp_dist.sharding.engines import unwrap

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero3 offload")
COVERING = [
    Case(
        engine,
        tuple(FORMS)[(i + 2 * j) % 3],
        p,
        TARGETS[(i + j) % 4],
        SCOPES[(i + j // 2) % 2],
        steps=20,
        update_every=2,
    )
    for (i, engine), (j, p) in product(enumerate(ENGINES), enumerate(PS))
]
# The final pruning comes before the last step, which is the only one to carry it into an engine's copies.
LAST = [
    Case(engine, "capped", 0.0, 0.7, dtype=dtype, end=1.0, steps=16, update_every=3)
    for engine, dtype in [
        ("fsdp2", "fp32"),
        ("zero2", "fp32"),
        ("zero3", "fp32"),
        ("zero1", "bf16"),
        ("zero2", "bf16"),
        ("zero3", "bf16"),
        ("bf16_optimizer", "bf16"),
    ]
]
SKIPPING = {
    kind: Case(kind, "preconditioned", 0.5, 0.6, dtype="fp16", steps=20, update_every=3) for kind in ("zero2", "zero3")
}
BAD = {
    0: math.inf,
    5: math.nan,
    6: math.inf,
    13: math.nan,
}  # before the window, in it twice, right after the final pruning


def followed(case: Case) -> dict[str, Any]:
    """The masters right after the final pruning, and everything at the end."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    end = attachment.weight_controller.window.end
    losses = trained(engine, attachment, case, 0, end - 1)
    results: dict[str, Any] = {"pruned": local_shards_of(attachment)}
    losses += trained(engine, attachment, case, end - 1, case.steps)
    results |= {
        "shards": local_shards_of(attachment),
        "model": gathered(engine),
        "state": attachment.state_dict(),
        "logs": attachment.logs,
        "losses": losses,
        **reached(engine, attachment),
    }
    ended(engine)
    return results


@cache
def alone(case: Case) -> dict[str, Any]:
    return followed(replace(case, engine="plain"))


def with_bad_steps(case: Case, bad: dict[int, float]) -> dict[str, Any]:
    """A complete run of good steps; before those in `bad`, one whose gradients overflow on the last rank."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    start, end, states = attachment.weight_controller.window.start, attachment.weight_controller.window.end, []
    for step in range(case.steps):
        if step in bad:
            before = json.dumps(attachment.state_dict()), attachment.weight_controller.last_step
            trained(engine, attachment, case, step, step + 1, scale=bad[step])
            states.append((json.dumps(attachment.state_dict()), attachment.weight_controller.last_step) == before)
        trained(engine, attachment, case, step, step + 1)
    taken = snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict())}
    ended(engine)
    return {"taken": taken, "unchanged": states, "window": (start, end)}


def disagreeing(rank: int) -> list[str]:
    """What attach says where the last rank requests something else."""
    said = []
    for kind, change in product(
        ("ddp", "zero2"), ({"target": 0.6}, {"scope": "global"}, {"end": 0.8}, {"steps": 31}, {"update_every": 3})
    ):
        case = Case(kind, steps=30)
        engine = engine_of(case)
        with pytest.raises(RuntimeError) as error:
            attached_to(engine, replace(case, **change) if rank == 1 else case)
        said.append(str(error.value))
        ended(engine)
    return said


STARTS = in_two_starts((*ENGINES, "bf16_optimizer"))


def on_a_rank(rank: int, world_size: int, engines: tuple[str, ...]) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    quiet()
    results: dict[str, Any] = {
        "runs": {case: followed(case) for case in (*COVERING, *LAST) if case.engine in engines},
        "said": disagreeing(rank) if "zero2" in engines else [],
    }
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for fast fp16; torch computes it on any CPU
    return results | {
        "skipping": {
            kind: (with_bad_steps(case, {}), with_bad_steps(case, BAD))
            for kind, case in SKIPPING.items()
            if kind in engines
        }
    }


_results: dict[tuple[str, ...], list[dict[str, Any]]] = {}


@pytest.fixture(params=STARTS)
def results(request, run_ranks) -> list[dict[str, Any]]:
    """By rank what `on_a_rank` tells of some engines, run once."""
    if request.param not in _results:
        _results[request.param] = run_ranks(on_a_rank, 2, request.param)
    return _results[request.param]


@pytest.fixture
def runs(results) -> dict[Case, dict[str, Any]]:
    """As rank 0 saw them, with the masters put together."""
    return {
        case: {
            **run,
            **{
                when: joined([{"shards": rank["runs"][case][when]} for rank in results])
                for when in ("pruned", "shards")
            },
        }
        for case, run in results[0]["runs"].items()
    }


def zeros_of(weights: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    return {name: weights[name].flatten() == 0 for name in names}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name].flatten(), second[name].flatten()) for name in first
    )


def test_the_runs_hold_every_pair_of_values():
    values = {"engine": ENGINES, "form": FORMS, "p": PS, "target": TARGETS, "scope": SCOPES}
    for first, second in combinations(values, 2):
        pairs = {(getattr(case, first), getattr(case, second)) for case in COVERING}
        assert pairs == set(product(values[first], values[second])), f"{first} and {second}"


def test_every_target_is_met_to_the_weight(runs):
    """The final pruning uses an order statistic and no estimate, so it leaves the rounding to one weight. (A tie
    would leave more: none here.)
    """
    for case, run in runs.items():
        assert run["tensors"] == run["masters"] and len(run["tensors"]) == 4, case
        counts = list(run["tensors"].values())
        for zeros, elements in counts if case.scope == "layer" else [map(sum, zip(*counts))]:
            assert zeros == round(case.target * elements), case
        assert abs(run["achieved"] - case.target) < 1e-4, case
        assert run["by_decay"] + run["pruned_at_end"] == pytest.approx(run["achieved"]), case
        assert len({zeros / elements > 0.995 for zeros, elements in counts}) == 1, f"{case}: a tensor has become zero"


def test_decay_prunes_nearly_all_and_the_final_pruning_the_rest(runs):
    """So short a run, of 20 steps, leaves it more than usual, and most of it at p = 0.8 without a cap;
    docs/results/target.md has runs of 60.
    """
    for case, run in runs.items():
        slow = case.p == 0.8 and case.form != "capped"
        # Never above what the target is, rounded to one weight: that `achieved` is that, the test before this holds.
        assert case.target * (0.2 if slow else 0.7) < run["by_decay"] <= run["achieved"], case
        assert case.target > 0.5 or run["losses"][-1] < 0.8 * run["losses"][0], f"{case}: it learns nothing"


def test_ranks_agree(results):
    for case, run in results[0]["runs"].items():
        other = results[1]["runs"][case]
        assert same(run["model"], other["model"]), case
        assert (
            run["state"] == other["state"] and run["logs"] == other["logs"] and run["tensors"] == other["tensors"]
        ), case
        assert json.loads(json.dumps(run["state"], allow_nan=False)) == run["state"], f"{case}: not plain JSON"


def test_model_and_masters_have_the_same_zeros(runs):
    for case, run in runs.items():
        assert run["shards"].keys() == run["model"].keys() and len(run["model"]) == 9, case
        assert same(zeros_of(run["model"], run["model"]), zeros_of(run["shards"], run["model"])), case
        assert all(weights.isfinite().all() for weights in run["model"].values()), case
    assert {run["model"]["0.weight"].dtype for case, run in runs.items() if case.dtype == "bf16"} == {torch.bfloat16}


def test_shards_are_one_process(runs):
    """Bit for bit. At p = 0.8 torch's pow rounds in a vector otherwise than in the rest after it, and where a vector
    ends depends on the shards, so there is a tolerance, and the same zeros."""
    for case in runs:
        if case.dtype != "fp32":
            continue
        run, single = runs[case], alone(case)
        wanted = joined([{"shards": single["pruned"]}])
        if case.p != 0.8:
            assert same(run["pruned"], wanted), case
            assert run["state"] == single["state"], case
        for name, weights in wanted.items():
            torch.testing.assert_close(
                run["pruned"][name], weights, rtol=1e-5, atol=1e-6, msg=lambda m: f"{case}: {name}: {m}"
            )
        assert same(zeros_of(run["model"], wanted), zeros_of(single["model"], wanted)), f"{case}: other zeros"
        assert case.p == 0.8 or same(run["model"], single["model"]), case
        for name, weights in single["model"].items():
            torch.testing.assert_close(
                run["model"][name], weights, rtol=0, atol=2e-3, msg=lambda m: f"{case}: {name}: {m}"
            )


def test_survivors_train_without_decay_after_the_window(runs):
    for case in (case for case in COVERING if case in runs):
        pruned, last = runs[case]["pruned"], runs[case]["shards"]
        assert same(zeros_of(pruned, pruned), zeros_of(last, pruned)), f"{case}: zeros were not frozen"
        assert all(
            (pruned[name] != last[name]).sum() > 0.9 * (pruned[name] != 0).sum() for name in runs[case]["tensors"]
        ), case


def test_fp16_steps_that_are_skipped_advance_nothing(results):
    for rank, seen in enumerate(results):
        for kind, (good, bad) in seen["skipping"].items():
            start, end = good["window"]
            assert [step < start for step in BAD] == [True, False, False, False] and list(BAD)[-1] == end - 1
            assert bad["unchanged"] == [True] * len(BAD), f"{kind}, rank {rank}"
            differs = [
                key
                for key in good["taken"].keys() | bad["taken"].keys()
                if good["taken"].get(key) != bad["taken"].get(key)
            ]
            assert not differs and len(good["taken"]) > 40, f"{kind}, rank {rank}: {sorted(differs)}"


@pytest.mark.parametrize("results", STARTS[:1], indirect=True)
def test_ranks_that_disagree_on_the_target_are_refused_on_all_of_them(results):
    assert results[0]["said"] == results[1]["said"] and len(results[0]["said"]) == 10
    for said in results[0]["said"]:
        assert said.startswith(
            ("ranks disagree: the target is ", "ranks disagree: total_steps is 30 on rank 0 and 31")
        ), said


def test_a_plain_model_is_followed_without_ranks():
    case = Case("plain", "capped", 0.5, 0.5, steps=20)
    engine = engine_of(case)
    attachment = attach(
        engine.handle, engine.optimizer, target=case.sparsity_target, total_steps=case.steps
    )  # no scheduler: the rates are as they are
    trained(engine, attachment, case, 0, case.steps)
    for name, (zeros, elements) in reached(engine, attachment)["tensors"].items():
        assert (
            zeros == round(0.5 * elements)
            and dict(unwrap(engine.handle).named_parameters())[name].count_nonzero() == elements - zeros
        )


def pruned_in_all_copies(rank: int, world_size: int) -> dict[str, bool]:
    """Whether the final pruning is in the model's copy as soon as it is in the masters."""
    kinds = {
        "zero0": {"bf16": {"enabled": True}},
        "zero3": {"zero_optimization": {"stage": 3}},
        "bf16_optimizer": {},
    }  # ZeRO-3's persistent ones
    same_zeros = {}
    for kind, more in kinds.items():
        case = Case(kind, "capped", steps=20)
        engine = make(kind, model_of(), lambda model: LpAdamW(model.parameters(), lr=1e-3, precondition=0.5), **more)
        attached = attach(engine.handle, target=case.sparsity_target, total_steps=case.steps)
        low = torch.float32 if kind == "zero3" else torch.bfloat16
        step = 0
        while attached.weight_controller.final_pruning is None:
            engine.step(
                engine(torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(low))
                .float()
                .square()
                .mean()
            )
            attached.after_step()
            step += 1
        masters = {shard.name: shard.local.values.view(shard.shape) for shard in attached.shards}
        same_zeros[kind] = all(
            torch.equal(masters[name].to(low), weight.to(low)) for name, weight in gathered(engine).items()
        )
    return same_zeros


def test_the_final_pruning_is_in_every_engines_copies_at_once(run_ranks):
    (same_zeros,) = run_ranks(pruned_in_all_copies, 1)
    assert same_zeros == {"zero0": True, "zero3": True, "bf16_optimizer": True}
