"""The first step of `attach`: what will be done. Nothing is changed, so that ranks can compare their plans first."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lp_dist.attachment.cuttable import cuttable_groups
from lp_dist.attachment.nm_blocks import BlockPlan, plan_blocks
from lp_dist.errors import UsageError
from lp_dist.optim.attachable import Attachable
from lp_dist.optim.base import LpOptimizer
from lp_dist.optim.hooks import handle_of
from lp_dist.optim.hyperparameters import Phase
from lp_dist.optim.parameter_map import check_keys
from lp_dist.sharding.deepspeed import foreign_steppers
from lp_dist.sharding.engines import inner_optimizer, optimizer_of, unwrap
from lp_dist.sharding.masters import check_masters
from lp_dist.sharding.shards import Shard, find_shards
from lp_dist.sparsity.selection import factors_of_weights, matrix_names
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.resolve import resolve_groups
from lp_dist.targets.feasibility import can_keep_latent_weights
from lp_dist.targets.target import (
    DEFAULT_LATENT_WINDOWS,
    DEFAULT_PRECONDITION,
    GroupDecay,
    GroupTarget,
    PatternTarget,
    SparsityTarget,
    WeightTarget,
)

logger = logging.getLogger(__name__)

Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What a script asks of `attach`, which documents the arguments.

    Args:
        is_stepped_each_step: whether `lr_scheduler` is known to be stepped at each optimizer step.
    """

    names: Iterable[str] | None
    overrides: Overrides
    target: SparsityTarget | Sequence[SparsityTarget] | None
    groups: GroupDecay | None
    total_steps: int | None
    lr_scheduler: Any
    scheduled: dict[str, Container]
    first_step: int
    is_stepped_each_step: bool = False


@dataclass(frozen=True)
class Plan:
    """What `attach` is going to do.

    Args:
        model: the user's own module, unwrapped.
        optimizer: the inner optimizer, which steps.
        engine_optimizer: an engine's optimizer around it, or that itself.
        attachable: what decays: the optimizer itself, or the handle of `add_lp_decay`.
        shards: where each trainable parameter lies.
        requested: the hyperparameters with which the script made each param group.
        overrides: hyperparameters of single parameters, by name.
        may_decay: names of the parameters that may decay.
        weight_target: a target of single weights, with its form resolved.
        group_request: a target of weight groups, or a λ for them, with its form resolved.
        sets: the weight groups.
        total_steps: optimizer steps of the run; at least 1 with a target.
        lr_scheduler: as the script handed it over.
        scheduled: values of group keys that the caller sets at some step.
        first_step: steps that the run has behind it.
        is_stepped_each_step: whether the scheduler is known to be stepped at each optimizer step.
        blocks: of N:M patterns. Parameters that are left out of one are overridden not to decay.
    """

    model: nn.Module
    optimizer: Optimizer
    engine_optimizer: Any
    attachable: Attachable
    shards: list[Shard]
    requested: list[dict[str, Any]]
    overrides: Overrides
    may_decay: frozenset[str]
    weight_target: WeightTarget | PatternTarget | None
    group_request: GroupTarget | GroupDecay | None
    sets: list[WeightGroups]
    total_steps: int | None
    lr_scheduler: Any
    scheduled: dict[str, Container]
    first_step: int
    is_stepped_each_step: bool
    blocks: BlockPlan = field(default_factory=BlockPlan)

    def values_of(self, shard: Shard) -> dict[str, Any]:
        """The hyperparameters that the script asks for, for one parameter."""
        return {**self.requested[shard.group], **self.overrides.get(shard.name, {})}

    def decays_by_hand(self, shard: Shard) -> bool:
        """Whether a parameter decays by a λ of the script."""
        return self.values_of(shard)["weight_decay"] > 0

    def candidates(self) -> list[Shard]:
        """Of the parameters that may decay to a target of single weights."""
        return [
            shard
            for shard in self.shards
            if shard.name in self.may_decay and self.overrides.get(shard.name, {}).get("weight_decay") != 0.0
        ]

    def to_compare(self) -> dict[str, Any]:
        """What must be the same on all ranks, by what it is called in a message; it pickles."""
        settings: dict[str, Any] = {
            "optimizer": type(self.optimizer).__name__,
            "number of param groups": len(self.requested),
            **{f"param group of {shard.name}": shard.group for shard in self.shards},
        }
        for i, group in enumerate(self.requested):
            for key, value in group.items():
                settings[f"{key} of group {i}"] = float(value) if isinstance(value, torch.Tensor) else value
        for name, values in self.overrides.items():
            settings |= {f"{key} of {name}": value for key, value in values.items()}
        groups = self.group_request and {
            **self.group_request.described(),
            "labels": [groups.label for groups in self.sets],
        }
        if self.weight_target is not None:
            may_decay = {shard.name for shard in self.candidates()}
            settings |= {f"decay of {shard.name}": shard.name in may_decay for shard in self.shards}
        return {
            **settings,
            "the target": self.weight_target and self.weight_target.described(),
            "total_steps": self.total_steps,
            "first_step": self.first_step,
            "the groups": groups,
        }


