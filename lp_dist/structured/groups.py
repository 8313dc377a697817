"""What groups of weights are made of: members of parameters, and the linear layers that have them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape


@dataclass(frozen=True)
class Member:
    """Of one parameter the elements whose index along `dim` is in [start, stop): index i is of group (i − start) //
    width.

    reads: whether these are inputs of the layer that reads what the groups say; where they are zero the rest of the
    group has no effect.
    """

    name: str
    dim: int
    start: int
    stop: int
    width: int = 1
    reads: bool = False


@dataclass(frozen=True)
class Groups:
    """The groups of one kind in one part of a model, alike in size.

    Args:
        name: the module's. kind: "channels", "heads", "kv_groups", or a name of the user's.
        count: how many groups. elements: weights of each. members: which.
    """

    name: str
    kind: str
    count: int
    elements: int
    members: tuple[Member, ...]

    @property
    def label(self) -> str:
        return f"{self.name} {self.kind}"


@dataclass(frozen=True)
class Layer:
    """A linear layer. place: its number in the order of the modules. inputs, outputs: its widths."""

    name: str
    place: int
    inputs: int
    outputs: int
    transposed: bool
    biased: bool

    def of_outputs(self, width: int = 1, start: int = 0, stop: int | None = None) -> list[Member]:
        stop = self.outputs if stop is None else stop
        weight = Member(f"{self.name}.weight", int(self.transposed), start, stop, width)
        return [weight, *([Member(f"{self.name}.bias", 0, start, stop, width)] if self.biased else [])]

    def of_inputs(self, width: int = 1) -> list[Member]:
        return [Member(f"{self.name}.weight", int(not self.transposed), 0, self.inputs, width, reads=True)]


def layers_of(model: nn.Module) -> list[Layer]:
    """The linear layers in the order of the modules, without output heads; raises UsageError where adapters stand
    beside them.
    """
    names = {name for name, _ in model.named_parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = []
    for place, (name, module) in enumerate(model.named_modules()):
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            raise UsageError(
                f"{name} has an adapter beside it, which would go on where its channels or heads are gone; merge the"
                " adapter first (lp_dist.merge_adapter)"
            )
        transposed = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) or transposed) and module is not head and f"{name}.weight" in names:
            shape = full_shape(module.weight)
            outputs, inputs = reversed(shape) if transposed else shape
            layers.append(Layer(name, place, inputs, outputs, transposed, f"{name}.bias" in names))
    return layers


def within(layers: list[Layer], module: str) -> list[Layer]:
    return [layer for layer in layers if layer.name.startswith(module + ".")]


def made_of(model: nn.Module, name: str, kind: str, count: int, members: list[Member]) -> Groups:
    shapes = {name: full_shape(param) for name, param in model.named_parameters()}
    elements = sum(member.width * shapes[member.name].numel() // shapes[member.name][member.dim] for member in members)
    return Groups(name, kind, count, elements, tuple(members))
