"""Mixtures of experts, recognised from a model's modules: where the experts are, which router chooses among them, and
how many it chooses.

No class is known by its name. Experts are parameters with a matrix for each of them, or a list of equal modules, with
a router beside them: a matrix with as many outputs as there are experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lp_dist.sharding.shards import full_shape
from lp_dist.structured.groups import Member

# What modules and configurations call the number of experts that a token is sent to, the number of groups of experts
# of which a router first chooses some, and how many groups it chooses. Shapes can't tell.
_CHOSEN = re.compile(r"top_?k$|top_?k_experts?$|(experts?|num)_per_tok(en)?$|num_selected_experts$|^moe_k$")
_ROUTED_GROUPS = re.compile(r"^(n|num)_(expert_)?groups?$")
_CHOSEN_GROUPS = re.compile(r"top_?k_groups?$|n_limited_groups$")


@dataclass(frozen=True)
class Router:
    """What chooses among the experts of a module.

    Args:
        weight: name of its matrix.
        chosen: how many experts it chooses for a token.
        groups: how many groups of neighbouring experts it chooses among first; 1: it does not.
        chosen_groups: how many of these groups.
        followers: name and dimension of every parameter and buffer with an entry for each expert, `weight` first.
        tables: names of its tensors whose entries are numbers of experts.
    """

    weight: str
    chosen: int
    groups: int
    chosen_groups: int
    followers: tuple[tuple[str, int], ...]
    tables: tuple[str, ...]

    @property
    def least(self) -> int:
        """How many experts of each group must stay."""
        if self.groups == 1:
            return self.chosen
        # Groups are compared by their two best experts.
        return max(2, -(-self.chosen // self.chosen_groups))

    def members_of_section(self, start: int, stop: int) -> tuple[Member, ...]:
        """What follows the experts from `start` to `stop`."""
        return tuple(Member(name, dim, start, stop) for name, dim in self.followers)


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    Args:
        name: of the module that holds them.
        count: how many there are.
        modules: names of the modules of single experts; empty where each parameter has all experts in it.
        router: what chooses among them, or why it is not known.
    """

    name: str
    count: int
    modules: tuple[str, ...]
    router: Router | str


def mixtures(model: nn.Module) -> list[Mixture]:
    """The experts of every layer, in the order of the model. A list of equal modules without a router is none."""
    results = []
    # Once for all layers, since a model has as many tensors as layers.
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, module in model.named_modules():
        lists = [shape[0] for _, shape in _expert_stacks(module)]
        if len(lists) > 1 and lists.count(lists[0]) == len(lists):
            results.append(Mixture(name, lists[0], (), _router(model, tensors, name, lists[0])))
        elif len(lists) > 1:
            results.append(
                Mixture(name, lists[0], (), f"its parameters are of {' and '.join(map(str, lists))} experts")
            )
        elif (
            len(inner := [shapes[0][1][0] for child in module.children() if len(shapes := _expert_stacks(child)) == 1])
            > 1
        ):
            reason = "its experts lie in parameters of several modules, and it is not known how these work together"
            results.append(Mixture(name, inner[0], (), reason))
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _are_equal([*module.children()]):
            above = name.rpartition(".")[0]
            owners = [*_matrices_of(model.get_submodule(above), above, name, len(module))]
            # A stack of layers has no router in the same module, and layers of one are in no other layer.
            if len(owners) == 1 and re.search(r"(^|\.)\d+\.", name):
                names = tuple(f"{name}.{child}" for child, _ in module.named_children())
                router = _described(model, tensors, above, name, owners[0], len(module))
                results.append(Mixture(name, len(module), names, router))
    return results


