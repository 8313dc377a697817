"""LpAdamW, LpSGD and LpLion: the two implementations against each other, against the oracle and against torch's own
optimizers; refusals, zeros, tensor learning rates, ZeRO's way of calling step(), and DTensor.
"""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from helpers import reference
from helpers.optimizers import CASES, IMPLEMENTATIONS, OPTIMIZERS, assert_same, make_params, set_grads, train
from lp_dist import attach
from lp_dist.optim.decay import lp_decay
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD

STEPS = {LpAdamW: reference.adamw_step, LpSGD: reference.sgd_step, LpLion: reference.lion_step}
HALVES = (torch.bfloat16, torch.float16)
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
    common = {
        "params",
        "lr",
        "weight_decay",
        "p",
        "l2",
        "cutoff",
        "regrowth_below",
        "pattern",
        "phase",
        "lag",
        "maximize",
        "capturable",
        "in_window",
    }
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


each_class = pytest.mark.parametrize("cls", OPTIMIZERS)


def weight(*shape):
    return torch.nn.Parameter(torch.ones(*shape))


# --- refusals
# -----------------------------------------------------------------------------


@each_class
def test_unknown_implementations_are_refused(cls):
    with pytest.raises(ValueError, match="(?s)turbo.*foreach|foreach.*turbo"):
        cls([weight(2)], implementation="turbo")
    for implementation in (None, "reference", "foreach", "fused"):
        cls([weight(2)], implementation=implementation)


@each_class
def test_sparse_gradients_are_refused(cls):
    param = weight(3, 2)
    param.grad = torch.eye(3)[:, :2].to_sparse()
    with pytest.raises(Exception, match="(?i)sparse") as error:
        cls([param]).step()
    assert error.type in (RuntimeError, ValueError, TypeError)
    assert torch.equal(param, torch.ones(3, 2))


@each_class
def test_complex_parameters_are_refused(cls):
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(Exception, match="(?i)complex") as error:
        cls([param]).step()
    assert error.type in (RuntimeError, ValueError, TypeError)


@pytest.mark.parametrize("cls", [LpSGD, LpLion])
def test_precondition_is_for_adamw_only(cls):
    with pytest.raises(TypeError, match="precondition"):
        cls([weight(2)], precondition=1.0)
    with pytest.raises((ValueError, TypeError), match="precondition"):
        cls([{"params": [weight(2)], "precondition": 1.0}])
    cls([{"params": [weight(2)], "precondition": 0.0}])


@each_class
@pytest.mark.parametrize(
    ("key", "value"), [("lr", -1.0), ("weight_decay", -0.25), ("p", 4.5), ("l2", -0.25), ("cutoff", float("nan"))]
)
def test_bad_hyperparameters_are_refused_in_arguments_and_in_groups(cls, key, value):
    with pytest.raises(ValueError, match=key):
        cls([weight(2)], **{key: value})
    with pytest.raises(ValueError, match=key):
        cls([{"params": [weight(2)], key: value}])
    optimizer = cls([weight(2)])
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group({"params": [weight(2)], key: value})
    assert len(optimizer.param_groups) == 1


# --- zeros
# -----------------------------------------------------------------------------


@each_class
@both
def test_a_decayed_tensor_of_zeros_is_refused_at_its_first_step(cls, implementation):
    def step(shape, **settings):
        param = torch.nn.Parameter(torch.zeros(*shape))
        param.grad = torch.ones_like(param)
        cls([param], implementation=implementation, **settings).step()

    with pytest.raises(ValueError, match="(?i)zero"):
        step((3, 2), weight_decay=0.1, p=0.5)
    with pytest.raises(ValueError, match="(?i)zero"):
        step((3, 2), weight_decay=0.1, p=-1.0)
    step((3, 2), weight_decay=0.0, p=0.5)
    step((3, 2), weight_decay=0.1, p=2.0)
    step((3,), weight_decay=0.1, p=0.5)  # a ZeRO shard may well be all padding
    step((0, 2), weight_decay=0.1, p=0.5)


@each_class
@both
def test_a_tensor_that_became_zero_later_is_no_error(cls, implementation):
    param = weight(3, 2)
    optimizer = cls([param], lr=0.1, weight_decay=1e30, p=0.0, implementation=implementation)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert (param == 0).all()


@each_class
@both
def test_freeze_keeps_zeros_and_leaves_the_others_to_the_base(cls, implementation):
    params, others = make_params(torch.float32), make_params(torch.float32)
    for group in (params, others):
        for param in group:
            param.data[param.abs() < 0.3] = 0.0
        group[2].data.fill_(1.0)
    dead = [p == 0 for p in params]
    train(cls(params, lr=1e-3, weight_decay=0.3, p=1.0, cutoff=0.0, implementation=implementation), params, 10)
    train(cls(others, lr=1e-3, implementation=implementation), others, 10)
    assert dead[0].any() and not dead[0].all()
    for param, other, zero in zip(params, others, dead, strict=True):
        assert torch.equal(param, torch.where(zero, torch.zeros(()), other))


# --- maximize, learning rates, ZeRO
# -----------------------------------------------------------------------------


