"""`lp-dist export --shrink`: removes dead channels, attention heads and experts, as far as config.json can hold the
new numbers.

A group of weights is dead where everything that reads it is zero. A channel or a head then has no effect: its removal
takes zeros out of sums. A dead expert adds nothing either, but takes a place among those that a router chooses.
Without it another one is chosen, so that outputs change where it was.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lp_dist.checkpoints.entries import read_json
from lp_dist.checkpoints.hf_names import HfTensor, build_on_meta, in_dtype, model_class, name_map
from lp_dist.checkpoints.saved_slices import SavedSlice, saved_slices
from lp_dist.errors import UsageError
from lp_dist.structured.dead_groups import ReadingWeights
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.removal import FUSED, WORDS, Removal, plan_removals
from lp_dist.structured.resolve import recognised_groups
from lp_dist.structured.widths import Widths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileCut:
    """What stays of one tensor of the files.

    Args:
        name: under which it is written; None: it is left out.
        kept: {dimension: (size,) bool, which indices stay}.
        kept_by_expert: as `kept`, of what each index of dimension 0 keeps by itself, as many: (experts, size) bool.
        readers: the dimensions along which only zeros may be removed.
        numbers: of a tensor whose entries are numbers of experts: (experts,) int64, the new number of each, or -1.
    """

    name: str | None
    kept: dict[int, Tensor] = field(default_factory=dict)
    kept_by_expert: dict[int, Tensor] = field(default_factory=dict)
    readers: frozenset[int] = frozenset()
    numbers: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """What stays of it, in its order."""
        for dim, table in self.kept_by_expert.items():
            lines = tensor.movedim(dim, 1)
            tensor = lines[table].view(len(table), -1, *lines.shape[2:]).movedim(1, dim)
        for dim, kept in self.kept.items():
            tensor = tensor.index_select(dim, kept.nonzero().flatten())
        return tensor if self.numbers is None else _renumbered(tensor, self.numbers)

    def takes_only_zeros(self, tensor: Tensor) -> bool:
        """Whether all that is removed of what reads channels, heads or the insides of experts is zero."""
        if self.name is None:
            return not self.readers or not bool(tensor.any())
        for dim, table in self.kept_by_expert.items():
            if dim in self.readers and bool(tensor.movedim(dim, 1)[~table].any()):
                return False
        return not any(
            bool(tensor.index_select(dim, (~kept).nonzero().flatten()).any())
            for dim, kept in self.kept.items()
            if dim in self.readers
        )

    @property
    def sums(self) -> list[int]:
        """How many terms the sums had that have fewer now."""
        masks = {dim: kept for dim, kept in self.kept.items() if not kept.all()}
        tables = {dim: table[0] for dim, table in self.kept_by_expert.items()}
        return [len(kept) for dim, kept in {**masks, **tables}.items() if dim in self.readers]


def _renumbered(table: Tensor, numbers: Tensor) -> Tensor:
    """A table of numbers of experts, along its last dimension those of one token. In the place of a removed expert
    comes another one that the token has not: the next ones in turn, so that they are spread.
    """
    new = numbers[table.long()]
    rows = new.view(-1, new.shape[-1])
    count = int((numbers >= 0).sum())
    for row, old in zip(rows, table.reshape(-1, new.shape[-1])):
        for i in (row < 0).nonzero().flatten().tolist():
            free = [number for number in range(count) if number not in row.tolist()]
            row[i] = free[int(old[i]) % len(free)]
    return new.to(table.dtype)


@dataclass(frozen=True)
class RemovedExperts:
    """The experts that are removed from one layer.

    Args:
        router: name of its matrix in the model.
        kept: (experts,) bool, which ones stay.
        biases: names of the vectors in the model with an entry for each expert.
        tables: {name of a table of numbers of experts in the model: its name in the files}.
    """

    router: str
    kept: Tensor
    biases: tuple[str, ...]
    tables: dict[str, str]


@dataclass(frozen=True)
class ShrinkPlan:
    """How to remove the dead groups of a model.

    Args:
        cuts: {Hugging Face name: what stays}, of tensors that lose some or get another name.
        config: config.json of the smaller model.
        removals: what is removed of each kind of groups.
        experts: those that are removed of each layer; empty where none are.
    """

    cuts: dict[str, FileCut]
    config: dict[str, Any]
    removals: list[Removal]
    experts: tuple[RemovedExperts, ...] = ()

    @property
    def sums(self) -> list[int]:
        """How many terms the sums had that have fewer now, a number for each tensor."""
        return [number for cut in self.cuts.values() for number in cut.sums]

    def new_name(self, name: str) -> str | None:
        """The name under which a tensor is written; None: it is left out."""
        return self.cuts[name].name if name in self.cuts else name

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of the tensor of this name, in its order."""
        return self.cuts[name].apply(tensor) if name in self.cuts else tensor

    def takes_only_zeros(self, name: str, tensor: Tensor) -> bool:
        """Whether all removed weights of this tensor that read channels, heads or experts are zero."""
        return name not in self.cuts or self.cuts[name].takes_only_zeros(tensor)


