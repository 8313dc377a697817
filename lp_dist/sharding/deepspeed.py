"""DeepSpeed: where its optimizers keep the shards, what it does to an optimizer, and how it must be set up.

Its private attributes are touched here alone. In a version with which they were not tested, what they say is checked
before it is used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lp_dist.errors import UsageError, first_line
from lp_dist.optim.region import Region
from lp_dist.sharding.collectives import all_gather_objects, rank_and_world_size
from lp_dist.sharding.deepspeed_slices import in_parameter, model_region
from lp_dist.sharding.engines import inner_optimizer, is_deepspeed, wrapper_of
from lp_dist.sharding.location import Locator, ShardLocation

logger = logging.getLogger(__name__)

# The series whose private attributes were tested; pyproject.toml allows the same.
TESTED_DEEPSPEED = ("0.19",)
_TESTED = " and ".join(f"{series}.x" for series in TESTED_DEEPSPEED)
_WAY_OUT = f"install 'deepspeed=={TESTED_DEEPSPEED[-1]}.*', or a newer lp_dist"

_ROUND_ROBIN = (
    '"round_robin_gradients": true makes DeepSpeed lose track of which parameter lies where, so another one'
    " than the named would decay; remove it from zero_optimization"
)


def is_tested_deepspeed() -> bool:
    """Whether the installed DeepSpeed is of a series with which its private attributes were tested."""
    return ".".join(_version().split(".")[:2]) in TESTED_DEEPSPEED


def check_deepspeed_version() -> None:
    """Warns once of a DeepSpeed that was not tested: its private attributes may differ."""
    if not is_tested_deepspeed():
        _warn_of_untested(_version())


@functools.cache
def _warn_of_untested(version: str) -> None:
    logger.warning(
        "deepspeed %s was not tested with this lp_dist, only %s. So it is checked where each parameter lies: its range"
        " against its shape, the elements of all ranks against its own, and the fp32 masters against the model's"
        " weights. If something else looks wrong, %s",
        version,
        _TESTED,
        _WAY_OUT,
    )


def unknown_layout(what: str) -> UsageError:
    """The error for shards that lie in another way than in the versions that were tested.

    Args:
        what: what DeepSpeed does, after its name and version.
    """
    return UsageError(
        f"deepspeed {_version()} {what}: its shards lie in another way than lp_dist knows. It was tested with"
        f" {_TESTED}; {_WAY_OUT}"
    )


def _version() -> str:
    return importlib.metadata.version("deepspeed")


@contextmanager
def _private_attributes() -> Iterator[None]:
    """Around code that reads DeepSpeed's private attributes: a version that lacks one ends in one clear error."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise unknown_layout(f"lacks what lp_dist reads of it ({first_line(error)})") from error


def foreign_steppers(optimizer: Any) -> list[str]:
    """Names of the DeepSpeed features around `optimizer` that would step weights by an optimizer of their own."""
    wrapper = wrapper_of(optimizer)
    steppers = [] if wrapper is None or type(wrapper).__name__ in LOCATORS else [type(wrapper).__name__]
    if hasattr(wrapper, "backup_optimizer"):
        steppers.append("offload_optimizer.ratio < 1")
    if getattr(wrapper, "zenflow", False):
        steppers.append("zenflow")
    return steppers


@_private_attributes()
def undo_dry_step(optimizer: Any) -> None:
    """Undoes the step with zero gradients by which DeepSpeed's 16-bit ZeRO-0 allocates the optimizer's state.

    That step decays the fp32 masters, while the model's own copy keeps the weights from before it. The step is
    recognised by a step count of 1 and moments that are all zero. Anything else is left alone.
    """
    wrapper, inner = wrapper_of(optimizer), inner_optimizer(optimizer)
    if type(wrapper).__name__ != "FP16_UnfusedOptimizer":
        return
    pairs = [
        pair for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups) for pair in zip(params, masters)
    ]
    for _, master in pairs:
        for key, value in inner.state.get(master, {}).items():
            if (int(value) != 1) if key == "step" else isinstance(value, Tensor) and bool(value.any()):
                return
    for param, master in pairs:
        master.data.copy_(param.detach())
        inner.state.pop(master, None)


