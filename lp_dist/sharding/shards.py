"""Which part of a parameter lies on this rank, and where in the tensors that its optimizer steps. Nothing is gathered.

Plain tensors and DTensors are located here. `deepspeed.py` gives the locator for DeepSpeed's optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.errors import UsageError, first_line
from lp_dist.optim.batching import count_zeros, local_values
from lp_dist.optim.parameter_map import ParamSection
from lp_dist.optim.region import Region
from lp_dist.sharding.collectives import all_reduce_sum, is_simulated, rank_and_world_size
from lp_dist.sharding.deepspeed import copy_of_model, read_from_nvme, shape_before, shard_locator, zero3_partition
from lp_dist.sharding.deepspeed_slices import in_parameter
from lp_dist.sharding.engines import inner_optimizer, optimizer_of, unwrap, wrapper_of
from lp_dist.sharding.location import Locator, ShardLocation
from lp_dist.sharding.replicas import HeldRange, Replica, check_coverage, check_replicas, count_replicas


@dataclass(frozen=True)
class LocalShard:
    """The values of a parameter on this rank, without padding.

    Args:
        values: a view; flat where the shard is contiguous.
        start: the first element of the shard in `region`, taken flat.
        replica: the number of this copy among the ranks that hold the same shard; None: not known yet.
        replicas: how many ranks hold the same shard.
        region: of the parameter, of which the shard is a contiguous range; None: the parameter itself.
    """

    values: Tensor
    start: int
    replica: int | None = 0
    replicas: int = 1
    region: Region | None = None

    @property
    def counted(self) -> Tensor:
        """The values that this rank counts, so that all ranks together count each value once.

        Ranks that hold the same shard take an equal part each. A shard that is not contiguous is counted by the first
        of them alone.
        """
        numel = self.values.numel()
        assert self.replica is not None, "with_replicas() was not called"
        if not self.values.is_contiguous():
            return self.values if self.replica == 0 else self.values.new_empty(0)
        return self.values.view(-1)[
            numel * self.replica // self.replicas : numel * (self.replica + 1) // self.replicas
        ]

    @property
    def counted_start(self) -> int:
        """The first element of `counted` in `region`, taken flat."""
        assert self.replica is not None, "with_replicas() was not called"
        if not self.values.is_contiguous():
            return self.start
        return self.start + self.values.numel() * self.replica // self.replicas


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
        region: see `ShardLocation`.
        section: of which the shard is, where it is not of all of the parameter.
        copy_replica: which copy the model's own one is, where it is not `tensor`; None: as `local_shard` says.
    """

    name: str
    param: Tensor
    shape: torch.Size
    start: int
    tensor: Tensor
    offset: int
    length: int
    group: int
    state_of: Callable[[Tensor], dict[str, Any]]
    replica: int | None = 0
    replicas: int = 1
    region: Region | None = None
    section: ParamSection | None = None
    copy_replica: Replica | None = None

    @property
    def grid(self) -> Region:
        """`region`, also where it is the parameter itself."""
        return Region.full(self.shape) if self.region is None else self.region

    @property
    def param_name(self) -> str:
        """As of `named_parameters()`, also of a section."""
        return self.name if self.section is None else self.section.param_name

    @property
    def copy(self) -> LocalShard:
        """The model's own copy of the values, which a save of the model writes."""
        local = local_shard(self.param)
        if self.tensor is self.param:
            local = replace(local, replica=self.replica, replicas=self.replicas)
        elif self.copy_replica is not None:
            local = replace(local, replica=self.copy_replica.number, replicas=self.copy_replica.total)
        if self.section is None:
            return local
        overlap = self.section.overlap(local.start, local.values.numel(), local.region)
        return replace(
            local,
            values=local.values.view(-1)[overlap.first : overlap.last],
            start=overlap.start,
            region=overlap.region,
        )

    @property
    def has_sections(self) -> bool:
        """Whether `section_of` can be taken on this rank: nothing is on the disk, and all lies row by row."""
        return (
            not self.is_on_disk
            and local_values(self.tensor).is_contiguous()
            and local_shard(self.param).values.is_contiguous()
        )

    def section_of(self, start: int, stop: int) -> Shard:
        """The indices from `start` to `stop` along the parameter's first dimension, as a shard of its own. It is empty
        where another rank has them.
        """
        assert self.section is None
        section = ParamSection(self.name, start, stop, self.shape)
        overlap = section.overlap(self.start, self.length, self.region)
        return replace(
            self,
            name=section.name,
            shape=section.section_shape,
            start=overlap.start,
            offset=self.offset + overlap.first,
            length=overlap.last - overlap.first,
            region=overlap.region,
            section=section,
        )

    @property
    def is_on_disk(self) -> bool:
        """Whether NVMe offload has swapped it out."""
        return not is_dtensor(self.tensor) and self.length > self.tensor.numel()

    @property
    def local(self) -> LocalShard:
        """The master values: a view to read and write. Under NVMe offload it is a copy that was read from the disk."""
        on_disk = self.is_on_disk
        values = read_from_nvme(self.param)[: self.length].clone() if on_disk else self._view(self.tensor)
        return LocalShard(values, self.start, self.replica, self.replicas, self.region)

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
        data = local_values(tensor)
        if not data.is_contiguous():
            # It holds this shard and nothing else.
            return data
        return data.view(-1)[self.offset : self.offset + self.length]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank has a part (FSDP2)."""
    return hasattr(tensor, "to_local")


def full_shape(param: Tensor) -> torch.Size:
    """Shape of the parameter before sharding, whatever shards it."""
    return shape_before(param)


def local_shard(param: Tensor) -> LocalShard:
    """The model's own copy of `param` on this rank: plain, or under DDP, ZeRO 1 to 3, FSDP2, tensor parallelism. Which
    of several copies of a DTensor it is may not be known without an exchange (`locate_copies`).
    """
    partition = zero3_partition(param)
    if partition is not None:
        return LocalShard(*partition)
    if is_dtensor(param):
        location = _dtensor_location(param)
        return LocalShard(local_values(param), location.start, location.replica, location.replicas, location.region)
    (start, region), (replica, replicas) = in_parameter(param, 0), copy_of_model(param)
    return LocalShard(param.detach(), start, replica, replicas, region)


def locate_copies(params: dict[str, Tensor]) -> dict[str, LocalShard]:
    """The model's own copies of parameters on this rank. Collective where a device mesh has not all ranks.

    Args:
        params: by name; the same names in the same order on every rank.
    """
    locals_ = {name: local_shard(param) for name, param in params.items()}
    replicas = count_replicas(
        {
            name: _held(local.region, params[name], local.start, local.values.numel())
            for name, local in locals_.items()
            if local.replica is None
        }
    )
    return {
        name: replace(local, replica=replicas[name].number, replicas=replicas[name].total)
        if name in replicas
        else local
        for name, local in locals_.items()
    }


def find_shards(model: Any, optimizer: Any = None) -> list[Shard]:
    """As `locate_shards`, without an exchange: where other ranks may hold the same, `replica` is None."""
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


def with_replicas(shards: list[Shard]) -> list[Shard]:
    """The shards, with what `find_shards` left open. Collective where it did so: two small exchanges.

    Args:
        shards: of the same parameters in the same order on every rank.
    Raises:
        UsageError: the ranks have different parameters.
    """
    copies = {shard.name: local_shard(shard.param) for shard in shards if shard.tensor is not shard.param}
    unknown = {shard.name: held_range(shard) for shard in shards if shard.replica is None}
    unknown_copies = {
        f"{shard.name} of the model": _held(copy.region, shard.param, copy.start, copy.values.numel())
        for shard in shards
        if (copy := copies.get(shard.name)) is not None and copy.replica is None
    }
    if not unknown and not unknown_copies:
        return shards
    replicas = count_replicas({**unknown, **unknown_copies})
    result = []
    for shard in shards:
        replica = replicas.get(shard.name)
        if replica is not None:
            shard = replace(shard, replica=replica.number, replicas=replica.total)
        result.append(replace(shard, copy_replica=replicas.get(f"{shard.name} of the model")))
    return result


def check_shards(shards: list[Shard]) -> None:
    """Checks that all ranks together hold each parameter once, but for copies. Collective: one small reduction.

    Raises:
        UsageError: names the parameter, and what each rank holds of it.
    """
    check_coverage(
        {shard.name: held_range(shard) for shard in shards},
        {shard.name: Replica(shard.replica or 0, shard.replicas) for shard in shards},
    )


def check_equal_replicas(shards: list[Shard]) -> None:
    """Checks that ranks which hold the same shard hold the same values. Collective: one small reduction.

    Raises:
        UsageError: names the parameter, and what each rank holds of it.
    """
    copied = [shard for shard in shards if shard.replicas > 1 and not shard.is_on_disk]
    sums = [_checksum(shard.local.values) for shard in copied]
    # One wait for the device.
    numbers = torch.stack([number.to(sums[0].device) for number in sums]).tolist() if sums else []
    check_replicas(
        dict(zip((shard.name for shard in copied), numbers)),
        {shard.name: Replica(shard.replica or 0, shard.replicas) for shard in copied},
        {shard.name: held_range(shard) for shard in copied},
    )


def _checksum(values: Tensor) -> Tensor:
    """An integer that follows from the bits of some values, and not from their order."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.view(bits).sum(dtype=torch.int64)


