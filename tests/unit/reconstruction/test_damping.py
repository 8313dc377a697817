"""How much fewer tokens damp, against the covariance that the inputs come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lp_dist.reconstruction.solver import DAMPING, damping_for


def inputs_of(tokens: int, mixing: Tensor, seed: int) -> Tensor:
    return torch.randn(tokens, len(mixing), generator=torch.Generator().manual_seed(seed)) @ mixing


def mixing_of(inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.eye(inputs) + 0.7 * torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs)


def error(gram: Tensor, tokens: int, rho: float, covariance: Tensor) -> float:
    """Of (1 − ρ)·S + ρ·μ·I, squared, to the covariance."""
    sample = gram / tokens
    shrunk = (1 - rho) * sample + rho * sample.diagonal().mean() * torch.eye(len(gram))
    return float((shrunk - covariance).square().sum())


@pytest.mark.parametrize("tokens", [16, 48, 200])
def test_it_is_near_the_shrinkage_that_comes_nearest_to_the_covariance(tokens):
    mixing = mixing_of(48)
    covariance = mixing.T @ mixing
    for seed in range(5):
        x = inputs_of(tokens, mixing, seed)
        gram = x.T @ x
        damping = damping_for(gram, tokens) - DAMPING
        rho = damping / (1 + damping)
        best = min(error(gram, tokens, share / 100, covariance) for share in range(100))
        assert error(gram, tokens, rho, covariance) <= 1.15 * best, (tokens, seed, rho)
        assert error(gram, tokens, 0.0, covariance) > 1.15 * best


def test_by_hand():
    """G = ((3, 1), (1, 1)) of 5 tokens: tr² = 16, ΣG² = 12. As 1 − 2/p = 0, ρ = 16 / (5 · (12 − 8))."""
    gram = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    rho = (0 * 12 + 16) / (5 * 4)
    assert damping_for(gram, 5) == pytest.approx(DAMPING + rho / (1 - rho))


def test_with_more_tokens_it_falls_to_the_least():
    mixing = mixing_of(16)
    values = [
        damping_for(x.T @ x, len(x)) for x in (inputs_of(tokens, mixing, 0) for tokens in (10, 100, 1000, 100_000))
    ]
    assert values == sorted(values, reverse=True) and DAMPING < values[-1] < 1.1 * DAMPING


def test_inputs_that_say_nothing_move_nothing():
    assert damping_for(torch.zeros(4, 4), 0) == math.inf
    assert damping_for(2.0 * torch.eye(4), 100) == math.inf, "independent, as far as can be seen"
    row = torch.ones(1, 4)
    assert damping_for(row.T @ row, 1) == math.inf


def test_the_scale_of_the_inputs_does_not_matter():
    x = inputs_of(50, mixing_of(20), 1)
    assert damping_for(9.0 * x.T @ x, 50) == pytest.approx(damping_for(x.T @ x, 50), rel=1e-4)
