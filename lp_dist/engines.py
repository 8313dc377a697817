"""What wraps a model and its optimizer: which one really steps, what an engine does to it, and how an engine must be
set up.

Engines are recognised by the names of their classes, so that none has to be imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lp_dist.errors import UsageError

TESTED_DEEPSPEED = "0.19"
# DeepSpeed's optimizers around ours that were tested, exactly these: a subclass may step by another one.
TESTED_WRAPPERS = (
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "BF16_Optimizer",
    "FP16_UnfusedOptimizer",
)


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


def foreign_steppers(optimizer: Any) -> list[str]:
    """What else would step some of the weights: DeepSpeed features that bring an optimizer of their own."""
    wrapper = wrapper_of(optimizer)
    found = [] if wrapper is None or type(wrapper).__name__ in TESTED_WRAPPERS else [type(wrapper).__name__]
    if hasattr(wrapper, "backup_optimizer"):
        found.append("offload_optimizer.ratio < 1")
    if getattr(wrapper, "zenflow", False):
        found.append("zenflow")
    return found


def is_wrapped(optimizer: Any) -> bool:
    """Whether DeepSpeed's own optimizer stands between, so that its loaders write the groups."""
    return wrapper_of(optimizer) is not None


def undo_dry_step(optimizer: Any) -> None:
    """Takes back the step with zero gradients by which DeepSpeed's 16-bit ZeRO-0 has the state allocated: it decays
    the masters.

    Known by its traces: step 1, and moments that are all zero. The model's own copy still has the weights from before
    it.
    """
    wrapper, live = wrapper_of(optimizer), live_optimizer(optimizer)
    if type(wrapper).__name__ != "FP16_UnfusedOptimizer":
        return
    pairs = [
        pair for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups) for pair in zip(params, masters)
    ]
    for _, master in pairs:
        for key, value in live.state.get(master, {}).items():
            if (int(value) != 1) if key == "step" else isinstance(value, Tensor) and bool(value.any()):
                return
    for param, master in pairs:
        master.data.copy_(param.detach())
        live.state.pop(master, None)


def update_copies(optimizer: Any) -> None:
    """Writes the fp32 masters into the copies of the weights that DeepSpeed computes with, as it does after a step.
    Collective.
    """
    wrapper = wrapper_of(optimizer)
    if hasattr(wrapper, "update_lp_params"):  # ZeRO 1 and 2, BF16_Optimizer
        wrapper.update_lp_params()
    elif type(wrapper).__name__ == "FP16_UnfusedOptimizer":
        for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups):
            for param, master in zip(params, masters):
                param.data.copy_(master.data)
    elif wrapper is not None:  # ZeRO-3
        for i in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(i)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()


def in_checkpoints(engine: Any, state: Callable[[], Any], restore: Callable[[Any], None]) -> None:
    """Has a DeepSpeed engine save `state()` with every checkpoint, in its client state, if that is not None; and calls
    `restore`, with what a checkpoint had of it, whenever one was loaded. Its loaders write into the param groups: the
    one of universal checkpoints copies group 0's values into all groups at stage 3."""
    if not is_deepspeed(engine) or not hasattr(engine, "load_checkpoint"):
        return
    load = getattr(engine.load_checkpoint, "without_lp_dist", engine.load_checkpoint)
    save = getattr(engine.save_checkpoint, "without_lp_dist", engine.save_checkpoint)

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client = load(*args, **kwargs)
        given = {
            **dict(
                zip(
                    (
                        "load_dir",
                        "tag",
                        "load_module_strict",
                        "load_optimizer_states",
                        "load_lr_scheduler_states",
                        "load_module_only",
                    ),
                    args,
                )
            ),
            **kwargs,
        }
        # Where the weights alone are asked for the engine gives the client state all the same.
        anew = given.get("load_module_only", False) or not given.get("load_optimizer_states", True)
        restore(None if anew else (client or {}).get("lp_dist"))
        return path, client

    @functools.wraps(save)
    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        mine = state()
        return save(
            save_dir, tag, {**(client_state or {}), **({} if mine is None else {"lp_dist": mine})}, *args, **kwargs
        )

    load_checkpoint.without_lp_dist, save_checkpoint.without_lp_dist = load, save
    engine.load_checkpoint, engine.save_checkpoint = load_checkpoint, save_checkpoint


