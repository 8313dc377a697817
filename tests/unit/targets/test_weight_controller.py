"""A target is reached: exactly, along its plan, with every base, and around its window nothing but the base optimizer
acts.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from helpers.targets import (
    END,
    FINAL_PRUNING,
    MATRICES,
    START,
    TOTAL,
    TargetRun,
    backward,
    decaying,
    layerwise,
    model_of,
    same,
)
from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay, attach

CAPPED, UNCAPPED, PRECONDITIONED = (
    {"regrowth": 0.0},
    {"cap": None, "regrowth": 0.0},
    {"cap": None, "precondition": 1.0, "regrowth": 0.0},
)


def hooked(cls, **kwargs):
    """A base of torch's own with `add_lp_decay`."""

    def make(params, lr):
        optimizer = cls(params, lr=lr, weight_decay=0.0, **kwargs)
        add_lp_decay(optimizer)
        return optimizer

    return make


def plain_adamw(params, lr):
    """Which test_cpu_kernel.py and test_optimizers.py hold to be torch's AdamW, bit for bit."""
    return LpAdamW(params, lr=lr, weight_decay=0.0)


def test_between_updates_the_tensors_are_not_divided_anew():
    """It takes milliseconds a step where a flat tensor holds hundreds of parameters."""
    run = TargetRun(layerwise(0.5, update_every=4)).to(START + 2)
    weight = run.model[2].weight
    spans = []
    for _ in range(8):
        spans.append(run.optimizer.parameter_map.value_spans(weight, weight.numel()))
        run.to(run.taken + 1)
    assert len({id(span) for span in spans}) <= 3, "two updates lie in between"


def test_a_p_that_is_set_on_the_way_is_what_the_target_goes_on_with():
    run = TargetRun(layerwise(0.5)).to(START + 2)
    run.attached.set("2.weight", p=-1.0)
    used = [scored.values["p"] for scored in run.attached.weight_controller.scored_slices()]
    assert used == [0.5, -1.0, 0.5]
    run.to(TOTAL)
    assert run.zeros()["2.weight"] == pytest.approx(0.5 * MATRICES["2.weight"], abs=1)


# -- the sparsity -------------------------------------------------------------


@pytest.mark.parametrize(
    "p, sparsity, form",
    [
        (-1.0, 0.3, CAPPED),
        (-1.0, 0.9, UNCAPPED),
        (0.0, 0.3, PRECONDITIONED),
        (0.0, 0.9, CAPPED),
        (0.5, 0.3, UNCAPPED),
        (0.5, 0.9, PRECONDITIONED),
        (0.5, 0.9, {"precondition": 0.5, "regrowth": 0.0}),
        (0.8, 0.3, CAPPED),
        (0.8, 0.9, PRECONDITIONED),
        (1.0, 0.3, {"cap": 2.0, "regrowth": 0.0}),
        (1.0, 0.9, CAPPED),
    ],
)
def test_every_tensor_ends_with_its_share_of_zeros(p, sparsity, form):
    run = TargetRun(layerwise(sparsity, p=p, latent_windows=0.0, **form)).to(TOTAL)
    for name, zeros in run.zeros().items():
        assert abs(zeros - sparsity * MATRICES[name]) <= 1, (
            f"{name} has {zeros} zeros of {MATRICES[name]}, not {sparsity:.0%}"
        )
    assert all((param != 0).all() for name, param in run.model.named_parameters() if name not in MATRICES), (
        "biases are no part of it"
    )

    # Measured is never ahead of the plan, and behind it by as much as a collapse lasts: here at most 5 updates of 2
    # steps for p <= 0.5, and with a cap of 1 at most 6 whatever p is. Without a cap at p near 1 a large part is left
    # to the final pruning.
    control, last = run.attached.weight_controller, 0.0
    behind = 10 if p <= 0.5 else 12 if form is CAPPED else 30
    for step, logs in run.history[:-1]:
        plan, measured = logs["lp/plan"], logs["lp/measured"]
        assert plan == pytest.approx(sparsity * (1 - (1 - (step - START) / (FINAL_PRUNING - START)) ** 3)), (
            f"the cubic plan at step {step}"
        )
        assert last <= measured <= plan + 1e-3, f"at step {step} {measured:.4f} are zeros, and {plan:.4f} were planned"
        assert measured >= sparsity * control.planned_share(max(step - behind, START)), (
            f"at step {step} only {measured:.4f} are zeros; planned {plan:.4f}"
        )
        last = measured
    final_pruning = control.final_pruning
    assert (
        final_pruning["after"] == pytest.approx(sparsity, abs=1e-4)
        and final_pruning["pruned_at_end"] == final_pruning["after"] - final_pruning["before"] >= 0
    )
    if form is CAPPED:
        assert final_pruning["pruned_at_end"] <= 0.012, (
            f"{final_pruning['pruned_at_end']:.2%} were left to the final pruning; decay should have done it"
        )


