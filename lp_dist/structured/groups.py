"""Groups of weights: which elements of which parameters they have, and the linear layers that these belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed_slices import is_linear, is_transposed
from lp_dist.sharding.shards import full_shape


@dataclass(frozen=True)
class Member:
    """What groups have of one parameter: the elements whose index along `dim` is in [start, stop).

    Index i belongs to group first + (i − start) // width.

    Args:
        name: of the parameter.
        dim: the dimension that is divided among the groups.
        start: the first index.
        stop: the index after the last one.
        width: neighbouring indices of one group.
        reads: whether these weights read the groups' outputs, or are added to what is read. Where they are zero, the
            rest of the group has no effect.
        first: the number of the group of index `start`.
        expert: of a parameter that has a matrix for each expert, along dimension 0, the expert that these elements
            are of. None: they are taken over all of dimension 0.
    """

    name: str
    dim: int
    start: int
    stop: int
    width: int = 1
    reads: bool = False
    first: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class WeightGroups:
    """The groups of one kind in one module. All have the same size.

    Args:
        name: of the module.
        kind: "channels", "heads", "kv_groups", "experts", "expert_channels", or a name that the user gave.
        count: number of groups.
        elements: weights of each group.
        members: the elements of parameters that belong to them.
        section: which groups of the module these are, where there are several sets of one kind: "[3]", the channels
            of expert 3; "[4:8]", the experts that are routed together.
        least: how many groups must stay; 0: any number, though one at least where the model is made smaller.
        followers: the elements of other parameters and buffers that are removed with the groups. They neither decay
            nor count for the norm: rows of a router.
        tables: names of tensors whose entries are numbers of groups, counted over all sets of the module.
    """

    name: str
    kind: str
    count: int
    elements: int
    members: tuple[Member, ...]
    section: str = ""
    least: int = 0
    followers: tuple[Member, ...] = ()
    tables: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The module, the section and the kind, which name these groups in messages and saved states."""
        return f"{self.name}{self.section} {self.kind}"

    @property
    def removable(self) -> int:
        """How many of the groups may be pruned: one stays at least."""
        return max(0, self.count - max(1, self.least))


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Args:
        name: of the module.
        position: its number in the order of the modules.
        inputs: input features.
        outputs: output features.
        transposed: whether the weight is (inputs, outputs), as in GPT-2's Conv1D.
        biased: whether it has a bias.
    """

    name: str
    position: int
    inputs: int
    outputs: int
    transposed: bool
    biased: bool

    def output_members(self, width: int = 1, start: int = 0, stop: int | None = None) -> list[Member]:
        """The outputs in [start, stop), weight and bias, `width` of them to a group."""
        stop = self.outputs if stop is None else stop
        weight = Member(f"{self.name}.weight", int(self.transposed), start, stop, width)
        return [weight, *([Member(f"{self.name}.bias", 0, start, stop, width)] if self.biased else [])]

    def input_members(self, width: int = 1) -> list[Member]:
        """All inputs, `width` of them to a group."""
        return [Member(f"{self.name}.weight", int(not self.transposed), 0, self.inputs, width, reads=True)]


def linear_layers(model: nn.Module) -> list[Layer]:
    """The linear layers of a model in the order of its modules, without output heads.

    Raises:
        UsageError: a layer has an adapter beside it.
    """
    names = {name for name, _ in model.named_parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = []
    for position, (name, module) in enumerate(model.named_modules()):
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            raise UsageError(
                f"{name} has an adapter beside it, which would still act where its channels or heads were removed;"
                " merge the adapter first (lp_dist.merge_adapter)"
            )
        transposed = is_transposed(module)
        if (is_linear(module) or transposed) and module is not head and f"{name}.weight" in names:
            shape = full_shape(module.weight)
            outputs, inputs = reversed(shape) if transposed else shape
            layers.append(Layer(name, position, inputs, outputs, transposed, f"{name}.bias" in names))
    return layers


def layers_within(layers: list[Layer], module: str) -> list[Layer]:
    """Those of the layers that are inside of `module`."""
    return [layer for layer in layers if layer.name.startswith(module + ".")]


def weight_groups(
    model: nn.Module, name: str, kind: str, count: int, members: Sequence[Member], **more: Any
) -> WeightGroups:
    """`WeightGroups` of these members, whose size is taken from the model's parameters.

    Args:
        model: that they belong to.
        name: as of `WeightGroups`.
        kind: as of `WeightGroups`.
        count: as of `WeightGroups`.
        members: as of `WeightGroups`.
        more: the other fields of `WeightGroups`.
    """
    elements = sum(elements_of(member, full_shape(model.get_parameter(member.name))) for member in members)
    assert elements % count == 0, f"the groups of {name} have different sizes"
    return WeightGroups(name, kind, count, elements // count, tuple(members), **more)


def elements_of(member: Member, shape: Sequence[int]) -> int:
    """The elements of a parameter that belong to groups.

    Args:
        member: what the groups have of it.
        shape: of the parameter.
    """
    lines = member.stop - member.start
    return lines * math.prod(shape) // shape[member.dim] // (1 if member.expert is None else shape[0])
