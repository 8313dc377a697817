"""Which of the groups that are to be pruned `lp-dist export --shrink` can remove afterwards, by the model's
configuration.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.removal import ForeseenRemovals, foreseen_removals
from lp_dist.structured.resolve import KINDS
from lp_dist.targets.group_controller import group_budget
from lp_dist.targets.target import GroupTarget

logger = logging.getLogger(__name__)


def cuttable_groups(model: nn.Module, target: GroupTarget, sets: list[WeightGroups]) -> list[WeightGroups]:
    """The groups that a target prunes, and a warning of those that will stay in the model as zeros.

    A budget counts parameters that are left, so groups that can't be removed are no part of it.

    Args:
        model: plain, or in a wrapper that keeps the names of its modules.
        target: of the run.
        sets: the groups that were requested.
    Raises:
        UsageError: a budget is requested, and none of the groups can be removed, or it can't be reached with those
            that can.
    """
    foreseen = _foreseen(model, target, sets)
    if foreseen is None:
        return sets
    if target.budget is not None and foreseen.uncut:
        rest = [groups for groups in sets if groups.label not in foreseen.uncut]
        reasons = "; ".join(str(removal) for removal in foreseen.removals if not removal.removed)
        if not rest:
            raise UsageError(
                f"budget={target.budget:,}: lp-dist export --shrink can remove none of these groups, so that the model"
                f" keeps its parameters: {reasons}"
            )
        logger.warning(
            "%d of %d sets of groups are left out of the budget, since lp-dist export --shrink can't remove them: %s",
            len(sets) - len(rest),
            len(sets),
            reasons,
        )
        return cuttable_groups(model, target, rest)
    kept = [str(removal) for removal in foreseen.removals if not removal.removed]
    if kept:
        logger.warning(
            "lp-dist export --shrink will not remove these groups, so pruning them makes the model neither smaller"
            " nor faster: %s",
            "; ".join(kept),
        )
    return sets


def _foreseen(model: nn.Module, target: GroupTarget, sets: list[WeightGroups]) -> ForeseenRemovals | None:
    """None where it is not known: the model is not of transformers, can't be made a second time, or has groups that
    the user described.
    """
    settings = getattr(model, "config", None)
    cls = next((cls for cls in type(model).__mro__ if _is_plain(cls)), None)
    if cls is None or not hasattr(settings, "to_dict") or any(groups.kind not in KINDS for groups in sets):
        return None
    try:
        return foreseen_removals(cls, settings, sets, group_budget(target))
    except UsageError:
        # The controller reports a target that can't be reached.
        return None


def _is_plain(cls: Any) -> bool:
    """Whether this is the class of a model of transformers, and not what FSDP2 makes of it."""
    return hasattr(cls, "_from_config") and not hasattr(cls, "unshard")