def make_plan(model: Any, optimizer: Any, request: Request) -> Plan:
    """What `attach` is going to do; changes nothing.

    Args:
        model: plain, or inside of an engine.
        optimizer: of lp_dist, one with `add_lp_decay`, or a wrapper of it; None for a DeepSpeed engine.
        request: of the script.
    Raises:
        RuntimeError: another optimizer steps.
        ValueError: as of `attach`.
    """
    engine_optimizer = optimizer_of(model, optimizer)
    inner = verify(engine_optimizer)
    attachable = attachable_of(inner)
    module, shards = unwrap(model), find_shards(model, engine_optimizer)
    check_masters(engine_optimizer, shards)
    may_decay = _may_decay(module, request.names)
    if not shards:
        raise UsageError(
            "this optimizer steps none of the model's trainable parameters: it was made for another model, or before"
            " FSDP2 sharded this one. Make it after fully_shard, or hand model and optimizer to one"
            " accelerator.prepare()"
        )
    requested = _requested_values(attachable, inner, shards)
    overrides = _resolve_overrides(shards, requested, may_decay, request.overrides)
    for shard in shards:
        if shard.name in overrides:
            check_keys(overrides[shard.name])
            attachable.check({**inner.param_groups[shard.group], **requested[shard.group], **overrides[shard.name]})
    weight_target, group_target = split_targets(request.target)
    if weight_target is not None or group_target is not None:
        _check_total_steps(request.total_steps)
    if group_target is not None and request.groups is not None:
        raise UsageError("a target and a λ are given for groups; leave one of them out")
    if weight_target is not None:
        weight_target = _with_form(weight_target, inner, requested)
        _check_left_to_target(weight_target, requested, overrides)
    group_request = group_target or request.groups
    if weight_target is not None or group_request is not None or request.scheduled:
        _refuse_captured(inner)
    plan = Plan(
        module,
        inner,
        engine_optimizer,
        attachable,
        shards,
        requested,
        overrides,
        frozenset(may_decay),
        weight_target,
        None,
        [],
        request.total_steps,
        request.lr_scheduler,
        request.scheduled,
        request.first_step,
        request.is_stepped_each_step,
    )
    if weight_target is not None:
        for shard in shards:
            group = {**inner.param_groups[shard.group], **requested[shard.group]}
            attachable.check({**group, **weight_target.form(), **overrides.get(shard.name, {})})
    plan = _with_blocks(plan)
    if group_request is None:
        return plan
    sets = resolve_groups(module, group_request.groups)
    if isinstance(group_request, GroupTarget):
        cuttable = cuttable_groups(module, group_request, sets)
        group_request, sets = cuttable.target, cuttable.sets
    return replace(plan, sets=sets, group_request=_group_form(plan, group_request, sets))


def _with_blocks(plan: Plan) -> Plan:
    """The plan with the blocks of N:M patterns, and without decay of what can have none."""
    target = plan.weight_target
    # A λ that is 0 now may be set at some step.
    candidates = {shard.name for shard in plan.candidates()}
    decaying = [
        (shard, plan.values_of(shard))
        for shard in plan.shards
        if plan.decays_by_hand(shard) or shard.name in candidates
    ]
    blocks = plan_blocks(plan.model, decaying, target.pattern if target is not None else None)
    overrides = dict(plan.overrides)
    for name in blocks.left_out:
        overrides[name] = {**overrides.get(name, {}), "weight_decay": 0.0}
    return replace(plan, overrides=overrides, blocks=blocks)


