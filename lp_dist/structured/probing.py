"""Which weights of an attention belong to which head, found by running the module's own code on random inputs and
weights: the gradients show what a head depends on. The model's weights are not read.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.sharding.deepspeed_slices import is_transposed
from lp_dist.sharding.shards import full_shape
from lp_dist.structured.groups import Member

# Weights above which a module is not run.
_TOO_MANY = 1 << 28
_TOKENS = 3
_NUMBER_OF_HEADS = re.compile("heads?$")


def stand_in(
    module: nn.Module,
    weights: dict[str, Tensor],
    sizes: dict[int, int] | None = None,
    heads: dict[int, int] | None = None,
) -> nn.Module:
    """The module without hooks and with other weights, whose code can be run: it shares nothing that is written.

    Args:
        module: on any device, sharded or not.
        weights: {name of a parameter or buffer in it: its values}; others are left out.
        sizes: {whole number that is an attribute: what it is instead}.
        heads: as `sizes`, of attributes that are numbers of heads by their names.
    """
    copy = object.__new__(type(module))
    for key, value in module.__dict__.items():
        numbers = (heads or {}) if _NUMBER_OF_HEADS.search(key) else (sizes or {})
        copy.__dict__[key] = numbers.get(value, value) if type(value) is int else value
    for key in [key for key in copy.__dict__ if key.startswith("_") and key.endswith("_hooks")]:
        copy.__dict__[key] = OrderedDict()
    copy.__dict__["_parameters"] = {name: weights.get(name) for name in module._parameters}
    copy.__dict__["_buffers"] = {name: weights.get(name) for name in module._buffers}
    copy.__dict__["_modules"] = {
        name: child
        and stand_in(
            child,
            {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")},
            sizes,
            heads,
        )
        for name, child in module._modules.items()
    }
    return copy


def structure_of(module: nn.Module) -> tuple[Any, ...]:
    """What is the same for two modules with one layout: their classes, shapes and plain attributes, without the number
    of the layer. Other attributes must be the same objects, as the configuration is.
    """
    plain = (int, float, bool, str, type(None))
    return tuple(
        (
            name,
            type(child),
            tuple((key, tuple(full_shape(param))) for key, param in child.named_parameters(recurse=False)),
            tuple(
                (key, value if isinstance(value, plain) else type(value) if callable(value) else id(value))
                for key, value in sorted(vars(child).items())
                if not key.startswith("_") and key not in ("layer_idx", "training")
            ),
        )
        for name, child in module.named_modules()
    )


@dataclass(frozen=True)
class HeadLayout:
    """Which weights of an attention belong to its heads.

    Args:
        heads: number of query heads.
        shared: number of heads of keys and values.
        last: name of the layer that reads the heads, in the module.
        members: of each head; None where its weights do not lie in a row.
        shared_members: of each head of keys and values, with the query heads that read it; without those of `last`.
    """

    heads: int
    shared: int
    last: str
    members: list[Member] | None
    shared_members: list[Member]


def head_layout(module: nn.Module, size: int) -> HeadLayout | None:
    """The layout of an attention, or None where its code can't be run on its own.

    Args:
        module: the attention; on any device, sharded or not.
        size: of a head, as the last layer reads it.
    Raises:
        LayoutError: its heads are not apart; the message says which weights tie them together, or that the module
            computes something else without a head.
    """
    shapes = {name: tuple(full_shape(param)) for name, param in module.named_parameters()}
    if sum(math.prod(shape) for shape in shapes.values()) > _TOO_MANY:
        return None
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) / max(1, shape[-1] if shape else 1) ** 0.5
        for name, shape in shapes.items()
    }
    buffers = {name: torch.zeros(buffer.shape, dtype=buffer.dtype) for name, buffer in module.named_buffers()}
    call = _call(module, weights, buffers, size)
    layout = None if call is None else _layout(module, shapes, call, size)
    if call is not None and layout is not None and not _can_be_cut(module, call, layout, size):
        raise LayoutError("without a head it computes something else, or can't be run")
    return layout


def _can_be_cut(module: nn.Module, call: _Call, layout: HeadLayout, size: int) -> bool:
    """Whether the module without its first head of keys and values, and the query heads that read it, has the outputs
    of the module in which nothing reads them.
    """
    ratio = layout.heads // layout.shared
    last = f"{layout.last}.weight"
    is_plain = isinstance(module.get_submodule(layout.last), nn.Linear)
    reading = Member(last, int(is_plain), 0, layout.heads * size, ratio * size)
    masked = call.weights[last].clone()
    masked.narrow(reading.dim, 0, reading.width).zero_()
    cut = dict(call.weights)
    for member in sorted([*layout.shared_members, reading], key=lambda member: -member.start):
        weight = cut[member.name]
        kept = torch.ones(weight.shape[member.dim], dtype=torch.bool)
        kept[member.start : member.start + member.width] = False
        cut[member.name] = weight[(slice(None),) * member.dim + (kept,)]
    numbers = {layout.heads: layout.heads - ratio, layout.shared: layout.shared - 1}
    with torch.no_grad():
        expected = call.outputs({**call.weights, last: masked})
        for sizes in ({}, {layout.heads * size: (layout.heads - ratio) * size}):
            with suppress(Exception):  # the code of a module may raise anything
                if torch.allclose(call.outputs(cut, sizes, numbers), expected, rtol=1e-4, atol=1e-5):
                    return True
    return False


class LayoutError(Exception):
    """Weights belong to several heads."""


class _Call:
    """A call of the module that works.

    Args:
        module: the attention.
        weights: random ones.
        buffers: zeros.
        arguments: of its forward.
    """

    def __init__(
        self, module: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], arguments: dict[str, Any]
    ) -> None:
        self._module, self.weights, self._buffers, self._arguments = module, weights, buffers, arguments
        self._forward = inspect.unwrap(type(module).forward)

    def outputs(
        self,
        weights: dict[str, Tensor],
        sizes: dict[int, int] | None = None,
        heads: dict[int, int] | None = None,
    ) -> Tensor:
        """(tokens, width). sizes, heads: as of `stand_in`."""
        module = stand_in(self._module, {**weights, **self._buffers}, sizes, heads)
        module.train(False)
        with torch.device("cpu"):
            outputs = self._forward(module, **self._arguments)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs.reshape(_TOKENS, -1)

    def touched(self, replaced: dict[str, Tensor], output: int | None) -> dict[str, Tensor]:
        """Which weights have a gradient of one output, or of all of them; bool, by name."""
        weights = {name: replaced.get(name, weight).detach().requires_grad_() for name, weight in self.weights.items()}
        with torch.enable_grad():
            outputs = self.outputs(weights)
            # Weighted, since the sum over a normalised vector may not depend on what it was.
            factors = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
            total = (outputs * factors)[:, slice(None) if output is None else output].sum()
            grads = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
        return {
            name: torch.zeros_like(weight, dtype=torch.bool) if grad is None else grad != 0
            for (name, weight), grad in zip(weights.items(), grads)
        }


def _call(module: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], size: int) -> _Call | None:
    """The first way to call the module that works."""
    widths = {child.in_features for child in module.modules() if isinstance(child, nn.Linear)}
    for arguments in _arguments(module, sorted(widths, reverse=True), size):
        call = _Call(module, weights, buffers, arguments)
        with suppress(Exception), torch.no_grad():  # the code of a module may raise anything
            if bool(call.outputs(weights).isfinite().all()):
                return call
    return None


def _arguments(module: nn.Module, widths: list[int], size: int) -> Iterator[dict[str, Any]]:
    """Arguments for the forward of an attention: of tokens in a batch or without one, and positions of any width."""
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    first = next((name for name in [*names][1:]), None)
    if first is None:
        return
    generator = torch.Generator().manual_seed(2)
    others = {number for key, number in vars(module).items() if type(number) is int and key.endswith(("dim", "size"))}
    sizes = [size, *sorted(others - {size})]
    # Some rotate halves of a head by one angle.
    sizes += [half for number in sizes if (half := number // 2) and half not in sizes]
    required = {
        name: None
        for name, parameter in [*names.items()][2:]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    for width in widths:
        inputs = torch.randn(1, _TOKENS, width, generator=generator)
        for positions in sizes if "position_embeddings" in names else [0]:
            for batched in (True, False):
                arguments: dict[str, Any] = {**required, first: inputs if batched else inputs[0]}
                if positions:
                    angles = torch.randn(1, _TOKENS, positions, generator=generator)
                    angles = angles if batched else angles[0]
                    arguments["position_embeddings"] = angles.cos(), angles.sin()
                if "cu_seqlens" in names:
                    arguments["cu_seqlens"] = torch.tensor([0, _TOKENS], dtype=torch.int32)
                yield arguments
                if positions:
                    # Or complex numbers.
                    yield {**arguments, "position_embeddings": torch.polar(torch.ones_like(angles), angles)}


def _layout(module: nn.Module, shapes: dict[str, tuple[int, ...]], call: _Call, size: int) -> HeadLayout | None:
    linear = {
        f"{name}.weight": name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) or is_transposed(child)
    }
    last = None
    for name, touched in call.touched({}, 0).items():
        rows = (
            touched
            if isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear) or touched.ndim != 2
            else touched.T
        )
        if name in linear and touched.ndim == 2 and len(rows) > 1 and rows.any(1).nonzero().flatten().tolist() == [0]:
            last = name
    if last is None:
        return None
    is_plain = isinstance(module.get_submodule(linear[last]), nn.Linear)
    inputs = shapes[last][1 if is_plain else 0]
    if inputs % size or inputs // size < 2:
        return None
    heads = inputs // size
    by_head = []
    for head in range(heads):
        mask = torch.zeros(inputs)
        mask[head * size : (head + 1) * size] = 1.0
        touched_by = call.touched({last: call.weights[last] * (mask if is_plain else mask[:, None])}, None)
        # Not the masks of all heads, each as large as the weights.
        by_head.append({name: _touched_indices(touched) for name, touched in touched_by.items()})
    members: list[tuple[str, int, list[set[int]]]] = []
    for name, shape in shapes.items():
        # A bias goes with the rows of its layer: that of keys has no gradient.
        if name == last or (len(shape) == 1 and f"{name.removesuffix('bias')}weight" in linear):
            continue
        of_param = _sets_of(name, shape, [touched[name] for touched in by_head])
        if of_param is not None:
            members.append((name, *of_param))
    layout = _described(module, members, linear, linear[last], heads)
    divided = {name for name, _, _ in members} | {last}
    for name in [name for name in linear if name not in divided]:
        outputs = shapes[name][0 if isinstance(module.get_submodule(linear[name]), nn.Linear) else 1]
        # Latents have other widths.
        if outputs in (layout.heads * size, layout.shared * size):
            raise LayoutError(f"all heads use all of {name}")
    return layout


def _touched_indices(touched: Tensor) -> list[Tensor]:
    """Along each dimension, (size,) bool: at which indices an element is touched."""
    dims = range(touched.ndim)
    return [
        touched.any(dim=[other for other in dims if other != dim]) if touched.ndim > 1 else touched for dim in dims
    ]


def _sets_of(name: str, shape: tuple[int, ...], by_head: list[list[Tensor]]) -> tuple[int, list[set[int]]] | None:
    """The dimension along which a parameter is divided among the heads, and the indices of each; None where all heads
    use all of it.
    """
    for dim, size in enumerate(shape):
        if all(bool(indices[dim].all()) for indices in by_head):
            continue
        sets = [{*indices[dim].nonzero().flatten().tolist()} for indices in by_head]
        if not any(sets):
            raise LayoutError(f"it is not known what {name} does to the heads")
        if set().union(*sets) != {*range(size)}:
            raise LayoutError(f"{name} has weights of no head")
        return dim, sets
    return None


def _described(
    module: nn.Module, divided: list[tuple[str, int, list[set[int]]]], linear: dict[str, str], last: str, heads: int
) -> HeadLayout:
    shared = heads
    for name, _, sets in divided:
        components = _components(sets)
        if len({len(component) for component in components}) > 1 or [i for c in components for i in c] != [
            *range(heads)
        ]:
            raise LayoutError(f"{name} ties heads together")
        shared = math.gcd(shared, len(components))
    if shared < 2 and heads > 1 and any(len(_components(sets)) == 1 for _, _, sets in divided):
        raise LayoutError(f"{next(n for n, _, s in divided if len(_components(s)) == 1)} ties all heads together")
    biased = {name for name, child in module.named_modules() if getattr(child, "bias", None) is not None}
    of_heads: list[Member] | None = []
    of_shared: list[Member] = []
    ratio = heads // shared
    for name, dim, sets in divided:
        unions = [set().union(*sets[i * ratio : (i + 1) * ratio]) for i in range(shared)]
        in_rows = _in_rows(name, dim, unions)
        if in_rows is None:
            raise LayoutError(f"the weights of its heads do not lie in a row in {name}")
        of_shared += _with_bias(in_rows, linear, biased)
        if len(_components(sets)) < heads:
            # Several heads use it: it stays where one of them goes, unless it has weights of single heads as well.
            if any(indices != sets[i - i % ratio] for i, indices in enumerate(sets)):
                of_heads = None
            continue
        single = _in_rows(name, dim, sets)
        if single is None or of_heads is None:
            of_heads = None
        else:
            of_heads += _with_bias(single, linear, biased)
    return HeadLayout(heads, shared, last, of_heads, of_shared)


def _components(sets: list[set[int]]) -> list[list[int]]:
    """Neighbouring heads that have indices in common, together."""
    components: list[list[int]] = []
    for i, indices in enumerate(sets):
        joined = next((c for c in components if any(indices & sets[other] for other in c)), None)
        if joined is None:
            components.append([i])
        else:
            joined.append(i)
    return components


def _in_rows(name: str, dim: int, sets: list[set[int]]) -> list[Member] | None:
    """These groups of indices as members: runs of neighbouring indices, those of the next group right after each."""
    runs: list[list[int]] = []
    for index in sorted(sets[0]):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    members = []
    for run in runs:
        width = len(run)
        if any(
            not {*range(run[0] + i * width, run[0] + (i + 1) * width)} <= indices for i, indices in enumerate(sets)
        ):
            return None
        members.append(Member(name, dim, run[0], run[0] + len(sets) * width, width))
    if any(sum(member.width for member in members) != len(indices) for indices in sets):
        return None
    return members


def _with_bias(members: list[Member], linear: dict[str, str], biased: set[str]) -> list[Member]:
    """The members of a weight, and those of its bias."""
    layer = linear.get(members[0].name)
    if layer not in biased:
        return members
    return [*members, *(Member(f"{layer}.bias", 0, m.start, m.stop, m.width) for m in members)]
