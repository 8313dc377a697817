"""lp_dist.optim.hooks: the decay on other people's optimizers equals their step without decay, followed by lp_decay by
hand; closures, exceptions, loss scaling, checkpoints, removal, and what is refused.
"""

import copy
import importlib
import math
import warnings
from functools import partial

import pytest
import torch

from helpers.optimizers import assert_same, make_params, set_grads, train
from lp_dist.optim.decay import lp_decay
from lp_dist.optim.hooks import add_lp_decay
from lp_dist.optim.optimizers import LpAdamW, LpSGD

MEMORY = {None: "largest tensor", True: "largest tensor", False: "copy"}  # for torch.optim's own optimizers
SETTINGS = {"p": 1.0, "l2": 0.1, "cutoff": 1.2, "regrowth_below": 0.05}
BASES = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.02, "foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.02, "fused": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.02}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    BASES["Muon"] = (torch.optim.Muon, {"lr": 0.02})
modes = pytest.mark.parametrize("one_at_a_time", [None, True, False])
bases = pytest.mark.parametrize(("cls", "kwargs"), BASES.values(), ids=BASES.keys())


class NormedSGD(torch.optim.Optimizer):
    """Stands for a third party's optimizer: the step of each weight depends on the gradients of ALL of them, so it is
    wrong to step one tensor at a time. It notes the weight_decay that it sees, and skips the step where found_inf says
    so.
    """

    def __init__(self, params, lr=0.05, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.seen = []

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "found_inf", None) is not None and self.found_inf.item():
            return loss
        params = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = sum(p.grad.square().sum() for p, _ in params).sqrt()
        for param, group in params:
            self.seen.append(group["weight_decay"])
            param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(param.grad / norm, alpha=group["lr"])
        return loss


def params_for(cls, dtype=torch.float32):
    """The awkward parameters without the empty ones; Muon takes matrices only."""
    return [p for p in make_params(dtype) if p.numel() and (cls.__name__ != "Muon" or p.ndim == 2)]


def hooked(cls, kwargs, params, one_at_a_time=None, weight_decay=0.4, **settings):
    optimizer = cls(params, weight_decay=weight_decay, **kwargs)
    return optimizer, add_lp_decay(optimizer, one_at_a_time=one_at_a_time, **settings)


def train_by_hand(plain, params, steps, weight_decay=0.4, first=0, **settings):
    """Steps of an optimizer without decay of its own, each followed by lp_decay."""
    for step in range(first, first + steps):
        set_grads(params, step)
        old = [p.detach().clone() for p in params]
        plain.step()
        lr = plain.param_groups[0]["lr"]
        for param, w_old in zip(params, old, strict=True):
            param.data.copy_(lp_decay(param.detach(), w_old, lr=lr, weight_decay=weight_decay, **settings))
    return params


def squared_loss(optimizer, params, calls):
    """A closure that clears the gradients, computes them and counts itself in `calls`."""

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    return closure


# --- equality
# -----------------------------------------------------------------------------


@bases
@modes
def test_equals_the_base_step_followed_by_the_decay(cls, kwargs, one_at_a_time):
    params, others = params_for(cls), params_for(cls)
    optimizer, handle = hooked(cls, kwargs, params, one_at_a_time, **SETTINGS)
    assert handle.memory == MEMORY[one_at_a_time]
    train(optimizer, params, 10)
    assert_same(params, train_by_hand(cls(others, weight_decay=0.0, **kwargs), others, 10, **SETTINGS))
    assert optimizer.param_groups[0]["weight_decay"] == 0.4


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("native", "base", "kwargs"),
    [
        (partial(LpAdamW, precondition=0.0), torch.optim.AdamW, {"lr": 0.02}),
        (LpSGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    ],
)
def test_equals_our_own_optimizer(native, base, kwargs, dtype, one_at_a_time):
    params, others = make_params(dtype), make_params(dtype)
    optimizer, _ = hooked(base, {**kwargs, "foreach": False}, params, one_at_a_time)
    train(optimizer, params, 10)
    assert_same(params, train(native(others, weight_decay=0.4, implementation="reference", **kwargs), others, 10))


