"""Groups of weights on shards: under every engine they come to the weights of one process, bit for bit, and become
zero in the masters and in the model alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.engines import Engine, ended, in_two_starts, quiet
from helpers.snapshots import check_one_process, joined, results_of, snapshot
from helpers.target_runs import Case, engine_of, trained
from helpers.targets import decaying
from lp_dist import GroupDecay, attach
from lp_dist.attachment.attachment import Attachment
from lp_dist.structured.resolve import groups_of

STEPS = 24
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2 offload", "zero3 offload", "bf16_optimizer")


@dataclass(frozen=True)
class GroupCase(Case):
    """What is requested: "λ", "target", or "both" targets, one after the other. Dtypes as of `Case`."""

    asked_for: str = "target"
    interval: int = 1
    precondition: float = 1.0


def sets_of(model: torch.nn.Module) -> list:
    """163 channels whose layers have a norm between them, so that they are the user's word; 101 of the next two, of
    which the last has biases; in one matrix both rows and columns are of groups. All of uneven widths: groups lie on
    two ranks, and shards end inside of rows.
    """
    return groups_of(model, outputs="0", inputs="3", kind="first") + groups_of(
        model, outputs="3", inputs="5", kind="second"
    )


def attached_to(engine: Engine, case: GroupCase, **values: Any) -> Attachment:
    from lp_dist.sharding.engines import unwrap

    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    sets = sets_of(unwrap(engine.handle))
    if case.asked_for == "λ":
        return attach(
            engine.handle,
            groups=GroupDecay(sets, 0.5, precondition=case.precondition, interval=case.interval),
            **others,
        )
    target = decaying(
        0.3, groups=sets, precondition=case.precondition, interval=case.interval, update_every=2, end=10, start=2
    )
    if case.asked_for == "both":
        target = [target, decaying(0.7, start=10, end=20, update_every=2)]
    return attach(engine.handle, target=target, total_steps=case.steps, **others)


RUNS = [
    GroupCase(engine, steps=STEPS, asked_for=targets, interval=interval, precondition=gamma)
    for i, engine in enumerate(ENGINES[:-1])
    for targets, interval, gamma in [
        [("λ", 1, 0.0), ("target", 1, 1.0)],
        [("target", 2, 0.5), ("both", 1, 1.0)],
        [("λ", 3, 1.0), ("target", 1, 0.0)],
    ][i % 3]
]
MIXED = [
    GroupCase(engine, steps=STEPS, asked_for="target", dtype="bf16")
    for engine in ("zero1", "zero2", "zero3", "bf16_optimizer")
]


def followed(case: GroupCase) -> dict[str, Any]:
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, STEPS)
    attachment.finish()
    # The end of a parameter that lies in padding, or that another rank has, must not be in the sums.
    squares = attachment.group_decay.squares.clone()
    return {"squares": squares, **results_of(engine, attachment)}


@cache
def alone(case: GroupCase) -> dict[str, Any]:
    return followed(replace(case, engine="plain", dtype="fp32"))


def resumed(case: GroupCase, directory: Path) -> tuple[list[str], int]:
    """What differs between a run that was stopped in the window and one that was not, and how much was compared."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, STEPS)
    wanted = snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict())}
    ended(engine)
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, 7)
    engine.save(directory, "stop")
    state = attachment.state_dict()
    ended(engine)
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    engine.load(directory, "stop")
    if not hasattr(engine.handle, "load_checkpoint"):
        attachment.load_state_dict(state)
    trained(engine, attachment, case, 7, STEPS)
    got = snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict())}
    ended(engine)
    return sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)), len(wanted)


def went_back(case: GroupCase, directory: Path) -> tuple[bool, bool]:
    """Loads the weights alone of a checkpoint from before lp_dist was attached: whether norms are those of the weights
    that are there, and not as before.
    """
    engine = engine_of(case)
    trained(engine, SimpleNamespace(after_step=lambda: None), case, 0, 3)
    engine.save(directory, "before")
    trained(engine, attachment := attached_to(engine, case), case, 3, 6)  # the next step's norms are under way
    before = attachment.group_decay.squares.clone()
    engine.handle.load_checkpoint(directory, tag="before", load_optimizer_states=False)
    attachment.group_decay.measure()
    got = attachment.group_decay.squares.clone()
    attachment.group_decay.forget()
    attachment.group_decay.measure()
    results = got.equal(attachment.group_decay.squares), before.equal(got)
    ended(engine)
    return results


