"""What the controllers of single weights and of weight groups have in common: one plan, one λ formula, one state."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.reconstruction.movement import STILL_LEARNING, Projections
from lp_dist.reconstruction.survivors import Reconstruction
from lp_dist.targets.feasibility import Window, check_rates, regrowth_end, update_interval
from lp_dist.targets.lr_lookahead import LearningRates
from lp_dist.targets.run_steps import RunSteps
from lp_dist.targets.schedule import window_steps
from lp_dist.targets.target import SparsityTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """What a controller knows of the run.

    Args:
        optimizer: the inner optimizer, which steps.
        engine_optimizer: an engine's optimizer around it, or that itself.
        rates: the learning rates ahead.
        total_steps: optimizer steps of the run.
        total_parameters: elements of all parameters of the model.
        steps: counts the optimizer steps of the run.
    """

    optimizer: Optimizer
    engine_optimizer: Any
    rates: LearningRates
    total_steps: int
    total_parameters: int
    steps: RunSteps


def weight_decay_for(x: float, p: float, learning_rates: float, least: float = 0.0) -> float:
    """The λ by which what has the saliency `x` is zero after steps whose learning rates sum up to `learning_rates`.

    Without gradients x falls by (2−p)·λ·α a step (algorithm: `decay.py`), so λ = x / ((2−p)·Σα).

    Args:
        x: the threshold.
        p: exponent of the norm, below 2.
        learning_rates: Σα.
        least: the smallest λ to return; also where Σα is 0.
    """
    if not learning_rates > 0.0:
        return least
    return min(max(x / ((2.0 - p) * learning_rates), least), 1e30)


class Controller(ABC):
    """Brings weights to a target in a window of a run. Collective: every rank does the same at the same step.

    A subclass gives `_begin`, which fills `before`; `update`, which finds λ and cutoff; `_prune`, the final pruning,
    which sets `final_pruning`; and its own part of the state.

    Args:
        target: what to reach.
        run: what is known of the run.
        reconstruction: moves survivors when weights are removed; None: they stay where they are.
    Attributes:
        window: the steps in which weights become zero.
        before: what was zero of each scope when the window began.
        final_pruning: shares that were zero "before" and "after" it, and their difference, "pruned_at_end"; None until
            then.
        logs: target, plan, what was measured at the last update, and λ.
        last_step: steps of the run at the last call; -1 before the first.
    Raises:
        UsageError: the window holds no step of the run.
    """

    state_version: int
    subject: str  # whose target it is, for messages
    measured_key: str  # of the share of zeros, in `logs`

    def __init__(self, target: SparsityTarget, run: RunContext, reconstruction: Reconstruction | None = None) -> None:
        self.target, self.run, self.reconstruction = target, run, reconstruction
        start, end = window_steps(target.start, target.end, run.total_steps)
        self.window = Window(start, min(end, run.total_steps), run.total_steps)
        self.before: dict[str, float] = {}
        self.last_step = -1
        self.logs: dict[str, float] = {}
        self.final_pruning: dict[str, float] | None = None
        # Of the weights after the first step, from which it follows how far they have moved when the window begins.
        self._at_first: Projections | None = None

    def _plan_updates(self, needs_moments: bool, slow: bool) -> None:
        """Sets the steps of the updates, and the one at which regrowth ends.

        Args:
            needs_moments: whether the saliency needs Adam's moments, of which there are none before the first step.
            slow: as of `regrowth_end`.
        """
        if needs_moments:
            self.window = self.window._replace(start=max(1, self.window.start))
        self.regrowth_end = regrowth_end(self.window, slow)
        self.update_every = update_interval(self.target, self.window, self.reconstruction is not None)
        self.next_update = self.window.start  # optimizer steps at the next update

    @property
    @abstractmethod
    def param_groups(self) -> set[int]:
        """Indices of the param groups that decay to the target."""

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Share to end with, of what the controller counts."""

    @property
    @abstractmethod
    def left_dense(self) -> str:
        """What stays dense since it had no gradient when the window began, in words; "" where there is none."""

    # -- around a step --------------------------------------------------------

    def after_step(self) -> None:
        """Call it after each optimizer step (and the scheduler's); a step that was skipped, or a micro-batch, changes
        nothing.
        """
        t = self.run.steps.taken
        if t != self.last_step:
            self.check_begun(t)
            self.prepare_step(t)

    def check_begun(self, t: int) -> None:
        """Raises UsageError if the window began before step t, and it was not prepared here, nor loaded."""
        if t > self.window.start and not self.before:
            raise UsageError(
                f"the run is at step {t}, and the window of the {self.subject} began at {self.window.start}, but the"
                " target's own state is not here. To go on with a run load it: load_state_dict() of what attach"
                " returned, after the optimizer's state (a DeepSpeed engine does so by itself, where load_checkpoint"
                " comes after attach). To begin a target here, begin its window later: start, end. A loop has to call"
                " after_step() after each optimizer step, from the first on"
            )

    @property
    def progress(self) -> str:
        """Where the target stood at the last call, in words."""
        measured = self.logs.get(self.measured_key)
        share = "nothing was counted yet" if measured is None else f"{measured:.2%} were zero at the last update"
        return (
            f"of the {self.subject} {self.sparsity:.2%} were to be zero by step {self.window.end}, and at step"
            f" {self.last_step} {share}"
        )

    @property
    def is_in_window(self) -> bool:
        """Whether weights are being brought to the target: since its window has begun, up to the final pruning."""
        return bool(self.before) and self.final_pruning is None

    @property
    def is_due(self) -> bool:
        """Whether the next step may begin with an update or the final pruning."""
        upcoming = self.last_step + 1
        return self.final_pruning is None and upcoming >= min(self.next_update, self.window.end - 1)

    def begin(self, t: int) -> None:
        """Prepares the first step here, t, where no state is loaded.

        Raises:
            UsageError: the window began before it.
        """
        self.check_begun(t)
        self.prepare_step(t)

    def prepare_step(self, t: int) -> None:
        """Prepares step t (from 0)."""
        self.last_step = t
        self.run.rates.note(t)
        if self.reconstruction is not None and self.reconstruction.sample.is_open:
            self.reconstruction.sample.steps += 1
        self._advance(t)
        if self.reconstruction is not None:
            upcoming = min(self.next_update, self.window.end - 1)
            to_update = upcoming - t if self.final_pruning is None else None
            self.reconstruction.prepare_step(to_update, self.update_every)

    def _advance(self, t: int) -> None:
        """What falls to step t: the beginning of the window, an update, the final pruning."""
        if not self.before:
            self._decide_on_survivors(t)
        if t < self.window.start:
            return
        if not self.before:
            first, end = self.window[:2]
            if not self.run.rates.is_stepped_each_step:  # else it was looked at before the run
                check_rates(self.param_groups, first, end, self.run.rates.ahead(end - 1 - t), self.run.rates.is_sure)
            self._begin()
        if t >= self.window.end - 1:
            if self.final_pruning is None:
                self._prune()
        elif t >= self.next_update:
            self.update(t)
            self.next_update = t + self.update_every - (t - self.window.start) % self.update_every

    def _decide_on_survivors(self, t: int) -> None:
        """Notes where the weights are after the first step, and lets survivors stay if these have moved far from there
        when the window begins, or if no inputs of their layers can be seen. (Not before the first step, since weights
        may be loaded until then.) Collective.
        """
        if self.reconstruction is None or t < 1:
            return
        if t >= self.window.start and self.reconstruction.lacks_inputs():
            self._let_survivors_stay()
        elif self.target.reconstruct is not None:
            return
        elif self._at_first is None:
            self._at_first = self.reconstruction.project()
        elif t >= self.window.start:
            moved, self._at_first = self.reconstruction.project().moved_since(self._at_first), None
            stay = moved > STILL_LEARNING
            logger.info(
                "weights have moved by %.2g of their norm before the window: survivors %s",
                moved**0.5,
                "stay where they are, as they do from scratch (reconstruct=True moves them)" if stay else "move",
            )
            if stay:
                self._let_survivors_stay()

    def _let_survivors_stay(self) -> None:
        self.release()
        self.reconstruction = None
        self.update_every = update_interval(self.target, self.window, moves=False)

    def release(self) -> None:
        """Takes its hooks off the model."""
        if self.reconstruction is not None:
            self.reconstruction.sample.close()

    def finish(self) -> None:
        """Prunes what is missing if the run has ended before its window did, as it may where fp16 has skipped steps;
        else counts once more, since weights may have been loaded or set after the final pruning. Collective.
        """
        if self.final_pruning is None:
            logger.warning(
                "the run ended after %d steps that were really taken, before the window of the %s did at %d; pruning"
                " what is missing now",
                self.run.steps.taken,
                self.subject,
                self.window.end,
            )
            if not self.before:
                self._begin()
            self._prune()
            self.release()
            return
        said, counted = self.logs[self.measured_key], self.zero_share()
        self.logs = {**self.logs, self.measured_key: counted}
        if counted < said:
            logger.warning(
                "%.2f %% of the %s are zero now, and %.2f %% were after the final pruning: %s",
                100 * counted,
                self.subject,
                100 * said,
                "freeze=False lets zeros grow again"
                if not self.target.freeze
                else "other weights were loaded since, such as by load_best_model_at_end, or something else sets them",
            )

    def warn_if_unfinished(self) -> None:
        """Says so where the run ends before its window does, with what is zero, counted now. Collective."""
        if self.final_pruning is None:
            logger.warning(
                "the run ends after %d steps, before the window of the %s does at %d of %d: %.2f %% are zero, of the"
                " %.2f %% to end with. Nothing was pruned. Go on from the last checkpoint, or set the number of steps"
                " to what the run takes; finish() of what attach returned prunes the rest at once",
                self.run.steps.taken,
                self.subject,
                self.window.end,
                self.window.total,
                100 * self.zero_share(),
                100 * self.sparsity,
            )

    @abstractmethod
    def zero_share(self) -> float:
        """Share that is zero now in what a save writes, of what the controller counts; over all ranks. Collective."""

    def _planned_step(self, t: int, horizon: int) -> int:
        """The step whose plan an update at step t brings about: what decays has so many steps for it, and what is
        removed at once is gone now. Collective.
        """
        removes = self.reconstruction is not None and self.reconstruction.has_inputs()
        return t if removes else t + horizon

    def planned_share(self, t: int) -> float:
        """Share of the way to the target that the plan has after t steps."""
        return self.target.planned_share((t - self.window.start) / (self.window.end - 1 - self.window.start))

    def allows_regrowth(self, t: int) -> bool:
        """Whether weights that the update at step t makes small may grow again."""
        return t < self.regrowth_end and t + self.update_every < self.window.end - 1

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def update(self, t: int) -> None:
        """Sets λ and the cutoff at step t for what the plan has at the next update."""

    @abstractmethod
    def _prune(self) -> None: ...

    # -- log lines ------------------------------------------------------------

    def _log_plan(self, to_prune: str) -> None:
        start, end, total = self.window
        logger.info(
            "target: prune %s, steps %d–%d of %d, λ updated every %d steps",
            to_prune,
            start,
            end,
            total,
            self.update_every,
        )
        if self.reconstruction is not None:
            self.reconstruction.tell_reasons()

    def _set_final_pruning(self, before: float, after: float, details: str) -> None:
        """Notes what the final pruning did, counted before and after it, and logs it."""
        self.final_pruning = {"before": before, "after": after, "pruned_at_end": after - before}
        logger.info(
            "target of the %s: %.2f %% became zero in the window, %.2f %% pruned in the final step; %s",
            self.subject,
            100 * before,
            100 * (after - before),
            details + self._moves(),
        )

    def _moves(self) -> str:
        """How often survivors were moved, in words."""
        if self.reconstruction is None:
            return ""
        times = self.reconstruction.moved
        return f"; survivors were moved {times} times" if times else "; no survivors were moved: no inputs were seen"

    # -- checkpoints ----------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types, the same on every rank. Survivors move by no inputs of before it, as in a run that goes on
        from there; it is enough that one rank calls it.
        """
        if self.reconstruction is not None:
            self.reconstruction.sample.note_save()
        return {
            "version": self.state_version,
            # A run may go on with another bound on the memory.
            "target": {key: value for key, value in self.target.described().items() if key != "reconstruct_memory"},
            "window": [*self.window, self.update_every],
            "before": dict(self.before),
            "next_update": self.next_update,
            "final_pruning": self.final_pruning,
            "logs": dict(self.logs),
            "at_first": None if self._at_first is None else self._at_first.as_list(),
            "moves": self.reconstruction is not None,
            "moved": 0 if self.reconstruction is None else self.reconstruction.moved,
            "sampled_steps": None if self.reconstruction is None else self.reconstruction.sampled_steps,
            **self._own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was. Call it after the optimizer's state was loaded.

        Raises:
            UsageError: it is of another target, another version, or of a run of another length whose window is open.
        """
        if state.get("version") != self.state_version:
            raise UsageError(
                f"the state of the target of {self.subject} is of version {state.get('version')!r}, and this lp_dist"
                f" reads {self.state_version}; install the one that wrote it"
            )
        if not state["moves"] and self.reconstruction is not None:
            self._let_survivors_stay()
        current = self.state_dict()
        window = Window(*state["window"][:3])
        if state["final_pruning"] is not None and window != self.window:
            # More steps after the end: only the phase after the window is left, and it is as in the first run.
            logger.info(
                "the target of the %s was reached in a run of %d steps; its zeros are kept in the steps after it",
                self.subject,
                window.total,
            )
            self.window, current["window"] = window, state["window"]
        for key in ("target", "window", *self._compared_keys):
            if current[key] != state[key]:
                raise UsageError(
                    f"the checkpoint was trained for another {key} of {self.subject} than the script asks for:"
                    f" {state[key]}, and now {current[key]}; go on with the same target and as many steps, or start"
                    " anew from the saved model without its optimizer state"
                )
        self._check_own_state(state)
        self.before, self.next_update = dict(state["before"]), state["next_update"]
        self.final_pruning, self.logs = state["final_pruning"], dict(state["logs"])
        self._at_first = None if state["at_first"] is None else Projections.from_list(state["at_first"])
        if self.reconstruction is not None:
            self.reconstruction.moved, self.reconstruction.sampled_steps = state["moved"], state["sampled_steps"]
        self._load_own_state(state)
        self.prepare_step(self.run.steps.taken)
        if self.reconstruction is not None:
            self.reconstruction.sample.clear()

    _compared_keys: tuple[str, ...] = ()  # of the own state, which a checkpoint must agree on

    @abstractmethod
    def _own_state(self) -> dict[str, Any]: ...

    def _check_own_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Raises UsageError for a state that does not fit; changes nothing."""

    @abstractmethod
    def _load_own_state(self, state: dict[str, Any]) -> None: ...
