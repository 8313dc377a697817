"""The fused step on a CPU: its results against the other implementations and torch's own, dtypes, and manners."""

import math

import pytest
import torch

from helpers.optimizers import CASES, EXPONENTS, OPTIMIZERS, assert_same, param_group_of, set_grads, step_row, train
from lp_dist import LpAdamW, LpLion, LpSGD
from lp_dist.benchmarks.recording import Allocated
from lp_dist.optim.kernels import dispatch


@pytest.fixture(autouse=True)
def it_is_built():
    assert dispatch.unavailable(torch.device("cpu")) is None


# --- against the others
# -----------------------------------------------------------------------------


def tensors(dtype=torch.float32, seed=0):
    """A tensor longer than a block, small ones, one of another memory order, zeros inside."""
    torch.manual_seed(seed)
    made = [
        torch.randn(3000) * 0.1,
        torch.randn(7, 5),
        torch.randn(()),
        torch.zeros(0, 4),
        torch.randn(40, 60).t(),
        torch.randn(2, 3, 5, 5),
    ]
    made[0][::7] = 0
    made[-1] = made[-1].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(t.to(dtype)) for t in made]


@pytest.mark.parametrize(("cls", "settings"), CASES.values(), ids=CASES.keys())
def test_is_as_near_to_float64_as_foreach(cls, settings):
    """A weight on its way to zero magnifies the roundings before it, so the other implementation's error is the
    yardstick.
    """
    exact = tensors(torch.float64)
    _train_in_their_order(cls(exact, implementation="foreach", **settings), exact)
    errors = {}
    for implementation in ("fused", "foreach"):
        params = tensors()
        _train_in_their_order(cls(params, implementation=implementation, **settings), params)
        errors[implementation] = [
            (p.double() - q).abs().max().item() for p, q in zip(params, exact, strict=True) if p.numel()
        ]
    for fused_error, foreach_error in zip(errors["fused"], errors["foreach"], strict=True):
        assert fused_error <= 3 * foreach_error + 2e-7, errors


def _train_in_their_order(optimizer, params):
    """Ten steps with gradients in the memory order of their parameters."""
    for step in range(10):
        set_grads(params, step)
        for param in params:
            param.grad = torch.empty_like(param).copy_(param.grad)
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "plain", "settings"),
    [
        (LpAdamW, torch.optim.AdamW, {"lr": 0.01}),
        (LpAdamW, torch.optim.AdamW, {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-4, "maximize": True}),
        (LpSGD, torch.optim.SGD, {"lr": 0.01}),
        (LpSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (LpSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ],
)
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
@pytest.mark.parametrize(("gamma", "latent"), [(0.0, False), (0.5, False), (0.37, False), (0.5, True)])
def test_a_value_does_not_depend_on_where_it_lies(p, gamma, latent):
    """Cut anywhere, on any number of threads: bit for bit, for every p. This is what makes shards equal to one
    process.
    """
    torch.manual_seed(1)
    unsplit = torch.nn.Parameter(torch.randn(100_003) * 0.1)
    cuts = torch.randint(1, 7_000, (25,)).tolist()
    cuts.append(100_003 - sum(cuts))
    split = [torch.nn.Parameter(t.clone()) for t in unsplit.detach().split(cuts)]
    changed = {
        "lr": 0.01,
        "weight_decay": 0.05,
        "p": p,
        "precondition": gamma,
        "implementation": "fused",
        "latent": latent,
    }
    changed |= {"cutoff": 0.1} if latent else {}
    of_unsplit, of_split = LpAdamW([unsplit], **changed), LpAdamW(split, **changed)
    for _ in range(3):
        unsplit.grad = torch.randn(100_003) * 0.1
        for param, grad in zip(split, unsplit.grad.split(cuts), strict=True):
            param.grad = grad
        of_unsplit.step()
        torch.set_num_threads(2)
        try:
            of_split.step()
        finally:
            torch.set_num_threads(1)
    assert torch.equal(unsplit, torch.cat([param.detach() for param in split]))


def test_rows_have_values_of_their_own_in_one_call():
    params, alone = tensors(), tensors()
    rates = [(0.01 * (i + 1), 0.02 * i, 0.25 * i, -1.0 + 0.5 * i) for i in range(len(params))]
    groups = [
        {"params": [p], "lr": lr, "weight_decay": wd, "precondition": gamma, "p": e}
        for p, (lr, wd, gamma, e) in zip(params, rates, strict=True)
    ]
    train(LpAdamW(groups), params, 4)
    for param, (lr, wd, gamma, e) in zip(alone, rates, strict=True):
        optimizer = LpAdamW([param], lr=lr, weight_decay=wd, precondition=gamma, p=e)
        for step in range(4):
            set_grads(alone, step)
            optimizer.step()
    assert_same(params, alone)


# --- dtypes
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (LpAdamW, {"lr": 0.02, "weight_decay": 0.05, "p": 0.8, "precondition": 0.5}),
        (LpSGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}),
        (LpSGD, {"lr": 0.02, "weight_decay": 0.2}),
        (LpLion, {"lr": 0.01, "weight_decay": 0.2}),
        (
            LpAdamW,
            {
                "lr": 0.02,
                "weight_decay": 0.01,
                "precondition": 0.5,
                "cutoff": 0.3,
                "regrowth_below": 0.03,
                "latent": True,
            },
        ),
        (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "cutoff": 0.0}),
    ],
)
def test_bf16_weights_are_stepped_in_fp32_and_rounded_once(cls, settings):
    params = tensors(torch.bfloat16)
    optimizer = cls(params, implementation="fused", **settings)
    for step in range(4):
        others = [torch.nn.Parameter(p.detach().float()) for p in params]
        fp32_optimizer = cls(others, implementation="fused", **settings)
        for p, q in zip(params, others, strict=True):
            fp32_optimizer.state[q] = {
                key: t.clone() if key == "step" else t.float() for key, t in optimizer.state.get(p, {}).items()
            }
        set_grads(params, step)
        for p, q in zip(params, others, strict=True):
            p.grad = torch.empty_like(p).copy_(p.grad)  # in the memory order of its parameter
            q.grad = p.grad.float()
        optimizer.step()
        fp32_optimizer.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q.bfloat16())
            for key, state in optimizer.state[p].items():
                assert torch.equal(state, fp32_optimizer.state[q][key].to(state.dtype)), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