def shrink_plan(
    tensors: list[HfTensor],
    config: Path,
    dtype: torch.dtype | None = None,
    multiple: int = 1,
    trust_remote_code: bool = False,
) -> ShrinkPlan:
    """Finds out what can be removed. Reads the weights that read channels and heads, one tensor at a time.

    Args:
        tensors: the model's (`hf_tensors`), which may not fit into memory.
        config: directory of its config.json.
        dtype: of the export; what is zero in it is dead. None: as stored.
        multiple: the width of feed-forward layers is rounded up to it, at most to their width before.
        trust_remote_code: run code that comes with the model.
    Raises:
        UsageError: neither channels nor heads are recognised, none is dead, or none of the dead ones can be removed;
            the message says why.
    """
    cls, settings = model_class(config, trust_remote_code)
    model = build_on_meta(cls, settings, f"{config}/config.json")
    recognised, reasons = recognised_groups(model)
    if not recognised:
        raise UsageError(f"--shrink has nothing to look at: {'; '.join(reasons)}")
    sets = [groups for kind in recognised.values() for groups in kind]
    in_files = name_map(model, {name: shape for tensor in tensors for name, shape in tensor.shapes.items()})
    saved = model.state_dict().keys()
    slices = saved_slices(model, {name for groups in sets for name in _names(groups)}, in_files)
    named = [groups for groups in sets if all(name in slices for name in _names(groups) & saved)]
    dead = {groups.label: torch.zeros(groups.count, dtype=torch.bool) for groups in sets}
    dead |= find_dead(named, slices, tensors, dtype)
    if not any(bool(is_dead.any()) for is_dead in dead.values()):
        raise UsageError(_nothing_is_dead(sets, named, cls.__name__))
    left = [groups for groups in sets if groups not in named]
    if left:
        logger.warning(
            "%d of %d sets of groups are not looked at, such as %s: %s, or it has other names there",
            len(left),
            len(sets),
            left[0].label,
            FUSED,
        )
    widths = Widths(cls, settings, read_json(config / "config.json"), model)
    removals = plan_removals(widths, recognised, dead, multiple)
    if not any(removal.removed for removal in removals):
        raise UsageError(f"--shrink can remove nothing: {'; '.join(map(str, removals))}")
    return ShrinkPlan(
        _file_cuts(widths, slices, sets),
        widths.config,
        removals,
        _removed_experts(widths, slices, recognised.get("experts", [])),
    )


def _removed_experts(
    widths: Widths, slices: dict[str, list[SavedSlice]], sets: list[WeightGroups]
) -> tuple[RemovedExperts, ...]:
    """What is removed of the experts of each layer, of which there may be several sets."""
    removed: dict[str, RemovedExperts] = {}
    for groups in sets:
        # The first of what follows is the router's matrix.
        router, *others = groups.followers
        kept = widths.kept.get((router.name, router.dim))
        if kept is not None and router.name not in removed:
            vectors = [member.name for member in others if len(widths.shapes[member.name]) == 1]
            tables = {name: slices[name][0].name for name in groups.tables if name in slices}
            removed[router.name] = RemovedExperts(router.name, kept, tuple(vectors), tables)
    return tuple(removed.values())


def _names(groups: WeightGroups) -> set[str]:
    """Names of all tensors of which the groups have some, or that have their numbers in them."""
    return {member.name for member in (*groups.members, *groups.followers)} | {*groups.tables}


