"""Step counts that are views of one tensor: each parameter's own, whoever replaces them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from lp_dist import LpAdamW
from lp_dist.optim.step_counts import StepCounts


def states_of(*counts: torch.Tensor) -> list[dict]:
    return [{"step": count} for count in counts]


def test_one_addition_counts_all_and_each_has_its_own():
    states = states_of(*(torch.tensor(float(n)) for n in (0, 7, 2)))
    counts = StepCounts()
    assert counts.advance(states) == [1, 8, 3] and counts.advance(states) == [2, 9, 4]
    assert [float(state["step"]) for state in states] == [2, 9, 4]
    assert len({state["step"].untyped_storage().data_ptr() for state in states}) == 1
    states[1]["step"].fill_(100)  # as an engine may
    assert counts.advance(states) == [3, 101, 5]


def test_a_count_that_was_replaced_keeps_its_number_and_one_for_several_becomes_several():
    shared = torch.tensor(4, dtype=torch.int64)
    states = states_of(shared, shared, torch.tensor([9.0]))
    counts = StepCounts()
    assert counts.advance(states) == [5, 5, 10] and int(shared) == 4
    states[0]["step"] = torch.tensor(1.0)
    assert counts.advance(states) == [2, 6, 11] and states[0]["step"].dtype == torch.float32
    assert counts.advance(states[1:]) == [7, 12] and float(states[0]["step"]) == 2, "the first has no gradient"
    assert counts.advance(states) == [3, 8, 13]


def test_counts_of_several_devices():
    states = states_of(torch.tensor(1.0), torch.zeros((), device="meta"), torch.tensor(3.0))
    counts = StepCounts()
    for number in (1, 2):
        first, there, last = counts.advance(states)
        assert (first, last) == (1 + number, 3 + number) and there is states[1]["step"] and there.device.type == "meta"


def optimizer_of(number: int) -> tuple[LpAdamW, list[Parameter]]:
    params = [Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(n))) for n in range(number)]
    for param in params:
        param.grad = torch.ones_like(param)
    return LpAdamW(params, lr=0.1, weight_decay=0.01), params


@pytest.mark.parametrize("way", ["saved", "copied"])
def test_a_state_goes_on_by_itself(way):
    """Counts in a state that was saved or copied are not those of the optimizer that goes on."""
    optimizer, _ = optimizer_of(3)
    optimizer.step()
    if way == "saved":
        torch.save(optimizer.state_dict(), file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(optimizer.state_dict())
    other, _ = optimizer_of(3)
    other.load_state_dict(state)
    optimizer.step()
    other.step()
    other.step()
    assert [int(s["step"]) for s in optimizer.state.values()] == [2] * 3
    assert [int(s["step"]) for s in other.state.values()] == [3] * 3
    assert [int(s["step"]) for s in state["state"].values()] == [1] * 3


def test_parameters_with_gradients_now_and_then():
    optimizer, params = optimizer_of(4)
    present = [(0, 1), (0, 1, 2, 3), (2,), (0, 3), (0, 1, 2, 3)]
    for numbers in present:
        for number, param in enumerate(params):
            param.grad = torch.ones_like(param) if number in numbers else None
        optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [
        sum(number in numbers for numbers in present) for number in range(4)
    ]