def test_a_third_partys_optimizer_is_stepped_in_one_call():
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer, handle = hooked(NormedSGD, {}, params, **SETTINGS)
    assert handle.memory == "copy"
    train(optimizer, params, 5)
    assert_same(params, train_by_hand(NormedSGD(others), others, 5, **SETTINGS))
    assert set(optimizer.seen) == {0.0}


def test_a_subclass_of_a_torch_optimizer_is_a_third_partys():
    class Mine(torch.optim.AdamW):
        pass

    assert hooked(Mine, {}, make_params(torch.float32))[1].memory == "copy"
    assert hooked(Mine, {}, make_params(torch.float32), True)[1].memory == "largest tensor"


@modes
def test_groups_differ_and_change_between_steps(one_at_a_time):
    params, others = make_params(torch.float64), make_params(torch.float64)

    def groups(of):
        return [
            {"params": of[:1], "weight_decay": 0.4, "p": 0.0, "cutoff": 2.0},
            {"params": of[1:5], "weight_decay": 0.0},
            {"params": of[5:6], "l2": 0.5},
        ]

    optimizer = torch.optim.AdamW(groups(params), lr=0.02, weight_decay=0.2)
    add_lp_decay(optimizer, p=1.0, l2=0.25, one_at_a_time=one_at_a_time)
    assert [[g[key] for key in ("p", "l2", "cutoff")] for g in optimizer.param_groups] == [
        [0.0, 0.25, 2.0],
        [1.0, 0.25, math.inf],
        [1.0, 0.5, math.inf],
    ]
    optimizer.add_param_group({"params": params[6:]})  # after the hook: decayed all the same
    native = LpAdamW(
        groups(others), lr=0.02, weight_decay=0.2, p=1.0, l2=0.25, precondition=0.0, implementation="reference"
    )
    native.add_param_group({"params": others[6:], "p": 1.0, "l2": 0.25})
    for step in range(6):
        for opt, weights in ((optimizer, params), (native, others)):
            opt.param_groups[0].update(weight_decay=0.1 * step, p=1.0 - 0.2 * step, lr=0.02 / (1 + step))
            set_grads(weights, step)
            opt.step()
    assert_same(params, others)


