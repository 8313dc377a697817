"""Which dead groups can be removed from a model: as many as its configuration can say, in every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lp_dist.checkpoints.hf_names import Conversion, build_on_meta, hf_shapes_of, name_map
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.resolve import recognised_groups
from lp_dist.structured.widths import Cut, Edits, Widths

_CHANNELS, _HEADS, _EXPERTS, _EXPERT_CHANNELS = (
    "feed-forward channels",
    "attention heads",
    "experts",
    "channels of experts",
)
# What each kind of groups is called in words.
WORDS = {
    "channels": _CHANNELS,
    "heads": _HEADS,
    "kv_groups": _HEADS,
    "experts": _EXPERTS,
    "expert_channels": _EXPERT_CHANNELS,
}
# Why groups stay whose parameters lie together in the files.
FUSED = "what the model has in several parameters is one tensor in its files"


@dataclass(frozen=True)
class Removal:
    """What was removed of the groups whose number one entry of the config holds.

    Args:
        what: the kind of groups, in words.
        dead: how many are dead in each module.
        before: how many there were in each module.
        after: how many stay in each module.
        why: why dead ones stay; empty where all are removed.
        where: what these modules are, in words.
    """

    what: str
    dead: list[int]
    before: list[int]
    after: list[int]
    why: str = ""
    where: str = "layers"

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
            f" {self.where}{'; ' * bool(self.why)}{self.why}"
        )


def plan_removals(
    widths: Widths, recognised: dict[str, list[WeightGroups]], dead: dict[str, Tensor], multiple: int = 1
) -> list[Removal]:
    """Cuts `widths`, and says what was removed of the kinds of groups that have dead ones.

    Args:
        widths: the model; it is cut.
        recognised: of `recognised_groups`.
        dead: {label: (count,) bool, which groups are dead}.
        multiple: what the widths of feed-forward layers are rounded up to, at most to those before.
    """
    removals = _experts(widths, recognised.get("experts", []), dead)
    channels = [
        groups
        for kind in ("channels", "expert_channels")
        for groups in recognised.get(kind, [])
        if not any(widths.removes(member) for member in groups.members)
    ]
    removals += _channels(widths, channels, dead, multiple)
    queries, shared = recognised.get("heads", []), recognised.get("kv_groups", [])
    known = {groups.name for groups in shared}
    removals += _heads(widths, shared, [groups for groups in queries if groups.name in known], dead)
    alone = [groups for groups in queries if groups.name not in known]
    if alone:
        why = f"it is not known which keys and values the heads of {alone[0].name} read"
        removals.append(_removal(_HEADS, alone, dead, [groups.count for groups in alone], why))
    return [removal for removal in removals if any(removal.dead)]


@dataclass(frozen=True)
class ForeseenRemovals:
    """What could be removed after a run.

    Args:
        removals: of each kind.
        parameters: that are left.
        uncut: labels of the sets of groups of which none would be removed.
    """

    removals: list[Removal]
    parameters: int
    uncut: frozenset[str]


def foreseen_removals(
    cls: Any, settings: Any, counts: dict[str, int], recognised: dict[str, list[WeightGroups]] | None = None
) -> ForeseenRemovals:
    """What could be removed after a run with a target for groups, if the groups of a layer that die are its first
    ones.

    Query heads that share keys and values are an exception: which of them die can't be foreseen, and they can be
    removed only where all layers lose them alike. So they die in another order in every second layer.

    Args:
        cls: as of `model_class`.
        settings: as of `model_class`.
        counts: {label: how many groups of the set die}.
        recognised: as of `recognised_groups`, of such a model; None: they are recognised here.
    Raises:
        UsageError: as of `build_on_meta`.
    """
    # A class may write into the configuration that it is made from.
    settings = deepcopy(settings)
    model = build_on_meta(cls, settings, "its configuration")
    if recognised is None:
        recognised, _ = recognised_groups(model)
    dead = {
        groups.label: torch.zeros(groups.count, dtype=torch.bool) for kind in recognised.values() for groups in kind
    }
    for label, count in counts.items():
        # Groups that the user described are not recognised, so they can't be removed.
        if label in dead:
            dead[label][:count] = True
    shared_of = {groups.name: groups for groups in recognised.get("kv_groups", [])}
    for i, queries in enumerate(recognised.get("heads", [])):
        shared = shared_of.get(queries.name)
        if shared is None:
            continue
        if shared.count < queries.count and i % 2:
            # One of each group after the other.
            by_group = dead[queries.label].view(-1, shared.count).T
            dead[queries.label] = by_group.reshape(-1)
        dead[queries.label] |= dead[shared.label].repeat_interleave(queries.count // shared.count)
        dead[shared.label] |= dead[queries.label].view(shared.count, -1).all(dim=1)
    in_files = name_map(model, hf_shapes_of(model))
    fused = {
        groups.label
        for kind in recognised.values()
        for groups in kind
        if any(not _is_alone(in_files.by_param.get(member.name)) for member in groups.members)
    }
    kept = {label: dead.pop(label) for label in fused}
    dead |= {label: torch.zeros_like(flags) for label, flags in kept.items()}
    widths = Widths(cls, settings, settings.to_dict(), model)
    removals = plan_removals(widths, recognised, dead)
    for kind, sets in recognised.items():
        stay = [groups for groups in sets if groups.label in fused and kept[groups.label].any()]
        if stay:
            removals.append(_removal(WORDS[kind], stay, kept, [groups.count for groups in stay], FUSED))
    parameters = {name for name, _ in model.named_parameters()}
    left = sum(math.prod(shape) for name, shape in widths.shapes.items() if name in parameters)
    cut = {name for (name, _), kept in {**widths.kept, **widths.kept_by_expert}.items() if not kept.all()}
    sets = [groups for kind in recognised.values() for groups in kind if groups.label in counts]
    return ForeseenRemovals(
        removals,
        left,
        frozenset(groups.label for groups in sets if not any(member.name in cut for member in groups.members)),
    )


def _is_alone(conversion: Conversion | None) -> bool:
    """Whether the files have a parameter for itself, in one tensor or in several."""
    return conversion is not None and len(conversion.shapes) == 1


def _grouped_by(sets: list[WeightGroups], key: Callable[[WeightGroups], Any]) -> list[list[WeightGroups]]:
    grouped: dict[Any, list[WeightGroups]] = {}
    for groups in sets:
        grouped.setdefault(key(groups), []).append(groups)
    return [*grouped.values()]


def _alive(dead: dict[str, Tensor], groups: WeightGroups) -> int:
    """How many must stay: one at least, and as many experts as their router chooses."""
    return max(1, groups.least, groups.count - int(dead[groups.label].sum()))


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


def _layer_of(groups: WeightGroups) -> int | None:
    """The number of the layer of the model that these groups are in."""
    return next((int(word) for word in groups.name.split(".") if word.isdigit()), None)


def _pattern_of(groups: WeightGroups) -> str:
    """The module's name without its numbers. Encoder and decoder differ in it."""
    return re.sub(r"\d+", "*", groups.name)


