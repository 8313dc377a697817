"""What DeepSpeed's tensor parallelism (AutoTP) and expert parallelism leave of a parameter in a rank's copy of the
model. What ZeRO makes of that is in `deepspeed.py`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.errors import UsageError
from lp_dist.optim.region import Region

# Attributes that DeepSpeed gives a parameter: DS_AUTOTP_UC_META and DS_AUTOEP_UC_META of its checkpoint.constants,
# which it writes universal checkpoints by.
_AUTOTP, _AUTOEP = "ds_autotp_universal_checkpoint_meta", "ds_autoep_uc_meta"


def model_region(param: Any) -> Region | None:
    """The region of a parameter that this rank's copy of the model has.

    Args:
        param: of the model.
    Returns:
        None: all of it, or DeepSpeed's tensor and expert parallelism are not in use.
    Raises:
        UsageError: tensor parallelism divides it in a way of which DeepSpeed says nothing.
    """
    local = torch.Size(getattr(param, "ds_shape", param.shape))
    region: Region | None
    if hasattr(param, _AUTOEP):
        placed = getattr(param, _AUTOEP)
        region = _region(torch.Size(placed["logical_shape"]), 0, tuple((e, e + 1) for e in placed["local_experts"]))
    elif hasattr(param, _AUTOTP) or getattr(param, "ds_is_replaced_module", False):
        region = _tensor_parallel_region(param)
    elif is_local_expert(param):
        group = _expert_group(param)
        index, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        rows = local[0]
        region = _region(torch.Size([count * rows, *local[1:]]), 0, ((index * rows, (index + 1) * rows),))
    else:
        return None
    # Gathered for the moment, as for a save.
    if region is None or local == region.shape:
        return None
    if region.sizes != local:
        raise UsageError(
            f"DeepSpeed's AutoTP says that a rank has {region} of a parameter, and this rank has a tensor of"
            f" {list(local)}: {_layer_of(param)} is not supported; name other layers in tensor_parallel's"
            " partition_config"
        )
    return region


def is_local_expert(param: Any) -> bool:
    """Whether it is of an expert of `deepspeed.moe.MoE` whose name on other ranks is that of other experts.

    The parameters of that name on all ranks are taken for one, with those of each rank as its next rows.
    """
    return not getattr(param, "allreduce", True) and not hasattr(param, _AUTOEP) and _expert_group(param) is not None


def is_linear(module: Any) -> bool:
    """Whether a module multiplies by a matrix [outputs, inputs]: torch's linear layer, or what AutoTP put there."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return isinstance(module, nn.Linear) or ("TensorParallel_Layer" in names and not names[0].endswith("Embedding"))


def is_transposed(module: Any) -> bool:
    """Whether a module multiplies by a matrix [inputs, outputs]: GPT-2's Conv1D, also where FSDP2 has given it a class
    of its own.
    """
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _expert_group(param: Any) -> Any:
    """Of the ranks that have other experts; None before the engine is made."""
    if "deepspeed" not in sys.modules:
        return None
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group_dict().get(getattr(param, "group_name", None))


def _tensor_parallel_region(param: Any) -> Region | None:
    meta = getattr(param, _AUTOTP, {})
    if meta.get("replicated"):
        return None
    layer = getattr(getattr(param, "gather_params", None), "__self__", None)
    shape, dim = meta.get("original_shape"), meta.get("partition_dim")
    # A fused matrix is several ones along that dimension, each divided by itself.
    widths = meta.get("sub_param_shard_widths") or ([meta["partition_sizes"]] if meta.get("partition_sizes") else [])
    reason = meta.get("conversion", {}).get("unsupported_reason")
    if (
        layer is None
        or shape is None
        or dim is None
        or reason
        or shape[dim] != sum(width for of_matrix in widths for width in of_matrix)
    ):
        raise UsageError(
            f"DeepSpeed's AutoTP does not say which part of {_layer_of(param)} a rank has"
            f"{f' ({reason})' if reason else ''}; name other layers in tensor_parallel's partition_config"
        )
    runs, first = [], 0
    for of_matrix in widths:
        start = first + sum(of_matrix[: layer.tp_index])
        runs.append((start, start + of_matrix[layer.tp_index]))
        first += sum(of_matrix)
    return _region(torch.Size(shape), dim, tuple(runs))


def _layer_of(param: Any) -> str:
    layer = getattr(getattr(param, "gather_params", None), "__self__", None)
    if layer is None:
        return f"a parameter of shape {tuple(param.shape)}"
    return f"{getattr(layer, 'name', None) or 'a layer'} ({type(layer).__name__})"


@lru_cache(maxsize=4096)
def _region(shape: torch.Size, dim: int, runs: tuple[tuple[int, int], ...]) -> Region:
    """All along the other dimensions, and ranges of indices along this one."""
    indices = [torch.arange(size) for size in shape]
    indices[dim] = torch.cat([torch.arange(start, stop) for start, stop in runs])
    return Region.of_indices(shape, indices)


def in_parameter(param: Tensor, start: int) -> tuple[int, Region | None]:
    """Where an element of this rank's copy of a parameter lies.

    Args:
        param: of the model.
        start: of the element, in the copy taken flat.
    Returns:
        Its place in a region of the parameter, taken flat, and that region; None: the parameter itself.
    """
    region = model_region(param)
    first = None if region is None else region.contiguous_start()
    return (start, region) if first is None else (first + start, None)
