"""A target's state in one process: saved as JSON at whatever step, it goes on bit for bit; that of another run is
refused. And which γ a target takes."""

from __future__ import annotations

import io
import json
from functools import cache

import pytest
import torch
from torch import nn

from helpers.targets import END, FINAL_PRUNING, START, TOTAL, TargetRun, decaying, layerwise, model_of, same
from lp_dist import LpAdamW, LpLion, add_lp_decay
from lp_dist.optim.hyperparameters import Phase, acting_values, phase_of
from lp_dist.optim.parameter_map import effective_values


def hooked(params, lr):
    """One that counts no steps of its own."""
    optimizer = torch.optim.SGD(params, lr=10 * lr, momentum=0.9)
    add_lp_decay(optimizer)
    return optimizer


def with_a_zero_matrix() -> nn.Sequential:
    model = model_of()
    nn.init.zeros_(model[4].weight)
    return model


RUNS = {
    "layer": {"target": layerwise(0.6)},
    "as it comes": {"target": decaying(0.6)},
    "global, from the first step, preconditioned": {
        "target": decaying(0.8, start=0, p=0.0, precondition=1.0, scope="global", cap=None)
    },
    "no freeze, another interval": {"target": layerwise(0.5, freeze=False, update_every=7, curve=lambda u: u * u)},
    "SGD by hooks": {"target": layerwise(0.6, p=0.0), "make": hooked},
    "Lion without a scheduler": {"target": layerwise(0.6), "make": LpLion, "lr": 3e-4, "scheduled": False},
    "p of its own": {
        "target": layerwise(0.6),
        "overrides": {"2.weight": {"p": -1.0}, "4.weight": {"weight_decay": 0.0}},
    },
}


@cache
def uninterrupted(name: str) -> TargetRun:
    return TargetRun(**RUNS[name]).to(TOTAL)


def saved(run: TargetRun) -> tuple[bytes, str]:
    """As a script would: torch's part by torch, the target's as JSON."""
    file = io.BytesIO()
    torch.save(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        },
        file,
    )
    return file.getvalue(), json.dumps(run.attached.state_dict(), allow_nan=False)


def load(run: TargetRun, checkpoint: tuple[bytes, str], taken: int, attach: bool) -> TargetRun:
    state = torch.load(io.BytesIO(checkpoint[0]), weights_only=True)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    if attach:
        run.attach()
    run.attached.load_state_dict(json.loads(checkpoint[1]))
    run.taken = taken
    return run


def resumed(checkpoint: tuple[bytes, str], taken: int, attach_first: bool = False, **how) -> TargetRun:
    """A run made anew, as in another process."""
    return load(TargetRun(**how, attached=attach_first), checkpoint, taken, attach=not attach_first)


# Before the start, at it, at an update, between two, before the final pruning, at it, where the window ends, after it.
STEPS = [1, START, START + 4, START + 5, FINAL_PRUNING - 1, FINAL_PRUNING, END, 50]


@pytest.mark.parametrize("attach_first", [False, True], ids=["loaded, then attached", "attached, then loaded"])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_is_the_uninterrupted_one(name, attach_first, caplog):
    wanted = uninterrupted(name)
    run = TargetRun(**RUNS[name])
    for step in STEPS if name == "layer" else STEPS[3 + attach_first :: 3]:
        checkpoint = saved(run.to(step))
        other = resumed(checkpoint, step, attach_first, **RUNS[name])
        assert json.loads(checkpoint[1]) == other.attached.state_dict(), f"the state that was loaded at step {step}"
        assert other.attached.logs == run.attached.logs
        other.to(TOTAL)
        assert same(other.weights(), wanted.weights()), f"interrupted at step {step}"
        assert other.attached.state_dict() == wanted.attached.state_dict(), f"interrupted at step {step}"
    assert same(run.to(TOTAL).weights(), wanted.weights()), "saving has changed the run that was saved"
    assert "checkpoint" not in caplog.text, "a resume like any other needs no warning"


def test_a_run_can_be_interrupted_again_and_again():
    how = RUNS["layer"]
    run = TargetRun(**how)
    for step in range(3, TOTAL + 1, 3):
        run = resumed(saved(run.to(step)), step, **how)
    assert same(run.weights(), uninterrupted("layer").weights())


@pytest.mark.parametrize("step", [2, 20, 50])
def test_a_run_can_be_taken_back(step):
    """Into the same objects, long after the step at which it was saved."""
    run = TargetRun(**RUNS["layer"])
    checkpoint = saved(run.to(step))
    load(run.to(TOTAL), checkpoint, step, attach=False)
    assert same(run.to(TOTAL).weights(), uninterrupted("layer").weights())


@pytest.mark.parametrize("target", [layerwise(0.5), layerwise(0.5, relative_to="all")])
def test_what_started_at_zero_is_left_out_after_a_resume_as_well(target):
    """It is no longer zero then, and would decay; a share of all parameters is more of what is left."""
    wanted, run = (TargetRun(target, model=with_a_zero_matrix()) for _ in range(2))
    other = resumed(saved(run.to(10)), 10, target=target)
    assert other.model[4].weight.any() and "4.weight" not in {
        shard.name for shard in other.attached.weight_controller.shards
    }
    assert other.attached.counted == run.attached.counted == {"0.weight", "2.weight"} == other.attached.decayed
    assert same(wanted.to(TOTAL).weights(), other.to(TOTAL).weights())
    assert wanted.zeros()["4.weight"] == 0
    of = sum(
        param.numel()
        for name, param in wanted.model.named_parameters()
        if target.relative_to == "all" or name in wanted.attached.counted
    )
    assert sum(other.zeros().values()) == pytest.approx(0.5 * of, abs=2)


