"""`lp-dist export --shrink`: removes dead feed-forward channels and attention heads, as far as config.json can hold
the new numbers.

A group of weights is dead where everything that reads it is zero. It has no effect then: its removal takes zeros out
of sums.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lp_dist.checkpoints.entries import read_json
from lp_dist.checkpoints.hf_names import HfTensor, build_on_meta, in_dtype, model_class, name_map
from lp_dist.errors import UsageError
from lp_dist.export.widths import Cut, Edits, Widths
from lp_dist.sparsity.measure import layer_of
from lp_dist.structured.budget import groups_to_prune
from lp_dist.structured.groups import Member, WeightGroups
from lp_dist.structured.resolve import recognised_groups, resolve_groups
from lp_dist.targets.group_controller import group_budget
from lp_dist.targets.target import GroupTarget

_CHANNELS, _HEADS = "feed-forward channels", "attention heads"


@dataclass(frozen=True)
class Removal:
    """What was removed of the groups whose number one entry of the config holds.

    Args:
        what: the kind of groups, in words.
        dead: how many are dead in each module.
        before: how many there were in each module.
        after: how many stay in each module.
        why: why dead ones stay; empty where all are removed.
    """

    what: str
    dead: list[int]
    before: list[int]
    after: list[int]
    why: str = ""

    @property
    def removed(self) -> int:
        """How many are removed, over all modules."""
        return sum(self.before) - sum(self.after)

    def __str__(self) -> str:
        dead = f"{sum(self.dead):,} of {sum(self.before):,} {self.what} are dead"
        if not self.removed:
            return f"{dead} and stay: {self.why}"
        widths = " → ".join(
            f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
            for counts in (self.before, self.after)
        )
        return (
            f"{dead}, {self.removed:,} are removed: {widths} in each of {len(self.before)}"
            f" layers{'; ' * bool(self.why)}{self.why}"
        )


@dataclass(frozen=True)
class ShrinkPlan:
    """How to remove the dead groups of a model.

    Args:
        kept: {Hugging Face name: {dimension: (size,) bool, which indices stay}}, of tensors that lose some.
        readers: the (name, dimension) of these at which only zeros may be removed.
        config: config.json of the smaller model.
        removals: what is removed of each kind of groups.
    """

    kept: dict[str, dict[int, Tensor]]
    readers: set[tuple[str, int]]
    config: dict[str, Any]
    removals: list[Removal]

    @property
    def sums(self) -> list[int]:
        """How many terms the sums had that have fewer now, a number for each tensor."""
        return [
            len(kept) for name, dims in self.kept.items() for dim, kept in dims.items() if (name, dim) in self.readers
        ]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of the tensor of this name, in its order."""
        for dim, kept in self.kept.get(name, {}).items():
            tensor = tensor.index_select(dim, kept.nonzero().flatten())
        return tensor

    def takes_only_zeros(self, name: str, tensor: Tensor) -> bool:
        """Whether all removed weights of this tensor that read channels or heads are zero."""
        removed = [
            (dim, (~kept).nonzero().flatten())
            for dim, kept in self.kept.get(name, {}).items()
            if (name, dim) in self.readers
        ]
        return not any(bool(tensor.index_select(dim, indices).any()) for dim, indices in removed)


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
    names = name_map(model, {name: shape for tensor in tensors for name, shape in tensor.shapes.items()}).renamed
    named = [groups for groups in sets if all(member.name in names for member in groups.members)]
    dead = {groups.label: torch.zeros(groups.count, dtype=torch.bool) for groups in sets}
    dead |= find_dead(named, names, tensors, dtype)
    if not any(bool(is_dead.any()) for is_dead in dead.values()):
        raise UsageError(_nothing_is_dead(sets, named, cls.__name__))
    widths = Widths(cls, settings, read_json(config / "config.json"), model)
    removals = _removals(widths, recognised, dead, multiple)
    if not any(removal.removed for removal in removals):
        raise UsageError(f"--shrink can remove nothing: {'; '.join(map(str, removals))}")
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, dim), indices in widths.kept.items():
        if not indices.all():
            kept.setdefault(names[name], {})[dim] = indices
    readers = {(names[member.name], member.dim) for groups in named for member in groups.members if member.reads}
    return ShrinkPlan(kept, readers, widths.config, removals)


