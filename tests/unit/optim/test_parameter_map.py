"""Parameter slices: a flat tensor of several parameters with values of their own steps exactly as the parameters would
one by one.
"""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay
from lp_dist.optim.base import LpOptimizer
from lp_dist.optim.hooks import handle_of
from lp_dist.optim.hyperparameters import Phase
from lp_dist.optim.parameter_map import ParameterMap, ParamSlice

NAMES = ("a", "b", "c", "d")


def param_slices(lengths, gap: int = 0) -> list[ParamSlice]:
    """Neighbours in one flat tensor, each followed by `gap` elements of padding."""
    offsets = [sum(lengths[:i]) + gap * i for i in range(len(lengths))]
    return [
        ParamSlice(name, offset, length, 0, torch.Size([length]))
        for name, offset, length in zip(NAMES, offsets, lengths)
    ]


def test_a_tensor_without_slices_is_one_span():
    parameter_map, tensor = ParameterMap(), torch.zeros(5)
    assert parameter_map.value_spans(tensor, 5) == ((0, 5, {}),)
    assert tensor not in parameter_map and parameter_map.of(tensor) == ()


def test_spans_are_cut_where_values_change_and_merged_where_they_agree():
    parameter_map, tensor = ParameterMap(), torch.zeros(21)
    parameter_map.replace({tensor: param_slices([3, 4, 0, 6], gap=2)})
    assert [param_slice.name for param_slice in parameter_map.of(tensor)] == ["a", "b", "d"]  # of c nothing is here
    assert parameter_map.value_spans(tensor, 21) == ((0, 21, {}),)
    parameter_map.set("d", p=0.0)
    # Padding goes with what is before it.
    assert parameter_map.value_spans(tensor, 21) == ((0, 13, {}), (13, 8, {"p": 0.0}))
    parameter_map.set("b", p=0.0)
    assert parameter_map.value_spans(tensor, 21) == ((0, 5, {}), (5, 16, {"p": 0.0}))
    parameter_map.set("a", weight_decay=0.5, p=0.0)
    assert parameter_map.value_spans(tensor, 21) == ((0, 5, {"p": 0.0, "weight_decay": 0.5}), (5, 16, {"p": 0.0}))
    parameter_map.set("a", weight_decay=None)
    assert parameter_map.value_spans(tensor, 21) == ((0, 21, {"p": 0.0}),)
    assert parameter_map.values("a") == {"p": 0.0} and parameter_map.values("c") == {}
    parameter_map.replace({tensor: param_slices([21])})
    assert parameter_map.value_spans(tensor, 21) == ((0, 21, {}),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.1}, "'lr' can't differ within a shard.*another param group"),
        ({"betas": (0.9, 0.9)}, "'betas'"),
        ({"p": 9.0}, r"p=9.0 must be a number in \[-4, 4\]"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        (
            {"phase": Phase.OFF},
            "phase=.* must be 'decay', 'off'",
        ),  # no plain string: not to be loaded with weights_only
    ],
)
def test_bad_values_raise(values, message):
    with pytest.raises(ValueError, match=message):
        ParameterMap().set("a", **values)


def test_values_that_are_bad_together_are_refused_when_the_second_is_set():
    parameter_map = ParameterMap()
    parameter_map.set("a", latent=True)
    with pytest.raises(ValueError, match="latent=True and pattern='2:4' can't be together"):
        parameter_map.set("a", pattern="2:4")
    assert parameter_map.values("a") == {"latent": True}


def test_what_was_overridden_once_is_not_kept():
    """A target sets another λ and cutoff at each of thousands of updates."""
    parameter_map = ParameterMap()
    tracemalloc.start()
    try:
        for update in range(20_000):
            parameter_map.set("a", weight_decay=1.0 + update)
            if update == 1_000:
                early, _ = tracemalloc.get_traced_memory()
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert late < early + 50_000, f"{late - early:,} bytes more after 19,000 updates"
    assert parameter_map.values("a") == {"weight_decay": 20_000.0}


def adamw(params, implementation):
    return LpAdamW(params, lr=0.05, weight_decay=0.4, p=0.5, precondition=0.5, implementation=implementation)


def sgd(params, implementation):
    return LpSGD(params, lr=0.05, momentum=0.9, weight_decay=0.4, implementation=implementation)


def lion(params, implementation):
    return LpLion(params, lr=0.05, weight_decay=0.4, implementation=implementation)


def hooked(params, one_at_a_time):
    optimizer = torch.optim.AdamW(params, lr=0.05, weight_decay=0.4, foreach=True)
    add_lp_decay(optimizer, one_at_a_time=one_at_a_time)
    return optimizer


