"""The decay window as a function of the optimizer step, and what its three phases do to weights."""

from __future__ import annotations

import math

import pytest
import torch

from lp_dist import LpAdamW
from lp_dist.schedule import FROZEN, OFF, DecayWindow


def test_fractions_and_steps_give_the_same_window():
    assert DecayWindow(0.1, 0.8).steps(50) == (5, 40)
    assert DecayWindow(5, 40).steps(50) == (5, 40)
    assert DecayWindow().steps(50) == (0, 50)
    assert DecayWindow(0.1, 40).steps(50) == (5, 40)


def test_phases_follow_each_other_at_the_exact_steps():
    window = DecayWindow(2, 5, {"p": 0.5, "precondition": 1.0})
    phases = [window.at(step, 8) for step in range(8)]
    assert phases[:2] == [OFF] * 2
    assert phases[2:5] == [{"cutoff": math.inf, "p": 0.5, "precondition": 1.0}] * 3
    assert phases[5:] == [FROZEN] * 3


@pytest.mark.parametrize("start, end, part", [
    (-0.1, 1.0, "start=-0.1"), (0.0, math.nan, "end=nan"), (0.5, 0.5, "start before"), (30, 20, "start before")])
def test_a_bad_window_is_refused_with_its_values(start, end, part):
    with pytest.raises(ValueError, match=part):
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
    ours, plain = run(DecayWindow(6, 20), 24, 0.3), run(None, 24, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours[:6], plain[:6]))
    assert not torch.equal(ours[6], plain[6])
    assert (ours[5] == 0).sum() == 0  # weights that were zero are free to leave it


def test_after_the_window_zeros_stay_and_survivors_train_without_decay():
    history = run(DecayWindow(6, 20, {"p": 0.0}), 30, 0.3)
    dead = history[19] == 0
    assert 0 < dead.sum() < dead.numel()
    for before, after in zip(history[19:], history[20:]):
        assert torch.equal(after == 0, dead)
        assert (after[~dead] != before[~dead]).all()
    # Without decay Adam's step is bounded by about lr: nothing is pulled towards zero in proportion to the weight.
    assert ((history[-1] - history[19])[~dead].abs() <= 10 * 1e-2 * 1.2).all()
