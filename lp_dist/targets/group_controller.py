"""GroupController: brings whole weight groups to a `SparsityTarget` with `groups`; `controller.py` says how λ is
found.

The norms of all groups are known to every rank. So thresholds are exact, and cost no communication beyond that of the
norms. Groups of several sizes are ranked by their mean square, the damage for each parameter that is saved. Each kind
is pruned by the λ and the cutoff that this threshold is in its own norm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lp_dist.errors import UsageError
from lp_dist.reconstruction.survivors import Reconstruction
from lp_dist.sharding.deepspeed import update_copies
from lp_dist.sharding.shards import Shard, without_gradient
from lp_dist.structured.budget import GroupBudget, group_costs, required_costs, scope_of, shares_to_prune
from lp_dist.structured.group_decay import DecaySettings, GroupDecayHook
from lp_dist.structured.groups import WeightGroups, elements_of
from lp_dist.targets.controller import Controller, RunContext, weight_decay_for
from lp_dist.targets.feasibility import Window, check_window_length
from lp_dist.targets.target import GroupTarget, PatternTarget, WeightTarget
from lp_dist.targets.weight_controller import WeightController

logger = logging.getLogger(__name__)


class GroupController(Controller):
    """Brings an optimizer's weight groups to a target; made by `lp_dist.attach`. Collective, as `Controller`.

    Args:
        target: what to reach, with its p and precondition resolved.
        run: what is known of the run.
        sets: the groups.
        shards: of all that the optimizer steps.
        reconstruction: as of `Controller`, of the layers that read the groups' outputs.
    Raises:
        UsageError: the target can't be reached in this run; the message says what to change.
    """

    state_version = 5
    subject = "groups"
    measured_key = "lp/groups_measured"
    target: GroupTarget

    def __init__(
        self,
        target: GroupTarget,
        run: RunContext,
        sets: list[WeightGroups],
        shards: list[Shard],
        reconstruction: Reconstruction | None = None,
    ) -> None:
        super().__init__(target, run, reconstruction)
        assert target.p is not None and target.precondition is not None
        self.sets = sets
        self._counts = [groups.count for groups in sets]
        self._param_group_of = {
            groups.label: next(shard.group for shard in shards if shard.name == groups.members[0].name)
            for groups in sets
        }
        window = self.window
        self._plan_updates(bool(target.precondition), slow=target.p > 0.5)
        taken = None if run.steps.is_unsure else run.steps.taken
        check_window_length(target, self.param_groups, window, self.window.start, taken, run.rates)
        self.budget = group_budget(target)
        self._shards = shards
        self.left_out: list[str] = []  # labels of the sets that had no gradient when the window began
        self.costs = group_costs(self.budget, sets)
        self._set_requirements()
        self.dead: Tensor | None = None  # bool, of each group: whether it was zero after the final pruning
        start, end, _ = self.window
        if end - start < 2 * target.interval:
            raise UsageError(
                f"interval={target.interval}: the window of the groups, from step {start} to {end}, holds no two"
                " decays, so that groups would be pruned in the final step alone; take an interval of at most"
                f" {max(1, (end - start) // 2)}, or a longer window"
            )
        # Last, since it hooks onto the optimizer, where a refused target must leave nothing.
        self.hook = GroupDecayHook(
            run.optimizer, sets, shards, p=target.p, precondition=target.precondition, interval=target.interval
        )

    def _set_requirements(self) -> None:
        """Sets what is to be pruned of the sets that are not left out.

        Raises:
            UsageError: as of `required_costs`.
        """
        remaining = self.remaining
        self.required = required_costs(self.budget, remaining, self.run.total_parameters)
        self._counts_for = torch.tensor([groups.label not in self.left_out for groups in self.sets])
        self._counts_for = self._counts_for.repeat_interleave(torch.tensor(self._counts))
        self._scopes = _scopes(self.budget, self.sets, self.left_out, self.required)

    @property
    def remaining(self) -> list[WeightGroups]:
        """The sets that are not left out."""
        return [groups for groups in self.sets if groups.label not in self.left_out]

    @property
    def param_groups(self) -> set[int]:
        return set(self._param_group_of.values())

    @property
    def sparsity(self) -> float:
        """Share of the groups to prune; of their parameters where that was requested."""
        return sum(self.required.values()) / self._cost

    @property
    def _cost(self) -> float:
        """Of all groups that are not left out."""
        return float(self.costs[self._counts_for].sum())

    def shares(self) -> list[tuple[WeightGroups, float]]:
        """Each set with the share of its groups to prune; where several have one threshold, the share of all of
        them.
        """
        return shares_to_prune(self.budget, self.remaining, self.required)

    # -- around a step --------------------------------------------------------

    def begin(self, t: int) -> None:
        if t < self.window.start:
            self._dead_costs()  # what can't be reached is known now
        super().begin(t)

    def _dead_costs(self) -> dict[str, float]:
        """The cost of the groups that are zero before the window, by scope; raises UsageError where it is as much as
        the target asks for.
        """
        dead = self._squares() == 0
        scopes = {scope: members.indices for scope, members in self._scopes.items()}
        before = {scope: float(self.costs[indices][dead[indices]].sum()) for scope, indices in scopes.items()}
        reached = next((scope for scope, cost in before.items() if cost >= self.required[scope]), None)
        if reached is not None:
            unit = "parameters of " if self.budget.counts_parameters else ""
            raise UsageError(
                f"{before[reached]:,.0f} of the {float(self.costs[scopes[reached]].sum()):,.0f} {unit}{reached} are"
                f" zero already, and the target asks for {self.required[reached]:,.0f}; ask for more, or leave these"
                " groups out (to go on with a run, load the optimizer's state before attach)"
            )
        return before

    def _begin(self) -> None:
        self._leave_out_unused()
        self.before = self._dead_costs()
        to_prune: dict[str, list[float]] = {}
        for groups, share in self.shares():
            to_prune.setdefault(groups.kind, []).append(share * groups.count)
        self._log_plan(
            ", ".join(f"{sum(counts):,.0f} {kind} in {len(counts)} modules" for kind, counts in to_prune.items())
        )

    def _leave_out_unused(self) -> None:
        """Keeps dense the sets of modules that have had no gradient so far: the loss says nothing of their groups.
        Collective.

        Experts of one module stay together: one that no token reaches is the first to go.

        Raises:
            UsageError: nothing is left, or too little for the target.
        """
        names = {member.name for groups in self.sets for member in groups.members}
        shards = [shard for shard in self._shards if shard.name in names]
        shard_names, unused = {shard.name for shard in shards}, without_gradient(shards, self.run.optimizer)
        used_modules = {
            groups.name
            for groups in self.sets
            if any(unused.get(member.name, 0) is not None for member in groups.members if member.name in shard_names)
        }
        self.left_out = [groups.label for groups in self.sets if groups.name not in used_modules]
        if not self.left_out:
            return
        if not self.remaining:
            raise UsageError(
                f"when the window of the groups begins, at step {self.window.start}, none of their modules has had a"
                " gradient. Train on data that reaches them, or begin the window later (start)"
            )
        self._set_requirements()
        logger.warning(
            "%s had no gradient when the window began, and stay as they are: the loss says nothing of them. The target"
            " holds of the groups of the other %d. If they are to decay all the same, begin the window when they have"
            " gradients (start)",
            self.left_dense,
            len(used_modules),
        )

    @property
    def left_dense(self) -> str:
        modules = sorted({groups.name for groups in self.sets if groups.label in self.left_out})
        return (
            f"the groups of {len(modules)} module{'s' * (len(modules) > 1)} (such as {modules[0]})" if modules else ""
        )

    def update(self, t: int) -> None:
        """λ and cutoff of each set, for what the plan has at the next update, or now where groups go at once."""
        horizon = min(self.update_every, self.window.end - 1 - t)
        planned = self.planned_share(self._planned_step(t, horizon))
        regrowth = self.target.regrowth if self.allows_regrowth(t) else 0.0
        squares = self._squares()
        if not bool(squares.isfinite().all()):
            raise RuntimeError(
                f"at step {t} weights of {int(squares.isfinite().logical_not().sum()):,} groups are nan or infinite:"
                " no threshold can be found, and what was trained is spoiled. Go on from the last checkpoint with a"
                " lower learning rate, or with clipped gradients"
            )
        rates = self.run.rates.ahead(horizon)
        means = squares / self.hook.sizes.cpu()
        limits: dict[str, float] = {}  # mean squares at the threshold, by label
        must_stay = self._must_stay(means)
        for scope, members in self._scopes.items():
            cost = self.before[scope] + (self.required[scope] - self.before[scope]) * planned
            order, last = self._ranked(means, members.indices[~must_stay[members.indices]], cost)
            limits |= dict.fromkeys(members.labels, float(means[order[min(last, len(order) - 1)]]))
        p = self.hook.p
        self.hook.settings = []
        for groups, of_set, stay in zip(self.sets, means.split(self._counts), must_stay.split(self._counts)):
            if groups.label not in limits:
                self.hook.settings.append(DecaySettings())
                continue
            x = (limits[groups.label] * groups.elements) ** ((2.0 - p) / 2.0)
            learning_rates = sum(rate[self._param_group_of[groups.label]] for rate in rates)
            # The group at the threshold is to be pruned as well, however its squares were added up.
            cutoff = math.inf if self.target.cap is None else self.target.cap * x * (1.0 + 1e-9)
            if bool(stay.any()) and float(of_set[stay].min()) <= limits[groups.label]:
                # Of one threshold for several sets: what must stay in this one does not decay with the rest.
                weakest = max(float(of_set[~stay].max()) if bool((~stay).any()) else 0.0, 0.0)
                cutoff = min(cutoff, (weakest * groups.elements) ** ((2.0 - p) / 2.0) * (1.0 + 1e-9))
            self.hook.settings.append(DecaySettings(weight_decay_for(x, p, learning_rates), cutoff, regrowth * x))
        limit_of = self.hook.per_group([limits.get(groups.label, -1.0) for groups in self.sets]).cpu()
        # When the plan begins nothing is to be zero, and the limit is that of the weakest group.
        self._remove_groups((means <= limit_of) & ~must_stay & (planned > 0.0))
        self._set_logs(t, self._squares())

    def _remove_groups(self, dead: Tensor) -> None:
        """Removes groups at once whose readers can move, and moves these.

        Args:
            dead: (number of groups,) bool, on the host.
        """
        if self.reconstruction is None:
            return
        if not bool(dead.any()):
            self.reconstruction.remove_nothing()
            return
        readers = [{member.name for member in groups.members if member.reads} for groups in self.sets]
        on_device = dead.to(self.hook.sizes.device)
        moved = self.reconstruction.remove(set().union(*readers), lambda name: self.hook.prune(on_device, name))
        if moved:
            have_moved = [float(bool(names) and names <= {*moved}) for names in readers]
            self.hook.prune(on_device & (self.hook.per_group(have_moved) > 0))
            update_copies(self.run.engine_optimizer)

    def _ranked(self, means: Tensor, indices: Tensor, cost: float) -> tuple[Tensor, int]:
        """The groups of these indices in the order of their mean squares, and how many of them cost less than
        `cost`.
        """
        order = indices[torch.argsort(means[indices], stable=True)]
        limit = torch.tensor(cost - 1e-6, dtype=torch.float64)
        return order, int(torch.searchsorted(self.costs[order].cumsum(0), limit))

    def _must_stay(self, means: Tensor) -> Tensor:
        """(number of groups,) bool, the strongest of each set, as many as must stay: experts that a router needs."""
        stay = torch.zeros(len(means), dtype=torch.bool)
        for groups, of_set, flags in zip(self.sets, means.split(self._counts), stay.split(self._counts)):
            if groups.least:
                flags[torch.argsort(of_set, stable=True)[-groups.least :]] = True
        return stay

    def _prune(self) -> None:
        """Prunes the weakest groups at once, exactly as many as the target asks for, in the masters and in an engine's
        copies of them.
        """
        squares = self._squares()
        means, to_prune = squares / self.hook.sizes.cpu(), torch.zeros(len(squares), dtype=torch.bool)
        must_stay = self._must_stay(means)
        for scope, members in self._scopes.items():
            order, last = self._ranked(means, members.indices[~must_stay[members.indices]], self.required[scope])
            to_prune[order[: last + 1]] = True
        before = float((squares == 0)[self._counts_for].double().mean())
        self.hook.settings = [DecaySettings() for _ in self.sets]
        self._remove_groups(to_prune)
        self.hook.prune(to_prune.to(self.hook.sizes.device))
        update_copies(self.run.engine_optimizer)
        squares = self._squares()
        self.dead = squares == 0
        self._keep_zero()
        dead = self.dead[self._counts_for]
        self._set_final_pruning(
            before, float(dead.double().mean()), f"{int(dead.sum()):,} of {len(dead):,} groups are zero"
        )
        self._set_logs(self.window.end - 1, squares)

    def _keep_zero(self) -> None:
        """Groups that are zero stay zero from now on. (The weights alone can't tell, where those of another group are
        latent.)
        """
        if self.target.freeze and self.dead is not None:
            self.hook.keep_zero(self.dead.to(self.hook.sizes.device))

    # -- what is measured -----------------------------------------------------

    def _squares(self) -> Tensor:
        """The squared norm of each group, of the weights as they are; fp64 [groups] on the host. Collective."""
        self.hook.measure()
        return self.hook.squares.cpu().double()

    def kinds(self) -> dict[str, list[int]]:
        """{kind: [groups that are zero, all groups]} of the weights as they are. Collective."""
        kinds: dict[str, list[int]] = {}
        for groups, squares in zip(self.sets, self._squares().split(self._counts)):
            dead, count = kinds.setdefault(groups.kind, [0, 0])
            kinds[groups.kind] = [dead + int((squares == 0).sum()), count + groups.count]
        return kinds

    def _set_logs(self, t: int, squares: Tensor) -> None:
        first = sum(self.before.values()) / self._cost
        measured = self._zero_share(squares)
        self.logs = {
            "lp/groups_target": self.sparsity,
            "lp/groups_plan": first + (self.sparsity - first) * self.planned_share(t),
            "lp/groups_measured": measured,
            "lp/groups_lambda": max(settings.weight_decay for settings in self.hook.settings),
        }

    def zero_share(self) -> float:
        return self._zero_share(self.hook.squares_of_copies().cpu())

    def _zero_share(self, squares: Tensor) -> float:
        indices = [members.indices for members in self._scopes.values()]
        dead = sum(float(self.costs[of_scope][squares[of_scope] == 0].sum()) for of_scope in indices)
        return dead / self._cost

    # -- beside a target of single weights ------------------------------------

    def check_order(self, weights: WeightController) -> None:
        """Raises UsageError if the window of single weights begins before that of the groups has ended."""
        check_order(self.window, weights.window)

    def check_room(self, weights: WeightController) -> None:
        """Raises UsageError if the zeros of the pruned groups are as many as the target of single weights asks for."""
        shapes = {shard.name: shard.shape for shard in weights.shards}
        check_room(self.target, self.shares(), weights.target, weights.sparsity, shapes)

    # -- checkpoints ----------------------------------------------------------

    _compared_keys = ("labels",)

    def _own_state(self) -> dict[str, Any]:
        settings = [
            {key: value if math.isfinite(value) else str(value) for key, value in asdict(of_set).items()}
            for of_set in self.hook.settings
        ]
        return {
            "settings": settings,
            "labels": [groups.label for groups in self.sets],
            "dead": None if self.dead is None else _packed(self.dead),
            "left_out": list(self.left_out),
            **self.hook.state_dict(),
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.hook.load_state_dict(state)
        self.left_out = list(state["left_out"])
        self._set_requirements()
        self.hook.settings = [
            DecaySettings(**{key: float(value) for key, value in of_set.items()}) for of_set in state["settings"]
        ]
        if state["dead"] is not None:
            self.dead = _unpacked(state["dead"], len(self.costs))
            self._keep_zero()


class _Scope(NamedTuple):
    """The groups that share a threshold.

    Args:
        indices: among the groups of all sets; int64.
        labels: of their sets.
    """

    indices: Tensor
    labels: list[str]


def _scopes(
    budget: GroupBudget, sets: list[WeightGroups], left_out: list[str], required: dict[str, float]
) -> dict[str, _Scope]:
    """{name of a threshold: its groups}, without those that lose none.

    Args:
        budget: what to prune.
        sets: the groups.
        left_out: labels of sets that lose none.
        required: of `required_costs`.
    """
    indices: dict[str, list[Tensor]] = {}
    labels: dict[str, list[str]] = {}
    first = 0
    for groups in sets:
        scope = scope_of(budget, groups)
        if groups.label not in left_out:
            indices.setdefault(scope, []).append(torch.arange(first, first + groups.count))
            labels.setdefault(scope, []).append(groups.label)
        first += groups.count
    return {scope: _Scope(torch.cat(indices[scope]), labels[scope]) for scope in indices if required[scope]}


_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])


def _packed(flags: Tensor) -> str:
    """Bools as hexadecimal digits, the first in the highest bit."""
    padded = torch.nn.functional.pad(flags.long(), (0, -len(flags) % 8))
    return bytes((padded.view(-1, 8) * _BITS).sum(1).tolist()).hex()


def _unpacked(digits: str, count: int) -> Tensor:
    """The first `count` bools of `_packed`."""
    octets = torch.tensor(list(bytes.fromhex(digits)), dtype=torch.int64)
    return (octets[:, None] & _BITS).ne(0).flatten()[:count]


def check_order(groups: Window, weights: Window) -> None:
    """Raises UsageError if the window of single weights begins before that of the groups has ended."""
    if weights.start < groups.end - 1:
        raise UsageError(
            f"the target of single weights begins at step {weights.start}, and that of the groups ends at"
            f" {groups.end}: groups are pruned first, and zeros come among what is left. Set"
            f" start={groups.end} for the weights, or an earlier end for the groups"
        )


def check_room(
    groups_target: GroupTarget,
    group_shares: list[tuple[WeightGroups, float]],
    weight_target: WeightTarget | PatternTarget,
    sparsity: float,
    shapes: Mapping[str, torch.Size],
) -> None:
    """Raises UsageError if the zeros of the pruned groups are as many as the target of single weights asks for.

    Args:
        groups_target: what to prune of the groups.
        group_shares: each set with the share of its groups to prune.
        weight_target: what to prune of the weights.
        sparsity: share of zeros to end with, of the weights that decay.
        shapes: {name: shape} of the parameters that decay.
    """
    zeros = dict.fromkeys(shapes, 0.0)
    for groups, group_share in group_shares:
        for member in groups.members:
            if member.name in shapes:
                zeros[member.name] += group_share * elements_of(member, shapes[member.name])
    shares: dict[str, float] = {}
    if weight_target.scope == "global":
        shares = {"all that decays": sum(zeros.values()) / sum(shape.numel() for shape in shapes.values())}
    elif groups_target.scope == "layer":  # of one threshold for all layers it is not known which of them lose how many
        shares = {name: count / shapes[name].numel() for name, count in zeros.items()}
    name, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if share >= sparsity:
        way_out = "" if weight_target.scope == "global" else ", or use scope='global' for it"
        raise UsageError(
            f"when the groups are pruned {share:.1%} of {name} is zero, and the target of single weights is"
            f" {sparsity:.1%}, which counts these zeros as well; ask for more of it, for fewer"
            f" groups{way_out}"
        )


def group_budget(target: GroupTarget) -> GroupBudget:
    """How much of the groups a target prunes."""
    assert target.scope is not None
    return GroupBudget(target.sparsity, target.budget, target.relative_to, target.scope)