@_private_attributes()
def update_copies(optimizer: Any) -> None:
    """Writes the fp32 masters into the copies of the weights that DeepSpeed computes with, as it does after a step.

    Collective under ZeRO. Does nothing where no DeepSpeed optimizer wraps `optimizer`.
    """
    wrapper = wrapper_of(optimizer)
    # ZeRO 1 and 2, BF16_Optimizer
    if hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif type(wrapper).__name__ == "FP16_UnfusedOptimizer":
        for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups):
            for param, master in zip(params, masters):
                param.data.copy_(master.data)
    # ZeRO-3
    elif wrapper is not None:
        for i in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(i)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()


@dataclass(eq=False)
class _SaveCheckpoint:
    """An engine's `save_checkpoint` that adds our state to the client state, where there is any, and names a
    checkpoint in `latest` when it is complete.
    """

    engine: Any
    original: Callable[..., Any]
    state: Callable[[], Any]

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.original, updated=())

    def __call__(
        self,
        save_dir: Any,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        state = self.state()
        client_state = {**(client_state or {}), **({} if state is None else {"lp_dist": state})}
        # A decoupled engine writes in the background, and names the checkpoint when it has written it.
        if not save_latest or self.engine.checkpoint_engine.is_decoupled():
            return self.original(save_dir, tag, client_state, save_latest, *args, **kwargs)
        # DeepSpeed's rank 0 names a checkpoint in `latest` while other ranks may still write their files. If they are
        # killed meanwhile, the run has nothing to go on from. The original ends in a barrier.
        tag = f"global_step{self.engine.global_steps}" if tag is None else str(tag)
        saved = self.original(save_dir, tag, client_state, False, *args, **kwargs)
        if rank_and_world_size()[0] == 0:
            latest = Path(save_dir) / "latest"
            partial = latest.with_name("latest.partial")
            partial.write_text(tag)
            partial.replace(latest)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return saved


@dataclass(eq=False)
class _LoadCheckpoint:
    """An engine's `load_checkpoint` that checks the pickles before, and restores our state afterwards.

    It has one more keyword, `trust_pickles`: let the checkpoint run the code that it names.
    """

    original: Callable[..., Any]
    restore: Callable[[Any], None]

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, trust_pickles: bool = False, **kwargs: Any) -> Any:
        arguments = {**dict(zip(_LOAD_ARGUMENTS, args)), **kwargs}
        if not trust_pickles and arguments.get("load_dir") is not None:
            # Imported late: the optimizers need neither NumPy nor files.
            from lp_dist.checkpoints.resuming import check_engine

            directory, tag = arguments["load_dir"], arguments.get("tag")
            check_in_shares(lambda share: check_engine(directory, tag, share=share))
        path, client_state = self.original(*args, **kwargs)
        # DeepSpeed returns the client state even if only the weights were requested.
        weights_only = arguments.get("load_module_only", False) or not arguments.get("load_optimizer_states", True)
        self.restore(None if weights_only else (client_state or {}).get("lp_dist"))
        return path, client_state


def check_in_shares(check: Callable[[tuple[int, int]], None]) -> None:
    """Checks files before all ranks load them: the ranks of a node, which see the same ones, divide them. Collective.

    Args:
        check: checks a share of the files, given as (index, count).
    Raises:
        UsageError: on all ranks, what one of them has raised.
    """
    nodes = all_gather_objects((platform.node(), uuid.getnode()))
    rank, _ = rank_and_world_size()
    peers = [peer for peer, node in enumerate(nodes) if node == nodes[rank]]
    message = None
    try:
        check((peers.index(rank), len(peers)))
    except UsageError as error:
        message = str(error)
    first = next(filter(None, all_gather_objects(message)), None)
    if first is not None:
        raise UsageError(first)


