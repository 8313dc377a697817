"""A run to a SparsityTarget that is stopped and resumed goes on bit for bit, in every phase; on another number of
ranks it still lands.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import convert, ended, gathered, in_two_starts, make, quiet
from helpers.snapshots import joined, snapshot
from helpers.target_runs import Case, attached_to, engine_of, model_of, reached, scheduler_of, trained
from lp_dist import LpLion, attach, param_groups
from lp_dist.attachment.attach import Attachment

RUN = Case("", "capped", 0.5, 0.6, steps=24, update_every=4)
START, END = 2, 17
# tag → steps. Updates are at 2, 6, 10, 14; the final pruning comes after step 16, and the next step carries it into an
# engine's copies.
STOPS = {"before": 1, "saved": 8, "pruned": 16, "frozen": 20}
CELLS = {
    **{kind: replace(RUN, engine=kind) for kind in ("ddp", "fsdp2", "zero1", "zero2", "zero3", "accelerate zero2")},
    "zero2 bf16": replace(RUN, engine="zero2", dtype="bf16", scope="global"),
}
UNIVERSAL = ("zero1", "zero2", "zero3")
STARTS = in_two_starts(CELLS)
MINE = {"epoch": 3, "lp": [1.5, None]}


def is_engine(case: Case) -> bool:
    return case.engine.startswith("zero")


def saved(engine: Any, attachment: Attachment, case: Case, directory: Path, tag: str) -> dict[str, Any]:
    """Saves by the engine's own means, and gives what a user would have to save beside it: DeepSpeed's engine takes it
    along by itself.
    """
    if is_engine(case):
        engine.handle.save_checkpoint(directory, tag=tag, **({"client_state": MINE} if tag == "saved" else {}))
    else:
        engine.save(directory, tag)
    return attachment.state_dict()


def resumed(case: Case, directory: Path, tag: str, state: dict[str, Any]) -> tuple[Any, Attachment, bool]:
    """A new engine that has loaded, what is attached to it, and whether the user's own part of the checkpoint came
    back.
    """
    engine, kept = engine_of(case), True
    state = json.loads(json.dumps(state, allow_nan=False))
    late = tag == "pruned"  # attached after loading: then the state is handed over by hand
    attachment = None if late else attached_to(engine, case)
    if is_engine(case):
        path, client = engine.handle.load_checkpoint(directory, tag=tag)
        kept = (
            path is not None
            and client["lp_dist"] == state
            and {key: client.get(key) for key in MINE} == (MINE if tag == "saved" else dict.fromkeys(MINE))
        )
    else:
        engine.load(directory, tag)
    if late:
        attachment = attached_to(engine, case)
    if late or not (is_engine(case) or case.engine.startswith("accelerate ")):
        attachment.load_state_dict(state)
    return engine, attachment, kept and attachment.state_dict() == state


def taken(engine: Any, attachment: Attachment) -> dict[str, Any]:
    return snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict()), "logs": attachment.logs}


def zeros_of(attachment: Attachment) -> dict[str, Any]:
    return {shard.name: shard.local.values == 0 for shard in attachment.shards}


def stopped_and_resumed(case: Case, directory: Path) -> dict[str, Any]:
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    window = attachment.weight_controller.window.start, attachment.weight_controller.window.end
    trained(engine, attachment, case, 0, case.steps)
    wanted, zeros = taken(engine, attachment), zeros_of(attachment)
    results: dict[str, Any] = {
        "differs": {},
        "other zeros": {},
        "kept": {},
        "window": window,
        "reached": reached(engine, attachment),
    }
    ended(engine)

    engine, step, states = engine_of(case), 0, {}
    attachment = attached_to(engine, case)
    for tag, stop in STOPS.items():
        trained(engine, attachment, case, step, stop)
        states[tag], step = saved(engine, attachment, case, directory, tag), stop
        if tag == "saved":
            results["model"] = gathered(engine)
    ended(engine)

    for tag, stop in STOPS.items():
        engine, attachment, results["kept"][tag] = resumed(case, directory, tag, states[tag])
        trained(engine, attachment, case, stop, case.steps)
        got = taken(engine, attachment)
        results["other zeros"][tag] = [
            name for name, where in zeros_of(attachment).items() if not where.equal(zeros[name])
        ]
        results["differs"][tag] = sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
        ended(engine)
    return results | {"states": states, "compared": len(wanted)}


def on_two_ranks(rank: int, world_size: int, directory: Path, cells: tuple[str, ...]) -> dict[str, Any]:
    quiet()
    return {name: stopped_and_resumed(CELLS[name], directory / name) for name in cells}


def on_one_rank(rank: int, world_size: int, directory: Path, kinds: list[str]) -> dict[str, Any]:
    """From the universal checkpoints of two ranks to the end; and what LpLion says to them."""
    quiet()
    results: dict[str, Any] = {}
    universal = {"checkpoint": {"load_universal": True}}
    for kind in kinds:
        case = CELLS[kind]
        engine = engine_of(case, **universal)
        attachment = attached_to(engine, case)
        engine.load(directory / kind, "universal")
        loaded = {"state": attachment.state_dict(), "model": gathered(engine)}
        trained(engine, attachment, case, STOPS["saved"], case.steps)
        shards = [(shard.name, shard.start, shard.local.values.clone()) for shard in attachment.shards]
        results[kind] = {
            **loaded,
            "end": gathered(engine),
            "masters at the end": joined([{"shards": shards}]),
            "reached": reached(engine, attachment),
        }
        ended(engine)

        engine = make(
            kind, model_of(), lambda model: LpLion(param_groups(model, 0.1), lr=1e-3), scheduler_of(case), **universal
        )
        attach(engine.handle)
        with pytest.raises(ValueError) as error:
            engine.load(directory / kind, "universal")
        results[kind]["LpLion"] = str(error.value)
        ended(engine)
    return results


_results: dict[tuple[str, ...], tuple[list[dict[str, Any]], dict[str, Any]]] = {}


@pytest.fixture(params=STARTS)
def results(request, run_ranks, tmp_path, tmp_path_factory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two ranks tell of some cells, and what one that goes on from their universal checkpoints; run once."""
    if request.param not in _results:
        directory = tmp_path_factory.mktemp("checkpoints")
        two = run_ranks(on_two_ranks, 2, directory, request.param)
        universal = [kind for kind in UNIVERSAL if kind in request.param]
        for kind in universal:
            convert(directory / kind)
        for left in tmp_path.iterdir():  # where the next rank could meet the old ones
            left.unlink()
        _results[request.param] = two, run_ranks(on_one_rank, 1, directory, universal)[0]
    return _results[request.param]


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(results):
    for rank, cells in enumerate(results[0]):
        assert cells.keys() == results[0][0].keys() and cells
        for name, seen in cells.items():
            assert seen["window"] == (START, END) and seen["compared"] > 40
            for tag, differs in seen["differs"].items():
                assert not differs, f"{name}, rank {rank}, stopped {tag}: {differs}"
            assert seen["other zeros"] == {key: [] for key in STOPS}, f"{name}, rank {rank}"
            assert seen["differs"].keys() == STOPS.keys()