def _file_cuts(
    widths: Widths,
    slices: dict[str, list[SavedSlice]],
    sets: list[WeightGroups],
) -> dict[str, FileCut]:
    """What is cut of each tensor of the files, and how it is called then."""
    readers = {
        (member.name, dim)
        for groups in sets
        for member in groups.members
        if member.reads
        for dim in ((member.dim,) if member.expert is None else (0, member.dim))
    }
    numbers: dict[str, Tensor] = {}
    for groups in sets:
        for name in groups.tables:
            router = groups.followers[0]
            kept = widths.kept.get((router.name, router.dim))
            if kept is not None:
                numbers[name] = torch.where(kept, kept.cumsum(0) - 1, -1)
    touched = {name for name, _ in widths.kept.keys() | widths.kept_by_expert.keys()} | {*numbers}
    touched |= {name for name in slices if widths.renamed(name) != name}
    # Buffers that are not saved have no tensor in the files.
    touched &= slices.keys()
    new_names = _new_names(widths, slices, touched)
    cuts: dict[str, FileCut] = {}
    for name in touched:
        of_param = {dim: kept for (owner, dim), kept in widths.kept.items() if owner == name}
        by_expert = {dim: table for (owner, dim), table in widths.kept_by_expert.items() if owner == name}
        for saved in slices[name]:
            kept: dict[int, Tensor] = {}
            tables: dict[int, Tensor] = {}
            is_removed = widths.renamed(name) is None
            reading = {dim for dim in range(len(saved.along)) if (name, dim) in readers}
            for dim, indices in of_param.items():
                if saved.along[dim] is None:
                    is_removed |= not bool(indices[saved.indices[dim]].all())
                else:
                    kept[saved.along[dim]] = indices[saved.indices[dim]]
            for dim, table in by_expert.items():
                of_experts = table[saved.indices[0]][:, saved.indices[dim]]
                if saved.along[0] is None:
                    kept[saved.along[dim]] = of_experts[0]
                else:
                    tables[saved.along[dim]] = _as_many(of_experts, of_param.get(0, torch.ones(len(table)) > 0))
            cuts[saved.name] = FileCut(
                None if is_removed else new_names[saved.name],
                kept,
                tables,
                frozenset(saved.along[dim] for dim in reading if saved.along[dim] is not None)
                or (frozenset({0}) if reading and is_removed else frozenset()),
                numbers.get(name),
            )
    return {
        name: cut
        for name, cut in cuts.items()
        if cut.name != name
        or cut.numbers is not None
        or cut.kept_by_expert
        or not all(k.all() for k in cut.kept.values())
    }


def _as_many(table: Tensor, experts: Tensor) -> Tensor:
    """(experts, size) bool; experts that are removed keep as many as the others, so that the rest is a tensor."""
    rest = table.clone()
    rest[~experts] = table[experts][0]
    return rest


def _new_names(widths: Widths, slices: dict[str, list[SavedSlice]], touched: set[str]) -> dict[str, str]:
    """{name of a tensor in the files: its name in those of the smaller model}; experts are numbered anew."""
    small = widths.model()
    renamed = {new: name for name in touched if (new := widths.renamed(name)) is not None}
    names: dict[str, str] = {}
    for new, saved_small in saved_slices(small, {*renamed}, None).items():
        name = renamed[new]
        if len(slices[name]) == 1:
            # Also one that transformers would save as several.
            (old,) = slices[name]
            names[old.name] = old.renamed(saved_small[0].saved_as if len(saved_small) == 1 else new)
            continue
        old_indices = [
            kept.nonzero().flatten() if (kept := widths.kept.get((name, dim))) is not None else None
            for dim in range(len(saved_small[0].indices))
        ]
        for saved in saved_small:
            # Where its first element was.
            position = [int(indices[0]) for indices in saved.indices]
            expert = position[0] if old_indices[:1] in ([], [None]) else int(old_indices[0][position[0]])
            for dim, index in enumerate(position):
                table = widths.kept_by_expert.get((name, dim))
                if table is not None:
                    position[dim] = int(table[expert].nonzero().flatten()[index])
                elif old_indices[dim] is not None:
                    position[dim] = int(old_indices[dim][index])
            for old in slices[name]:
                if all(bool((old.indices[dim] == index).any()) for dim, index in enumerate(position)):
                    names[old.name] = old.renamed(saved.saved_as)
    return names


def _nothing_is_dead(sets: list[WeightGroups], named: list[WeightGroups], cls: str) -> str:
    """The message. named: those of the groups whose parameters are in the checkpoint."""
    counts = [
        (sum(groups.count for groups in named if groups.kind == kind), what)
        for kind, what in WORDS.items()
        if kind != "kv_groups"
    ]
    checked = " and ".join(f"{count:,} {what}" for count, what in counts if count)
    why = (
        f"of {checked} of {cls} none is dead"
        if checked
        else f"the checkpoint's tensors have other names than those of {cls}"
    )
    if checked and len(named) < len(sets):
        why += (
            f" (and {len(sets) - len(named)} parts of it, such as"
            f" {next(groups.name for groups in sets if groups not in named)}, have other names in the checkpoint)"
        )
    return (
        f"--shrink finds nothing to remove: {why}. Single zeros are not enough: all that reads a channel or head"
        ' must be zero, as a target for whole groups makes it: SparsityTarget(0.5, groups="channels"), or'
        ' "kv_groups"'
    )


def find_dead(
    sets: list[WeightGroups], slices: dict[str, list[SavedSlice]], tensors: list[HfTensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """{label: (count,) bool, which groups are read by zeros alone}.

    Args:
        sets: the groups.
        slices: of `saved_slices`, of all their parameters.
        tensors: of the checkpoint.
        dtype: as of `shrink_plan`.
    """
    readers = ReadingWeights(sets, slices)
    reading = [tensor for tensor in tensors if readers.file_names & tensor.shapes.keys()]
    for hf_tensor in tqdm(reading, desc="Looking for dead groups"):
        for file_name, tensor in hf_tensor.read().items():
            readers.add(file_name, in_dtype(tensor, dtype))
    return readers.dead()
