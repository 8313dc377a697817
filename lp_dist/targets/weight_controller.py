"""Control: brings an optimizer to a `SparsityTarget`. λ and the cutoff are found from the weights as they are, again
and again, and land on it.

With x of `decay.py`, and no gradients, x falls by (2−p)·λ·α a step. So the λ by which the share s of the weights is
dead h steps from now is `x_s / ((2−p)·Σα)`, with x_s the quantile of the present x at s and Σα the learning rates of
those steps. Gradients push back; hence the same is asked anew every `every` steps, for the share that the plan has
`every` steps later (a receding horizon: no gains to tune). What is to die is not lost yet: until the window ends it is
zero, and latent (the target's `memory`), or until its last fifth it fades to a floor (its `grace`).
"""

from __future__ import annotations

import logging
import math
from statistics import median
from typing import Any

from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.hyperparameters import FROZEN, KEPT, OFF
from lp_dist.optim.parameter_map import SegmentMap, effective
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.deepspeed import update_copies
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.census import Census, census
from lp_dist.sparsity.nm_blocks import parts
from lp_dist.sparsity.quantiles import LARGEST, Part, settle, share_below, smallest, stride_of, zero_below
from lp_dist.targets.controller import Planned
from lp_dist.targets.feasibility import refuse_what_cannot_be
from lp_dist.targets.lr_lookahead import rates_ahead
from lp_dist.targets.target import SparsityTarget

logger = logging.getLogger(__name__)

_TINY = 1e-30  # λ where nothing more is to die: zeros absorb only while the decay acts
VERSION = 3