# The positional arguments of an engine's `load_checkpoint`.
_LOAD_ARGUMENTS = (
    "load_dir",
    "tag",
    "load_module_strict",
    "load_optimizer_states",
    "load_lr_scheduler_states",
    "load_module_only",
)


def in_checkpoints(engine: Any, state: Callable[[], Any], restore: Callable[[Any], None]) -> None:
    """Makes a DeepSpeed engine save our state in the client state of its checkpoints, and restore it from there.

    Restoring matters even without a state, since DeepSpeed's loaders write into the param groups. The one of universal
    checkpoints copies the values of group 0 into all groups at stage 3. Does nothing for other models. A second call
    replaces the first.

    Args:
        engine: the wrapped model.
        state: called at each save; None saves nothing.
        restore: called after each load with the state of the checkpoint. It gets None if there is none, or if only the
            weights were loaded.
    """
    if not is_deepspeed(engine) or not hasattr(engine, "load_checkpoint"):
        return
    load, save = engine.load_checkpoint, engine.save_checkpoint
    engine.load_checkpoint = _LoadCheckpoint(load.original if isinstance(load, _LoadCheckpoint) else load, restore)
    engine.save_checkpoint = _SaveCheckpoint(
        engine, save.original if isinstance(save, _SaveCheckpoint) else save, state
    )


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Refuses a DeepSpeed config that steps weights by another optimizer, or saves no usable weights.

    Args:
        config: the DeepSpeed config, as read from its JSON file.
    Raises:
        UsageError: names the key of the config, and what to set it to.
    """
    zero = _section(config, "zero_optimization")
    offload = _section(zero, "offload_optimizer")
    if "optimizer" in config:
        raise UsageError(
            'the DeepSpeed config has an "optimizer" section, which would take the place of ours; remove it'
        )
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise UsageError(
            "with offload_optimizer, Accelerate silently replaces our optimizer by DeepSpeedCPUAdam; set "
            '"zero_force_ds_cpu_optimizer": false at the top level of the DeepSpeed config'
        )
    if offload.get("ratio", 1.0) != 1.0:
        raise UsageError(
            f"offload_optimizer.ratio={offload['ratio']} lets another optimizer step a part of the weights, without Lp"
            " decay; set it to 1.0"
        )
    for key, section in (("zenflow", zero), ("super_offload", offload)):
        if section.get(key):
            raise UsageError(f'"{key}" steps the weights by an optimizer of its own, without Lp decay; remove it')
    if zero.get("round_robin_gradients"):
        raise UsageError(_ROUND_ROBIN)
    has_slices = _section(config, "tensor_parallel").get("autotp_size", 0) > 1
    if (zero.get("stage") == 3 or has_slices) and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UsageError(
            f"under {'AutoTP' if has_slices else 'ZeRO-3'} a checkpoint without"
            ' "stage3_gather_16bit_weights_on_model_save": true has no usable weights; set it in zero_optimization'
        )
    if _section(config, "expert_parallel").get("enabled"):
        raise UsageError(
            '"expert_parallel" (AutoEP): what Trainer saves has the experts of one rank alone; train in a loop of your'
            " own with lp_dist.attach(engine) and engine.save_checkpoint, or remove it"
        )


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise UsageError(
            f'the DeepSpeed config has a {type(section).__name__} for "{key}", which is a section of keys and values;'
            " write it as one, or remove it"
        )
    return section


def join_deepspeed() -> None:
    """Makes DeepSpeed's communicator use the process group that torch has initialised already.

    Without this, ZeRO-3's `zero.Init` assumes a single process when Trainer runs with use_cpu, and refuses the batch
    size.
    """
    import deepspeed

    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


@contextmanager
def zero_init_disabled() -> Iterator[None]:
    """Within it Transformers loads a model without partitioning it, even if a ZeRO-3 config is active."""
    from transformers.integrations import deepspeed as integration

    config = integration.deepspeed_config() if integration.is_deepspeed_zero3_enabled() else None
    if config is None:
        yield
        return
    reference: Any = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(reference())


def zero3_shape(param: Any) -> torch.Size | None:
    """Shape of a parameter before ZeRO-3 partitioned it, after which its own shape is (0,). None if ZeRO-3 did not."""
    return getattr(param, "ds_shape", None)


def shape_before(param: Any) -> torch.Size:
    """Shape of a parameter before anything of DeepSpeed divided it."""
    region = model_region(param)
    if region is not None:
        return region.shape
    shape = zero3_shape(param)
    return param.shape if shape is None else shape


class Zero3Partition(NamedTuple):
    """This rank's part of the model's own copy under ZeRO-3.

    Args:
        values: a flat view without padding.
        start: see `ShardLocation`.
        replica: see `ShardLocation`.
        replicas: see `ShardLocation`.
        region: see `ShardLocation`.
    """

    values: Tensor
    start: int
    replica: int
    replicas: int
    region: Region | None


@_private_attributes()
def zero3_partition(param: Any) -> Zero3Partition | None:
    """This rank's part of the model's own copy; None if ZeRO-3 has not partitioned the parameter."""
    if not hasattr(param, "ds_tensor"):
        return None
    values = param.ds_tensor.detach().view(-1)
    start = param.ds_tensor.ds_numel * torch.distributed.get_rank(param.ds_process_group)
    # The parts of the last ranks end in padding, up to a multiple of the world size.
    values = values[: max(0, min(values.numel(), param.ds_numel - start))]
    start, region = in_parameter(param, start)
    return Zero3Partition(values, start, *_replica(param, param.ds_process_group), region)


def _replica(param: Tensor, group: Any) -> tuple[int, int]:
    """The number of this copy of a partition, and of how many, as of `ShardLocation`.

    Args:
        param: of the model.
        group: the ranks over which ZeRO partitioned it.
    """
    # The ranks of a tensor-parallel group partition what each has of the model. Where their slices are uneven, they
    # divide the parameters that all of them have at different places.
    is_counted = model_region(param) is not None or 0 in torch.distributed.get_process_group_ranks(group)
    return (0, 1) if is_counted else (1, 1)


def copy_of_model(param: Tensor) -> tuple[int | None, int]:
    """Which copy of a plain parameter this rank's is, and of how many, as of `ShardLocation`.

    All ranks have the same, unless DeepSpeed's tensor or expert parallelism gave each a region.
    """
    return rank_and_world_size() if model_region(param) is None else (None, 1)


@_private_attributes()
def read_from_nvme(param: Tensor) -> Tensor:
    """The fp32 masters of a parameter on this rank, flat and with padding, which NVMe offload has swapped out."""
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(param)


def shard_locator(wrapper: Any) -> Locator:
    """Gives the function that locates a parameter in what a DeepSpeed optimizer steps on this rank.

    Args:
        wrapper: DeepSpeed's optimizer.
    Raises:
        RuntimeError: a class of optimizer that was not tested.
        UsageError: this version of DeepSpeed keeps its shards in another way.
    """
    name = type(wrapper).__name__
    if name not in LOCATORS:
        raise RuntimeError(
            f"lp_dist does not know the shards of DeepSpeed's {name}, only those of ZeRO 0 to 3 and BF16_Optimizer;"
            " remove what asks for it from the DeepSpeed config"
        )
    check_deepspeed_version()
    with _private_attributes():
        locate = LOCATORS[name](wrapper)

    def locate_checked(param: Tensor) -> ShardLocation | None:
        with _private_attributes():
            location = locate(param)
        if location is not None:
            _check_range(param, location)
        return location

    return locate_checked


def _check_range(param: Tensor, location: ShardLocation) -> None:
    """Raises UsageError for a shard that ends outside of its parameter, or of the tensor that is stepped."""
    numel = (shape_before(param) if location.region is None else location.region.sizes).numel()
    start, offset, length, held = location.start, location.offset, location.length, location.tensor.numel()
    # Less than a shard is held where NVMe offload has swapped it out.
    fits = offset + length <= held or held < length
    if length and (min(start, offset, length) < 0 or start + length > numel or not fits):
        raise unknown_layout(
            f"has elements {start} to {start + length} of a parameter of {numel} at {offset} in a tensor of {held}"
        )


def _locate_copy(wrapper: Any) -> Locator:
    """ZeRO-0 in 16 bits: every rank has an fp32 copy of each parameter."""
    copies = {
        id(param): (i, master)
        for i, (params, masters) in enumerate(zip(wrapper.fp16_groups, wrapper.fp32_groups))
        for param, master in zip(params, masters)
    }

    def locate(param: Tensor) -> ShardLocation | None:
        if id(param) not in copies:
            return None
        group, master = copies[id(param)]
        replica, replicas = copy_of_model(param)
        start, region = in_parameter(param, 0)
        return ShardLocation(start, master, 0, master.numel(), group, replica, replicas, region)

    return locate


def _locate_fragment(wrapper: Any) -> Locator:
    """ZeRO-1, 2 and BF16_Optimizer: one flat fp32 shard per group.

    `_hp_mapping` on each parameter tells which of its elements lie in it.
    """
    bf16 = type(wrapper).__name__ == "BF16_Optimizer"
    if getattr(wrapper, "round_robin_gradients", False):
        # DeepSpeed 0.19.8 lays the parameters out in another order than the one in which it writes down where they
        # are. Its universal checkpoints and safe_get_full_fp32_param return other parameters' values as well.
        raise RuntimeError(_ROUND_ROBIN)
    flats = wrapper.fp32_groups_flat_partition if bf16 else wrapper.single_partition_of_fp32_groups
    groups = {
        id(param): i
        for i, params in enumerate(wrapper.bf16_groups if bf16 else wrapper.bit16_groups)
        for param in params
    }

    def locate(param: Any) -> ShardLocation | None:
        if id(param) not in groups:
            return None
        group, mapping = groups[id(param)], param._hp_mapping
        replica, replicas = _replica(param, wrapper.real_dp_process_group[group])
        start, region = in_parameter(param, 0 if mapping is None else mapping.lp_fragment_address.start)
        return ShardLocation(
            start=start,
            tensor=flats[group],
            offset=0 if mapping is None else mapping.hp_fragment_address.start,
            length=0 if mapping is None else mapping.hp_fragment_address.numel,
            group=group,
            replica=replica,
            replicas=replicas,
            region=region,
        )

    return locate


def _locate_sub_group(wrapper: Any) -> Locator:
    """ZeRO-3: a flat fp32 shard per sub-group.

    Every parameter has an equal part in it on every rank, the last one padded.
    """

    def locate(param: Any) -> ShardLocation | None:
        position = wrapper.grad_position.get(wrapper.get_param_id(param))
        if position is None:
            return None
        sub_group, offset, padded_length = position
        first = padded_length * torch.distributed.get_rank(param.ds_process_group)
        start, region = in_parameter(param, first)
        replica, replicas = _replica(param, param.ds_process_group)
        return ShardLocation(
            start=start,
            tensor=wrapper.fp32_partitioned_groups_flat[sub_group],
            offset=offset,
            length=max(0, min(padded_length, param.ds_numel - first)),
            group=wrapper.sub_group_to_group_id[sub_group],
            replica=replica,
            replicas=replicas,
            region=region,
        )

    return locate


# By the class of DeepSpeed's optimizer, of those around lp_dist's that were tested. Exactly these: a subclass may step
# by another optimizer.
LOCATORS: dict[str, Callable[[Any], Locator]] = {
    "FP16_UnfusedOptimizer": _locate_copy,
    "DeepSpeedZeroOptimizer": _locate_fragment,
    "BF16_Optimizer": _locate_fragment,
    "DeepSpeedZeroOptimizer_Stage3": _locate_sub_group,
}
