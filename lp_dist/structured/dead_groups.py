"""Groups of weights that have no effect, whatever the input is: feed-forward channels and attention heads found from
zero rows and columns, and groups of any kind by what reads them.

Which weights belong to them is read from the model's modules (`lp_dist.structured.recognition`).
"""

from __future__ import annotations

import re
from contextlib import suppress

import torch
from torch import Tensor, nn

from lp_dist.checkpoints.saved_slices import SavedSlice
from lp_dist.structured.groups import Member, WeightGroups

_VALUES = re.compile(r"\.w?v[a-z_]*\.weight$")  # v_proj, value, v, wv


def dead_channels(
    model: nn.Module | None, channels: list[WeightGroups], rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> dict[str, list[int]]:
    """How many channels of each module are dead.

    A channel is dead if the column that reads it is zero, or one of the two rows that a gated layer multiplies, with
    its bias. A zero row of a plain layer is not enough, since its activation may not be zero: gelu(bias). The same
    goes for the row of a gate: sigmoid(0).

    Args:
        model: that the channels belong to.
        channels: the groups of the kind "channels".
        rows: {parameter: (outputs,) bool, which outputs are all zero}.
        columns: {parameter: (inputs,) bool, which inputs are all zero}.
    Returns:
        {module: [dead, all]}.
    """
    counts = {}
    for groups in channels:
        dead = _read_by_zeros(groups, rows, columns)
        ups = _output_weights(groups)
        for up in ups if len(ups) == 2 and _is_zero_at_zero(model.get_submodule(groups.name)) else ():
            dead = dead | _silent(groups, up, rows)
        counts[groups.name] = [int(dead.sum()), groups.count]
    return counts


def _is_zero_at_zero(module: nn.Module) -> bool:
    """Whether the module's activation is 0 at 0, as far as it has one that can be called."""
    for name, act in {**vars(module), **dict(module.named_children())}.items():
        if "act" in name and callable(act):
            # Some take more than one tensor.
            with suppress(Exception):
                if act(torch.zeros(1)).any():
                    return False
    return True


def dead_heads(
    queries: list[WeightGroups], shared: list[WeightGroups], rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> dict[str, list[int]]:
    """How many attention heads of each module are dead.

    A head is dead if the columns that read it are zero, or its values are, with their bias, where it is known which
    rows these are.

    Args:
        queries: the groups of the kind "heads".
        shared: the groups of the kind "kv_groups" of the same modules.
        rows: as of `dead_channels`.
        columns: as of `dead_channels`.
    Returns:
        {module: [dead, all]}.
    """
    counts = {}
    for groups, kv_groups in zip(queries, shared):
        dead = _read_by_zeros(groups, rows, columns)
        values = _values(kv_groups)
        if values is not None:
            dead = dead | _silent(kv_groups, values, rows).repeat_interleave(groups.count // kv_groups.count)
        counts[groups.name] = [int(dead.sum()), groups.count]
    return counts


def _values(groups: WeightGroups) -> Member | None:
    """The values, by their name or as the last of three in one layer. None where they are not apart, as where queries,
    keys and values lie head by head.
    """
    weights = _output_weights(groups)
    named = [member for member in weights if _VALUES.search(member.name)]
    if len(named) == 1:
        return named[0]
    return (
        max(weights, key=lambda member: member.start)
        if len(weights) == 3 and len({member.name for member in weights}) == 1
        else None
    )


def _output_weights(groups: WeightGroups) -> list[Member]:
    """The weights that make the groups' outputs, without biases."""
    return [member for member in groups.members if not member.reads and member.name.endswith(".weight")]


def _silent(groups: WeightGroups, weight: Member, rows: dict[str, Tensor]) -> Tensor:
    """(count,) whether a group's outputs of this layer are always zero."""
    bias = weight.name.removesuffix("weight") + "bias"
    members = [weight, *(member for member in groups.members if member.name == bias and member.start == weight.start)]
    return torch.stack([_zero(groups, member, rows) for member in members]).all(dim=0)


def _read_by_zeros(groups: WeightGroups, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> Tensor:
    """(count,) whether all that reads a group is zero."""
    return torch.stack([_zero(groups, member, columns) for member in groups.members if member.reads]).all(dim=0)


def _zero(groups: WeightGroups, member: Member, lines: dict[str, Tensor]) -> Tensor:
    """(count,) whether all rows (or columns) that a group has of this parameter are zero; false where the parameter
    is unknown or has another width.
    """
    line = lines.get(member.name)
    if line is None or len(line) < member.stop:
        return torch.zeros(groups.count, dtype=torch.bool)
    return line[member.start : member.stop].view(groups.count, member.width).all(dim=1)


class ReadingWeights:
    """Which groups are read by zeros alone, found from the tensors of the files one after another.

    Args:
        sets: the groups.
        slices: of `saved_slices`, of all parameters that read them.
    """

    def __init__(self, sets: list[WeightGroups], slices: dict[str, list[SavedSlice]]) -> None:
        self._sets = sets
        # Of each parameter: along which dimensions it is to be known which lines are zero.
        self._dims: dict[str, set[tuple[int, ...]]] = {}
        for groups in sets:
            for member in groups.members:
                if member.reads:
                    self._dims.setdefault(member.name, set()).add(_dims(member))
        self._saved_as = {saved.name: (name, saved) for name in self._dims for saved in slices[name]}
        self._nonzero: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for name, all_dims in self._dims.items():
            for along in all_dims:
                sizes = [max(int(saved.indices[dim].max()) for saved in slices[name]) + 1 for dim in along]
                self._nonzero[name, along] = torch.zeros(sizes, dtype=torch.bool)

    @property
    def file_names(self) -> set[str]:
        """Names of the tensors in the files that must be given to `add`."""
        return {*self._saved_as}

    def add(self, file_name: str, tensor: Tensor) -> None:
        """Takes note of where a tensor of the files is zero. Of other names than `file_names` nothing is noted."""
        if file_name not in self._saved_as:
            return
        name, saved = self._saved_as[file_name]
        for along in self._dims[name]:
            lines = _nonzero_lines(tensor, [saved.along[dim] for dim in along])
            index = torch.meshgrid(*(saved.indices[dim] for dim in along), indexing="ij")
            self._nonzero[name, along][index] |= lines.view(index[0].shape)

    def dead(self) -> dict[str, Tensor]:
        """{label: (count,) bool, which groups are read by zeros alone}, of all that was added."""
        dead = {groups.label: torch.ones(groups.count, dtype=torch.bool) for groups in self._sets}
        for groups in self._sets:
            for member in groups.members:
                if member.reads:
                    lines = self._nonzero[member.name, _dims(member)]
                    lines = lines if member.expert is None else lines[member.expert]
                    zero = ~lines[member.start : member.stop].view(-1, member.width).any(dim=1)
                    dead[groups.label][member.first : member.first + len(zero)] &= zero
        return dead


def _dims(member: Member) -> tuple[int, ...]:
    """The dimensions along which it is to be known which lines of a parameter are zero."""
    return (member.dim,) if member.expert is None else (0, member.dim)


def _nonzero_lines(tensor: Tensor, along: list[int | None]) -> Tensor:
    """Which indices along these dimensions have a weight that is not zero; bool, in their order."""
    kept = [dim for dim in along if dim is not None]
    others = [dim for dim in range(tensor.ndim) if dim not in kept]
    # Without a tensor of bools as large as the weights.
    lines = (tensor.amax(others) != 0) | (tensor.amin(others) != 0) if others else tensor != 0
    return lines.permute([sorted(kept).index(dim) for dim in kept]) if len(kept) > 1 else lines