@modes
def test_parameters_without_gradient_are_left_alone(one_at_a_time):
    params = make_params(torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer, _ = hooked(torch.optim.AdamW, {"lr": 0.1}, params, one_at_a_time)
    optimizer.step()
    assert_same(params, start)
    optimizer.step(
        squared_loss(optimizer, params[1:], [])
    )  # the closure makes the gradients, after the hook has looked
    assert torch.equal(params[0], start[0])
    assert not torch.equal(params[1], start[1])


@modes
@pytest.mark.parametrize("early", [True, False])
def test_with_a_learning_rate_scheduler(one_at_a_time, early):
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer = torch.optim.AdamW(params, lr=0.04, weight_decay=0.4)
    if not early:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    add_lp_decay(optimizer, one_at_a_time=one_at_a_time)
    if early:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    plain = torch.optim.AdamW(others, lr=0.04, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler must not think that its optimizer never stepped
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
            train_by_hand(plain, others, 1, first=step)
            plain.param_groups[0]["lr"] *= 0.5
    assert_same(params, others)


@modes
@pytest.mark.parametrize("manner", ["one group at a time", "the other groups empty"])
def test_zero_calls_step_once_per_group(one_at_a_time, manner):
    """ZeRO-1 and 2 put a one-group list in place of param_groups; ZeRO-3 empties the others' params (traps.md, 5)."""
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.02, weight_decay=0.4)
    add_lp_decay(optimizer, one_at_a_time=one_at_a_time)
    groups, held = optimizer.param_groups, [g["params"] for g in optimizer.param_groups]
    for step in range(4):
        set_grads(params, step)
        for i, group in enumerate(groups):
            if manner == "one group at a time":
                optimizer.param_groups = [group]
            else:
                groups[0]["params"], groups[1]["params"] = (held[0], []) if i == 0 else ([], held[1])
            optimizer.step()
            optimizer.param_groups = groups
            groups[0]["params"], groups[1]["params"] = held
            assert [g["weight_decay"] for g in groups] == [0.4, 0.4]
    assert_same(params, train_by_hand(torch.optim.AdamW(others, lr=0.02, weight_decay=0.0), others, 4))


@bases
@modes
def test_closure_is_called_once_and_its_loss_returned(cls, kwargs, one_at_a_time):
    params, others = params_for(cls), params_for(cls)
    optimizer, _ = hooked(cls, kwargs, params, one_at_a_time)
    plain, calls = cls(others, weight_decay=0.4, **kwargs), []
    add_lp_decay(plain, one_at_a_time=False)
    for _ in range(3):
        expected = squared_loss(plain, others, [])()
        plain.step()
        loss = optimizer.step(squared_loss(optimizer, params, calls))
        assert torch.equal(loss, expected)
    assert len(calls) == 3
    assert_same(params, others)
    assert optimizer.step() is None


@modes
@pytest.mark.parametrize("cls", [torch.optim.AdamW, NormedSGD])
def test_an_exception_in_the_closure_restores_everything(cls, one_at_a_time):
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer, _ = hooked(cls, {"lr": 0.02}, params, one_at_a_time if cls is torch.optim.AdamW else None)

    def fails():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["weight_decay"] == 0.4
    assert optimizer.param_groups[0]["params"] == params
    assert_same(params, others)
    train(optimizer, params, 3)
    assert_same(params, train_by_hand(cls(others, lr=0.02, weight_decay=0.0), others, 3))


@modes
def test_after_an_error_in_the_base_step_the_next_step_and_save_are_right(one_at_a_time):
    """torch calls no hook when a step raises, so the coefficient comes back at the latest when it is next needed."""
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer, _ = hooked(torch.optim.AdamW, {"lr": 0.02}, params, one_at_a_time)
    params[0].grad = params[0].detach().to_sparse()  # AdamW refuses it
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == params
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0.4
    train(optimizer, params, 2)
    assert optimizer.param_groups[0]["weight_decay"] == 0.4
    assert_same(params, train_by_hand(torch.optim.AdamW(others, lr=0.02, weight_decay=0.0), others, 2))


@modes
def test_the_base_sees_no_decay_and_other_hooks_run_once(one_at_a_time, monkeypatch):
    seen, hooks = [], []
    module = importlib.import_module("torch.optim.sgd")  # torch.optim hides its modules
    base = module.sgd
    monkeypatch.setattr(module, "sgd", lambda *a, **kw: (seen.append(kw["weight_decay"]), base(*a, **kw)))
    params = make_params(torch.float32)
    optimizer = torch.optim.SGD(params, lr=0.02, weight_decay=0.4)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: hooks.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: hooks.append("post"))
    add_lp_decay(optimizer, one_at_a_time=one_at_a_time)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: hooks.append("late pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: hooks.append("late post"))
    train(optimizer, params, 2)
    assert seen and set(seen) == {0.0}
    assert sorted(hooks) == sorted(["pre", "late pre", "post", "late post"] * 2)


@modes
def test_a_step_skipped_by_the_loss_scaler_is_not_decayed(one_at_a_time):
    """A fused optimizer is called even when the gradients overflowed: it reads found_inf and does nothing."""
    params = params_for(torch.optim.AdamW)
    start = [p.detach().clone() for p in params]
    optimizer, _ = hooked(torch.optim.AdamW, {"lr": 0.02, "fused": True}, params, one_at_a_time)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (True, False):
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        scaler.scale(loss).backward()
        if overflow:
            params[-1].grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_same(params, start)
    others = params_for(torch.optim.AdamW)
    twin, _ = hooked(torch.optim.AdamW, {"lr": 0.02, "fused": True}, others, one_at_a_time)
    squared_loss(twin, others, [])()
    twin.step()
    assert_same(params, others)


def test_found_inf_is_heeded_for_a_third_partys_optimizer():
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer, _ = hooked(NormedSGD, {}, params)
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, 1)
    assert_same(params, others)
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, params, 1)
    assert_same(params, train_by_hand(NormedSGD(others), others, 1))


@modes
def test_removal_gives_the_base_its_own_decay_back(one_at_a_time):
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer, handle = hooked(torch.optim.AdamW, {"lr": 0.02}, params, one_at_a_time)
    train(optimizer, params, 2)
    handle.remove()
    train(optimizer, params, 2)
    plain = torch.optim.AdamW(others, lr=0.02, weight_decay=0.0)
    train_by_hand(plain, others, 2)
    plain.param_groups[0]["weight_decay"] = 0.4
    train(plain, others, 2)
    assert_same(params, others)
    assert add_lp_decay(optimizer, one_at_a_time=one_at_a_time).memory == MEMORY[one_at_a_time]
    plain.param_groups[0]["weight_decay"] = 0.0
    train(optimizer, params, 2)
    assert_same(params, train_by_hand(plain, others, 2))


