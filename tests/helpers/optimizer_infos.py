"""LpAdamW, LpSGD and LpLion described as PyTorch describes its optimizers for its tests, and the problem that those
train on.
"""

import copy

import torch
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD


def inputs(*specific):
    """OptimizerInputs for every optimizer, and an optimizer's own ones given as (kwargs, description)."""
    common = [
        ({}, "default"),
        ({"lr": 0.01}, "lr"),
        ({"lr": torch.tensor(0.01)}, "tensor lr"),
        ({"weight_decay": 0.01}, "decay"),
        ({"weight_decay": 0.01, "p": 1.0, "l2": 0.1, "cutoff": 0.5}, "all of decay"),
        ({"weight_decay": 0.01, "maximize": True}, "maximize"),
        ({"weight_decay": 0.01, "implementation": "reference"}, "reference"),
        ({"weight_decay": 0.01, "implementation": "foreach"}, "foreach"),
    ]
    return lambda device, dtype=None: [
        OptimizerInput(None, dict(kwargs), desc) for kwargs, desc in (*common, *specific)
    ]


def errors(*specific):
    """PyTorch's errors for every optimizer, the decay's, and an optimizer's own, the latter as (kwargs, message)."""
    cases = [
        ({"lr": -0.5}, "lr.*-0.5"),
        ({"weight_decay": -0.5}, "weight_decay.*-0.5"),
        ({"p": 9.0}, "p.*9.0"),
        ({"l2": -0.5}, "l2.*-0.5"),
        ({"cutoff": float("nan")}, "cutoff.*nan"),
        *specific,
    ]

    def error_inputs(device, dtype):
        return get_error_inputs_for_all_optims(device, dtype) + [
            ErrorOptimizerInput(OptimizerInput(None, kwargs, regex), error_type=ValueError, error_regex=regex)
            for kwargs, regex in cases
        ]

    return error_inputs


SCHEDULERS = (
    [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: ReduceLROnPlateau(o)],
    [lambda o: LinearLR(o, start_factor=0.4, total_iters=4), lambda o: ExponentialLR(o, gamma=0.99)],
)
COMMON = {
    "scheduler_inputs": SCHEDULERS,
    "supported_impls": (),
    "not_og_supported_flags": (),
    "supports_complex": False,
    "supports_multiple_devices": False,
}
INFOS = [
    OptimizerInfo(
        LpAdamW,
        optim_inputs_func=inputs(
            ({"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.01}, "betas"),
            ({"precondition": 1.0, "weight_decay": 0.01}, "precondition"),
        ),
        optim_error_inputs_func=errors(
            ({"betas": (1.0, 0.0)}, "betas.*1.0"),
            ({"eps": -1.0}, "eps.*-1"),
            ({"precondition": -0.5}, "precondition.*-0.5"),
        ),
        **COMMON,
    ),
    OptimizerInfo(
        LpSGD,
        optim_inputs_func=inputs(
            ({"momentum": 0.9, "weight_decay": 0.01}, "momentum"), ({"momentum": 0.9, "nesterov": True}, "nesterov")
        ),
        optim_error_inputs_func=errors(({"momentum": -0.5}, "momentum.*-0.5"), ({"nesterov": True}, "nesterov")),
        **COMMON,
    ),
    OptimizerInfo(
        LpLion,
        optim_inputs_func=inputs(
            ({"betas": (0.8, 0.9), "weight_decay": 0.01}, "betas"),
        ),
        optim_error_inputs_func=errors(({"betas": (0.9, 1.5)}, "betas.*1.5")),
        **COMMON,
    ),
]


class Problem:
    """PyTorch's own small problem: the squared length of weight @ x + bias."""

    def __init__(self, info, kwargs, dtype=torch.float32, named=False, groups=False):
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(10, 5).to(dtype))
        self.bias = torch.nn.Parameter(torch.randn(10).to(dtype))
        self.x = torch.randn(5).to(dtype)
        params = [self.weight, self.bias]
        if named:
            params = [("weight", self.weight), ("bias", self.bias)]
        if groups:
            params = [{"params": [self.weight]}, {"params": [self.bias], "lr": 0.02}]
        self.calls = 0
        self.optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.x) + self.bias).pow(2).sum()
        loss.backward()
        return loss

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self
