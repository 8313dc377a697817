"""The fused step on a CPU against float64: the power that it approximates, and the decay made of it."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies

from helpers.optimizers import EXPONENTS, param_group_of
from lp_dist.optim.batching import StepRow
from lp_dist.optim.kernels import cpu, dispatch

NORMAL = torch.finfo(torch.float32).tiny
GAMMAS = (0.0, 0.37, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0)


@pytest.fixture(autouse=True)
def it_is_built():
    assert dispatch.unavailable(torch.device("cpu")) is None


def decayed(weights, **changed):
    """Weights after the decay alone: SGD with a gradient of zero."""
    weights = weights.clone()
    dispatch.step("cpu", "sgd", [(param_group_of(**changed), [StepRow(weights, torch.zeros_like(weights), (), 1.0)])])
    return weights


def decayed_in_metric(weights, denom, *, lr_weight_decay, **changed):
    """Weights after the preconditioned decay alone: Adam with betas of zero, whose √v̂ is |gradient|, at a rate that
    moves nothing.
    """
    weights = weights.clone()
    lr = 1e-36
    group = param_group_of(lr=lr, weight_decay=lr_weight_decay / lr, betas=(0.0, 0.0), eps=0.0, **changed)
    dispatch.step(
        "cpu",
        "adamw",
        [(group, [StepRow(weights, denom, (torch.zeros_like(weights), torch.zeros_like(weights)), 1.0)])],
    )
    return weights


def spread(n, low, high, seed, signed=False):
    """n numbers of magnitudes spread evenly over the decades between low and high."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.exp(
        torch.empty(n, dtype=torch.float64).uniform_(math.log(low), math.log(high), generator=generator)
    ).float()
    return magnitudes * torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if signed else magnitudes


def assert_within(got, weights, pull, bound):
    """got (fp32) against weights/(1 + pull) in float64, where fp32 has normal numbers for the factor and the result;
    next to nothing elsewhere.
    """
    exact = weights.double() / (1 + pull)
    there = (exact.abs() >= 2 * NORMAL) & (pull < 1e38)
    assert int(there.sum()) > 100
    error = ((got.double() - exact) / exact)[there].abs().max().item()
    assert error <= bound, error
    assert (got[~there].abs().double() <= 2 * NORMAL + weights[~there].abs().double() * 2e-38).all()


# --- the approximation
# -----------------------------------------------------------------------------


@pytest.fixture
def nothing_snaps(monkeypatch):
    monkeypatch.setattr(cpu, "SNAP", 0.0)


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_factor_over_all_normal_floats(nothing_snaps, p):
    weights = spread(4096, NORMAL, 3e38, 0, signed=True)
    for _seed, strength in enumerate((1e-37, 1e-20, 1e-9, 1e-4, 0.3, 1.0, 50.0, 1e10, 1e30)):
        pull = strength * weights.double().abs() ** (p - 2)
        got = decayed(weights, weight_decay=strength, p=p)
        assert_within(got, weights, pull, 1e-6 + 1.2e-7)  # of the factor, and the last division's own rounding
        # Where the factor is near 1 an error in x must not show at all: half a unit in the last place each for sum and
        # quotient
        near = pull < 0.01
        if int(near.sum()) > 200:
            assert_within(got[near], weights[near], pull[near], 1.4e-7)


@pytest.mark.parametrize("p", (-1.0, 0.0, 1.0, 2.0))
def test_integer_exponents_are_not_approximated(nothing_snaps, p):
    weights = spread(4096, 1e-9, 1e9, 1, signed=True)
    for strength in (1e-9, 1e-4, 0.3, 50.0):
        pull = strength * weights.double().abs() ** (p - 2)
        # half a unit each: k, three quotients, two products, sum, quotient
        assert_within(decayed(weights, weight_decay=strength, p=p), weights, pull, 5.5e-7)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_the_preconditioned_factor(nothing_snaps, p, gamma):
    weights, denom = spread(4096, 1e-12, 1e12, 2, signed=True), spread(4096, 1e-12, 1e12, 3)
    for strength in (1e-20, 1e-9, 1e-4, 0.3, 50.0, 1e10):
        # αλ·|w|^(p−2) alone has to be within fp32's range too, and the denominator with √v̂ in it
        alone = strength * weights.double().abs() ** (p - 2)
        inside = (alone < 1e38) & (denom.double() * (1 + alone * denom.double() ** -gamma) < 1e38)
        w, d = weights[inside], denom[inside]
        pull = strength * w.double().abs() ** (p - 2) * d.double() ** -gamma
        # more roundings than above: of the numerator and of the denominator, which both carry √v̂
        assert_within(decayed_in_metric(w, d, lr_weight_decay=strength, p=p, precondition=gamma), w, pull, 1e-6 + 3e-7)


