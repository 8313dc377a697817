"""What wraps a model and its optimizer: which one really steps, what an engine does to it, and how an engine must be
set up.

Engines are recognised by the names of their classes, so that none has to be imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def is_deepspeed(thing: Any) -> bool:
    """Whether it is an object of a class of DeepSpeed's, or of one made from it."""
    return any(cls.__module__.startswith("deepspeed.") for cls in type(thing).__mro__)


def wrapper_of(optimizer: Any) -> Any:
    """DeepSpeed's optimizer around the live one; None if there is none. Its own optimizers (CPUAdam) wrap nothing."""
    while hasattr(optimizer, "optimizer"):
        if is_deepspeed(optimizer) and not isinstance(optimizer, nn.Module):  # that would be the engine
            return optimizer
        optimizer = optimizer.optimizer
    return None


def unwrap(model: Any) -> nn.Module:
    """The user's own module inside DDP, a DeepSpeed engine and torch.compile. (A model may have a child of its own
    called `module`.)
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or is_deepspeed(model):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def optimizer_of(model: Any, optimizer: Any) -> Any:
    """What to look into: a DeepSpeed engine's own optimizer, whatever is handed over with it (the one that it was made
    from steps no parameter of the model any more), else `optimizer`. Raises ValueError where there is none."""
    if is_deepspeed(model) and isinstance(model, nn.Module):
        return model.optimizer
    if optimizer is None:
        raise ValueError("pass the optimizer as well; only a DeepSpeed engine knows its own")
    return optimizer


def live_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that really steps, inside the wrappers of Accelerate and DeepSpeed; of an engine, its own."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def inner_scheduler(lr_scheduler: Any) -> Any:
    """The learning-rate scheduler inside Accelerate's wrapper."""
    return getattr(lr_scheduler, "scheduler", lr_scheduler)


def scheduler_steps(lr_scheduler: Any) -> int:
    """How often the inner scheduler is stepped in one optimizer step: Accelerate's wrapper does so once for each
    process. (Its wrapper for DeepSpeed, a subclass, leaves that to the engine, which does so once.)"""
    if (
        type(lr_scheduler).__name__ != "AcceleratedScheduler"
        or not lr_scheduler.step_with_optimizer
        or lr_scheduler.split_batches
    ):
        return 1
    from accelerate.state import AcceleratorState

    return AcceleratorState().num_processes