def expected_removals(cls: Any, settings: Any, target: GroupTarget) -> list[Removal]:
    """What could be removed after a run with a target for groups, if in every layer the first ones were dead.

    Args:
        cls: as of `model_class`.
        settings: as of `model_class`.
        target: of the run.
    Raises:
        UsageError: as of `resolve_groups` and `attach`.
    """
    model = build_on_meta(cls, settings, "its configuration")
    recognised, _ = recognised_groups(model)
    dead = {
        groups.label: torch.zeros(groups.count, dtype=torch.bool) for kind in recognised.values() for groups in kind
    }
    total_parameters = sum(param.numel() for param in model.parameters())
    counts = groups_to_prune(group_budget(target), resolve_groups(model, target.groups), total_parameters)
    for label, count in counts.items():
        # Groups that the user described are not recognised, so they can't be removed.
        if label in dead:
            dead[label][:count] = True
    for shared, queries in zip(recognised.get("kv_groups", []), recognised.get("heads", [])):
        dead[queries.label] |= dead[shared.label].repeat_interleave(queries.count // shared.count)
        dead[shared.label] |= dead[queries.label].view(shared.count, -1).all(dim=1)
    return _removals(Widths(cls, settings, settings.to_dict(), model), recognised, dead, multiple=1)


def _removals(
    widths: Widths, recognised: dict[str, list[WeightGroups]], dead: dict[str, Tensor], multiple: int
) -> list[Removal]:
    """Cuts `widths`, and says what was removed of the kinds of groups that have dead ones."""
    removals = _channels(widths, recognised.get("channels", []), dead, multiple)
    removals += _heads(widths, recognised.get("kv_groups", []), recognised.get("heads", []), dead)
    return [removal for removal in removals if any(removal.dead)]


def _nothing_is_dead(sets: list[WeightGroups], named: list[WeightGroups], cls: str) -> str:
    """The message. named: those of the groups whose parameters are in the checkpoint."""
    counts = [
        (sum(groups.count for groups in named if groups.kind == kind), what)
        for kind, what in (("channels", _CHANNELS), ("heads", _HEADS))
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
    sets: list[WeightGroups], names: dict[str, str], tensors: list[HfTensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """{label: (count,) bool, which groups are read by zeros alone}."""
    dead = {groups.label: torch.ones(groups.count, dtype=torch.bool) for groups in sets}
    readers: dict[str, list[tuple[str, Member]]] = {}
    for groups in sets:
        for member in groups.members:
            if member.reads:
                readers.setdefault(names[member.name], []).append((groups.label, member))
    reading = [tensor for tensor in tensors if readers.keys() & tensor.shapes.keys()]
    for hf_tensor in tqdm(reading, desc="Looking for dead channels and heads"):
        for name, tensor in hf_tensor.read().items():
            for label, member in readers.get(name, ()):
                # Without a tensor of bools as large as the weights.
                low, high = (
                    in_dtype(tensor, dtype)
                    .narrow(member.dim, member.start, member.stop - member.start)
                    .aminmax(dim=1 - member.dim)
                )
                dead[label] &= ((low == 0) & (high == 0)).view(-1, member.width).all(dim=1)
    return dead


def _grouped_by(sets: list[WeightGroups], key: Callable[[WeightGroups], Any]) -> list[list[WeightGroups]]:
    grouped: dict[Any, list[WeightGroups]] = {}
    for groups in sets:
        grouped.setdefault(key(groups), []).append(groups)
    return [*grouped.values()]


def _alive(dead: dict[str, Tensor], groups: WeightGroups) -> int:
    """How many must stay: one at least."""
    return max(1, groups.count - int(dead[groups.label].sum()))


def _kept(dead: Tensor, count: int) -> Tensor:
    """Which groups stay where `count` do: all that are not dead, and the first of the dead ones."""
    kept = ~dead
    kept[dead.nonzero().flatten()[: count - int(kept.sum())]] = True
    return kept


def _removal(
    what: str, sets: list[WeightGroups], dead: dict[str, Tensor], after: list[int], why_dead_stay: str
) -> Removal:
    dead_counts = [int(dead[groups.label].sum()) for groups in sets]
    removal = Removal(what, dead_counts, [groups.count for groups in sets], after, why_dead_stay)
    return removal if removal.removed < sum(removal.dead) else replace(removal, why="")


def _pattern_of(groups: WeightGroups) -> str:
    """The module's name without its numbers. Encoder and decoder differ in it."""
    return re.sub(r"\d+", "*", groups.name)


# -- feed-forward channels ----------------------------------------------------


def _channels(widths: Widths, sets: list[WeightGroups], dead: dict[str, Tensor], multiple: int) -> list[Removal]:
    removals: list[Removal] = []
    remaining = sets
    width_of = {
        groups.label: min(groups.count, math.ceil(_alive(dead, groups) / multiple) * multiple) for groups in sets
    }
    rounded = f", rounded up to a multiple of {multiple}" if multiple > 1 else ""
    # Each layer gets a width of its own where the config has a list of widths.
    for layers in _grouped_by(sets, _pattern_of):
        cuts = [Cut(groups, _kept(dead[groups.label], width_of[groups.label])) for groups in layers]
        before, after = (
            {layer_of(groups.name): width for groups, width in zip(layers, counts)}
            for counts in ([groups.count for groups in layers], [width_of[groups.label] for groups in layers])
        )
        if (
            before != after
            and len(before) == len(layers)
            and any(widths.cut(cuts, edits(after)) for edits in widths.layer_list_edits(before))
        ):
            removals.append(_removal(_CHANNELS, layers, dead, [*after.values()], rounded.removeprefix(", ")))
            remaining = [groups for groups in remaining if groups not in layers]

    def cut_to_one_width(layers: list[WeightGroups], report_failure: bool) -> bool:
        """Cuts these layers to the width of the one that needs most, and returns whether that was possible."""
        widest, before = max(layers, key=lambda groups: width_of[groups.label]), layers[0].count
        width = width_of[widest.label]
        cuts = [Cut(groups, _kept(dead[groups.label], width)) for groups in layers]
        fits = width < before and any(
            widths.cut(cuts, dict.fromkeys(paths, width)) for paths in widths.channel_entries(before)
        )
        why = f"all layers have one width, and {widest.name} needs {_alive(dead, widest):,}{rounded}"
        if width < before and not fits:
            why = f"no entry of config.json, changed alone, makes them fewer than {before:,}"
        if fits or report_failure:
            removals.append(_removal(_CHANNELS, layers, dead, [width if fits else before] * len(layers), why))
        return fits

    for same_width in _grouped_by(remaining, lambda groups: groups.count):
        # Encoder and decoder may have config entries of their own.
        stacks = _grouped_by(same_width, _pattern_of)
        uncut = [
            groups
            for stack in stacks
            if len(stacks) == 1 or not cut_to_one_width(stack, report_failure=False)
            for groups in stack
        ]
        if uncut:
            cut_to_one_width(uncut, report_failure=True)
    return removals


# -- attention heads ----------------------------------------------------------


def _heads(
    widths: Widths, sets: list[WeightGroups], query_sets: list[WeightGroups], dead: dict[str, Tensor]
) -> list[Removal]:
    """Removes heads of keys and values with the queries that read them. Where several queries read a head of keys and
    values, the same number of these is then removed from every such head.
    """
    removals: list[Removal] = []
    queries_of = {groups.name: groups for groups in query_sets}
    for layers in _grouped_by(sets, lambda groups: (groups.count, queries_of[groups.name].count)):
        before, heads = layers[0].count, queries_of[layers[0].name].count
        ratio = heads // before
        size = next(member.width for member in layers[0].members if member.reads) // ratio
        head_edits = [*widths.head_edits(heads, before, size)]
        fullest = max(layers, key=lambda groups: _alive(dead, groups))
        fewest = _alive(dead, fullest)

        def shared_cuts(count: int, layers: list[WeightGroups] = layers) -> list[Cut]:
            return [Cut(groups, _kept(dead[groups.label], count)) for groups in layers]

        count, why = _fewest(
            widths,
            range(fewest, before),
            shared_cuts,
            [lambda count, edits=edits, ratio=ratio: edits(count * ratio, count) for edits in head_edits],
        )
        what = _HEADS if ratio == 1 else f"groups of {ratio} attention heads"
        why = f"all layers have one number, {fullest.name} needs {fewest}{why}"
        removals.append(_removal(what, layers, dead, [count] * len(layers), why))
        if ratio > 1:
            removals.append(_queries_within(widths, shared_cuts(count), count, queries_of, dead, head_edits))
    return removals


def _queries_within(
    widths: Widths,
    kept_shared: list[Cut],
    count: int,
    queries_of: dict[str, WeightGroups],
    dead: dict[str, Tensor],
    head_edits: list[Callable[[int, int], Edits]],
) -> Removal:
    """Removes dead query heads whose keys and values stay.

    Args:
        widths: the model, after the cut `kept_shared`.
        kept_shared: which heads of keys and values stay.
        count: how many of them stay in each layer.
        queries_of: {module: its query heads}.
        dead: {label: which groups are dead}.
        head_edits: of the config entries.
    """
    ratio = queries_of[kept_shared[0].groups.name].count // kept_shared[0].groups.count
    # Of each layer, (heads of keys and values, ratio) bool: the dead queries of those that stay.
    layers = [
        (
            queries_of[groups.name],
            kept,
            dead[queries_of[groups.name].label].view(groups.count, ratio) & kept[:, None],
        )
        for groups, kept in kept_shared
    ]
    limiting, removable = min(
        ((queries, int(dead_queries[kept].sum(dim=1).min())) for queries, kept, dead_queries in layers),
        key=lambda item: item[1],
    )

    def query_cuts(per_head: int) -> list[Cut]:
        return [
            Cut(queries, ~(dead_queries & (dead_queries.cumsum(dim=1) <= ratio - per_head)).flatten())
            for queries, _, dead_queries in layers
        ]

    per_head, why = _fewest(
        widths,
        range(max(1, ratio - removable), ratio),
        query_cuts,
        [lambda per_head, edits=edits: edits(count * per_head, count) for edits in head_edits],
    )
    return Removal(
        f"{_HEADS} in groups that stay",
        [int(dead_queries.sum()) for _, _, dead_queries in layers],
        [count * ratio] * len(layers),
        [count * per_head] * len(layers),
        f"every group must lose as many, and one of {limiting.name} has {removable} dead ones{why}",
    )


def _fewest(
    widths: Widths,
    numbers: range,
    cuts: Callable[[int], list[Cut]],
    edits: list[Callable[[int], Edits]],
) -> tuple[int, str]:
    """Cuts to the first of the numbers that the config can hold.

    Returns:
        That number, or the one after all of them; and why it is not an earlier one, as the end of a sentence.
    """
    makes_another_model = False
    for edit in edits:
        for number in numbers:
            taken = widths.cut(cuts(number), edit(number))
            if taken:
                if number == numbers.start:
                    return number, ""
                return number, f", and the model's configuration takes no number below {number}"
            makes_another_model |= taken is False
            if makes_another_model:
                # The next number would do the same.
                break
    why = (
        "with fewer the config makes a model of other ones, not of these"
        if makes_another_model
        else "the model's configuration takes no smaller number"
    )
    return numbers.stop, f", and {why}" if numbers else ""