@settings(max_examples=300, deadline=None)
@given(weight=strategies.floats(2**-126, 2**127, width=32), p=strategies.floats(-4, 4), log=strategies.floats(-37, 37))
def test_the_factor_of_any_weight(weight, p, log):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SNAP", 0.0)
        got = decayed(torch.tensor([weight]), weight_decay=10**log, p=p).double().item()
    pull = math.exp(min(700.0, log * math.log(10) + (p - 2) * math.log(weight)))
    exact = weight / (1 + pull)
    assert abs(got - exact) <= (1e-6 + 1.2e-7) * exact + 2 * NORMAL + weight * 2e-38


@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 0.37))
@pytest.mark.parametrize("p", EXPONENTS)
def test_special_weights(p, gamma):
    weights = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 1e-13, 3e38])
    got = decayed_in_metric(weights, torch.full((8,), 0.5), lr_weight_decay=1e-3, p=p, precondition=gamma)
    assert (got[:2].abs() <= (0.0 if p < 2 else 1e-35)).all()  # no more than the base's own step
    assert got[4].isnan()
    # for p > 2 the pull on an infinite weight is infinite, and inf/inf is nan in every implementation
    assert got[2] == math.inf and got[3] == -math.inf if p <= 2 else got[2:4].isnan().all() or got[2:4].isinf().all()
    if p < 2:
        assert got[5] == 0 and got[6] == 0  # a denormal counts as zero, and what is left below 1e-13 is snapped
    assert got[7].isfinite()


@pytest.mark.parametrize("gamma", (0.0, 0.37, 0.5, 1.0, 1.5, 2.0))
@pytest.mark.parametrize("p", (-1.0, 0.5, 0.8, 1.0, 1.7))
def test_the_cap(p, gamma):
    weights, denom = spread(4096, 1e-6, 1e2, 4, signed=True), spread(4096, 1e-4, 1e1, 5)
    x = weights.double().abs() ** (2 - p) * denom.double() ** gamma
    cutoff = x.median().item()
    changed = {"lr_weight_decay": 0.5 * cutoff, "p": p, "precondition": gamma}
    capped, plain = (
        decayed_in_metric(weights, denom, cutoff=cutoff, **changed),
        decayed_in_metric(weights, denom, **changed),
    )
    free = decayed_in_metric(weights, denom, lr_weight_decay=0.0, p=p)
    clear = (x / cutoff - 1).abs() > 1e-5
    above = x > cutoff
    torch.testing.assert_close(capped[above & clear], free[above & clear], rtol=3e-7, atol=0)
    assert torch.equal(capped[~above & clear], plain[~above & clear])
    assert 1000 < int(above.sum()) < 3000


@pytest.mark.parametrize("gamma", (0.0, 0.37, 0.5, 1.0, 1.5, 2.0))
@pytest.mark.parametrize("p", (-1.0, 0.5, 0.8, 1.0, 1.7, 2.0, 2.5))
def test_regrowth_below(p, gamma):
    """Below it the pull is that at `regrowth_below`, for zeros too; above it nothing changes."""
    weights, denom = spread(4096, 1e-6, 1e2, 4, signed=True), spread(4096, 1e-4, 1e1, 5)
    weights[::64] = 0
    x = weights.double().abs() ** (2 - p) * denom.double() ** gamma
    regrowth_below = 2 * x.median().item()
    changed = {"lr_weight_decay": 0.5 * regrowth_below, "p": p, "precondition": gamma}
    regrowing, plain = (
        decayed_in_metric(weights, denom, regrowth_below=regrowth_below, **changed),
        decayed_in_metric(weights, denom, **changed),
    )
    free = decayed_in_metric(weights, denom, lr_weight_decay=0.0, p=p)
    clear, below = (x / regrowth_below - 1).abs() > 1e-5, x < regrowth_below
    assert torch.equal(regrowing[~below & clear], plain[~below & clear])
    torch.testing.assert_close(regrowing[below & clear], free[below & clear] / 1.5, rtol=2e-6, atol=1e-13)
    assert below.sum() > 1000 and ((~below).sum() > 1000 or (p, gamma) == (2.0, 0.0))


@pytest.mark.parametrize("gamma", (0.0, 0.5, 0.37))
@pytest.mark.parametrize("p", EXPONENTS)
def test_zero_absorbs_whatever_its_gradient_below_p_2_and_is_any_other_weight_from_there_on(p, gamma):
    """αλ is so small that a power taken of some tiny number instead of zero would let it go."""
    grads = torch.tensor([1.0, -0.5, 2.0])
    group = param_group_of(
        lr=0.1, weight_decay=10.0 if p == 2 else 1e-6, betas=(0.0, 0.0), eps=0.0, p=p, precondition=gamma
    )
    weights = torch.zeros(3)
    dispatch.step("cpu", "adamw", [(group, [StepRow(weights, grads, (torch.zeros(3), torch.zeros(3)), 1.0)])])
    pull = 1.0 * grads.double().abs() ** -gamma if p == 2 else 0.0  # |0|^(p−2) is infinite, 1 or zero
    exact = torch.zeros(3).double() if p < 2 else -0.1 * grads.double().sign() / (1 + pull)
    torch.testing.assert_close(weights.double(), exact, rtol=3e-7, atol=0)
