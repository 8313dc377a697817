"""How much few tokens damp, against the covariance that the inputs come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lp_dist.reconstruction.inputs import BLOCK, InputSample
from lp_dist.reconstruction.solver import DAMPING, damping_for


def inputs_of(tokens: int, mixing: Tensor, seed: int, alike: float = 0.0) -> Tensor:
    """alike: how much of a token is that of the token before."""
    noise = torch.randn(tokens, len(mixing), generator=torch.Generator().manual_seed(seed))
    for before, token in zip(noise, noise[1:]):
        token.mul_(math.sqrt(1 - alike**2)).add_(before, alpha=alike)
    return noise @ mixing


def mixing_of(inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.eye(inputs) + 0.7 * torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs)


def damping_of(x: Tensor, block: int) -> float:
    blocks = x.split(block)
    squares = sum(float((rows.T @ rows).double().square().sum()) for rows in blocks)
    return damping_for(x.T @ x, squares, sum(len(rows) ** 2 for rows in blocks) / len(x) ** 2)


def rho_of(damping: float) -> float:
    return 1.0 if damping == math.inf else (damping - DAMPING) / (1 + damping - DAMPING)


def error(x: Tensor, rho: float, covariance: Tensor) -> float:
    """Of (1 − ρ)·S + ρ·μ·I, squared, to the covariance."""
    sample = x.T @ x / len(x)
    shrunk = (1 - rho) * sample + rho * sample.diagonal().mean() * torch.eye(len(sample))
    return float((shrunk - covariance).square().sum())


@pytest.mark.parametrize(
    ("tokens", "block", "alike"), [(64, 8, 0.0), (256, 16, 0.0), (512, 64, 0.9), (2048, 128, 0.9)]
)
def test_it_is_near_the_shrinkage_that_comes_nearest_to_the_covariance(tokens, block, alike):
    mixing = mixing_of(48)
    covariance = mixing.T @ mixing
    for seed in range(4):
        x = inputs_of(tokens, mixing, seed, alike)
        rho = rho_of(damping_of(x, block))
        best = min(error(x, share / 100, covariance) for share in range(101))
        assert error(x, rho, covariance) <= 1.2 * best, (seed, rho)
        assert error(x, 0.0, covariance) > 1.2 * best


def test_tokens_that_are_alike_count_for_less():
    mixing = mixing_of(48)
    alike, others = (damping_of(inputs_of(512, mixing, 0, share), 64) for share in (0.9, 0.0))
    assert alike > 3 * others


def test_by_hand():
    """Blocks ((2, 0), (0, 0)) and ((1, 1), (1, 1)) of one and three tokens. ‖G‖² = 12 and its trace is 4, so it is 4
    from the identity's multiple; the blocks' squares are 4 + 4, and their share is (1 + 9)/16.
    """
    gram = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    rho = (8 - 10 / 16 * 12) / ((1 - 10 / 16) * (12 - 8))
    assert 0 < rho < 1
    assert damping_for(gram, 8.0, 10 / 16) == pytest.approx(DAMPING + rho / (1 - rho))


def test_with_more_tokens_it_falls_to_the_least():
    mixing = mixing_of(16)
    values = [damping_of(inputs_of(tokens, mixing, 0), 8) for tokens in (32, 256, 2048, 60_000)]
    assert values == sorted(values, reverse=True) and DAMPING <= values[-1] < 1.2 * DAMPING


def test_inputs_that_say_nothing_move_nothing():
    assert damping_for(torch.zeros(4, 4), 0.0, 0.5) == math.inf
    assert damping_for(2.0 * torch.eye(4), 8.0, 0.5) == math.inf, "independent, as far as can be seen"
    x = inputs_of(20, mixing_of(6), 0)
    assert damping_of(x, 20) == math.inf, "a single block"


def test_the_scale_of_the_inputs_does_not_matter():
    x = inputs_of(64, mixing_of(20), 1)
    assert damping_of(3.0 * x, 8) == pytest.approx(damping_of(x, 8), rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 100, 3 * BLOCK + 5])
def test_a_sample_gives_its_products_in_blocks_of_neighbours(tokens):
    model = nn.Sequential(nn.Linear(6, 2))
    sample = InputSample(model, {"0": model[0]}, 1000)
    sample.open()
    parts = [inputs_of(tokens, mixing_of(6), seed) for seed in range(2)]
    for part in parts:
        model(part[None])
    gram, squares, row_squares = sample.products("0", 6, torch.device("cpu"))
    size = min(BLOCK, -(-tokens // 2))
    blocks = [rows for part in parts for rows in part.split(size)]
    torch.testing.assert_close(gram, sum(rows.T @ rows for rows in blocks))
    assert float(squares) == pytest.approx(sum(float((rows.T @ rows).square().sum()) for rows in blocks), rel=1e-5)
    assert row_squares == sum(len(rows) ** 2 for rows in blocks)
