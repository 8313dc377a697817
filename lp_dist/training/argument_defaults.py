"""What Trainer's arguments say of the learning rate and Adam's constants, for an optimizer made without them."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.base import LpOptimizer
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.engines import inner_scheduler

logger = logging.getLogger(__name__)


def take_arguments(optimizer: Optimizer, lr_scheduler: Any, args: Any) -> None:
    """Gives the param groups the learning rate, betas and eps of Trainer's arguments, where the caller named none; the
    scheduler's base rates with them. Says once where the caller named another value than they have.

    `optimizer_cls_and_kwargs=(LpAdamW, {})` would train at the optimizer's own default, and so would each trial of a
    hyperparameter search. A learning rate that was loaded, or has trained already, stays as it is.

    Args:
        optimizer: the inner one.
        lr_scheduler: as Trainer made it for the optimizer.
        args: TrainingArguments.
    Raises:
        UsageError: the scheduler was made from the absolute learning rate, which is not known yet.
    """
    if not isinstance(optimizer, LpOptimizer):
        return
    requested = optimizer.attached.requested
    values: dict[str, Any] = {"lr": args.learning_rate}
    if isinstance(optimizer, LpAdamW):
        values |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if len(requested.groups) == len(optimizer.param_groups):
        left_open = list(requested.left_open)
    else:  # an engine has dropped empty groups
        left_open = [frozenset.intersection(*requested.left_open)] * len(optimizer.param_groups)
    if any("lr" in names for names in left_open):
        _check_scheduler(args)
    _tell(requested.groups, requested.left_open, values, args)
    is_new = not steps_taken(optimizer)
    for i, (group, names) in enumerate(zip(optimizer.param_groups, left_open)):
        if is_new:  # else a checkpoint's, which is held against what is requested
            group.update({key: values[key] for key in names & values.keys() - {"lr"}})
        # A schedule that has a learning rate of its own sets it at each step.
        if "lr" in names and is_new and "max_lr" not in group:
            _scale_rate(group, i, values["lr"], inner_scheduler(lr_scheduler))
    for made, names in zip(requested.groups, requested.left_open):
        made.update({key: values[key] for key in names & values.keys()})


def _scale_rate(group: dict[str, Any], i: int, rate: float, scheduler: Any) -> None:
    """Sets the base of param group `i`'s learning rate, and the rate itself in the proportion of the schedule."""
    before = float(group.get("initial_lr", group["lr"]))
    factor = rate / before
    if isinstance(group["lr"], Tensor):
        group["lr"].mul_(factor)
    else:
        # Where the schedule begins at its base, exactly that, and not what rounding makes of it.
        group["lr"] = rate if group["lr"] == before else group["lr"] * factor
    if "initial_lr" in group:
        group["initial_lr"] = rate
    for each in (scheduler, *getattr(scheduler, "_schedulers", ())):
        if len(getattr(each, "base_lrs", ())) > i:
            each.base_lrs[i] = rate
        if len(getattr(each, "_last_lr", ())) > i:
            each._last_lr[i] = float(group["lr"])


def _check_scheduler(args: Any) -> None:
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = args.lr_scheduler_kwargs or {}
    if kind == "polynomial" or (isinstance(kwargs, dict) and "min_lr" in kwargs):
        raise UsageError(
            f"lr_scheduler_type={kind!r} was made from the optimizer's learning rate, and that of TrainingArguments"
            " comes to it later: name it, as in optimizer_cls_and_kwargs=(LpAdamW, {'lr': args.learning_rate})"
        )


def _tell(groups: list[dict[str, Any]], left_open: list[frozenset[str]], values: dict[str, Any], args: Any) -> None:
    defaults = {field.name: field.default for field in fields(args)}
    usual = {
        "lr": defaults.get("learning_rate"),
        "betas": (defaults.get("adam_beta1"), defaults.get("adam_beta2")),
        "eps": defaults.get("adam_epsilon"),
    }
    for key, value in values.items():
        named = [_plain(group[key]) for group, names in zip(groups, left_open) if key not in names]
        if named and value != usual[key] and all(each != value for each in named):
            logger.warning(
                "the optimizer was made with %s=%s, and TrainingArguments say %s: the optimizer's own holds. Leave one"
                " of them out",
                key,
                named[0],
                value,
            )


def _plain(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)
