"""When the decay acts, as a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Group values for a phase in which the base optimizer's step is left exactly as it is. λ itself stays in the groups, so that
# a group that decays is known by weight_decay > 0 at any time, also after a resume in the middle of such a phase.
OFF = {"cutoff": -1.0}                                       # x > cutoff for every weight, zeros included: none decays
FROZEN = {"p": 1.0, "precondition": 0.0, "cutoff": 0.0}      # x = |w| > 0: free; x = 0: dead. Zeros stay, survivors train


def values_of(phase: dict[str, Any]) -> dict[str, set]:
    """Every value that a group key has in `phase`, in which the decay acts, before it or after it."""
    phases = (OFF, FROZEN, phase)
    return {key: {values[key] for values in phases if key in values} for key in set().union(*phases)}


def check_window(start: float, end: float) -> None:
    """Raises ValueError if start or end is negative or nan, or start is not before end."""
    for key, value in (("start", start), ("end", end)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key}={value!r} must be a number >= 0: a fraction of the run if <= 1, else an optimizer step")
    if (start <= 1) == (end <= 1) and start >= end:
        raise ValueError(f"the decay must start before it ends, but start={start:g} and end={end:g}; lower start or raise end")


def window_steps(start: float, end: float, total: int) -> tuple[int, int]:
    """The window [start, end) in optimizer steps of a run of `total` steps; raises ValueError if it holds none."""
    start, end = (round(x * total) if x <= 1 else int(x) for x in (start, end))
    if start >= min(end, total):
        raise ValueError(f"the decay window from step {start} to {end} holds no step of a run of {total} steps; "
                         "lower its start, raise its end, or train for longer")
    return start, end


@dataclass(frozen=True)
class DecayWindow:
    """Warm-up without decay, then decay, then recovery with the zeros frozen.

    Args:
        start: where the decay begins: a fraction of the run if it is ≤ 1, else an optimizer step. Before it nothing decays, so
            that Adam's second moments can fill (the preconditioned form needs them).
        end: where it ends, likewise; 1 is the end of the run. From there zeros stay zero and survivors train without decay.
        values: group keys while it acts, such as p, l2, precondition; what is not named stays as the groups have it. The window
            owns `cutoff`, by which it switches: what is not named here is inf while it acts.
    Raises:
        ValueError: start or end is negative or nan, or start is not before end.
    """

    start: float = 0.0
    end: float = 1.0
    values: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_window(self.start, self.end)

    def steps(self, total: int) -> tuple[int, int]:
        """The window [start, end) in optimizer steps of a run of `total` steps.

        Raises:
            ValueError: the window holds no step.
        """
        return window_steps(self.start, self.end, total)

    def at(self, step: int, total: int) -> dict[str, Any]:
        """Values of the decayed groups for optimizer step `step` (from 0) of `total`."""
        start, end = self.steps(total)
        if step < start:
            return OFF
        return FROZEN if step >= end else {"cutoff": math.inf, **(self.values or {})}

    def scheduled(self) -> dict[str, set]:
        """Every value that the window gives to a group key at some step."""
        return values_of({"cutoff": math.inf, **(self.values or {})})