RESUMED = [
    GroupCase(engine, steps=STEPS, asked_for=targets, interval=3)
    for engine, targets in (("zero2", "target"), ("zero3", "both"), ("fsdp2", "λ"))
]


STARTS = in_two_starts(ENGINES)


def on_a_rank(rank: int, world_size: int, directory: Path, engines: tuple[str, ...]) -> dict[Any, Any]:
    quiet()
    results: dict[Any, Any] = {case: followed(case) for case in RUNS + MIXED if case.engine in engines}
    results["resumed"] = {
        case: resumed(case, directory / case.engine.replace(" ", "-")) for case in RESUMED if case.engine in engines
    }
    if "zero2" in engines:
        results["went back"] = went_back(GroupCase("zero2", steps=STEPS, asked_for="λ"), directory / "back")
        results["reductions"] = reductions_of(GroupCase("zero3", steps=STEPS, asked_for="λ"), [])
    return results


def reductions_of(case: GroupCase, seen: list[int]) -> list[int]:
    """Sizes of what our code reduces over 5 steps of ZeRO-3, whose optimizer steps its tensors in many calls."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    reduce = torch.distributed.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lp_dist.structured.group_decay.torch.distributed.all_reduce",
            lambda tensor, **more: (seen.append(tensor.numel()), reduce(tensor, **more))[1],
        )
        trained(engine, attachment, case, 0, 5)
        attachment.finish()
    ended(engine)
    return [numel for numel in seen if numel == 163 + 101 + 1]


_results: dict[tuple[str, ...], list[dict[Any, Any]]] = {}


@pytest.fixture(params=STARTS)
def results(request, run_ranks, tmp_path_factory) -> list[dict[Any, Any]]:
    """By rank the results of some engines, run once."""
    if request.param not in _results:
        _results[request.param] = run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("groups"), request.param)
    return _results[request.param]


def test_every_engine_comes_to_the_weights_of_one_process(results):
    cases = [case for case in RUNS if case in results[0]]
    assert cases
    check_one_process(results, cases, alone)


def test_what_is_dead_is_dead_in_the_model_and_in_the_masters(results):
    for case in (case for case in RUNS + MIXED if case.asked_for != "λ" and case in results[0]):
        masters, model = joined([{"shards": rank[case]["shards"]} for rank in results]), results[0][case]["model"]
        for name, weights in model.items():
            assert (weights.flatten() == 0).equal(masters[name].flatten() == 0), f"{case}: {name}"
        gone = (model["0.weight"] == 0).all(1), (model["3.weight"] == 0).all(1)
        assert [int(which.sum()) for which in gone] == [49, 30], case
        assert (
            not model["0.bias"][gone[0]].any()
            and not model["3.weight"][:, gone[0]].any()
            and not model["5.weight"][:, gone[1]].any()
        ), case


def test_a_run_that_was_stopped_goes_on_bit_for_bit(results):
    for rank in results:
        for case, (differs, compared) in rank["resumed"].items():
            assert not differs and compared > 15, case


@pytest.mark.parametrize("results", STARTS[:1], indirect=True)
def test_weights_that_an_engine_has_loaded_are_measured_anew(results):
    """Where nothing else tells of it: with the optimizer's states its own hook does."""
    assert all(rank["went back"] == (True, False) for rank in results)


@pytest.mark.parametrize("results", STARTS[:1], indirect=True)
def test_a_step_costs_one_reduction_of_as_many_numbers_as_there_are_groups(results):
    """And one more is under way for the next step. (In the first step nothing is measured: there are no second moments
    yet.)
    """
    assert results[0]["reductions"] == [163 + 101 + 1] * 5