# -- experts ------------------------------------------------------------------


def _experts(widths: Widths, sets: list[WeightGroups], dead: dict[str, Tensor]) -> list[Removal]:
    """Removes experts: of each group that is routed together as many, and in each layer as many unless the config has
    a number for each.
    """
    removals: list[Removal] = []
    totals: dict[str, int] = {}
    for groups in sets:
        totals[groups.name] = totals.get(groups.name, 0) + groups.count
    for layers in _grouped_by(sets, lambda groups: (groups.count, totals[groups.name])):
        sections = totals[layers[0].name] // layers[0].count
        needed: dict[int, int] = {}
        for groups in layers:
            layer = _layer_of(groups) or 0
            needed[layer] = max(needed.get(layer, 0), _alive(dead, groups))
        before = dict.fromkeys(needed, layers[0].count)

        def cuts(counts: Callable[[int], int], layers: list[WeightGroups] = layers) -> list[Cut]:
            return [Cut(groups, _kept(dead[groups.label], counts(_layer_of(groups) or 0))) for groups in layers]

        if len(set(needed.values())) > 1:
            scaled = [{i: n * sections for i, n in numbers.items()} for numbers in (before, needed)]
            by_layer = cuts(needed.__getitem__)
            if any(widths.cut(by_layer, edits(scaled[1])) for edits in widths.layer_list_edits(scaled[0])):
                after = [needed[_layer_of(groups) or 0] for groups in layers]
                removals.append(_removal(_EXPERTS, layers, dead, after, _ROUTED))
                continue
        fullest = max(layers, key=lambda groups: _alive(dead, groups))
        fewest = _alive(dead, fullest)
        count, why = _fewest(
            widths,
            range(fewest, layers[0].count),
            lambda number, cuts=cuts: cuts(lambda _: number),
            [
                lambda number, paths=paths, sections=sections: dict.fromkeys(paths, number * sections)
                for paths in widths.expert_entries(totals[layers[0].name])
            ],
        )
        chosen = fullest.count - int(dead[fullest.label].sum()) < fewest
        why = f"all layers have one number, {fullest.name} needs {fewest}{f', {_ROUTED}' if chosen else ''}{why}"
        removals.append(_removal(_EXPERTS, layers, dead, [count] * len(layers), why))
    return removals


