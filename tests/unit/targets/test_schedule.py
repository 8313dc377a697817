"""The decay window as a function of the optimizer step, and what its three phases do to weights."""

from __future__ import annotations

import math

import pytest
import torch

from lp_dist import LpAdamW
from lp_dist.targets.schedule import DecayWindow, Ramp


def test_fractions_and_steps_give_the_same_window():
    assert DecayWindow(0.1, 0.8).steps(50) == (5, 40)
    assert DecayWindow(5, 40).steps(50) == (5, 40)
    assert DecayWindow().steps(50) == (0, 50)
    assert DecayWindow(0.1, 40).steps(50) == (5, 40)


def test_phases_follow_each_other_at_the_exact_steps():
    window = DecayWindow(2, 5, {"p": 0.5, "precondition": 1.0})
    phases = [window.at(step, 8) for step in range(8)]
    assert phases[:2] == [{"phase": "off"}] * 2
    assert phases[2:5] == [{"phase": "decay", "p": 0.5, "precondition": 1.0}] * 3
    assert phases[5:] == [{"phase": "frozen", "p": 0.5, "precondition": 1.0}] * 3


@pytest.mark.parametrize(
    "start, end, message",
    [(-0.1, 1.0, "start=-0.1"), (0.0, math.nan, "end=nan"), (0.5, 0.5, "start before"), (30, 20, "start before")],
)
def test_a_bad_window_is_refused_with_its_values(start, end, message):
    with pytest.raises(ValueError, match=message):
        DecayWindow(start, end)


def test_a_window_without_a_step_is_refused():
    with pytest.raises(ValueError, match="from step 90 to 100 holds no step of a run of 50 steps"):
        DecayWindow(90, 100).steps(50)
    with pytest.raises(ValueError, match="holds no step"):
        DecayWindow(0.1, 0.11).steps(10)


def run(window: DecayWindow | None, steps: int, weight_decay: float) -> list[torch.Tensor]:
    """Weights after each step of a run on noise, with a quarter of the weights zero at the start."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(64, 16) * 0.1)
    with torch.no_grad():
        w[::4] = 0
    opt = LpAdamW([w], lr=1e-2, weight_decay=weight_decay)
    history = []
    for step in range(steps):
        if window is not None:
            opt.param_groups[0].update(window.at(step, steps))
        w.grad = torch.randn_like(w)
        opt.step()
        history.append(w.detach().clone())
    return history


def test_before_the_window_the_step_is_exactly_that_of_the_base():
    decayed, plain = run(DecayWindow(6, 20), 24, 0.3), run(None, 24, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(decayed[:6], plain[:6]))
    assert not torch.equal(decayed[6], plain[6])
    assert (decayed[5] == 0).sum() == 0  # weights that were zero are free to leave it


def test_after_the_window_zeros_stay_and_survivors_train_without_decay():
    history = run(DecayWindow(6, 20, {"p": 0.0}), 30, 0.3)
    dead = history[19] == 0
    assert 0 < dead.sum() < dead.numel()
    for before, after in zip(history[19:], history[20:]):
        assert torch.equal(after == 0, dead)
        assert (after[~dead] != before[~dead]).all()
    # Without decay Adam's step is bounded by about lr: nothing is pulled towards zero in proportion to the weight.
    assert ((history[-1] - history[19])[~dead].abs() <= 10 * 1e-2 * 1.2).all()


@pytest.mark.parametrize("shape, half", [("linear", 1.25), ("cosine", 1.25), ("geometric", 1.0)])
def test_a_ramp_goes_from_first_to_last(shape, half):
    ramp = Ramp(2.0, 0.5, shape)
    assert (ramp(0.0), ramp(1.0), ramp(2.0)) == (2.0, 0.5, 0.5) and ramp(0.5) == pytest.approx(half)
    values = [ramp(i / 50) for i in range(51)]
    assert values == sorted(values, reverse=True)
    early = Ramp(2.0, 0.5, shape, until=0.5)
    assert early(0.25) == ramp(0.5) and early(0.5) == early(0.9) == 0.5


@pytest.mark.parametrize(
    "values, message",
    [
        ({"shape": "cubic"}, "shape='cubic'"),
        ({"until": 0.0}, "until=0.0"),
        ({"first": 0.0, "shape": "geometric"}, "from 0 to 0.5 needs both above 0"),
    ],
)
def test_a_bad_ramp_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Ramp(**{"first": 2.0, "last": 0.5, **values})


def test_a_window_moves_its_values_step_by_step():
    window = DecayWindow(
        2,
        7,
        {
            "p": Ramp(2.0, 0.0),
            "weight_decay": Ramp(1e-3, 1e-1, "geometric"),
            "l2": lambda fraction: 0.1 * (1 - fraction),
        },
    )
    assert [window.at(step, 9)["p"] for step in range(2, 7)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert [window.at(step, 9)["weight_decay"] for step in (2, 4, 6)] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert [window.at(step, 9)["l2"] for step in (2, 6)] == pytest.approx([0.1, 0.0])
    assert window.at(1, 9) == {"phase": "off"}
    # As in the last step of the window, so that a run that is resumed here goes on with the same l2.
    assert window.at(7, 9) == window.at(8, 9) == {**window.at(6, 9), "phase": "frozen"}
    scheduled = window.scheduled()
    assert (
        0.123 in scheduled["p"]
        and 3 in scheduled["weight_decay"]
        and "off" in scheduled["phase"]
        and "cutoff" not in scheduled
    )


def test_a_value_that_leaves_its_range_on_the_way_is_refused():
    with pytest.raises(ValueError, match=r"p=-4.5 must be a number in \[-4, 4\]"):
        DecayWindow(values={"p": Ramp(2.0, -4.5)})


def test_p_comes_down_from_2_and_then_makes_zeros():
    torch.manual_seed(0)
    weights = torch.randn(1000) * 0.1
    zeros = {}
    for name, p in (("ramp", Ramp(2.0, 0.5, until=0.5)), ("fixed", 2.0)):
        w = torch.nn.Parameter(weights.clone())
        optimizer = LpAdamW([w], lr=1e-3, weight_decay=1.0, precondition=0.0)
        window = DecayWindow(0.0, 1.0, {"p": p})
        for step in range(60):
            optimizer.param_groups[0].update(window.at(step, 60))
            w.grad = torch.zeros_like(w)
            optimizer.step()
        zeros[name] = int((w == 0).sum())
    assert zeros["fixed"] == 0 and 100 < zeros["ramp"] < 900, zeros
