"""The one room that knows engines: what of a parameter lies on this rank, and which optimizer really steps.

DeepSpeed and DTensor are recognised by what they put on a tensor, so that neither has to be imported. Seen in deepspeed 0.19,
accelerate 1.15 and torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """The piece of a parameter on this rank, flat and without padding.

    values: 1-D view of the piece, in the dtype of the model's own copy. owned: whether this rank is to count it; of a
    parameter that every rank holds whole (plain, DDP, ZeRO-1/2), only rank 0 is.
    """

    values: Tensor
    owned: bool


def full_shape(param: Tensor) -> torch.Size:
    """Shape of the whole parameter. Under zero.Init its own is (0,), and the real one is DeepSpeed's `ds_shape`."""
    return getattr(param, "ds_shape", param.shape)


def local_shard(param: Tensor) -> Shard:
    """The piece of `param` on this rank, whatever holds it: nothing, DDP, ZeRO 1 to 3, FSDP2."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    data = param.detach()
    if hasattr(param, "ds_tensor"):  # ZeRO-3: a flat piece; the last ranks' ends in padding up to a multiple of the world size
        piece = param.ds_tensor.detach().view(-1)
        start = param.ds_tensor.ds_numel * torch.distributed.get_rank(param.ds_process_group)
        return Shard(piece[: max(0, min(piece.numel(), param.ds_numel - start))], True)
    if hasattr(data, "to_local"):    # DTensor: uneven splits, no padding
        replicas = [i for i, placement in enumerate(data.placements) if placement.is_replicate()]
        coordinate = data.device_mesh.get_coordinate() or []
        return Shard(data.to_local().reshape(-1), all(coordinate[i] == 0 for i in replicas))
    return Shard(data.reshape(-1), rank == 0)


def live_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that really steps, inside the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def reduction_device() -> torch.device:
    """Where a tensor must lie to be reduced over the ranks: NCCL takes none on the CPU, and gloo is for the CPU."""
    if torch.accelerator.is_available() and torch.distributed.get_backend() != "gloo":
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


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
