"""WeightController: brings single weights to a `SparsityTarget`. λ and the cutoff are found from the weights as they
are, again and again.

With x of `decay.py`, and no gradients, x falls by (2−p)·λ·α a step. So the λ by which the share s of the weights is
zero h steps from now is `x_s / ((2−p)·Σα)`, with x_s the quantile of the present x at s and Σα the learning rates of
those steps. Gradients push back. Hence λ is found anew every `update_every` steps, for the share that the plan has so
many steps later (a receding horizon: no gains to tune). Until the window ends nothing is lost: weights below the
threshold are latent, or near zero with regrowth.
"""

from __future__ import annotations

import logging
import math
from itertools import groupby
from statistics import median
from typing import Any

from lp_dist.errors import UsageError
from lp_dist.optim.hyperparameters import Phase
from lp_dist.optim.parameter_map import ParameterMap
from lp_dist.reconstruction.survivors import Reconstruction
from lp_dist.sharding.deepspeed import update_copies
from lp_dist.sharding.shards import Shard, without_gradient
from lp_dist.sparsity.census import Census, ZeroCount, census, count_copies
from lp_dist.sparsity.nm_blocks import scored_blocks
from lp_dist.sparsity.quantiles import (
    MAX_SALIENCY,
    ScoredSlice,
    count_not_finite,
    fraction_at_or_below,
    restore_latent,
    sample_stride,
    thresholds_at,
    zero_at_or_below,
)
from lp_dist.targets.controller import Controller, RunContext, weight_decay_for
from lp_dist.targets.feasibility import check_reachable
from lp_dist.targets.target import PatternTarget, WeightTarget

logger = logging.getLogger(__name__)

# A parameter takes part in the target by a weight_decay above 0; this one, until λ is found. Also the least λ that is
# set: zeros absorb only while λ is above 0.
LEAST_WEIGHT_DECAY = 1e-30
_SAVED = ("weight_decay", "cutoff", "regrowth_below", "latent")


