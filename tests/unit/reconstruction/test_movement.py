"""How far weights have moved, from random projections."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.targets import START, TOTAL, TargetRun, model_of
from lp_dist import LpAdamW, SparsityTarget, attach
from lp_dist.reconstruction import movement
from lp_dist.reconstruction.movement import PROJECTIONS, Projections, signs
from lp_dist.sharding.shards import find_shards


def shards_of(*weights: torch.Tensor) -> list:
    model = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights])
    return find_shards(model, LpAdamW(model.parameters()))


def test_signs_are_even_and_independent_of_each_other_and_of_neighbours():
    of_first, of_second = (signs(torch.arange(4096), number) for number in (0, 1))
    assert of_first.shape == (PROJECTIONS, 4096) and of_first.dtype == torch.float64
    assert torch.equal(of_first.abs(), torch.ones_like(of_first))
    n = of_first.shape[1]
    assert of_first.mean(1).abs().max() < 5 / n**0.5
    products = (of_first @ of_first.T / n).fill_diagonal_(0.0)
    assert products.abs().max() < 5 / n**0.5
    assert (of_first @ of_second.T / n).abs().max() < 5.5 / n**0.5
    for distance in (1, 2, 3, 64):
        assert (of_first[:, distance:] * of_first[:, :-distance]).mean(1).abs().max() < 5 / n**0.5


def test_signs_are_those_of_splitmix64():
    """By integers of any size, so that no sign depends on what a shift does to negative words."""
    mask = (1 << 64) - 1

    def word(position: int, number: int) -> int:
        z = ((position + 1) * 0x9E3779B97F4A7C15 + (number + 1) * 0xDEADBEEFCAFEF00F) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    positions = [0, 1, 5, 2**31, 2**40 + 3]
    for number in (0, 3):
        by_hand = [[1.0 - 2.0 * (word(position, number) >> bit & 1) for position in positions] for bit in range(64)]
        assert signs(torch.tensor(positions), number).tolist() == by_hand


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_movement_is_found_within_the_spread_of_its_projections(seed, share):
    generator = torch.Generator().manual_seed(seed)
    before = [torch.randn(40, 30, generator=generator), torch.randn(50, generator=generator)]
    after = [w + share * torch.randn(w.shape, generator=generator) for w in before]
    movement = Projections.of(shards_of(*after)).moved_since(Projections.of(shards_of(*before)))
    exact = sum(float((a - b).square().sum()) for a, b in zip(after, before)) / sum(
        float(a.square().sum()) for a in after
    )
    assert movement == pytest.approx(exact, rel=6 * (2 / PROJECTIONS) ** 0.5)


def test_movement_that_all_weights_share_is_found_too():
    """A mean or a sum of blocks would take it for more than it is."""
    before, after = torch.randn(64, 64), None
    after = before + 0.1
    movement = Projections.of(shards_of(after)).moved_since(Projections.of(shards_of(before)))
    assert movement == pytest.approx(float(0.01 * after.numel() / after.square().sum()), rel=0.9)
    assert movement > 0.1 * 0.01


def test_a_sample_tells_the_same(monkeypatch):
    before = torch.randn(200, 99)
    after = before + 0.2 * torch.randn_like(before)
    everything = Projections.of(shards_of(after)).moved_since(Projections.of(shards_of(before)))
    monkeypatch.setattr(movement, "SAMPLE_SIZE", 2000)
    now, then = Projections.of(shards_of(after)), Projections.of(shards_of(before))
    assert now.squares < 0.2 * float(after.square().sum())
    assert now.moved_since(then) == pytest.approx(everything, rel=1.0)
    assert now.moved_since(now) == 0.0


def test_projections_go_through_a_checkpoint_with_every_bit():
    projections = Projections.of(shards_of(torch.randn(20, 20)))
    assert Projections.from_list(json.loads(json.dumps(projections.as_list()))) == projections
    assert Projections((1.0,), 0.0).moved_since(Projections((0.0,), 0.0)) == float("inf")


# -- what a target does with it ------------------------------------------------


def run_of(lr: float, **more) -> TargetRun:
    return TargetRun(SparsityTarget(0.8, **more), lr=lr)


def resumed(run: TargetRun, lr: float) -> TargetRun:
    """Another run that was loaded with the state of this one."""
    other = run_of(lr)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    other.attached.load_state_dict(json.loads(json.dumps(run.attached.state_dict())))
    other.taken = run.taken
    return other


def test_survivors_move_where_weights_hardly_move(caplog):
    with caplog.at_level(logging.INFO, "lp_dist"):
        run = run_of(lr=1e-4).to(START + 1)
    controller = run.attached.controllers[0]
    assert controller.reconstruction is not None
    assert controller.update_every == round((controller.window.end - controller.window.start) / 5)
    assert "of their norm before the window: survivors move" in caplog.text
    run.to(TOTAL)
    assert controller.reconstruction.moved > 0


def test_survivors_stay_where_weights_move_far(caplog):
    """As if nobody had asked for it: the same bits as with reconstruct=False."""
    with caplog.at_level(logging.INFO, "lp_dist"):
        run = run_of(lr=0.1).to(TOTAL)
    controller = run.attached.controllers[0]
    assert controller.reconstruction is None
    assert "survivors stay where they are, as they do from scratch (reconstruct=True moves them)" in caplog.text
    without = run_of(lr=0.1, reconstruct=False).to(TOTAL)
    assert controller.update_every == without.attached.controllers[0].update_every
    assert all(torch.equal(run.weights()[name], weight) for name, weight in without.weights().items())


def test_true_moves_them_however_far_weights_have_moved():
    run = run_of(lr=0.1, reconstruct=True).to(START + 1)
    assert run.attached.controllers[0].reconstruction is not None


def test_weights_that_are_loaded_after_attach_have_not_moved():
    run = run_of(lr=1e-4)
    torch.manual_seed(5)
    for param in run.model.parameters():
        param.data.copy_(torch.randn_like(param) * 0.1)
    run.to(START + 1)
    assert run.attached.controllers[0].reconstruction is not None


def test_a_window_that_begins_with_the_first_step_has_nothing_to_compare():
    model = model_of()
    optimizer = LpAdamW(model.parameters(), lr=0.1)
    attached = attach(model, optimizer, target=SparsityTarget(0.5, start=0.0, end=0.9), total_steps=20)
    for _ in range(4):
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        attached.after_step()
    assert attached.controllers[0].before and attached.controllers[0].reconstruction is not None


def test_what_was_decided_is_kept_by_a_checkpoint():
    for lr, moves in ((0.1, False), (1e-4, True)):
        for step in (START - 1, START + 2):
            run = run_of(lr).to(step)
            other = resumed(run, lr)
            run.to(TOTAL)
            other.to(TOTAL)
            assert (other.attached.controllers[0].reconstruction is not None) is moves
            assert all(torch.equal(run.weights()[name], weight) for name, weight in other.weights().items())
