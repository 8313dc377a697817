"""The last step of `attach`: what was planned, and agreed on, is done."""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lp_dist.attachment.attachment import Attachment
from lp_dist.attachment.plan import Plan
from lp_dist.attachment.restoring import restore_rates, restore_values, warn_of_other_rates
from lp_dist.attachment.watch import Watch
from lp_dist.optim import nm
from lp_dist.optim.base import LpOptimizer
from lp_dist.optim.nm import SplitBlocks
from lp_dist.optim.parameter_map import ParameterMap, ParamSlice
from lp_dist.optim.state import steps_taken, warn_of_free_zeros
from lp_dist.reconstruction.survivors import Reconstruction, is_most
from lp_dist.sharding.collectives import all_gather_objects, all_reduce_max
from lp_dist.sharding.deepspeed import in_checkpoints, undo_dry_step, wrapper_of
from lp_dist.sharding.engines import inner_scheduler
from lp_dist.sharding.shards import Shard, all_zero_names, full_shape
from lp_dist.sparsity.census import census
from lp_dist.sparsity.selection import expert_stacks
from lp_dist.structured.group_decay import DecaySettings, GroupDecayHook
from lp_dist.targets.controller import RunContext
from lp_dist.targets.group_controller import GroupController
from lp_dist.targets.lr_lookahead import LearningRates
from lp_dist.targets.run_steps import RunSteps
from lp_dist.targets.target import GroupTarget, SparsityTarget
from lp_dist.targets.weight_controller import WeightController

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadGuard:
    """Puts back what a checkpoint loader has overwritten.

    Args:
        plan: what was requested.
        engine: the model as it was handed to `attach`, for its own scheduler.
    """

    plan: Plan
    engine: Any

    def after_state_load(self, *_: Any) -> None:
        """A hook of the optimizer's `load_state_dict`."""
        restore_values(self.plan.optimizer, self.plan.requested, self.plan.scheduled)

    def after_engine_load(self, lr_scheduler: Any = None) -> None:
        """An engine may load the state past `load_state_dict`, and learning rates too."""
        self.after_state_load()
        optimizer = self.plan.optimizer
        if isinstance(optimizer, LpOptimizer):
            for shard in self.plan.shards:
                optimizer.check_state(optimizer.state.get(shard.tensor, {}), optimizer.param_groups[shard.group])
        # While an engine loads, only its own scheduler is sure to have been loaded with it.
        scheduler = inner_scheduler(lr_scheduler or getattr(self.engine, "lr_scheduler", None))
        restore_rates(optimizer, self.plan.requested, scheduler)
        warn_of_other_rates(optimizer, self.plan.requested, scheduler)