def check_deepspeed_version() -> None:
    """Raises RuntimeError if the installed DeepSpeed is not of a tested series: its private attributes may mean
    something else.
    """
    version = importlib.metadata.version("deepspeed")
    if not version.startswith(TESTED_DEEPSPEED + "."):
        raise RuntimeError(
            f"this version of lp_dist knows the shards of deepspeed {TESTED_DEEPSPEED}.x, and {version} is installed;"
            f" install 'deepspeed=={TESTED_DEEPSPEED}.*', or a newer lp_dist"
        )


def reduction_device() -> torch.device:
    """Where a tensor must lie to be reduced over the ranks: NCCL takes none on the CPU, and gloo is for the CPU."""
    if torch.accelerator.is_available() and torch.distributed.get_backend() != "gloo":
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def summed(counts: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a small tensor of integers; every rank must call it. The tensor itself where there is
    one process.
    """
    if torch.distributed.is_initialized() and counts.numel():
        counts = counts.to(reduction_device())
        torch.distributed.all_reduce(counts)
    return counts


def largest(numbers: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over all ranks of a small tensor of integers, on the CPU; every rank must call it."""
    if torch.distributed.is_initialized() and numbers.numel():
        numbers = numbers.to(reduction_device())
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return numbers.cpu()


def everyones(told: Any) -> list[Any]:
    """What each rank tells, by rank; every rank must call it. Small things that pickle."""
    if not torch.distributed.is_initialized():
        return [told]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, told)
    return everyone


def agree(told: dict[str, Any] | Exception) -> None:
    """Raises RuntimeError, on every rank, if ranks disagree on what the optimizer is to do, or if another one
    failed.
    """
    everyone = everyones(str(told) if isinstance(told, Exception) else told)
    if isinstance(told, Exception):
        return  # its own error says more
    for rank, other in enumerate(everyone):
        if isinstance(other, str):
            raise RuntimeError(f"rank {rank} could not attach its optimizer: {other}")
        for key in sorted(set(everyone[0]) | set(other)):
            if everyone[0].get(key) != other.get(key):
                raise RuntimeError(
                    f"ranks disagree: {key} is {everyone[0].get(key)!r} on rank 0 and {other.get(key)!r} on rank "
                    f"{rank}; start every rank with the same script and config"
                )


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Refuses what would step part of the weights by another optimizer, or save no usable weights.

    Raises:
        UsageError: names the key of the DeepSpeed config and what to set it to.
    """
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if "optimizer" in config:
        raise UsageError(
            'the DeepSpeed config has an "optimizer" section, which would take the place of ours; remove it'
        )
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise UsageError(
            "with offload_optimizer, Accelerate silently replaces our optimizer by DeepSpeedCPUAdam; set "
            '"zero_force_ds_cpu_optimizer": false at the top level of the DeepSpeed config'
        )
    if offload.get("ratio", 1.0) < 1.0:
        raise UsageError(
            f"offload_optimizer.ratio={offload['ratio']} lets another optimizer step a part of the weights, without Lp"
            " decay; set it to 1.0"
        )
    for key, where in (("zenflow", zero), ("super_offload", offload)):
        if where.get(key):
            raise UsageError(f'"{key}" steps the weights by an optimizer of its own, without Lp decay; remove it')
    if zero.get("round_robin_gradients"):
        raise UsageError(
            '"round_robin_gradients": true makes DeepSpeed lose track of which parameter lies where, so another one'
            " than the named would decay; remove it from zero_optimization"
        )
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UsageError(
            'under ZeRO-3 a checkpoint without "stage3_gather_16bit_weights_on_model_save": true has no usable'
            " weights; set it in zero_optimization"
        )


def join_deepspeed() -> None:
    """Makes DeepSpeed's communicator take over the ranks that have met already.

    Without it, when Trainer runs with use_cpu, ZeRO-3's `zero.Init` takes the world for one process and refuses the
    batch size.
    """
    import deepspeed

    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


@contextmanager
def zero_init_disabled() -> Iterator[None]:
    """Loads a model whole although Transformers has a ZeRO-3 config at hand, which would partition it."""
    from transformers.integrations import deepspeed as integration

    config = integration.deepspeed_config() if integration.is_deepspeed_zero3_enabled() else None
    if config is None:
        yield
        return
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(reference())
