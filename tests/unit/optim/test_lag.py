"""The non-adiabatic variant: s lags behind |w|^(p−2), by one state tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lp_dist import LpAdamW, LpLion, LpSGD
from lp_dist.optim.base import LAGGED
from lp_dist.optim.hyperparameters import Phase

BASES = (LpAdamW, LpSGD, LpLion)


def stepped(
    weights: torch.Tensor, grads: list[torch.Tensor], make_optimizer=LpSGD, **values
) -> tuple[torch.Tensor, LpSGD]:
    w = nn.Parameter(weights.clone())
    optimizer = make_optimizer([w], **{"lr": 1e-2, "weight_decay": 0.05, "lag": 0.9, **values})
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()
    return w.detach(), optimizer


def draws(count: int, n: int = 200) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator), [torch.randn(n, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("p, lam", [(0.5, 1.0), (0.0, 0.05), (-1.0, 0.05)])
def test_against_an_oracle_in_float64(p, lam):
    weights, grads = draws(12)
    w, _ = stepped(weights.double(), [g.double() for g in grads], p=p, weight_decay=lam)
    oracle, s = weights.double().numpy().copy(), None
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for grad in grads:
            now = np.abs(oracle) ** (p - 2.0)
            s = now if s is None else 0.9 * s + 0.1 * now
            u = oracle - 1e-2 * grad.double().numpy()
            oracle = np.where(np.isinf(s), 0.0, u / (1.0 + 1e-2 * lam * s))
            oracle[np.abs(oracle) <= 1e-13] = 0.0
    assert 5 < (oracle == 0).sum() < 195
    np.testing.assert_allclose(w.numpy(), oracle, rtol=1e-10, atol=0)
    adiabatic, _ = stepped(weights.double(), [g.double() for g in grads], p=p, weight_decay=lam, lag=0.0)
    assert not torch.equal(w, adiabatic), "the lag changes nothing"


@pytest.mark.parametrize("base", BASES)
def test_both_loops_agree_and_without_lag_there_is_no_state(base):
    weights, grads = draws(8)
    loops = [
        stepped(weights, grads, base, implementation=implementation)[0] for implementation in ("reference", "foreach")
    ]
    assert torch.equal(*loops)
    _, plain = stepped(weights, grads, base, lag=0.0)
    assert all(LAGGED not in state for state in plain.state.values())


def test_zero_absorbs_for_good():
    weights, grads = draws(20)
    weights[:50] = 0.0
    w, optimizer = stepped(weights, grads)
    assert not w[:50].any() and torch.isinf(optimizer.state[optimizer.param_groups[0]["params"][0]][LAGGED][:50]).all()
    assert w[50:].any()


def test_phases_without_decay_leave_s_alone():
    weights, grads = draws(6)
    _w, optimizer = stepped(weights, grads[:3])
    (param,) = optimizer.param_groups[0]["params"]
    before = optimizer.state[param][LAGGED].clone()
    for phase in (Phase.OFF, Phase.FROZEN):
        zeros = param.detach() == 0
        optimizer.param_groups[0]["phase"] = phase.value
        param.grad = grads[4].clone()
        optimizer.step()
        assert torch.equal(optimizer.state[param][LAGGED], before)
        assert phase is Phase.OFF or torch.equal(param.detach() == 0, zeros), (
            "frozen means that zeros stay and none is added"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_have_it_in_fp32(dtype):
    weights, grads = draws(5)
    w, optimizer = stepped(weights.to(dtype), [g.to(dtype) for g in grads], p=0.0)
    (state,) = optimizer.state.values()
    assert state[LAGGED].dtype == torch.float32 and torch.isfinite(w).all()


def test_a_checkpoint_without_it_starts_it_anew_and_says_so(caplog):
    weights, grads = draws(6)
    w, first = stepped(weights, grads[:3], LpAdamW)
    saved = first.state_dict()
    for state in saved["state"].values():
        del state[LAGGED]
    param = nn.Parameter(w.clone())
    second = LpAdamW([param], lr=1e-2, weight_decay=0.05, lag=0.9)
    second.load_state_dict(saved)
    assert "starts anew" in caplog.text
    param.grad = grads[3].clone()
    second.step()
    alive = w != 0
    assert torch.allclose(second.state[param][LAGGED][alive], w[alive].abs() ** -1.5, rtol=1e-5)


@pytest.mark.parametrize("lag", [1.0, -0.1, math.nan, "a"])
def test_a_bad_lag_is_refused(lag):
    with pytest.raises(ValueError, match=r"lag=.* must be a number in \[0, 1\).*set it to 0"):
        LpAdamW([nn.Parameter(torch.ones(2))], lag=lag)
