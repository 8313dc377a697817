"""Survivors that move on shards: right after an update every engine has the zeros of one process, and its weights but
for rounding; a stopped run goes on bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import target_runs
from helpers.engines import Engine, ended, gathered, in_two_starts, quiet
from helpers.snapshots import joined, local_shards_of, snapshot
from helpers.target_runs import Case, batch_of, engine_of, trained
from lp_dist import SparsityTarget, attach, groups_of
from lp_dist.attachment.attachment import Attachment
from lp_dist.reconstruction.survivors import Reconstruction
from lp_dist.sharding.engines import unwrap

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2 offload", "zero3 offload")
# Updates are at the steps 2, 4, ..., 14; the final pruning comes after step 16.
STEPS, FIRST_UPDATE, STOP = 24, 2, 7
# Conjugate gradients carry rounding along, and each engine adds up X'X otherwise.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


@dataclass(frozen=True)
class MovingCase(Case):
    """kind: weights, 2:4 or groups."""

    kind: str = "weights"


CASES = [
    MovingCase(engine, steps=STEPS, kind=kind)
    for number, engine in enumerate(ENGINES)
    for kind in (
        ("weights", "2:4", "groups") if engine in ("fsdp2", "zero2") else ("weights", ["2:4", "groups"][number % 2])
    )
]
RESUMED = [MovingCase("zero2", steps=STEPS), MovingCase("fsdp2", steps=STEPS, kind="groups")]


def target_of(case: MovingCase, model: nn.Module) -> SparsityTarget:
    common: dict[str, Any] = {"reconstruct": True, "update_every": 2}
    if case.kind == "groups":
        sets = groups_of(model, outputs="0", inputs="3", kind="first") + groups_of(
            model, outputs="3", inputs="5", kind="second"
        )
        return SparsityTarget(0.4, groups=sets, **common)
    # Not 0.5.weight: 163 inputs are no blocks of four.
    return SparsityTarget(pattern="2:4", **common) if case.kind == "2:4" else SparsityTarget(0.7, **common)


def attached_to(engine: Engine, case: MovingCase) -> Attachment:
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    target = target_of(case, unwrap(engine.handle))
    return attach(engine.handle, target=target, total_steps=case.steps, **others)


def mix_inputs() -> None:
    """Has inputs go together. With those of the other tests, which are independent, nothing is taken over by others.
    Here and on ranks, which are processes of their own.
    """

    def mixed(*numbers: int) -> tuple[Tensor, Tensor]:
        inputs, wanted = batch_of(*numbers)
        return inputs + 0.5 * inputs.roll(1, 1), wanted

    target_runs.batch_of = mixed


@pytest.fixture(autouse=True)
def mixed_inputs(monkeypatch):
    monkeypatch.setattr(target_runs, "batch_of", batch_of)  # to be put back
    mix_inputs()


def followed(case: MovingCase) -> dict[str, Any]:
    """Masters and the model right after the first update and at the end."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        remove = Reconstruction.remove

        def noted(self: Reconstruction, *arguments: Any) -> Any:
            results.setdefault("before", local_shards_of(attachment))
            return remove(self, *arguments)

        patch.setattr(Reconstruction, "remove", noted)
        trained(engine, attachment, case, 0, FIRST_UPDATE)
    results |= {"first": local_shards_of(attachment), "first model": gathered(engine)}
    trained(engine, attachment, case, FIRST_UPDATE, STEPS)
    attachment.finish()
    controller = attachment.controllers[0]
    results |= {
        "last model": gathered(engine),
        "moved": controller.reconstruction.moved,
        "zero share": controller.zero_share(),
        "divided": {name: len(rows.rows) for name, rows in controller.reconstruction._divided.items()},
    }
    ended(engine)
    return results


@cache
def alone(case: MovingCase) -> dict[str, Any]:
    return followed(replace(case, engine="plain"))


