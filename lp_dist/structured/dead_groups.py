"""Feed-forward channels and attention heads that can't have an effect any more, whatever the input is: found from dead
rows and columns.

Which they are is read from the model's modules (`structure.py`). What is not recognised there is left out, and not
guessed.
"""

from __future__ import annotations

import re
from contextlib import suppress

import torch
from torch import Tensor, nn

from lp_dist.structured.groups import Groups, Member

_VALUES = re.compile(r"\.w?v[a-z_]*\.weight$")  # v_proj, value, v, wv


def dead_channels(
    model: nn.Module | None, parts: list[Groups], rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> dict[str, list[int]]:
    """`{module: [dead, all]}`: a channel is dead if what reads it is zero, or one of the two rows that a gated layer
    multiplies, with its bias.

    (The row of a plain layer may be zero and its activation not: gelu(bias). So may that of a gate: sigmoid(0).)
    Args: model: that the parts are of. parts: of the kind "channels". rows, columns: by parameter, which outputs and
    which inputs are all zero.
    """
    found = {}
    for groups in parts:
        dead = _read_by_zeros(groups, rows, columns)
        ups = _own_weights(groups)
        for up in ups if len(ups) == 2 and _nothing_of_nothing(model.get_submodule(groups.name)) else ():
            dead = dead | _silent(groups, up, rows)
        found[groups.name] = [int(dead.sum()), groups.count]
    return found


def _nothing_of_nothing(module: nn.Module) -> bool:
    """Whether the module's activation is 0 at 0, as far as it has one that can be asked."""
    for name, act in {**vars(module), **dict(module.named_children())}.items():
        if "act" in name and callable(act):
            with suppress(Exception):  # it takes more than one tensor
                if act(torch.zeros(1)).any():
                    return False
    return True


def dead_heads(
    queries: list[Groups], shared: list[Groups], rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> dict[str, list[int]]:
    """`{module: [dead, all]}`: a head is dead if what reads it is zero, or its values are, with their bias, where it
    can be told which these are.

    Args: queries, shared: the same modules' parts of the kinds "heads" and "kv_groups". rows, columns: as of
    `dead_channels`.
    """
    found = {}
    for groups, values_of in zip(queries, shared):
        dead = _read_by_zeros(groups, rows, columns)
        values = _values(values_of)
        if values is not None:
            dead = dead | _silent(values_of, values, rows).repeat_interleave(groups.count // values_of.count)
        found[groups.name] = [int(dead.sum()), groups.count]
    return found


def _values(groups: Groups) -> Member | None:
    """By its name, or as the last of three in one layer; None where they are not apart (as where queries, keys and
    values lie head by head).
    """
    own = _own_weights(groups)
    named = [member for member in own if _VALUES.search(member.name)]
    if len(named) == 1:
        return named[0]
    return (
        max(own, key=lambda member: member.start)
        if len(own) == 3 and len({member.name for member in own}) == 1
        else None
    )


def _own_weights(groups: Groups) -> list[Member]:
    return [member for member in groups.members if not member.reads and member.name.endswith(".weight")]


def _silent(groups: Groups, weight: Member, rows: dict[str, Tensor]) -> Tensor:
    """(count,) whether the group's outputs of this layer are always zero."""
    bias = weight.name.removesuffix("weight") + "bias"
    parts = [weight, *(member for member in groups.members if member.name == bias and member.start == weight.start)]
    return torch.stack([_zero(groups, member, rows) for member in parts]).all(dim=0)


def _read_by_zeros(groups: Groups, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> Tensor:
    return torch.stack([_zero(groups, member, columns) for member in groups.members if member.reads]).all(dim=0)


def _zero(groups: Groups, member: Member, lines: dict[str, Tensor]) -> Tensor:
    """(count,) whether all the group's lines of this parameter are zero; none where the parameter is not known, or of
    another width.
    """
    line = lines.get(member.name)
    if line is None or len(line) < member.stop:
        return torch.zeros(groups.count, dtype=torch.bool)
    return line[member.start : member.stop].view(groups.count, member.width).all(dim=1)
