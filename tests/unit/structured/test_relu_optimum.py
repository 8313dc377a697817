"""With p = 1 the decay of groups comes to a known optimum: that of the convex form of a two-layer ReLU network
(Pilanci and Ergen, arXiv 2002.10553), which is small enough here for all of its activation patterns to be enumerated.

The network is f(x) = Σ_j s_j·relu(w_j·x) with fixed signs s_j = ±1, and the penalty λ·Σ_j ‖w_j‖. That is weight decay
on both layers, with the scales of the second layer moved to the first. The convex form has a vector u in the cone of
each activation pattern, once for each sign:

    min ½‖Σ_k s_k·D_k·X·u_k − y‖² + λ·Σ_k ‖u_k‖        D_k: 1 where the pattern is active, else 0
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lp_dist import GroupDecay, LpSGD, attach
from lp_dist.structured.resolve import groups_of

# The greatest relative difference of the objective from the optimum, and the greatest difference of an output.
TOLERANCE = 1e-9
# More units than there are patterns with signs. The network is not convex, so that other seeds may end elsewhere.
UNITS, RATE, STEPS = 60, 4e-3, 1200


class Patterns(NamedTuple):
    """All activation patterns of units in the plane, each with both signs.

    Args:
        features: s_k·D_k·X, fp64 (patterns, rows, 2).
        rays: the two edges of each pattern's cone, of norm 1, fp64 (patterns, 2, 2).
    """

    features: Tensor
    rays: Tensor


def data() -> tuple[Tensor, Tensor]:
    """A function of one number that bends several times.

    Returns:
        Rows (x, 1), fp64 (9, 2), and targets, fp64 (9,).
    """
    x = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    return torch.stack([x, torch.ones_like(x)], dim=1), (2.0 * x).sin() + 0.5 * x


def enumerate_patterns(inputs: Tensor) -> Patterns:
    """The lines w·x_i = 0 cut the plane into the cones of the patterns."""
    normals = torch.atan2(inputs[:, 1], inputs[:, 0])
    edges = (torch.cat([normals + math.pi / 2, normals - math.pi / 2]) % (2 * math.pi)).sort().values
    following = torch.cat([edges[1:], edges[:1] + 2 * math.pi])
    middles, rays = (
        torch.stack([angles.cos(), angles.sin()], dim=-1)
        for angles in ((edges + following) / 2, torch.stack([edges, following], dim=1))
    )
    active = (middles @ inputs.t() > 0).double()
    features = active[:, :, None] * inputs
    return Patterns(torch.cat([features, -features]), torch.cat([rays, rays]))


def project(vectors: Tensor, rays: Tensor) -> Tensor:
    """The nearest point to each vector (patterns, 2) in the cone of its pattern, which is less than half the plane."""
    coefficients = torch.linalg.solve(rays.transpose(1, 2), vectors[:, :, None])[:, :, 0]
    on_rays = (rays @ vectors[:, :, None]).clamp_min(0.0) * rays
    nearer = (on_rays - vectors[:, None]).norm(dim=2).argmin(dim=1)
    on_nearer = on_rays[torch.arange(len(rays)), nearer]
    return torch.where((coefficients >= 0).all(dim=1, keepdim=True), vectors, on_nearer)


def objective(outputs: Tensor, targets: Tensor, norms: Tensor, penalty: float) -> float:
    return float(0.5 * (outputs - targets).square().sum() + penalty * norms.sum())


def lower_bound(outputs: Tensor, targets: Tensor, patterns: Patterns, penalty: float) -> float:
    """A value of the dual problem, max ½‖y‖² − ½‖y − z‖² where |z·relu(Xw)| ≤ λ for all ‖w‖ ≤ 1.

    No network is below it. Here z is the residual, scaled so that the condition holds. Within a cone the greatest
    z·relu(Xw) is the norm of the projected gradient.
    """
    residual = targets - outputs
    gradients = torch.einsum("prf,r->pf", patterns.features, residual)
    residual = residual * min(1.0, penalty / float(project(gradients, patterns.rays).norm(dim=1).max()))
    return float(0.5 * (targets.square().sum() - (targets - residual).square().sum()))


def solve(patterns: Patterns, targets: Tensor, penalty: float) -> tuple[float, Tensor]:
    """The convex form by FISTA, with restarts; certified by its dual problem.

    The proximal step of the norm on a convex cone is the projection, and then the soft threshold of the norm.

    Returns:
        The optimum, and the outputs that have it, fp64 (rows,).
    """
    flat = patterns.features.transpose(0, 1).flatten(1)
    step = 1.0 / float(torch.linalg.matrix_norm(flat, 2)) ** 2
    solution = extrapolated = torch.zeros(len(patterns.rays), 2, dtype=torch.float64)
    momentum = 1.0
    for _ in range(1000):
        gradient = (flat.t() @ (flat @ extrapolated.flatten() - targets)).view_as(extrapolated)
        moved = project(extrapolated - step * gradient, patterns.rays)
        norms = moved.norm(dim=1, keepdim=True)
        following = moved * (1.0 - step * penalty / norms.clamp_min(step * penalty))
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        if ((extrapolated - following) * (following - solution)).sum() > 0:
            faster = momentum = 1.0
        extrapolated = following + (momentum - 1) / faster * (following - solution)
        solution, momentum = following, faster
    outputs = flat @ solution.flatten()
    optimum = objective(outputs, targets, solution.norm(dim=1), penalty)
    assert optimum - lower_bound(outputs, targets, patterns, penalty) < 1e-10 * optimum
    return optimum, outputs


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_group_decay_comes_to_the_optimum_of_the_convex_form(penalty):
    inputs, targets = data()
    patterns = enumerate_patterns(inputs)
    assert len(patterns.rays) == 2 * 18, "two for each of the nine lines, and both signs"
    optimum, outputs = solve(patterns, targets, penalty)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, UNITS, bias=False)).double()
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(UNITS // 2)
    optimizer = LpSGD(model.parameters(), lr=RATE)
    attach(model, optimizer, groups=GroupDecay(groups_of(model, outputs="0"), penalty, p=1.0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        (0.5 * (model(inputs).relu() @ signs - targets).square().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        norms, reached = model[0].weight.norm(dim=1), model(inputs).relu() @ signs
    assert objective(reached, targets, norms, penalty) == pytest.approx(optimum, rel=TOLERANCE)
    torch.testing.assert_close(reached, outputs, rtol=0.0, atol=TOLERANCE)
    assert 10 < int((norms == 0).sum()) < UNITS, "units that the optimum does not need are exactly zero"
