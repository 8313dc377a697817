"""The fused step on a CPU: its approximation against float64, and its results against the other implementations and torch's own."""

import math

import pytest
import torch
from footprint_runs import Allocated
from hypothesis import given, settings, strategies
from optim_cases import OPTIMIZERS, assert_same, set_grads, train
from test_optim import CASES

from lp_dist import LpAdamW, LpLion, LpSGD, kernels
from lp_dist.kernels import cpu

NORMAL = torch.finfo(torch.float32).tiny
# Each of them in every test that runs over p and γ: those with a form of their own, and those that are approximated
EXPONENTS = (-4.0, -1.5, -1.0, -0.3, 0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 1.99, 2.0, 2.3, 4.0)
GAMMAS = (0.0, 0.37, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0)


@pytest.fixture(autouse=True)
def it_is_built():
    assert kernels.unavailable(torch.device("cpu")) is None


def values(**changed):
    return {"lr": 1.0, "maximize": False, "weight_decay": 1.0, "p": 0.5, "l2": 0.0, "cutoff": math.inf, **changed}


def decayed(weights, **changed):
    """Weights after the decay alone: SGD with a gradient of zero."""
    weights = weights.clone()
    kernels.step("cpu", "sgd", [(values(**changed), [(weights, torch.zeros_like(weights), 1.0)])])
    return weights


def decayed_in_metric(weights, denom, *, lr_weight_decay, **changed):
    """Weights after the preconditioned decay alone: Adam with betas of zero, whose √v̂ is |gradient|, at a rate that moves nothing."""
    weights = weights.clone()
    lr = 1e-36
    group = values(lr=lr, weight_decay=lr_weight_decay / lr, betas=(0.0, 0.0), eps=0.0, **changed)
    kernels.step("cpu", "adamw", [(group, [(weights, denom, torch.zeros_like(weights), torch.zeros_like(weights), 1.0)])])
    return weights


def spread(n, low, high, seed, signed=False):
    """n numbers of magnitudes spread evenly over the decades between low and high."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.exp(torch.empty(n, dtype=torch.float64).uniform_(math.log(low), math.log(high), generator=generator)).float()
    return found * torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if signed else found


def assert_within(got, weights, pull, bound):
    """got (fp32) against weights/(1 + pull) in float64, where fp32 has normal numbers for the factor and the result; next to nothing elsewhere."""
    exact = weights.double() / (1 + pull)
    there = (exact.abs() >= 2 * NORMAL) & (pull < 1e38)
    assert int(there.sum()) > 100
    error = ((got.double() - exact) / exact)[there].abs().max().item()
    assert error <= bound, error
    assert (got[~there].abs().double() <= 2 * NORMAL + weights[~there].abs().double() * 2e-38).all()


# --- the approximation -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_snaps(monkeypatch):
    monkeypatch.setattr(cpu, "SNAP", 0.0)


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_factor_over_all_normal_floats(nothing_snaps, p):
    weights = spread(4096, NORMAL, 3e38, 0, signed=True)
    for seed, strength in enumerate((1e-37, 1e-20, 1e-9, 1e-4, 0.3, 1.0, 50.0, 1e10, 1e30)):
        pull = strength * weights.double().abs() ** (p - 2)
        got = decayed(weights, weight_decay=strength, p=p)
        assert_within(got, weights, pull, 1e-6 + 1.2e-7)  # of the factor, and the last division's own rounding
        # Where the factor is near 1 an error in x must not show at all: half a unit in the last place each for sum and quotient
        near = pull < 0.01
        if int(near.sum()) > 200:
            assert_within(got[near], weights[near], pull[near], 1.4e-7)


@pytest.mark.parametrize("p", (-1.0, 0.0, 1.0, 2.0))
def test_whole_exponents_are_not_approximated(nothing_snaps, p):
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
    capped, plain = decayed_in_metric(weights, denom, cutoff=cutoff, **changed), decayed_in_metric(weights, denom, **changed)
    free = decayed_in_metric(weights, denom, lr_weight_decay=0.0, p=p)
    clear = (x / cutoff - 1).abs() > 1e-5
    above = x > cutoff
    torch.testing.assert_close(capped[above & clear], free[above & clear], rtol=3e-7, atol=0)
    assert torch.equal(capped[~above & clear], plain[~above & clear])
    assert 1000 < int(above.sum()) < 3000


# --- against the others ------------------------------------------------------------------------------------------------------------


def tensors(dtype=torch.float32, seed=0):
    """A tensor longer than a block, small ones, one of another memory order, zeros inside."""
    torch.manual_seed(seed)
    found = [torch.randn(3000) * 0.1, torch.randn(7, 5), torch.randn(()), torch.zeros(0, 4), torch.randn(40, 60).t(), torch.randn(2, 3, 5, 5)]
    found[0][::7] = 0
    found[-1] = found[-1].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(t.to(dtype)) for t in found]


@pytest.mark.parametrize(("cls", "settings"), CASES.values(), ids=CASES.keys())
def test_is_as_near_to_float64_as_foreach(cls, settings):
    """A weight on its way to zero magnifies the roundings before it, so the other implementation's error is the yardstick."""
    exact = tensors(torch.float64)
    _train_in_their_order(cls(exact, implementation="foreach", **settings), exact)
    errors = {}
    for implementation in ("fused", "foreach"):
        params = tensors()
        _train_in_their_order(cls(params, implementation=implementation, **settings), params)
        errors[implementation] = [(p.double() - q).abs().max().item() for p, q in zip(params, exact, strict=True) if p.numel()]
    for ours, theirs in zip(errors["fused"], errors["foreach"], strict=True):
        assert ours <= 3 * theirs + 2e-7, errors