@each_class
@both
def test_maximize_is_the_negated_gradient(cls, implementation):
    params, others = make_params(torch.float32), make_params(torch.float32)
    settings = {"lr": 0.02, "weight_decay": 0.1, "implementation": implementation}
    up, down = cls(params, maximize=True, **settings), cls(others, **settings)
    for step in range(5):
        set_grads(params, step)
        set_grads(others, step)
        for other in others:
            other.grad.neg_()
        up.step()
        down.step()
    assert_same(params, others)


@each_class
@both
def test_tensor_learning_rate_equals_the_float_and_is_read_at_every_step(cls, implementation):
    params, others = make_params(torch.float64), make_params(torch.float64)
    rate = torch.tensor(0.03125)
    settings = {"weight_decay": 0.25, "implementation": implementation}
    by_tensor, by_float = cls(params, lr=rate, **settings), cls(others, lr=0.03125, **settings)
    train(by_tensor, params, 3)
    train(by_float, others, 3)
    assert_same(params, others)
    assert rate == 0.03125
    rate.mul_(0.5)
    by_float.param_groups[0]["lr"] *= 0.5
    train(by_tensor, params, 3)
    train(by_float, others, 3)
    assert_same(params, others)


@each_class
@both
def test_zero_learning_rate_changes_nothing_but_the_state(cls, implementation):
    params, others = make_params(torch.float32), make_params(torch.float32)
    train(cls(params, lr=0.0, weight_decay=0.5, l2=0.5, implementation=implementation), params, 2)
    assert_same(params, others)


@each_class
@both
@pytest.mark.parametrize("manner", ["one group at a time", "the other groups empty"])
def test_zero_calls_step_once_per_group(cls, implementation, manner):
    """ZeRO-1 and 2 put a one-group list in place of param_groups; ZeRO-3 empties the others' params (traps.md, 5)."""
    settings = {"lr": 0.02, "weight_decay": 0.2, "implementation": implementation}
    trained = []
    for by_group in (False, True):
        params = make_params(torch.float32)
        optimizer = cls([{"params": params[:1], "p": 0.0}, {"params": params[1:], "weight_decay": 0.0}], **settings)
        for step in range(5):
            set_grads(params, step)
            step_by_group(optimizer, manner) if by_group else optimizer.step()
        trained.append(params)
    assert_same(*trained)


def step_by_group(optimizer, manner):
    groups = optimizer.param_groups
    held = [group["params"] for group in groups]
    for i, group in enumerate(groups):
        if manner == "one group at a time":
            optimizer.param_groups = [group]
        else:
            for j, other in enumerate(groups):
                other["params"] = held[j] if i == j else []
        optimizer.step()
    optimizer.param_groups = groups
    for group, params in zip(groups, held, strict=True):
        group["params"] = params


# --- DTensor
# -----------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@each_class
@both
def test_dtensor_parameters_equal_plain_ones(mesh, cls, implementation):
    # contiguous, as their shards will be: torch's pow may round differently on another layout
    plain = [
        torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        for p in make_params(torch.float32)
        if p.ndim
    ]
    sharded = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    optimizers = [cls(params, lr=0.02, weight_decay=0.2, implementation=implementation) for params in (plain, sharded)]
    for step in range(5):
        set_grads(plain, step)
        for param, other in zip(plain, sharded, strict=True):
            other.grad = distribute_tensor(param.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert_same(plain, [param.full_tensor() for param in sharded])
    for param in sharded:
        assert isinstance(param, DTensor)
        for key, value in optimizers[1].state[param].items():
            # the state is sharded like the weight, so that a distributed checkpoint can save it
            assert key == "step" or isinstance(value, DTensor)


@both
def test_a_sharded_tensor_of_zeros_is_refused_too(mesh, implementation):
    """By attach, which looks over all ranks; the step itself has a rank's own part alone."""
    model = torch.nn.Linear(2, 3, bias=False)
    model.weight = torch.nn.Parameter(distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="all zeros, such as 'weight'"):
        attach(model, LpAdamW(model.parameters(), weight_decay=0.1, implementation=implementation))


# --- copies
# -----------------------------------------------------------------------------


@each_class
@both
def test_a_deep_copy_goes_on_alone(cls, implementation):
    params = make_params(torch.float64)[:2]
    optimizer = cls(params, lr=0.02, weight_decay=0.2, implementation=implementation)
    train(optimizer, params, 2)
    twin = copy.deepcopy(optimizer)
    others = twin.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    train(twin, others, 2)
    assert_same(params, before)
    train(optimizer, params, 2)
    assert_same(params, others)


@each_class
def test_the_phase_off_switches_the_decay_off(cls):
    """The warm-up of a decay window: exactly the base's step, zeros free to move, nothing snapped."""
    torch.manual_seed(0)
    start = torch.randn(9, 5)
    start[::2] = 0.0
    off, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    train(cls([off], lr=1e-2, weight_decay=0.5, phase="off"), [off], 5)
    train(cls([plain], lr=1e-2), [plain], 5)
    assert torch.equal(off, plain) and (off != 0).all()
