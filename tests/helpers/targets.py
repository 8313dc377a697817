"""What the tests of a target share: a small model with tensors of more than 10,000 weights, repeatable batches, and a
run of 60 steps.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lp_dist import LpAdamW, SparsityTarget, attach

# Every tensor has a threshold of its own, which is more to get wrong than one for all, and x is |w|^(2−p), which is
# easy to say. Nothing moves but by decay.
layerwise = partial(SparsityTarget, scope="layer", precondition=0.0, reconstruct=False)
decaying = partial(SparsityTarget, reconstruct=False)
TOTAL, START, END = 60, 6, 42  # the default window of such a run, [0.1, 0.7)
FINAL_PRUNING = END - 1  # optimizer steps before the final pruning


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 64, bias=False), nn.Tanh(), nn.Linear(64, 8))


MATRICES = {name: param.numel() for name, param in model_of().named_parameters() if param.ndim == 2}


def half_dead() -> nn.Sequential:
    model = model_of()
    with torch.no_grad():
        model[2].weight[:32] = 0.0
    return model


def backward(model: nn.Module, step: int) -> None:
    """Gradients that depend on the weights and the step only."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 64, generator=generator)
    model.zero_grad()
    (model(x) - x[:, :8].sin()).square().mean().backward()


class TargetRun:
    """A model, its optimizer, scheduler and attachment, which go step by step."""

    def __init__(
        self,
        target: SparsityTarget | None,
        *,
        make=LpAdamW,
        lr: float = 3e-3,
        total: int = TOTAL,
        scheduled: bool = True,
        model: nn.Module | None = None,
        attached: bool = True,
        **kwargs,
    ) -> None:
        self.model = model_of() if model is None else model
        self.optimizer = make(self.model.parameters(), lr=lr)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total) if scheduled else None
        self.target, self.total, self.kwargs, self.taken, self.history = target, total, kwargs, 0, []
        if attached:
            self.attach()

    def attach(self) -> None:
        self.attached = attach(
            self.model,
            self.optimizer,
            target=self.target,
            total_steps=self.total,
            lr_scheduler=self.scheduler,
            **self.kwargs,
        )

    def step(self) -> None:
        backward(self.model, self.taken)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.taken += 1

    def to(self, steps: int) -> TargetRun:
        """Until so many steps are taken; notes what is logged."""
        while self.taken < steps:
            self.step()
            self.attached.after_step()
            if self.attached.logs and self.attached.logs not in [logs for _, logs in self.history[-1:]]:
                self.history.append((self.taken, self.attached.logs))
        return self

    def zeros(self) -> dict[str, int]:
        return {name: int((param == 0).sum()) for name, param in self.model.named_parameters() if name in MATRICES}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}


def same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
