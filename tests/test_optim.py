"""LpAdamW, LpSGD and LpLion: the two implementations against each other, against the oracle and against torch's
own.
"""

import math

import pytest
import reference
import torch
from optim_cases import IMPLEMENTATIONS, OPTIMIZERS, assert_same, make_params, set_grads, train

from lp_dist.optim.decay import lp_decay
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD

STEPS = {LpAdamW: reference.adamw_step, LpSGD: reference.sgd_step, LpLion: reference.lion_step}
HALVES = (torch.bfloat16, torch.float16)

CASES = {
    "adamw": (LpAdamW, {"lr": 0.02, "weight_decay": 0.05}),
    "adamw p=1": (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "p": 1.0, "betas": (0.8, 0.95), "eps": 1e-3}),
    "adamw p=0": (LpAdamW, {"lr": 0.02, "weight_decay": 0.02, "p": 0.0, "l2": 0.3}),
    "adamw p=-1.5": (LpAdamW, {"lr": 0.02, "weight_decay": 0.01, "p": -1.5}),
    "adamw p=2": (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "p": 2.0}),
    "adamw p=3": (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "p": 3.0}),
    "adamw precondition": (LpAdamW, {"lr": 0.02, "weight_decay": 0.1, "precondition": 1.0}),
    "adamw precondition cutoff": (
        LpAdamW,
        {"lr": 0.02, "weight_decay": 0.3, "precondition": 0.5, "cutoff": 0.2, "l2": 0.1},
    ),
    "adamw cutoff": (LpAdamW, {"lr": 0.02, "weight_decay": 0.3, "cutoff": 0.2}),
    "adamw floor": (LpAdamW, {"lr": 0.02, "weight_decay": 0.3, "precondition": 0.5, "cutoff": 0.2, "floor": 0.05}),
    "adamw latent": (LpAdamW, {"lr": 0.02, "weight_decay": 0.02, "cutoff": 0.2, "latent": True}),
    "adamw latent all": (
        LpAdamW,
        {
            "lr": 0.02,
            "weight_decay": 0.02,
            "p": 0.8,
            "precondition": 0.37,
            "cutoff": 0.2,
            "floor": 0.05,
            "latent": True,
            "l2": 0.1,
            "maximize": True,
        },
    ),
    "adamw frozen": (LpAdamW, {"lr": 0.02, "weight_decay": 0.3, "p": 1.0, "cutoff": 0.0}),
    "adamw maximize": (LpAdamW, {"lr": 0.02, "weight_decay": 0.05, "maximize": True}),
    "sgd": (LpSGD, {"lr": 0.02, "weight_decay": 0.2}),
    "sgd momentum": (LpSGD, {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9, "l2": 0.2, "p": 1.0}),
    "sgd nesterov": (
        LpSGD,
        {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.8, "nesterov": True, "p": 0.0, "cutoff": 0.5, "floor": 0.02},
    ),
    "sgd maximize": (LpSGD, {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9, "maximize": True}),
    "lion": (LpLion, {"lr": 0.01, "weight_decay": 0.2}),
    "lion all": (
        LpLion,
        {
            "lr": 0.01,
            "weight_decay": 0.5,
            "betas": (0.8, 0.9),
            "p": 1.0,
            "l2": 0.1,
            "cutoff": 0.7,
            "floor": 0.1,
            "maximize": True,
        },
    ),
}
all_cases = pytest.mark.parametrize(("cls", "settings"), CASES.values(), ids=CASES.keys())
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