def _train_in_their_order(optimizer, params):
    """Ten steps with gradients in the memory order of their parameters."""
    for step in range(10):
        set_grads(params, step)
        for param in params:
            param.grad = torch.empty_like(param).copy_(param.grad)
        optimizer.step()


@pytest.mark.parametrize(("cls", "plain", "settings"), [
    (LpAdamW, torch.optim.AdamW, {"lr": 0.01}),
    (LpAdamW, torch.optim.AdamW, {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-4, "maximize": True}),
    (LpSGD, torch.optim.SGD, {"lr": 0.01}),
    (LpSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    (LpSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
])
def test_without_decay_is_torch_fused_bit_for_bit(cls, plain, settings):
    # Of lengths that fill vectors: torch rounds the odd elements at the end of a tensor in another way
    params, others = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (16, 48, 3008)] for _ in range(2))
    train(cls(params, weight_decay=0.0, implementation="fused", **settings), params, 30)
    train(plain(others, weight_decay=0.0, fused=True, **settings), others, 30)
    assert_same(params, others)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_frozen_is_the_base_with_zeros_kept(cls):
    params, others = tensors(), tensors()
    zeros = params[0] == 0
    train(cls(params, lr=0.01, weight_decay=5.0, cutoff=0.0, implementation=None), params, 5)
    train(cls(others, lr=0.01, implementation=None), others, 5)
    assert int(zeros.sum()) > 400 and (params[0][zeros] == 0).all()
    assert torch.equal(params[0][~zeros], others[0][~zeros])
    assert_same(params[1:], others[1:])


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 0.37))
def test_a_value_does_not_depend_on_where_it_lies(p, gamma):
    """Cut anywhere, on any number of threads: bit for bit, for every p. This is what makes shards equal to one process."""
    torch.manual_seed(1)
    whole = torch.nn.Parameter(torch.randn(100_003) * 0.1)
    cuts = torch.randint(1, 7_000, (25,)).tolist()
    cuts.append(100_003 - sum(cuts))
    pieces = [torch.nn.Parameter(t.clone()) for t in whole.detach().split(cuts)]
    changed = {"lr": 0.01, "weight_decay": 0.05, "p": p, "precondition": gamma, "implementation": "fused"}
    one, many = LpAdamW([whole], **changed), LpAdamW(pieces, **changed)
    for _ in range(3):
        whole.grad = torch.randn(100_003) * 0.1
        for piece, grad in zip(pieces, whole.grad.split(cuts), strict=True):
            piece.grad = grad
        one.step()
        torch.set_num_threads(2)
        try:
            many.step()
        finally:
            torch.set_num_threads(1)
    assert torch.equal(whole, torch.cat([piece.detach() for piece in pieces]))


def test_rows_have_values_of_their_own_in_one_call():
    params, alone = tensors(), tensors()
    rates = [(0.01 * (i + 1), 0.02 * i, 0.25 * i, -1.0 + 0.5 * i) for i in range(len(params))]
    groups = [{"params": [p], "lr": lr, "weight_decay": wd, "precondition": gamma, "p": e} for p, (lr, wd, gamma, e) in zip(params, rates, strict=True)]
    train(LpAdamW(groups), params, 4)
    for param, (lr, wd, gamma, e) in zip(alone, rates, strict=True):
        optimizer = LpAdamW([param], lr=lr, weight_decay=wd, precondition=gamma, p=e)
        for step in range(4):
            set_grads(alone, step)
            optimizer.step()
    assert_same(params, alone)


# --- dtypes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "settings"), [
    (LpAdamW, {"lr": 0.02, "weight_decay": 0.05, "p": 0.8, "precondition": 0.5}), (LpSGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}),
    (LpSGD, {"lr": 0.02, "weight_decay": 0.2}), (LpLion, {"lr": 0.01, "weight_decay": 0.2}), (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "cutoff": 0.0})])
def test_bf16_weights_are_stepped_in_fp32_and_rounded_once(cls, settings):
    params = tensors(torch.bfloat16)
    ours = cls(params, implementation="fused", **settings)
    for step in range(4):
        others = [torch.nn.Parameter(p.detach().float()) for p in params]
        theirs = cls(others, implementation="fused", **settings)
        for p, q in zip(params, others, strict=True):
            theirs.state[q] = {key: t.clone() if key == "step" else t.float() for key, t in ours.state.get(p, {}).items()}
        set_grads(params, step)
        for p, q in zip(params, others, strict=True):
            p.grad = torch.empty_like(p).copy_(p.grad)  # in the memory order of its parameter
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q.bfloat16())
            for key, state in ours.state[p].items():
                assert torch.equal(state, theirs.state[q][key].to(state.dtype)), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