def verify(optimizer: Any) -> Optimizer:
    """The optimizer that really steps, of a DeepSpeed engine or inside of the wrappers of an optimizer.

    Raises:
        RuntimeError: it has no Lp decay, or another one steps some of the weights; names the config key to set.
    """
    inner = inner_optimizer(optimizer)
    if type(inner).__name__ == "ZeroRedundancyOptimizer":
        raise RuntimeError(
            "torch's ZeroRedundancyOptimizer gives each rank whole parameters of its own, and writes them over those"
            " of the others, past this optimizer: lp_dist has no shards of it. Use DeepSpeed's ZeRO-1, or FSDP2, which"
            " save the same memory"
        )
    if not isinstance(inner, LpOptimizer) and handle_of(inner) is None:
        raise RuntimeError(
            f"the optimizer that steps is {type(inner).__module__}.{type(inner).__name__}, not one of lp_dist: there"
            ' would be no Lp decay. With DeepSpeed and offload_optimizer, set "zero_force_ds_cpu_optimizer": false at'
            ' the top level of its config and remove its "optimizer" section; else pass'
            " optimizer_cls_and_kwargs=(LpAdamW, {...}) to Trainer, or give the optimizer the decay by"
            " lp_dist.add_lp_decay(optimizer)"
        )
    _refuse_wrappers(optimizer)
    others = foreign_steppers(optimizer)
    if others:
        raise RuntimeError(
            f"{others[0]} steps some of the weights by an optimizer of its own, without Lp decay; remove it from the"
            ' DeepSpeed config ("zenflow" in zero_optimization, "super_offload" in offload_optimizer), or set'
            " offload_optimizer.ratio to 1.0"
        )
    return inner


# Packages whose wrappers only pass a step on. DeepSpeed's have a check of their own.
_PASSING_ON = (
    "accelerate",
    "deepspeed",
    "lightning",
    "lightning_fabric",
    "lp_dist",
    "pytorch_lightning",
    "transformers",
)


