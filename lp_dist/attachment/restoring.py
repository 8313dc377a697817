"""Holds hyperparameters against checkpoint loaders, which write into the param groups."""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any

import torch
from torch.optim import Optimizer

from lp_dist.optim.state import steps_taken

logger = logging.getLogger(__name__)


def restore_values(optimizer: Optimizer, requested: list[dict[str, Any]], scheduled: dict[str, Container]) -> None:
    """Puts the requested values back into the param groups, and warns where a checkpoint had others.

    Args:
        optimizer: the inner one.
        requested: of each param group.
        scheduled: values of group keys that the caller sets at some step, and so are expected.
    """
    for i, (group, values) in enumerate(zip(optimizer.param_groups, requested)):
        if "max_momentum" in group:  # a scheduler such as OneCycleLR moves these along with the learning rate
            values = {key: value for key, value in values.items() if key not in ("betas", "momentum")}
        values = {key: value for key, value in values.items() if key != "lr"}  # the schedule's
        for key, value in values.items():
            if group.get(key, value) != value and group[key] not in scheduled.get(key, ()):
                logger.warning(
                    "param group %d has %s=%s, from a checkpoint perhaps; going on with %s=%s, with which the"
                    " optimizer was made",
                    i,
                    key,
                    group[key],
                    key,
                    value,
                )
        group.update(values)


def restore_rates(optimizer: Optimizer, requested: list[dict[str, Any]], lr_scheduler: Any) -> None:
    """Gives the param groups back learning rates of their own, after a DeepSpeed loader that may have copied group
    0's.

    They are those of the scheduler, which was loaded with the engine, else in the proportion in which the groups were
    made.
    """
    groups, made = optimizer.param_groups, [float(values["lr"]) for values in requested]
    rates = list(getattr(lr_scheduler, "_last_lr", []))
    if len(rates) != len(groups):
        if len(set(made)) <= 1 or len({float(group["lr"]) for group in groups}) > 1 or not made[0]:
            return  # nothing was lost
        rates = [float(groups[0]["lr"]) * rate / made[0] for rate in made]
    for group, rate in zip(groups, rates):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate
    for group, rate in zip(groups, getattr(lr_scheduler, "base_lrs", [])):
        if "initial_lr" in group:
            group["initial_lr"] = rate


def warn_of_other_rates(optimizer: Optimizer, requested: list[dict[str, Any]], lr_scheduler: Any) -> None:
    """Warns where a resumed schedule goes on from other learning rates than the script has. (Only a LambdaLR, which
    Trainer's schedules are, starts from the groups' own.)
    """
    made = [float(values["lr"]) for values in requested]
    rates = [float(rate) for rate in getattr(lr_scheduler, "base_lrs", [])]
    if (
        steps_taken(optimizer)
        and isinstance(lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
        and len(rates) == len(made)
        and rates != made
    ):
        logger.warning(
            "the learning-rate schedule of the checkpoint goes on, from a rate of %g; the rate of %g with which the"
            " optimizer was made now does not count. For another rate start anew from the saved model",
            rates[0],
            made[0],
        )
