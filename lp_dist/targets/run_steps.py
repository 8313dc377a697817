"""RunSteps: the optimizer steps of this run, which are not those of the optimizer."""

from __future__ import annotations

from torch.optim import Optimizer

from lp_dist.optim.state import steps_taken


class RunSteps:
    """Counts the optimizer steps of a run.

    An optimizer may have stepped before the run began: in a run before this one, or in that of a dense checkpoint. So
    what counts are the steps that it has really taken since `attach`, and those that the run had before, by the state
    of a checkpoint.

    Args:
        optimizer: the inner optimizer, which steps.
        before: steps that the run had before.
    Attributes:
        is_unsure: the optimizer had stepped already, so that a state may follow which says where the run stands.
    """

    def __init__(self, optimizer: Optimizer, before: int = 0) -> None:
        self._optimizer = optimizer
        self._before, self._at_begin = before, steps_taken(optimizer)
        self._last = before
        self.is_unsure = self._at_begin > 0

    @property
    def taken(self) -> int:
        """Steps that the run has really taken; one that was skipped, as after an fp16 overflow, is none."""
        self._last = self._before + steps_taken(self._optimizer) - self._at_begin
        return self._last

    @property
    def have_begun(self) -> bool:
        """Whether the run had taken a step at the last look, which is after each."""
        return self._last > 0

    def resume(self, step: int) -> None:
        """Goes on from `step` of the run, with the optimizer as it is now."""
        self._before, self._at_begin, self._last = step, steps_taken(self._optimizer), step
        self.is_unsure = False

    def after_load(self) -> None:
        """Another state was loaded into the optimizer, and with it another count: the run stands where it stood."""
        self._before, self._at_begin = self._last, steps_taken(self._optimizer)
