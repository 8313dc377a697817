"""Which parameter each part of a tensor belongs to, so that hyperparameters can differ inside of one flat shard."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lp_dist.optim.hyperparameters import check_hyperparameters
from lp_dist.optim.nm import SplitBlocks
from lp_dist.optim.region import Region

# What a parameter can override. The learning rate and the moments' constants are the base optimizer's, hence the
# group's.
KEYS = (
    "weight_decay",
    "p",
    "l2",
    "precondition",
    "cutoff",
    "regrowth_below",
    "latent",
    "pattern",
    "input_dim",
    "phase",
)

_NO_OVERRIDES: dict[str, Any] = {}


@dataclass(frozen=True)
class ParamSlice:
    """The part of one parameter that lies inside of a tensor which the optimizer steps.

    Args:
        name: the parameter's, as of the model's `named_parameters()`.
        offset: where the slice begins in the tensor, in elements, the tensor taken flat.
        length: elements of the slice.
        start: its first element in `region`, taken flat; None: not known.
        shape: of the whole parameter.
        inputs: its dimension of inputs, along which blocks of N:M patterns lie; None: not known, or it has no blocks.
        region: of the parameter, of which the slice is a contiguous range; None: the parameter itself.
    """

    name: str
    offset: int
    length: int
    start: int | None
    shape: torch.Size
    inputs: int | None = None
    region: Region | None = None


class Overlap(NamedTuple):
    """What a section and a range of the same parameter have in common.

    Args:
        first: the first element of it in the range.
        last: the one after its last element in the range.
        start: its first element in `region`.
        region: of the section, of which it is a contiguous range; None: the section itself.
    """

    first: int
    last: int
    start: int
    region: Region | None = None


@dataclass(frozen=True)
class ParamSection:
    """Neighbouring indices along the first dimension of a parameter, which are treated as a parameter of their own.

    Args:
        param_name: of the parameter.
        start: the first index.
        stop: the one after the last.
        shape: of the parameter.
    """

    param_name: str
    start: int
    stop: int
    shape: torch.Size

    @property
    def name(self) -> str:
        """Of the section: `experts.down_proj[2:5]`."""
        return f"{self.param_name}[{self.start}:{self.stop}]"

    @property
    def section_shape(self) -> torch.Size:
        """Of what lies in it."""
        return torch.Size([self.stop - self.start, *self.shape[1:]])

    def overlap(self, start: int, length: int, region: Region | None = None) -> Overlap:
        """With `length` elements, from `start` on, of the parameter or a region of it, taken flat."""
        begin, end, shape, within = self.start, self.stop, self.shape, None
        if region is not None:
            indices, shape, within = region.indices(0), region.sizes, region.section(self.start, self.stop)
            begin, end = torch.searchsorted(indices, torch.tensor([begin, end])).tolist()
        size = shape.numel() // max(1, shape[0])
        first = min(max(begin * size - start, 0), length)
        last = min(max(end * size - start, first), length)
        return Overlap(first, last, max(start - begin * size, 0) if last > first else 0, within)

    def of(self, param_slice: ParamSlice) -> ParamSlice:
        """What it has in common with a slice of the parameter; that may be nothing."""
        assert param_slice.start is not None, "only contiguous ranges have sections"
        overlap = self.overlap(param_slice.start, param_slice.length, param_slice.region)
        offset, length = param_slice.offset + overlap.first, overlap.last - overlap.first
        # Blocks along the first dimension itself would be divided.
        inputs = param_slice.inputs or None
        return ParamSlice(self.name, offset, length, overlap.start, self.section_shape, inputs, overlap.region)


class ValueSpan(NamedTuple):
    """A part of a tensor, taken flat, whose parameters have the same overrides.

    Args:
        offset: its first element.
        length: its elements.
        overrides: hyperparameters that differ from the group's; the same object for equal ones.
    """

    offset: int
    length: int
    overrides: dict[str, Any]


def check_keys(values: Iterable[str]) -> None:
    """Raises ValueError for a key that a single parameter can't override."""
    unknown_keys = [key for key in values if key not in KEYS]
    if unknown_keys:
        raise ValueError(
            f"{unknown_keys[0]!r} can't differ within a shard; what can is {', '.join(KEYS)}. The base"
            " optimizer's own (lr, betas, ...) need another param group"
        )


