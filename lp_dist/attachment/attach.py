"""attach: plan what is to be done, agree on it over the ranks, apply it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lp_dist.attachment.apply import apply_plan
from lp_dist.attachment.attachment import Attachment
from lp_dist.attachment.plan import Request, make_plan
from lp_dist.sharding.collectives import assert_same_on_all_ranks
from lp_dist.sharding.shards import check_equal_replicas, check_shards, with_replicas
from lp_dist.targets.target import GroupDecay, SparsityTarget


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
    first_step: int = 0,
) -> Attachment:
    """Gives the optimizer a map of which parameter each part of its tensors belongs to.

    After it, the hyperparameters of `lp_dist.optim.parameter_map.KEYS` can differ per parameter inside of one flat
    shard. What decays is decided by name, whoever made the param groups. The hyperparameters of the script
    hold, whatever a checkpoint loader writes into the groups.

    Call it on every rank, after the engine is made. What an earlier call returned is void from then on, and says so
    when it is used. It makes some small reductions and exchanges (a digest of the hyperparameters, which ranks hold
    the same), gathers nothing, and costs nothing per step but for blocks of a pattern that lie on several ranks. Where
    ranks differ, or blocks lie on several ranks, they exchange the details as well.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine (ZeRO 0 to 3, offload), FSDP2, tensor parallelism.
        optimizer: one of lp_dist, one with `add_lp_decay`, or a wrapper of it; may be left out for a DeepSpeed engine.
        names: the parameters that may decay; None: the matrices of `lp_dist.param_groups` (no embeddings, heads,
            norms, biases). Others in a group with weight_decay > 0, as Hugging Face's Trainer makes them, get
            weight_decay 0.
        overrides: `{pattern: {key: value}}`, shell patterns on the names of `named_parameters()`; a later one wins. A
            pattern with a wildcard gives weight_decay only to parameters that may decay; a full name gives it to any.
        target: the share of zeros to end with, instead of a λ; the groups' weight_decay must be 0. Call the result's
            `after_step()` after each optimizer step. One target of single weights and one of groups may be given, the
            groups' window first.
        groups: a λ for whole channels or heads.
        total_steps: optimizer steps of the whole run; needed with a target.
        lr_scheduler: gives a target the learning rates ahead, and its last ones are put back after DeepSpeed has
            loaded a checkpoint; an engine's own is taken by itself.
        scheduled: values of group keys that the caller sets at some step, and that a checkpoint may hold.
        first_step: steps that the run has behind it. The state of a target, where one is loaded, says it by itself;
            the steps that the optimizer has behind it, perhaps of another run, don't count.
    Returns:
        An `Attachment`.
    Raises:
        RuntimeError: another optimizer steps, or ranks disagree on hyperparameters.
        ValueError: the optimizer steps nothing of the model, a pattern or name matches nothing, a value is bad, a
            matrix that is to decay is all zeros before the first step, or a target's window lies behind `first_step`.
    """
    request = Request(names, overrides or {}, target, groups, total_steps, lr_scheduler, scheduled or {}, first_step)
    return attach_as_requested(model, optimizer, request)


def attach_as_requested(model: Any, optimizer: Any, request: Request) -> Attachment:
    """`attach` with its arguments in one."""
    try:
        plan = make_plan(model, optimizer, request)
    except (RuntimeError, TypeError, ValueError) as error:
        assert_same_on_all_ranks(error)  # a rank that failed takes part, so that the others don't wait for it
        raise
    assert_same_on_all_ranks(plan.to_compare())
    shards = with_replicas(plan.shards)
    check_shards(shards)
    check_equal_replicas([shard for shard in shards if shard.name in plan.may_decay])
    return apply_plan(model, replace(plan, shards=shards))
