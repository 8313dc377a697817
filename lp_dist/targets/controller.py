"""Planned: by which steps of a run a target is reached, whatever it is a target of: before the window, looks in it,
and the last threshold.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer

from lp_dist.optim.state import steps_taken
from lp_dist.targets.feasibility import every_of, grace_until
from lp_dist.targets.schedule import window_steps
from lp_dist.targets.target import SparsityTarget

logger = logging.getLogger(__name__)


class Planned(ABC):
    """What `Control` and `GroupControl` have in common. Collective: every rank does the same at the same step.

    A subclass gives `_begin`, which fills `before`; `_look`, which finds λ and cutoff; and `_close`, which sets
    `closed`.

    Args:
        target: what to reach. optimizer: the live one. total: optimizer steps of the run. lr_scheduler: gives the
            learning rates ahead.
        wrapper: the engine's optimizer around the live one, or that itself.
    Raises:
        UsageError: the window holds no step of the run.
    """

    window = "window"  # what to call it

    def __init__(
        self, target: SparsityTarget, optimizer: Optimizer, total: int, lr_scheduler: Any, wrapper: Any
    ) -> None:
        self.target, self.optimizer, self.total, self.lr_scheduler, self.wrapper = (
            target,
            optimizer,
            total,
            lr_scheduler,
            wrapper,
        )
        self.start, self.end = window_steps(target.start, target.end, total)
        self.end = min(self.end, total)
        self.before: dict[str, float] = {}  # what was zero of each scope when the window began
        self.seen = -1  # optimizer steps at the last call
        self.logs: dict[str, float] = {}
        self.closed: dict[str, float] | None = None

    def _plan(self, needs_moments: bool, slow: bool) -> None:
        """Sets the steps at which it looks, and up to which what fades may come back.

        needs_moments: Adam's, which there are none of before the first step. slow: as of `grace_until`.
        """
        self.start = max(1, self.start) if needs_moments else self.start
        self.grace_ends, self.every = (
            grace_until(self.start, self.end, slow),
            every_of(self.target, self.start, self.end),
        )
        self.next = self.start  # optimizer steps at which it looks again

    def after_step(self) -> None:
        """Call it after each optimizer step (and the scheduler's); a step that was skipped, or a micro-batch, changes
        nothing.
        """
        t = steps_taken(self.optimizer)
        if t != self.seen:
            if t > self.start and not self.before:
                raise RuntimeError(
                    f"the optimizer has taken {t} steps, and the {self.window} began at {self.start}, but the target's"
                    " own state is not here: load it (load_state_dict of what attach returned), or call after_step()"
                    " after each optimizer step from the first on"
                )
            self.run(t)

    def begin(self, t: int) -> None:
        """Makes ready for the first step here; after a resume beyond the start, `load_state_dict` does."""
        if t <= self.start:
            self.run(t)

    def run(self, t: int) -> None:
        """Makes ready for step t (from 0)."""
        self.seen = t
        if t < self.start:
            return
        if not self.before:
            self._begin()
        if t >= self.end - 1:
            if self.closed is None:
                self._close()
        elif t >= self.next:
            self._look(t)
            self.next = t + self.every - (t - self.start) % self.every

    def finish(self) -> None:
        """Closes what is missing if the run has ended before its window did, as it may where fp16 has skipped steps.
        Collective.
        """
        if self.closed is None:
            logger.warning(
                "the run ended after %d steps that were really taken, before the %s did at %d; closing what is"
                " missing now",
                steps_taken(self.optimizer),
                self.window,
                self.end,
            )
            if not self.before:
                self._begin()
            self._close()

    def plan(self, t: int) -> float:
        """Share of the way to the target that lies behind after t steps."""
        return self.target.at((t - self.start) / (self.end - 1 - self.start))

    def graced(self, t: int) -> bool:
        """Whether what the look at step t finds may fade and come back."""
        return t < self.grace_ends and t + self.every < self.end - 1

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _look(self, t: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...