def resumed(case: MovingCase, directory: Path) -> tuple[list[str], int]:
    """What differs between a run that was stopped in the window and one that was not, and how much was compared."""

    def state_of(engine: Engine, attachment: Attachment) -> dict[str, Any]:
        return snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict())}

    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, STOP)
    engine.save(directory, "stop")
    state = attachment.state_dict()
    trained(engine, attachment, case, STOP, STEPS)
    wanted = state_of(engine, attachment)
    ended(engine)
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    engine.load(directory, "stop")
    if not hasattr(engine.handle, "load_checkpoint"):
        attachment.load_state_dict(state)
    trained(engine, attachment, case, STOP, STEPS)
    got = state_of(engine, attachment)
    ended(engine)
    return sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)), len(wanted)


def on_a_rank(rank: int, world_size: int, directory: Path, engines: tuple[str, ...]) -> dict[str, Any]:
    quiet()
    mix_inputs()
    return {
        "runs": {case: followed(case) for case in CASES if case.engine in engines},
        "resumed": {case: resumed(case, directory / case.engine) for case in RESUMED if case.engine in engines},
    }


_results: dict[tuple[str, ...], list[dict[str, Any]]] = {}


@pytest.fixture(params=in_two_starts(ENGINES))
def results(request, run_ranks, tmp_path_factory) -> list[dict[str, Any]]:
    """By rank what `on_a_rank` tells of some engines, run once."""
    if request.param not in _results:
        _results[request.param] = run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("moved"), request.param)
    return _results[request.param]


def test_right_after_an_update_zeros_are_those_of_one_process_and_weights_are_near(results):
    for case, run in results[0]["runs"].items():
        wanted = joined([{"shards": alone(case)["first"]}])
        masters = joined([{"shards": rank["runs"][case]["first"]} for rank in results])
        for name, weights in wanted.items():
            assert torch.equal(masters[name] == 0, weights == 0), f"{case}: {name}"
            torch.testing.assert_close(
                masters[name], weights, **TOLERANCE, msg=lambda m, case=case, name=name: f"{case}: {name}: {m}"
            )
            model = run["first model"][name].flatten()
            assert torch.equal(model, masters[name]), f"{case}: {name}: the model's copy is another one"


def test_survivors_have_moved(results):
    """Else the comparison above would say nothing of them: the tolerance is a small part of how far they moved."""
    for case, run in results[0]["runs"].items():
        before, after = (joined([{"shards": alone(case)[when]}]) for when in ("before", "first"))
        stay = {name: weights[after[name] != 0] for name, weights in before.items()}
        moves = torch.cat([after[name][after[name] != 0] - weights for name, weights in stay.items()])
        far = moves.abs() > 5 * TOLERANCE["atol"] + 5 * TOLERANCE["rtol"] * torch.cat([*stay.values()]).abs()
        assert int(far.sum()) > 500, f"{case}: {int(far.sum())}"
        assert alone(case)["moved"] == run["moved"] == 8, case


def test_rows_are_divided_where_shards_are_flat(results):
    for is_flat in (True, False):
        runs = [run for case, run in results[0]["runs"].items() if case.engine.startswith("zero") == is_flat]
        assert any(run["divided"] for run in runs) == (is_flat and bool(runs))


def test_at_the_end_ranks_have_the_same_weights_and_the_target_is_met(results):
    for case, run in results[0]["runs"].items():
        other = results[1]["runs"][case]
        for name, weights in run["last model"].items():
            assert torch.equal(weights, other["last model"][name]), f"{case}: {name}"
        assert run["zero share"] == other["zero share"] == alone(case)["zero share"], case
        differ = total = 0
        for name, weights in run["last model"].items():
            differ += int(((weights == 0) != (alone(case)["last model"][name] == 0)).sum())
            total += weights.numel()
        assert differ < 0.01 * total, f"{case}: {differ} of {total} zeros are others"


def test_a_stopped_run_goes_on_bit_for_bit(results):
    for rank in results:
        assert rank["resumed"] or "zero1" in {case.engine for case in rank["runs"]}
        for case, (differs, compared) in rank["resumed"].items():
            assert not differs and compared > 15, case