class Control(Planned):
    """Brings the optimizer to a `SparsityTarget`; made by `lp_dist.attach`. Collective: every rank does the same at
    the same step.

    Args:
        target: what to reach. optimizer: the live one. segments: its.
        candidates: shards of the parameters that may decay. left_out: names of those that start at zero, and don't.
        everything: elements of all parameters of the model. total: optimizer steps of the run. lr_scheduler: gives the
            learning rates ahead.
        wrapper: the engine's optimizer around the live one, or that itself.
    Raises:
        UsageError: the target can't be reached in this run; the message says what to change.
    """

    def __init__(
        self,
        target: SparsityTarget,
        optimizer: Optimizer,
        segments: SegmentMap,
        candidates: list[Shard],
        left_out: list[str],
        everything: int,
        total: int,
        lr_scheduler: Any,
        wrapper: Any,
    ) -> None:
        super().__init__(target, optimizer, total, lr_scheduler, wrapper)
        self.segments, self.candidates, self.left_out = segments, candidates, left_out
        self.groups = sorted({shard.group for shard in candidates})
        self.phase = target.phase()
        forms = {shard.name: self._values(shard) for shard in self.shards}
        refuse_what_cannot_be(
            target, optimizer, self.shards, forms, (self.start, self.end, total), everything, lr_scheduler
        )
        self._plan(
            bool(target.memory) or any(form.get("precondition") for form in forms.values()),
            slow=any(form["p"] > 0.5 for form in forms.values()),
        )
        elements = sum(shard.shape.numel() for shard in self.shards)
        self.sparsity = target.sparsity * (everything / elements if target.of == "all" else 1.0)

    @property
    def shards(self) -> list[Shard]:
        """Of the parameters that decay."""
        return [shard for shard in self.candidates if shard.name not in self.left_out]

    # -- what runs ------------------------------------------------------------

    def begin(self, t: int) -> None:
        if t < self.start:
            self._zeros()  # what can't be reached is known now
        super().begin(t)

    def run(self, t: int) -> None:
        self.set_phase(t)
        if t < self.start and self._keeps():
            for shard in self.shards:
                self.segments.set(shard.name, weight_decay=_TINY)  # without a λ nothing is frozen
        super().run(t)

    def set_phase(self, t: int) -> None:
        """The groups' values for step t: no decay, decay, or frozen zeros. The step after the last threshold is frozen
        in any case.
        """
        if t < self.start:
            values = KEPT if self._keeps() else OFF
        elif t < self.end - 1:
            values = self.phase
        else:
            values = FROZEN if t < self.end or self.target.freeze else OFF
        for i in self.groups:
            self.optimizer.param_groups[i].update(values)

    def _keeps(self) -> bool:
        """Whether zeros that the model came with are to stay: without grace and memory zero absorbs, before the window
        as in it.
        """
        return not (self.target.grace or self.target.memory)

    def _zeros(self) -> dict[str, tuple[int, int]]:
        """Zeros and elements of each scope before the window; raises UsageError where there are more than the target
        asks for.
        """
        counts = self._counts(census(self.shards))
        shares = {scope: zeros / elements for scope, (zeros, elements) in counts.items()}
        sparser = [
            (scope, share) for scope, share in shares.items() if share >= self.sparsity and not self.target.pattern
        ]  # half zeros are no 2:4
        if sparser:
            scope, share = sparser[0]
            way_out = (
                ", leave it out by an override {\"weight_decay\": 0}, or use scope='global'"
                if self.target.scope == "layer"
                else ""
            )
            raise UsageError(
                f"{scope} is {share:.1%} zeros already, and the target is {self.sparsity:.1%}; ask for more{way_out}"
            )
        return counts

    def _begin(self) -> None:
        counts = self._zeros()
        self.before = {scope: zeros / elements for scope, (zeros, elements) in counts.items()}
        if self.target.pattern:  # of which a zero that is spared is no part
            self.before = share_below(self._parts(whole=False), dict.fromkeys(counts, 0.0))
        idle = [
            shard.name
            for shard in self.shards
            if shard.length and not shard.state and self._values(shard).get("precondition")
        ]
        if idle:
            logger.warning(
                "%d of the parameters that decay have had no gradient before the window, %s among them: the loss is"
                " not sensitive to them, so their weights die first. If they are needed later, begin it later (start),"
                " or leave them out (an override with weight_decay 0)",
                len(idle),
                idle[0],
            )
        if self.target.memory:
            for shard in self.shards:
                self.segments.set(shard.name, latent=True)
            settle(
                self._parts(), dict.fromkeys(self.before, math.inf)
            )  # the momentum of zeros that were there is no latent weight
        logger.info(
            "target: %.2f%% zeros of %d weights from optimizer step %d to %d of %d, a look every %d",
            100 * self.sparsity,
            sum(elements for _, elements in counts.values()),
            self.start,
            self.end,
            self.total,
            self.every,
        )

    def _look(self, t: int) -> None:
        """λ and cutoff of each scope, for the share that the plan has `every` steps from now; from a sample, since the
        next look mends it.
        """
        horizon = min(self.every, self.end - 1 - t)
        grace = self.target.memory or self.graced(t)
        seen = census(self.shards)
        counts = self._counts(seen)
        share = {
            scope: before + (self.sparsity - before) * self.plan(t + horizon) for scope, before in self.before.items()
        }
        all_ = {scope: elements for scope, (_, elements) in counts.items()}
        sample = self._parts(whole=False, elements=all_)
        faded = self._faded(sample, all_)
        found = smallest(
            sample,
            {scope: round(share[scope] * elements) for scope, elements in all_.items()},
            passes=2,
            elements=all_,
        )
        rates = rates_ahead(self.lr_scheduler, self.optimizer, horizon)
        # What is latent is zero already. It is forgotten by the same decay, but over the window and not until the next
        # look.
        slower = self.target.memory * (self.end - self.start) / horizon if self.target.memory else 1.0
        lambdas = []
        for shard in self.shards:
            x, p = found[self._scope(shard)], self._values(shard)["p"]
            total = slower * sum(rate[shard.group] for rate in rates)
            weight_decay = min(max(x / ((2.0 - p) * total), _TINY), 1e30) if total > 0.0 else _TINY
            cutoff = math.inf if self.target.cap is None else self.target.cap * x
            self.segments.set(
                shard.name, weight_decay=weight_decay, cutoff=cutoff, floor=self.target.grace * x if grace else 0.0
            )
            lambdas.append(weight_decay)
        self._log(t, seen, lambdas, faded)

    def _faded(self, sample: list[Part], elements: dict[str, int]) -> float | None:
        """Share of the weights whose x is at or below the floor of the last look: zeros, and what is as good as zero.
        None if there is no floor, or what is below it is zero."""
        floors = {self._scope(shard): self.segments.values(shard.name).get("floor", 0.0) for shard in self.shards}
        if not any(floors.values()) or self.target.memory:
            return None
        below = share_below(sample, floors)
        return sum(below[scope] * number for scope, number in elements.items()) / sum(elements.values())

    def _close(self) -> None:
        """What remains dies at once, by the same x (of a pattern all that is not spared), in the masters and in an
        engine's copies of them.
        """
        ranks = {
            scope: round(self.sparsity * elements)
            for scope, (_, elements) in self._counts(census(self.shards)).items()
        }
        found = (
            dict.fromkeys(ranks, LARGEST)
            if self.target.pattern
            else smallest(self._parts(whole=False), ranks, passes=3)
        )
        settle(self._parts(), found)
        before = self._counts(census(self.shards))
        zero_below(self._parts(), found)
        for shard in self.shards:
            self.segments.set(shard.name, latent=False)
        update_copies(self.wrapper)
        seen = census(self.shards)
        after = self._counts(seen)
        for shard in self.shards:  # frozen zeros need a λ, which a parameter without an interval of its own has not
            self.segments.set(shard.name, weight_decay=self.segments.values(shard.name).get("weight_decay") or _TINY)
        total = sum(elements for _, elements in after.values())
        had, have = (sum(zeros for zeros, _ in counts.values()) / total for counts in (before, after))
        worst = max(after, key=lambda scope: abs(after[scope][0] / after[scope][1] - self.sparsity))
        self.closed = {"before": had, "after": have, "by_threshold": have - had}
        logger.info(
            "target: %.2f%% zeros by decay, %.2f%% after the last threshold; furthest from the target is %s, at"
            " %.2f%%",
            100 * had,
            100 * have,
            worst,
            100 * after[worst][0] / after[worst][1],
        )
        self._log(self.end - 1, seen, [self.segments.values(shard.name)["weight_decay"] for shard in self.shards])

    def _hides(self, shard: Shard) -> bool:
        """Whether its zeros may be latent weights."""
        return bool(self.segments.values(shard.name).get("latent"))

    def _parts(self, whole: bool = True, elements: dict[str, int] | None = None) -> list[Part]:
        if self.target.pattern:
            return parts(self._scoped(), self._values, self.target.pattern, self.segments.straddling, whole, elements)
        return [
            Part.of(
                scope,
                shard,
                self._values(shard),
                whole,
                stride_of(shard, elements[scope]) if elements else 1,
                self._hides(shard),
            )
            for scope, shard in self._scoped()
        ]

    # -- what it looks at -----------------------------------------------------

    def _scope(self, shard: Shard) -> str:
        return shard.name if self.target.scope == "layer" else "all"

    def _values(self, shard: Shard) -> dict[str, Any]:
        group = {**self.optimizer.param_groups[shard.group], **self.phase}
        own = {key: value for key, value in self.segments.values(shard.name).items() if key in ("p", "precondition")}
        return effective(group, own)

    def _scoped(self) -> list[tuple[str, Shard]]:
        return [(self._scope(shard), shard) for shard in self.shards]

    def _counts(self, seen: Census) -> dict[str, tuple[int, int]]:
        """Zeros and elements of each scope."""
        counts: dict[str, tuple[int, int]] = {}
        for shard, (zeros, elements) in zip(self.shards, seen.counts):
            before = counts.get(self._scope(shard), (0, 0))
            counts[self._scope(shard)] = before[0] + zeros, before[1] + elements
        return counts

    def _log(self, t: int, seen: Census, lambdas: list[float], faded: float | None = None) -> None:
        counts = self._counts(seen)
        total = sum(elements for _, elements in counts.values())
        first = sum(self.before[scope] * elements for scope, (_, elements) in counts.items()) / total
        measured = sum(zeros for zeros, _ in counts.values()) / total
        self.logs = {
            "lp/target": self.sparsity,
            "lp/plan": first + (self.sparsity - first) * self.plan(t),
            "lp/measured": measured,
            "lp/faded": measured if faded is None else faded,
            "lp/lambda_min": min(lambdas),
            "lp/lambda_median": median(lambdas),
            "lp/lambda_max": max(lambdas),
            "lp/dead_channels": seen.dead / max(1, seen.rows),
        }

    # -- checkpoints ----------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types, the same on every rank."""
        return {
            "version": VERSION,
            "target": self.target.described(),
            "window": [self.start, self.end, self.total, self.every],
            "left_out": list(self.left_out),
            "before": dict(self.before),
            "next": self.next,
            "closed": self.closed,
            "logs": dict(self.logs),
            "values": {
                shard.name: {
                    key: _plain(value)
                    for key, value in self.segments.values(shard.name).items()
                    if key in ("weight_decay", "cutoff", "floor", "latent")
                }
                for shard in self.shards
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was. Call it after the optimizer's state was loaded.

        Raises:
            UsageError: it is of another target, another run, or another version.
        """
        if state.get("version") != VERSION:
            raise UsageError(
                f"the target's state is of version {state.get('version')!r}, and this lp_dist reads {VERSION}; install"
                " the one that wrote it"
            )
        mine = self.state_dict()
        for key in ("target", "window"):
            if mine[key] != state[key]:
                raise UsageError(
                    f"the checkpoint was trained for another {key} than the script asks for: {state[key]}, and now"
                    f" {mine[key]}; go on with the same target and as many steps, or start anew from the saved model"
                    " without its optimizer state"
                )
        odd = sorted(set(state["values"]) ^ ({shard.name for shard in self.candidates} - set(state["left_out"])))
        if odd:
            raise UsageError(
                f"other parameters decay than in the checkpoint, {odd[0]!r} among them; use the same names and"
                " overrides"
            )
        self.left_out = list(state["left_out"])
        self.before, self.next, self.closed, self.logs = (
            dict(state["before"]),
            state["next"],
            state["closed"],
            dict(state["logs"]),
        )
        for name, values in state["values"].items():
            self.segments.set(
                name, **{key: value if isinstance(value, bool) else float(value) for key, value in values.items()}
            )
        self.run(steps_taken(self.optimizer))


def _plain(value: float | bool) -> float | bool | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity
