"""lp_dist.decay: numbers worked out by hand, laws that hold for every input, and equality with the float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import reference
from lp_dist.optim.decay import lp_decay

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FREEZE = {"p": 1.0, "precondition": 0.0, "cutoff": 0.0, "weight_decay": 0.5}
few = settings(max_examples=80, deadline=None, derandomize=True)


def decayed(u, w_old, dtype=torch.float64, denom=None, **hyperparameters):
    """lp_decay of plain numbers or lists, as a tensor of `dtype`."""
    tensors = [None if a is None else torch.tensor(a, dtype=torch.float64).to(dtype) for a in (u, w_old, denom)]
    return lp_decay(tensors[0], tensors[1], denom=tensors[2], **hyperparameters)


# --- by hand
# -----------------------------------------------------------------------------

BY_HAND = [
    # p = 1: x = |w| = 0.5, al*lam = 0.01, f = 1/(1 + 0.01/0.5) = 1/1.02; u = 0.51 -> 0.5
    ("p=1", 0.51, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 0.1}, 0.5),
    # p = 2: x = 1 whatever w is, f = 1/(1 + 0.01); u = 2.02 -> 2
    ("p=2", 2.02, -7.0, {"p": 2.0, "lr": 0.1, "weight_decay": 0.1}, 2.0),
    # p = 0: x = w^2 = 0.04, al*lam = 0.04, f = 1/(1 + 1); u = -0.3 -> -0.15
    ("p=0", -0.3, -0.2, {"p": 0.0, "lr": 0.4, "weight_decay": 0.1}, -0.15),
    # p = -1: x = |w|^3 = 0.125, al*lam = 0.5, f = 1/(1 + 4); u = 1 -> 0.2
    ("p=-1", 1.0, -0.5, {"p": -1.0, "lr": 0.5, "weight_decay": 1.0}, 0.2),
    # p = 0.5: x = 0.25^1.5 = 0.125, al*lam = 0.0125, f = 1/(1 + 0.1); u = 0.22 -> 0.2
    ("p=0.5", 0.22, 0.25, {"p": 0.5, "lr": 0.1, "weight_decay": 0.125}, 0.2),
    # p = 3: 1/x = |w| = 2, al*lam = 0.5, f = 1/(1 + 1); the sign is that of u, not of w
    ("p=3", -3.0, 2.0, {"p": 3.0, "lr": 0.5, "weight_decay": 1.0}, -1.5),
    # l2: x = 0.5, al*lam = 0.05, al*l2 = 0.4, f = 1/(1 + 0.4 + 0.1) = 1/1.5; u = 0.6 -> 0.4
    ("l2", 0.6, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 0.5, "l2": 4.0}, 0.4),
    # l2 without lambda: f = 1/(1 + 0.1*10)
    ("l2 alone", 0.6, 0.0, {"p": 1.0, "lr": 0.1, "weight_decay": 0.0, "l2": 10.0}, 0.3),
    # above the cutoff (x = 0.5 > 0.4) the Lp term goes, l2 stays: f = 1/(1 + 0.1*2.5) = 0.8
    ("above cutoff", 1.0, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 9.0, "l2": 2.5, "cutoff": 0.4}, 0.8),
    # x = 0.5 is not above a cutoff of 0.5: decayed, f = 1/(1 + 0.05/0.5)
    ("at cutoff", 1.1, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 0.5, "cutoff": 0.5}, 1.0),
    # precondition 1: x = 0.5 * 0.2 = 0.1, al*lam = 0.1, f = 1/2
    ("precondition=1", 0.6, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 1.0, "precondition": 1.0, "denom": 0.2}, 0.3),
    # precondition 0.5: x = 0.5 * sqrt(0.04) = 0.1, the same
    (
        "precondition=0.5",
        0.6,
        0.5,
        {"p": 1.0, "lr": 0.1, "weight_decay": 1.0, "precondition": 0.5, "denom": 0.04},
        0.3,
    ),
    # the cutoff is compared with the preconditioned x = 0.1 > 0.09
    (
        "precondition and cutoff",
        0.6,
        0.5,
        {"p": 1.0, "lr": 0.1, "weight_decay": 1.0, "precondition": 1.0, "denom": 0.2, "cutoff": 0.09},
        0.6,
    ),
    # x = 0 is raised to regrowth_below = 0.1: f = 1/(1 + 0.1/0.1), and zero does not absorb; x = 0.5 is above it
    ("regrowth_below", 0.6, 0.0, {"p": 1.0, "lr": 0.1, "weight_decay": 1.0, "regrowth_below": 0.1}, 0.3),
    ("above regrowth_below", 0.51, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 0.1, "regrowth_below": 0.1}, 0.5),
    # regrowth_below is compared with the preconditioned x = 0.1 < 0.2, and so is the cutoff, with what it was before
    (
        "precondition and regrowth_below",
        0.6,
        0.5,
        {
            "p": 1.0,
            "lr": 0.1,
            "weight_decay": 2.0,
            "precondition": 1.0,
            "denom": 0.2,
            "regrowth_below": 0.2,
            "cutoff": 0.15,
        },
        0.3,
    ),
    # with regrowth_below, what a cutoff of 0 has frozen stays zero
    (
        "frozen with regrowth_below",
        0.6,
        0.0,
        {"p": 1.0, "lr": 0.1, "weight_decay": 1.0, "regrowth_below": 0.1, "cutoff": 0.0},
        0.0,
    ),
    # snap: f = 1/2 takes 1.9e-13 to 0.95e-13 < 1e-13, hence to zero, and 2.1e-13 to 1.05e-13, which stays
    ("snap", 1.9e-13, 0.5, {"p": 1.0, "lr": 0.5, "weight_decay": 1.0}, 0.0),
    ("no snap", 2.1e-13, 0.5, {"p": 1.0, "lr": 0.5, "weight_decay": 1.0}, 1.05e-13),
    ("no snap at p=2", 1e-14, 0.5, {"p": 2.0, "lr": 1.0, "weight_decay": 1.0}, 5e-15),
    ("no snap at lambda=0", 1e-14, 0.5, {"p": 1.0, "lr": 0.1, "weight_decay": 0.0, "l2": 10.0}, 5e-15),
    ("no snap at lr=0", 1e-14, 0.5, {"p": 1.0, "lr": 0.0, "weight_decay": 1.0}, 1e-14),
]


@pytest.mark.parametrize(
    ("u", "w_old", "hyperparameters", "expected"), [c[1:] for c in BY_HAND], ids=[c[0] for c in BY_HAND]
)
def test_by_hand(u, w_old, hyperparameters, expected):
    result = decayed(u, w_old, **hyperparameters).item()
    assert result == pytest.approx(expected, rel=1e-14, abs=0.0)
    oracle = reference.lp_weight(u, w_old, **hyperparameters)
    assert oracle == pytest.approx(expected, rel=1e-14, abs=0.0)


def test_result_is_a_new_tensor_and_the_inputs_stay():
    u, w_old = torch.randn(3, 4), torch.randn(3, 4)
    copies = u.clone(), w_old.clone()
    result = lp_decay(u, w_old, lr=0.1, weight_decay=0.1)
    assert result.data_ptr() != u.data_ptr()
    assert torch.equal(u, copies[0]) and torch.equal(w_old, copies[1])
    assert result.shape == u.shape and result.dtype == u.dtype
    assert lp_decay(u, w_old, lr=0.0, weight_decay=0.1).data_ptr() != u.data_ptr()


def test_default_p_is_one_half():
    u, w_old = torch.randn(50), torch.randn(50)
    assert torch.equal(
        lp_decay(u, w_old, lr=0.1, weight_decay=0.1), lp_decay(u, w_old, lr=0.1, weight_decay=0.1, p=0.5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    """The factor of a half-precision weight is an fp32 number and only the product is rounded, so the result is the
    float64 product rounded once, but for the few ties that fp32's own error tips over (one unit in the last place
    then).
    """
    torch.manual_seed(0)
    u, w_old = torch.randn(2000).to(dtype), torch.randn(2000).to(dtype)
    result = lp_decay(u, w_old, lr=0.1, weight_decay=0.3, p=0.5)
    exact = decayed(u.tolist(), w_old.tolist(), lr=0.1, weight_decay=0.3, p=0.5).to(dtype)
    differs = result != exact
    assert differs.sum() <= 4
    torch.testing.assert_close(result, exact, rtol=torch.finfo(dtype).eps, atol=0.0)


# --- for all inputs
# -----------------------------------------------------------------------------

exponents = st.one_of(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 4.0]), st.floats(-4.0, 4.0))
awkward = [0.0, -0.0, 5e-324, 1e-310, 1e-45, -1e-40, 6e-8, 1e-13, 1e-5, -0.5, 1.0, 1e4, 6.5e4, -1e20, 3e38, 1e308]
values = st.one_of(st.sampled_from(awkward), st.floats(allow_nan=False, allow_infinity=False), st.floats(-2.0, 2.0))
strengths = st.one_of(st.sampled_from([0.0, 1e-300, 1e-50, 1e-8, 0.1, 1.0, 1e4, 1e30]), st.floats(0.0, 100.0))
cutoffs = st.sampled_from([0.0, 1e-3, 1.0, math.inf])
regrowths = st.sampled_from([0.0, 1e-300, 1e-4, 1.0, 1e30])
pairs = st.lists(st.tuples(values, values), min_size=1, max_size=12)
dtypes = st.sampled_from(DTYPES)


def tensors(pairs, dtype):
    """u and w_old in `dtype`, held inside its finite range."""
    top = torch.finfo(dtype).max
    return (
        torch.tensor(column, dtype=torch.float64).clamp(-top, top).to(dtype) for column in zip(*pairs, strict=True)
    )


@few
@given(pairs, dtypes, exponents, strengths, strengths, strengths, cutoffs, regrowths)
def test_sign_is_kept_and_size_never_grows(pairs, dtype, p, lr, weight_decay, l2, cutoff, regrowth_below):
    u, w_old = tensors(pairs, dtype)
    result = lp_decay(
        u, w_old, lr=lr, weight_decay=weight_decay, p=p, l2=l2, cutoff=cutoff, regrowth_below=regrowth_below
    )
    assert result.dtype == dtype
    assert not result.isnan().any()
    assert ((result == 0) | (result.sign() == u.sign())).all()
    assert (result.abs() <= u.abs()).all()


@few
@given(pairs, dtypes, exponents, strengths, strengths, strengths, cutoffs)
def test_more_decay_never_leaves_more(pairs, dtype, p, lr, first, second, cutoff):
    u, w_old = tensors(pairs, dtype)
    weak = lp_decay(u, w_old, lr=lr, weight_decay=min(first, second), p=p, cutoff=cutoff)
    strong = lp_decay(u, w_old, lr=lr, weight_decay=max(first, second), p=p, cutoff=cutoff)
    assert (strong.abs() <= weak.abs()).all()


@few
@given(pairs, dtypes, st.floats(-4.0, 2.0, exclude_max=True), strengths, strengths, strengths, cutoffs)
def test_zero_absorbs_below_two(pairs, dtype, p, lr, weight_decay, l2, cutoff):
    u, w_old = tensors(pairs, dtype)
    result = lp_decay(u, torch.zeros_like(w_old), lr=lr, weight_decay=weight_decay, p=p, l2=l2, cutoff=cutoff)
    if lr * weight_decay > 0:
        assert (result == 0).all()
    elif lr * l2 == 0:
        assert torch.equal(result, u)


@few
@given(pairs, dtypes, exponents, strengths, strengths, cutoffs, regrowths, regrowths)
def test_a_higher_regrowth_below_never_leaves_less(pairs, dtype, p, lr, weight_decay, cutoff, first, second):
    u, w_old = tensors(pairs, dtype)
    low, high = (
        lp_decay(u, w_old, lr=lr, weight_decay=weight_decay, p=p, cutoff=cutoff, regrowth_below=regrowth_below)
        for regrowth_below in sorted((first, second))
    )
    assert (low.abs() <= high.abs()).all()


@few
@given(pairs, dtypes, exponents, strengths, cutoffs, st.booleans())
def test_no_strength_leaves_the_step_untouched(pairs, dtype, p, strength, cutoff, rate_is_zero):
    u, w_old = tensors(pairs, dtype)
    if rate_is_zero:  # the first step of a warm-up; l2 is silent too
        result = lp_decay(u, w_old, lr=0.0, weight_decay=strength, l2=1.0, p=p, cutoff=cutoff)
    else:
        result = lp_decay(u, w_old, lr=strength, weight_decay=0.0, p=p, cutoff=cutoff)
    assert torch.equal(result, u)


huge_range = st.one_of(st.sampled_from([0.0, 5e-324, 1e-50, 1e50, 1.7e308]), st.floats(0.0, allow_infinity=False))


@few
@given(
    pairs,
    st.lists(values, min_size=12, max_size=12),
    dtypes,
    exponents,
    huge_range,
    huge_range,
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 1.0, math.inf]),
    regrowths,
)
def test_no_nan_from_finite_input(pairs, denoms, dtype, p, lr, weight_decay, precondition, cutoff, regrowth_below):
    u, w_old = tensors(pairs, dtype)
    denom = next(tensors([(abs(d), 0.0) for d in denoms[: len(pairs)]], dtype))
    denom.clamp_(
        min=torch.finfo(dtype).tiny
    )  # sqrt(v) + eps > 0: then x has a limit even where a power leaves the range
    result = lp_decay(
        u,
        w_old,
        lr=lr,
        weight_decay=weight_decay,
        p=p,
        cutoff=cutoff,
        regrowth_below=regrowth_below,
        precondition=precondition,
        denom=denom,
    )
    assert not result.isnan().any()
    assert (result.abs() <= u.abs()).all()


# (what u = 1 becomes, w_old, denom, hyperparameters): products and powers that leave fp32's range, or float64's
OUT_OF_RANGE = [
    (0.0, 0.0, None, {"p": 0.5, "lr": 1e-25, "weight_decay": 1e-25}),
    (1.0, 0.0, None, {"p": 3.0, "lr": 1e-25, "weight_decay": 1e-25}),
    (1.0, 0.0, None, {"p": 3.0, "lr": 1e30, "weight_decay": 1e30}),
    (0.0, 1.0, None, {"p": 0.5, "lr": 1e30, "weight_decay": 1e30}),
    (1.0, 0.0, None, {"p": 3.0, "lr": 1e200, "weight_decay": 1e200}),
    (0.0, 1.0, None, {"p": 0.5, "lr": 1e200, "weight_decay": 1e200}),
    (0.0, 1.0, None, {"p": 0.5, "lr": 1e30, "weight_decay": 0.0, "l2": 1e30}),
    (0.0, 1.0, None, {"p": 0.5, "lr": 1e200, "weight_decay": 1.0, "l2": 1e200}),
    (0.0, 0.0, "max", {"p": 0.5, "lr": 1.0, "weight_decay": 1.0, "precondition": 10.0}),
    (1.0, 0.0, "tiny", {"p": 3.0, "lr": 1.0, "weight_decay": 1.0, "precondition": 10.0}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("expected", "w_old", "denom", "hyperparameters"), OUT_OF_RANGE)
def test_products_out_of_range(expected, w_old, denom, hyperparameters, dtype):
    denom = None if denom is None else getattr(torch.finfo(dtype), denom)
    result = decayed(1.0, w_old, dtype, denom, **hyperparameters)
    assert result.item() == pytest.approx(expected, rel=1e-6, abs=1e-30)


@few
@given(pairs, dtypes, st.floats(1e-6, 1.0))
def test_freeze_is_a_special_case(pairs, dtype, lr):
    u, w_old = tensors(pairs, dtype)
    u = torch.where(u.abs() < 1e-12, torch.ones_like(u), u)  # below that the snap has its say
    expected = torch.where(w_old == 0, torch.zeros_like(u), u)
    assert torch.equal(lp_decay(u, w_old, lr=lr, **FREEZE), expected)


# --- the oracle
# -----------------------------------------------------------------------------

sixteenths = st.integers(-64, 64).map(lambda k: k / 16)
ordinary = st.one_of(st.just(0.0), st.floats(1e-12, 1e4), st.floats(-1e4, -1e-12))
coefficients = st.one_of(st.just(0.0), st.floats(1e-8, 1e3))


def assert_equals_oracle(pairs, dtype, rtol, denoms=None, **hyperparameters):
    u, w_old = tensors(pairs, dtype)
    denom = None if denoms is None else next(tensors([(d, 0.0) for d in denoms[: len(pairs)]], dtype))
    result = lp_decay(u, w_old, denom=denom, **hyperparameters)
    expected = [
        reference.lp_weight(a, b, denom=1.0 if denom is None else denom[i].item(), **hyperparameters)
        for i, (a, b) in enumerate(zip(u.tolist(), w_old.tolist(), strict=True))
    ]
    # atol: a result on the snap's edge (1e-13) may be zero on one side and not on the other
    torch.testing.assert_close(result.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1.01e-13)


positive = st.lists(st.floats(1e-6, 1e2), min_size=12, max_size=12)
cases = (st.lists(st.tuples(ordinary, ordinary), min_size=1, max_size=12), coefficients, coefficients, coefficients)


@few
@given(*cases, st.floats(-4.0, 4.0), st.sampled_from([0.0, 0.5, 1.0]), positive)
def test_equals_the_oracle_in_float64(pairs, lr, weight_decay, l2, p, precondition, denoms):
    # rtol: two powers and six operations; pow is good to about one unit (2e-16)
    assert_equals_oracle(
        pairs,
        torch.float64,
        1e-14,
        denoms if precondition else None,
        lr=lr,
        weight_decay=weight_decay,
        l2=l2,
        p=p,
        precondition=precondition,
    )


@few
@given(*cases, sixteenths, st.sampled_from([0.0, 0.5, 1.0]), positive)
def test_equals_the_oracle_in_float32(pairs, lr, weight_decay, l2, p, precondition, denoms):
    # rtol: as above in units of 6e-8. p in sixteenths, since torch rounds the exponent of an fp32 power to fp32
    assert_equals_oracle(
        pairs,
        torch.float32,
        2e-6,
        denoms if precondition else None,
        lr=lr,
        weight_decay=weight_decay,
        l2=l2,
        p=p,
        precondition=precondition,
    )


@few
@given(cases[0], coefficients, coefficients, st.sampled_from([-1.0, 0.5, 1.0, 3.0]), st.floats(0.0, 10.0))
def test_cutoff_equals_the_oracle(pairs, lr, weight_decay, p, cutoff):
    edge = [abs(abs(w) ** (2.0 - p) - cutoff) <= 1e-12 * cutoff if w else False for _, w in pairs]
    pairs = [
        (1.0, 0.25) if on_edge else pair for on_edge, pair in zip(edge, pairs, strict=True)
    ]  # no coin tossing at x = cutoff
    assert_equals_oracle(pairs, torch.float64, 1e-14, lr=lr, weight_decay=weight_decay, p=p, cutoff=cutoff)


@few
@given(
    cases[0],
    coefficients,
    coefficients,
    st.sampled_from([-1.0, 0.5, 1.0, 2.0, 3.0]),
    st.sampled_from([0.0, 1e-6, 0.3, 1e3]),
)
def test_regrowth_below_equals_the_oracle(pairs, lr, weight_decay, p, regrowth_below):
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        assert_equals_oracle(pairs, dtype, rtol, lr=lr, weight_decay=weight_decay, p=p, regrowth_below=regrowth_below)
