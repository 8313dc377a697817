"""What wraps a model, its optimizer and its learning-rate scheduler, and what lies inside of the wrappers.

Engines are recognised by the names of their classes, so that none has to be imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lp_dist.errors import UsageError

# DeepSpeed's.
_PIPELINES = ("PipelineEngine", "PipelineModule")


def is_deepspeed(instance: Any) -> bool:
    """Whether `instance` is of one of DeepSpeed's classes, or of a subclass of one."""
    return any(cls.__module__.startswith("deepspeed.") for cls in type(instance).__mro__)


def wrapper_of(optimizer: Any) -> Any:
    """DeepSpeed's optimizer around the inner one; None without one. DeepSpeed's CPUAdam and its like wrap nothing."""
    while hasattr(optimizer, "optimizer"):
        # A module would be the engine.
        if is_deepspeed(optimizer) and not isinstance(optimizer, nn.Module):
            return optimizer
        optimizer = optimizer.optimizer
    return None


def unwrap(model: Any) -> nn.Module:
    """The user's own module inside DDP, a DeepSpeed engine and torch.compile."""
    # The types are checked, since a model may have a child of its own called `module`.
    while True:
        if any(cls.__name__ in _PIPELINES for cls in type(model).__mro__):
            raise UsageError(
                f"{type(model).__name__} gives each rank the layers of its stage alone, and lp_dist counts parameters"
                " that all ranks know: pipeline parallelism is not supported; use ZeRO-3, or AutoTP with ZeRO-1 or 2"
            )
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or is_deepspeed(model):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def optimizer_of(model: Any, optimizer: Any) -> Any:
    """The optimizer that belongs to the model: a DeepSpeed engine's own one, else `optimizer`.

    The optimizer from which a DeepSpeed engine was made steps no parameter of the model any more.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine, FSDP2.
        optimizer: ignored for a DeepSpeed engine; may be None there.
    Raises:
        ValueError: `optimizer` is None, and the model is no DeepSpeed engine.
    """
    if is_deepspeed(model) and isinstance(model, nn.Module):
        return model.optimizer
    if optimizer is None:
        raise ValueError("pass the optimizer as well; only a DeepSpeed engine knows its own")
    return optimizer


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that really steps, inside the wrappers of Accelerate and DeepSpeed.

    Args:
        optimizer: an optimizer, a wrapper of one, or a DeepSpeed engine.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def inner_scheduler(lr_scheduler: Any) -> Any:
    """The learning-rate scheduler inside Accelerate's wrapper."""
    return getattr(lr_scheduler, "scheduler", lr_scheduler)


def scheduler_steps(lr_scheduler: Any) -> int:
    """How often the inner scheduler is stepped in one optimizer step.

    Accelerate's wrapper steps it once for each process. Its wrapper for DeepSpeed leaves that to the engine, which
    steps it once.
    """
    # By the exact name, since the wrapper for DeepSpeed is a subclass.
    if (
        type(lr_scheduler).__name__ != "AcceleratedScheduler"
        or not lr_scheduler.step_with_optimizer
        or lr_scheduler.split_batches
    ):
        return 1
    from accelerate.state import AcceleratorState

    return AcceleratorState().num_processes