def held_range(shard: Shard) -> HeldRange:
    """Which elements of its parameter a shard is."""
    return _held(shard.grid, shard.param, shard.start, shard.length)


def _held(region: Region | None, param: Any, start: int, length: int) -> HeldRange:
    axes = "a plain tensor"
    if is_dtensor(param):
        names = param.device_mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(param.device_mesh.ndim))
        axes = ", ".join(f"{name}: {placement}" for name, placement in zip(names, param.placements))
    return HeldRange(region or Region.full(full_shape(param)), start, length, axes)


def locate_shards(model: Any, optimizer: Any = None) -> list[Shard]:
    """Locates every trainable parameter in what this rank's optimizer steps. Collective where a device mesh does not
    have all ranks.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine, FSDP2, tensor parallelism.
        optimizer: the inner one, or the wrapper of it by Accelerate or DeepSpeed. None for a DeepSpeed engine, which
            has its own one.
    Returns:
        The shards in the order of `named_parameters()`. A parameter that is in no param group is left out. A tied one
        comes once.
    Raises:
        ValueError: there is no optimizer.
        RuntimeError: an engine that was not tested.
    """
    return with_replicas(find_shards(model, optimizer))


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
        elif moments is not None and (heights == 1 or not moments.is_contiguous()):
            flags[-1] += int(moments.any())
        elif moments is not None:
            # One wait for the device for each parameter.
            width = max(1, shard.grid.sizes.numel() // max(1, shard.grid.sizes[0]))
            first, flat = shard.start, moments.reshape(-1)
            indices = range(first // width, -(-(first + len(flat)) // width))
            had = [flat[max(0, i * width - first) : (i + 1) * width - first].any() for i in indices]
            flags[-1][shard.grid.indices(0)[indices.start : indices.stop]] = torch.stack(had).long().cpu()
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

    start: int
    replica: int | None
    replicas: int
    region: Region | None


def _dtensor_location(data: Any) -> _DTensorLocation:
    mesh = data.device_mesh
    coordinate, sizes = tuple(mesh.get_coordinate()), tuple(mesh.shape)
    replica, replicas = 0, 1
    for i, placement in enumerate(data.placements):
        if placement.is_replicate():
            replica, replicas = replica * sizes[i] + coordinate[i], replicas * sizes[i]
        elif not hasattr(placement, "dim"):
            raise UsageError(f"a parameter has the placement {placement}, which is none of weights at rest")
    region = _region(data.shape, tuple(data.placements), sizes, coordinate)
    # Simulated ranks may have less, for a test that is quick.
    if region.sizes != local_values(data).shape and not is_simulated():
        raise UsageError(
            f"a DTensor of shape {tuple(data.shape)} with the placements {data.placements} has"
            f" {tuple(local_values(data).shape)} on this rank, and by its placements it would have"
            f" {tuple(region.sizes)}: this way of sharding is not supported"
        )
    start = region.contiguous_start()
    if mesh.size() != rank_and_world_size()[1]:
        # Ranks that are not in this mesh may hold the same.
        return _DTensorLocation(start or 0, None, 1, region if start is None else None)
    return _DTensorLocation(start or 0, replica, replicas, region if start is None else None)


@lru_cache(maxsize=1024)
def _region(
    shape: torch.Size, placements: tuple[Any, ...], sizes: tuple[int, ...], coordinate: tuple[int, ...]
) -> Region:
    """What a rank has of a DTensor. Kept, since the layers of a model are alike, and it takes a step for each rank.

    Args:
        shape: of the DTensor.
        placements: of it.
        sizes: of its mesh, along each axis.
        coordinate: of the rank in the mesh.
    Raises:
        UsageError: the installed torch can't divide these sizes.
    """
    indices = [torch.arange(size) for size in shape]
    for placement, size, position in zip(placements, sizes, coordinate):
        if not placement.is_replicate():
            # Also of placements that take several strips (fused matrices under tensor parallelism).
            dim = placement.dim
            along = indices[dim].view([-1 if other == dim else 1 for other in range(len(shape))])
            try:
                along = placement._split_tensor(along, size, with_padding=False)[0][position]
            except AssertionError as error:
                # torch 2.7 can't say where uneven shards of FSDP2 lie beside tensor parallelism.
                raise UsageError(
                    f"torch {torch.__version__} can't cut a DTensor of shape {tuple(shape)} with the placements"
                    f" {placements} ({first_line(error)}); take a newer torch (2.13 does), or sizes that divide"
                ) from None
            indices[dim] = along.flatten()
    return Region.of_indices(shape, indices)


def _plain_locator(optimizer: Optimizer) -> Locator:
    """Plain, DDP, FSDP2, ZeRO-0 in fp32: the optimizer steps the parameters themselves."""
    groups = {id(param): i for i, group in enumerate(optimizer.param_groups) for param in group["params"]}

    def locate(param: Tensor) -> ShardLocation | None:
        if id(param) not in groups:
            return None
        if is_dtensor(param):
            location = _dtensor_location(param)
            return ShardLocation(
                tensor=param,
                offset=0,
                length=local_values(param).numel(),
                group=groups[id(param)],
                **location._asdict(),
            )
        (start, region), (replica, replicas) = in_parameter(param, 0), copy_of_model(param)
        return ShardLocation(start, param, 0, param.numel(), groups[id(param)], replica, replicas, region)

    return locate
