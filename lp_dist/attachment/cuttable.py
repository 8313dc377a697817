"""Which of the groups that are to be pruned `lp-dist export --shrink` can remove afterwards, by the model's
configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape
from lp_dist.structured.budget import groups_to_prune
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.removal import ForeseenRemovals, foreseen_removals
from lp_dist.structured.resolve import KINDS
from lp_dist.targets.group_controller import group_budget
from lp_dist.targets.target import GroupTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CuttableGroups:
    """What a target for groups prunes.

    Args:
        target: with a budget from which widths can be rounded up.
        sets: the groups; with a budget, those that can be removed.
    """

    target: GroupTarget
    sets: list[WeightGroups]


def cuttable_groups(model: nn.Module, target: GroupTarget, sets: list[WeightGroups]) -> CuttableGroups:
    """The groups that a target prunes, and a warning of those that will stay in the model as zeros.

    A budget is of the parameters that are left after `lp-dist export --shrink`. So groups that can't be removed are no
    part of it, and more are pruned where widths are rounded up.

    Args:
        model: plain, or in a wrapper that keeps the names of its modules.
        target: of the run.
        sets: the groups that were requested.
    Raises:
        UsageError: a budget can't be reached by removing these groups.
    """
    settings = getattr(model, "config", None)
    cls = plain_class(model)
    # Of groups that a user described it is not known how they can be removed.
    if cls is None or any(groups.kind not in KINDS for groups in sets):
        return CuttableGroups(target, sets)
    total = sum(full_shape(param).numel() for param in model.parameters())

    def foreseen(counts: dict[str, int]) -> ForeseenRemovals | None:
        try:
            return foreseen_removals(cls, settings, counts)
        except UsageError:
            # A model that can't be made a second time can still be trained.
            return None

    if target.budget is not None:
        sets = _removable_sets(target, sets, foreseen({groups.label: groups.removable for groups in sets}))
    try:
        counts = groups_to_prune(group_budget(target), sets, total)
    except UsageError:
        # The controller reports it.
        return CuttableGroups(target, sets)
    removals = foreseen(counts)
    if removals is None:
        return CuttableGroups(target, sets)
    if target.budget is not None:
        return CuttableGroups(_with_room_for_rounding(target, sets, total, foreseen, removals), sets)
    kept = [str(removal) for removal in removals.removals if not removal.removed]
    if kept:
        logger.warning(
            "lp-dist export --shrink will not remove these groups, so pruning them makes the model neither smaller"
            " nor faster: %s",
            "; ".join(kept),
        )
    return CuttableGroups(target, sets)


def _removable_sets(
    target: GroupTarget, sets: list[WeightGroups], strongest: ForeseenRemovals | None
) -> list[WeightGroups]:
    """Those of the sets that can be removed at all.

    Args:
        target: with a budget.
        sets: the groups that were requested.
        strongest: what could be removed if as many died as may; None where that is not known.
    """
    if strongest is None or not strongest.uncut:
        return sets
    rest = [groups for groups in sets if groups.label not in strongest.uncut]
    reasons = "; ".join(str(removal) for removal in strongest.removals if not removal.removed)
    if not rest:
        raise UsageError(
            f"budget={target.budget:,}: lp-dist export --shrink can remove none of these groups, so that the model"
            f" keeps its parameters. If as many as may were dead: {reasons}"
        )
    logger.warning(
        "%d of %d sets of groups are left out of the budget, since lp-dist export --shrink can't remove them: %s",
        len(sets) - len(rest),
        len(sets),
        reasons,
    )
    return rest


def _with_room_for_rounding(
    target: GroupTarget,
    sets: list[WeightGroups],
    total: int,
    foreseen: Callable[[dict[str, int]], ForeseenRemovals | None],
    removals: ForeseenRemovals,
) -> GroupTarget:
    """The target with a smaller budget, where that is needed so that the model that is left after the removal has no
    more parameters than requested.
    """
    assert target.budget is not None
    smaller, last, budget = target, removals, target.budget
    while last.parameters > target.budget:
        budget = max(1, budget - (last.parameters - target.budget))
        smaller = replace(smaller, budget=budget)
        try:
            following = foreseen(groups_to_prune(group_budget(smaller), sets, total))
        except UsageError:
            following = None
        if following is None:
            why = "; ".join(removal.why for removal in last.removals if removal.why)
            raise UsageError(
                f"budget={target.budget:,} can't be reached by removing these groups: {last.parameters:,} parameters"
                f" would be left{f' ({why})' if why else ''}; ask for more, or name more groups"
            )
        last = following
    if smaller is not target:
        logger.info(
            "budget=%s: groups are pruned to %s parameters, since what stays is rounded up when the rest is removed;"
            " %s are left then",
            f"{target.budget:,}",
            f"{smaller.budget:,}",
            f"{last.parameters:,}",
        )
    return smaller


def plain_class(model: nn.Module) -> Any:
    """The class of Transformers that makes such a model from its configuration, and not what FSDP2 makes of it; None
    where it is no model of Transformers.
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):
        return None
    classes = type(model).__mro__
    return next((cls for cls in classes if hasattr(cls, "_from_config") and not hasattr(cls, "unshard")), None)