@modes
@pytest.mark.parametrize("from_plain", [False, True])
def test_state_dict_round_trip(one_at_a_time, from_plain):
    """From a hooked optimizer's checkpoint, and from one saved before the hook came (its groups have no p, l2,
    cutoff).
    """
    params, others = make_params(torch.float32), make_params(torch.float32)
    if from_plain:
        optimizer = torch.optim.AdamW(params, lr=0.02, weight_decay=0.4)
        train(optimizer, params, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        add_lp_decay(optimizer, p=1.0, l2=0.1, one_at_a_time=one_at_a_time)
    else:
        optimizer, _ = hooked(torch.optim.AdamW, {"lr": 0.02}, params, one_at_a_time, p=1.0, l2=0.1)
        train(optimizer, params, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["param_groups"][0]["p"] == 1.0 and saved["param_groups"][0]["weight_decay"] == 0.4
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.detach())
    twin, _ = hooked(torch.optim.AdamW, {"lr": 0.5}, others, one_at_a_time, p=1.0 if from_plain else 0.0, l2=0.1)
    twin.load_state_dict(saved)
    train(optimizer, params, 3)
    train(twin, others, 3)
    assert_same(params, others)
    assert set(twin.state[others[0]]) == {"step", "exp_avg", "exp_avg_sq"}


@modes
def test_zero_learning_rate_or_decay_leaves_the_base_alone(one_at_a_time):
    for lr, weight_decay in ((0.0, 0.4), (0.02, 0.0)):
        params, others = make_params(torch.float32), make_params(torch.float32)
        optimizer, _ = hooked(torch.optim.SGD, {"lr": lr}, params, one_at_a_time, weight_decay=weight_decay)
        train(optimizer, params, 2)
        assert_same(params, train(torch.optim.SGD(others, lr=lr), others, 2))


@modes
def test_tensor_learning_rate(one_at_a_time):
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer, _ = hooked(torch.optim.SGD, {"lr": torch.tensor(0.03125)}, params, one_at_a_time)
    train(optimizer, params, 3)
    assert_same(params, train_by_hand(torch.optim.SGD(others, lr=0.03125), others, 3))


# --- refusals
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"p": 4.5}, "p.*4.5"), ({"l2": -0.25}, "l2.*-0.25"), ({"cutoff": math.nan}, "cutoff.*nan")],
)
def test_bad_hyperparameters_are_refused(settings, message):
    optimizer = torch.optim.AdamW(make_params(torch.float32))
    with pytest.raises(ValueError, match=message):
        add_lp_decay(optimizer, **settings)
    add_lp_decay(optimizer)  # the failed call left nothing behind


def test_a_group_that_is_added_later_is_checked_before_its_first_step():
    optimizer, handle = hooked(torch.optim.AdamW, {}, make_params(torch.float32))
    optimizer.add_param_group({"params": make_params(torch.float32), "weight_decay": 0.5})
    handle.check(optimizer.param_groups[1])  # it has no p yet
    with pytest.raises(ValueError, match=r"p=9.0 must be a number in"):
        handle.check({**optimizer.param_groups[1], "p": 9.0})


def test_a_second_hook_is_refused():
    optimizer, _ = hooked(torch.optim.AdamW, {}, make_params(torch.float32))
    with pytest.raises(ValueError, match="(?i)already|second|twice"):
        add_lp_decay(optimizer)


def test_lbfgs_is_refused():
    optimizer = torch.optim.LBFGS(make_params(torch.float32))
    optimizer.param_groups[0]["weight_decay"] = 0.1  # so that this is not what is wrong with it
    with pytest.raises(ValueError, match="LBFGS"):
        add_lp_decay(optimizer)


@pytest.mark.parametrize("missing", [True, False])
def test_a_group_without_learning_rate_is_refused(missing):
    """transformers' Adafactor has lr=None where it makes its own relative step."""
    optimizer = NormedSGD(make_params(torch.float32), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = None
    if missing:
        del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="lr"):
        add_lp_decay(optimizer)