MAKERS = {
    "adamw": lambda p: adamw(p, "foreach"),
    "adamw, reference": lambda p: adamw(p, "reference"),
    "sgd": lambda p: sgd(p, None),
    "lion": lambda p: lion(p, None),
    "hooked": lambda p: hooked(p, True),
    "hooked with a copy": lambda p: hooked(p, False),
}
# p for which torch's arithmetic on a CPU is bitwise the same in any layout: see test_engines.
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "weight_decay": st.sampled_from([0.0, 0.1, 0.9]),
        "p": st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        "l2": st.sampled_from([0.0, 0.3]),
        "cutoff": st.sampled_from([0.02, math.inf]),
        "regrowth_below": st.sampled_from([0.0, 1e-3]),
    },
)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@pytest.mark.parametrize("maker", MAKERS)
@given(
    lengths=LENGTHS,
    values=st.lists(VALUES, min_size=4, max_size=4),
    gap=st.integers(0, 3),
    phase=st.sampled_from([{}, {"phase": "off"}, {"phase": "frozen"}]),
)
@settings(max_examples=25, deadline=None)
def test_a_flat_tensor_steps_as_its_parameters_one_by_one(maker, lengths, values, gap, phase):
    generator = torch.Generator().manual_seed(sum(lengths))
    slices = param_slices(lengths, gap)
    flat = torch.zeros(sum(lengths) + gap * len(lengths), requires_grad=True)
    with torch.no_grad():
        for param_slice in slices:
            flat[param_slice.offset : param_slice.offset + param_slice.length] = (
                torch.randn(param_slice.length, generator=generator) * 0.1
            )
    alone = [
        flat.detach()[param_slice.offset : param_slice.offset + param_slice.length].clone().requires_grad_()
        for param_slice in slices
    ]
    flat_optimizer = MAKERS[maker]([flat])
    groups = [{"params": [param], **overrides} for param, overrides in zip(alone, values)]
    optimizer = MAKERS[maker](groups)
    parameter_map = (
        flat_optimizer.parameter_map
        if isinstance(flat_optimizer, LpOptimizer)
        else handle_of(flat_optimizer).parameter_map
    )
    parameter_map.replace({flat: slices})
    for name, overrides in zip(NAMES, values):
        parameter_map.set(name, **overrides)
    for group in (*flat_optimizer.param_groups, *optimizer.param_groups):
        group.update({key: value for key, value in phase.items() if key in group})
    for _step in range(4):
        flat.grad = torch.zeros_like(flat)
        for param_slice, param in zip(slices, alone):
            param.grad = torch.randn(param_slice.length, generator=generator)
            flat.grad[param_slice.offset : param_slice.offset + param_slice.length] = param.grad
        flat_optimizer.step(), optimizer.step()
    inside = torch.zeros_like(flat, dtype=torch.bool)
    for param_slice, param in zip(slices, alone):
        assert torch.equal(
            flat.detach()[param_slice.offset : param_slice.offset + param_slice.length], param.detach()
        ), (
            param_slice.name,
            values,
        )
        inside[param_slice.offset : param_slice.offset + param_slice.length] = True
    assert not flat.detach()[~inside].any()  # padding stays zero


def test_values_of_a_parameter_wait_while_its_group_is_in_a_phase():
    """A frozen group freezes all its slices, whatever their p, but for those that do not decay."""
    flat = torch.tensor([1e-9, 0.0, 0.5, 0.0], requires_grad=True)
    optimizer = LpAdamW([flat], lr=0.1, weight_decay=0.4, precondition=0.0)
    optimizer.parameter_map.replace({flat: param_slices([2, 2])})
    optimizer.parameter_map.set("a", p=-4.0, cutoff=math.inf)  # |w|^6 of 1e-9 is zero in fp32: it would become zero
    optimizer.parameter_map.set("b", weight_decay=0.0)
    optimizer.param_groups[0]["phase"] = "frozen"
    flat.grad = torch.tensor([0.0, 1.0, 0.0, 1.0])
    optimizer.step()
    assert flat[0] == 1e-9 and flat[1] == 0  # frozen: alive stays, dead stays
    assert flat[3].item() == pytest.approx(-0.1)  # no λ, not frozen


def test_a_step_with_a_thousand_slices_makes_one_batch_per_set_of_values():
    flat = torch.randn(4000, requires_grad=True)
    optimizer = LpAdamW([flat], lr=0.1, weight_decay=0.4, precondition=0.0, implementation="foreach")
    slices = [ParamSlice(str(i), 4 * i, 4, 0, torch.Size([4])) for i in range(1000)]
    optimizer.parameter_map.replace({flat: slices})
    for i in range(0, 1000, 2):
        optimizer.parameter_map.set(str(i), p=0.0)
    flat.grad = torch.ones_like(flat)
    calls = []
    update = optimizer.update_rows
    optimizer.update_rows = lambda group, rows, direction: (
        calls.append((group["p"], len(rows))),
        update(group, rows, direction),
    )
    optimizer.step()
    assert calls == [(0.0, 500), (0.5, 500)]


def test_a_copy_of_an_optimizer_has_no_slices():
    """Its parameters are others; it must be attached anew, and says so by not being in the map."""
    import copy

    flat = torch.randn(4, requires_grad=True)
    optimizer = LpAdamW([flat], lr=0.1, weight_decay=0.4, precondition=0.0)
    optimizer.parameter_map.replace({flat: param_slices([4])})
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["params"][0] not in twin.parameter_map
    assert flat in optimizer.parameter_map


@pytest.mark.parametrize("implementation", [None, "foreach"])
def test_parts_of_a_tensor_that_lies_in_another_order_are_not_taken_for_others(implementation):
    """The order of its dimensions tells where a part is, and in memory it is elsewhere."""
    param = torch.nn.Parameter(torch.randn(4, 6).t())
    param.grad = torch.randn(4, 6).t()
    before = param.detach().clone()
    optimizer = LpAdamW([param], lr=0.1, weight_decay=0.1, implementation=implementation)
    optimizer.parameter_map.replace(
        {param: [ParamSlice("a", 0, 12, 0, torch.Size([3, 4])), ParamSlice("b", 12, 12, 0, torch.Size([3, 4]))]}
    )
    optimizer.parameter_map.set("b", weight_decay=0.3)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        optimizer.step()
    assert torch.equal(param, before)
