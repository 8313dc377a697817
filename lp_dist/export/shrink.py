"""`lp-dist export --shrink`: dead feed-forward channels and attention heads are left out, as far as config.json can
say how many are left.

A group of weights (`structure.py`) is dead where everything that reads it is zero. It has no effect then: leaving it
out takes zeros out of sums.
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
from lp_dist.checkpoints.hf_names import Published, in_dtype, made_on_meta, model_class, names_in
from lp_dist.errors import UsageError
from lp_dist.export.widths import Widths
from lp_dist.sparsity.measure import layer_of
from lp_dist.structured.budget import groups_to_prune
from lp_dist.structured.groups import Groups, Member
from lp_dist.structured.naming import recognised, structure
from lp_dist.targets.group_controller import group_budget
from lp_dist.targets.target import SparsityTarget

_CHANNELS, _HEADS = "feed-forward channels", "attention heads"


@dataclass(frozen=True)
class Removed:
    """What became of groups whose number one entry of the config says. what: in words. dead, before, after: their
    numbers in each part of the model. why: what keeps dead ones there; empty where all are gone."""

    what: str
    dead: list[int]
    before: list[int]
    after: list[int]
    why: str = ""

    @property
    def gone(self) -> int:
        return sum(self.before) - sum(self.after)

    def __str__(self) -> str:
        told = f"{sum(self.dead):,} of {sum(self.before):,} {self.what} are dead"
        if not self.gone:
            return f"{told} and stay: {self.why}"
        widths = " → ".join(
            f"{min(of):,}" if len(set(of)) == 1 else f"{min(of):,} to {max(of):,}" for of in (self.before, self.after)
        )
        return (
            f"{told}, {self.gone:,} are gone: {widths} in each of {len(self.before)}"
            f" layers{'; ' * bool(self.why)}{self.why}"
        )


@dataclass(frozen=True)
class Shrunk:
    """A model without dead groups. kept: by published name and dimension, which indices stay (width,), of those that
    lose some. readers: the dimensions of these at which only zeros go. config: its config.json. removed: what became
    of each kind of groups.
    """

    kept: dict[str, dict[int, Tensor]]
    readers: set[tuple[str, int]]
    config: dict[str, Any]
    removed: list[Removed]

    @property
    def sums(self) -> list[int]:
        """How many terms the sums had that have fewer now, a number for each tensor."""
        return [
            len(stays)
            for name, dims in self.kept.items()
            for dim, stays in dims.items()
            if (name, dim) in self.readers
        ]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of this tensor, in its order."""
        for dim, stays in self.kept.get(name, {}).items():
            tensor = tensor.index_select(dim, stays.nonzero().flatten())
        return tensor

    def takes_only_zeros(self, name: str, tensor: Tensor) -> bool:
        """Whether what goes of this tensor and would be read is zero."""
        gone = [
            (dim, (~stays).nonzero().flatten())
            for dim, stays in self.kept.get(name, {}).items()
            if (name, dim) in self.readers
        ]
        return not any(bool(tensor.index_select(dim, indices).any()) for dim, indices in gone)


def planned(
    pieces: list[Published],
    config: Path,
    dtype: torch.dtype | None = None,
    multiple: int = 1,
    trust_remote_code: bool = False,
) -> Shrunk:
    """Finds out what can go. Reads what reads channels and heads, one tensor at a time.

    Args:
        pieces: the model's tensors (`published`), which may not fit into memory. config: directory of its config.json.
        dtype: of the export; what is zero in it is dead. None: as they are.
        multiple: the width of feed-forward layers is rounded up to it, as far as they had so many channels.
    Raises:
        UsageError: neither channels nor heads are recognised, none is dead, or none of the dead ones can go; says why.
    """
    cls, settings = model_class(config, trust_remote_code)
    model = made_on_meta(cls, settings, f"{config}/config.json")
    found, reasons = recognised(model)
    if not found:
        raise UsageError(f"--shrink has nothing to look at: {'; '.join(reasons)}")
    parts = [groups for kind in found.values() for groups in kind]
    names = names_in(model, {name: shape for piece in pieces for name, shape in piece.shapes.items()})
    known = [groups for groups in parts if all(member.name in names for member in groups.members)]
    dead = {groups.label: torch.zeros(groups.count, dtype=torch.bool) for groups in parts} | _dead(
        known, names, pieces, dtype
    )
    if not any(bool(one.any()) for one in dead.values()):
        counts = [
            (sum(groups.count for groups in known if groups.kind == kind), what)
            for kind, what in (("channels", _CHANNELS), ("heads", _HEADS))
        ]
        none = " and ".join(f"{count:,} {what}" for count, what in counts if count)
        why = (
            f"of {none} of {cls.__name__} none is dead"
            if none
            else f"the checkpoint's tensors have other names than those of {cls.__name__}"
        )
        if none and len(known) < len(parts):
            why += (
                f" (and {len(parts) - len(known)} parts of it, such as"
                f" {next(one.name for one in parts if one not in known)}, have other names in the checkpoint)"
            )
        raise UsageError(
            f"--shrink finds nothing to remove: {why}. Single zeros are not enough: all that reads a channel or head"
            ' must be zero, as a target for whole groups makes it: SparsityTarget(0.5, groups="channels"), or'
            ' "kv_groups"'
        )
    widths = Widths(cls, settings, read_json(config / "config.json"), model)
    removed = _channels(widths, found.get("channels", []), dead, multiple) + _heads(
        widths, found.get("kv_groups", []), found.get("heads", []), dead
    )
    removed = [one for one in removed if any(one.dead)]
    if not any(one.gone for one in removed):
        raise UsageError(f"--shrink can remove nothing: {'; '.join(map(str, removed))}")
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, dim), stays in widths.kept.items():
        if not stays.all():
            kept.setdefault(names[name], {})[dim] = stays
    readers = {(names[member.name], member.dim) for groups in known for member in groups.members if member.reads}
    return Shrunk(kept, readers, widths.config, removed)


