"""LpAdamW, LpSGD and LpLion: refusals, zeros, tensor learning rates, ZeRO's way of calling step(), and DTensor."""

import copy

import pytest
import torch
import torch.distributed as dist
from optim_cases import IMPLEMENTATIONS, OPTIMIZERS, assert_same, make_params, set_grads, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lp_dist import attach
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every = pytest.mark.parametrize("cls", OPTIMIZERS)


def weight(*shape):
    return torch.nn.Parameter(torch.ones(*shape))


# --- refusals
# -----------------------------------------------------------------------------


@every
def test_unknown_implementations_are_refused(cls):
    with pytest.raises(ValueError, match="(?s)turbo.*foreach|foreach.*turbo"):
        cls([weight(2)], implementation="turbo")
    for implementation in (None, "reference", "foreach", "fused"):
        cls([weight(2)], implementation=implementation)


@every
def test_sparse_gradients_are_refused(cls):
    param = weight(3, 2)
    param.grad = torch.eye(3)[:, :2].to_sparse()
    with pytest.raises(Exception, match="(?i)sparse") as error:
        cls([param]).step()
    assert error.type in (RuntimeError, ValueError, TypeError)
    assert torch.equal(param, torch.ones(3, 2))


@every
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


@every
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


@every
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


@every
@both
def test_a_tensor_that_died_later_is_no_error(cls, implementation):
    param = weight(3, 2)
    optimizer = cls([param], lr=0.1, weight_decay=1e30, p=0.0, implementation=implementation)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert (param == 0).all()


@every
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


@every
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


@every
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


@every
@both
def test_zero_learning_rate_changes_nothing_but_the_state(cls, implementation):
    params, others = make_params(torch.float32), make_params(torch.float32)
    train(cls(params, lr=0.0, weight_decay=0.5, l2=0.5, implementation=implementation), params, 2)
    assert_same(params, others)


@every
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


@every
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


@every
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


@every
def test_a_negative_cutoff_switches_the_decay_off(cls):
    """The warm-up of a decay window: exactly the base's step, zeros free to move, nothing snapped."""
    torch.manual_seed(0)
    start = torch.randn(9, 5)
    start[::2] = 0.0
    off, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    train(cls([off], lr=1e-2, weight_decay=0.5, cutoff=-1.0), [off], 5)
    train(cls([plain], lr=1e-2), [plain], 5)
    assert torch.equal(off, plain) and (off != 0).all()
