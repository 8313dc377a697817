"""Shared by the tests: a small mixture of experts under names that no library has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shelf(nn.Module):
    """Experts in four parameters: inputs before outputs, channels of gate and up in turns, with biases."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(count, width, 2 * inner) / 4)
        self.beta = nn.Parameter(torch.randn(count, 2 * inner) / 4)
        self.omega = nn.Parameter(torch.randn(count, inner, width) / 4)
        self.psi = nn.Parameter(torch.randn(count, width) / 4)
        self.inner = inner

    def forward(self, rows: Tensor, which: Tensor, how_much: Tensor) -> Tensor:
        # The gradients of all experts are summed before others join, as where ZeRO-3 wraps a module's inputs.
        rows, total = rows.clone(), torch.zeros_like(rows)
        for i in range(len(self.alpha)):
            # How a product is added up depends on where its factors lie, and ZeRO-3 has them elsewhere.
            alpha, omega = self.alpha[i].clone(), self.omega[i].clone()
            mixed = rows @ alpha + self.beta[i]
            made = F.silu(mixed[:, ::2]) * mixed[:, 1::2]
            assert made.shape[1] == self.inner
            total = total + (made @ omega + self.psi[i]) * ((which == i) * how_much).sum(1, keepdim=True)
        return total


class Study(nn.Module):
    """A block of experts whose router is a bare matrix."""

    def __init__(self, experts: nn.Module, count: int, width: int, top_k: int = 2) -> None:
        super().__init__()
        self.chooser = nn.Parameter(torch.randn(count, width) / 4)
        self.offset = nn.Buffer(torch.zeros(count))
        self.experts, self.top_k = experts, top_k

    def forward(self, rows: Tensor) -> Tensor:
        how_much, which = (F.linear(rows, self.chooser.clone()) + self.offset).softmax(-1).topk(self.top_k)
        return self.experts(rows, which, how_much)


class Desk(nn.Module):
    """An expert that is a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)


def mixture_model() -> nn.Sequential:
    """Of odd sizes, so that shards end inside of rows and experts, and ranks have different numbers of them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 9), nn.Tanh(), Study(Shelf(5, 9, 7), 5, 9), nn.Linear(9, 7))