def test_the_state_is_in_the_engines_own_checkpoint_and_the_users_is_beside_it(results):
    for rank, cells in enumerate(results[0]):
        for name, seen in cells.items():
            assert seen["kept"] == dict.fromkeys(STOPS, True), f"{name}, rank {rank}"


def test_it_was_stopped_in_every_phase(results):
    for name, seen in results[0][0].items():
        states = {tag: state["weights"] for tag, state in seen["states"].items()}
        assert (
            states["before"]["before"] == {}
            and states["before"]["next_update"] == START < STOPS["saved"] < states["saved"]["next_update"] == 10
        ), name
        assert [states[tag]["final_pruning"] is not None for tag in STOPS] == [False, False, True, True], name
        assert (
            0.0
            < states["saved"]["logs"]["lp/measured"]
            == states["saved"]["logs"]["lp/near_zero"]
            < RUN.target
            == round(states["frozen"]["logs"]["lp/measured"], 4)
        ), name
        assert all(seen["states"] == cells[name]["states"] for cells in results[0]), (
            f"{name}: the ranks have other states"
        )


def test_all_of_them_reach_the_target(results):
    for name, seen in results[0][0].items():
        assert seen["reached"]["tensors"] == seen["reached"]["masters"], name
        assert abs(seen["reached"]["achieved"] - RUN.target) < 1e-4, name


def test_a_universal_checkpoint_goes_on_with_another_number_of_ranks(results):
    """Loaded it is what was saved. Then one rank adds up gradients in another order than two, so that a few weights
    fare otherwise.
    """
    two_ranks, one_rank = results[0][0], results[1]
    assert one_rank
    for kind, seen in one_rank.items():
        assert seen["state"] == two_ranks[kind]["states"]["saved"], kind
        assert all(seen["model"][name].equal(weights) for name, weights in two_ranks[kind]["model"].items()), kind
        assert seen["reached"]["tensors"] == seen["reached"]["masters"] == two_ranks[kind]["reached"]["tensors"], kind
        assert all(
            (seen["end"][name].flatten() == 0).equal(weights == 0)
            for name, weights in seen["masters at the end"].items()
        ), kind
        assert seen["reached"]["by_decay"] == pytest.approx(two_ranks[kind]["reached"]["by_decay"], abs=1e-3), kind


def test_lions_does_not_take_the_state_of_adam_from_a_universal_checkpoint(results):
    for kind, seen in results[1].items():
        assert seen["LpLion"].startswith(
            "the checkpoint is of another optimizer than LpLion: it has exp_avg_sq in its state"
        ), kind
