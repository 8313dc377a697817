"""GroupControl: brings whole groups of weights to a `SparsityTarget` with `groups`; `control.py` does it with single
weights, and says how λ is found.

The norms of all groups are known to every rank, so thresholds are exact and cost no communication beyond that of the
norms. Groups of several sizes are ranked by their mean square, the damage of a parameter that is saved, and each kind
dies by the λ and the cutoff that this threshold is in its own norm.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.deepspeed import update_copies
from lp_dist.sharding.shards import Shard
from lp_dist.structured.budget import GroupBudget, group_costs, required_costs, scope_of, shares_to_prune
from lp_dist.structured.group_decay import Force, Grouped
from lp_dist.structured.groups import Groups
from lp_dist.targets.controller import Planned
from lp_dist.targets.feasibility import refuse_window
from lp_dist.targets.lr_lookahead import rates_ahead
from lp_dist.targets.target import SparsityTarget

logger = logging.getLogger(__name__)

VERSION = 1


class GroupControl(Planned):
    """Made by `lp_dist.attach`. Collective: every rank does the same at the same step.

    Args:
        target: what to reach. optimizer: the live one. sets: the groups. shards: of all that it steps.
        everything: parameters of the model. total: optimizer steps of the run. lr_scheduler: gives the learning rates
            ahead.
        wrapper: the engine's optimizer around the live one, or that itself.
    Raises:
        UsageError: the target can't be reached in this run; the message says what to change.
    """

    window = "window of the groups"

    def __init__(
        self,
        target: SparsityTarget,
        optimizer: Optimizer,
        sets: list[Groups],
        shards: list[Shard],
        everything: int,
        total: int,
        lr_scheduler: Any,
        wrapper: Any,
    ) -> None:
        super().__init__(target, optimizer, total, lr_scheduler, wrapper)
        self.sets = sets
        p, gamma = target.p, target.precondition
        self.grouped = Grouped(optimizer, sets, shards, p=p, precondition=gamma, interval=target.interval)
        self.lr_group = {
            groups.label: next(shard.group for shard in shards if shard.name == groups.members[0].name)
            for groups in sets
        }
        window = self.start, self.end, total
        self._plan(bool(gamma), slow=p > 0.5)
        refuse_window(target, optimizer, set(self.lr_group.values()), window, self.start, lr_scheduler)
        self.budget = group_budget(target)
        self.needs = required_costs(self.budget, sets, everything)
        self.costs = group_costs(self.budget, sets)
        self.dead: Tensor | None = None  # which groups have died by the last threshold, or before it
        if self.end - self.start < 2 * target.interval:
            raise UsageError(
                f"interval={target.interval}: the window of the groups, from step {self.start} to {self.end}, holds no"
                " two decays, so that groups would die by the last threshold alone; take an interval of at most"
                f" {max(1, (self.end - self.start) // 2)}, or a longer window"
            )

    @property
    def sparsity(self) -> float:
        """Share of the groups that are to die; of their parameters where that was asked for."""
        return sum(self.needs.values()) / float(self.costs.sum())

    def shares(self) -> list[tuple[Groups, float]]:
        """Of each set the share of its groups that is to die; where several have one threshold, the share of all of
        them.
        """
        return shares_to_prune(self.budget, self.sets, self.needs)

    # -- what runs ------------------------------------------------------------

    def begin(self, t: int) -> None:
        if t < self.start:
            self._dead_now()  # what can't be reached is known now
        super().begin(t)

    def _dead_now(self) -> dict[str, float]:
        """What is dead of each scope before the window, in its costs; raises UsageError where it is as much as the
        target asks for.
        """
        dead = self._squares() == 0
        before = {scope: float(self.costs[which][dead[which]].sum()) for scope, which in self._scopes().items()}
        scope = next((scope for scope, cost in before.items() if cost >= self.needs[scope]), None)
        if scope is not None:
            raise UsageError(
                f"{before[scope]:,.0f} of the {float(self.costs[self._scopes()[scope]].sum()):,.0f}"
                f" {self._counted}{scope} are zero already, and the target asks for {self.needs[scope]:,.0f}; ask for"
                " more, or leave these groups out (to go on with a run, load the optimizer's state before attach)"
            )
        return before

    def _begin(self) -> None:
        self.before = self._dead_now()
        lost: dict[str, list[float]] = {}
        for groups, share in self.shares():
            lost.setdefault(groups.kind, []).append(share * groups.count)
        told = ", ".join(f"{sum(of):,.0f} {kind} in {len(of)} parts" for kind, of in lost.items())
        logger.info(
            "target: the model loses %s, from optimizer step %d to %d of %d, a look every %d",
            told,
            self.start,
            self.end,
            self.total,
            self.every,
        )

    def _look(self, t: int) -> None:
        """λ and cutoff of each set, for what the plan has `every` steps from now."""
        horizon = min(self.every, self.end - 1 - t)
        grace = self.graced(t)
        squares = self._squares()
        rates = rates_ahead(self.lr_scheduler, self.optimizer, horizon)
        means, limits = squares / self.grouped.sizes.cpu(), {}
        for scope, which in self._scopes().items():
            need = self.before[scope] + (self.needs[scope] - self.before[scope]) * self.plan(t + horizon)
            order = torch.argsort(means[which], stable=True)
            reached = torch.searchsorted(
                self.costs[which][order].cumsum(0), torch.tensor(need - 1e-6, dtype=torch.float64)
            )
            limits |= dict.fromkeys(self._labels(scope), float(means[which][order[min(int(reached), len(order) - 1)]]))
        forces = []
        for groups in self.sets:
            if groups.label not in limits:
                forces.append(Force())
                continue
            x = (limits[groups.label] * groups.elements) ** ((2.0 - self.grouped.p) / 2.0)
            total = sum(rate[self.lr_group[groups.label]] for rate in rates)
            weight_decay = min(x / ((2.0 - self.grouped.p) * total), 1e30) if total > 0.0 else 0.0
            # The group at the threshold is to die as well, however its squares were added up.
            forces.append(
                Force(
                    weight_decay,
                    math.inf if self.target.cap is None else self.target.cap * x * (1.0 + 1e-9),
                    self.target.grace * x if grace else 0.0,
                )
            )
        self.grouped.forces = forces
        self._log(t, squares)

    def _close(self) -> None:
        """The weakest die at once, exactly as many as the target asks for, in the masters and in an engine's copies of
        them.
        """
        squares = self._squares()
        means, dead = squares / self.grouped.sizes.cpu(), torch.zeros(len(squares), dtype=torch.bool)
        for scope, which in self._scopes().items():
            order = torch.argsort(means[which], stable=True)
            number = (
                int(
                    torch.searchsorted(
                        self.costs[which][order].cumsum(0), torch.tensor(self.needs[scope] - 1e-6, dtype=torch.float64)
                    )
                )
                + 1
            )
            dead[which[order[:number]]] = True
        self.dead = dead | (squares == 0)
        had = float((squares == 0).double().mean())
        self.grouped.forces = [Force() for _ in self.sets]
        self.grouped.kill(dead.to(self.grouped.sizes.device))
        update_copies(self.wrapper)
        self.closed = {
            "before": had,
            "after": float(dead.double().mean()),
            "by_threshold": float(dead.double().mean()) - had,
        }
        self._hold()
        logger.info(
            "target: %.2f%% of the groups zero by decay, %.2f%% (%d of %d) after the last threshold",
            100 * had,
            100 * self.closed["after"],
            int(dead.sum()),
            len(dead),
        )
        self._log(self.end - 1, self._squares())

    def _hold(self) -> None:
        """What has died stays dead, from now on. (By the weights alone it can't be told, where those of a group that
        lives are hidden.)
        """
        if self.target.freeze:
            self.grouped.hold(self.dead.to(self.grouped.sizes.device))

    # -- what it looks at -----------------------------------------------------

    def _squares(self) -> Tensor:
        """Of each group, on the host, of the weights as they are."""
        self.grouped.measure()
        return self.grouped.squares.cpu().double()

    def kinds(self) -> dict[str, list[int]]:
        """{kind: [dead, all]} of the weights as they are. Collective."""
        found: dict[str, list[int]] = {}
        for groups, squares in zip(self.sets, self._squares().split([groups.count for groups in self.sets])):
            dead, all_ = found.setdefault(groups.kind, [0, 0])
            found[groups.kind] = [dead + int((squares == 0).sum()), all_ + groups.count]
        return found

    @property
    def _counted(self) -> str:
        return "parameters of " if self.target.budget is not None or self.target.of == "all" else ""

    def _scopes(self) -> dict[str, Tensor]:
        """The numbers of the groups that have one threshold, by its name; without those that lose none."""
        found: dict[str, list[Tensor]] = {}
        first = 0
        for groups in self.sets:
            found.setdefault(scope_of(self.budget, groups), []).append(torch.arange(first, first + groups.count))
            first += groups.count
        return {scope: torch.cat(which) for scope, which in found.items() if self.needs[scope]}

    def _labels(self, scope: str) -> list[str]:
        return [groups.label for groups in self.sets if scope_of(self.budget, groups) == scope]

    def _log(self, t: int, squares: Tensor) -> None:
        scopes = self._scopes()
        all_ = float(self.costs.sum())
        first = sum(self.before.values()) / all_
        dead = sum(float(self.costs[which][squares[which] == 0].sum()) for which in scopes.values()) / all_
        forces = [force.weight_decay for force in self.grouped.forces]
        self.logs = {
            "lp/groups_target": self.sparsity,
            "lp/groups_plan": first + (self.sparsity - first) * self.plan(t),
            "lp/groups_measured": dead,
            "lp/groups_lambda": max(forces),
        }

    # -- checkpoints ----------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types, the same on every rank."""
        forces = [
            {key: value if math.isfinite(value) else str(value) for key, value in asdict(force).items()}
            for force in self.grouped.forces
        ]
        return {
            "version": VERSION,
            "target": self.target.described(),
            "window": [self.start, self.end, self.total, self.every],
            "before": dict(self.before),
            "next": self.next,
            "closed": self.closed,
            "logs": dict(self.logs),
            "forces": forces,
            "labels": [groups.label for groups in self.sets],
            "dead": None if self.dead is None else _packed(self.dead),
            **self.grouped.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was. Call it after the optimizer's state was loaded. Raises UsageError if it is of
        another target, run or version.
        """
        if state.get("version") != VERSION:
            raise UsageError(
                f"the state of the groups' target is of version {state.get('version')!r}, and this lp_dist reads"
                f" {VERSION}; install the one that wrote it"
            )
        mine = self.state_dict()
        for key in ("target", "window", "labels"):
            if mine[key] != state[key]:
                raise UsageError(
                    f"the checkpoint was trained for another {key} of groups than the script asks for: {state[key]},"
                    f" and now {mine[key]}; go on with the same target and as many steps, or start anew from the saved"
                    " model without its optimizer state"
                )
        self.before, self.next, self.closed, self.logs = (
            dict(state["before"]),
            state["next"],
            state["closed"],
            dict(state["logs"]),
        )
        self.grouped.load_state_dict(state)
        self.grouped.forces = [
            Force(**{key: float(value) for key, value in force.items()}) for force in state["forces"]
        ]
        if state["dead"] is not None:
            self.dead = _unpacked(state["dead"], len(self.costs))
            self._hold()
        self.run(steps_taken(self.optimizer))


_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])


def _packed(flags: Tensor) -> str:
    """Bools as hexadecimal digits, the first in the highest bit."""
    padded = torch.nn.functional.pad(flags.long(), (0, -len(flags) % 8))
    return bytes((padded.view(-1, 8) * _BITS).sum(1).tolist()).hex()


def _unpacked(digits: str, count: int) -> Tensor:
    """The first `count` bools of `_packed`."""
    octets = torch.tensor(list(bytes.fromhex(digits)), dtype=torch.int64)
    return (octets[:, None] & _BITS).ne(0).flatten()[:count]


def group_budget(target: SparsityTarget) -> GroupBudget:
    """How much of the groups a target prunes."""
    return GroupBudget(target.sparsity, target.budget, target.of, target.scope)