def apply_plan(model: Any, plan: Plan) -> Attachment:
    """Does what was planned. Collective.

    Args:
        model: as it was handed to `attach`.
        plan: the same on every rank.
    Raises:
        ValueError: a matrix that is to decay is all zeros, or a target can't be reached.
    """
    undo_dry_step(plan.engine_optimizer)
    attached_state = plan.attachable.attached
    parameter_map = _parameter_map(plan.shards, plan.blocks.input_dims)
    for name, values in plan.overrides.items():
        parameter_map.set(name, **values)
    if plan.weight_target is None and not steps_taken(plan.optimizer):
        _refuse_all_zero([s for s in plan.shards if plan.decays_by_hand(s) and plan.values_of(s)["p"] < 2])
    attached_state.parameter_map = parameter_map
    _warn_of_free_zeros(plan)
    attached_state.hooks.remove()
    steps = RunSteps(plan.optimizer, plan.first_step)
    guard = LoadGuard(plan, model)
    attached_state.hooks.after_load = plan.optimizer.register_load_state_dict_post_hook(guard.after_state_load)
    if wrapper_of(plan.engine_optimizer) is not None:
        guard.after_engine_load(plan.lr_scheduler)
    else:
        guard.after_state_load()
        warn_of_other_rates(plan.optimizer, plan.requested, inner_scheduler(plan.lr_scheduler))
    run = RunContext(
        plan.optimizer,
        plan.engine_optimizer,
        LearningRates(
            plan.lr_scheduler or getattr(model, "lr_scheduler", None),
            plan.optimizer,
            # By Trainer, or by the engine itself.
            plan.is_stepped_each_step or plan.lr_scheduler is None,
        ),
        plan.total_steps or 0,
        sum(full_shape(param).numel() for param in plan.model.parameters()),
        steps,
    )
    try:
        group_decay, group_controller = _make_groups(plan, run)
        attached_state.hooks.group_decay = group_decay
        weight_controller = _make_weights(plan, run, parameter_map, group_controller)
        controllers = [controller for controller in (group_controller, weight_controller) if controller is not None]
        watch = attached_state.hooks.watch = Watch(plan, steps, controllers)
        if not steps.is_unsure:
            watch.begin()
    except Exception:
        attached_state.hooks.remove()
        attached_state.parameter_map = ParameterMap()
        raise
    candidates = frozenset(shard.name for shard in plan.candidates())
    in_groups = frozenset(member.name for groups in plan.sets for member in groups.members)
    matrices = in_groups & {shard.name for shard in plan.shards if len(shard.shape) > 1}
    attachment = Attachment(
        plan.optimizer,
        plan.shards,
        steps,
        candidates,
        matrices,
        watch,
        weight_controller,
        group_decay,
        group_controller,
    )

    def save() -> dict[str, Any] | None:
        state = attachment.state_dict()
        return state if state.keys() & {"weights", "groups"} else None

    def load(state: dict[str, Any] | None) -> None:
        guard.after_engine_load()
        if group_decay is not None:
            group_decay.forget()
        steps.after_load()
        if state is not None:
            attachment.load_state_dict(state)

    attached_state.attachment = attachment
    weakref.finalize(attachment, watch.end.warn)
    in_checkpoints(model, save, load)
    beside = f", and on {sum(groups.count for groups in plan.sets):,} groups in {len(matrices)}" if plan.sets else ""
    logger.info("Lp decay on %d of %d parameters%s", len(attachment.decayed_singly), len(plan.shards), beside)
    return attachment


def _make_groups(plan: Plan, run: RunContext) -> tuple[GroupDecayHook | None, GroupController | None]:
    """What decays the weight groups from now on, and what brings them to their target if they have one."""
    request = plan.group_request
    if request is None:
        return None, None
    if isinstance(request, GroupTarget):
        readers = {member.name for groups in plan.sets for member in groups.members if member.reads}
        of_readers = [shard for shard in plan.shards if shard.name in readers]
        reconstruction = _reconstruction(plan.model, of_readers, request)
        controller = GroupController(request, run, plan.sets, plan.shards, reconstruction)
        return controller.hook, controller
    hook = GroupDecayHook(
        plan.optimizer,
        plan.sets,
        plan.shards,
        p=request.p,
        precondition=request.precondition,
        interval=request.interval,
    )
    hook.settings = [DecaySettings(request.weight_decay, request.cutoff) for _ in plan.sets]
    return hook, None


def _make_weights(
    plan: Plan, run: RunContext, parameter_map: ParameterMap, group_controller: GroupController | None
) -> WeightController | None:
    """What brings single weights to their target, if there is one."""
    if plan.weight_target is None:
        return None
    candidates = plan.candidates()
    left_out = [] if steps_taken(plan.optimizer) else all_zero_names(candidates)
    if left_out:
        logger.info(
            "no decay for %d parameters that start at zero (zero absorbs), such as %s", len(left_out), left_out[0]
        )
    controller = WeightController(
        plan.weight_target,
        run,
        parameter_map,
        candidates,
        left_out,
        stacks=frozenset(expert_stacks(plan.model)),
        without_blocks=sum(plan.blocks.left_out.values()),
        reconstruction=_reconstruction(
            plan.model, [shard for shard in candidates if shard.name not in left_out], plan.weight_target
        ),
    )
    if group_controller is not None:
        group_controller.check_order(controller)
        group_controller.check_room(controller)
    return controller


def _reconstruction(model: nn.Module, shards: list[Shard], target: SparsityTarget) -> Reconstruction | None:
    """What moves survivors of a target, if it asks for it, or leaves it open and they can move in most of it."""
    if target.reconstruct is False:
        return None
    reconstruction = Reconstruction(model, shards, target.reconstruct_memory, requested=bool(target.reconstruct))
    moving = sum(shard.shape.numel() for shard in shards if shard.name in reconstruction.layers)
    weights = sum(shard.shape.numel() for shard in shards)
    if target.reconstruct or is_most(moving, weights):
        return reconstruction
    logger.info(
        "survivors stay where they are, and weights decay: of %s weights only %s are of layers whose survivors can"
        " move (reconstruct=True moves these)",
        f"{weights:,}",
        f"{moving:,}",
    )
    return None


