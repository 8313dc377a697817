"""What of a parameter lies on this rank, and where in the tensors that its optimizer steps. Nothing is gathered.

DeepSpeed's private attributes are touched here and in `engines.py` alone, and only in the versions with which they
were tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.sharding.collectives import summed
from lp_dist.sharding.deepspeed import check_deepspeed_version
from lp_dist.sharding.engines import live_optimizer, optimizer_of, unwrap, wrapper_of


@dataclass(frozen=True)
class Piece:
    """The part of a parameter on this rank, without padding.

    values: a view, flat where it is contiguous. start: its first element in the whole parameter, taken flat; None if
    it is no contiguous range of it. replica, replicas: of how many ranks that hold the same piece this is which one.
    """

    values: Tensor
    start: int | None
    replica: int = 0
    replicas: int = 1

    @property
    def share(self) -> Tensor:
        """What of it this rank counts: of a piece that several ranks hold, each takes an equal slice."""
        numel = self.values.numel()
        if not self.values.is_contiguous():
            return self.values if self.replica == 0 else self.values.new_empty(0)
        return self.values.view(-1)[
            numel * self.replica // self.replicas : numel * (self.replica + 1) // self.replicas
        ]

    @property
    def first(self) -> int | None:
        """The first element of `share` in the whole parameter, taken flat; None as for `start`."""
        return None if self.start is None else self.start + self.values.numel() * self.replica // self.replicas


@dataclass(frozen=True)
class Shard:
    """Where one trainable parameter lies in what this rank's optimizer steps.

    Args:
        name: as of the unwrapped model's `named_parameters()`. param: the model's own parameter.
        shape: of the whole parameter. start: as of `Piece`.
        tensor: what the optimizer steps: a flat fp32 shard of many parameters, an fp32 master copy, a DTensor, or the
            parameter.
        offset, length: where the piece lies in its local part, taken flat; the length is 0 if nothing of it is on this
            rank.
        group: index of its param group. state_of: gives the optimizer's state of `tensor`.
    """

    name: str
    param: Tensor
    shape: torch.Size
    start: int | None
    tensor: Tensor
    offset: int
    length: int
    group: int
    state_of: Callable[[Tensor], dict[str, Any]]
    replica: int = 0
    replicas: int = 1

    @property
    def is_on_disk(self) -> bool:
        """Whether NVMe offload has swapped it out."""
        return not hasattr(self.tensor, "to_local") and self.length > self.tensor.numel()

    @property
    def piece(self) -> Piece:
        """The master values, a view to read and write. Under NVMe offload they are read from the disk, and are a
        copy.
        """
        if self.is_on_disk:
            from deepspeed.utils import safe_get_local_fp32_param

            values = safe_get_local_fp32_param(self.param)[: self.length].clone()
        else:
            values = self._part(self.tensor.detach())
        return Piece(values, self.start, self.replica, self.replicas)

    @property
    def state(self) -> dict[str, Tensor]:
        """Views of the state tensors (exp_avg, ...) of the piece; empty before the first step, and while they are
        swapped out.
        """
        return {
            key: self._part(value)
            for key, value in self.state_of(self.tensor).items()
            if key != "step"
            and isinstance(value, Tensor)
            and value.shape == self.tensor.shape
            and self.tensor.numel() >= self.length
        }

    def _part(self, tensor: Tensor) -> Tensor:
        data = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not data.is_contiguous():
            return data  # then the piece is all of it
        return data.view(-1)[self.offset : self.offset + self.length]


def full_shape(param: Tensor) -> torch.Size:
    """Shape of the whole parameter. Under zero.Init its own is (0,), and the real one is DeepSpeed's `ds_shape`."""
    return getattr(param, "ds_shape", param.shape)


def local_piece(param: Tensor) -> Piece:
    """The model's own copy of `param` on this rank, whatever holds it: nothing, DDP, ZeRO 1 to 3, FSDP2."""
    data = param.detach()
    if hasattr(
        param, "ds_tensor"
    ):  # ZeRO-3: a flat piece; the last ranks' ends in padding up to a multiple of the world size
        piece = param.ds_tensor.detach().view(-1)
        start = param.ds_tensor.ds_numel * torch.distributed.get_rank(param.ds_process_group)
        return Piece(piece[: max(0, min(piece.numel(), param.ds_numel - start))], start)
    if hasattr(data, "to_local"):
        start, replica, replicas = _dtensor_place(data)
        return Piece(data.to_local(), start, replica, replicas)
    return Piece(data, 0, *_ranks())


def shards(model: Any, optimizer: Any = None) -> list[Shard]:
    """Where every trainable parameter lies in what this rank's optimizer steps, in the order of `named_parameters()`.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine, FSDP2.
        optimizer: ours, or Accelerate's or DeepSpeed's wrapper of it; a DeepSpeed engine has its own.
    A parameter that no group holds is left out, a tied one comes once.

    Raises:
        RuntimeError: an engine or a version of it that was not tested.
    """
    optimizer = optimizer_of(model, optimizer)
    wrapper, live = wrapper_of(optimizer), live_optimizer(optimizer)
    kind = type(wrapper).__name__ if wrapper is not None else ""
    if kind not in _LOCATORS:
        raise RuntimeError(
            f"lp_dist does not know the shards of DeepSpeed's {kind}, only those of ZeRO 0 to 3 and BF16_Optimizer;"
            " remove what asks for it from the DeepSpeed config"
        )
    if wrapper is not None:
        check_deepspeed_version()
    locate = _LOCATORS[kind](wrapper, live)
    found = []
    for name, param in unwrap(model).named_parameters():
        place = locate(param) if param.requires_grad else None
        if place is not None:
            found.append(
                Shard(name, param, full_shape(param), state_of=lambda tensor: live.state.get(tensor, {}), **place)
            )
    return found


