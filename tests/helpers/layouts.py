"""Shared by the tests: layers with their inputs in any dimension, under names that no library has, all linear in their
weights and in what they are given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Flipped(nn.Module):
    """A matrix [inputs, outputs], as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.width = nn.Parameter(torch.randn(inputs, outputs) / 8), inputs

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


class Crew(nn.Module):
    """Experts in one parameter, [experts, outputs, inputs]."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrices, self.width = nn.Parameter(torch.randn(count, outputs, inputs) / 8), count * inputs

    def forward(self, rows: Tensor) -> Tensor:
        given = rows.unflatten(1, (len(self.matrices), -1))
        return torch.cat([F.linear(given[:, i], self.matrices[i]) for i in range(len(self.matrices))], 1)


class FlippedCrew(nn.Module):
    """Experts in one parameter, [experts, inputs, outputs]."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrices, self.width = nn.Parameter(torch.randn(count, inputs, outputs) / 8), count * inputs

    def forward(self, rows: Tensor) -> Tensor:
        given = rows.unflatten(1, (len(self.matrices), -1)).transpose(0, 1)
        return torch.bmm(given, self.matrices).transpose(0, 1).flatten(1)


class Strip(nn.Module):
    """A convolution over signals of a few places."""

    def __init__(self, layer: nn.Module, places: int = 6) -> None:
        super().__init__()
        self.layer, self.width = layer, layer.in_channels * places

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows.unflatten(1, (self.layer.in_channels, -1))).flatten(1)


class Beside(nn.ModuleList):
    """Layers side by side, each of the first of the inputs, so that their sizes may be uneven."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([layer(rows[:, : layer.width]) for layer in self], 1)


class Straight(nn.Linear):
    """A matrix [outputs, inputs]."""

    @property
    def width(self) -> int:
        return self.in_features


# Of `layers_of`: the dimension of inputs of each weight that can have a pattern, and how many weights can't.
DIMS = {
    "0.weight": 0,
    "1.matrices": 1,
    "2.matrices": 2,
    "3.layer.weight": 1,
    "4.layer.weight": 1,
    "5.layer.weight": 0,
    "6.weight": 1,
}
LEFT_OUT = {
    "7.layer.weight": "its number of inputs, 3, is no multiple of",
    "8.weight": "its number of inputs, 18, is no multiple of",
}
WIDTH = 120


def layers_of() -> Beside:
    """Of sizes for 2:4 and 4:8, such that shards of two and three ranks end inside of blocks. Weights that bf16 holds,
    so that there are equal ones.
    """
    torch.manual_seed(0)
    model = Beside(
        [
            Flipped(24, 13),
            FlippedCrew(3, 8, 9),
            Crew(3, 16, 5),
            Strip(nn.Conv1d(8, 5, 3, bias=False)),
            Strip(nn.Conv1d(16, 6, 2, groups=2, bias=False)),
            Strip(nn.ConvTranspose1d(16, 6, 2, groups=2, bias=False)),
            Straight(40, 7),
            Strip(nn.Conv1d(3, 4, 3, bias=False)),
            Straight(18, 4, bias=False),
        ]
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_((param * 16).round() / 128)
            param[param == 0] = 1 / 64
    return model


def in_blocks(weight: Tensor, dim: int, m: int) -> Tensor:
    """[blocks, M], with plain loops over the places of all other dimensions."""
    rows = weight.movedim(dim, -1).reshape(-1, weight.shape[dim])
    return torch.stack([row[i : i + m] for row in rows for i in range(0, len(row), m)])
