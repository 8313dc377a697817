"""Shared by the tests: a small model of uneven sizes that goes through a decay window under any engine, stopped and
resumed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.engines import Engine
from lp_dist import DecayWindow, LpAdamW, attach
from lp_dist.attachment.attach import Attachment
from lp_dist.optim.state import steps_taken

STEPS, WINDOW = 12, DecayWindow(3, 9)
DECAYED = ("0.weight", "3.weight", "4.weight")
OVERRIDES = {"0.weight": {"p": 0.0, "weight_decay": 1.0}}
CELLS = {
    "one process": ("plain", "fp32"),
    "DDP": ("ddp", "fp32"),
    "FSDP2": ("fsdp2", "fp32"),
    "BF16_Optimizer": ("bf16_optimizer", "bf16"),
    **{
        f"{kind}, {dtype}": (kind, dtype)
        for kind in ("zero0", "zero1", "zero2", "zero3", "zero2 offload", "zero3 offload")
        for dtype in ("fp32", "bf16")
    },
    **{f"Accelerate, {kind}": (f"accelerate {kind}", "fp32") for kind in ("zero2", "zero3")},
}


def model_of() -> nn.Sequential:
    """Small and uneven: shards end inside of rows, in padding, and (one row for two ranks) in nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 1))


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    """Two groups that decay with values of their own, and one that doesn't."""
    matrices = [model[0].weight, model[3].weight, model[4].weight]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        {"params": matrices[:2], "weight_decay": 3.0, "lr": 1e-2},
        {"params": matrices[2:], "weight_decay": 0.005, "p": -1.0, "lr": 2e-2},
        {"params": rest, "weight_decay": 0.0, "lr": 1e-2},
    ]


def optimizer_of(model: nn.Sequential) -> LpAdamW:
    return LpAdamW(groups_of(model), p=0.5, precondition=0.0)


def scheduler_of(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 16)


def batch_of(step: int, rank: int, world_size: int) -> Tensor:
    """A rank's share of the batch of a step: the same six rows, however many ranks there are."""
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]


def attached(engine: Engine) -> Attachment:
    optimizer = (
        None if hasattr(engine.handle, "load_checkpoint") else engine.optimizer
    )  # a DeepSpeed engine knows its own
    return attach(engine.handle, optimizer, overrides=OVERRIDES, lr_scheduler=engine.lr_scheduler)


def trained(engine: Engine, attachment: Attachment, start: int, until: int) -> list[tuple[float, ...]]:
    """As a user drives a window by hand: the step is asked of the optimizer, so that it needs no checkpoint of its
    own. Gives the learning rates of each step."""
    inner, decayed = (
        attachment.optimizer,
        {shard.group for shard in attachment.shards if shard.name in attachment.decayed},
    )
    dtype, alone = (
        next(engine.handle.parameters()).dtype,
        isinstance(engine.handle, nn.Sequential) and not engine.is_sharded(),
    )
    share = (0, 1) if alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    rates = []
    for step in range(start, until):
        for group in decayed:
            inner.param_groups[group].update(WINDOW.at(steps_taken(inner), STEPS))
        rates.append(tuple(float(group["lr"]) for group in inner.param_groups))
        engine.step(engine(batch_of(step, *share).to(dtype)).float().square().mean())
    return rates