def test_the_p_of_the_optimizer_and_that_of_the_target_are_one():
    """Up to the final pruning, whose saliency has to be that of the decay: with γ > 0 the order of the weights depends
    on p.
    """
    weights = {}
    for where in ("target", "optimizer"):
        of_target, of_optimizer = ({"p": -0.5}, {}) if where == "target" else ({}, {"p": -0.5})
        target = decaying(0.6, precondition=0.5, scope="global", **of_target)
        weights[where] = TargetRun(target, make=partial(LpAdamW, **of_optimizer)).to(TOTAL).model.state_dict()
    assert same(weights["target"], weights["optimizer"])


@pytest.mark.parametrize("p, sparsity, form", [(-1.0, 0.9, CAPPED), (0.5, 0.3, PRECONDITIONED), (1.0, 0.3, CAPPED)])
def test_a_global_target_is_one_threshold(p, sparsity, form):
    run = TargetRun(decaying(sparsity, p=p, **form)).to(FINAL_PRUNING)
    zeros, elements = sum(run.zeros().values()), sum(MATRICES.values())
    assert zeros == round(sparsity * elements)
    shares = [zeros / MATRICES[name] for name, zeros in run.zeros().items()]
    assert max(shares) > min(shares) + 0.05, (
        f"{shares}: tensors of different scale must differ, else it was no global threshold"
    )
    values = [run.optimizer.parameter_map.values(name) for name in MATRICES]
    assert all(value == values[0] for value in values), "one λ and one cutoff for all"
    survivors = run.zeros()
    run.to(TOTAL)
    assert run.zeros() == survivors


@pytest.mark.parametrize(
    "make, lr, p",
    [
        (hooked(torch.optim.AdamW), 3e-3, 0.5),
        (hooked(torch.optim.SGD, momentum=0.9), 0.05, 0.0),
        (hooked(torch.optim.Adafactor), 3e-3, 0.5),
        (lambda params, lr: LpSGD(params, lr=lr, momentum=0.9), 0.05, 0.5),
        (LpLion, 3e-4, 0.0),
    ],
    ids=["AdamW", "SGD", "Adafactor", "LpSGD", "LpLion"],
)
def test_every_base_reaches_it(make, lr, p):
    run = TargetRun(layerwise(0.7, p=p), make=make, lr=lr).to(TOTAL)
    assert run.zeros() == {name: round(0.7 * elements) for name, elements in MATRICES.items()}
    assert run.attached.weight_controller.final_pruning["pruned_at_end"] < 0.03, "it is the decay that does it"


