"""Which part of a parameter lies on this rank, and where in the tensors that its optimizer steps. Nothing is gathered.

Plain tensors and DTensors are located here. `deepspeed.py` gives the locator for DeepSpeed's optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.optim.batching import count_zeros, to_local
from lp_dist.optim.parameter_map import ParamSection
from lp_dist.sharding.collectives import all_reduce_sum, rank_and_world_size
from lp_dist.sharding.deepspeed import read_from_nvme, shard_locator, zero3_partition, zero3_shape
from lp_dist.sharding.engines import inner_optimizer, optimizer_of, unwrap, wrapper_of
from lp_dist.sharding.location import Locator, ShardLocation


@dataclass(frozen=True)
class LocalShard:
    """The values of a parameter on this rank, without padding.

    Args:
        values: a view; flat where the shard is contiguous.
        start: the first element of the shard in the parameter, taken flat. None if it is no contiguous range.
        replica: the number of this copy among the ranks that hold the same shard.
        replicas: how many ranks hold the same shard.
    """

    values: Tensor
    start: int | None
    replica: int = 0
    replicas: int = 1

    @property
    def counted(self) -> Tensor:
        """The values that this rank counts, so that all ranks together count each value once.

        Ranks that hold the same shard take an equal part each. A shard that is not contiguous is counted by the first
        of them alone.
        """
        numel = self.values.numel()
        if not self.values.is_contiguous():
            return self.values if self.replica == 0 else self.values.new_empty(0)
        return self.values.view(-1)[
            numel * self.replica // self.replicas : numel * (self.replica + 1) // self.replicas
        ]

    @property
    def counted_start(self) -> int | None:
        """The first element of `counted` in the parameter, taken flat; None as for `start`."""
        return None if self.start is None else self.start + self.values.numel() * self.replica // self.replicas


@dataclass(frozen=True)
class Shard:
    """Where one trainable parameter lies in what this rank's optimizer steps.

    Args:
        name: as of the unwrapped model's `named_parameters()`.
        param: the model's own parameter.
        shape: of the parameter before sharding.
        start: see `ShardLocation`.
        tensor: see `ShardLocation`.
        offset: see `ShardLocation`.
        length: see `ShardLocation`.
        group: see `ShardLocation`.
        state_of: returns the optimizer's state of `tensor`.
        replica: see `ShardLocation`.
        replicas: see `ShardLocation`.
        section: of which the shard is, where it is not of all of the parameter.
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
    section: ParamSection | None = None

    @property
    def param_name(self) -> str:
        """As of `named_parameters()`, also of a section."""
        return self.name if self.section is None else self.section.param_name

    @property
    def copy(self) -> LocalShard:
        """The model's own copy of the values, which a save of the model writes."""
        local = local_shard(self.param)
        if self.section is None:
            return local
        assert local.start is not None, "only contiguous ranges have sections"
        overlap = self.section.overlap(local.start, local.values.numel())
        return LocalShard(
            local.values.view(-1)[overlap.first : overlap.last], overlap.start, local.replica, local.replicas
        )

    @property
    def has_sections(self) -> bool:
        """Whether `section_of` can be taken on this rank: nothing is on the disk, and all lies row by row."""
        return (
            self.start is not None
            and not self.is_on_disk
            and to_local(self.tensor.detach()).is_contiguous()
            and local_shard(self.param).values.is_contiguous()
        )

    def section_of(self, start: int, stop: int) -> Shard:
        """The indices from `start` to `stop` along the parameter's first dimension, as a shard of its own. It is empty
        where another rank has them.
        """
        assert self.start is not None and self.section is None
        section = ParamSection(self.name, start, stop, self.shape)
        overlap = section.overlap(self.start, self.length)
        return replace(
            self,
            name=section.name,
            shape=section.section_shape,
            start=overlap.start,
            offset=self.offset + overlap.first,
            length=overlap.last - overlap.first,
            section=section,
        )

    @property
    def is_on_disk(self) -> bool:
        """Whether NVMe offload has swapped it out."""
        return not is_dtensor(self.tensor) and self.length > self.tensor.numel()

    @property
    def local(self) -> LocalShard:
        """The master values: a view to read and write. Under NVMe offload it is a copy that was read from the disk."""
        if self.is_on_disk:
            values = read_from_nvme(self.param)[: self.length].clone()
        else:
            values = self._view(self.tensor.detach())
        return LocalShard(values, self.start, self.replica, self.replicas)

    @property
    def state(self) -> dict[str, Tensor]:
        """Views of the state tensors (exp_avg, ...) of the shard, by key.

        Empty before the first step, and while NVMe offload has swapped them out.
        """
        return {
            key: self._view(value)
            for key, value in self.state_of(self.tensor).items()
            if key != "step"
            and isinstance(value, Tensor)
            and value.shape == self.tensor.shape
            and self.tensor.numel() >= self.length
        }

    def _view(self, tensor: Tensor) -> Tensor:
        data = to_local(tensor)
        if not data.is_contiguous():
            # It holds this shard and nothing else.
            return data
        return data.view(-1)[self.offset : self.offset + self.length]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank has a part (FSDP2)."""
    return hasattr(tensor, "to_local")


def full_shape(param: Tensor) -> torch.Size:
    """Shape of the parameter before sharding, whatever shards it."""
    shape = zero3_shape(param)
    return param.shape if shape is None else shape


def local_shard(param: Tensor) -> LocalShard:
    """The model's own copy of `param` on this rank: plain, or under DDP, ZeRO 1 to 3, FSDP2."""
    partition = zero3_partition(param)
    if partition is not None:
        return LocalShard(*partition)
    data = param.detach()
    if is_dtensor(data):
        return LocalShard(to_local(data), *_dtensor_location(data))
    return LocalShard(data, 0, *rank_and_world_size())