def _refuse_wrappers(optimizer: Any) -> None:
    """Raises RuntimeError for an optimizer around the one that steps which may keep weights of its own."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        if type(optimizer).__module__.split(".")[0] not in _PASSING_ON:
            raise RuntimeError(
                f"{type(optimizer).__module__}.{type(optimizer).__name__} is wrapped around {type(inner).__name__}:"
                " where it keeps weights of its own, as Lookahead and averages do, it would write them over the zeros."
                " If it only passes steps on, hand over what lies inside: attach(model, wrapper.optimizer)"
            )
        optimizer = inner


def attachable_of(optimizer: Optimizer) -> Attachable:
    """What decays: an optimizer of lp_dist itself, or the handle of `add_lp_decay`."""
    if isinstance(optimizer, LpOptimizer):
        return optimizer
    handle = handle_of(optimizer)
    assert handle is not None, "verify() has checked it"
    return handle


def split_targets(
    target: SparsityTarget | Sequence[SparsityTarget] | None,
) -> tuple[WeightTarget | PatternTarget | None, GroupTarget | None]:
    """The target of single weights and that of groups, of one or two targets; raises UsageError for two of a kind."""
    targets = [target] if isinstance(target, SparsityTarget) else list(target or ())
    of_weights = [item for item in targets if isinstance(item, (WeightTarget, PatternTarget))]
    of_groups = [item for item in targets if isinstance(item, GroupTarget)]
    if len(of_weights) > 1 or len(of_groups) > 1:
        raise UsageError(
            f"{len(targets)} targets are given, and two of them are for"
            f" {'groups' if len(of_groups) > 1 else 'single weights'}; give one of each at most"
        )
    return next(iter(of_weights), None), next(iter(of_groups), None)


def _may_decay(module: nn.Module, names: Iterable[str] | None) -> set[str]:
    if names is None:
        may_decay = matrix_names(module)
        factors = factors_of_weights(module)
        if factors and not may_decay:
            raise UsageError(
                f"all matrices are computed from other parameters, such as {factors[0]}: zeros in these are not those"
                " of the model. Make the weights plain first: prune.remove(module, 'weight') of torch.nn.utils,"
                " parametrize.remove_parametrizations, remove_weight_norm"
            )
        if factors:
            logger.warning(
                "no decay for %d parameters from which a module computes its weights, such as %s: zeros in them are"
                " not those of the model. To have them decay make the weights plain first: prune.remove(module,"
                " 'weight') of torch.nn.utils, parametrize.remove_parametrizations, remove_weight_norm",
                len(factors),
                factors[0],
            )
    else:
        may_decay = set(names)
    check_names(module, may_decay)
    return may_decay


def check_names(module: nn.Module, names: set[str]) -> None:
    """Raises UsageError for a name that no parameter of the model has."""
    unknown_names = sorted(names - {name for name, _ in module.named_parameters()})
    if unknown_names:
        raise UsageError(
            f"{len(unknown_names)} names are not parameters of the model, such as {unknown_names[0]!r}; pass names as"
            " named_parameters() gives them"
        )


def _check_total_steps(total_steps: int | None) -> None:
    if not isinstance(total_steps, int) or total_steps < 1:
        raise UsageError(
            f"total_steps={total_steps!r}: a target needs the number of optimizer steps of the whole run; pass"
            " attach(..., total_steps=n)"
        )


def _requested_values(attachable: Attachable, optimizer: Optimizer, shards: list[Shard]) -> list[dict[str, Any]]:
    """The values of each param group as the script asked for them, the learning rate among them.

    A group is known by its parameters, since engines drop empty groups; by position where an engine has put other
    parameters into it (Accelerate's FSDP2); else by what it has now.
    """
    made = attachable.attached.requested
    by_group = {shard.group: values for shard in shards if (values := made.of(shard.param)) is not None}
    positional = made.groups if len(made.groups) == len(optimizer.param_groups) else optimizer.param_groups
    groups = [by_group.get(i, positional[i]) for i in range(len(optimizer.param_groups))]
    return [{key: value for key, value in group.items() if key not in ("params", "initial_lr")} for group in groups]


def _resolve_overrides(
    shards: list[Shard], requested: list[dict[str, Any]], may_decay: set[str], patterns: Overrides
) -> Overrides:
    """What single parameters override: no decay for those that may not, and what the script's patterns say."""
    overrides: Overrides = {}
    # Of all that may not decay, whatever its group has now: a loop or a scheduler may write a λ into it later.
    for shard in shards:
        if shard.name not in may_decay:
            overrides[shard.name] = {"weight_decay": 0.0}
    excluded = [s.name for s in shards if s.name not in may_decay and requested[s.group]["weight_decay"] > 0]
    if excluded:
        logger.warning(
            "no decay for %d parameters that their param group would decay, such as %s: embeddings, heads, norms and"
            " biases stay dense. Name them in attach(names=...) or LpCallback(names=...) if they are to decay",
            len(excluded),
            excluded[0],
        )
    for name, values in matching_overrides([shard.name for shard in shards], may_decay, patterns).items():
        overrides[name] = {**overrides.get(name, {}), **values}
    return overrides


def matching_overrides(names: Sequence[str], may_decay: Container[str], patterns: Overrides) -> Overrides:
    """What patterns say of single parameters.

    Args:
        names: of the trainable parameters.
        may_decay: names of those that may decay. A pattern gives a λ to no others, unless it is a full name.
        patterns: {pattern: {hyperparameter: value}}; a later one wins.
    Raises:
        UsageError: a pattern matches nothing.
    """
    overrides: Overrides = {}
    for pattern, values in patterns.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if pattern not in names and values.get("weight_decay", 0.0):
            matches = [name for name in matches if name in may_decay]
        if not matches:
            raise UsageError(
                f"the override {pattern!r} matches no parameter that can take it; names look like {names[0]!r}, and *"
                f" stands for any part of one: try {'*' + pattern.strip('*') + '*'!r}"
            )
        for name in matches:
            overrides[name] = {**overrides.get(name, {}), **values}
    return overrides


def _refuse_captured(optimizer: Optimizer) -> None:
    """Raises UsageError where a CUDA graph may repeat a step with the λ, cutoff and phase of its capture."""
    if any(group.get("capturable") for group in optimizer.param_groups):
        raise UsageError(
            "capturable=True is for a step that a CUDA graph repeats, with the λ, cutoff and phase that it was"
            " captured with: a target, a decay window and groups change them, and nothing would follow. Set"
            " capturable=False and capture the forward and backward pass alone, or give a weight_decay (λ) and no"
            " target"
        )


def _with_form(
    target: WeightTarget | PatternTarget, optimizer: Optimizer, requested: list[dict[str, Any]]
) -> WeightTarget | PatternTarget:
    """The target with the γ and the latent windows that lose least, where nobody names others. (A λ by hand keeps γ =
    0: with v̂ in it, it would depend on the scale of the loss.)
    """
    if isinstance(target, WeightTarget) and target.latent_windows is None:
        latent = can_keep_latent_weights(optimizer) and target.cap == 1.0 and target.regrowth
        target = replace(target, latent_windows=DEFAULT_LATENT_WINDOWS if latent else 0.0)
    if target.precondition is not None or any(values.get("precondition") for values in requested):
        return target
    return replace(target, precondition=DEFAULT_PRECONDITION) if _has_moments(optimizer) else target


def _has_moments(optimizer: Optimizer) -> bool:
    """Whether lp_dist knows Adam's second moments of the optimizer."""
    return isinstance(optimizer, LpOptimizer) and "exp_avg_sq" in optimizer.state_names


def _check_left_to_target(
    target: WeightTarget | PatternTarget, requested: list[dict[str, Any]], overrides: Overrides
) -> None:
    """Raises UsageError for what is set beside a target, and would be replaced by what the target finds."""
    for values in [*requested, *overrides.values()]:
        if values.get("weight_decay", 0.0) > 0:
            raise UsageError(
                f"weight_decay={values['weight_decay']:g} is set as well as a target, which finds λ by itself; set"
                " weight_decay=0 everywhere, or leave the target out"
            )
        if values.get("cutoff", math.inf) != math.inf:
            raise UsageError(
                f"cutoff={values['cutoff']:g} is set as well as a target, which finds the cutoff by itself; leave it"
                " out, and see SparsityTarget(cap=)"
            )
        if values.get("regrowth_below"):
            raise UsageError(
                f"regrowth_below={values['regrowth_below']:g} is set as well as a target, which finds it by itself;"
                " leave it out, and see SparsityTarget(regrowth=)"
            )
        if values.get("phase", Phase.DECAY) != Phase.DECAY:
            raise UsageError(
                f"phase={values['phase']!r} is set as well as a target, which switches the phases by itself; leave it"
                ' out, or leave these parameters out of the target by an override {"weight_decay": 0}'
            )
        if values.get("pattern") and values["pattern"] != target.pattern:
            raise UsageError(
                f"pattern={values['pattern']!r} is set as well as a target of"
                f" {target.pattern or 'single weights'}; leave it out, or use SparsityTarget(pattern=)"
            )


def _group_form(plan: Plan, request: GroupTarget | GroupDecay, sets: list[WeightGroups]) -> GroupTarget | GroupDecay:
    """The request for groups, with its form resolved.

    Raises:
        UsageError: the optimizer lacks what the form needs, or it and the target of single weights get into each
            other's way.
    """
    has_moments = _has_moments(plan.optimizer)
    if isinstance(request, GroupTarget):
        first_name = sets[0].members[0].name
        group = plan.requested[next((shard.group for shard in plan.shards if shard.name == first_name), 0)]
        precondition = request.precondition
        if precondition is None:
            precondition = group.get("precondition") or (DEFAULT_PRECONDITION if has_moments else 0.0)
        p = group.get("p", 0.5) if request.p is None else request.p
        if p > 1.0:
            raise UsageError(f"p={p:g} makes no groups zero by itself; take p <= 1 for the target, 0.5 is the default")
        request = replace(request, p=p, precondition=precondition)
    if request.precondition and not has_moments:
        raise UsageError(
            f"precondition={request.precondition:g} needs Adam's second moments where lp_dist knows them, and the"
            f" optimizer is {type(plan.optimizer).__name__}; use LpAdamW, or precondition=0"
        )
    weight_target = plan.weight_target
    if weight_target is not None and weight_target.pattern:
        raise UsageError(
            f"pattern={weight_target.pattern!r} and groups are given: where dead groups are removed, what stays would"
            " move to other blocks, and be in no pattern any more. Cut the groups out first (lp-dist export --shrink),"
            " and train the smaller model to the pattern"
        )
    if weight_target is not None and isinstance(request, GroupDecay) and request.weight_decay > 0:
        raise UsageError(
            "a target of single weights and a λ for groups are given: what becomes zero by it would count for the"
            " target; give the groups a target as well, whose window ends where that of the weights begins"
        )
    return request