def foreseen(cls: Any, settings: Any, target: SparsityTarget) -> list[Removed]:
    """What could be cut out after a run with this target of groups, by the model's configuration alone, if in every
    layer the first ones died.

    Args: cls, settings: of the model, as of `model_class`. Raises UsageError as `structure` and `attach` do.
    """
    model = made_on_meta(cls, settings, "its configuration")
    found, _ = recognised(model)
    dead = {groups.label: torch.zeros(groups.count, dtype=torch.bool) for kind in found.values() for groups in kind}
    for label, number in groups_to_prune(
        group_budget(target), structure(model, target.groups), sum(param.numel() for param in model.parameters())
    ).items():
        if label in dead:  # else they are of the user's own
            dead[label][:number] = True
    for shared, queries in zip(found.get("kv_groups", []), found.get("heads", [])):
        dead[queries.label] |= dead[shared.label].repeat_interleave(queries.count // shared.count)
        dead[shared.label] |= dead[queries.label].view(shared.count, -1).all(dim=1)
    widths = Widths(cls, settings, settings.to_dict(), model)
    removed = _channels(widths, found.get("channels", []), dead, 1) + _heads(
        widths, found.get("kv_groups", []), found.get("heads", []), dead
    )
    return [one for one in removed if any(one.dead)]


def _dead(
    parts: list[Groups], names: dict[str, str], pieces: list[Published], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """{label: which groups are read by zeros alone (count,)}."""
    dead = {groups.label: torch.ones(groups.count, dtype=torch.bool) for groups in parts}
    readers: dict[str, list[tuple[str, Member]]] = {}
    for groups in parts:
        for member in groups.members:
            if member.reads:
                readers.setdefault(names[member.name], []).append((groups.label, member))
    for piece in tqdm(
        [piece for piece in pieces if readers.keys() & piece.shapes.keys()], desc="Looking for dead channels and heads"
    ):
        for name, tensor in piece.read().items():
            for label, member in readers.get(name, ()):
                # Without a tensor of bools as large as the weights.
                low, high = (
                    in_dtype(tensor, dtype)
                    .narrow(member.dim, member.start, member.stop - member.start)
                    .aminmax(dim=1 - member.dim)
                )
                dead[label] &= ((low == 0) & (high == 0)).view(-1, member.width).all(dim=1)
    return dead


def _alike(parts: list[Groups], key: Callable[[Groups], Any]) -> list[list[Groups]]:
    found: dict[Any, list[Groups]] = {}
    for groups in parts:
        found.setdefault(key(groups), []).append(groups)
    return [*found.values()]


def _alive(dead: dict[str, Tensor], groups: Groups) -> int:
    """How many must stay: one at least."""
    return max(1, groups.count - int(dead[groups.label].sum()))


def _stays(dead: Tensor, width: int) -> Tensor:
    """Which of the groups stay where so many do: all that are alive, and the first of the dead ones."""
    stays = ~dead
    stays[dead.nonzero().flatten()[: width - int(stays.sum())]] = True
    return stays


def _told(what: str, parts: list[Groups], dead: dict[str, Tensor], after: list[int], why: str) -> Removed:
    removed = Removed(
        what, [int(dead[groups.label].sum()) for groups in parts], [groups.count for groups in parts], after, why
    )
    return removed if removed.gone < sum(removed.dead) else replace(removed, why="")


# -- feed-forward channels ----------------------------------------------------


def _channels(widths: Widths, parts: list[Groups], dead: dict[str, Tensor], multiple: int) -> list[Removed]:
    removed, left = [], parts
    to = {groups.label: min(groups.count, math.ceil(_alive(dead, groups) / multiple) * multiple) for groups in parts}
    rounded = f", rounded up to a multiple of {multiple}" if multiple > 1 else ""
    for alike in _alike(
        parts, lambda groups: re.sub(r"\d+", "*", groups.name)
    ):  # each layer with a width of its own, where the config has a list
        cuts = [(groups, _stays(dead[groups.label], to[groups.label])) for groups in alike]
        before, after = (
            {layer_of(groups.name): width for groups, width in zip(alike, of)}
            for of in ([groups.count for groups in alike], [to[groups.label] for groups in alike])
        )
        if (
            before != after
            and len(before) == len(alike)
            and any(widths.cut(cuts, edits(after)) for edits in widths.of_lists(before))
        ):
            removed.append(_told(_CHANNELS, alike, dead, [*after.values()], rounded.removeprefix(", ")))
            left = [groups for groups in left if groups not in alike]

    def one_width(alike: list[Groups], whole: bool) -> bool:
        """Cuts these parts to the width of the one that needs most, and whether it could be done. whole: tells it also
        if not.
        """
        most, before = max(alike, key=lambda groups: to[groups.label]), alike[0].count
        width = to[most.label]
        cuts = [(groups, _stays(dead[groups.label], width)) for groups in alike]
        fits = width < before and any(
            widths.cut(cuts, dict.fromkeys(places, width)) for places in widths.of_channels(before)
        )
        why = f"all layers have one width, and {most.name} needs {_alive(dead, most):,}{rounded}"
        if width < before and not fits:
            why = f"no entry of config.json, changed alone, makes them fewer than {before:,}"
        if fits or whole:
            removed.append(_told(_CHANNELS, alike, dead, [width if fits else before] * len(alike), why))
        return fits

    for same in _alike(left, lambda groups: groups.count):
        kinds = _alike(
            same, lambda groups: re.sub(r"\d+", "*", groups.name)
        )  # encoder and decoder may have keys of their own
        rest = [groups for kind in kinds if len(kinds) == 1 or not one_width(kind, False) for groups in kind]
        if rest:
            one_width(rest, True)
    return removed


# -- attention heads ----------------------------------------------------------


def _heads(widths: Widths, shared: list[Groups], queries: list[Groups], dead: dict[str, Tensor]) -> list[Removed]:
    """Heads of keys and values with the queries that read them; and where several do, as many of these of every head
    of keys and values.
    """
    removed, of = [], {groups.name: groups for groups in queries}
    for alike in _alike(shared, lambda groups: (groups.count, of[groups.name].count)):
        before, heads = alike[0].count, of[alike[0].name].count
        share = heads // before
        places = [
            *widths.of_heads(heads, before, next(member.width for member in alike[0].members if member.reads) // share)
        ]
        most = max(alike, key=lambda groups: _alive(dead, groups))
        least = _alive(dead, most)

        def whole(few: int) -> list[tuple[Groups, Tensor]]:
            return [(groups, _stays(dead[groups.label], few)) for groups in alike]

        few, why = _fewest(
            widths, range(least, before), whole, [lambda few, write=write: write(few * share, few) for write in places]
        )
        what = _HEADS if share == 1 else f"groups of {share} attention heads"
        removed.append(
            _told(what, alike, dead, [few] * len(alike), f"all layers have one number, {most.name} needs {least}{why}")
        )
        if share == 1:
            continue
        # What is dead beyond whole groups: (few, share) in each layer.
        single = [
            (of[groups.name], stay, dead[of[groups.name].label].view(before, share) & stay[:, None])
            for groups, stay in whole(few)
        ]
        worst, lost = min(
            ((groups, int(gone[stay].sum(dim=1).min())) for groups, stay, gone in single), key=lambda one: one[1]
        )

        def fewer(each: int) -> list[tuple[Groups, Tensor]]:
            return [(groups, ~(gone & (gone.cumsum(dim=1) <= share - each)).flatten()) for groups, _, gone in single]

        each, why = _fewest(
            widths,
            range(max(1, share - lost), share),
            fewer,
            [lambda each, write=write: write(few * each, few) for write in places],
        )
        counts = [int(gone.sum()) for _, _, gone in single], [few * share] * len(single), [few * each] * len(single)
        why = f"every group must lose as many, and one of {worst.name} has {lost} dead ones{why}"
        removed.append(Removed(f"{_HEADS} in groups that stay", *counts, why))
    return removed


def _fewest(
    widths: Widths,
    numbers: range,
    cuts: Callable[[int], list[tuple[Groups, Tensor]]],
    places: list[Callable[[int], Any]],
) -> tuple[int, str]:
    """The first of the numbers that the config can say, or the one after them; and why not an earlier one, as the end
    of a sentence.
    """
    another = False
    for write in places:
        for number in numbers:
            taken = widths.cut(cuts(number), write(number))
            if taken:
                return number, (
                    ""
                    if number == numbers.start
                    else f", and the model's configuration takes no number below {number}"
                )
            another |= taken is False
            if another:  # so it would be for the next number
                break
    why = (
        "with fewer the config makes a model of other ones, not of these"
        if another
        else "the model's configuration takes no smaller number"
    )
    return numbers.stop, f", and {why}" if numbers else ""
