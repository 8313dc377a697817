"""How far weights move in training, measured from a few numbers that a checkpoint can carry.

A copy of the weights would tell it, and take their memory. Random projections tell it too: for signs σ that are
independent of the weights, E (Σ σᵢ·(wᵢ − w₀ᵢ))² = ‖w − w₀‖² (Johnson and Lindenstrauss; with signs: Achlioptas 2003,
"Database-friendly random projections"). The sign of a weight follows from its position in its parameter, so that the
projections are the same however the parameter is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_dist.sharding.collectives import all_reduce_sum
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.quantiles import sample_stride, sampled_elements

# Weights that have moved by this share of their norm (squared: a third of it) before the window are those of a model
# that is still being built, as from scratch: which of them will count is not known, and what survivors have taken over
# is of a model that is gone soon. Measured: fine-tunes 0.00001 to 0.05, and survivors that move win; from scratch 0.04
# in 60 steps, where they tie, and 0.23 in 200, where they lose (docs/quality.md).
STILL_LEARNING = 0.1
# Of this many the square of the movement has a standard deviation of √(2/64), 18 %. One word of 64 bits gives the
# signs.
PROJECTIONS = 64
# Weights of which a projection is taken at most.
SAMPLE_SIZE = 1 << 17


@dataclass(frozen=True)
class Projections:
    """Of the weights at one moment, the same on every rank.

    Args:
        values: one for each projection.
        squares: the sum of the squares of the weights that were projected.
    """

    values: tuple[float, ...]
    squares: float

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Projections:
        """Projects a sample of the weights. Collective.

        Args:
            shards: of the same parameters in the same order on every rank.
        """
        elements = sum(shard.shape.numel() for shard in shards)
        sums = torch.zeros(PROJECTIONS + 1, dtype=torch.float64)
        for number, shard in enumerate(shards):
            stride = sample_stride(elements, shard.shape[-1] if shard.shape else 1, SAMPLE_SIZE)
            local = shard.local
            values, first = local.counted.reshape(-1), local.counted_start
            sampled = sampled_elements(shard.grid, stride) - first
            sampled = sampled[(sampled >= 0) & (sampled < len(values))]
            if not len(sampled):
                continue
            weights = values[sampled.to(values.device)].double().cpu()
            sums[:-1] += signs(shard.grid.positions(sampled + first), number) @ weights
            sums[-1] += weights.square().sum()
        sums = all_reduce_sum(sums)
        return cls(tuple(sums[:-1].tolist()), float(sums[-1]))

    def as_list(self) -> list[float]:
        """As a checkpoint has them."""
        return [*self.values, self.squares]

    @classmethod
    def from_list(cls, numbers: Sequence[float]) -> Projections:
        """What `as_list` returned."""
        return cls(tuple(numbers[:-1]), numbers[-1])

    def moved_since(self, before: Projections) -> float:
        """‖w − w₀‖² / ‖w‖² of the weights now and before; inf for weights that are zero now."""
        squares = sum((now - then) ** 2 for now, then in zip(self.values, before.values)) / PROJECTIONS
        return squares / self.squares if self.squares else float("inf")


def signs(positions: Tensor, number: int) -> Tensor:
    """Signs of weights in each projection: fp64 (PROJECTIONS, number of weights), of 1 and −1.

    Args:
        positions: of the weights in their parameter, taken flat; int64.
        number: of the parameter.
    """
    # The finaliser of splitmix64, whose constants are taken as signed numbers; the parameter is its stream.
    stream = torch.tensor(number + 1) * -2401053089206439921  # a tensor of int64 wraps around
    words = (positions + 1) * -7046029254386353131 + stream
    words = (words ^ _shifted(words, 30)) * -4658895280553007687
    words = (words ^ _shifted(words, 27)) * -7723592293110705685
    words = words ^ _shifted(words, 31)
    bits = torch.stack([words >> bit & 1 for bit in range(PROJECTIONS)])
    return 1.0 - 2.0 * bits.double()


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted to the right, as if they had no sign."""
    return words >> bits & ((1 << 64 - bits) - 1)