def test_the_state_is_plain_json_and_small():
    run = TargetRun(layerwise(0.5, cap=None, curve=lambda u: u)).to(20)
    text = json.dumps(run.attached.state_dict(), allow_nan=False)
    assert json.loads(text) == run.attached.state_dict()
    assert len(text) < 2000 and json.loads(text)["weights"]["version"] == 7
    assert json.loads(text)["weights"]["target"]["curve"] == "<lambda>"
    assert json.loads(text)["weights"]["values"]["0.weight"]["cutoff"] == "inf", "strict JSON has no infinity"


@pytest.mark.parametrize(
    "how, change, words",
    [
        ({"target": layerwise(0.7)}, {}, ["another target", "'sparsity': 0.6", "'sparsity': 0.7", "start anew"]),
        ({"target": layerwise(0.6, p=0.0)}, {}, ["another target", "'p': None", "'p': 0.0"]),
        (
            {"target": layerwise(0.6), "total": 70},
            {},
            ["another window", "[6, 42, 60, 2]", "[7, 49, 70, 2]", "as many steps"],
        ),
        (
            {"target": layerwise(0.6), "overrides": {"2.weight": {"weight_decay": 0.0}}},
            {},
            ["other parameters decay", "'2.weight'", "same names"],
        ),
        (
            {"target": layerwise(0.6), "names": ["0.weight", "2.weight", "4.weight", "0.bias"]},
            {},
            ["other parameters decay", "'0.bias'"],
        ),
        ({"target": layerwise(0.6)}, {"version": 1}, ["version 1", "reads 7", "install the one that wrote it"]),
        ({"target": layerwise(0.6)}, {"version": None}, ["version None"]),
        (
            {"target": None},
            {},
            ["was trained for", "'sparsity': 0.6", "there is no target of weights", "give the same one"],
        ),
    ],
)
def test_the_state_of_another_run_is_refused(how, change, words):
    weights, state = saved(TargetRun(layerwise(0.6)).to(20))
    state = json.dumps({"weights": {**json.loads(state)["weights"], **change}})
    with pytest.raises(ValueError) as caught:
        resumed((weights, state), 20, **how)
    assert all(word in str(caught.value) for word in words), caught.value


def test_no_state_is_no_error_where_there_is_no_target():
    run = TargetRun(None)
    run.attached.load_state_dict({})
    assert run.attached.state_dict() == {"step": 0}


@pytest.mark.parametrize("step", [3, 20, FINAL_PRUNING, TOTAL])
def test_a_run_that_ends_early_is_pruned_by_finish(step, caplog):
    """As where fp16 has skipped steps, and the window went up to the end."""
    run = TargetRun(layerwise(0.6)).to(step)
    before = run.weights()
    run.attached.finish()
    assert all(zeros == round(0.6 * before[name].numel()) for name, zeros in run.zeros().items())
    assert ("pruning what is missing" in caplog.text) == (step < FINAL_PRUNING)
    if step >= FINAL_PRUNING:
        assert same(before, run.weights())
    again = run.weights()
    run.attached.finish()
    assert same(again, run.weights())


@pytest.mark.parametrize(
    "make, arguments, gamma",
    [
        ({}, {}, 1.0),
        ({}, {"precondition": 0.0}, 0.0),
        ({"precondition": 0.5}, {}, 0.5),
        ({"precondition": 0.5}, {"precondition": 0.0}, 0.0),
    ],
)
def test_a_target_keeps_sensitive_weights_by_default(make, arguments, gamma):
    run = TargetRun(decaying(0.5, **arguments), make=lambda params, **values: LpAdamW(params, **values, **make)).to(20)

    def values() -> dict:
        return effective_values(run.optimizer.param_groups[0], run.optimizer.parameter_map.values("2.weight"))

    assert phase_of(values()) is Phase.DECAY and acting_values(values())["precondition"] == gamma
    saved_target = run.attached.state_dict()["weights"]["target"]
    assert saved_target["precondition"] == arguments.get("precondition", None if make else 1.0)
    run.to(TOTAL)
    assert phase_of(values()) is Phase.FROZEN and acting_values(values())["precondition"] == 0.0, (
        "frozen zeros need none"
    )


def test_a_base_without_second_moments_has_none_to_go_by_and_a_lambda_by_hand_means_the_same_with_every_loss():
    assert "precondition" not in TargetRun(decaying(0.5), make=LpLion, lr=3e-4).to(20).optimizer.param_groups[0]
    assert LpAdamW([nn.Parameter(torch.ones(2))]).param_groups[0]["precondition"] == 0.0


def test_without_a_target_there_is_nothing_to_log_or_save():
    run = TargetRun(None).to(2)
    assert (
        run.attached.weight_controller is None and run.attached.logs == {} and run.attached.state_dict() == {"step": 2}
    )


def test_an_update_that_comes_late_does_not_shift_the_later_ones():
    """after_step was not called after two of the steps."""
    run = TargetRun(layerwise(0.5, update_every=4)).to(9)
    run.step(), run.step()
    assert [step for step, _ in run.to(30).history] == [6, 12, 14, 18, 22, 26, 30]
