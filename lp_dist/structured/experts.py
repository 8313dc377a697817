"""Groups of a mixture of experts: experts as wholes, and the channels inside of each expert.

Which rows and columns of a parameter with all experts in it are the channels is found by running the module's own code
on small random weights: the gradients show what belongs together.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.sharding.shards import full_shape
from lp_dist.structured.groups import Member, WeightGroups, layers_within, linear_layers, weight_groups
from lp_dist.structured.mixtures import Mixture, mixtures
from lp_dist.structured.probing import stand_in
from lp_dist.structured.recognition import feed_forward, hidden_widths, in_model_order


@dataclass(frozen=True)
class ExpertWeight:
    """What one parameter does for each expert.

    Args:
        reads: whether it makes the expert's output: the last matrix, or its bias.
        dim: the dimension of the channels; None where it has none.
        starts: the first index of the channels along it, several where they come several times (gate and up).
        width: neighbouring indices of one channel.
    """

    reads: bool = False
    dim: int | None = None
    starts: tuple[int, ...] = (0,)
    width: int = 1


@dataclass(frozen=True)
class ExpertLayout:
    """How a module keeps its experts.

    Args:
        channels: channels of each expert.
        weights: {name of the parameter in the module: what it does}.
    """

    channels: int
    weights: dict[str, ExpertWeight]


def experts(model: nn.Module) -> list[WeightGroups]:
    """The experts of every layer of a model, as wholes: all weights and biases of each. The rows of their router, and
    what else has an entry for each expert, follow them.

    Where the router chooses among groups of experts first, each of these groups is a set of its own, so that all lose
    as many.

    Raises:
        UsageError: none is recognised; the message says what was looked for.
    """
    sets: list[WeightGroups] = []
    reasons: dict[str, str] = {}
    layouts = _Layouts(model)
    for mixture in mixtures(model):
        router, weights = mixture.router, layouts.weights_of(mixture)
        if isinstance(router, str) or isinstance(weights, str):
            reasons[mixture.name] = router if isinstance(router, str) else str(weights)
            continue
        size = mixture.count // router.groups
        for start in range(0, mixture.count, size):
            section = f"[{start}:{start + size}]" if router.groups > 1 else ""
            sets.append(
                weight_groups(
                    model,
                    mixture.name,
                    "experts",
                    size,
                    _whole_experts(model, mixture, weights, start, start + size),
                    section=section,
                    least=min(size, router.least),
                    followers=router.members_of_section(start, start + size),
                    tables=router.tables,
                )
            )
    return in_model_order(model, sets, "experts", _CRITERIA, reasons)


def expert_channels(model: nn.Module) -> list[WeightGroups]:
    """The channels inside of every expert, a set of groups for each expert: all lose as many, each its own ones.

    Raises:
        UsageError: none is recognised; the message says what was looked for.
    """
    sets: list[WeightGroups] = []
    reasons: dict[str, str] = {}
    layouts = _Layouts(model)
    for mixture in mixtures(model):
        if mixture.modules:
            weights = layouts.weights_of(mixture)
            if isinstance(weights, str):
                reasons[mixture.name] = weights
                continue
            for i, module in enumerate(mixture.modules):
                members, count = layouts.channel_members(module)
                sets.append(weight_groups(model, mixture.name, "expert_channels", count, members, section=f"[{i}]"))
            continue
        layout = layouts.layout_of(mixture.name)
        if isinstance(layout, str):
            reasons[mixture.name] = layout
            continue
        for i in range(mixture.count):
            members = [
                Member(f"{mixture.name}.{name}", weight.dim, start, start + layout.channels * weight.width,
                       weight.width, weight.reads, expert=i)
                for name, weight in layout.weights.items()
                if weight.dim is not None
                for start in weight.starts
            ]  # fmt: skip
            sets.append(
                weight_groups(model, mixture.name, "expert_channels", layout.channels, members, section=f"[{i}]")
            )
    return in_model_order(model, sets, "channels of experts", _CRITERIA, reasons)


_CRITERIA = (
    "parameters with a matrix for each expert, or a list of equal modules, and beside them a router, which is a matrix"
    " with as many outputs as there are experts"
)


def _whole_experts(
    model: nn.Module, mixture: Mixture, weights: dict[str, ExpertWeight], start: int, stop: int
) -> list[Member]:
    """The members of the experts from `start` to `stop`."""
    if not mixture.modules:
        return [
            Member(f"{mixture.name}.{name}", 0, start, stop, reads=weight.reads) for name, weight in weights.items()
        ]
    members = []
    for i in range(start, stop):
        for name, param in model.get_submodule(mixture.modules[i]).named_parameters():
            rows = full_shape(param)[0]
            reads = name in weights and weights[name].reads
            members.append(Member(f"{mixture.modules[i]}.{name}", 0, 0, rows, rows, reads, first=i - start))
    return members


class _Layouts:
    """The layouts of a model's experts. Modules of one class and size have one layout."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers, self._hidden = linear_layers(model), hidden_widths(model)
        self._by_form: dict[Any, ExpertLayout | str] = {}

    def weights_of(self, mixture: Mixture) -> dict[str, ExpertWeight] | str:
        """What each parameter of an expert does, or why it is not known; of a list of modules, those of the first."""
        if not mixture.modules:
            layout = self.layout_of(mixture.name)
            return layout if isinstance(layout, str) else layout.weights
        first = mixture.modules[0]
        match = feed_forward(layers_within(self._layers, first), self._hidden)
        if match is None:
            return "the linear layers of one of them are not those of a feed-forward network"
        last = match[1].name.removeprefix(first + ".")
        return {f"{last}.weight": ExpertWeight(reads=True), f"{last}.bias": ExpertWeight(reads=True)}

    def channel_members(self, module: str) -> tuple[list[Member], int]:
        """The members of the channels of one expert that is a module, and how many channels it has."""
        match = feed_forward(layers_within(self._layers, module), self._hidden)
        assert match is not None, "all of them are alike"
        ups, down = match
        members = [
            member
            for up in ups
            for start in range(0, up.outputs, down.inputs)
            for member in up.output_members(1, start, start + down.inputs)
        ]
        return [*members, *down.input_members()], down.inputs

    def layout_of(self, name: str) -> ExpertLayout | str:
        """The layout of a module with all experts in its parameters, or why it is not known."""
        module = self._model.get_submodule(name)
        shapes = {param_name: tuple(full_shape(param)) for param_name, param in module.named_parameters()}
        form = type(module), tuple(sorted(shapes.items()))
        if form not in self._by_form:
            self._by_form[form] = expert_layout(module, shapes)
        return self._by_form[form]


