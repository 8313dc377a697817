"""The values that hold for parts of a param group, kept from step to step while the learning rate alone changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lp_dist.optim.hyperparameters import acting_values
from lp_dist.optim.parameter_map import ParameterMap, effective_values

_PLAIN = frozenset({float, int, bool, str, type(None)})


class KeptValues(dict[str, Any]):
    """Hyperparameters of which the learning rate alone changes while this object is used.

    Attributes:
        made: what is made of the others and is to be made once, by what it is.
    """

    __slots__ = ("made",)

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.made: dict[Any, Any] = {}


def once(values: Mapping[str, Any], what: str, make: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `make` makes of values, the learning rate aside: once, where they are kept."""
    if not isinstance(values, KeptValues):
        return make(values)
    if what not in values.made:
        values.made[what] = make(values)
    return values.made[what]


class ActingValues:
    """Of one param group. Every tensor of a model may have values of its own, so that making them anew in each step
    takes longer than the step.
    """

    def __init__(self) -> None:
        self._plain: dict[str, Any] = {}
        self._version: tuple[int, int] | None = None
        self._kept: dict[int, tuple[dict[str, Any], KeptValues]] = {}

    def of(self, group: dict[str, Any], parameter_map: ParameterMap) -> _OfStep:
        """For one step, with the group and the map as they are now."""
        plain = {key: value for key, value in group.items() if key not in ("params", "lr")}
        version = id(parameter_map), parameter_map.version
        if version != self._version or not _are_same(plain, self._plain):
            self._plain, self._version = plain, version
            self._kept.clear()
        return _OfStep(plain, group["lr"], self._kept)


class _OfStep:
    """The values in one step, by what parameters override."""

    def __init__(self, plain: dict[str, Any], lr: Any, kept: dict[int, tuple[dict[str, Any], KeptValues]]) -> None:
        self._plain, self._lr, self._kept = plain, lr, kept

    def __getitem__(self, overrides: dict[str, Any]) -> KeptValues:
        """With these overrides, which are never changed."""
        kept = self._kept.get(id(overrides))
        if kept is None:
            values = {**self._plain, "lr": self._lr}
            # The overrides are held, so that no others get their address.
            kept = self._kept[id(overrides)] = (
                overrides,
                KeptValues(acting_values(effective_values(values, overrides))),
            )
        kept[1]["lr"] = self._lr
        return kept[1]


def _are_same(values: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether all are the same, as far as that can be told: a list or a tensor may have changed in place."""
    return values.keys() == others.keys() and all(
        value == others[key]
        and (type(value) in _PLAIN or (type(value) is tuple and all(type(part) in _PLAIN for part in value)))
        for key, value in values.items()
    )
