"""lp_dist.hooks: closures, exceptions, loss scaling, checkpoints, removal, and what is refused."""

import copy
import importlib
import math

import pytest
import torch
from optim_cases import assert_same, make_params, train
from test_hooks import MEMORY, NormedSGD, bases, hooked, modes, params_for, squared_loss, train_by_hand

from lp_dist.optim.hooks import add_lp_decay


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