# --- against each other, the oracle and torch
# -----------------------------------------------------------------------------


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foreach_equals_reference_bit_for_bit(cls, settings, dtype):
    results = []
    for implementation in IMPLEMENTATIONS:
        params = make_params(dtype)
        results.append(train(cls(params, implementation=implementation, **settings), params, 100))
    assert_same(*results)
    assert any(not torch.equal(a, b) for a, b in zip(results[0], make_params(dtype), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_tensor_longer_than_a_chunk(cls, layout):
    def make():
        torch.manual_seed(0)
        wide = torch.randn(1031, 2 * 1021)
        narrow = wide[:, :1021].clone(memory_format=torch.contiguous_format)
        big = {"contiguous": narrow, "transposed": narrow.t(), "strided": wide[:, ::2]}[layout]
        assert big.numel() > 2**20
        return [torch.nn.Parameter(big)]

    results = []
    for implementation in IMPLEMENTATIONS:
        params = make()
        results.append(train(cls(params, lr=0.01, weight_decay=0.1, implementation=implementation), params, 2))
    assert_same(*results)
    # and by hand, whole: torch's step, then the decay. One unit in the last place per step is left for the places
    # where a chunk ends, since torch's vectorized pow and its scalar one may round differently
    plain = {LpAdamW: torch.optim.AdamW, LpSGD: torch.optim.SGD}.get(cls)
    if plain is not None:
        (param,) = params = make()
        optimizer = plain(params, lr=0.01, weight_decay=0.0)
        for step in range(2):
            set_grads(params, step)
            w_old = param.detach().clone()
            optimizer.step()
            param.data.copy_(lp_decay(param.detach(), w_old, lr=0.01, weight_decay=0.1, p=0.5))
        torch.testing.assert_close(results[0][0], param, rtol=5e-7, atol=1.01e-13)


@all_cases
@both
def test_equals_the_oracle(cls, settings, implementation):
    params = make_params(torch.float64)
    optimizer = cls(params, implementation=implementation, **settings)
    expected = [p.detach().flatten().tolist() for p in params]
    state = [None] * len(params)
    for step in range(25):
        set_grads(params, step)
        for i, param in enumerate(params):
            expected[i], state[i] = STEPS[cls](expected[i], param.grad.flatten().tolist(), state[i], **settings)
        optimizer.step()
        if settings.get("latent"):
            assert 0 < sum(w == 0 and m != 0 for ws, s in zip(expected, state) for w, m in zip(ws, s["exp_avg"])) < 60
            for param, s in zip(params, state, strict=True):
                torch.testing.assert_close(
                    optimizer.state[param]["exp_avg"].flatten(),
                    torch.tensor(s["exp_avg"], dtype=torch.float64),
                    rtol=1e-10,
                    atol=2e-13,
                )
    for param, weights in zip(params, expected, strict=True):
        # 25 steps of a few roundings (2e-16) each, doubled or so whenever a small weight is raised to a power
        torch.testing.assert_close(
            param.detach().flatten(), torch.tensor(weights, dtype=torch.float64), rtol=1e-10, atol=2e-13
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@both
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
def test_without_decay_is_torch_bit_for_bit(cls, plain, settings, implementation, dtype):
    params, others = make_params(dtype), make_params(dtype)
    train(cls(params, weight_decay=0.0, implementation=implementation, **settings), params, 30)
    train(plain(others, weight_decay=0.0, foreach=implementation == "foreach", **settings), others, 30)
    assert_same(params, others)


@both
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_half_precision_is_the_plain_step_then_lp_decay(cls, dtype, implementation):
    params, others = make_params(dtype), make_params(dtype)
    settings = {"lr": 0.02, "weight_decay": 0.3, "p": 1.0}
    optimizer = cls(params, implementation=implementation, **settings)
    plain = cls(others, implementation=implementation, lr=0.02, weight_decay=0.0)
    for step in range(10):
        set_grads(params, step)
        set_grads(others, step)
        old = [p.detach().clone() for p in others]
        optimizer.step()
        plain.step()
        for other, w_old in zip(others, old, strict=True):
            other.data.copy_(lp_decay(other.detach(), w_old, **settings))
        assert_same(params, others)


# --- groups, gradients, state
# -----------------------------------------------------------------------------


@both
def test_hyperparameters_differ_by_group_and_change_between_steps(implementation):
    params = make_params(torch.float64)
    keys = [{"lr": 0.02, "weight_decay": 0.1, "p": 1.0}, {"lr": 0.01, "weight_decay": 0.3, "p": 0.0, "l2": 0.5}]
    groups = [{"params": params[:2], **keys[0]}, {"params": params[2:], **keys[1]}]
    optimizer = LpAdamW(groups, precondition=0.0, implementation=implementation)
    expected = [p.detach().flatten().tolist() for p in params]
    state = [None] * len(params)
    for step in range(20):
        set_grads(params, step)
        for group, now in zip(optimizer.param_groups, keys, strict=True):
            now["lr"] *= 0.9
            now["weight_decay"] *= 1.1
            now["p"] -= 0.05
            now["cutoff"] = math.inf if step < 10 else 0.5
            group.update(now)
        for i, param in enumerate(params):
            now = keys[0] if i < 2 else keys[1]
            expected[i], state[i] = reference.adamw_step(expected[i], param.grad.flatten().tolist(), state[i], **now)
        optimizer.step()
    for param, weights in zip(params, expected, strict=True):
        torch.testing.assert_close(
            param.detach().flatten(), torch.tensor(weights, dtype=torch.float64), rtol=1e-10, atol=2e-13
        )


@both
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_parameters_without_gradient_are_left_alone(cls, implementation):
    params = make_params(torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = cls(params, lr=0.1, weight_decay=1.0, implementation=implementation)
    optimizer.step()
    assert_same(params, start)
    assert not optimizer.state
    set_grads(params, 0)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], start[0]) and params[0] not in optimizer.state
    assert not torch.equal(params[1], start[1])


@both
def test_a_late_gradient_starts_at_step_one(implementation):
    settings = {"lr": 0.02, "weight_decay": 0.1, "implementation": implementation}
    params, others = make_params(torch.float64), make_params(torch.float64)
    together, late, early = (
        LpAdamW(params, **settings),
        LpAdamW(others[:1], **settings),
        LpAdamW(others[1:], **settings),
    )
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        if step < 3:
            params[0].grad = others[0].grad = None
        for optimizer in (together, late, early):
            optimizer.step()
        assert_same(params, others)
    assert together.state[params[0]]["step"] == 1 and together.state[params[1]]["step"] == 4


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_and_group_keys_are_the_promised_ones(implementation, dtype):
    common = {"params", "lr", "weight_decay", "p", "l2", "cutoff", "floor", "pattern", "lag", "maximize", "capturable"}
    for cls, settings, state_keys, group_keys in [
        (LpAdamW, {}, {"step", "exp_avg", "exp_avg_sq"}, {"betas", "eps", "precondition", "latent"}),
        (
            LpAdamW,
            {"precondition": 1.0, "weight_decay": 0.1},
            {"step", "exp_avg", "exp_avg_sq"},
            {"betas", "eps", "precondition", "latent"},
        ),
        (LpSGD, {"weight_decay": 0.1}, {"step"}, {"momentum", "nesterov"}),
        (LpSGD, {"momentum": 0.9}, {"step", "momentum_buffer"}, {"momentum", "nesterov"}),
        (LpLion, {"weight_decay": 0.1}, {"step", "exp_avg"}, {"betas"}),
    ]:
        params = make_params(dtype)
        optimizer = cls(params, implementation=implementation, **settings)
        train(optimizer, params, 2)
        assert set(optimizer.param_groups[0]) == common | group_keys
        for param in params:
            state = optimizer.state.get(param, {})
            assert set(state) == state_keys
            for key in state_keys - {"step"}:
                assert state[key].shape == param.shape and state[key].dtype == param.dtype
            if "step" in state_keys:
                assert (state["step"].dtype, state["step"].shape, state["step"].item()) == (torch.float32, (), 2.0)
                assert state["step"].device.type == "cpu"
