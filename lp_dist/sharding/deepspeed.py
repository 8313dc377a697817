"""What DeepSpeed does to an optimizer, and how it must be set up."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lp_dist.errors import UsageError
from lp_dist.sharding.engines import is_deepspeed, live_optimizer, wrapper_of

TESTED_DEEPSPEED = "0.19"


# DeepSpeed's optimizers around ours that were tested, exactly these: a subclass may step by another one.
TESTED_WRAPPERS = (
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "BF16_Optimizer",
    "FP16_UnfusedOptimizer",
)


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
