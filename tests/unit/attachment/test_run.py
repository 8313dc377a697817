"""A run is what happens after `attach`: its steps are its own, a state says what it is of, and an end inside of the
window is told.
"""

from __future__ import annotations

import gc
import logging
from copy import deepcopy

import pytest
import schedulefree
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.targets import END, FINAL_PRUNING, START, TOTAL, TargetRun, backward, decaying, model_of, same
from lp_dist import (
    LpAdamW,
    LpLion,
    LpSGD,
    add_lp_decay,
    attach,
    measure_sparsity,
    param_groups,
)
from lp_dist.errors import UsageError

HALF = decaying(0.5)


def hooked(params, lr) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    add_lp_decay(optimizer)
    return optimizer


ALL = pytest.mark.parametrize("make", [LpAdamW, LpLion, LpSGD, hooked])


def share(run: TargetRun) -> float:
    """What is zero, counted here."""
    params = dict(run.model.named_parameters())
    counted = [params[name] for name in run.attached.decayed]
    return sum(int((param == 0).sum()) for param in counted) / sum(param.numel() for param in counted)


def used(make=LpAdamW, steps: int = 25) -> TargetRun:
    """A dense run, whose optimizer has taken some steps."""
    run = TargetRun(None, make=make, scheduled=False)
    return run.to(steps)


# -- the steps of the run -----------------------------------------------------


@ALL
def test_the_steps_of_a_used_optimizer_are_not_those_of_the_run(make):
    run = used(make)
    run.target, run.taken = HALF, 0
    run.attach()
    run.to(TOTAL)
    assert run.attached.steps.taken == TOTAL and run.attached.weight_controller.window.start == START
    assert share(run) == pytest.approx(0.5, abs=1e-4)


@ALL
def test_the_state_of_a_dense_run_that_is_loaded_after_attach_moves_no_window(make):
    dense = used(make)
    run = TargetRun(HALF, make=make, scheduled=False)
    run.optimizer.load_state_dict(deepcopy(dense.optimizer.state_dict()))
    run.to(TOTAL)
    assert run.attached.steps.taken == TOTAL and share(run) == pytest.approx(0.5, abs=1e-4)


def test_a_target_after_a_target_is_refused_for_its_zeros_before_the_first_step():
    run = TargetRun(HALF).to(TOTAL)
    run.attach()
    with pytest.raises(UsageError, match=r"is 50.0% zeros already, and the target is 50.0%"):
        run.attached.begin()
    weights = run.weights()
    backward(run.model, 0)
    with pytest.raises(UsageError, match="zeros already"):
        run.optimizer.step()
    assert same(run.weights(), weights)
    run.target, run.taken = decaying(0.7), 0
    run.attach()
    assert share(run.to(TOTAL)) == pytest.approx(0.7, abs=1e-4)


def test_a_run_that_has_steps_behind_it_says_so_and_its_window_must_lie_ahead():
    run = TargetRun(decaying(0.5, start=30, end=55), first_step=20)
    run.to(40)
    assert run.attached.steps.taken == 60 and share(run) == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(
        UsageError, match=r"the run is at step 20, and the window of the weights began at 6.*start, end"
    ):
        TargetRun(HALF, first_step=20)


# -- what a state is of -------------------------------------------------------


@ALL
def test_a_state_from_the_middle_of_a_window_is_not_stepped_without_the_target(make):
    run = TargetRun(HALF, make=make, scheduled=False).to(30)
    other = TargetRun(None, make=make, scheduled=False, attached=False)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))
    weights = other.weights()
    backward(other.model, 30)
    with pytest.raises(UsageError, match="from the middle of a target's window, and no target goes on with it"):
        other.optimizer.step()
    other.attach()  # without a target
    with pytest.raises(UsageError, match="no target goes on with it"):
        other.optimizer.step()
    other.target = HALF
    other.attach()  # whose state is not loaded
    with pytest.raises(UsageError, match="no target goes on with it"):
        other.optimizer.step()
    assert same(other.weights(), weights)
    other.attach()
    other.attached.load_state_dict(run.attached.state_dict())
    other.taken = 30
    assert same(other.to(TOTAL).weights(), run.to(TOTAL).weights())


