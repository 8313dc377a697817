"""Learning rates of the steps to come, from the scheduler itself, without touching it."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from lp_dist.sharding.engines import inner_scheduler, scheduler_steps

logger = logging.getLogger(__name__)


def rates_ahead(lr_scheduler: Any, optimizer: Optimizer, steps: int) -> list[list[float]]:
    """Learning rates of each param group for the next `steps` optimizer steps, the present ones first.

    A copy of the scheduler is stepped on a stand-in for the optimizer, so neither changes. Without a scheduler, or
    with one that needs a metric (ReduceLROnPlateau) or can't be copied, the present rates are taken to stay, and the
    log says so.

    Args:
        lr_scheduler: torch's, DeepSpeed's, Accelerate's wrapper of one, or None.
        optimizer: the inner one.
        steps: 0 or more.
    Returns:
        `steps` lists with one rate per group.
    """
    rates = [[float(group["lr"]) for group in optimizer.param_groups]] * min(1, steps)
    if lr_scheduler is not None and steps > 1:
        try:
            rates += _stepped(lr_scheduler, optimizer, steps - 1)
        except Exception as error:  # whatever a scheduler of the user's raises when it is copied or stepped by itself
            logger.warning(
                "the learning rates ahead are not known, as %s can't be evaluated ahead (%s): λ is found as if they"
                " stayed what they are, and corrected at every update",
                type(inner_scheduler(lr_scheduler)).__name__,
                error,
            )
    return rates + [rates[-1]] * (steps - len(rates)) if rates else []


def _stepped(lr_scheduler: Any, optimizer: Optimizer, steps: int) -> list[list[float]]:
    inner, calls = inner_scheduler(lr_scheduler), scheduler_steps(lr_scheduler)
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "lr": float(group["lr"]),
            "params": [torch.zeros(1)],
        }
        for group in optimizer.param_groups
    ]
    stand_in = torch.optim.SGD(groups)
    memo = {id(optimizer): stand_in, id(inner.optimizer): stand_in}
    rates: list[list[float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler that is stepped before its optimizer
        clone = copy.deepcopy(inner, memo)
        for _ in range(steps):
            over = False
            try:
                for _ in range(calls):
                    clone.step()
            except ValueError:
                over = hasattr(clone, "total_steps")  # OneCycleLR at its end: the rate stays
                if not over:
                    raise
            rates.append([float(group["lr"]) for group in stand_in.param_groups])
            if over:
                break
    return rates