def locate_shards(model: Any, optimizer: Any = None) -> list[Shard]:
    """Locates every trainable parameter in what this rank's optimizer steps.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine, FSDP2.
        optimizer: the inner one, or the wrapper of it by Accelerate or DeepSpeed. None for a DeepSpeed engine, which
            has its own one.
    Returns:
        The shards in the order of `named_parameters()`. A parameter that is in no param group is left out. A tied one
        comes once.
    Raises:
        ValueError: there is no optimizer.
        RuntimeError: an engine, or a version of it, that was not tested.
    """
    optimizer = optimizer_of(model, optimizer)
    wrapper, inner = wrapper_of(optimizer), inner_optimizer(optimizer)
    locate = _plain_locator(inner) if wrapper is None else shard_locator(wrapper)

    def state_of(tensor: Tensor) -> dict[str, Any]:
        return inner.state.get(tensor, {})

    shards = []
    for name, param in unwrap(model).named_parameters():
        location = locate(param) if param.requires_grad else None
        if location is not None:
            shards.append(Shard(name, param, full_shape(param), state_of=state_of, **location._asdict()))
    return shards


def all_zero_names(shards: list[Shard]) -> list[str]:
    """Names of the parameters that are all zeros over all ranks. Collective: one small reduction."""
    nonzero = []
    for shard in shards:
        values = shard.copy.counted
        nonzero.append(values.numel() - int(count_zeros(values)))
    counts = all_reduce_sum(torch.tensor(nonzero)).tolist()
    return [shard.name for shard, count in zip(shards, counts) if not count]


# State tensors that are zero only where every gradient was; the first that a parameter has.
_MOMENTS = ("exp_avg_sq", "exp_avg", "momentum_buffer")


