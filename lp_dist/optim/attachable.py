"""What `lp_dist.attach` reads from an optimizer that decays, and what it leaves there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lp_dist.optim.parameter_map import ParameterMap, RequestedValues


class Removable(Protocol):
    """A hook that can be taken off again."""

    def remove(self) -> None: ...


@dataclass
class AttachedHooks:
    """Hooks that `attach` has put on an optimizer. A second `attach` replaces them.

    Args:
        after_load: puts the requested hyperparameters back after a state was loaded.
        group_decay: decays whole weight groups.
        watch: compares what steps with what was planned.
    """

    after_load: Removable | None = None
    group_decay: Removable | None = None
    watch: Removable | None = None

    def remove(self) -> None:
        """Takes all of them off."""
        for hook in (self.after_load, self.group_decay, self.watch):
            if hook is not None:
                hook.remove()
        self.after_load = self.group_decay = self.watch = None


@dataclass
class AttachedState:
    """All that `attach` leaves on an optimizer.

    Args:
        parameter_map: which parameter lies where, and what single parameters override.
        requested: the hyperparameters with which the script made the param groups.
        hooks: taken off by the next `attach`.
        before_step: called before each step, while the groups are as the script and the engine have them.
        in_window: whether a target's window is open here.
        attachment: what `attach` returned last, kept alive with the optimizer.
    """

    parameter_map: ParameterMap = field(default_factory=ParameterMap)
    requested: RequestedValues = field(default_factory=RequestedValues)
    hooks: AttachedHooks = field(default_factory=AttachedHooks)
    before_step: Callable[[], None] | None = None
    in_window: bool = False
    attachment: Any = None


class Attachable(Protocol):
    """What decays: an `LpOptimizer`, or the handle that `add_lp_decay` returns."""

    attached: AttachedState

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyperparameters that are out of their range, or that it can't have."""