def all_zero(candidates: list[Shard]) -> list[str]:
    """Names of those whose parameter is all zeros over all ranks; one small reduction."""
    counts = torch.tensor([int(torch.count_nonzero(local_piece(shard.param).share)) for shard in candidates])
    return [shard.name for shard, count in zip(candidates, summed(counts).tolist()) if not count]


def _ranks() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _dtensor_place(data: Tensor) -> tuple[int | None, int, int]:
    """First element of the local part in the whole, which replica this rank has, and of how many."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, coordinate = data.device_mesh, data.device_mesh.get_coordinate()
    replica, replicas = 0, 1
    for i, placement in enumerate(data.placements):
        if placement.is_replicate():
            replica, replicas = replica * mesh.size(i) + coordinate[i], replicas * mesh.size(i)
    dims = [placement.dim for placement in data.placements if placement.is_shard()]
    if len(dims) > 1 or dims not in ([], [0]):  # rows of a matrix in several strips
        return None, replica, replicas
    _, offset = compute_local_shape_and_global_offset(data.shape, mesh, data.placements)
    row = data.numel() // max(1, data.shape[0]) if data.ndim else 1
    return (offset[0] * row if data.ndim else 0), replica, replicas


# Each locator is made from DeepSpeed's optimizer and the live one, and gives a parameter's place as arguments of
# Shard.


def _locate_whole(_: Any, live: Optimizer) -> Callable[[Tensor], dict | None]:
    """Plain, DDP, FSDP2, ZeRO-0 in fp32: the optimizer steps the parameters themselves."""
    groups = {id(param): i for i, group in enumerate(live.param_groups) for param in group["params"]}

    def locate(param: Tensor) -> dict | None:
        if id(param) not in groups:
            return None
        if hasattr(param, "to_local"):
            start, replica, replicas = _dtensor_place(param)
            length = param.detach().to_local().numel()
        else:
            (start, length), (replica, replicas) = (0, param.numel()), _ranks()
        return dict(
            start=start,
            tensor=param,
            offset=0,
            length=length,
            group=groups[id(param)],
            replica=replica,
            replicas=replicas,
        )

    return locate


def _locate_copy(wrapper: Any, _: Optimizer) -> Callable[[Tensor], dict | None]:
    """ZeRO-0 in 16 bits: a whole fp32 copy of each parameter, on every rank."""
    copies = {
        id(param): (i, master)
        for i, (params, masters) in enumerate(zip(wrapper.fp16_groups, wrapper.fp32_groups))
        for param, master in zip(params, masters)
    }

    def locate(param: Tensor) -> dict | None:
        if id(param) not in copies:
            return None
        (group, master), (replica, replicas) = copies[id(param)], _ranks()
        return dict(
            start=0, tensor=master, offset=0, length=master.numel(), group=group, replica=replica, replicas=replicas
        )

    return locate


def _locate_fragment(wrapper: Any, _: Optimizer) -> Callable[[Tensor], dict | None]:
    """ZeRO-1, 2 and BF16_Optimizer: one flat fp32 shard per group, and `_hp_mapping` on each parameter that has
    elements in it.
    """
    bf16 = type(wrapper).__name__ == "BF16_Optimizer"
    if getattr(wrapper, "round_robin_gradients", False):
        # DeepSpeed 0.19.8 lays the parameters out in another order than the one in which it writes down where they
        # are; its universal checkpoints and safe_get_full_fp32_param have other parameters' values as well.
        raise RuntimeError(
            '"round_robin_gradients": true makes DeepSpeed lose track of which parameter lies where, so another one'
            " than the named would decay; remove it from zero_optimization"
        )
    flats = wrapper.fp32_groups_flat_partition if bf16 else wrapper.single_partition_of_fp32_groups
    groups = {
        id(param): i
        for i, params in enumerate(wrapper.bf16_groups if bf16 else wrapper.bit16_groups)
        for param in params
    }

    def locate(param: Tensor) -> dict | None:
        if id(param) not in groups:
            return None
        group, mapping = groups[id(param)], param._hp_mapping
        if mapping is None:
            return dict(start=0, tensor=flats[group], offset=0, length=0, group=group)
        return dict(
            start=mapping.lp_fragment_address.start,
            tensor=flats[group],
            offset=mapping.hp_fragment_address.start,
            length=mapping.hp_fragment_address.numel,
            group=group,
        )

    return locate


def _locate_sub_group(wrapper: Any, _: Optimizer) -> Callable[[Tensor], dict | None]:
    """ZeRO-3: a flat fp32 shard per sub-group, in which every parameter has an equal part on every rank, the last
    padded.
    """

    def locate(param: Tensor) -> dict | None:
        place = wrapper.grad_position.get(wrapper.get_param_id(param))
        if place is None:
            return None
        sub_group, offset, padded = place
        start = padded * torch.distributed.get_rank(param.ds_process_group)
        return dict(
            start=start,
            tensor=wrapper.fp32_partitioned_groups_flat[sub_group],
            offset=offset,
            length=max(0, min(padded, param.ds_numel - start)),
            group=wrapper.sub_group_to_group_id[sub_group],
        )

    return locate


_LOCATORS = {
    "": _locate_whole,
    "FP16_UnfusedOptimizer": _locate_copy,
    "DeepSpeedZeroOptimizer": _locate_fragment,
    "BF16_Optimizer": _locate_fragment,
    "DeepSpeedZeroOptimizer_Stage3": _locate_sub_group,
}
