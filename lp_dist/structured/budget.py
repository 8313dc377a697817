"""How many groups of weights a sparsity or a parameter budget asks to prune, and of which kinds.

Groups are compared within a scope: a layer, a kind of groups, or the whole model. Each scope has one threshold. The
cost of a group is the number of its parameters where the request counts parameters, else 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_dist.errors import UsageError
from lp_dist.structured.groups import WeightGroups


@dataclass(frozen=True)
class GroupBudget:
    """What to prune.

    Args:
        sparsity: fraction of the groups, or of the model's parameters, to prune; None with `max_parameters`.
        max_parameters: parameters of the model that may be left; None with `sparsity`.
        relative_to: what `sparsity` is a fraction of: "decayed", the groups of each scope, or "all" parameters.
        scope: "layer", a threshold for each set of groups, or "global", one for several sets.
    """

    sparsity: float | None
    max_parameters: int | None
    relative_to: str
    scope: str

    @property
    def counts_parameters(self) -> bool:
        """Whether parameters are counted, not groups."""
        return self.max_parameters is not None or self.relative_to == "all"

    def describe(self, total_parameters: int) -> str:
        """The request, for error messages."""
        if self.max_parameters is not None:
            return f"budget={self.max_parameters:,}"
        return f"sparsity={self.sparsity:g} of all {total_parameters:,} parameters"


def scope_of(budget: GroupBudget, groups: WeightGroups) -> str:
    """The name of the threshold that a set of groups shares: its label, its kind, or "all" where parameters count."""
    if budget.scope == "layer":
        return groups.label
    return "all" if budget.counts_parameters else groups.kind


def group_costs(budget: GroupBudget, sets: list[WeightGroups]) -> Tensor:
    """The cost of each group, the sets one after the other.

    Returns:
        (number of groups,) fp64.
    """
    return torch.cat(
        [
            torch.full((groups.count,), float(groups.elements if budget.counts_parameters else 1), dtype=torch.float64)
            for groups in sets
        ]
    )


def groups_to_prune(budget: GroupBudget, sets: list[WeightGroups], total_parameters: int) -> dict[str, int]:
    """How many groups to prune in each set. Sets that share a threshold lose the same fraction.

    Args:
        budget: what to prune.
        sets: the groups that may go.
        total_parameters: parameters of the model.
    Returns:
        {label: number of groups}.
    Raises:
        UsageError: as `required_costs`.
    """
    required = required_costs(budget, sets, total_parameters)
    return {groups.label: round(share * groups.count) for groups, share in shares_to_prune(budget, sets, required)}


def shares_to_prune(
    budget: GroupBudget, sets: list[WeightGroups], required: dict[str, float]
) -> list[tuple[WeightGroups, float]]:
    """Each set with the fraction of its groups to prune. Sets that share a threshold have the same fraction.

    Args:
        budget: what to prune.
        sets: the groups that may go.
        required: of `required_costs`.
    """
    totals = _total_costs(budget, sets)
    return [(groups, required[scope_of(budget, groups)] / totals[scope_of(budget, groups)]) for groups in sets]


def required_costs(budget: GroupBudget, sets: list[WeightGroups], total_parameters: int) -> dict[str, float]:
    """The cost to prune in each scope.

    Args:
        budget: what to prune.
        sets: the groups that may go.
        total_parameters: parameters of the model.
    Returns:
        {scope: cost}.
    Raises:
        UsageError: a scope would lose none or all of its groups; the budget can't be reached with these groups; or
            parameters would be counted twice.
    """
    totals = _total_costs(budget, sets)
    if not budget.counts_parameters:
        assert budget.sparsity is not None
        required = {scope: float(round(budget.sparsity * count)) for scope, count in totals.items()}
        scope = next((scope for scope, cost in required.items() if not 1 <= cost < totals[scope]), None)
        if scope is not None:
            raise UsageError(
                f"sparsity={budget.sparsity:g} of the {totals[scope]:.0f} {scope} is"
                f" {'none' if required[scope] < 1 else 'all'} of them; ask for"
                f" {'more' if required[scope] < 1 else 'less'}"
                + (", or for one threshold for all layers (scope='global')" if budget.scope == "layer" else "")
            )
        _refuse_too_few(budget, sets, required, totals)
        return required
    _refuse_overlaps(sets)
    if budget.max_parameters is not None:
        to_prune: float = total_parameters - budget.max_parameters
    else:
        assert budget.sparsity is not None
        to_prune = budget.sparsity * total_parameters
    if to_prune <= 0:
        raise UsageError(
            f"budget={budget.max_parameters:,} is no fewer parameters than the model has, which is"
            f" {total_parameters:,}; ask for fewer"
        )
    grouped = sum(groups.count * groups.elements for groups in sets)
    # One group of every scope stays, the largest; of experts as many as a router chooses.
    removable = (
        sum(groups.removable * groups.elements for groups in sets)
        if budget.scope == "layer"
        else min(
            grouped - max(groups.elements for groups in sets),
            sum((groups.count - groups.least) * groups.elements for groups in sets),
        )
    )
    required = {"all": float(math.ceil(to_prune))} if budget.scope == "global" else _spread_over_sets(sets, to_prune)
    if to_prune > removable or sum(required.values()) < to_prune - 1e-6:
        reachable = (
            f"a budget of {total_parameters - removable:,} at least"
            if budget.max_parameters is not None
            else f"less than {removable / total_parameters:.3f} of all"
        )
        raise UsageError(
            f"{budget.describe(total_parameters)} can't be reached: {grouped:,} parameters are in these groups, of"
            f" which {grouped - removable:,} must stay; ask for {reachable}, or name more groups"
        )
    return required


def _refuse_too_few(
    budget: GroupBudget, sets: list[WeightGroups], required: dict[str, float], totals: dict[str, float]
) -> None:
    """Raises UsageError where a scope would lose more groups than may go, as fewer experts than a router chooses."""
    removable: dict[str, int] = {}
    for groups in sets:
        scope = scope_of(budget, groups)
        removable[scope] = removable.get(scope, 0) + groups.count - groups.least
    scope = next((scope for scope, count in removable.items() if required[scope] > count), None)
    if scope is None:
        return
    stay = totals[scope] - removable[scope]
    way_out = (
        f"ask for {removable[scope] / totals[scope]:.3g} at most" if removable[scope] else "leave these groups out"
    )
    raise UsageError(
        f"sparsity={budget.sparsity:g} of the {totals[scope]:.0f} {scope} leaves {totals[scope] - required[scope]:.0f}"
        f" of them, and {stay:.0f} must stay, since the router chooses as many for a token; {way_out}"
    )


def _total_costs(budget: GroupBudget, sets: list[WeightGroups]) -> dict[str, float]:
    """{scope: the cost of all its groups}."""
    totals: dict[str, float] = {}
    for groups, costs in zip(sets, group_costs(budget, sets).split([groups.count for groups in sets])):
        scope = scope_of(budget, groups)
        totals[scope] = totals.get(scope, 0.0) + float(costs.sum())
    return totals


def _refuse_overlaps(sets: list[WeightGroups]) -> None:
    """Raises UsageError where weights of a parameter are in two groups, by row and by column."""
    dims: dict[str, set[int]] = {}
    for member in (member for groups in sets for member in groups.members):
        dims.setdefault(member.name, set()).add(member.dim)
    name = next((name for name, grouped_dims in dims.items() if len(grouped_dims) > 1), None)
    if name is not None:
        raise UsageError(
            f"the weights of {name} are in two groups each, by row and by column, so that parameters would be counted"
            " twice; ask for a share of the groups (relative_to='decayed'), or for one of the two kinds"
        )


def _spread_over_sets(sets: list[WeightGroups], to_prune: float) -> dict[str, float]:
    """{label: parameters that the set is to lose}, in all `to_prune` or a little more.

    Every kind loses the same fraction. The kind with the largest groups comes first, rounded to what its sets can lose
    alike, and kinds with smaller groups make up for the rounding.
    """
    required: dict[str, float] = {}
    kinds: dict[str, list[WeightGroups]] = {}
    for groups in sets:
        kinds.setdefault(groups.kind, []).append(groups)
    by_size = sorted(kinds.values(), key=lambda same_kind: -max(groups.elements for groups in same_kind))
    for i, same_kind in enumerate(by_size):
        remaining = sum(groups.count * groups.elements for kind in by_size[i:] for groups in kind)
        finer = sum(groups.removable * groups.elements for kind in by_size[i + 1 :] for groups in kind)
        share = to_prune / remaining
        counts = {groups.label: round(share * groups.count) for groups in same_kind} if finer else {}
        if (
            not finer
            or to_prune - sum(min(counts[groups.label], groups.removable) * groups.elements for groups in same_kind)
            > finer
        ):
            # This is the last kind, or rounding would leave more than the kinds after it can lose.
            counts = {groups.label: math.ceil(share * groups.count - 1e-9) for groups in same_kind}
        for groups in same_kind:
            required[groups.label] = float(min(counts[groups.label], groups.removable) * groups.elements)
            to_prune -= required[groups.label]
        to_prune = max(to_prune, 0.0)
    return required
