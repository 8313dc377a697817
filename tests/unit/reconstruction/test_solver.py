"""What survivors move to, against the least squares of each row by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lp_dist.reconstruction.solver import DAMPING, move_survivors


def problem(rows: int, inputs: int, tokens: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, the same with zeros, XᵀX), of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, inputs, generator=generator)
    mixing = torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    removed = torch.rand(rows, inputs, generator=generator) < share
    return weights, weights.masked_fill(removed, 0.0), x.T @ x


def solved_exactly(before: Tensor, after: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Row by row, in float64, by the normal equations."""
    before, after, gram = before.double(), after.double(), gram.double()
    damped = gram + damping * gram.diagonal().diag()
    moved = after.clone()
    for row, old in zip(moved, before):
        kept = row.nonzero().flatten()
        if len(kept):
            row[kept] += torch.linalg.solve(damped[kept][:, kept], gram[kept] @ (old - row))
    return moved


def damage(before: Tensor, after: Tensor, gram: Tensor) -> float:
    difference = (before - after).double()
    return float((difference @ gram.double() * difference).sum())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 24),
    tokens=st.integers(1, 60),
    share=st.sampled_from([0.2, 0.5, 0.9]),
    damping=st.sampled_from([0.01, 0.3]),
    seed=st.integers(0, 99),
)
def test_with_enough_iterations_it_is_the_least_squares_of_each_row(rows, inputs, tokens, share, damping, seed):
    before, after, gram = problem(rows, inputs, tokens, share, seed)
    moved = move_survivors(before, after, gram, iterations=60, damping=damping)
    torch.testing.assert_close(
        moved.double(), solved_exactly(before, after, gram, damping), rtol=1e-3, atol=1e-3 * float(before.abs().max())
    )
    assert torch.equal(moved == 0, after == 0)


def test_as_many_iterations_as_are_taken_come_near_to_it():
    before, after, gram = problem(64, 96, 400, 0.5, 0)
    removed, best = damage(before, after, gram), damage(before, solved_exactly(before, after, gram, DAMPING), gram)
    got = damage(before, move_survivors(before, after, gram), gram)
    assert best <= got < best + 0.02 * (removed - best) and removed > 2 * best


def test_the_outputs_never_come_to_differ_more():
    for seed in range(20):
        before, after, gram = problem(5, 12, 3 + seed, 0.6, seed)
        for iterations in (1, 2, 12):
            assert damage(before, move_survivors(before, after, gram, iterations), gram) <= damage(
                before, after, gram
            ) * (1 + 1e-5)


def test_a_scale_of_the_inputs_changes_nothing():
    """So that tokens which several ranks have alike may count several times."""
    before, after, gram = problem(5, 12, 30, 0.5, 1)
    torch.testing.assert_close(
        move_survivors(before, after, 4.0 * gram), move_survivors(before, after, gram), rtol=1e-5, atol=1e-6
    )


def test_two_inputs_by_hand():
    """x = (1, ½) always: what the second weight gave, the first one gives, but for the damping."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 0.25]])
    moved = move_survivors(torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 0.0]]), gram, damping=0.0)
    torch.testing.assert_close(moved, torch.tensor([[4.0, 0.0]]))
    damped = move_survivors(torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 0.0]]), gram, damping=0.8)
    torch.testing.assert_close(damped, torch.tensor([[2.0 + 2.0 / 1.8, 0.0]]))  # δ is 0.8 · 1


def test_a_survivor_does_not_become_zero():
    """Else there would be more zeros than requested: here the two weights cancel."""
    moved = move_survivors(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(2, 2), damping=0.0)
    assert torch.equal(moved, torch.tensor([[1.0, 0.0]]))


def test_rows_that_lose_nothing_and_rows_without_survivors_stay_as_they_are():
    before, after, gram = problem(3, 8, 30, 0.5, 2)
    after[0], after[1] = before[0], 0.0
    moved = move_survivors(before, after, gram)
    assert torch.equal(moved[:2], after[:2]) and not torch.equal(moved[2], after[2])


@pytest.mark.parametrize("dead", [slice(0, 3), slice(None)], ids=["some", "all"])
def test_inputs_that_are_always_zero_move_nothing(dead):
    """A weight of such an input stays, and its loss is made up for by nothing."""
    before, after, gram = problem(4, 8, 30, 0.4, 3)
    gram[dead] = 0.0
    gram[:, dead] = 0.0
    moved = move_survivors(before, after, gram)
    assert moved.isfinite().all() and torch.equal(moved[:, dead], after[:, dead])


def test_an_input_that_is_far_larger_than_the_others_changes_nothing_for_them():
    """Language models have such; a damping by the mean of the diagonal would be all theirs."""
    before, after, gram = problem(4, 8, 60, 0.5, 5)
    scale = torch.ones(8)
    scale[3] = 1000.0
    moved = move_survivors(before / scale, after / scale, gram * scale * scale[:, None])
    torch.testing.assert_close(moved * scale, move_survivors(before, after, gram), rtol=1e-3, atol=1e-3)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """But for rounding, which conjugate gradients carry along."""
    before, after, gram = problem(7, 16, 40, 0.5, 4)
    together = move_survivors(before, after, gram)
    alone = torch.cat([move_survivors(b[None], a[None], gram) for b, a in zip(before, after)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-4)
    others = move_survivors(before.flip(0), after.flip(0), gram).flip(0)
    torch.testing.assert_close(together, others, rtol=0, atol=2e-4)


def test_inputs_that_are_not_finite_move_nothing():
    before, after, gram = problem(4, 8, 30, 0.5, 5)
    assert torch.equal(move_survivors(before, after, torch.full_like(gram, float("nan"))), after)
