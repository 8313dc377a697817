"""What PyTorch asks of its own optimizers, asked of LpAdamW, LpSGD and LpLion.

The optimizers are described in PyTorch's own terms in optimizer_infos.py, and the checks follow those of its
test/test_optim.py. Of PyTorch's expectations these do not apply:

| expectation | why not |
|---|---|
| complex parameters | |w|^(p-2) of a complex weight is another penalty; refused (test_optimizers.py) |
| sparse gradients | the decay touches every weight, so nothing is saved; refused (test_optimizers.py) |
| no-op for zero gradients | a decayed weight shrinks without gradient too, as under AdamW; holds at weight_decay = 0 |
| capturable, differentiable | not offered: no such argument |
| fused | comes later; refused (test_optimizers.py) |
| foreach, a flag | here `implementation`; the two are equal bit for bit (test_optimizers.py) |
| several devices, accelerators | these tests run without a GPU |
| amsgrad, tensor betas | not offered |
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo

from helpers.optimizer_infos import INFOS, SCHEDULERS, Problem
from lp_dist.optim.optimizers import LpAdamW, LpSGD

CASES = [pytest.param(info, i, id=f"{info.name}-{i.desc}") for info in INFOS for i in info.optim_inputs_func("cpu")]
ERRORS = [
    pytest.param(info, e, id=f"{info.name}-{e.optimizer_error_input.desc}")
    for info in INFOS
    for e in info.optim_error_inputs_func("cpu", torch.float32)
]
each_optimizer = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
each = pytest.mark.parametrize(("info", "case"), CASES)


def assert_same_weights(left, right):
    assert torch.equal(left.weight, right.weight) and torch.equal(left.bias, right.bias)


def assert_same_state_dict(left, right):
    torch.testing.assert_close(left["state"], right["state"], rtol=0.0, atol=0.0)
    assert left["param_groups"] == right["param_groups"]


@each
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(
    "schedulers", [(), *SCHEDULERS], ids=["no scheduler", "step", "plateau", "linear and exponential"]
)
def test_forloop_goes_right_direction(info, case, groups, schedulers):
    problem = Problem(info, case.kwargs, groups=groups)
    schedulers = [make(problem.optimizer) for make in schedulers]
    first = problem.closure().item()
    for _ in range(20):
        loss = problem.optimizer.step(problem.closure)
        for scheduler in schedulers:
            scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    last = problem.closure().item()
    assert last > first if case.kwargs.get("maximize") else last < first


@each
def test_closure_is_called_once_and_its_loss_returned(info, case):
    problem = Problem(info, case.kwargs)
    expected = Problem(info, case.kwargs).closure()
    assert torch.equal(problem.optimizer.step(problem.closure), expected)
    assert problem.calls == 1
    assert problem.optimizer.step() is None
    assert torch.is_grad_enabled()


@each_optimizer
@pytest.mark.parametrize("zero", [False, True])
def test_step_without_gradients_or_decay_is_a_noop(info, zero):
    problem = Problem(info, {"weight_decay": 0.0 if zero else 0.1})
    start = problem.weight.detach().clone()
    if zero:
        problem.weight.grad = torch.zeros_like(problem.weight)
    problem.optimizer.step()
    assert torch.equal(problem.weight, start)


@each
def test_state_dict_is_deterministic_and_loads_into_a_twin(info, case):
    problem, twin = Problem(info, case.kwargs).train(5), Problem(info, case.kwargs)
    twin.weight.data.copy_(problem.weight.detach())
    twin.bias.data.copy_(problem.bias.detach())
    saved = copy.deepcopy(problem.optimizer.state_dict())
    given = copy.deepcopy(saved)
    twin.optimizer.load_state_dict(given)
    assert_same_state_dict(saved, given)
    problem.train(5)
    twin.train(5)
    assert_same_weights(problem, twin)
    assert_same_state_dict(problem.optimizer.state_dict(), twin.optimizer.state_dict())


@each
def test_save_and_load_with_weights_only(info, case):
    problem = Problem(info, case.kwargs).train(3)
    buffer = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert_same_state_dict(problem.optimizer.state_dict(), torch.load(buffer, weights_only=True))


@each
def test_pickle_and_deepcopy_keep_everything(info, case):
    problem = Problem(info, case.kwargs).train(3)
    for twin in (pickle.loads(pickle.dumps(problem.optimizer)), copy.deepcopy(problem.optimizer)):
        assert_same_state_dict(twin.state_dict(), problem.optimizer.state_dict())
        public = [{key for key in vars(o) if not key.startswith("_")} for o in (problem.optimizer, twin)]
        assert public[0] == public[1]
        assert getattr(twin, "implementation", None) == getattr(problem.optimizer, "implementation", None)
        assert repr(twin) == repr(problem.optimizer) and info.name in repr(twin)


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_dict_loads_into_another_dtype(info, dtype):
    kwargs = {"weight_decay": 0.01, **({"momentum": 0.9} if info.optim_cls is LpSGD else {})}
    problem, other = Problem(info, kwargs).train(3), Problem(info, kwargs, dtype=dtype)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    for state in other.optimizer.state.values():
        for key, value in state.items():
            assert value.dtype == (torch.float32 if key == "step" else dtype)
    other.train(2)
    assert all(value.dtype == dtype for s in other.optimizer.state.values() for k, value in s.items() if k != "step")


@each
def test_can_load_older_state_dict(info, case):
    """A checkpoint from before a group key existed: the key gets its default and training goes on."""
    problem = Problem(info, case.kwargs).train(3)
    for key in ("maximize", "p", "l2", "cutoff", *(("precondition",) if info.optim_cls is LpAdamW else ())):
        old = copy.deepcopy(problem.optimizer.state_dict())
        del old["param_groups"][0][key]
        other = Problem(info, {})
        other.optimizer.load_state_dict(old)
        assert other.optimizer.param_groups[0][key] == other.optimizer.defaults[key]
        other.train(1)


@pytest.mark.parametrize("as_number", [False, True])
def test_state_of_torch_adamw_loads_into_ours(as_number):
    """Going over from AdamW in mid-training; `as_number`: torch once kept `step` as a Python number."""
    info = INFOS[0]
    torch_problem = Problem(OptimizerInfo(torch.optim.AdamW, optim_inputs_func=None), {"weight_decay": 0.0}).train(4)
    lp_problem = Problem(info, {})
    lp_problem.weight.data.copy_(torch_problem.weight.detach())
    lp_problem.bias.data.copy_(torch_problem.bias.detach())
    saved = copy.deepcopy(torch_problem.optimizer.state_dict())
    if as_number:
        for state in saved["state"].values():
            state["step"] = state["step"].item()
    lp_problem.optimizer.load_state_dict(saved)
    assert_same_weights(lp_problem.train(3), torch_problem.train(3))


@each_optimizer
def test_names_are_kept_and_named_loads_into_unnamed(info):
    named, plain = Problem(info, {}, named=True).train(2), Problem(info, {}).train(2)
    assert_same_weights(named, plain)
    assert named.optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    plain.optimizer.load_state_dict(named.optimizer.state_dict())
    named.optimizer.load_state_dict(Problem(info, {}).train(2).optimizer.state_dict())
    assert named.optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@each_optimizer
def test_hooks_are_called_in_order(info):
    problem, order = Problem(info, {"weight_decay": 0.01}), []
    optimizer = problem.optimizer
    optimizer.register_step_pre_hook(lambda o, args, kwargs: order.append("before step"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: order.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda o: order.append("before save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: order.append("after save"))
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: order.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda o: order.append("after load"))
    problem.train(1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == [f"{when} {what}" for what in ("step", "save", "load") for when in ("before", "after")]


@each_optimizer
def test_defaults_groups_and_gradients(info):
    problem = Problem(info, {"weight_decay": 0.01, "lr": 0.5}).train(1)
    optimizer = problem.optimizer
    assert set(optimizer.param_groups[0]) == {"params", *optimizer.defaults}
    assert all(state for state in optimizer.state.values())  # no empty state is left behind
    late = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.25, "p": -1.0})
    assert {**optimizer.param_groups[1], "params": 0} == {
        **optimizer.param_groups[0],
        "params": 0,
        "lr": 0.25,
        "p": -1.0,
    }
    late.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(late, torch.ones(3))
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(late.grad, torch.zeros(3))
    optimizer.zero_grad()
    assert late.grad is None and problem.weight.grad is None


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_error_inputs(info, error):
    case = error.optimizer_error_input
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = [torch.nn.Parameter(torch.ones(1, 1))] if case.params is None else case.params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error.error_type, match=f"(?s){error.error_regex}"):
            info.optim_cls(params, **case.kwargs)
