"""What a target meets in a run: weights that are nan, layers that die, modules without a gradient, other layouts,
rates of 0. It is said in one line that names what is wrong and the way out.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from helpers.groups import paired_model, pairs_of, step
from helpers.targets import END, FINAL_PRUNING, START, TOTAL, TargetRun, backward, model_of
from lp_dist import LpAdamW, LpLion, LpSGD, SparsityTarget, attach, measure_sparsity
from lp_dist.errors import UsageError
from lp_dist.sparsity.selection import decayed_names, factors_of_weights

HALF = SparsityTarget(0.5)


def warned(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


# -- weights and moments that are nan -----------------------------------------


@pytest.mark.parametrize("latent", [None, 0.0])
@pytest.mark.parametrize("when", [0, 20])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_spoiled_end_the_run_by_name(value, when, latent):
    run = TargetRun(SparsityTarget(0.5, latent_windows=latent))
    run.to(when)
    backward(run.model, when)
    run.model[2].weight.grad.fill_(value)
    run.optimizer.step()
    run.attached.after_step()
    run.taken += 1
    with pytest.raises(
        RuntimeError, match=r"weights of \w.weight, or Adam's second moments .* nan or infinite.*lower"
    ):
        run.to(TOTAL)
    assert run.taken <= max(when, START) + run.attached.weight_controller.update_every + 1, "at the next update"


def test_a_single_nan_is_found_before_the_final_pruning():
    run = TargetRun(HALF).to(FINAL_PRUNING - 1)
    with torch.no_grad():
        run.model[2].weight.view(-1)[4321] = float("nan")
    with pytest.raises(RuntimeError, match=r"at step 41 1 weights of 2.weight, .* 0 more parameters have some"):
        run.attached.finish()


# -- layers that die ----------------------------------------------------------


def test_matrices_that_die_whole_are_named(caplog):
    model = model_of()
    with torch.no_grad():
        model[4].weight.mul_(1e-4)
    run = TargetRun(SparsityTarget(0.5, precondition=0.0), model=model, lr=1e-6).to(TOTAL)
    assert not run.model[4].weight.any()
    assert "1 matrices are all zeros now, such as 4.weight" in warned(caplog) and "scope='layer'" in warned(caplog)
    caplog.clear()
    TargetRun(SparsityTarget(0.5, scope="layer")).to(TOTAL)
    assert "all zeros now" not in warned(caplog)


# -- weights that are computed ------------------------------------------------


def two_linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


COMPUTED = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "weight norm": parametrizations.weight_norm,
    "the old weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "the old spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*_norm.* is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_a_module_computes_its_weights_from_stays_dense_and_is_named(kind, caplog):
    model = two_linear()
    COMPUTED[kind](model[0])
    factors = factors_of_weights(model)
    assert factors and all(name.startswith("0.") and name != "0.bias" for name in factors)
    assert decayed_names(model) == {"2.weight"}
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    attached = attach(model, optimizer, target=HALF, total_steps=TOTAL)
    assert attached.decayed == {"2.weight"}
    assert f"no decay for {len(factors)} parameters from which a module computes its weights" in warned(caplog)
    for number in range(TOTAL):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step()
    assert measure_sparsity(model, names=attached.counted).total == 0.5 == float((model[2].weight == 0).float().mean())
    assert all(bool((param != 0).any()) for name, param in model.named_parameters() if name in factors)


def test_a_model_that_torch_has_pruned_throughout_is_refused_with_the_way_out():
    model = two_linear()
    for module in (model[0], model[2]):
        prune.l1_unstructured(module, "weight", 0.3)
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    with pytest.raises(
        UsageError, match=r"computed from other parameters, such as 0.weight_orig.*prune.remove\(module"
    ):
        attach(model, optimizer, target=HALF, total_steps=TOTAL)
    for module in (model[0], model[2]):
        prune.remove(module, "weight")
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    assert attach(model, optimizer, target=HALF, total_steps=TOTAL).decayed == {"0.weight", "2.weight"}


# -- layouts ------------------------------------------------------------------


def channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)


def transposed() -> nn.Module:
    model = two_linear()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model


@pytest.mark.parametrize("make", [channels_last, transposed])
def test_weights_that_do_not_lie_row_by_row_are_refused_at_once_and_the_way_out_works(make):
    model = make()
    with pytest.raises(UsageError, match=r"don't lie in memory row by row, such as 0.weight .*\.data\.contiguous\(\)"):
        attach(model, LpAdamW(model.parameters(), lr=1e-3), target=HALF, total_steps=TOTAL)
    for param in model.parameters():
        param.data = param.data.contiguous()
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    attached = attach(model, optimizer, target=HALF, total_steps=TOTAL)
    x = torch.randn(4, 8, 8, 8).to(memory_format=torch.channels_last) if make is channels_last else torch.randn(4, 16)
    for _ in range(TOTAL):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step()
    assert measure_sparsity(model).total == pytest.approx(0.5, abs=1e-3)


def test_a_lambda_takes_any_layout():
    model = channels_last()
    optimizer = LpAdamW(model.parameters(), lr=1e-2, weight_decay=1.0)
    attach(model, optimizer)
    for _ in range(40):
        model(torch.randn(4, 8, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (
        measure_sparsity(model).total == sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1) / 2304 > 0
    )


def test_a_target_in_fp64_is_reached_and_counted():
    run = TargetRun(HALF, model=model_of().double())
    for _ in range(TOTAL):
        run.model(torch.randn(4, 64, dtype=torch.float64)).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.attached.after_step()
    assert measure_sparsity(run.model).total == pytest.approx(0.5, abs=1e-4)


# -- learning rates of 0 ------------------------------------------------------


def test_a_schedule_that_ends_inside_of_the_window_is_told_before_the_run(caplog):
    run = TargetRun(HALF, attached=False)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: float(step < 25))
    run.attach()
    assert f"the learning rate is 0 from step 25 on, and the window ends at {END}" in warned(caplog)
    assert "End the window there (end=25)" in warned(caplog)


def test_a_param_group_whose_rate_is_0_is_told_before_the_run(caplog):
    model = model_of()
    optimizer = LpAdamW(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[2].parameters(), *model[4].parameters()]}],
        lr=1e-3,
    )
    attach(model, optimizer, target=HALF, total_steps=TOTAL)
    assert "the learning rate of param group 0 is 0 in the whole window" in warned(caplog)
    assert "requires_grad_(False)" in warned(caplog)


# -- arguments of torch's optimizers ------------------------------------------


@pytest.mark.parametrize("cls", [LpAdamW, LpSGD, LpLion])
@pytest.mark.parametrize(
    "argument, words",
    [
        ({"fused": True}, "implementation='fused'"),
        ({"foreach": True}, "implementation='foreach'"),
        ({"amsgrad": True}, "no such variant"),
        ({"correct_bias": False}, "corrected always"),
        ({"decoupled_weight_decay": False}, "decoupled always"),
        ({"learning_rate": 1e-3}, "see help"),
    ],
)
def test_an_argument_of_another_optimizer_is_refused_with_what_to_do(cls, argument, words):
    key, value = next(iter(argument.items()))
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument {key}={value}: .*{words}"):
        cls(model_of().parameters(), lr=1e-3, **argument)


@pytest.mark.parametrize("cls", [LpAdamW, LpSGD, LpLion])
def test_an_argument_that_asks_for_nothing_else_is_taken(cls):
    same = {"fused": None, "foreach": False, "amsgrad": False, "differentiable": False, "correct_bias": True}
    optimizer = cls(model_of().parameters(), lr=1e-3, **same)
    assert not same.keys() & optimizer.param_groups[0].keys()


def test_groups_with_spoiled_weights_end_the_run():
    model = paired_model()
    optimizer = LpSGD(model.parameters(), lr=1e-2)
    target = SparsityTarget(0.25, groups=pairs_of(model), start=4, end=40)
    attached = attach(model, optimizer, target=target, total_steps=TOTAL)
    with pytest.raises(RuntimeError, match="groups are nan or infinite: no threshold"):
        for number in range(20):
            step(model, optimizer, number)
            if number == 5:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[3] = float("nan")
            attached.after_step()
    assert number <= 5 + attached.controllers[0].update_every
