"""Groups of weights that stand and fall together: feed-forward channels, attention heads, outputs or inputs of any
linear layers.

They are read from a model's modules (`recognition.py`), or described by their user (`groups_of`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase, translate

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape
from lp_dist.structured.groups import Groups, Member, layers_of, made_of
from lp_dist.structured.recognition import channels, heads, kv_groups

KINDS = {"channels": channels, "heads": heads, "kv_groups": kv_groups}


def structure(model: nn.Module, groups: str | Sequence[str | Groups]) -> list[Groups]:
    """The groups that a user names: kinds ("channels", "heads", "kv_groups"), or `Groups` of their own, in that order.

    Raises:
        UsageError: an unknown kind, a part of the model that is in two groups of one dimension, or none recognised.
    """
    asked = [groups] if isinstance(groups, (str, Groups)) else list(groups)
    names = [one if isinstance(one, str) else one.label for one in asked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice in groups; name it once")
    found: list[Groups] = []
    for one in asked:
        if isinstance(one, Groups):
            found.append(one)
        elif one in KINDS:
            found += KINDS[one](model)
        else:
            raise UsageError(
                f"groups={one!r} is none of {', '.join(KINDS)}; name one, or describe your own by lp_dist.groups_of"
            )
    if not found:
        raise UsageError("no groups are named; name channels, heads or kv_groups")
    taken: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for one in found:
        for member in one.members:
            others = taken.setdefault((member.name, member.dim), [])
            twice = next(
                (
                    label
                    for start, stop, label in others
                    if start < member.stop and member.start < stop and label != one.label
                ),
                None,
            )
            if twice is not None:
                raise UsageError(
                    f"{member.name} belongs to {one.label} and to {twice} as well; leave one of them out (heads and"
                    " kv_groups hold each other)"
                )
            others.append((member.start, member.stop, one.label))
    return found


def recognised(model: nn.Module) -> tuple[dict[str, list[Groups]], list[str]]:
    """Whatever is recognised of each kind, {kind: groups}; and why a kind is not."""
    found, reasons = {}, {}
    for kind, find in KINDS.items():
        try:
            found[kind] = find(model)
        except UsageError as error:
            reasons[str(error).partition(" Describe them by")[0]] = None  # heads and kv_groups for the same one
    return found, [*reasons]


def groups_of(
    model: nn.Module,
    *,
    outputs: str | Iterable[str] = (),
    inputs: str | Iterable[str] = (),
    along: str | Iterable[str] = (),
    width: int = 1,
    kind: str = "groups",
) -> list[Groups]:
    """Groups of your own, by patterns on the names of modules: group i is output i of the layers in `outputs` (bias
    and all) and input i of those in `inputs`.

    Args:
        outputs, inputs: of linear layers, such as "*.fc_in" and "*.fc_out". Those of one layer go together, by the
            last number that the wildcards of each stand for; without wildcards all do.
        along: one-dimensional parameters that go with them, by parameter names.
        width: neighbouring outputs (or inputs) in one group, such as the size of a head.
        kind: what to call them.
    Raises:
        UsageError: a pattern matches nothing or two layers at once, or not in all the layers where another does, what
            stands together has different widths, or the width does not divide them.
    """
    layers = {layer.name: layer for layer in layers_of(model)}
    vectors = {name: full_shape(param)[0] for name, param in model.named_parameters() if len(full_shape(param)) == 1}
    outputs, inputs, along = (
        [patterns] if isinstance(patterns, str) else list(patterns) for patterns in (outputs, inputs, along)
    )
    places: dict[str, set[str]] = {}
    parts: dict[str, tuple[list[Member], set[int]]] = {}
    for patterns, known, made in (
        (outputs, layers, lambda name: (layers[name].of_outputs(width), layers[name].outputs)),
        (inputs, layers, lambda name: (layers[name].of_inputs(width), layers[name].inputs)),
        (along, vectors, lambda name: ([Member(name, 0, 0, vectors[name], width)], vectors[name])),
    ):
        for pattern in patterns:
            matches = {name: _layer_of(name, pattern) for name in known if fnmatchcase(name, pattern)}
            if not matches:
                raise UsageError(
                    f"{pattern!r} matches no {'vector' if known is vectors else 'linear layer'} of"
                    f" {type(model).__name__}; names look like {next(iter(known), 'none')!r}, and * stands for any"
                    " part of one"
                )
            if len(set(matches.values())) < len(matches):
                raise UsageError(
                    f"{pattern!r} matches two of the same layer ({', '.join(list(matches)[:2])}), whose parts can't be"
                    " told apart; write it out further"
                )
            places[pattern] = {*matches.values()}
            for name, layer in matches.items():
                members, size = made(name)
                mine = parts.setdefault(layer, ([], set()))
                mine[0].extend(members)
                mine[1].add(size)
    lone = next(((pattern, parts.keys() - own) for pattern, own in places.items() if parts.keys() - own), None)
    if lone is not None:
        where = (
            "the layers that others name by wildcards"
            if lone[0] in layers or lone[0] in vectors
            else min(lone[1]) or "what others name without wildcards"
        )
        raise UsageError(
            f"{lone[0]!r} matches nothing in {where}, so that groups there would not be whole; let all patterns match"
            " in the same layers, or describe each kind of layer by a call of its own"
        )
    found = []
    for key, (members, sizes) in parts.items():
        name = key or members[0].name
        if len(sizes) > 1 or next(iter(sizes)) % width:
            raise UsageError(
                f"the groups of {name} are {' and '.join(map(str, sorted(sizes)))} wide, and width={width}; what"
                " stands in one group must be of one width, which the width of a group divides"
            )
        found.append(made_of(model, name, kind, next(iter(sizes)) // width, members))
    if not found:
        raise UsageError("no patterns are given; name linear layers in outputs= and inputs=")
    return found


def _layer_of(name: str, pattern: str) -> str:
    """What of a name says which layer it is: up to the last number in it that is not spelled out by the pattern."""
    wild = re.split(r"(\*|\?|\[!?\]?[^\]]*\])", pattern)  # text and wildcards in turn
    match = re.fullmatch(
        "".join(re.escape(part) if i % 2 == 0 else f"({translate(part)[4:-3]})" for i, part in enumerate(wild)), name
    )
    assert match is not None
    numbers = [one.span(1) for one in re.finditer(r"(?:^|\.)(\d+)(?=\.|$)", name)]
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
