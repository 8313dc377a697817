"""What has had no gradient when the window begins stays dense and is named; the target holds of the rest. Judged by
parameter, and by expert where a parameter has several.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor

from helpers.architectures import ARCHITECTURES
from helpers.targets import START, TOTAL, TargetRun, decaying, model_of, same
from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay, attach
from lp_dist.errors import UsageError
from lp_dist.sparsity.selection import matrix_names
from lp_dist.structured.groups import Member, weight_groups


class Branches(nn.Sequential):
    """Beside the layers that are used: one that nothing reaches until step `begins`, and a stack of experts of which
    only 0 and 2 get tokens.
    """

    begins, zeros = TOTAL, False

    def __init__(self) -> None:
        super().__init__(*model_of())
        self.branch, self.calls = nn.Linear(64, 160), 0
        self.experts = nn.Parameter(torch.randn(4, 64, 64) / 16)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + (x @ self.experts[0]).tanh() + (x @ self.experts[2]).tanh()
        seldom = self.branch(x).square().mean()
        for layer in list(self)[:5]:
            x = layer(x)
        if self.calls > self.begins:
            return x + 0.1 * seldom
        return x + 0.0 * seldom if self.zeros else x


def run_of(begins: int = TOTAL, zeros: bool = False, **kwargs: Any) -> TargetRun:
    torch.manual_seed(1)
    model = Branches()
    model.begins, model.zeros = begins, zeros
    return TargetRun(**{"target": decaying(0.6), "names": NAMES, "model": model, **kwargs})


NAMES = ["0.weight", "2.weight", "4.weight", "branch.weight", "experts"]
USED = 64 * 160 * 2 + 8 * 64 + 2 * 64 * 64
ALL = USED + 64 * 160 + 2 * 64 * 64


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def zeros_of(run: TargetRun) -> int:
    return sum(int((run.model.get_parameter(name) == 0).sum()) for name in NAMES)


@pytest.mark.parametrize("zeros", [False, True], ids=["no gradient", "gradients of zeros"])
@pytest.mark.parametrize(
    "form",
    [{}, {"latent_windows": 0.0}, {"scope": "layer", "update_every": 4}, {"precondition": 0.0}, {"start": 0.3}],
    ids=str,
)
def test_what_no_gradient_reaches_stays_dense_and_the_target_holds_of_the_rest(form, zeros, caplog):
    caplog.set_level(logging.INFO)
    run = run_of(zeros=zeros, target=decaying(0.6, **form)).to(TOTAL)
    run.attached.finish()
    experts = run.model.experts
    assert run.model.branch.weight.all() and experts[1].all() and experts[3].all()
    assert abs(zeros_of(run) - 0.6 * USED) <= 4
    assert run.attached.logs["lp/measured"] == zeros_of(run) / USED
    if form.get("scope") == "layer":
        assert int((experts == 0).sum()) == pytest.approx(0.6 * 2 * 64 * 64, abs=1)
    (line,) = warned(caplog)
    assert line.startswith(
        "1 parameter (such as branch.weight) and 2 experts of stacked parameters (such as experts[1:2]) have had no"
        f" gradient when the window begins, and stay dense: the loss says nothing of their weights. The target holds"
        f" of the other {USED:,} weights."
    )
    both = f" ({60 * USED / ALL:.2f} % of {ALL:,}, of which {ALL - USED:,} had no gradient)"
    assert f"prune 60.00 % of {USED:,} weights{both}, steps" in caplog.text
    assert caplog.text.rstrip().endswith(both)


def test_what_gets_gradients_later_stays_dense_and_is_told_once(caplog):
    run = run_of(begins=20).to(TOTAL)
    assert run.model.branch.weight.all() and abs(zeros_of(run) - 0.6 * USED) <= 4
    late = [line for line in warned(caplog) if "have one now" in line]
    assert late == [
        "1 of the parameters and experts that had no gradient when the window began have one now, such as"
        " branch.weight: they stay dense. If they are to decay, begin the window later (start)"
    ]


def test_what_has_a_gradient_in_time_decays(caplog):
    run = run_of(begins=START - 2, target=decaying(0.6, scope="layer")).to(TOTAL)
    assert int((run.model.branch.weight == 0).sum()) == pytest.approx(0.6 * 64 * 160, abs=1)
    assert "branch" not in "".join(warned(caplog))


def hooked(params, lr):
    optimizer = torch.optim.SGD(params, lr=10 * lr, momentum=0.9)
    add_lp_decay(optimizer)
    return optimizer


@pytest.mark.parametrize("make", [hooked, LpLion, lambda params, lr: LpSGD(params, lr=10 * lr, momentum=0.9)])
def test_other_optimizers_know_it_by_their_momentum(make, caplog):
    run = run_of(make=make, lr=1e-3, target=decaying(0.6, start=0.2)).to(TOTAL)
    assert run.model.branch.weight.all() and run.model.experts[1].all()
    assert abs(zeros_of(run) - 0.6 * USED) <= 4


def test_without_moments_nothing_is_known_and_all_decay(caplog):
    run = run_of(make=lambda params, lr: LpSGD(params, lr=10 * lr)).to(TOTAL)
    assert abs(zeros_of(run) - 0.6 * ALL) <= 4 and "gradient" not in "".join(warned(caplog))


def adafactor(params, lr):
    """It keeps second moments of vectors, and of matrices their rows and columns."""
    optimizer = Adafactor(params, lr=lr, scale_parameter=False, relative_step=False)
    add_lp_decay(optimizer)
    return optimizer


def with_and_without_momentum(params, lr):
    params = list(params)
    return LpSGD(
        [{"params": params[:2], "momentum": 0.9}, {"params": params[2:], "momentum": 0.0}], lr=10 * lr, momentum=0.9
    )


@pytest.mark.parametrize(
    "make, left, named",
    [(adafactor, 64 * 160, "branch.weight"), (with_and_without_momentum, 2 * 64 * 64, "experts[1:2]")],
)
def test_what_is_kept_in_another_form_or_not_at_all_is_not_taken_for_none(make, left, named, caplog):
    """Adafactor has no state of the branch alone; of the others, that have no momentum, nothing is known."""
    run = run_of(make=make, lr=1e-3).to(TOTAL)
    assert abs(zeros_of(run) - 0.6 * (ALL - left)) <= 4
    (line,) = [line for line in warned(caplog) if "gradient" in line]
    assert named in line and f"of the other {ALL - left:,} weights" in line


@pytest.mark.parametrize("step", [3, START + 1, 30, TOTAL - 4])
def test_a_run_that_is_resumed_leaves_out_the_same(step):
    expected = run_of(begins=35).to(TOTAL)
    first = run_of(begins=35).to(step)
    state = json.dumps(first.attached.state_dict(), allow_nan=False)
    second = run_of(begins=35)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.attached.load_state_dict(json.loads(state))
    second.taken, second.model.calls = step, step
    assert json.dumps(second.attached.state_dict(), allow_nan=False) == state
    second.to(TOTAL)
    assert same(second.weights(), expected.weights())
    assert second.attached.state_dict() == expected.attached.state_dict()


def test_a_state_can_be_loaded_over_another_division():
    """A run that has divided its experts goes back to a state in which they are undivided, and on from there."""
    before = run_of(scheduled=False).to(3)
    model, optimizer = copy.deepcopy(before.model.state_dict()), copy.deepcopy(before.optimizer.state_dict())
    state = before.attached.state_dict()
    run = run_of(scheduled=False).to(20)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    run.attached.load_state_dict(state)
    run.taken = run.model.calls = 3
    assert [s.name for s in run.attached.weight_controller.parameter_map.of(run.model.experts)] == ["experts"]
    assert same(run.to(TOTAL).weights(), before.to(TOTAL).weights())


@pytest.mark.parametrize("zeros", [False, True])
def test_where_nothing_has_a_gradient_it_is_said_before_anything_decays(zeros):
    run = run_of(zeros=zeros, names=["branch.weight"])
    with pytest.raises(UsageError, match="at step 6, none of the weights .* has had a gradient.*begin the window la"):
        run.to(TOTAL)
    assert run.taken == START


def test_a_share_of_all_parameters_that_the_rest_can_not_reach_is_refused_when_that_is_known():
    share = 0.95 * USED / sum(param.numel() for param in Branches().parameters())
    run_of(target=decaying(share, relative_to="all")).to(TOTAL)
    run = run_of(target=decaying(share / 0.9, relative_to="all"))
    with pytest.raises(UsageError, match=f"only {USED:,} of the weights .* have had a gradient, and the target needs"):
        run.to(TOTAL)


def test_the_values_that_a_script_sets_hold_of_all_experts():
    run = run_of(overrides={"experts": {"p": 0.0}}, target=decaying(0.6, scope="layer")).to(20)
    parameter_map = run.attached.weight_controller.parameter_map
    sections = parameter_map.of(run.model.experts)
    assert [s.name for s in sections] == ["experts[0:1]", "experts[1:2]", "experts[2:3]", "experts[3:4]"]
    assert [parameter_map.values(s.name)["p"] for s in sections] == [0.0] * 4
    run.attached.set("experts", l2=0.25)
    assert [parameter_map.values(s.name)["l2"] for s in sections] == [0.25] * 4


def test_in_blocks_of_a_pattern_experts_are_not_told_apart():
    """As many become zero in each block, so that none is the first to go."""
    run = run_of(target=decaying(pattern="2:4"), names=["0.weight", "2.weight", "branch.weight"]).to(TOTAL)
    assert run.model.branch.weight.all()
    assert (run.model[0].weight.view(-1, 4) == 0).sum(1).eq(2).all()


# -- real models --------------------------------------------------------------


def trained_on(tokens: Tensor, name: str, **target: Any) -> Any:
    model = ARCHITECTURES[name].model()
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    attached = attach(model, optimizer, target=decaying(0.5, **target), total_steps=20)
    for _ in range(20):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step()
    attached.finish()
    return model, attached


@pytest.mark.parametrize("groups", [None, "channels"])
def test_a_vision_tower_stays_as_it_is_under_text_alone(groups, caplog):
    model, attached = trained_on(
        torch.arange(10, 34).view(2, 12),
        "Qwen2_5_VLForConditionalGeneration",
        **({"groups": groups} if groups else {}),
    )
    zeros, elements = 0, 0
    for name in matrix_names(model):
        weights = model.get_parameter(name)
        if "visual" in name:
            assert weights.all()
        else:
            zeros, elements = zeros + int((weights == 0).sum()), elements + weights.numel()
    if groups is None:
        assert abs(zeros - elements / 2) <= 1 and attached.logs["lp/measured"] == zeros / elements
    else:
        assert zeros and attached.logs["lp/groups_measured"] == 0.5
    assert "visual" in "".join(warned(caplog))


def test_experts_that_get_no_tokens_stay_dense(caplog):
    """One token alone reaches two of the experts of each layer."""
    model, _ = trained_on(torch.full((2, 6), 7), "MixtralForCausalLM")
    for name, weights in model.named_parameters():
        if ".experts." in name:
            unused = [i for i, matrix in enumerate(weights) if matrix.all()]
            assert 1 <= len(unused) < len(weights), name
    assert "experts of stacked parameters" in "".join(warned(caplog))


# -- groups -------------------------------------------------------------------


def sets_of(model: nn.Module):
    def channels(name, inner, outer):
        members = [Member(f"{inner}.weight", 0, 0, 160), Member(f"{outer}", 1, 0, 160, reads=True)]
        return weight_groups(model, name, "channels", 160, members)

    return [channels("used", "0", "2.weight"), channels("unused", "branch", "out.weight")]


class TwoBlocks(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(160, 64)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_groups_of_modules_that_no_gradient_reaches_stay(scope, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(1)
    model = TwoBlocks()
    target = decaying(0.25, groups=sets_of(model), scope=scope)
    run = TargetRun(target, model=model).to(TOTAL)
    run.attached.finish()
    assert model.branch.weight.all() and model.out.weight.all()
    assert int((model[2].weight == 0).all(0).sum()) == 40
    assert run.attached.logs["lp/groups_measured"] == run.attached.group_controller.sparsity == 0.25
    (line,) = warned(caplog)
    assert line.startswith(
        "the groups of 1 module (such as unused) had no gradient when the window began, and stay as they are: the loss"
        " says nothing of them. The target holds of the groups of the other 1."
    )
    assert "prune 40 channels in 1 modules" in caplog.text
    state = json.loads(json.dumps(run.attached.state_dict()))
    assert state["groups"]["left_out"] == ["unused channels"]


def test_groups_are_left_out_again_when_a_run_is_resumed():
    def run_to(step: int) -> TargetRun:
        torch.manual_seed(1)
        model = TwoBlocks()
        return TargetRun(decaying(0.25, groups=sets_of(model), scope="global"), model=model).to(step)

    expected, first, second = run_to(TOTAL), run_to(25), run_to(0)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.attached.load_state_dict(json.loads(json.dumps(first.attached.state_dict())))
    second.taken = 25
    assert same(second.to(TOTAL).weights(), expected.weights())


def test_where_no_module_with_groups_has_a_gradient_it_is_said():
    torch.manual_seed(1)
    model = TwoBlocks()
    run = TargetRun(decaying(0.25, groups=sets_of(model)[1:]), model=model)
    with pytest.raises(UsageError, match="none of their modules has had a gradient.*begin the window later"):
        run.to(TOTAL)