_ROUTED = "since its router chooses as many"


# -- feed-forward channels ----------------------------------------------------


def _channels(widths: Widths, sets: list[WeightGroups], dead: dict[str, Tensor], multiple: int) -> list[Removal]:
    """Removes channels of feed-forward layers and of experts."""
    cuts = _ChannelCuts(widths, dead, multiple)
    remaining = [
        groups
        for layers in _grouped_by(sets, _pattern_of)
        if not cuts.cut_to_widths_by_layer(layers)
        for groups in layers
    ]
    uncut: list[WeightGroups] = []
    for same_width in _grouped_by(remaining, lambda groups: groups.count):
        # Encoder and decoder may have config entries of their own, as experts and dense layers.
        stacks = _grouped_by(same_width, _pattern_of)
        of_width = [groups for stack in stacks if not cuts.cut_to_one_width(stack) for groups in stack]
        if of_width and (len(stacks) == 1 or not cuts.cut_to_one_width(of_width)):
            uncut += of_width
    for base in sorted({groups.count for groups in uncut}):
        multiples = [groups for groups in uncut if groups.count % base == 0]
        if len({groups.count for groups in multiples}) > 1 and cuts.cut_to_one_width(multiples):
            uncut = [groups for groups in uncut if groups not in multiples]
    for same_width in _grouped_by(uncut, lambda groups: groups.count):
        cuts.cut_to_one_width(same_width, report_failure=True)
    return cuts.removals