class ParameterMap:
    """Parameters in the tensors that an optimizer steps, and what single parameters override. Tensors are known by
    identity.

    Attributes:
        split_blocks: set by `attach` where blocks of N:M patterns lie on several ranks, else None.
        version: another number after each change.
    """

    def __init__(self) -> None:
        self.split_blocks: SplitBlocks | None = None
        self.version = 0
        self._slices = WeakIdKeyDictionary()
        self._sections: dict[str, list[ParamSection]] = {}
        self._input_dims: dict[str, int | None] = {}
        self._spans: dict[int, tuple[weakref.ref[Tensor], tuple[ValueSpan, ...]]] = {}
        self._overrides: dict[str, dict[str, Any]] = {}
        # Equal overrides are one object, so that a step can group spans by it.
        self._interned: dict[tuple, dict[str, Any]] = {(): _NO_OVERRIDES}

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._slices

    def of(self, tensor: Tensor) -> tuple[ParamSlice, ...]:
        """Slices in a tensor, by offset, those of sections apart; none if it is not in the map."""
        slices: tuple[ParamSlice, ...] = self._slices.get(tensor, ())
        if not any(param_slice.name in self._sections for param_slice in slices):
            return slices
        divided = [
            [section.of(param_slice) for section in self._sections[param_slice.name]]
            if param_slice.name in self._sections
            else [param_slice]
            for param_slice in slices
        ]
        return tuple(param_slice for in_slice in divided for param_slice in in_slice if param_slice.length)

    def replace(self, slices: dict[Tensor, list[ParamSlice]]) -> None:
        """Takes a new map; overrides of single parameters are forgotten with the old one."""
        self._slices, self._sections, self._spans, self._overrides = WeakIdKeyDictionary(), {}, {}, {}
        self.version += 1
        self._input_dims = {s.name: s.inputs for in_tensor in slices.values() for s in in_tensor}
        for tensor, in_tensor in slices.items():
            self._slices[tensor] = tuple(sorted((s for s in in_tensor if s.length), key=lambda s: s.offset))

    def divide(self, name: str, sections: list[ParamSection]) -> None:
        """Has sections of the parameter `name` override hyperparameters of their own, beginning with its overrides.

        Args:
            name: of a parameter whose slices are contiguous ranges of it.
            sections: in order, of all its elements; none: it is one again.
        """
        self._spans.clear()
        self.version += 1
        for section in self._sections.pop(name, []):
            self._overrides.pop(section.name, None)
        if sections:
            self._sections[name] = list(sections)
            for section in sections:
                self.set(section.name, **self.values(name))

    def set(self, name: str, **values: Any) -> None:
        """Overrides hyperparameters of the parameter or section `name`; a value of None gives it back to the group. A
        parameter's sections get what it gets.

        Raises:
            ValueError: a key that a single parameter can't override, or a bad value.
        """
        check_keys(values)
        merged = {**self._overrides.get(name, {}), **values}
        merged = {key: value for key, value in sorted(merged.items()) if value is not None}
        check_hyperparameters(**merged)
        self._overrides[name] = self._interned.setdefault(tuple(merged.items()), merged)
        self._spans.clear()
        self.version += 1
        for section in self._sections.get(name, ()):
            self.set(section.name, **values)
        if len(self._interned) > 2 * len(self._overrides) + 16:  # a target sets another λ at each update
            self._interned = {tuple(kept.items()): kept for kept in (_NO_OVERRIDES, *self._overrides.values())}

    def values(self, name: str) -> dict[str, Any]:
        """What the parameter or section `name` overrides."""
        return dict(self._overrides.get(name, _NO_OVERRIDES))

    def input_dim(self, name: str) -> int | None:
        """Dimension of inputs of the parameter `name`, as of `ParamSlice`."""
        return self._input_dims.get(name)

    def value_spans(self, tensor: Tensor, numel: int) -> tuple[ValueSpan, ...]:
        """The tensor, of `numel` local elements, cut where overrides change; one span if nothing differs.

        Padding and gaps belong to the span before them. What they hold is of no parameter (under ZeRO-3 it is
        uninitialised memory), so they may be stepped, and must not be counted.
        """
        # An optimizer's step asks for every tensor: a weak dictionary would take longer than the rest of it.
        cached = self._spans.get(id(tensor))
        if cached is None or cached[0]() is not tensor:
            cached = self._spans[id(tensor)] = weakref.ref(tensor), self._cut(tensor, numel)
        return cached[1]

    def _cut(self, tensor: Tensor, numel: int) -> tuple[ValueSpan, ...]:
        starts: list[tuple[int, dict[str, Any]]] = []
        for param_slice in self.of(tensor):
            overrides = self._overrides.get(param_slice.name, _NO_OVERRIDES)
            if not starts or starts[-1][1] is not overrides:
                starts.append((param_slice.offset if starts else 0, overrides))
        if not starts:
            return (ValueSpan(0, numel, _NO_OVERRIDES),)
        ends = [offset for offset, _ in starts[1:]] + [numel]
        return tuple(ValueSpan(offset, end - offset, overrides) for (offset, overrides), end in zip(starts, ends))


class RequestedValues:
    """The values with which param groups were made, by parameter and in order. Engines and checkpoints replace what
    groups hold.
    """

    def __init__(self) -> None:
        self._of = WeakIdKeyDictionary()
        self.groups: list[dict[str, Any]] = []
        self.left_open: list[frozenset[str]] = []  # of each group, what its values are a default of

    def add(self, group: dict[str, Any], keys: Iterable[str], left_open: frozenset[str] = frozenset()) -> None:
        """Notes a group's values of `keys`, and which of them the caller did not name."""
        self.left_open.append(left_open)
        self.groups.append({key: group[key] for key in keys if key in group})
        for param in group["params"]:
            self._of[param] = self.groups[-1]

    def of(self, param: Tensor) -> dict[str, Any] | None:
        """Those of the group that was made with `param`; None if there is none."""
        return self._of.get(param)


def effective_values(group: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters that hold for a span: the group's, with what its parameters override."""
    return {**group, **overrides} if overrides else group


def flat_view(tensor: Tensor, offset: int, length: int) -> Tensor:
    """View of a part of a local tensor, taken flat; the tensor itself if the part is all of it."""
    return tensor if length == tensor.numel() else tensor.view(-1)[offset : offset + length]
