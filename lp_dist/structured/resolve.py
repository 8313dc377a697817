"""Which groups a user asks for: kinds that are recognised in any model, or groups described by name patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase, translate

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape
from lp_dist.structured.experts import expert_channels, experts
from lp_dist.structured.groups import Layer, Member, WeightGroups, linear_layers, weight_groups
from lp_dist.structured.recognition import channels, heads, kv_groups

KINDS = {
    "channels": channels,
    "heads": heads,
    "kv_groups": kv_groups,
    "experts": experts,
    "expert_channels": expert_channels,
}


def resolve_groups(model: nn.Module, groups: str | WeightGroups | Sequence[str | WeightGroups]) -> list[WeightGroups]:
    """The groups of a model that a user asks for.

    Args:
        model: plain, or in a wrapper that keeps the names of its modules.
        groups: kinds ("channels", "heads", "kv_groups", "experts", "expert_channels"), or groups that `groups_of`
            described.
    Returns:
        In the order of `groups`.
    Raises:
        UsageError: a kind is unknown or not recognised in this model, or weights are in two groups of one dimension.
    """
    requested = [groups] if isinstance(groups, (str, WeightGroups)) else list(groups)
    labels = [item if isinstance(item, str) else item.label for item in requested]
    duplicate = next((label for label in labels if labels.count(label) > 1), None)
    if duplicate is not None:
        raise UsageError(f"{duplicate} is named twice in groups; name it once")
    sets: list[WeightGroups] = []
    for item in requested:
        if isinstance(item, WeightGroups):
            sets.append(item)
        elif item in KINDS:
            sets += KINDS[item](model)
        else:
            raise UsageError(
                f"groups={item!r} is none of {', '.join(KINDS)}; name one, or describe your own by lp_dist.groups_of"
            )
    if not sets:
        raise UsageError(f"no groups are named; name one of {', '.join(KINDS)}, or several")
    _refuse_shared_weights(sets)
    return sets


def _refuse_shared_weights(sets: list[WeightGroups]) -> None:
    ranges: dict[tuple[str, int, int | None], list[tuple[Member, str]]] = {}
    for groups in sets:
        for member in groups.members:
            claimed = ranges.setdefault((member.name, member.dim, member.expert), [])
            owner = next(
                (
                    label
                    for other, label in claimed
                    if other.start < member.stop and member.start < other.stop and label != groups.label
                ),
                None,
            )
            if owner is not None:
                raise UsageError(
                    f"{member.name} belongs to {groups.label} and to {owner} as well; leave one of them out (heads and"
                    " kv_groups share weights)"
                )
            claimed.append((member, groups.label))


def recognised_groups(model: nn.Module) -> tuple[dict[str, list[WeightGroups]], list[str]]:
    """All groups that are recognised in a model.

    Returns:
        {kind: groups} of the recognised kinds, and the reasons why other kinds are not recognised.
    """
    recognised: dict[str, list[WeightGroups]] = {}
    reasons: dict[str, None] = {}
    for kind, recognise in KINDS.items():
        try:
            recognised[kind] = recognise(model)
        except UsageError as error:
            # heads and kv_groups fail for the same reason, which is reported once.
            reasons[str(error).partition(" Describe them by")[0]] = None
    return recognised, [*reasons]


def groups_of(
    model: nn.Module,
    *,
    outputs: str | Iterable[str] | Mapping[str, Sequence[int]] = (),
    inputs: str | Iterable[str] = (),
    along: str | Iterable[str] = (),
    width: int = 1,
    kind: str = "groups",
) -> list[WeightGroups]:
    """Groups of your own, by patterns on the names of modules.

    Group i is output i of the layers in `outputs`, with its bias, and input i of the layers in `inputs`. Parameters of
    one layer of the model belong to the same groups: those whose names agree up to the last number that a wildcard
    matches. Without wildcards all parameters belong together.

    Args:
        model: whose linear layers are named.
        outputs: patterns of linear layers, such as "*.fc_in". Of layers that make several things at once, {pattern:
            how many outputs each of these has, one after the other}: {"*.Wqkv": [64, 32, 32]}. Every group then has
            an equal part of each.
        inputs: patterns of linear layers, such as "*.fc_out".
        along: patterns of parameters that have, along their first dimension, an element (or `width`) for each group,
            such as "*.experts.down_proj".
        width: neighbouring outputs (or inputs) of one group, such as the size of a head.
        kind: what to call the groups.
    Returns:
        The groups of each layer of the model.
    Raises:
        UsageError: a pattern matches nothing, or two modules of one layer, or not in all layers where another pattern
            matches; parameters of one layer have different widths; or `width` does not divide them.
    """
    layers = {layer.name: layer for layer in linear_layers(model)}
    vectors = {name: full_shape(param)[0] for name, param in model.named_parameters() if len(full_shape(param))}
    blocks_of = dict(outputs) if isinstance(outputs, Mapping) else {}
    outputs, inputs, along = (
        [patterns] if isinstance(patterns, str) else list(patterns) for patterns in (outputs, inputs, along)
    )
    matched_layers: dict[str, set[str]] = {}
    members_of: dict[str, list[Member]] = {}
    sizes_of: dict[str, set[int]] = {}
    sources: list[tuple[list[str], Iterable[str], Callable[[str, str], tuple[list[Member], int]]]] = [
        (
            [pattern for pattern in outputs if pattern not in blocks_of],
            layers,
            lambda name, _: (layers[name].output_members(width), layers[name].outputs),
        ),
        (inputs, layers, lambda name, _: (layers[name].input_members(width), layers[name].inputs)),
        (along, vectors, lambda name, _: ([Member(name, 0, 0, vectors[name], width)], vectors[name])),
        # Last, since the others say how many groups there are.
        ([*blocks_of], layers, lambda name, pattern: _block_members(layers[name], blocks_of[pattern], width)),
    ]
    for patterns, names, members_and_size in sources:
        for pattern in patterns:
            matches = {name: _layer_of(name, pattern) for name in names if fnmatchcase(name, pattern)}
            if not matches:
                raise UsageError(
                    f"{pattern!r} matches no {'parameter' if names is vectors else 'linear layer'} of"
                    f" {type(model).__name__}; names look like {next(iter(names), 'none')!r}, and * stands for any"
                    " part of one"
                )
            if len(set(matches.values())) < len(matches):
                raise UsageError(
                    f"{pattern!r} matches two of the same layer ({', '.join(list(matches)[:2])}), whose weights can't"
                    " be told apart; write it out further"
                )
            matched_layers[pattern] = {*matches.values()}
            for name, layer in matches.items():
                members, size = members_and_size(name, pattern)
                members_of.setdefault(layer, []).extend(members)
                sizes_of.setdefault(layer, set()).add(size)
    incomplete = next(
        (
            (pattern, members_of.keys() - matched)
            for pattern, matched in matched_layers.items()
            if members_of.keys() - matched
        ),
        None,
    )
    if incomplete is not None:
        pattern, missing = incomplete
        where = (
            "the layers that others name by wildcards"
            if pattern in layers or pattern in vectors
            else min(missing) or "what others name without wildcards"
        )
        raise UsageError(
            f"{pattern!r} matches nothing in {where}, so that groups there would not be whole; let all patterns match"
            " in the same layers, or describe each kind of layer by a call of its own"
        )
    sets = []
    for layer, members in members_of.items():
        name, sizes = layer or members[0].name, sizes_of[layer]
        if len(sizes) > 1 or next(iter(sizes)) % width:
            raise UsageError(
                f"the groups of {name} are {' and '.join(map(str, sorted(sizes)))} wide, and width={width}; all that"
                " belongs to one group must have one width, which the width of a group divides"
            )
        sets.append(weight_groups(model, name, kind, next(iter(sizes)) // width, members))
    if not sets:
        raise UsageError("no patterns are given; name linear layers in outputs= and inputs=")
    return sets


def _block_members(layer: Layer, blocks: Sequence[int], width: int) -> tuple[list[Member], int]:
    """The outputs of a layer that makes several things at once, and how many of the first thing there are.

    Args:
        layer: the layer.
        blocks: how many outputs each of the things has.
        width: of a group in the first of them.
    """
    count = blocks[0] // width if blocks else 0
    if sum(blocks) != layer.outputs or not count or blocks[0] % width or any(size % count for size in blocks):
        raise UsageError(
            f"{layer.name} has {layer.outputs} outputs, which are not blocks of {', '.join(map(str, blocks))} with as"
            f" many groups each, {width} wide in the first; give sizes of blocks that add up to its outputs"
        )
    members = []
    start = 0
    for size in blocks:
        members += layer.output_members(size // count, start, start + size)
        start += size
    return members, blocks[0]


def _layer_of(name: str, pattern: str) -> str:
    """The layer of the model that a name belongs to: the name up to the last number in it that a wildcard matches."""
    # Text and wildcards in turn.
    tokens = re.split(r"(\*|\?|\[!?\]?[^\]]*\])", pattern)
    match = re.fullmatch(
        "".join(re.escape(token) if i % 2 == 0 else f"({translate(token)[4:-3]})" for i, token in enumerate(tokens)),
        name,
    )
    assert match is not None
    numbers = [number.span(1) for number in re.finditer(r"(?:^|\.)(\d+)(?=\.|$)", name)]
    return name[
        : max(
            (
                stop
                for start, stop in numbers
                for i in range(1, match.re.groups + 1)
                if match.start(i) < stop and start < match.end(i)
            ),
            default=0,
        )
    ]
