"""attach: gives the live optimizer names for what it steps, checks that it is ours, and holds its hyperparameters
against loaders.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.optim import Optimizer

from lp_dist.attachment.attachment import Attachment, book_of
from lp_dist.attachment.nm_blocks import refuse_misfits, segment_map
from lp_dist.attachment.restoring import restore_rates, restore_values, tell_of_rates
from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpOptimizer
from lp_dist.optim.parameter_map import check_keys
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.collectives import agree
from lp_dist.sharding.deepspeed import foreign_steppers, in_checkpoints, is_wrapped, undo_dry_step
from lp_dist.sharding.engines import inner_scheduler, live_optimizer, optimizer_of, unwrap
from lp_dist.sharding.shards import Shard, all_zero, full_shape, shards
from lp_dist.sparsity.selection import matrix_names
from lp_dist.targets.feasibility import remembers
from lp_dist.targets.grouping import asked_of, check_order, check_room, split, started
from lp_dist.targets.schedule import values_of
from lp_dist.targets.target import GAMMA, MEMORY, GroupDecay, SparsityTarget
from lp_dist.targets.weight_controller import Control

logger = logging.getLogger(__name__)


def attach(
    model: Any,
    optimizer: Any = None,
    *,
    names: Iterable[str] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    target: SparsityTarget | Sequence[SparsityTarget] | None = None,
    groups: GroupDecay | None = None,
    total_steps: int | None = None,
    lr_scheduler: Any = None,
    scheduled: dict[str, Container] | None = None,
) -> Attachment:
    """Gives the live optimizer a map of which parameter each part of its tensors belongs to.

    After it, λ, p, l2, precondition, cutoff, floor and pattern can differ per parameter inside one flat shard, what
    decays is decided by name whoever made the param groups, and the hyperparameters that the script asked for hold,
    whatever a checkpoint loader puts into the groups. Call it on every rank, after the engine is made; a second call
    replaces the first. One small reduction and two exchanges (hyperparameters, where shards begin) now, no gather, and
    nothing per step but for blocks of a pattern that lie on several ranks.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine (ZeRO 0 to 3, offload), FSDP2.
        optimizer: ours, one with `add_lp_decay`, or a wrapper of it; may be left out for a DeepSpeed engine.
        names: the parameters that may decay; None: the matrices of `lp_dist.param_groups` (no embeddings, heads,
            norms, biases). Others in a group with weight_decay > 0, as Hugging Face's Trainer makes them, get
            weight_decay 0.
        overrides: `{pattern: {key: value}}`, shell patterns on the names of `named_parameters()`; a later one wins. A
            pattern with a wildcard gives weight_decay only to parameters that may decay; a full name gives it to any.
        target: the share of zeros to end with, instead of a λ; the groups' weight_decay must be 0. Call the result's
            `after_step()` after each optimizer step. total_steps: optimizer steps of the whole run, needed with a
            target.
        lr_scheduler: gives a target the learning rates ahead, and its last ones are put back after DeepSpeed has
            loaded a checkpoint; an engine's own is found by itself.
        groups: a λ for whole channels or heads. (A target has groups of its own; one of each kind may be given, the
            groups' window first.)
        scheduled: values of group keys that the caller sets at some step, so that finding them in a checkpoint is no
            news.
    Raises:
        RuntimeError: another optimizer steps, or ranks disagree on hyperparameters.
        ValueError: the optimizer steps nothing of the model, a pattern or name matches nothing, a value is bad, or a
            matrix that is to decay is all zeros before the first step.
    """
    try:
        optimizer = optimizer_of(model, optimizer)
        live, found, asked, own, allowed = _looked_at(model, optimizer, names, overrides or {})
        target, whole = split(target)
        for _one in filter(None, (target, whole)):
            if not isinstance(total_steps, int) or total_steps < 1:
                raise UsageError(
                    f"total_steps={total_steps!r}: a target needs the number of optimizer steps of the whole run; pass"
                    " attach(..., total_steps=n)"
                )
        if whole is not None and groups is not None:
            raise UsageError("a target and a λ are given for groups; leave one of them out")
        if target is not None:
            target = _formed(target, live, asked)
            _check_target(live, found, asked, own, target)
        refuse_misfits(model, found, asked, own, *((allowed, target.pattern) if target is not None else (set(), None)))
        whole = whole or groups
        sets, whole = asked_of(unwrap(model), live, found, asked, whole, target) if whole is not None else ([], None)
        failure, told = (
            None,
            {
                **_told(live, found, asked, own),
                "the target": target and target.described(),
                "total_steps": total_steps,
                "the groups": whole and {**whole.described(), "are": [one.label for one in sets]},
            },
        )
    except (RuntimeError, TypeError, ValueError) as error:
        failure, told = error, error
    agree(told)  # a rank that failed takes part, so that the others don't wait for it
    if failure is not None:
        raise failure
    undo_dry_step(optimizer)
    book = book_of(live)

    segments = segment_map(found)
    for name, values in own.items():
        segments.set(name, **values)
    if target is not None:
        scheduled = values_of(target.phase())
    else:
        decayed = frozenset(
            s.name for s in found if own.get(s.name, {}).get("weight_decay", asked[s.group]["weight_decay"]) > 0
        )
        if not steps_taken(live):
            _refuse_all_zero(
                [s for s in found if s.name in decayed and {**asked[s.group], **own.get(s.name, {})}["p"] < 2]
            )
    book.segments = segments
    control: Control | None = None

    def restore(*_: Any) -> None:
        restore_values(live, asked, scheduled or {})
        if control is not None and control.seen >= 0:
            control.set_phase(steps_taken(live))

    def restore_all(scheduler: Any = None) -> None:
        restore()
        if isinstance(live, LpOptimizer):
            for shard in found:  # an engine may load the state past load_state_dict
                live.check_state(live.state.get(shard.tensor, {}), live.param_groups[shard.group])
        # While an engine loads, only its own scheduler is sure to have been loaded with it.
        scheduler = inner_scheduler(scheduler or getattr(model, "lr_scheduler", None))
        restore_rates(live, asked, scheduler)
        tell_of_rates(live, asked, scheduler)

    if getattr(book, "restoring", None) is not None:
        book.restoring.remove()
    book.restoring = live.register_load_state_dict_post_hook(restore)
    if is_wrapped(optimizer):
        restore_all(lr_scheduler)
    else:
        restore()
        tell_of_rates(live, asked, inner_scheduler(lr_scheduler))
    scheduler = lr_scheduler or getattr(model, "lr_scheduler", None)
    if getattr(book, "grouped", None) is not None:
        book.grouped.remove()
    book.grouped, group_control = (
        started(unwrap(model), live, found, sets, whole, total_steps, scheduler, optimizer)
        if whole is not None
        else (None, None)
    )
    if target is not None:
        candidates = [s for s in found if s.name in allowed and own.get(s.name, {}).get("weight_decay") != 0.0]
        left_out = [] if steps_taken(live) else all_zero(candidates)
        if left_out:
            logger.info(
                "no decay for %d parameters that start at zero (zero absorbs), such as %s", len(left_out), left_out[0]
            )
        everything = sum(full_shape(param).numel() for param in unwrap(model).parameters())
        control = Control(target, live, segments, candidates, left_out, everything, total_steps, scheduler, optimizer)
        if group_control is not None:
            check_order(group_control, control.start)
            check_room(group_control, control)
        decayed = frozenset(shard.name for shard in control.shards)
        control.begin(steps_taken(live))
    matrices = {member.name for groups in sets for member in groups.members} & {
        shard.name for shard in found if len(shard.shape) > 1
    }
    attached = Attachment(live, found, decayed | matrices, control, book.grouped, group_control)

    def load(state: dict[str, Any] | None) -> None:
        restore_all()
        if attached.grouped is not None:
            attached.grouped.forget()
        if state is not None:
            attached.load_state_dict(state)

    in_checkpoints(model, lambda: attached.state_dict() or None, load)
    logger.info(
        "Lp decay on %d of %d parameters%s",
        len(decayed),
        len(found),
        f", and on {sum(one.count for one in sets):,} groups in {len(matrices)}" if sets else "",
    )
    return attached


def verify(optimizer: Any) -> Any:
    """The optimizer that really steps, of a DeepSpeed engine or inside the wrappers of an optimizer.

    Raises:
        RuntimeError: it has not the Lp decay, or another one steps some of the weights; names the config key to set.
    """
    live = live_optimizer(optimizer)
    if not isinstance(live, LpOptimizer) and not hasattr(live, "lp_decay"):
        raise RuntimeError(
            f"the optimizer that steps is {type(live).__module__}.{type(live).__name__}, not one of lp_dist: there"
            ' would be no Lp decay. With DeepSpeed and offload_optimizer, set "zero_force_ds_cpu_optimizer": false at'
            ' the top level of its config and remove its "optimizer" section; else pass'
            " optimizer_cls_and_kwargs=(LpAdamW, {...}) to Trainer, or give the optimizer the decay by"
            " lp_dist.add_lp_decay(optimizer)"
        )
    others = foreign_steppers(optimizer)
    if others:
        raise RuntimeError(
            f"{others[0]} steps some of the weights by an optimizer of its own, without Lp decay; remove it from the"
            ' DeepSpeed config ("zenflow" in zero_optimization, "super_offload" in offload_optimizer), or set'
            " offload_optimizer.ratio to 1.0"
        )
    return live


def _looked_at(model: Any, optimizer: Any, names: Iterable[str] | None, overrides: dict[str, dict[str, Any]]) -> tuple:
    """The live optimizer, its shards, the values asked for by group, and those of single parameters; changes
    nothing.
    """
    live = verify(optimizer)
    book, found = book_of(live), shards(model, optimizer)
    allowed = matrix_names(unwrap(model)) if names is None else set(names)
    unknown = sorted(allowed - {name for name, _ in unwrap(model).named_parameters()})
    if unknown:
        raise UsageError(
            f"{len(unknown)} names are not parameters of the model, such as {unknown[0]!r}; pass names as"
            " named_parameters() gives them"
        )
    if not found:
        raise UsageError(
            "this optimizer steps none of the model's trainable parameters: it was made for another model, or before"
            " FSDP2 sharded this one. Make it after fully_shard, or hand model and optimizer to one"
            " accelerator.prepare()"
        )
    asked = _asked(live, found)
    own = _own_values(found, asked, allowed, overrides)
    for shard in found:
        if shard.name in own:
            check_keys(own[shard.name])
            book.check({**live.param_groups[shard.group], **asked[shard.group], **own[shard.name]})
    return live, found, asked, own, allowed


def _formed(target: SparsityTarget, live: Any, asked: list[dict[str, Any]]) -> SparsityTarget:
    """With the γ and the memory that lose least, where nobody says other ones. (A λ by hand keeps γ = 0: with v̂ in it
    it would depend on the loss' scale.)"""
    if target.memory is None:
        target = replace(
            target,
            memory=MEMORY if remembers(live) and target.cap == 1.0 and target.grace and not target.pattern else 0.0,
        )
    if target.precondition is not None or any(values.get("precondition") for values in asked):
        return target
    return (
        replace(target, precondition=GAMMA)
        if isinstance(live, LpOptimizer) and "exp_avg_sq" in live.state_names
        else target
    )


def _check_target(
    live: Any, found: list[Shard], asked: list[dict[str, Any]], own: dict[str, dict[str, Any]], target: SparsityTarget
) -> None:
    """Raises UsageError for what contradicts a target."""
    lambdas = [group["weight_decay"] for group in asked] + [values.get("weight_decay", 0.0) for values in own.values()]
    if any(value > 0 for value in lambdas):
        raise UsageError(
            f"weight_decay={max(lambdas):g} is set as well as a target, which finds λ by itself; set weight_decay=0"
            " everywhere, or leave the target out"
        )
    for values in [*asked, *own.values()]:
        if values.get("cutoff", math.inf) != math.inf:
            raise UsageError(
                f"cutoff={values['cutoff']:g} is set as well as a target, which finds the cutoff by itself; leave it"
                " out, and see SparsityTarget(cap=)"
            )
    for shard in found:
        book_of(live).check(
            {**live.param_groups[shard.group], **asked[shard.group], **target.phase(), **own.get(shard.name, {})}
        )


def _asked(live: Any, found: list[Shard]) -> list[dict[str, Any]]:
    """The values of each live group as the script asked for them, the learning rate among them: known by the group's
    parameters, since engines drop empty groups; by position where an engine has put other parameters into them
    (Accelerate's FSDP2); else what it has now.
    """
    book = book_of(live)
    by_group = {shard.group: values for shard in found if (values := book.asked.of(shard.param)) is not None}
    positional = book.asked.groups if len(book.asked.groups) == len(live.param_groups) else live.param_groups
    values = [by_group.get(i, positional[i]) for i in range(len(live.param_groups))]
    return [{key: value for key, value in group.items() if key not in ("params", "initial_lr")} for group in values]


def _own_values(
    found: list[Shard], asked: list[dict[str, Any]], allowed: set[str], overrides: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What single parameters have of their own: no decay for those that may not, and the overrides."""
    own: dict[str, dict[str, Any]] = {}
    dropped = [s.name for s in found if s.name not in allowed and asked[s.group]["weight_decay"] > 0]
    for name in dropped:
        own[name] = {"weight_decay": 0.0}
    if dropped:
        logger.warning(
            "no decay for %d parameters that their param group would decay, such as %s: embeddings, heads, norms and"
            " biases stay dense. Name them in attach(names=...) or LpCallback(names=...) if they are to decay",
            len(dropped),
            dropped[0],
        )
    known = [shard.name for shard in found]
    for pattern, values in overrides.items():
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if pattern not in known and values.get("weight_decay", 0.0):
            matches = [name for name in matches if name in allowed]
        if not matches:
            raise UsageError(
                f"the override {pattern!r} matches no parameter that can take it; names look like {known[0]!r}, and *"
                f" stands for any part of one: try {'*' + pattern.strip('*') + '*'!r}"
            )
        for name in matches:
            own[name] = {**own.get(name, {}), **values}
    return own


def _told(
    live: Optimizer, found: list[Shard], asked: list[dict[str, Any]], own: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What all ranks must agree on."""
    told = {
        "optimizer": type(live).__name__,
        "number of param groups": len(asked),
        **{f"param group of {s.name}": s.group for s in found},
    }
    for i, group in enumerate(asked):
        told |= {
            f"{key} of group {i}": float(value) if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
        }
    return told | {f"{key} of {name}": value for name, values in own.items() for key, value in values.items()}


def _refuse_all_zero(candidates: list[Shard]) -> None:
    """Raises ValueError, on every rank, for a parameter that is to decay and is all zeros."""
    dead = all_zero(candidates)
    if dead:
        raise ValueError(
            f"{len(dead)} parameters are to decay, but are all zeros, such as {dead[0]!r}: zero absorbs for p < 2, so"
            f" they could never move. Give them weight_decay=0: attach(..., overrides={{{dead[0]!r}: {{'weight_decay':"
            " 0.0}}), or build the groups by lp_dist.param_groups, which does so by itself"
        )