def _parameter_map(shards: list[Shard], input_dims: dict[str, int]) -> ParameterMap:
    """Which parameter each part of a tensor belongs to, and which N:M blocks lie on several ranks. One reduction, and
    an exchange of where shards begin inside of a block, if any does.

    Args:
        shards: of all parameters.
        input_dims: {name: dimension of inputs}, of the parameters with blocks.
    """
    parameter_map = ParameterMap()
    slices: dict[Tensor, list[ParamSlice]] = {}
    names: dict[Tensor, list[str]] = {}
    for shard in shards:
        inputs = input_dims.get(shard.name)
        param_slice = ParamSlice(
            shard.name, shard.offset, shard.length, shard.start, shard.shape, inputs, shard.region
        )
        slices.setdefault(shard.tensor, []).append(param_slice)
        names.setdefault(shard.tensor, []).append(shard.name)
    parameter_map.replace(slices)
    shapes = {shard.name: shard.shape for shard in shards}
    strides = {
        shard.name: nm.block_stride(shard.shape, input_dims[shard.name])
        for shard in shards
        if shard.name in input_dims
    }
    begin = [_inside_of_blocks(shard, input_dims[shard.name]) for shard in shards if shard.name in strides]
    starts: dict[str, Tensor] = {}
    inside_of_blocks = [starts for starts in begin if any(starts[1:])]
    is_split = bool(all_reduce_max(torch.tensor([len(inside_of_blocks)])))
    for shard_starts in set().union(*all_gather_objects(inside_of_blocks)) if is_split else ():
        shape, inputs = shapes[shard_starts.name], input_dims[shard_starts.name]
        rows = torch.arange(math.prod(shape[:inputs]))[:, None] * shape[inputs]
        of_runs = ((rows + torch.tensor(shard_starts.runs, dtype=torch.int64)) * strides[shard_starts.name]).flatten()
        of_range = torch.tensor(shard_starts.positions, dtype=torch.int64)
        known = starts.get(shard_starts.name, of_range[:0])
        starts[shard_starts.name] = torch.cat([known, of_runs, of_range])
    parameter_map.split_blocks = SplitBlocks(starts, names, all_reduce_max, strides) if starts else None
    return parameter_map


class _Starts(NamedTuple):
    """Where what a rank has of a parameter begins inside of a block of 8, or of several that lie between each other.

    Args:
        name: of the parameter.
        positions: of a range, in the parameter taken flat; one or none.
        runs: of inputs, where the rank has some of them alone.
    """

    name: str
    positions: tuple[int, ...]
    runs: tuple[int, ...]


def _inside_of_blocks(shard: Shard, inputs: int) -> _Starts:
    """Where a shard begins inside of blocks, which lie along the dimension `inputs`."""
    size = nm.LARGEST_BLOCK * nm.block_stride(shard.grid.sizes, inputs)
    return _Starts(
        shard.name,
        (shard.grid.position(shard.start),) if shard.length and shard.start % size else (),
        tuple(run.start for run in shard.grid.runs[inputs] if run and run.start % nm.LARGEST_BLOCK),
    )


def _warn_of_free_zeros(plan: Plan) -> None:
    """Warns of a model that comes sparse, and whose matrices neither decay nor have a target. Collective."""
    if plan.weight_target is None and not steps_taken(plan.optimizer):
        free = [s for s in plan.shards if s.name in plan.may_decay and not plan.decays_by_hand(s) and not s.is_on_disk]
        counts = [count for count in census(free).counts if count.zeros < count.elements]
        warn_of_free_zeros(sum(count.zeros for count in counts), sum(count.elements for count in counts))


def _refuse_all_zero(decaying: list[Shard]) -> None:
    """Raises ValueError, on every rank, for a parameter that is to decay and is all zeros."""
    zero_names = all_zero_names(decaying)
    if zero_names:
        raise ValueError(
            f"{len(zero_names)} parameters are to decay, but are all zeros, such as {zero_names[0]!r}: zero absorbs"
            " for p < 2, so they could never move. Give them weight_decay=0: attach(...,"
            f" overrides={{{zero_names[0]!r}: {{'weight_decay': 0.0}}}}), or build the groups by lp_dist.param_groups,"
            " which does so by itself"
        )
