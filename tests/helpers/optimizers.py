"""What the optimizer tests share: parameters of awkward layouts, repeatable gradients, and a strict comparison."""

import math

import torch

from lp_dist.optim.batching import StepRow
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD

IMPLEMENTATIONS = ("reference", "foreach")
OPTIMIZERS = (LpAdamW, LpSGD, LpLion)
# For tests that run over p: those with a form of their own in the fused step, and those that are approximated
EXPONENTS = (-4.0, -1.5, -1.0, -0.3, 0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 1.99, 2.0, 2.3, 4.0)


def make_params(dtype, seed=0):
    """Parameters of every awkward layout: a scalar, empty ones, a transposed and a strided one, zeros and denormals
    inside.
    """
    torch.manual_seed(seed)
    awkward = torch.randn(7, 5)
    awkward[0] = torch.tensor([0.0, -0.0, 1e-40, 1e-13, -1e-6])
    tensors = [awkward, torch.randn(3), torch.randn(()), torch.zeros(0), torch.zeros(0, 4)]
    tensors = [t.to(dtype) for t in tensors] + [torch.randn(6, 4).to(dtype).t(), torch.randn(4, 6).to(dtype)[:, ::2]]
    assert not tensors[-1].is_contiguous() and not tensors[-2].is_contiguous()
    return [torch.nn.Parameter(t) for t in tensors]


def set_grads(params, step):
    """Gradients that depend on the step and the place only, the same for every optimizer under comparison."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer, params, steps):
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return params


def assert_same(params, others):
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other), (param.shape, (param - other).abs().max())


def param_group_of(**changed):
    """Values of a param group, for `kernels.step`."""
    return {
        "lr": 1.0,
        "maximize": False,
        "weight_decay": 1.0,
        "p": 0.5,
        "l2": 0.0,
        "cutoff": math.inf,
        "regrowth_below": 0.0,
        **changed,
    }


CASES = {
    "adamw": (LpAdamW, {"lr": 0.02, "weight_decay": 0.05}),
    "adamw p=1": (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "p": 1.0, "betas": (0.8, 0.95), "eps": 1e-3}),
    "adamw p=0": (LpAdamW, {"lr": 0.02, "weight_decay": 0.02, "p": 0.0, "l2": 0.3}),
    "adamw p=-1.5": (LpAdamW, {"lr": 0.02, "weight_decay": 0.01, "p": -1.5}),
    "adamw p=2": (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "p": 2.0}),
    "adamw p=3": (LpAdamW, {"lr": 0.02, "weight_decay": 0.5, "p": 3.0}),
    "adamw precondition": (LpAdamW, {"lr": 0.02, "weight_decay": 0.1, "precondition": 1.0}),
    "adamw precondition cutoff": (
        LpAdamW,
        {"lr": 0.02, "weight_decay": 0.3, "precondition": 0.5, "cutoff": 0.2, "l2": 0.1},
    ),
    "adamw cutoff": (LpAdamW, {"lr": 0.02, "weight_decay": 0.3, "cutoff": 0.2}),
    "adamw regrowth": (
        LpAdamW,
        {"lr": 0.02, "weight_decay": 0.3, "precondition": 0.5, "cutoff": 0.2, "regrowth_below": 0.05},
    ),
    "adamw latent": (LpAdamW, {"lr": 0.02, "weight_decay": 0.02, "cutoff": 0.2, "latent": True}),
    "adamw latent all": (
        LpAdamW,
        {
            "lr": 0.02,
            "weight_decay": 0.02,
            "p": 0.8,
            "precondition": 0.37,
            "cutoff": 0.2,
            "regrowth_below": 0.05,
            "latent": True,
            "l2": 0.1,
            "maximize": True,
        },
    ),
    "adamw frozen": (LpAdamW, {"lr": 0.02, "weight_decay": 0.3, "p": 1.0, "cutoff": 0.0}),
    "adamw maximize": (LpAdamW, {"lr": 0.02, "weight_decay": 0.05, "maximize": True}),
    "sgd": (LpSGD, {"lr": 0.02, "weight_decay": 0.2}),
    "sgd momentum": (LpSGD, {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9, "l2": 0.2, "p": 1.0}),
    "sgd nesterov": (
        LpSGD,
        {
            "lr": 0.02,
            "weight_decay": 0.2,
            "momentum": 0.8,
            "nesterov": True,
            "p": 0.0,
            "cutoff": 0.5,
            "regrowth_below": 0.02,
        },
    ),
    "sgd maximize": (LpSGD, {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9, "maximize": True}),
    "lion": (LpLion, {"lr": 0.01, "weight_decay": 0.2}),
    "lion all": (
        LpLion,
        {
            "lr": 0.01,
            "weight_decay": 0.5,
            "betas": (0.8, 0.9),
            "p": 1.0,
            "l2": 0.1,
            "cutoff": 0.7,
            "regrowth_below": 0.1,
            "maximize": True,
        },
    ),
}


def step_row(row: tuple) -> StepRow:
    """A row of a step from `(weights, gradients, *states, step)`."""
    weights, grads, *states, step = row
    return StepRow(weights, grads, tuple(states), step)
