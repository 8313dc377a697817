"""When the decay acts, as a pure function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from lp_dist.errors import UsageError
from lp_dist.optim.hyperparameters import Phase, check_hyperparameters


@dataclass(frozen=True)
class Ramp:
    """A value that goes from `first` to `last` over a window, as a pure function of the part of the window that is
    over.

    For `DecayWindow(values=...)`: `{"p": Ramp(2.0, 0.5)}` lets weights adapt before the sparse norm acts,
    `{"weight_decay": Ramp(1e-3, 1e-1, "geometric")}` warms λ up, `{"l2": Ramp(0.1, 0.0)}` fades an L2 term out.

    Args:
        first: the value at the start of the window.
        last: the value at the end.
        shape: "linear"; "cosine", slow at both ends; "geometric", by equal factors.
        until: the part of the window at which `last` is reached; it stays from there on.
    Raises:
        ValueError: shape is unknown, until is not in (0, 1], or a geometric ramp has an end that is not above 0.
    """

    first: float
    last: float
    shape: str = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine", "geometric"):
            raise ValueError(f"shape={self.shape!r} must be one of linear, cosine, geometric")
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until={self.until!r} must be in (0, 1], a part of the window")
        if self.shape == "geometric" and not min(self.first, self.last) > 0.0:
            raise ValueError(
                f"a geometric ramp from {self.first:g} to {self.last:g} needs both above 0; use shape='linear'"
            )

    def __call__(self, u: float) -> float:
        u = min(max(u / self.until, 0.0), 1.0)
        if self.shape == "geometric":
            return self.first ** (1.0 - u) * self.last**u
        u = u if self.shape == "linear" else (1.0 - math.cos(math.pi * u)) / 2.0
        return self.first * (1.0 - u) + self.last * u


class AnyValue:
    """A container of every value."""

    def __contains__(self, value: Any) -> bool:
        return True


def check_window(start: float, end: float) -> None:
    """Raises ValueError if start or end is negative or nan, or start is not before end."""
    for key, value in (("start", start), ("end", end)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{key}={value!r} must be a number >= 0: a fraction of the run if <= 1, else an optimizer step"
            )
    if (start <= 1) == (end <= 1) and start >= end:
        raise ValueError(
            f"the decay must start before it ends, but start={start:g} and end={end:g}; lower start or raise end"
        )


def window_steps(start: float, end: float, total: int) -> tuple[int, int]:
    """The window [start, end) in optimizer steps of a run of `total` steps; raises UsageError, a ValueError, if it
    holds none.
    """
    start, end = (round(x * total) if x <= 1 else int(x) for x in (start, end))
    if start >= min(end, total):
        raise UsageError(
            f"the decay window from step {start} to {end} holds no step of a run of {total} steps; lower its start,"
            " raise its end (up to 1 they are fractions of the run, above steps), or train for longer"
        )
    return start, end


@dataclass(frozen=True)
class DecayWindow:
    """Warm-up without decay, then decay, then recovery with the zeros frozen.

    Args:
        start: where the decay begins: a fraction of the run if it is ≤ 1, else an optimizer step. Before it nothing
            decays, so that Adam's second moments can fill (the preconditioned form needs them).
        end: where it ends, likewise; 1 is the end of the run. From there zeros stay zero and survivors train without
            decay.
        values: group keys while it acts, such as p, l2, precondition, cutoff, weight_decay; what is not named stays as
            the groups have it. A function gives the value for the part of the window that is over, such as a `Ramp`.
    Raises:
        ValueError: start or end is negative or nan, start is not before end, or a value is out of its range.
    """

    start: float = 0.0
    end: float = 1.0
    values: dict[str, float | Callable[[float], float]] | None = None

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        if "phase" in (self.values or {}):
            raise ValueError("values can't name a phase: the window switches it, at its start and its end")
        for elapsed in (0.0, 0.5, 1.0):
            check_hyperparameters(**self._values(elapsed))

    def steps(self, total: int) -> tuple[int, int]:
        """The window [start, end) in optimizer steps of a run of `total` steps.

        Raises:
            ValueError: the window holds no step.
        """
        return window_steps(self.start, self.end, total)

    def at(self, step: int, total: int) -> dict[str, Any]:
        """Values of the decayed groups for optimizer step `step` (from 0) of `total`.

        After the window they are those of its last step, so that an `l2` is the same there whether the run was resumed
        or not.
        """
        start, end = self.steps(total)
        if step < start:
            return {"phase": Phase.OFF.value}
        last = min(end, total) - 1
        values = self._values((min(step, last) - start) / max(1, last - start))
        return {**values, "phase": (Phase.FROZEN if step >= end else Phase.DECAY).value}

    def _values(self, elapsed: float) -> dict[str, Any]:
        return {key: value(elapsed) if callable(value) else value for key, value in (self.values or {}).items()}

    def scheduled(self) -> dict[str, Container]:
        """Every value that the window gives to a group key at some step."""
        values = {key: AnyValue() if callable(value) else (value,) for key, value in (self.values or {}).items()}
        return {"phase": [phase.value for phase in Phase], **values}
