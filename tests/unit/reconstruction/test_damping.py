"""How much few tokens damp, against the covariance that the inputs come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lp_dist.reconstruction.solver import DAMPING, damping_for, move_survivors

INPUTS = 48


def covariance(outlier: float) -> Tensor:
    """Of inputs that go together, one of which is larger than the others."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(INPUTS) + 0.7 * torch.randn(INPUTS, INPUTS, generator=generator) / math.sqrt(INPUTS)
    mixing[:, 0] *= outlier
    return mixing.T @ mixing


def sample_gram(tokens: int, of: Tensor, seed: int) -> Tensor:
    x = torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(seed)) @ torch.linalg.cholesky(of).T
    return x.T @ x


def damage(damping: float, tokens: int, of: Tensor, seed: int) -> float:
    """Of the outputs on all inputs that there are, when survivors moved by a sample, to what it is when they stay."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(32, INPUTS, generator=generator) / of.diagonal().sqrt()
    after = before.masked_fill(torch.rand(before.shape, generator=generator) < 0.5, 0.0)
    moved = move_survivors(before, after, sample_gram(tokens, of, seed), iterations=40, damping=damping)
    left, lost = moved - before, after - before
    return float((left @ of * left).sum() / (lost @ of * lost).sum())


@pytest.mark.parametrize("outlier", [1.0, 30.0])
@pytest.mark.parametrize("tokens", [12, 48, 200, 2000])
def test_it_is_near_the_best_share_whatever_the_tokens(tokens, outlier):
    of = covariance(outlier)
    for seed in range(3):
        chosen = damage(damping_for(tokens, INPUTS), tokens, of, seed)
        best = min(damage(share, tokens, of, seed) for share in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
        assert chosen <= best + 0.05, (seed, chosen, best)


def test_a_fixed_one_does_harm_where_tokens_are_few():
    of = covariance(1.0)
    assert damage(0.01, 24, of, 0) > 1.2 > 1.0 > damage(damping_for(24, INPUTS), 24, of, 0)


def test_by_hand():
    assert damping_for(200, 100) == pytest.approx(DAMPING + 0.5)
    assert damping_for(1e12, 100) == pytest.approx(DAMPING)