def without_gradient(
    shards: list[Shard], optimizer: Optimizer, stacks: Container[str] = ()
) -> dict[str, list[int] | None]:
    """The parameters that have had no gradient yet, or none but zeros, over all ranks, by the optimizer's moments.
    Collective: one reduction.

    Engines that keep gradients in flat tensors give zeros where there is none. Where an optimizer keeps no moments, or
    those of a parameter in another form (Adafactor's rows and columns), nothing is known, and it is not returned.

    Args:
        shards: of the same parameters on every rank, none of them on the disk.
        optimizer: the inner one, which steps them.
        stacks: names of the parameters whose first dimension counts experts, which are told apart.
    Returns:
        {name: the indices along the first dimension that had none; None: the whole parameter}.
    """
    has_moments = any(key in state for state in optimizer.state.values() for key in _MOMENTS)
    flags: list[Tensor] = []
    sizes: list[int] = []
    for shard in shards:
        heights = shard.shape[0] if shard.name in stacks else 1
        sizes.append(heights)
        flags.append(torch.zeros(heights, dtype=torch.int64))
        state = shard.state if shard.length else {}
        moments = next((state[key] for key in _MOMENTS if key in state), None)
        if moments is None and _keeps_others(shard, optimizer):
            flags[-1] += 1
        elif moments is not None and (shard.start is None or not moments.is_contiguous()):
            flags[-1] += int(moments.any())
        elif moments is not None:
            # One wait for the device for each parameter.
            width = max(1, shard.shape.numel() // heights)
            first, flat = shard.start or 0, moments.reshape(-1)
            indices = range(first // width, -(-(first + len(flat)) // width))
            had = [flat[max(0, i * width - first) : (i + 1) * width - first].any() for i in indices]
            flags[-1][indices.start : indices.stop] = torch.stack(had).long().cpu()
    without_sections = torch.tensor([int(not shard.has_sections) for shard in shards], dtype=torch.int64)
    sums = all_reduce_sum(torch.cat([*flags, without_sections, torch.tensor([int(has_moments)])]))
    if not sums[-1]:
        return {}
    result: dict[str, list[int] | None] = {}
    for shard, counts, ranks in zip(shards, sums[: sum(sizes)].split(sizes), sums[sum(sizes) : -1].tolist()):
        none = (counts == 0).nonzero().flatten().tolist()
        if len(none) == len(counts):
            result[shard.name] = None
        elif none and not ranks:
            result[shard.name] = none
    return result


def _keeps_others(shard: Shard, optimizer: Optimizer) -> bool:
    """Whether a parameter without moments on this rank may have had gradients: it has another state, or its group
    keeps no momentum.
    """
    return shard.length > 0 and (
        bool(shard.state_of(shard.tensor).keys() - {"step"})
        or optimizer.param_groups[shard.group].get("momentum", 1) == 0
    )


class _DTensorLocation(NamedTuple):
    """See `LocalShard`."""

    start: int | None
    replica: int
    replicas: int


def _dtensor_location(data: Any) -> _DTensorLocation:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, coordinate = data.device_mesh, data.device_mesh.get_coordinate()
    replica, replicas = 0, 1
    for i, placement in enumerate(data.placements):
        if placement.is_replicate():
            replica, replicas = replica * mesh.size(i) + coordinate[i], replicas * mesh.size(i)
    dims = [placement.dim for placement in data.placements if placement.is_shard()]
    # Rows of a matrix that are split over several ranks: the shard is no contiguous range.
    if len(dims) > 1 or dims not in ([], [0]):
        return _DTensorLocation(None, replica, replicas)
    _, offset = compute_local_shape_and_global_offset(data.shape, mesh, data.placements)
    row = data.numel() // max(1, data.shape[0]) if data.ndim else 1
    return _DTensorLocation(offset[0] * row if data.ndim else 0, replica, replicas)


def _plain_locator(optimizer: Optimizer) -> Locator:
    """Plain, DDP, FSDP2, ZeRO-0 in fp32: the optimizer steps the parameters themselves."""
    groups = {id(param): i for i, group in enumerate(optimizer.param_groups) for param in group["params"]}

    def locate(param: Tensor) -> ShardLocation | None:
        if id(param) not in groups:
            return None
        if is_dtensor(param):
            start, replica, replicas = _dtensor_location(param)
            length = to_local(param.detach()).numel()
        else:
            start, length, (replica, replicas) = 0, param.numel(), rank_and_world_size()
        return ShardLocation(start, param, 0, length, groups[id(param)], replica, replicas)

    return locate
