"""Which parameter each part of a tensor belongs to, so that hyperparameters can differ inside one flat shard."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lp_dist.optim.hyperparameters import check_hyperparameters
from lp_dist.optim.nm import Straddling

# What a parameter can have of its own. The learning rate and the moments' constants are the base optimizer's, hence
# the group's.
KEYS = ("weight_decay", "p", "l2", "precondition", "cutoff", "floor", "latent", "pattern")

# Part of a tensor with one set of values: offset, length, the values that differ from its group's.
Run = tuple[int, int, dict[str, Any]]

_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True)
class Segment:
    """A piece of one parameter inside a tensor that the optimizer steps.

    Args:
        name: the parameter's, as of the model's `named_parameters()`.
        offset, length: where the piece lies in the tensor, in elements, the tensor taken flat.
        start: its first element in the whole parameter, taken flat; None if the piece is no contiguous range of it.
        shape: of the whole parameter.
    """

    name: str
    offset: int
    length: int
    start: int | None
    shape: torch.Size


def check_keys(values: Iterable[str]) -> None:
    """Raises ValueError for a key that a single parameter can't have."""
    wrong = [key for key in values if key not in KEYS]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} can't differ within a shard, as it belongs to the base optimizer; keys that can are"
            f" {', '.join(KEYS)}. Use another param group for it"
        )


class SegmentMap:
    """Segments of the tensors that an optimizer steps, and values of single parameters. Tensors are known by
    identity.
    """

    def __init__(self) -> None:
        self.straddling: Straddling | None = None  # set by `attach` where blocks of patterns lie on several ranks
        self._segments = WeakIdKeyDictionary()
        self._runs: dict[int, tuple[weakref.ref[Tensor], tuple[Run, ...]]] = {}
        self._values: dict[str, dict[str, Any]] = {}
        self._interned: dict[tuple, dict[str, Any]] = {
            (): _NOTHING
        }  # equal values are one object, so that a step can group runs by it

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._segments

    def of(self, tensor: Tensor) -> tuple[Segment, ...]:
        """Segments of a tensor, by offset; none if it is not in the map."""
        return self._segments.get(tensor, ())

    def replace(self, segments: dict[Tensor, list[Segment]]) -> None:
        """Takes a new map; values of single parameters are forgotten with the old one."""
        self._segments, self._runs, self._values = WeakIdKeyDictionary(), {}, {}
        for tensor, pieces in segments.items():
            self._segments[tensor] = tuple(
                sorted((piece for piece in pieces if piece.length), key=lambda piece: piece.offset)
            )

    def set(self, name: str, **values: Any) -> None:
        """Values of the parameter `name` that hold instead of its group's; a value of None gives it back to the group.

        Raises:
            ValueError: a key that a single parameter can't have, or a bad value.
        """
        check_keys(values)
        check_hyperparameters(**{key: value for key, value in values.items() if value is not None})
        merged = {**self._values.get(name, {}), **values}
        merged = {key: value for key, value in sorted(merged.items()) if value is not None}
        self._values[name] = self._interned.setdefault(tuple(merged.items()), merged)
        self._runs.clear()

    def values(self, name: str) -> dict[str, Any]:
        """What the parameter `name` has of its own."""
        return dict(self._values.get(name, _NOTHING))

    def runs(self, tensor: Tensor, numel: int) -> tuple[Run, ...]:
        """The tensor, of `numel` local elements, cut where the values change; one run with no values of its own if
        nothing differs.

        Equal values are the same object. Padding and gaps belong to the run before them; what they hold is nobody's
        (under ZeRO-3 it is uninitialised memory), so they may be stepped, and must not be counted.
        """
        found = self._runs.get(
            id(tensor)
        )  # an optimizer's step asks for every tensor: a weak dictionary would take longer than the rest of it
        if found is None or found[0]() is not tensor:
            runs = _cut(self.of(tensor), self._values, numel)
            found = self._runs[id(tensor)] = weakref.ref(tensor), runs
        return found[1]


def _cut(segments: Iterable[Segment], values: dict[str, dict[str, Any]], numel: int) -> tuple[Run, ...]:
    starts: list[tuple[int, dict[str, Any]]] = []
    for segment in segments:
        own = values.get(segment.name, _NOTHING)
        if not starts or starts[-1][1] is not own:
            starts.append((segment.offset if starts else 0, own))
    if not starts:
        return ((0, numel, _NOTHING),)
    ends = [offset for offset, _ in starts[1:]] + [numel]
    return tuple((offset, end - offset, own) for (offset, own), end in zip(starts, ends))


class Asked:
    """The values with which param groups were made, by parameter and in order: engines and checkpoints replace what
    groups hold.
    """

    def __init__(self) -> None:
        self._of = WeakIdKeyDictionary()
        self.groups: list[dict[str, Any]] = []

    def add(self, group: dict[str, Any], keys: Iterable[str]) -> None:
        """Notes a group's values of `keys`."""
        self.groups.append({key: group[key] for key in keys if key in group})
        for param in group["params"]:
            self._of[param] = self.groups[-1]

    def of(self, param: Tensor) -> dict[str, Any] | None:
        """Of the group that was made with `param`; None if there is none."""
        return self._of.get(param)


def effective(group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The values that hold for a run: the group's, and what its parameters have of their own.

    A cutoff of 0 or below is a phase of the whole group (see `schedule.py`): then only λ and λ2, which say whether a
    parameter takes part in it, are its own.
    """
    if not own:
        return group
    if group["cutoff"] <= 0:
        own = {key: value for key, value in own.items() if key in ("weight_decay", "l2")}
    return {**group, **own}


def part(tensor: Tensor, offset: int, length: int) -> Tensor:
    """View of a run of a local tensor; the tensor itself if the run is all of it."""
    return tensor if length == tensor.numel() else tensor.view(-1)[offset : offset + length]