@pytest.mark.parametrize(
    "update_every, step, form",
    [
        (4, 10, {"latent_windows": 0.0}),
        (4, 14, {"cap": None}),
        (3, 9, {"precondition": 1.0, "cap": 3.0}),
        (10, 36, {}),
        (4, 10, {}),
        (3, 18, {"precondition": 1.0, "latent_windows": 0.25}),
    ],
)
def test_lambda_and_cutoff_are_those_of_the_formula(update_every, step, form):
    """By hand: x_s of the sorted weights, and the rates as the scheduler then really gives them, to the next update or
    the final pruning.
    """
    run, horizon = (
        TargetRun(layerwise(0.6, p=0.0, update_every=update_every, curve="linear", **form)).to(step),
        min(update_every, FINAL_PRUNING - step),
    )
    share = 0.6 * (step + horizon - START) / (FINAL_PRUNING - START)
    control, beta2 = run.attached.weight_controller, 0.999
    values_by_name = {name: run.optimizer.parameter_map.values(name) for name in MATRICES}
    x = {}
    for name, param in run.model.named_parameters():
        if name in MATRICES:
            v = run.optimizer.state[param]["exp_avg_sq"].double()
            denom = (v / (1 - beta2**run.taken)).sqrt() + 1e-8 if "precondition" in form else 1.0
            weight = torch.where(param == 0, run.optimizer.state[param]["exp_avg"], param)  # where it is latent
            x[name] = float(
                (weight.detach().double() ** 2 * denom).flatten().sort().values[round(share * param.numel()) - 1]
            )
    rates, latent = 0.0, control.target.latent_windows > 0
    for _ in range(horizon):
        rates += run.optimizer.param_groups[0]["lr"]
        run.step()
    if latent:  # as long as that many windows
        rates *= control.target.latent_windows * (END - START) / horizon
    for name, values in values_by_name.items():
        assert values["weight_decay"] == pytest.approx(x[name] / (2 * rates), rel=3e-4), f"λ of {name}"
        assert values.get("latent", False) == latent
        assert values["cutoff"] == pytest.approx(
            x[name] * (math.inf if control.target.cap is None else control.target.cap), rel=3e-4
        )
    lambdas = sorted(values["weight_decay"] for values in values_by_name.values())
    assert [run.attached.logs[f"lp/lambda_{key}"] for key in ("min", "median", "max")] == lambdas


@pytest.mark.parametrize(
    "p, sparsity, form",
    [
        (0.5, 0.9, {}),
        (0.0, 0.3, {"scope": "global", "precondition": 0.5}),
        (0.5, 0.6, {"cap": None, "regrowth": 0.02}),
    ],
)
def test_with_regrowth_weights_come_near_zero_along_the_plan_and_become_zero_at_its_end(p, sparsity, form):
    form = {"latent_windows": 0.0, **form}
    run = TargetRun(layerwise(sparsity, p=p, **form)).to(TOTAL)
    control, regrowth = run.attached.weight_controller, form.get("regrowth", 0.1)
    assert control.regrowth_end == END - 8
    last = 0.0
    for step, logs in run.history[:-1]:
        near_zero = logs["lp/near_zero"]
        if step <= control.regrowth_end:
            assert logs["lp/measured"] < 0.003, "a zero is one that had no gradient"
            assert last - 0.01 <= near_zero <= logs["lp/plan"] + 0.01, f"at step {step}"
            assert near_zero >= sparsity * control.planned_share(max(step - 16, START)) - 0.01, (
                f"at step {step} only {near_zero:.4f} are near zero"
            )
        else:
            assert logs["lp/measured"] >= last - 0.01 or step <= control.regrowth_end + 4
        last = near_zero
    assert last > 0.9 * sparsity
    assert (
        control.final_pruning["after"] == pytest.approx(sparsity, abs=1e-4)
        and control.final_pruning["pruned_at_end"] <= 0.012
    )

    again = TargetRun(layerwise(sparsity, p=p, **{**form, "cap": 1.0})).to(20)
    for name in MATRICES:
        values = again.optimizer.parameter_map.values(name)
        assert (
            values["regrowth_below"] == pytest.approx(regrowth * values["cutoff"], rel=1e-6)
            and values["regrowth_below"] > 0
        )
    assert all(
        again.optimizer.parameter_map.values(name)["regrowth_below"] == 0.0
        for name in MATRICES
        if again.to(control.regrowth_end + 2)
    )