@pytest.mark.parametrize("taken", [3, TOTAL - 3], ids=["before the window", "after it"])
def test_a_state_from_outside_of_the_window_is_any_optimizers(taken):
    run = TargetRun(HALF, scheduled=False).to(taken)
    other = TargetRun(None, scheduled=False, attached=False)
    other.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))
    other.step()


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_distributed_checkpoints_keep_the_mark_of_an_open_window(tmp_path, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    run = TargetRun(HALF, scheduled=False).to(30)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options)}, checkpoint_id=tmp_path
    )
    other = TargetRun(None, scheduled=False, attached=False)
    state = {"optimizer": get_optimizer_state_dict(other.model, other.optimizer, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"], options=options)
    backward(other.model, 30)
    with pytest.raises(UsageError, match="from the middle of a target's window"):
        other.optimizer.step()


def test_another_state_in_the_middle_of_a_run_needs_the_targets_own():
    run = TargetRun(HALF, scheduled=False).to(20)
    weights, optimizer_state, own_state = deepcopy(
        (run.model.state_dict(), run.optimizer.state_dict(), run.attached.state_dict())
    )
    expected = run.to(TOTAL).weights()
    run = TargetRun(HALF, scheduled=False).to(25)
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(optimizer_state)
    backward(run.model, 20)
    with pytest.raises(UsageError, match="a state was loaded into the optimizer in the middle of the run"):
        run.optimizer.step()
    run.attached.load_state_dict(own_state)
    run.taken = 20
    assert same(run.to(TOTAL).weights(), expected)


def test_a_finished_run_is_gone_on_with_for_more_steps_and_keeps_its_zeros():
    run = TargetRun(HALF, scheduled=False).to(TOTAL)
    zeros = {name: weights == 0 for name, weights in run.weights().items()}
    longer = TargetRun(HALF, scheduled=False, total=90)
    longer.model.load_state_dict(run.model.state_dict())
    longer.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))
    longer.attached.load_state_dict(run.attached.state_dict())
    longer.taken = TOTAL
    weights = longer.to(90).weights()
    longer.attached.finish()
    assert all((weights[name][zeros[name]] == 0).all() for name in longer.attached.decayed)
    assert longer.attached.logs["lp/measured"] == share(longer) == pytest.approx(0.5, abs=1e-4)
    assert not same(weights, run.weights())
    middle = TargetRun(HALF, scheduled=False).to(FINAL_PRUNING - 1)
    with pytest.raises(UsageError, match="trained for another window of weights"):
        TargetRun(HALF, scheduled=False, total=90).attached.load_state_dict(middle.attached.state_dict())


# -- one attachment at a time -------------------------------------------------


def test_what_an_earlier_attach_returned_is_void():
    """One optimizer over two models, as an actor and a critic have it."""
    actor, critic = model_of(), model_of()
    optimizer = LpAdamW([*actor.parameters(), *critic.parameters()], lr=1e-3)
    first = attach(actor, optimizer, target=HALF, total_steps=TOTAL)
    attach(critic, optimizer, target=decaying(0.3), total_steps=TOTAL)
    for use in (
        first.after_step,
        first.finish,
        first.begin,
        first.state_dict,
        lambda: first.load_state_dict({}),
        lambda: first.set("0.weight", p=0.6),
    ):
        with pytest.raises(UsageError, match=r"a later one on the same optimizer has replaced.*nn.ModuleDict"):
            use()


