"""Every target that can't be reached is refused before the first batch, with the value, the limit and the way out."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields

import pytest
import torch

from helpers.targets import END, START, TOTAL, TargetRun, half_dead, layerwise
from lp_dist import LpAdamW, LpLion, SparsityTarget, add_lp_decay, attach
from lp_dist.errors import UsageError
from lp_dist.targets.target import PatternTarget


def refused(words: list[str], function) -> None:
    with pytest.raises(ValueError) as caught:
        function()
    assert all(word in str(caught.value) for word in words), f"{words} should be in: {caught.value}"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sparsity": 0}, ["sparsity=0", "between 0 and 1", "0.5 is half of the weights"]),
        ({"sparsity": 1.0}, ["sparsity=1.0", "between 0 and 1"]),
        ({"sparsity": 50}, ["sparsity=50", "between 0 and 1"]),
        ({"sparsity": -0.1}, ["sparsity=-0.1"]),
        ({"sparsity": math.nan}, ["sparsity=nan"]),
        ({"sparsity": "half"}, ["sparsity='half'"]),
        ({"p": 1.5}, ["p=1.5", "[-4, 1]", "p > 1", "not zero", "0.5 is the default"]),
        ({"p": -5.0}, ["p=-5", "[-4, 1]"]),
        ({"p": math.nan}, ["p=nan"]),
        ({"precondition": -1.0}, ["precondition=-1.0", ">= 0", "set it to 0"]),
        ({"cap": 0.9}, ["cap=0.9", "from 1 up", "None"]),
        ({"cap": math.inf}, ["cap=inf", "None lets all weights decay"]),
        ({"cap": math.nan}, ["cap=nan"]),
        ({"curve": "quadratic"}, ["curve='quadratic'", "cubic, linear", "function"]),
        ({"curve": lambda u: u * (2 - 1.5 * u) / 0.5}, ["curve must rise from f(0) = 0 to f(1) = 1", "never fall"]),
        ({"curve": lambda u: 0.5 * u}, ["curve must rise"]),
        ({"curve": lambda u: 0.5 + 0.5 * u}, ["curve must rise"]),
        ({"start": 0.7, "end": 0.7}, ["start=0.7", "end=0.7", "lower start or raise end"]),
        ({"start": 30, "end": 20}, ["start=30", "end=20"]),
        ({"start": -0.1}, ["start=-0.1", ">= 0"]),
        ({"end": math.inf}, ["end=inf"]),
        ({"scope": "row"}, ["scope='row'", "layer, global"]),
        ({"relative_to": "some"}, ["relative_to='some'", "decayed, all"]),
        ({"update_every": 0}, ["update_every=0", "at least 1 optimizer step"]),
    ],
)
def test_bad_values_are_refused_by_the_target_itself(values, words):
    refused(words, lambda: SparsityTarget(**{"sparsity": 0.5, **values}))


def test_help_and_editors_show_the_arguments():
    of_all, of_pattern = inspect.signature(SparsityTarget), inspect.signature(PatternTarget)
    assert [*of_all.parameters][:3] == ["sparsity", "start", "end"] == [*of_pattern.parameters][:3]
    assert {"latent_windows", "pattern", "groups", "budget", "interval"} <= of_all.parameters.keys()
    assert "pattern" in of_pattern.parameters and "groups" not in of_pattern.parameters
    for name, value in of_all.bind(0.5, groups="heads").arguments.items():
        assert getattr(SparsityTarget(0.5, groups="heads"), name) == value
    with pytest.raises(TypeError, match="too many positional arguments"):
        of_all.bind(*range(len(fields(SparsityTarget)) + 1))


def test_good_values_at_their_limits_are_taken():
    for values in (
        {"p": 1.0},
        {"p": -4.0},
        {"cap": 1.0},
        {"cap": None},
        {"start": 0, "end": 1},
        {"start": 0.5, "end": 100},
        {"update_every": 1},
        {"curve": lambda u: float(u >= 1.0)},
        {"curve": "linear"},
        {"sparsity": 1e-6},
        {"sparsity": 0.999},
    ):
        SparsityTarget(**{"sparsity": 0.5, **values})


def with_groups(**values):
    return lambda params, lr: LpAdamW(params, lr=lr, **values)


def hooked(params, lr):
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    add_lp_decay(optimizer)
    return optimizer


@pytest.mark.parametrize(
    "target, how, words",
    [
        (
            {},
            {"make": with_groups(weight_decay=0.1)},
            ["weight_decay=0.1", "as well as a target", "weight_decay=0 everywhere"],
        ),
        (
            {},
            {"make": hooked, "overrides": {"0.weight": {"weight_decay": 0.2}}},
            ["weight_decay=0.2", "as well as a target"],
        ),
        ({}, {"make": with_groups(cutoff=0.5)}, ["cutoff=0.5", "as well as a target", "SparsityTarget(cap=)"]),
        ({}, {"overrides": {"*.weight": {"cutoff": 0.25}}}, ["cutoff=0.25", "as well as a target"]),
        (
            {},
            {"make": with_groups(regrowth_below=0.5)},
            ["regrowth_below=0.5", "as well as a target", "SparsityTarget(regrowth=)"],
        ),
        ({}, {"overrides": {"0.weight": {"phase": "off"}}}, ["phase='off'", "as well as a target", "weight_decay"]),
        (
            {},
            {"overrides": {"0.weight": {"pattern": "2:4"}}},
            ["pattern='2:4'", "a target of single weights", "SparsityTarget(pattern=)"],
        ),
        (
            {"pattern": "2:4", "sparsity": None},
            {"overrides": {"0.weight": {"pattern": "4:8"}}},
            ["pattern='4:8'", "a target of 2:4"],
        ),
        ({}, {"make": with_groups(p=1.5)}, ["0.weight: p=1.5", "[-4, 1]"]),
        ({}, {"overrides": {"2.weight": {"p": 2.0}}}, ["2.weight: p=2", "p > 1"]),
        ({}, {"total": None}, ["total_steps=None", "number of optimizer steps of the whole run"]),
        ({}, {"total": 0}, ["total_steps=0"]),
        (
            {},
            {"total": 12},
            ["from step 1 to 8 of 12", "7 steps", "takes 8", "at least 15 steps", "lower start, or raise end"],
        ),
        (
            {"start": 20, "end": 25},
            {},
            ["from step 20 to 25 of 60", "5 steps", "takes 8", "lower start, or raise end"],
        ),
        ({"start": 55, "end": 200}, {}, ["from step 55 to 60 of 60", "5 steps"]),
        ({"start": 60, "end": 90}, {}, ["from step 60 to 90", "60 steps", "train for longer"]),
        ({"precondition": 1.0}, {"make": LpLion}, ["precondition=1.0", "Adam's second moments", "LpLion"]),
        ({"precondition": 1.0}, {"make": hooked}, ["precondition=1.0", "Adam's second moments", "LpAdamW"]),
        (
            {"scope": "global"},
            {"overrides": {"2.weight": {"p": 0.0}}},
            ["scope='global'", "p and precondition must not differ", "scope='layer'"],
        ),
        (
            {"scope": "global"},
            {"overrides": {"2.weight": {"precondition": 0.5}}},
            ["scope='global'", "must not differ"],
        ),
        (
            {"relative_to": "all", "sparsity": 0.995},
            {},
            [
                "sparsity=0.995 of all 21,160 parameters",
                "only 20,992 (99.2%)",
                "less than 0.992",
                "relative_to='decayed'",
            ],
        ),
        (
            {"relative_to": "all", "sparsity": 0.51},
            {"overrides": {"0.weight": {"weight_decay": 0.0}}},
            ["only 10,752 (50.8%)", "names="],
        ),
        (
            {},
            {"overrides": {"*.weight": {"weight_decay": 0.0}}},
            ["no parameter decays", "override", "Unfreeze some", "names="],
        ),
    ],
)
def test_what_cannot_be_reached_is_refused_by_attach(target, how, words):
    refused(words, lambda: TargetRun(SparsityTarget(**{"sparsity": 0.5, **target}), **how))


def test_what_can_just_be_reached_is_not_refused():
    TargetRun(SparsityTarget(0.99, relative_to="all"))
    TargetRun(SparsityTarget(0.5, relative_to="all"), overrides={"0.weight": {"weight_decay": 0.0}})
    TargetRun(SparsityTarget(0.5), total=15)


def test_a_refused_target_leaves_the_optimizer_as_it_was():
    run = TargetRun(None, make=with_groups(weight_decay=0.1))
    groups = [dict(group) for group in run.optimizer.param_groups]
    refused(
        ["as well as a target"],
        lambda: attach(run.model, run.optimizer, target=SparsityTarget(0.5), total_steps=TOTAL),
    )
    assert [dict(group) for group in run.optimizer.param_groups] == groups


@pytest.mark.parametrize("start, end", [(0.1, 0.7), (0.0, 1.0), (0.33, 0.4), (0.25, 0.75), (0.05, 0.1)])
def test_as_many_steps_as_the_error_requests_are_enough(start, end):
    with pytest.raises(ValueError, match=r"train for at least (\d+) steps") as caught:
        TargetRun(SparsityTarget(0.5, start=start, end=end), total=7)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    controller = TargetRun(SparsityTarget(0.5, start=start, end=end), total=needed).attached.weight_controller
    assert controller.window.end - controller.window.start >= 8, (
        f"{needed} steps give a window from {controller.window.start} to {controller.window.end}"
    )


@pytest.mark.parametrize("off", [(START, END), (0, TOTAL)])
def test_no_learning_rate_in_the_window(off):
    run = TargetRun(SparsityTarget(0.5), attached=False)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda step: 0.0 if off[0] <= step < off[1] else 1.0
    )
    refused(["learning rate is 0 in the whole window from step 6 to 42", "move the window"], run.attach)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0 if step == END - 2 else 0.0)
    run.attach()  # one step of it is enough to be worth a try


def test_a_model_that_is_sparser_already():
    words = ["2.weight is 50.0% zeros already", "target is 40.0%", "ask for more", "override", "scope='global'"]
    refused(words, lambda: TargetRun(layerwise(0.4, start=0), model=half_dead()))
    refused(
        ["all is 24.4% zeros already", "target is 20.0%"],
        lambda: TargetRun(SparsityTarget(0.2, start=0, scope="global"), model=half_dead()),
    )
    refused(words, lambda: TargetRun(layerwise(0.4), model=half_dead()))  # not as late as the window begins
    for way_out in (
        {"target": layerwise(0.6, start=0)},
        {"target": SparsityTarget(0.4, start=0, scope="global")},
        {"target": layerwise(0.4, start=0), "overrides": {"2.weight": {"weight_decay": 0.0}}},
    ):
        TargetRun(**way_out, model=half_dead())


def test_a_model_with_some_zeros_goes_on_from_them():
    run = TargetRun(layerwise(0.6, start=0, curve="linear", update_every=5, latent_windows=0.0), model=half_dead())
    (scope,) = [scope for scope, share in run.attached.weight_controller.before.items() if share]
    assert scope == "2.weight" and run.attached.logs["lp/plan"] == pytest.approx(5120 / 20992)
    x = run.model[2].weight.detach().abs().pow(1.5).flatten().sort().values
    wanted = x[round((0.5 + 0.1 * 5 / (END - 1)) * 10240) - 1]  # the plan leads from 0.5 to 0.6
    assert run.optimizer.parameter_map.values("2.weight")["cutoff"] == pytest.approx(float(wanted), rel=2e-4)
    assert run.to(TOTAL).zeros()["2.weight"] == round(0.6 * 10240)


def test_a_target_that_is_forgotten_on_the_way_is_told():
    """Attached anew in the middle, without the state that was saved."""
    run = TargetRun(SparsityTarget(0.5)).to(20)
    run.attach()
    with pytest.raises(UsageError, match=r"from the middle of a target's window.*load_state_dict\(\) of what it"):
        run.step()
    assert run.taken == 20


def test_after_step_that_is_never_called_before_the_window_is_told():
    run = TargetRun(SparsityTarget(0.5))
    with pytest.raises(UsageError, match="was not called after the last 5 steps, up to step 5 .* call it after each"):
        for _ in range(START + 1):
            run.step()
    assert run.taken == 5 < START