# -- layouts ------------------------------------------------------------------

# Weights above which a module's code is run on smaller ones.
_MANY = 1 << 20


def expert_layout(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> ExpertLayout | str:
    """How a module keeps its experts, by what its code does with small random weights. Its own ones are not read.

    Args:
        module: with a matrix for each expert in each parameter; on any device, sharded or not.
        shapes: of its parameters before sharding.
    Returns:
        The layout, or why it is not known.
    """
    if any("." in name for name in shapes):
        return "its experts lie in parameters of modules inside of it"
    try:
        probe = _Probe(module, shapes)
    except _NotRunError as error:
        return str(error)
    return probe.layout()


class _NotRunError(Exception):
    """The code of a module can't be run on its own."""


class _Probe:
    """A module of experts with small random weights in double precision, whose code is run.

    Args:
        module: as of `expert_layout`.
        shapes: as of `expert_layout`.
    Raises:
        _NotRunError: it can't be run; the message says so.
    """

    def __init__(self, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
        self.count = next(shape[0] for shape in shapes.values() if len(shape) == 3)
        self.scales = _smaller_sizes(shapes, self.count)
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            name: torch.randn([self.small(size) for size in shape], generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        self._forward = inspect.unwrap(type(module).forward)
        self._stand_in = stand_in(module, {}, self.scales)
        for key, value in [*vars(self._stand_in).items()]:
            if value is True and "grouped_mm" in key:
                # torch's grouped products are not for double precision; what takes their place is a loop.
                self._stand_in.__dict__[key] = False
        sizes = {size for shape in shapes.values() if len(shape) == 3 for size in shape[1:]}
        for width in sorted(self.small(size) for size in sizes):
            for call in (self._by_index, self._sorted, self._counted):
                # Between -1/2 and 1/2, so that no limit of an activation is met.
                inputs = torch.rand(32, width, generator=generator, dtype=torch.float64) - 0.5
                try:
                    outputs = call(inputs, self.weights)
                except Exception:  # the code of a module may raise anything
                    continue
                if isinstance(outputs, Tensor) and outputs.shape == inputs.shape and bool(outputs.isfinite().all()):
                    self._call, self._inputs = call, inputs
                    return
        raise _NotRunError("its code can't be run on its own, so that it is not known which weights make a channel")

    def small(self, size: int) -> int:
        """The size in the small weights."""
        return self.scales.get(size, size)

    def _run(self, weights: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
        self._stand_in.__dict__["_parameters"] = {**weights}
        # A model may be on the meta device while it is made.
        with torch.device("cpu"):
            return self._forward(self._stand_in, *inputs)

    def _by_index(self, inputs: Tensor, weights: dict[str, Tensor]) -> Any:
        """As most modules are called: every token goes to expert 0."""
        chosen = torch.zeros(len(inputs), 1, dtype=torch.int64, device="cpu")
        return self._run(weights, (inputs, chosen, torch.ones_like(inputs[:, :1])))

    def _sorted(self, inputs: Tensor, weights: dict[str, Tensor]) -> Any:
        """As Llama 4's: the tokens of each expert one after the other."""
        return self._run(weights, (inputs.repeat(self.count, 1),))[: len(inputs)]

    def _counted(self, inputs: Tensor, weights: dict[str, Tensor]) -> Any:
        """As torchtitan's and DeepSpeed's grouped experts: how many of the tokens are of each expert."""
        counts = torch.tensor([len(inputs)] + [0] * (self.count - 1), device="cpu")
        return self._run(weights, (inputs, counts))

    def _touched(self, zeroed: dict[str, Tensor], output: int | None) -> dict[str, Tensor]:
        """Which weights of expert 0 have a gradient of one output, or of all of them; bool, without the dimension of
        the experts.
        """
        weights = {name: zeroed.get(name, weight).requires_grad_() for name, weight in self.weights.items()}
        with torch.enable_grad():
            outputs = self._call(self._inputs, weights)
            total = outputs.sum() if output is None else outputs[:, output].sum()
            grads = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
        return {
            name: torch.zeros_like(weight, dtype=torch.bool)[0] if grad is None else grad[0] != 0
            for (name, weight), grad in zip(weights.items(), grads)
        }

    def layout(self) -> ExpertLayout | str:
        """As `expert_layout`."""
        roles: dict[str, ExpertWeight] = {}
        last, dim = None, 0
        for name, touched in self._touched({}, 0).items():
            lines = [
                touched.movedim(d, 0).reshape(touched.shape[d], -1).any(1).nonzero().flatten().tolist()
                for d in range(touched.ndim)
            ]
            # What makes one output is of that output alone.
            outputs = [d for d in range(touched.ndim) if lines[d] == [0] and touched.shape[d] > 1]
            if touched.ndim == 2 and len(outputs) == 1:
                if last is not None:
                    return f"both {last} and {name} make its outputs"
                last, dim = name, 2 - outputs[0]
                roles[name] = ExpertWeight(True, dim)
            elif touched.ndim == 1 and outputs:
                roles[name] = ExpertWeight(True)
        if last is None:
            return "none of its parameters makes its outputs alone"
        count = self.weights[last].shape[dim]
        reads = {name: torch.zeros_like(self.weights[name]) for name in roles}
        if self._call(self._inputs, {**self.weights, **reads}).any():
            return f"it has outputs where {last} is zero"
        by_channel = []
        for channel in sorted({0, 1, count - 1} & {*range(count)}):
            mask = torch.zeros(count, dtype=torch.float64).index_fill_(0, torch.tensor(channel), 1.0)
            shape = [1, 1, 1]
            shape[dim] = count
            by_channel.append((channel, self._touched({last: self.weights[last].detach() * mask.view(shape)}, None)))
        for name in [name for name in self.weights if name not in roles]:
            role = self._role(name, count, [(channel, touched[name]) for channel, touched in by_channel])
            if isinstance(role, str):
                return role
            roles[name] = role
        ratio = self._ratio()
        weights = {
            name: ExpertWeight(role.reads, role.dim, tuple(round(start / ratio) for start in role.starts), role.width)
            for name, role in roles.items()
        }
        return ExpertLayout(round(count / ratio), {name: weights[name] for name in self.weights})

    def _ratio(self) -> float:
        """Of the small sizes to those of the module."""
        return next((small / size for size, small in self.scales.items()), 1.0)

    def _role(self, name: str, count: int, by_channel: list[tuple[int, Tensor]]) -> ExpertWeight | str:
        """What a parameter does that does not make outputs, by which of its weights single channels touch."""
        for d in range(by_channel[0][1].ndim):
            lines = {
                channel: tuple(touched.movedim(d, 0).reshape(touched.shape[d], -1).any(1).nonzero().flatten().tolist())
                for channel, touched in by_channel
            }
            first = lines[0]
            if not first or len(first) == by_channel[0][1].shape[d]:
                continue
            if all(lines[channel] == tuple(i + channel for i in first) for channel in lines):
                role = ExpertWeight(False, d + 1, first)
            elif all(lines[channel] == tuple(i + channel * len(first) for i in first) for channel in lines):
                role = ExpertWeight(False, d + 1, (0,), len(first))
            else:
                return f"it is not known which weights of {name} make a channel"
            if len(first) * count != by_channel[0][1].shape[d]:
                return f"{name} has weights of no channel"
            return role
        return f"it is not known what {name} does to the channels"


def _smaller_sizes(shapes: dict[str, tuple[int, ...]], count: int) -> dict[int, int]:
    """{size of a dimension: a smaller one}, all in one ratio; empty where the sizes are small, or one of them is the
    number of experts.
    """
    sizes = sorted({size for shape in shapes.values() for size in shape[1:]})
    divisor = math.gcd(*sizes)
    if sum(math.prod(shape) for shape in shapes.values()) <= _MANY or count in sizes:
        return {}
    # Three channels at least tell layouts apart.
    factor = max(1, math.ceil(3 * divisor / sizes[0]))
    return {size: size // divisor * factor for size in sizes} if factor < divisor else {}