@pytest.mark.parametrize("regrowth", [0.1, 0.0])
def test_a_weight_near_zero_comes_back_if_its_gradient_needs_it_in_time(regrowth):
    """Two small weights without a gradient; from step 14 on one has a large one, from step 36 on the other."""
    run = TargetRun(layerwise(0.5, p=0.5, latent_windows=0.0, regrowth=regrowth, update_every=12), lr=1e-2)
    weight = run.model[0].weight
    weight.data[0, :2] = 1e-3

    def gradient(grad):
        grad = grad.clone()
        grad[0, 0] = -1.0 if run.taken >= 14 else 0.0
        grad[0, 1] = -1.0 if run.taken >= 36 else 0.0
        return grad

    weight.register_hook(gradient)
    run.to(14)
    assert weight[0, :2].abs().max() < (1e-4 if regrowth else 1e-12)
    run.to(TOTAL)
    assert (weight[0, 0] != 0) == (regrowth > 0) and weight[0, 1] == 0
    assert run.zeros() == {name: round(0.5 * elements) for name, elements in MATRICES.items()}


# -- around the window --------------------------------------------------------


def test_before_the_start_it_is_the_base_optimizer_bit_for_bit():
    run, base = TargetRun(layerwise(0.5, p=0.0)), TargetRun(None, make=plain_adamw, attached=False)
    for _ in range(START):
        base.step()
    assert same(run.to(START).weights(), base.weights())
    run.to(START + 1), base.step()
    assert not same(run.weights(), base.weights()), "from the start on it decays"


def base_from(run: TargetRun) -> TargetRun:
    """AdamW without decay, from where `run` is."""
    base = TargetRun(None, make=plain_adamw, attached=False)
    base.model.load_state_dict(run.model.state_dict())
    base.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))  # else both would have one state
    for group in base.optimizer.param_groups:
        group["weight_decay"] = 0.0
    base.scheduler.load_state_dict(run.scheduler.state_dict())
    base.taken = run.taken
    return base


@pytest.mark.parametrize("form", [CAPPED, PRECONDITIONED])
def test_after_the_end_zeros_stay_and_survivors_train_as_by_the_base(form):
    """Bit for bit, from the final pruning on, with a mask put over the base's weights by hand after each step."""
    run = TargetRun(layerwise(0.5, **form)).to(FINAL_PRUNING)
    base, pruned = base_from(run), run.weights()
    dead = {name: param == 0 for name, param in pruned.items()}
    while run.taken < TOTAL:
        run.to(run.taken + 1), base.step()
        for name, param in base.model.named_parameters():
            param.data[dead[name]] = 0.0
        assert same(run.weights(), base.weights()), f"after {run.taken} steps"
    assert all(
        (run.weights()[name][~dead[name]] != pruned[name][~dead[name]]).float().mean() > 0.99 for name in dead
    ), "survivors train"