class _ChannelCuts:
    """Removes channels step by step.

    Args:
        widths: the model.
        dead: {label: (count,) bool, which groups are dead}.
        multiple: what widths are rounded up to.
    """

    def __init__(self, widths: Widths, dead: dict[str, Tensor], multiple: int) -> None:
        self.removals: list[Removal] = []
        self._widths, self._dead, self._multiple = widths, dead, multiple

    def cut_to_widths_by_layer(self, layers: list[WeightGroups]) -> bool:
        """Cuts each layer to a width of its own, where the config has a list of widths, or may have one."""
        before: dict[int | None, int] = {}
        after: dict[int | None, int] = {}
        for groups in layers:
            layer = _layer_of(groups)
            before[layer] = groups.count
            after[layer] = max(after.get(layer, 0), self._width(groups))
        if None in before or before == after or len(set(after.values())) == len(set(before.values())) == 1:
            return False
        widths = [after[_layer_of(groups)] for groups in layers]
        cuts = [Cut(groups, _kept(self._dead[groups.label], width)) for groups, width in zip(layers, widths)]
        if not any(self._widths.cut(cuts, edits(after)) for edits in self._widths.layer_list_edits(before)):
            return False
        self._report(layers, widths, self._rounded(layers[0]).removeprefix(", "))
        return True

    def cut_to_one_width(self, layers: list[WeightGroups], report_failure: bool = False) -> bool:
        """Cuts these layers to the width of the one that needs most, and returns whether that was possible. Some may
        be several times as wide as others, as the shared experts of some models.
        """
        before = min(groups.count for groups in layers)
        widest = max(layers, key=lambda groups: self._width(groups) / groups.count)
        width = math.ceil(self._width(widest) * before / widest.count)
        after = [width * (groups.count // before) for groups in layers]
        cuts = [Cut(groups, _kept(self._dead[groups.label], number)) for groups, number in zip(layers, after)]
        fits = width < before and any(
            self._widths.cut(cuts, dict.fromkeys(paths, width)) for paths in self._widths.channel_entries(before)
        )
        why = f"all layers have one width, and {widest.name}{widest.section} needs {_alive(self._dead, widest):,}"
        why += self._rounded(widest)
        if width < before and not fits:
            why = f"no entry of config.json, changed alone, makes them fewer than {before:,}"
        if fits or report_failure:
            self._report(layers, after if fits else [groups.count for groups in layers], why)
        return fits

    def _report(self, layers: list[WeightGroups], after: list[int], why: str) -> None:
        of_experts = all(groups.kind == "expert_channels" for groups in layers)
        what, where = (_EXPERT_CHANNELS, "experts") if of_experts else (_CHANNELS, "layers")
        self.removals.append(replace(_removal(what, layers, self._dead, after, why), where=where))

    def _multiple_of(self, groups: WeightGroups) -> int:
        # Products of many experts at once (grouped_mm) take rows of a multiple of 16 bytes.
        is_of_experts = groups.kind == "expert_channels"
        return math.lcm(self._multiple, math.gcd(groups.count, 8)) if is_of_experts else self._multiple

    def _rounded(self, groups: WeightGroups) -> str:
        multiple = self._multiple_of(groups)
        return f", rounded up to a multiple of {multiple}" if multiple > 1 else ""

    def _width(self, groups: WeightGroups) -> int:
        multiple = self._multiple_of(groups)
        return min(groups.count, math.ceil(_alive(self._dead, groups) / multiple) * multiple)


# -- attention heads ----------------------------------------------------------


def _heads(
    widths: Widths, sets: list[WeightGroups], query_sets: list[WeightGroups], dead: dict[str, Tensor]
) -> list[Removal]:
    """Removes heads of keys and values with the queries that read them. Where several queries read a head of keys and
    values, the same number of these is then removed from every such head.
    """
    removals: list[Removal] = []
    queries_of = {groups.name: groups for groups in query_sets}

    def cut_to_one_number(layers: list[WeightGroups], report_failure: bool) -> bool:
        """Cuts these layers to the number of the one that needs most, and returns whether any head was removed."""
        before, heads = layers[0].count, queries_of[layers[0].name].count
        ratio = heads // before
        size = next(member.width for member in layers[0].members if member.reads) // ratio
        head_edits = [*widths.head_edits(heads, before, size)]
        fullest = max(layers, key=lambda groups: _alive(dead, groups))
        fewest = _alive(dead, fullest)

        def shared_cuts(count: int) -> list[Cut]:
            return [Cut(groups, _kept(dead[groups.label], count)) for groups in layers]

        count, why = _fewest(
            widths,
            range(fewest, before),
            shared_cuts,
            [lambda count, edits=edits: edits(count * ratio, count) for edits in head_edits],
        )
        what = _HEADS if ratio == 1 else f"groups of {ratio} attention heads"
        why = f"all layers have one number, {fullest.name} needs {fewest}{why}"
        results = [_removal(what, layers, dead, [count] * len(layers), why)]
        if ratio > 1:
            results.append(_queries_within(widths, shared_cuts(count), count, queries_of, dead, head_edits))
        cut = any(removal.removed for removal in results)
        if cut or report_failure:
            removals.extend(results)
        return cut

    for same_number in _grouped_by(sets, lambda groups: (groups.count, queries_of[groups.name].count)):
        # Encoder and decoder may have config entries of their own, as towers for pictures.
        stacks = _grouped_by(same_number, _pattern_of)
        uncut = [
            groups
            for stack in stacks
            if len(stacks) == 1 or not cut_to_one_number(stack, report_failure=False)
            for groups in stack
        ]
        if uncut:
            cut_to_one_number(uncut, report_failure=True)
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
