"""With p = 1 the decay comes to a known optimum: that of L1-regularised logistic regression (the problem of arXiv
2105.05449), zeros included. A convex solver that shares no code with lp_dist finds it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lp_dist import LpSGD

# The greatest difference of a weight from the solver's. A weight that is not zero is a fixed point of the step exactly
# where its gradient is −λ·sign(w), so that only the rounding of sums is left.
TOLERANCE = 1e-9
ROWS, FEATURES, RATE = 80, 16, 2.0


def data() -> tuple[Tensor, Tensor]:
    """Labels that depend on six of the features.

    Returns:
        Features, fp64 (80, 16), and labels 0 or 1, fp64 (80,).
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    true_weights = torch.tensor([2.0, -2.0, 1.5, -1.0, 1.0, 0.5], dtype=torch.float64)
    noise = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return features, (features[:, :6] @ true_weights + 0.3 + noise > 0).double()


def loss(features: Tensor, labels: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(features @ weights + intercept, labels)


def solve(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The minimum of loss + penalty·‖w‖_1 by FISTA (Beck and Teboulle, 2009), with restarts (O'Donoghue and Candès,
    2015). The intercept has no penalty.

    Returns:
        Weights (16,) and the intercept (1,), which fulfil the conditions of optimality to 1e-10.
    """
    design = torch.cat([features, torch.ones(ROWS, 1, dtype=torch.float64)], dim=1)
    thresholds = torch.full((FEATURES + 1,), penalty, dtype=torch.float64)
    thresholds[-1] = 0.0
    # The logistic loss has a curvature of at most 1/4.
    step = 4.0 * ROWS / torch.linalg.matrix_norm(design, 2) ** 2

    def gradient(point: Tensor) -> Tensor:
        return design.t() @ (torch.sigmoid(design @ point) - labels) / ROWS

    solution = extrapolated = torch.zeros(FEATURES + 1, dtype=torch.float64)
    momentum = 1.0
    for _ in range(1000):
        moved = extrapolated - step * gradient(extrapolated)
        following = moved.sign() * (moved.abs() - step * thresholds).clamp_min(0.0)
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        if (extrapolated - following) @ (following - solution) > 0:
            faster = momentum = 1.0
        extrapolated = following + (momentum - 1) / faster * (following - solution)
        solution, momentum = following, faster
    slope = gradient(solution)
    zero = solution == 0
    assert (slope + thresholds * solution.sign())[~zero].abs().max() < 1e-10
    # No weight is on the edge between zero and not, so that the zeros of the optimum are certain.
    assert not zero.any() or slope[zero].abs().max() < 0.99 * penalty
    return solution[:-1], solution[-1:]


@pytest.mark.parametrize("penalty, momentum, zeros", [(0.02, 0.0, 6), (0.05, 0.5, 9), (0.1, 0.0, 13)])
def test_lp_sgd_comes_to_the_optimum_of_l1_regularised_logistic_regression(penalty, momentum, zeros):
    features, labels = data()
    optimum, intercept_there = solve(features, labels, penalty)
    generator = torch.Generator().manual_seed(1)
    # Zero absorbs, so it starts at other values. With momentum the gradient counts 1/(1−μ) times and the decoupled
    # decay once, so λ is as many times the penalty.
    weights = torch.randn(FEATURES, generator=generator, dtype=torch.float64).requires_grad_()
    intercept = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = LpSGD(
        [
            {"params": [weights], "weight_decay": penalty / (1.0 - momentum)},
            {"params": [intercept], "weight_decay": 0.0},
        ],
        lr=RATE,
        momentum=momentum,
        p=1.0,
    )
    for _ in range(2000):
        optimizer.zero_grad()
        loss(features, labels, weights, intercept).backward()
        optimizer.step()
    assert torch.equal(weights == 0, optimum == 0) and int((optimum == 0).sum()) == zeros
    torch.testing.assert_close(weights.detach(), optimum, rtol=0.0, atol=TOLERANCE)
    torch.testing.assert_close(intercept.detach(), intercept_there, rtol=0.0, atol=TOLERANCE)
