"""What was planned is held against what is there: an engine made after attach, parameters added, replaced or unfrozen,
and values that a loop writes into the groups.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.targets import MATRICES, START, TOTAL, TargetRun, backward, layerwise, model_of
from lp_dist import LpAdamW, SparsityTarget, add_lp_decay, attach
from lp_dist.errors import UsageError


def native(params) -> torch.optim.Optimizer:
    return LpAdamW(params, lr=1e-3)


def hooked(params) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, lr=1e-2)
    add_lp_decay(optimizer)
    return optimizer


OPTIMIZERS = pytest.mark.parametrize("make", [native, hooked])


def attached(make, model, params=None):
    optimizer = make(model.parameters() if params is None else params)
    return optimizer, attach(model, optimizer, target=SparsityTarget(0.5), total_steps=TOTAL)


@OPTIMIZERS
def test_an_optimizer_that_was_given_other_tensors_after_attach_is_refused_before_its_first_step(make):
    """As deepspeed.initialize and accelerator.prepare do it."""
    model = model_of()
    optimizer, _ = attached(make, model)
    flat = torch.cat([param.detach().flatten() for param in model.parameters()]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(UsageError, match=r"steps 1 other tensors than .*Call attach after deepspeed.initialize"):
        optimizer.step()
    assert torch.equal(flat, before)


@OPTIMIZERS
def test_a_model_whose_parameters_were_replaced_after_attach_is_refused(make):
    """As fully_shard does it, while the optimizer keeps the old ones, which get no gradient any more."""
    model = model_of()
    optimizer, _ = attached(make, model)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    backward(model, 0)
    with pytest.raises(UsageError, match=r"1 parameters of the model are other tensors .*such as 2.weight"):
        optimizer.step()


@OPTIMIZERS
def test_parameters_that_are_added_to_the_optimizer_after_attach_are_refused_by_name(make):
    model = model_of()
    optimizer, _ = attached(make, model, [model[0].weight, model[0].bias])
    for step in range(2):
        backward(model, step)
        optimizer.step()
    optimizer.add_param_group({"params": [model[2].weight]})
    with pytest.raises(UsageError, match=r"1 parameters were added to the optimizer after attach, such as 2.weight"):
        optimizer.step()


@OPTIMIZERS
def test_what_is_unfrozen_during_the_run_is_refused_by_name_and_what_is_frozen_is_not(make):
    model = model_of()
    model[4].weight.requires_grad_(False)
    optimizer, attachment = attached(make, model)

    def to(until: int) -> None:
        for step in range(until):
            backward(model, step)
            optimizer.step()
            attachment.after_step()

    to(3)
    model[2].weight.requires_grad_(False)  # LISA freezes what it had trained
    model[2].weight.grad = None
    to(3)
    model[4].weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"1 parameters were frozen .* and train now, such as 4.weight"):
        to(START + 3)


def test_parameters_that_this_optimizer_does_not_step_may_do_what_they_like():
    model = model_of()
    model[4].weight.requires_grad_(False)
    optimizer, attachment = attached(native, model, [model[0].weight, model[2].weight])
    for step in range(TOTAL):
        if step == START + 1:
            model[4].weight.requires_grad_(True)
        backward(model, step)
        optimizer.step()
        attachment.after_step()
    attachment.finish()
    assert float((model[2].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.2)


def test_at_the_end_it_is_checked_as_well():
    run = TargetRun(layerwise(0.5)).to(START - 2)
    run.model[2].weight = nn.Parameter(run.model[2].weight.detach().clone())
    with pytest.raises(UsageError, match="other tensors"):
        run.attached.finish()


@OPTIMIZERS
@pytest.mark.parametrize("with_target", [True, False])
def test_what_may_not_decay_never_does_whatever_a_loop_writes_into_the_groups(make, with_target):
    """DINO's and timm's schedules of weight decay set it anew at every step, in all groups."""

    class Model(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(model_of(), nn.LayerNorm(8), nn.Linear(8, 8))

    model = Model()
    optimizer = make(model.parameters())
    target = {"target": SparsityTarget(0.5), "total_steps": TOTAL} if with_target else {}
    attachment = attach(model, optimizer, names=[f"0.{name}" for name in MATRICES], **target)
    for step in range(TOTAL):
        for group in optimizer.param_groups:
            group["weight_decay"] = 5.0
        model.zero_grad()
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        attachment.after_step()
    for name, param in model.named_parameters():
        if name.removeprefix("0.") in MATRICES and name.startswith("0."):
            share = float((param == 0).float().mean())
            assert share > 0.9 if not with_target else share < 0.95, name
        elif name != "1.bias" and not name.endswith("bias"):
            assert (param != 0).all(), f"{name} decayed"
    if with_target:
        assert attachment.logs["lp/measured"] == pytest.approx(0.5, abs=1e-3)