def test_without_freeze_everything_trains_on_as_by_the_base():
    run = TargetRun(layerwise(0.5, freeze=False)).to(END)
    assert run.zeros() == {name: elements // 2 for name, elements in MATRICES.items()}
    base = base_from(run)
    while run.taken < TOTAL:
        run.to(run.taken + 1), base.step()
    assert same(run.weights(), base.weights())
    assert sum(run.zeros().values()) < 0.01 * sum(MATRICES.values()), "zeros come back"


# -- what a step is -----------------------------------------------------------


def test_calls_between_optimizer_steps_change_nothing():
    """As after each micro-batch of an accumulation, twice after a step, and where a scaler left the step out."""
    once, often = TargetRun(layerwise(0.6)), TargetRun(layerwise(0.6))
    while often.taken < TOTAL:
        once.to(once.taken + 1)
        for _ in range(often.taken % 3):
            backward(often.model, 1000 + often.taken)  # its gradients are thrown away, and no step is taken
            often.attached.after_step()
        often.to(often.taken + 1)
        often.attached.after_step()
        assert once.attached.state_dict() == often.attached.state_dict(), f"after {once.taken} steps"
    assert same(once.weights(), often.weights())


# -- which parameters ---------------------------------------------------------


def test_what_an_override_leaves_out_stays_dense_and_others_can_have_a_p_of_their_own():
    run = TargetRun(
        layerwise(0.8), overrides={"2.weight": {"weight_decay": 0.0}, "4.weight": {"p": -1.0, "l2": 0.0}}
    ).to(TOTAL)
    assert run.attached.decayed == {"0.weight", "4.weight"}
    assert run.zeros() == {"0.weight": 8192, "2.weight": 0, "4.weight": round(0.8 * 512)}


def test_what_starts_at_zero_or_is_frozen_is_left_out(caplog):
    model = model_of()
    nn.init.zeros_(model[2].weight)
    model[4].weight.requires_grad_(False)
    caplog.set_level("INFO", "lp_dist")
    run = TargetRun(layerwise(0.5), model=model)
    assert run.attached.decayed == {"0.weight"}
    assert "no decay for 1 parameters that start at zero (zero absorbs), such as 2.weight" in caplog.text
    run.to(TOTAL)
    assert run.zeros() == {
        "0.weight": 5120,
        "2.weight": 0,
        "4.weight": 0,
    }, "what started at zero trains like anything else"


def test_names_that_are_given_decay_instead():
    run = TargetRun(layerwise(0.5), names=["2.weight", "0.bias"]).to(TOTAL)
    assert run.zeros() == {"0.weight": 0, "2.weight": 5120, "4.weight": 0}
    assert int((run.model[0].bias == 0).sum()) == 80


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_share_of_all_parameters(scope):
    run = TargetRun(decaying(0.8, relative_to="all", scope=scope)).to(TOTAL)
    everything = sum(param.numel() for param in run.model.parameters())
    assert abs(sum(run.zeros().values()) - 0.8 * everything) <= len(MATRICES)
    assert run.attached.logs["lp/target"] == pytest.approx(0.8 * everything / sum(MATRICES.values()))


# -- what else can be said ----------------------------------------------------


def test_a_curve_of_ones_own():
    run = TargetRun(layerwise(0.5, curve=lambda u: 0.0 if u < 0.5 else 1.0, update_every=1)).to(TOTAL)
    assert run.zeros() == {name: elements // 2 for name, elements in MATRICES.items()}
    middle = (FINAL_PRUNING - START) / 2 + START
    assert {logs["lp/measured"] for step, logs in run.history if step < middle - 1} == {0.0}, (
        "no weight was planned to be pruned"
    )
    assert {logs["lp/plan"] for step, logs in run.history if step < middle} == {0.0}


def test_updates_come_every_so_many_steps_and_the_last_one_is_the_final_pruning(caplog):
    caplog.set_level("INFO", "lp_dist")
    run = TargetRun(layerwise(0.5, update_every=10)).to(TOTAL)
    assert [step for step, _ in run.history] == [6, 16, 26, 36, FINAL_PRUNING]
    assert run.history[-1][1]["lp/measured"] == 0.5 == run.history[-1][1]["lp/plan"]
    assert "target: prune 50.00 % of 20,992 weights, steps 6–42 of 60, λ updated every 10 steps" in caplog.text
    assert "pruned in the final step; furthest from 50.00 %" in caplog.text and ", at 50.00 %" in caplog.text


@pytest.mark.parametrize(
    "total, given, wanted",
    [(40, None, 1), (100, None, 3), (600, None, 18), (2000, None, 20), (100_000, None, 20), (2000, 60, 60)],
)
def test_updates_are_a_twentieth_of_the_window_apart_and_20_steps_at_most(total, given, wanted):
    model = model_of()
    optimizer = LpAdamW(model.parameters())
    assert (
        attach(
            model, optimizer, target=decaying(0.5, update_every=given), total_steps=total
        ).weight_controller.update_every
        == wanted
    )


def test_dead_channels_are_logged():
    model = model_of()
    with torch.no_grad():
        model[0].weight[:10] *= 1e-6
        model[0].weight[150] = 0.0
    run = TargetRun(layerwise(0.5, start=0, end=12, latent_windows=0.0), model=model, lr=1e-5, total=12)
    assert run.attached.logs["lp/dead_channels"] == pytest.approx(1 / 232)
    run.to(12)
    dead = sum(int((param == 0).all(1).sum()) for name, param in run.model.named_parameters() if name in MATRICES)
    assert dead >= 10 and run.attached.logs["lp/dead_channels"] == pytest.approx(dead / 232)
