"""Groups of weights: which elements of which parameters they have, and the linear layers that these belong to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape


@dataclass(frozen=True)
class Member:
    """What groups have of one parameter: the elements whose index along `dim` is in [start, stop).

    Index i belongs to group (i − start) // width.

    Args:
        name: of the parameter.
        dim: the dimension that is divided among the groups.
        start: the first index.
        stop: the index after the last one.
        width: neighbouring indices of one group.
        reads: whether these weights read the groups' outputs. Where they are zero, the rest of the group has no
            effect.
    """

    name: str
    dim: int
    start: int
    stop: int
    width: int = 1
    reads: bool = False


@dataclass(frozen=True)
class WeightGroups:
    """The groups of one kind in one module. All have the same size.

    Args:
        name: of the module.
        kind: "channels", "heads", "kv_groups", or a name that the user gave.
        count: number of groups.
        elements: weights of each group.
        members: the elements of parameters that belong to them.
    """

    name: str
    kind: str
    count: int
    elements: int
    members: tuple[Member, ...]

    @property
    def label(self) -> str:
        """The module and the kind, which name these groups in messages and saved states."""
        return f"{self.name} {self.kind}"


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
        transposed = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) or transposed) and module is not head and f"{name}.weight" in names:
            shape = full_shape(module.weight)
            outputs, inputs = reversed(shape) if transposed else shape
            layers.append(Layer(name, position, inputs, outputs, transposed, f"{name}.bias" in names))
    return layers


def layers_within(layers: list[Layer], module: str) -> list[Layer]:
    """Those of the layers that are inside of `module`."""
    return [layer for layer in layers if layer.name.startswith(module + ".")]


def weight_groups(model: nn.Module, name: str, kind: str, count: int, members: list[Member]) -> WeightGroups:
    """`WeightGroups` of these members, whose size is taken from the model's parameters."""
    shapes = {name: full_shape(param) for name, param in model.named_parameters()}
    elements = sum(member.width * shapes[member.name].numel() // shapes[member.name][member.dim] for member in members)
    return WeightGroups(name, kind, count, elements, tuple(members))