def test_two_models_in_one_optimizer_are_attached_together():
    models = nn.ModuleDict({"actor": model_of(), "critic": model_of()})
    optimizer = LpAdamW(models.parameters(), lr=3e-3)
    attached = attach(models, optimizer, target=HALF, total_steps=TOTAL)
    for step in range(TOTAL):
        for model in models.values():
            backward(model, step)
        optimizer.step()
        attached.after_step()
    params = [param for name, param in models.named_parameters() if name in attached.decayed]
    assert len(params) == 6
    counted = sum(int((param == 0).sum()) for param in params) / sum(param.numel() for param in params)
    assert attached.logs["lp/measured"] == counted == pytest.approx(0.5, abs=1e-4)


# -- the end ------------------------------------------------------------------


@ALL
def test_a_forgotten_after_step_is_told_soon(make):
    run = TargetRun(HALF, make=make, scheduled=False).to(2)
    for _ in range(2 * run.attached.weight_controller.update_every + 1):
        run.step()
    with pytest.raises(UsageError, match="was not called after the last 5 steps, up to step 7 of the run"):
        run.step()
    assert run.attached.steps.taken == 7


def warnings_of(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("taken", [START + 10, 3, 0, END, TOTAL])
def test_a_run_that_is_dropped_inside_of_its_window_says_where_it_stood(caplog, taken):
    run = TargetRun(HALF).to(taken)
    caplog.clear()
    counted = run.attached.logs.get("lp/measured", 0.0)
    del run
    gc.collect()
    lines = warnings_of(caplog)
    assert ("ended inside of its window" in lines) == (0 < taken < END)
    if taken == START + 10:
        assert f"of the weights 50.00% were to be zero by step {END}, and at step {taken} {counted:.2%} were" in lines


def test_a_run_that_was_finished_or_asked_for_its_end_is_not_told_again(caplog):
    finished, stopped = TargetRun(HALF).to(20), TargetRun(HALF).to(20)
    finished.attached.finish()
    assert share(finished) == pytest.approx(0.5, abs=1e-4)
    stopped.attached.warn_if_unfinished()
    caplog.clear()
    del finished, stopped
    gc.collect()
    assert "ended inside" not in warnings_of(caplog)


def test_finish_counts_what_is_there(caplog):
    run = TargetRun(HALF).to(TOTAL)
    run.attached.finish()
    assert not warnings_of(caplog)
    with torch.no_grad():
        run.model[2].weight.copy_(model_of()[2].weight)
    run.attached.finish()
    assert "and 50.00 % were after the final pruning: other weights were loaded since" in warnings_of(caplog)
    assert run.attached.logs["lp/measured"] == share(run) < 0.3


# -- a model that comes sparse ------------------------------------------------


def sparse() -> nn.Sequential:
    model = model_of()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                param[torch.rand(param.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0.0
    return model


def attached_with(**group):
    def begin(model):
        optimizer = LpAdamW(model.parameters(), lr=1e-3, **group)
        attach(model, optimizer)
        return optimizer

    return begin


@pytest.mark.parametrize(
    "begin, warned",
    [
        (lambda model: LpAdamW(model.parameters(), lr=1e-3), True),
        (lambda model: LpAdamW(param_groups(model, 1.0), lr=1e-3, phase="frozen"), False),
        (attached_with(), True),
        (attached_with(weight_decay=1.0, phase="frozen"), False),
        (lambda model: TargetRun(decaying(0.7), model=model).optimizer, False),
    ],
    ids=["alone", "frozen", "attached", "attached frozen", "a target"],
)
def test_zeros_that_nothing_keeps_are_told_once_with_the_line_that_keeps_them(caplog, begin, warned):
    model = sparse()
    zeros = [param == 0 for param in model.parameters() if param.ndim == 2]
    optimizer = begin(model)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    lines = [record.getMessage() for record in caplog.records if "nothing keeps them" in record.getMessage()]
    assert len(lines) == warned
    matrices = [param for param in model.parameters() if param.ndim == 2]
    kept = all(bool((param[was] == 0).all()) for param, was in zip(matrices, zeros))
    if optimizer.param_groups[0]["phase"] == "frozen":
        assert kept
    if warned:
        assert not kept and 'param_groups(model, 1.0), lr=..., phase="frozen")' in lines[0] and "49.8 %" in lines[0]


def test_zeros_of_an_initialisation_are_not_told(caplog):
    model = model_of()
    nn.init.zeros_(model[2].weight)
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    backward(model, 0)
    optimizer.step()
    assert "nothing keeps them" not in warnings_of(caplog)


# -- weights that are kept elsewhere ------------------------------------------


def test_an_average_that_begins_behind_the_window_has_the_zeros():
    run = TargetRun(HALF).to(END)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    while run.taken < TOTAL:
        run.to(run.taken + 1)
        average.update_parameters(run.model)
    assert share(run) == pytest.approx(0.5, abs=1e-4)
    assert measure_sparsity(average, names={f"module.{name}" for name in run.attached.decayed}).total == share(run)


def test_an_optimizer_that_swaps_the_weights_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="AdamWScheduleFree has a train.. and an eval.."):
        add_lp_decay(schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-3))


class WithMasters(torch.optim.Optimizer):
    """Keeps fp32 masters in its state and writes them over the weights, as optimizers for bf16 weights do."""

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["master"] = param.float().clone()
                state["master"].sub_(param.grad.float(), alpha=group["lr"])
                param.copy_(state["master"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_in_the_state_are_refused_at_the_first_step(dtype):
    model = model_of().to(dtype)
    optimizer = WithMasters(model.parameters())
    add_lp_decay(optimizer)
    attach(model, optimizer, target=HALF, total_steps=TOTAL)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(UsageError, match=r"WithMasters keeps a copy of the weights in its state \('master'\)"):
        optimizer.step()


class Lookahead:
    """Wraps an optimizer, and writes slow weights over the fast ones every few steps."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.calls = optimizer, 0
        self.slow = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.calls += 1
        if self.calls % 5 == 0:
            params = [param for group in self.optimizer.param_groups for param in group["params"]]
            for slow, param in zip(self.slow, params):
                slow.lerp_(param, 0.5)
                param.copy_(slow)


def test_a_wrapper_that_may_keep_weights_of_its_own_is_refused_and_what_it_does_is_counted(caplog):
    model = model_of()
    optimizer = Lookahead(LpAdamW(model.parameters(), lr=3e-3))
    with pytest.raises(RuntimeError, match=r"Lookahead is wrapped around LpAdamW.*attach\(model, wrapper.optimizer\)"):
        attach(model, optimizer, target=HALF, total_steps=TOTAL)
    attached = attach(model, optimizer.optimizer, target=HALF, total_steps=TOTAL)
    for step in range(TOTAL):
        backward(model, step)
        optimizer.step()
        attached.after_step()
    attached.finish()
    params = [param for name, param in model.named_parameters() if name in attached.decayed]
    counted = sum(int((param == 0).sum()) for param in params) / sum(param.numel() for param in params)
    assert attached.logs["lp/measured"] == counted < 0.4
    assert "something else sets them" in warnings_of(caplog)


# -- a step that a CUDA graph repeats -----------------------------------------


@pytest.mark.parametrize("arguments", [{"target": HALF, "total_steps": TOTAL}, {"scheduled": {"phase": ["off"]}}])
def test_what_changes_the_values_of_a_captured_step_is_refused(arguments):
    model = model_of()
    optimizer = LpAdamW(model.parameters(), lr=1e-3, capturable=True)
    with pytest.raises(UsageError, match="capturable=True is for a step that a CUDA graph repeats.*capturable=False"):
        attach(model, optimizer, **arguments)
    attached = attach(model, optimizer, overrides={"0.weight": {"weight_decay": 0.1}})
    with pytest.raises(ValueError, match="a CUDA graph may repeat a step with the values of its capture.*overrides="):
        attached.set("0.weight", weight_decay=0.2)
