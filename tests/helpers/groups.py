"""Shared by the tests: a small model with three pairs of channels, its steps, weights and states."""

from __future__ import annotations

import copy
import json

import torch
from torch import nn

from lp_dist.structured.resolve import groups_of


def paired_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 8)).to(dtype)


def pairs_of(model: nn.Module) -> list:
    return groups_of(model, outputs="0", inputs="2", width=2, kind="pairs")


def flat(model: nn.Module, of=lambda param: param) -> list[float]:
    return torch.cat([of(param).detach().double().flatten() for param in model.parameters()]).tolist()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 64, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    (model(x) - x[:, :8].sin()).square().mean().backward()
    optimizer.step()


def saved(*what) -> list:
    return [
        *copy.deepcopy([stateful.state_dict() for stateful in what[:-1]]),
        json.loads(json.dumps(what[-1].state_dict())),
    ]