def test_fp32_weights_take_16_bit_gradients(base, dtype):
    states = {"adamw": 2, "sgd": 0, "lion": 1}[base]
    group = values(lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    grads = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 6e-8, -3e-7, 6e-5, 1e-4, 6e4, math.inf, -math.inf, math.nan])]).to(dtype)
    results = []
    for taken in (grads, grads.float()):
        row = [torch.linspace(-1, 1, 1010), taken, *(torch.zeros(1010) for _ in range(states))]
        kernels.step("cpu", base, [(group, [(*row, 1.0)])])
        results.append([row[0], *row[2:]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert results[0][0][-1].isnan()


# --- manners ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_nan_gradient_shows(cls):
    for changed in ({}, {"cutoff": 0.0}, {"weight_decay": 0.0}, {"p": 0.8}, {"p": 2.0}):
        param = torch.nn.Parameter(torch.tensor([0.5, 0.0, -0.5, 0.0]))
        param.grad = torch.tensor([math.nan, math.nan, 0.1, 0.1])
        cls([param], **{"lr": 0.01, "weight_decay": 0.1, "implementation": "fused", **changed}).step()
        assert param[:2].isnan().all() and not param[2:].isnan().any(), changed


def test_denormals_are_flushed_here_and_nowhere_else():
    param = torch.nn.Parameter(torch.full((1000,), 1e-3))
    param.grad = torch.full((1000,), 1e-25)
    optimizer = LpAdamW([param], lr=1e-3, implementation="fused")
    optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": torch.full((1000,), 1.2e-38), "exp_avg_sq": torch.full((1000,), 1e-41)}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            optimizer.step()
            denormal = torch.full((100_000,), 1e-40) * 0.5
        finally:
            torch.set_num_threads(1)
        assert (denormal > 0).all(), "the processor's mode was not put back"
    assert (optimizer.state[param]["exp_avg_sq"] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"p": 0.8, "precondition": 0.37, "cutoff": 1e-3}, {"cutoff": 0.0}, {"weight_decay": 0.0}])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_memory_of_a_step_does_not_grow(cls, settings):
    """No byte of a tensor: what is allocated are the counts of steps, four bytes each."""
    if cls is not LpAdamW:
        settings = {key: value for key, value in settings.items() if key != "precondition"}
    peaks = []
    for n in (1 << 10, 1 << 22):
        params = [torch.nn.Parameter(torch.randn(n)) for _ in range(2)]
        for param in params:
            param.grad = torch.randn(n)
        optimizer = cls(params, **{"lr": 1e-3, "weight_decay": 0.1, "implementation": "fused", **settings})
        optimizer.step()
        with Allocated() as allocated:
            optimizer.step()
        peaks.append(allocated.peak["start"])
    assert peaks[0] == peaks[1] <= 1024, peaks


def test_what_it_can_not_step_is_refused_by_name_and_left_to_foreach_without():
    strided = torch.nn.Parameter(torch.randn(4, 6)[:, ::2])
    cases = [(torch.nn.Parameter(torch.randn(3, dtype=torch.float64)), {}, "weights of torch.float64"), (strided, {}, "tensors that lie in memory in different ways"),
             (torch.nn.Parameter(torch.randn(3)), {"lag": 0.5}, "lag=0.5")]
    for param, changed, message in cases:
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=f"implementation='fused' can't step this: {message}.*Use None"):
            LpAdamW([param], lr=0.1, weight_decay=0.1, implementation="fused", **changed).step()
        other = torch.nn.Parameter(param.detach().clone())
        other.grad = torch.ones_like(other)
        LpAdamW([param], lr=0.1, weight_decay=0.1, **changed).step()
        LpAdamW([other], lr=0.1, weight_decay=0.1, implementation="foreach", **changed).step()
        assert torch.equal(param, other)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_capturable_is_for_the_fused_step_alone_and_changes_no_value(cls):
    params, others = tensors(), tensors()
    _train_in_their_order(cls(params, lr=0.01, weight_decay=0.1, capturable=True), params)
    _train_in_their_order(cls(others, lr=0.01, weight_decay=0.1), others)
    assert_same(params, others)
    with pytest.raises(ValueError, match="capturable=True needs the fused step, not implementation='foreach'; use None"):
        cls(params, capturable=True, implementation="foreach")
    double = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    with pytest.raises(ValueError, match="capturable=True needs the fused step, which can't step this: weights of torch.float64.*Set capturable=False"):
        cls([double], capturable=True).step()


def test_step_counts_that_are_one_tensor_count_apart():
    """DeepSpeed's loader of universal checkpoints gives all tensors one `step`."""
    params = tensors()
    optimizer = LpAdamW(params, lr=0.01, weight_decay=0.1)
    train(optimizer, params, 1)
    for param in params:
        optimizer.state[param]["step"] = optimizer.state[params[0]]["step"]
    train(optimizer, params, 2)
    assert {float(optimizer.state[param]["step"]) for param in params} == {3.0}
