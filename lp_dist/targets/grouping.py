"""What `attach` does for whole groups of weights: which there are, whether what is asked of them can be, and what
decays them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.shards import Shard, full_shape
from lp_dist.structured.group_decay import Force, Grouped
from lp_dist.structured.groups import Groups
from lp_dist.structured.naming import structure
from lp_dist.targets.group_controller import GroupControl
from lp_dist.targets.target import GAMMA, GroupDecay, SparsityTarget
from lp_dist.targets.weight_controller import Control


def split(
    target: SparsityTarget | Sequence[SparsityTarget] | None,
) -> tuple[SparsityTarget | None, SparsityTarget | None]:
    """The target of single weights and that of groups, of one or two targets; raises UsageError where there are two of
    a kind.
    """
    targets = [target] if isinstance(target, SparsityTarget) else list(target or ())
    weights, groups = ([one for one in targets if bool(one.groups) == whole] for whole in (False, True))
    if len(weights) > 1 or len(groups) > 1:
        raise UsageError(
            f"{len(targets)} targets are given, and two of them are for"
            f" {'groups' if len(groups) > 1 else 'single weights'}; give one of each at most"
        )
    return next(iter(weights), None), next(iter(groups), None)


def asked_of(
    model: nn.Module,
    live: Optimizer,
    found: list[Shard],
    values: list[dict[str, Any]],
    asked: SparsityTarget | GroupDecay,
    target: SparsityTarget | None,
) -> tuple[list[Groups], SparsityTarget | GroupDecay]:
    """The groups, and what is asked of them with its form made out; changes nothing.

    Args:
        values: of each param group as the script asked for them (what it has now may be a checkpoint's). target: of
            single weights, if there is one too.
    Raises:
        UsageError: none is recognised, the optimizer lacks what the form needs, or the two targets get into each
            other's way.
    """
    sets = structure(model, asked.groups)
    has_moments = "exp_avg_sq" in getattr(live, "state_names", ())
    if isinstance(asked, SparsityTarget):
        group = values[next((shard.group for shard in found if shard.name == sets[0].members[0].name), 0)]
        precondition = (
            asked.precondition
            if asked.precondition is not None
            else group.get("precondition") or (GAMMA if has_moments else 0.0)
        )
        asked = replace(asked, p=group.get("p", 0.5) if asked.p is None else asked.p, precondition=precondition)
    if asked.p > 1.0 and isinstance(asked, SparsityTarget):
        raise UsageError(
            f"p={asked.p:g} makes no groups zero by itself; take p <= 1 for the target, 0.5 is the default"
        )
    if asked.precondition and not has_moments:
        raise UsageError(
            f"precondition={asked.precondition:g} needs Adam's second moments where lp_dist knows them, and the"
            f" optimizer is {type(live).__name__}; use LpAdamW, or precondition=0"
        )
    if target is not None and target.pattern:
        raise UsageError(
            f"pattern={target.pattern!r} and groups are given: where dead groups are cut out, what stays would move to"
            " other blocks, and be in no pattern any more. Cut the groups out first (lp-dist export --shrink), and"
            " train the smaller model to the pattern"
        )
    if target is not None and isinstance(asked, GroupDecay) and asked.weight_decay > 0:
        raise UsageError(
            "a target of single weights and a λ for groups are given: what dies by it would count for the target; give"
            " the groups a target as well, whose window ends where that of the weights begins"
        )
    return sets, asked


def started(
    model: nn.Module,
    live: Optimizer,
    found: list[Shard],
    sets: list[Groups],
    asked: SparsityTarget | GroupDecay,
    total: int | None,
    lr_scheduler: Any,
    wrapper: Any,
) -> tuple[Grouped, GroupControl | None]:
    """What decays the groups from now on, and what brings them to their target if they have one. Arguments as of
    `GroupControl`.
    """
    if isinstance(asked, SparsityTarget):
        everything = sum(full_shape(param).numel() for param in model.parameters())
        control = GroupControl(asked, live, sets, found, everything, total, lr_scheduler, wrapper)
        control.begin(steps_taken(live))
        return control.grouped, control
    grouped = Grouped(live, sets, found, p=asked.p, precondition=asked.precondition, interval=asked.interval)
    grouped.forces = [Force(asked.weight_decay, asked.cutoff) for _ in sets]
    return grouped, None


def check_order(groups: GroupControl, start: int) -> None:
    """Raises UsageError if single weights begin to die, at the step `start`, before the groups have died."""
    if start < groups.end - 1:
        raise UsageError(
            f"the target of single weights begins at step {start}, and that of the groups ends at {groups.end}: groups"
            f" die first, and zeros come among what is left. Set start={groups.end} for the weights, or an earlier end"
            " for the groups"
        )


def check_room(groups: GroupControl, weights: Control) -> None:
    """Raises UsageError if the zeros of the groups that are to die are as many as the target of single weights asks
    for already.
    """
    shapes = {shard.name: shard.shape for shard in weights.shards}
    zeros = dict.fromkeys(shapes, 0.0)
    for one, share in groups.shares():
        for member in one.members:
            if member.name in shapes:
                zeros[member.name] += (
                    share
                    * (member.stop - member.start)
                    * shapes[member.name].numel()
                    / shapes[member.name][member.dim]
                )
    if weights.target.scope == "global":
        full = {"all that decays": sum(zeros.values()) / sum(shape.numel() for shape in shapes.values())}
    else:  # of one threshold for all layers it is not known which of them lose how many
        full = (
            {name: share / shapes[name].numel() for name, share in zeros.items()}
            if groups.target.scope == "layer"
            else {}
        )
    name, share = max(full.items(), key=lambda item: item[1], default=("", 0.0))
    if share >= weights.sparsity:
        raise UsageError(
            f"when the groups have died {share:.1%} of {name} is zero, and the target of single weights is"
            f" {weights.sparsity:.1%}, which counts these zeros as well; ask for more of it, for fewer groups"
            + ("" if weights.target.scope == "global" else ", or use scope='global' for it (--scope global)")
        )