def test_fp32_weights_take_16_bit_gradients(base, dtype):
    states = {"adamw": 2, "sgd": 0, "lion": 1}[base]
    group = param_group_of(lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    grads = torch.cat(
        [torch.randn(1000), torch.tensor([0.0, -0.0, 6e-8, -3e-7, 6e-5, 1e-4, 6e4, math.inf, -math.inf, math.nan])]
    ).to(dtype)
    results = []
    for taken in (grads, grads.float()):
        row = [torch.linspace(-1, 1, 1010), taken, *(torch.zeros(1010) for _ in range(states))]
        dispatch.step("cpu", base, [(group, [step_row((*row, 1.0))])])
        results.append([row[0], *row[2:]])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert results[0][0][-1].isnan()


# --- manners
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("base, states", [("adamw", 2), ("sgd", 1), ("sgd", 0), ("lion", 1)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_spans_are_stepped_by_address_and_nothing_beside_them(base, states, grad_dtype):
    """As the same elements in tensors of their own; gradients may have another width than weights."""
    generator = torch.Generator().manual_seed(0)
    column = [torch.randn(100, generator=generator) for _ in range(2 + states)]
    column[1] = column[1].to(grad_dtype)
    if states == 2:
        column[3].abs_()
    group = param_group_of(momentum=0.9 * (states > 0))
    before = [t.clone() for t in column]
    spans = [(0, 7), (7, 40), (61, 39)]
    dispatch.step("cpu", base, [(group, [step_row((*column, 3.0))._replace(span=span) for span in spans])])
    for first, length in spans:
        alone = [t[first : first + length].clone() for t in before]
        dispatch.step("cpu", base, [(group, [step_row((*alone, 3.0))])])
        assert all(torch.equal(t[first : first + length], single) for t, single in zip(column, alone))
    assert all(torch.equal(t[47:61], old[47:61]) for t, old in zip(column, before))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_nan_gradient_shows(cls):
    for changed in (
        {},
        {"cutoff": 0.0},
        {"weight_decay": 0.0},
        {"p": 0.8},
        {"p": 2.0},
        *({"cutoff": 0.6, "latent": True},) * (cls is LpAdamW),
    ):
        param = torch.nn.Parameter(torch.tensor([0.5, 0.0, -0.5, 0.0]))
        param.grad = torch.tensor([math.nan, math.nan, 0.1, 0.1])
        cls([param], **{"lr": 0.01, "weight_decay": 0.1, "implementation": "fused", **changed}).step()
        assert param[:2].isnan().all() and not param[2:].isnan().any(), changed


def test_denormals_are_flushed_here_and_nowhere_else():
    param = torch.nn.Parameter(torch.full((1000,), 1e-3))
    param.grad = torch.full((1000,), 1e-25)
    optimizer = LpAdamW([param], lr=1e-3, implementation="fused")
    optimizer.state[param] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.full((1000,), 1.2e-38),
        "exp_avg_sq": torch.full((1000,), 1e-41),
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            optimizer.step()
            denormal = torch.full((100_000,), 1e-40) * 0.5
        finally:
            torch.set_num_threads(1)
        assert (denormal > 0).all(), "the processor's mode was not put back"
    assert (optimizer.state[param]["exp_avg_sq"] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [{}, {"p": 0.8, "precondition": 0.37, "cutoff": 1e-3, "latent": True}, {"cutoff": 0.0}, {"weight_decay": 0.0}],
)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_memory_of_a_step_does_not_grow(cls, settings):
    """No byte of a tensor: what is allocated are the counts of steps, four bytes each."""
    if cls is not LpAdamW:
        settings = {key: value for key, value in settings.items() if key not in ("precondition", "latent")}
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
    cases = [
        (torch.nn.Parameter(torch.randn(3, dtype=torch.float64)), {}, "weights of torch.float64"),
        (strided, {}, "tensors that lie in memory in different ways"),
        (torch.nn.Parameter(torch.randn(3)), {"lag": 0.5}, "lag=0.5"),
        (torch.nn.Parameter(torch.randn(3)), {"precondition": 9.0}, "precondition=9.0; it takes at most 8.0"),
    ]
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
    with pytest.raises(
        ValueError, match="capturable=True needs the fused step, not implementation='foreach'; use None"
    ):
        cls(params, capturable=True, implementation="foreach")
    double = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    with pytest.raises(
        ValueError,
        match=(
            "capturable=True needs the fused step, which can't step this: weights of torch.float64.*Set"
            " capturable=False"
        ),
    ):
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