class WeightController(Controller):
    """Brings the optimizer's weights to a target; made by `lp_dist.attach`. Collective, as `Controller`.

    All that it sets lies in the parameter map, and nothing in the param groups, into which checkpoint loaders write.

    Args:
        target: what to reach.
        run: what is known of the run.
        parameter_map: the optimizer's.
        candidates: shards of the parameters that may decay.
        left_out: names of those that start at zero, and don't decay.
        stacks: names of those whose first dimension counts experts.
        without_blocks: weights of parameters that can't have the target's pattern, and don't decay.
        reconstruction: as of `Controller`.
    Raises:
        UsageError: the target can't be reached in this run; the message says what to change.
    """

    state_version = 7
    subject = "weights"
    measured_key = "lp/measured"
    target: WeightTarget | PatternTarget

    def __init__(
        self,
        target: WeightTarget | PatternTarget,
        run: RunContext,
        parameter_map: ParameterMap,
        candidates: list[Shard],
        left_out: list[str],
        stacks: frozenset[str] = frozenset(),
        without_blocks: int = 0,
        reconstruction: Reconstruction | None = None,
    ) -> None:
        super().__init__(target, run, reconstruction)
        self._without_blocks = without_blocks
        self._phase: Phase | None = None
        self.parameter_map, self.candidates, self.left_out = parameter_map, candidates, left_out
        self._stacks = stacks
        # What had no gradient when the window began: {name: indices of experts; None: the whole parameter}.
        self._unused: dict[str, list[int] | None] = {}
        self._told_late = False
        # Of which weights were removed at the last update: their zeros stay, and their survivors train freely.
        self._frozen: set[str] = set()
        self._divide()
        # What the script overrides for single parameters holds under a target too.
        self._script_overrides = {shard.name: parameter_map.values(shard.name) for shard in candidates}
        forms = {shard.name: self._values(shard) for shard in self.shards}
        taken = None if run.steps.is_unsure else run.steps.taken
        check_reachable(target, run.optimizer, self.shards, forms, self.window, run.total_parameters, taken, run.rates)
        self._plan_updates(
            bool(target.latent_windows) or any(form.get("precondition") for form in forms.values()),
            slow=any(form["p"] > 0.5 for form in forms.values()),
        )

    @property
    def sparsity(self) -> float:
        """Share of zeros to end with, of the weights that decay."""
        assert self.target.sparsity is not None
        if self.target.relative_to != "all":
            return self.target.sparsity
        # Not kept, since a checkpoint says which of the candidates are left out.
        return self.target.sparsity * self.run.total_parameters / sum(shard.shape.numel() for shard in self.shards)

    @property
    def param_groups(self) -> set[int]:
        return {shard.group for shard in self.shards}

    def _divide(self) -> None:
        """Tells apart what decays and what has had no gradient (`_unused`), expert by expert."""
        self.shards, self._unused_shards = [], []
        for shard in self.candidates:
            unused = self._unused.get(shard.name, [])
            if shard.name in self.left_out:
                continue
            if unused is None:
                self._unused_shards.append(shard)
            elif not unused:
                self.shards.append(shard)
            else:
                runs = [
                    (is_unused, list(run)) for is_unused, run in groupby(range(shard.shape[0]), unused.__contains__)
                ]
                sections = [(is_unused, shard.section_of(run[0], run[-1] + 1)) for is_unused, run in runs]
                for is_unused, section in sections:
                    (self._unused_shards if is_unused else self.shards).append(section)
                self.parameter_map.divide(shard.name, [section.section for _, section in sections if section.section])

    # -- around a step --------------------------------------------------------

    def begin(self, t: int) -> None:
        if t < self.window.start:
            self._zeros()  # what can't be reached is known now
        self._set_form()
        self._set_phase(self._phase_at(t))
        super().begin(t)

    def prepare_step(self, t: int) -> None:
        self._set_phase(self._phase_at(t))
        super().prepare_step(t)

    def _phase_at(self, t: int) -> Phase:
        """The phase of step t. The step after the final pruning is frozen in any case."""
        start, end, _ = self.window
        if t < start:
            # Without regrowth and latent weights zero absorbs, before the window as in it.
            keeps_zeros = not (self.target.regrowth or self.target.latent_windows)
            return Phase.FROZEN if keeps_zeros else Phase.OFF
        if t < end - 1:
            return Phase.DECAY
        return Phase.FROZEN if t < end or self.target.freeze else Phase.OFF

    def _set_phase(self, phase: Phase) -> None:
        if phase is self._phase:  # at most steps, and each change of the map has all tensors divided anew
            return
        for shard in self.shards:
            is_frozen = phase is Phase.DECAY and shard.name in self._frozen
            self.parameter_map.set(shard.name, phase=Phase.FROZEN.value if is_frozen else phase.value)
        self._phase = phase

    def _set_form(self) -> None:
        """Gives the parameters the target's p, precondition and pattern, but for what the script overrides."""
        for shard in self.shards:
            form = {"weight_decay": LEAST_WEIGHT_DECAY, **self.target.form()}
            self.parameter_map.set(shard.name, **{**form, **_own_form(self._script_overrides[shard.param_name])})

    def zero_share(self) -> float:
        counts = count_copies(self.shards)
        return sum(count.zeros for count in counts) / sum(count.elements for count in counts)

    def _zeros(self) -> dict[str, ZeroCount]:
        """Zeros and elements of each scope before the window; raises UsageError where there are more than the target
        asks for.
        """
        counts = self._by_scope(census(self.shards))
        # Half of the weights can be zero without any 2:4 block.
        sparser = [] if self.target.pattern else [(s, n.zeros / n.elements) for s, n in counts.items()]
        for scope, share in sparser:
            if share >= self.sparsity:
                way_out = (
                    ", leave it out by an override {\"weight_decay\": 0}, or use scope='global'"
                    if self.target.scope == "layer"
                    else ""
                )
                raise UsageError(
                    f"{scope} is {share:.1%} zeros already, and the target is {self.sparsity:.1%}; ask for"
                    f" more{way_out}"
                )
        return counts

    def _begin(self) -> None:
        self._leave_out_unused()
        counts = self._zeros()
        self.before = {scope: count.zeros / count.elements for scope, count in counts.items()}
        if self.target.pattern:  # a zero that is kept in its block is no part of it
            self.before = fraction_at_or_below(self.scored_slices(all_local=False), dict.fromkeys(counts, 0.0))
        if self.target.latent_windows:
            # What survivors have taken over is not to return.
            moving = {} if self.reconstruction is None else self.reconstruction.layers
            for shard in self.shards:
                if shard.name not in moving:
                    self.parameter_map.set(shard.name, latent=True)
            # The momentum of zeros that were there is no latent weight.
            restore_latent(self.scored_slices(), dict.fromkeys(self.before, math.inf))
        elements = sum(count.elements for count in counts.values())
        self._log_plan(f"{100 * self.sparsity:.2f} % of {elements:,} weights{self._of_all_candidates(self.sparsity)}")

    def _leave_out_unused(self) -> None:
        """Keeps dense what has had no gradient so far: the loss says nothing of its weights, so that they would be
        zero first. Collective.

        Raises:
            UsageError: nothing is left, or too little for the target.
        """
        # In the blocks of a pattern as many become zero everywhere.
        self._unused = without_gradient(self.shards, self.run.optimizer, () if self.target.pattern else self._stacks)
        if not self._unused:
            return
        for shard in self.shards:
            self._give_back(shard.name)
        self._divide()
        self._set_form()
        phase, self._phase = self._phase, None
        self._set_phase(phase or Phase.OFF)
        left, elements = self.left_dense, sum(shard.shape.numel() for shard in self.shards)
        if not elements or self.sparsity >= 1.0:
            raise UsageError(
                f"when the window of the target begins, at step {self.window.start},"
                f" {'none' if not elements else f'only {elements:,}'} of the weights that are to decay"
                f" {'has' if not elements else 'have'} had a gradient, and the target needs more: {left} have had"
                " none. Train on data that reaches them, begin the window later (start), or ask for less"
            )
        logger.warning(
            "%s have had no gradient when the window begins, and stay dense: the loss says nothing of their weights."
            " The target holds of the other %s weights. If they are to decay all the same, begin the window when they"
            " have gradients (start)",
            left,
            f"{elements:,}",
        )

    @property
    def left_dense(self) -> str:
        experts = [shard for shard in self._unused_shards if shard.section is not None]
        params = [shard.name for shard in self._unused_shards if shard.section is None]
        count = sum(shard.shape[0] for shard in experts)
        parts = []
        if params:
            parts.append(f"{len(params)} parameter{'s' * (len(params) > 1)} (such as {params[0]})")
        if experts:
            parts.append(f"{count} expert{'s' * (count > 1)} of stacked parameters (such as {experts[0].name})")
        return " and ".join(parts)

    @property
    def unused_weights(self) -> int:
        """How many weights stay dense since they had no gradient when the window began."""
        return sum(shard.shape.numel() for shard in self._unused_shards)

    def _of_all_candidates(self, share: float) -> str:
        """What a share of the weights that decay is of all that may, in words; "" where these are the same."""
        others = {"had no gradient": self.unused_weights, "can have no blocks": self._without_blocks}
        elements = sum(shard.shape.numel() for shard in self.shards)
        total = elements + sum(others.values())
        if total == elements:
            return ""
        why = " and ".join(f"{count:,} {reason}" for reason, count in others.items() if count)
        return f" ({100 * share * elements / total:.2f} % of {total:,}, of which {why})"

    def _tell_late_gradients(self) -> None:
        """Says once that something stays dense which has gradients now. Collective."""
        if not self._unused_shards or self._told_late:
            return
        still = without_gradient(self._unused_shards, self.run.optimizer)
        late = [shard.name for shard in self._unused_shards if shard.name not in still]
        if late:
            self._told_late = True
            logger.warning(
                "%d of the parameters and experts that had no gradient when the window began have one now, such as"
                " %s: they stay dense. If they are to decay, begin the window later (start)",
                len(late),
                late[0],
            )

    def update(self, t: int) -> None:
        """λ and cutoff of each scope, for the share that the plan has at the next update, or now where weights are
        removed at once. From a sample, since the next update corrects it.
        """
        self._tell_late_gradients()
        horizon = min(self.update_every, self.window.end - 1 - t)
        measured = census(self.shards)
        elements = {scope: count.elements for scope, count in self._by_scope(measured).items()}
        planned = self.planned_share(self._planned_step(t, horizon))
        shares = {scope: before + (self.sparsity - before) * planned for scope, before in self.before.items()}
        sample = self.scored_slices(all_local=False, elements=elements)
        self._refuse_not_finite(t, sample)
        near_zero = self._near_zero(sample, elements)
        ranks = {scope: round(shares[scope] * count) for scope, count in elements.items()}
        thresholds = thresholds_at(sample, ranks, passes=2, elements=elements)
        self._frozen = {*self._remove_below(thresholds)}
        rates = self.run.rates.ahead(horizon)
        # Latent weights are zero already. They are forgotten by the same decay, but over the window and not until the
        # next update.
        length = self.window.end - self.window.start
        slowness = (self.target.latent_windows or 0.0) * length / horizon
        weight_decays = []
        for shard in self.shards:
            if shard.name in self._frozen:
                weight_decays.append(LEAST_WEIGHT_DECAY)
                self.parameter_map.set(
                    shard.name, weight_decay=LEAST_WEIGHT_DECAY, regrowth_below=0.0, phase=Phase.FROZEN.value
                )
                continue
            x, is_latent = thresholds[self._scope(shard)], self.keeps_latent(shard)
            slower = slowness if is_latent else 1.0
            learning_rates = slower * sum(rate[shard.group] for rate in rates)
            weight_decay = weight_decay_for(x, self._values(shard)["p"], learning_rates, LEAST_WEIGHT_DECAY)
            self.parameter_map.set(
                shard.name,
                weight_decay=weight_decay,
                cutoff=math.inf if self.target.cap is None else self.target.cap * x,
                regrowth_below=self.target.regrowth * x if is_latent or self.allows_regrowth(t) else 0.0,
                phase=self._phase_at(t).value,
            )
            weight_decays.append(weight_decay)
        self._set_logs(t, measured, weight_decays, near_zero)

    def _remove_below(self, thresholds: dict[str, float]) -> list[str]:
        """Removes at once what is at or below the threshold of its scope, and moves the survivors; where they can't
        move, weights are left to their decay.

        Args:
            thresholds: by scope.
        Returns:
            The names of the parameters of which was removed.
        """
        if self.reconstruction is None:
            return []
        if max(thresholds.values()) <= 0.0:
            self.reconstruction.remove_nothing()
            return []
        by_name = {shard.name: shard for shard in self.shards}
        done = self.reconstruction.remove(
            by_name, lambda name: zero_at_or_below(self.scored_slices(shards=[by_name[name]]), thresholds)
        )
        if done:
            update_copies(self.run.engine_optimizer)
        return done

    def _refuse_not_finite(self, t: int, slices: list[ScoredSlice]) -> None:
        """Raises RuntimeError, on every rank, where a weight or Adam's second moment of it is nan or infinite."""
        if not count_not_finite(slices):
            return
        by_name = [
            (shard.name, count_not_finite([ScoredSlice.from_shard("all", shard, self._values(shard), False)]))
            for shard in self.shards
        ]
        spoiled = [(name, count) for name, count in by_name if count]
        raise RuntimeError(
            f"at step {t} {spoiled[0][1]:,} weights of {spoiled[0][0]}, or Adam's second moments of them, are nan or"
            f" infinite, and {len(spoiled) - 1} more parameters have some: no threshold can be found, and what was"
            " trained is spoiled. Go on from the last checkpoint with a lower learning rate, or with clipped gradients"
        )

    def _near_zero(self, sample: list[ScoredSlice], elements: dict[str, int]) -> float | None:
        """Share of the weights whose saliency is at or below that of regrowth at the last update: zeros, and what is
        as good as zero. None if there is no regrowth, or all of them are zero.
        """
        limits: dict[str, float] = {}
        for shard in self.shards:  # where survivors move there is none
            limit = self.parameter_map.values(shard.name).get("regrowth_below", 0.0)
            limits[self._scope(shard)] = max(limits.get(self._scope(shard), 0.0), limit)
        if not any(limits.values()) or self.target.latent_windows:
            return None
        below = fraction_at_or_below(sample, limits)
        return sum(below[scope] * count for scope, count in elements.items()) / sum(elements.values())

    def _prune(self) -> None:
        """Prunes what remains at once, by the same saliency (of a pattern all that is not kept), in the masters and in
        an engine's copies of them.
        """
        ranks = {
            scope: round(self.sparsity * count.elements)
            for scope, count in self._by_scope(census(self.shards)).items()
        }
        self._tell_late_gradients()
        self._refuse_not_finite(self.window.end - 1, self.scored_slices(all_local=False))
        if self.target.pattern:
            thresholds = dict.fromkeys(ranks, MAX_SALIENCY)
        else:
            thresholds = thresholds_at(self.scored_slices(all_local=False), ranks, passes=3)
        restore_latent(self.scored_slices(), thresholds)
        before = self._by_scope(census(self.shards))
        done = self._remove_below(thresholds)
        # Not those of which it was removed: a survivor may have moved below the threshold.
        others = [shard for shard in self.shards if shard.name not in done]
        zero_at_or_below(self.scored_slices(shards=others), thresholds)
        for shard in self.shards:
            self.parameter_map.set(shard.name, latent=False)
        update_copies(self.run.engine_optimizer)
        measured = census(self.shards)
        dead = [shard.name for shard, count in zip(self.shards, measured.counts) if count.zeros == count.elements]
        if dead:
            logger.warning(
                "%d matrices are all zeros now, such as %s: nothing passes through them any more. One threshold for"
                " all takes most where the loss is least sensitive; scope='layer' gives each matrix the same share,"
                " and an override with weight_decay 0 leaves one dense",
                len(dead),
                dead[0],
            )
        after = self._by_scope(measured)
        total = sum(count.elements for count in after.values())
        zeros_before, zeros_after = (sum(count.zeros for count in counts.values()) for counts in (before, after))
        shares = {scope: count.zeros / count.elements for scope, count in after.items()}
        worst = max(shares, key=lambda scope: abs(shares[scope] - self.sparsity))
        self._set_final_pruning(
            zeros_before / total,
            zeros_after / total,
            f"furthest from {100 * self.sparsity:.2f} % is {worst}, at {100 * shares[worst]:.2f} %"
            + self._of_all_candidates(zeros_after / total),
        )
        weight_decays = [self.parameter_map.values(shard.name)["weight_decay"] for shard in self.shards]
        self._set_logs(self.window.end - 1, measured, weight_decays)

    def keeps_latent(self, shard: Shard) -> bool:
        """Whether zeros of the parameter may be latent weights now."""
        return bool(self.parameter_map.values(shard.name).get("latent"))

    # -- what is measured -----------------------------------------------------

    def _scope(self, shard: Shard) -> str:
        return shard.param_name if self.target.scope == "layer" else "all"

    def _values(self, shard: Shard) -> dict[str, Any]:
        """The hyperparameters with which a parameter decays in the window."""
        group = self.run.optimizer.param_groups[shard.group]
        return {**group, **self.target.form(), **_own_form(self.parameter_map.values(shard.name))}

    def scored_slices(
        self, all_local: bool = True, elements: dict[str, int] | None = None, shards: list[Shard] | None = None
    ) -> list[ScoredSlice]:
        """The weights with what their saliency is computed from.

        Args:
            all_local: all weights on this rank, also those that another rank counts.
            elements: of each scope, for a sample; None: all weights.
            shards: of these alone; None: of all that decay.
        """
        scoped = [(self._scope(shard), shard) for shard in (self.shards if shards is None else shards)]
        if self.target.pattern:
            split_blocks = self.parameter_map.split_blocks
            input_dim = self.parameter_map.input_dim
            return scored_blocks(
                scoped, self._values, self.target.pattern, split_blocks, input_dim, all_local, elements
            )
        return [
            ScoredSlice.from_shard(
                scope,
                shard,
                self._values(shard),
                all_local,
                sample_stride(elements[scope], shard.shape[-1] if shard.shape else 1) if elements else 1,
                self.keeps_latent(shard),
            )
            for scope, shard in scoped
        ]

    def _by_scope(self, measured: Census) -> dict[str, ZeroCount]:
        """Zeros and elements of each scope."""
        counts: dict[str, ZeroCount] = {}
        for shard, count in zip(self.shards, measured.counts):
            sum_before = counts.get(self._scope(shard), ZeroCount(0, 0))
            counts[self._scope(shard)] = ZeroCount(
                sum_before.zeros + count.zeros, sum_before.elements + count.elements
            )
        return counts

    def _set_logs(self, t: int, measured: Census, weight_decays: list[float], near_zero: float | None = None) -> None:
        counts = self._by_scope(measured)
        total = sum(count.elements for count in counts.values())
        first = sum(self.before[scope] * count.elements for scope, count in counts.items()) / total
        share = sum(count.zeros for count in counts.values()) / total
        self.logs = {
            "lp/target": self.sparsity,
            "lp/plan": first + (self.sparsity - first) * self.planned_share(t),
            "lp/measured": share,
            "lp/near_zero": share if near_zero is None else near_zero,
            "lp/lambda_min": min(weight_decays),
            "lp/lambda_median": median(weight_decays),
            "lp/lambda_max": max(weight_decays),
            "lp/dead_channels": measured.dead_rows / max(1, measured.rows),
        }

    # -- checkpoints ----------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        values = {
            shard.name: {
                key: _plain(value) for key, value in self.parameter_map.values(shard.name).items() if key in _SAVED
            }
            for shard in self.shards
        }
        return {
            "left_out": list(self.left_out),
            "without_gradient": dict(self._unused),
            "told_late": self._told_late,
            "frozen": sorted(self._frozen),
            "values": values,
        }

    def _check_own_state(self, state: dict[str, Any]) -> None:
        unused = state["without_gradient"]
        known = {shard.name for shard in self.candidates} - set(state["left_out"])
        in_values = {name.partition("[")[0] for name in state["values"]}
        entire = {name for name, indices in unused.items() if indices is None}
        difference = sorted((in_values ^ (known - entire)) | (unused.keys() - known))
        if difference:
            raise UsageError(
                f"other parameters decay than in the checkpoint, {difference[0]!r} among them; use the same names and"
                " overrides"
            )

    def _load_own_state(self, state: dict[str, Any]) -> None:
        for shard in self.candidates:
            self._give_back(shard.name)
        self.left_out, self._phase = list(state["left_out"]), None
        self._unused, self._told_late = dict(state["without_gradient"]), state["told_late"]
        self._frozen = {*state["frozen"]}
        self._divide()
        self._set_form()
        for name, values in state["values"].items():
            restored = {key: value if isinstance(value, bool) else float(value) for key, value in values.items()}
            self.parameter_map.set(name, **restored)

    def _give_back(self, name: str) -> None:
        """Gives a parameter as a whole back what the script has for it."""
        self.parameter_map.divide(name, [])
        given_back = dict.fromkeys((*self.target.form(), *_SAVED, "phase"))
        self.parameter_map.set(name, **{**given_back, **self._script_overrides[name]})


def _own_form(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key in ("p", "precondition")}


def _plain(value: float | bool) -> float | bool | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity
