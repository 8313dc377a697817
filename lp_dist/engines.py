"""How an engine must be set up: configs that would train something else are refused, and the ranks meet in one communicator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lp_dist.errors import UsageError


def reduction_device() -> torch.device:
    """Where a tensor must lie to be reduced over the ranks: NCCL takes none on the CPU, and gloo is for the CPU."""
    if torch.accelerator.is_available() and torch.distributed.get_backend() != "gloo":
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def summed(counts: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a small tensor of integers; every rank must call it. The tensor itself where there is one process."""
    if torch.distributed.is_initialized() and counts.numel():
        counts = counts.to(reduction_device())
        torch.distributed.all_reduce(counts)
    return counts


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Refuses what would step part of the weights by another optimizer, or save no usable weights.

    Raises:
        UsageError: names the key of the DeepSpeed config and what to set it to.
    """
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if "optimizer" in config:
        raise UsageError('the DeepSpeed config has an "optimizer" section, which would take the place of ours; remove it')
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise UsageError('with offload_optimizer, Accelerate silently replaces our optimizer by DeepSpeedCPUAdam; set '
                         '"zero_force_ds_cpu_optimizer": false at the top level of the DeepSpeed config')
    if offload.get("ratio", 1.0) < 1.0:
        raise UsageError(f'offload_optimizer.ratio={offload["ratio"]} lets another optimizer step a part of the weights, without Lp decay; '
                         "set it to 1.0")
    for key, where in (("zenflow", zero), ("super_offload", offload)):
        if where.get(key):
            raise UsageError(f'"{key}" steps the weights by an optimizer of its own, without Lp decay; remove it')
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UsageError('under ZeRO-3 a checkpoint without "stage3_gather_16bit_weights_on_model_save": true has no usable weights; '
                         "set it in zero_optimization")


def join_deepspeed() -> None:
    """Makes DeepSpeed's communicator take over the ranks that have met already.

    Without it, when Trainer runs with use_cpu, ZeRO-3's `zero.Init` takes the world for one process and refuses the batch size.
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