def _expert_stacks(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """The module's own parameters of three dimensions, without those of convolutions."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    shapes = [(name, tuple(full_shape(param))) for name, param in module.named_parameters(recurse=False)]
    return [(name, shape) for name, shape in shapes if len(shape) == 3 and shape[0] > 1]


def _are_equal(modules: list[nn.Module]) -> bool:
    """Whether these are several modules of one class and one size, with parameters."""
    sizes = [{name: tuple(full_shape(param)) for name, param in module.named_parameters()} for module in modules]
    return (
        len(modules) > 1
        and bool(sizes[0])
        and all(size == sizes[0] for size in sizes)
        and len({type(module) for module in modules}) == 1
    )


# -- routers ------------------------------------------------------------------


def _router(model: nn.Module, tensors: dict[str, Tensor], experts: str, count: int) -> Router | str:
    """What chooses among `count` experts, or why it is not known. It is searched in the layer of the model that the
    experts are in, the nearest module first. `tensors` are all parameters and buffers of the model.
    """
    names = experts.split(".")
    layer = max((i + 1 for i, step in enumerate(names[:-1]) if step.isdigit()), default=0)
    for depth in range(len(names) - 1, layer - 1, -1):
        above = ".".join(names[:depth])
        owners = [*_matrices_of(model.get_submodule(above), above, experts, count)]
        if len(owners) > 1:
            return (
                f"{len(owners)} matrices beside it have as many outputs as it has experts ({', '.join(owners[:2])}),"
                " so that it is not known which is its router"
            )
        if owners:
            return _described(model, tensors, above, experts, owners[0], count)
    return f"no matrix beside it has {count} outputs, as a router of its experts would have"


def _matrices_of(module: nn.Module, name: str, experts: str, count: int) -> Iterator[str]:
    """Names of the matrices in a module, outside of its experts, with as many outputs as there are experts."""
    for inner_name, inner in module.named_modules(prefix=name):
        if inner_name == experts or inner_name.startswith(experts + "."):
            continue
        for param_name, param in inner.named_parameters(recurse=False):
            shape = tuple(full_shape(param))
            of_linear = isinstance(inner, nn.Linear)
            is_output = shape[:1] == (count,) if of_linear else count in shape
            if len(shape) == 2 and is_output and not isinstance(inner, nn.Embedding) and 1 not in shape:
                yield f"{inner_name}.{param_name}".removeprefix(".")


def _described(
    model: nn.Module, tensors: dict[str, Tensor], above: str, experts: str, weight: str, count: int
) -> Router | str:
    owner = weight.rpartition(".")[0]
    # From the matrix up to the module that has router and experts.
    names = owner.split(".")
    chain = [model.get_submodule(".".join(names[:i])) for i in range(len(names), above.count(".") + bool(above), -1)]
    scope = ".".join(names[: above.count(".") + 1 + bool(above)]) if owner != above else above
    holders: list[Any] = [*chain, model.get_submodule(above), model.get_submodule(experts)]
    configs = [holder.config for holder in holders if hasattr(holder, "config")]
    configs += [model.config] if hasattr(model, "config") else []
    configs += [text for config in configs if (text := getattr(config, "text_config", None)) is not None]
    chosen = _number(holders + configs, _CHOSEN)
    if chosen is None:
        return f"it is not known how many experts its router ({weight}) chooses for a token"
    groups = _number(holders, _ROUTED_GROUPS) or 1
    chosen_groups = _number(holders, _CHOSEN_GROUPS) or 1
    if groups > 1 and count % groups:
        return f"its router chooses among {groups} groups, and {count} experts are no multiple of it"
    followers: list[tuple[str, int]] = []
    tables: list[str] = []
    for name, tensor in tensors.items():
        if not _is_beside(model, name, above, experts, scope):
            continue
        shape = tuple(full_shape(tensor))
        if count in shape:
            followers.append((name, shape.index(count)))
        elif len(shape) > 1 and not tensor.is_floating_point():
            tables.append(name)
    followers.sort(key=lambda follower: follower[0] != weight)
    return Router(weight, chosen, groups, chosen_groups, tuple(followers), tuple(tables))


def _is_beside(model: nn.Module, name: str, above: str, experts: str, scope: str) -> bool:
    """Whether a tensor belongs to the router: it is in the router's module, or beside it and the experts in a module
    that has no linear layers, as those of shared experts have.
    """
    prefix = f"{above}." if above else ""
    if not name.startswith(prefix) or name.startswith(experts + "."):
        return False
    if scope != above and name.startswith(scope + "."):
        return True
    if experts.rpartition(".")[0] != above:
        # Router and experts lie in the layer itself, beside its norms.
        return False
    child = name.removeprefix(prefix).partition(".")
    return not child[1] or not any(
        isinstance(module, nn.Linear) for module in model.get_submodule(prefix + child[0]).modules()
    )


def _number(holders: list[Any], pattern: re.Pattern[str]) -> int | None:
    """The largest whole number with such a name, of the first of the holders that has one."""
    for holder in holders:
        numbers = [value for key, value in vars(holder).items() if type(value) is int and pattern.search(key)]
        if numbers:
            return max(numbers)
    return None
