"""Runs of a small model to a SparsityTarget under any engine: what is reached, in total and per tensor, and how much
of it the decay did.

One process takes the batches of all ranks one after another and averages their gradients; a half is exact, so two
ranks have the same.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from helpers.engines import Engine, ended, make
from helpers.targets import decaying
from lp_dist import LpAdamW, SparsityTarget, attach, measure_sparsity, param_groups
from lp_dist.attachment.attach import Attachment
from lp_dist.sharding.engines import inner_optimizer

RANKS, ROWS, INPUTS, LARGE, PEAK = 2, 64, 64, 10_000, 5e-3
FORMS: dict[str, tuple[float, float | None, float]] = {  # γ, cap, regrowth
    "plain": (0.0, None, 0.0),
    "preconditioned": (0.5, None, 0.0),
    "capped": (0.5, 1.0, 0.1),
}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 128.0}}


@dataclass(frozen=True)
class Case:
    """One run. engine: a kind of `helpers.engines.make`; "plain" is one process. dtype: fp32, bf16 or fp16, by
    DeepSpeed's config.
    """

    engine: str
    form: str = "plain"
    p: float = 0.5
    target: float = 0.5
    scope: str = "layer"
    end: float = 0.7
    steps: int = 60
    update_every: int | None = None
    dtype: str = "fp32"
    seed: int = 0

    @property
    def sparsity_target(self) -> SparsityTarget:
        return decaying(
            self.target,
            end=self.end,
            scope=self.scope,
            precondition=FORMS[self.form][0],
            cap=FORMS[self.form][1],
            regrowth=FORMS[self.form][2],
            update_every=self.update_every,
        )


def model_of(seed: int = 0) -> nn.Sequential:
    """Three matrices of 10,000 weights or more, and one of 707; of odd sizes, so that shards end inside of rows and in
    padding.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(INPUTS, 163),
        nn.LayerNorm(163),
        nn.Tanh(),
        nn.Linear(163, 101, bias=False),
        nn.Tanh(),
        nn.Linear(101, 101),
        nn.Tanh(),
        nn.Linear(101, 7),
    )


@cache
def teacher(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(INPUTS, 20, generator=generator) / 4, torch.randn(20, 7, generator=generator) / 4


@cache
def batch_of(seed: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Inputs, and what the teacher makes of them, with some noise."""
    generator = torch.Generator().manual_seed(100_000 * seed + 10 * step + rank)
    inputs, (first, second) = torch.randn(ROWS, INPUTS, generator=generator), teacher(seed)
    return inputs, torch.tanh(inputs @ first) @ second + 0.1 * torch.randn(ROWS, 7, generator=generator)


def optimizer_of(case: Case) -> Any:
    return lambda model: LpAdamW(param_groups(model, 0.0), lr=PEAK, p=case.p, precondition=FORMS[case.form][0])


def scheduler_of(case: Case) -> Any:
    """Cosine to 0 after a warm-up of a twentieth."""
    warm = max(1, case.steps // 20)

    def factor(step: int) -> float:
        return (
            (step + 1) / (warm + 1)
            if step < warm
            else 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warm) / (case.steps - warm)))
        )

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def engine_of(case: Case, **more: Any) -> Engine:
    """The engine with the model in it, not attached yet; more: into the DeepSpeed config."""
    precision = {"bf16": BF16, "fp16": FP16, "fp32": {}}[case.dtype] if case.engine != "bf16_optimizer" else {}
    return make(case.engine, model_of(case.seed), optimizer_of(case), scheduler_of(case), **precision, **more)


def attached_to(engine: Engine, case: Case) -> Attachment:
    """As a user does it: a DeepSpeed engine knows its optimizer and its scheduler; under Accelerate the scheduler is
    in its own wrapper.
    """
    if hasattr(engine.handle, "load_checkpoint"):
        others = {"lr_scheduler": engine.lr_scheduler} if case.engine.startswith("accelerate ") else {}
    else:
        others = {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    return attach(engine.handle, target=case.sparsity_target, total_steps=case.steps, **others)


def loss_of(engine: Engine, seed: int, step: int, rank: int) -> Tensor:
    inputs, wanted = batch_of(seed, step, rank)
    return (engine(inputs.to(next(engine.handle.parameters()).dtype)).float() - wanted).square().mean()


def trained(
    engine: Engine, attachment: Attachment, case: Case, start: int, until: int, scale: float = 1.0
) -> list[float]:
    """Takes the steps from `start` to `until`, and gives their losses (this rank's). scale: of the last rank's loss,
    to have it overflow.
    """
    losses = []
    for step in range(start, until):
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() == RANKS:
            rank = torch.distributed.get_rank()
            loss = loss_of(engine, case.seed, step, rank)
            losses.append(loss.item())
            engine.step(loss * scale if rank == RANKS - 1 else loss)
        elif hasattr(engine.handle, "backward"):  # an engine on one rank: the same rows, averaged in another order
            engine.step(sum(loss_of(engine, case.seed, step, rank) for rank in range(RANKS)) / RANKS)
        else:
            first, *others = [loss_of(engine, case.seed, step, rank) / RANKS for rank in range(RANKS)]
            for loss in others:
                loss.backward()
            losses.append(first.item() * RANKS)
            engine.step(first)
        attachment.after_step()
    return losses


def run(case: Case) -> dict[str, Any]:
    """The complete run: zeros and elements of each tensor in the model's own copy and in the masters, and the share by
    decay, in plain JSON.
    """
    began = time.perf_counter()
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    losses = trained(engine, attachment, case, 0, case.steps)
    results = {
        "losses": [losses[0], losses[-1]],
        "seconds": round(time.perf_counter() - began, 2),
        **reached(engine, attachment),
    }
    ended(engine)
    return results


def reached(engine: Engine, attachment: Attachment) -> dict[str, Any]:
    optimizer = engine.handle.optimizer if hasattr(engine.handle, "load_checkpoint") else engine.optimizer
    assert inner_optimizer(optimizer) is attachment.optimizer
    counted, masters = measure_sparsity(engine.handle), measure_sparsity(engine.handle, optimizer)
    final_pruning = attachment.state_dict()["weights"]["final_pruning"]
    return {
        "achieved": counted.total,
        "tensors": {name: list(counts) for name, counts in counted.counts.items()},
        "masters": {name: list(counts) for name, counts in masters.counts.items()},
        "by_decay": final_pruning["before"],
        "pruned_at_end": final_pruning["pruned_at_end"],
    }
