"""What an expression in the code of a module may stand for: parameters and views of them, submodules, outputs of
these, what the module was given, or an object that is there already.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lp_dist.sharding.shards import full_shape

UNKNOWN = object()


@dataclass(frozen=True)
class View:
    """A parameter, or a part or a cast of it.

    Args:
        path: of the parameter.
        dims: its dimensions in the order in which the view has them; None where that is not known.
        ndim: of the parameter.
    """

    path: str
    dims: tuple[int, ...] | None
    ndim: int


@dataclass(frozen=True)
class Value:
    """What an expression may stand for.

    Args:
        known: a Python object that is there already.
        modules: modules of the model, each with its path.
        views: parameters that this is, or is a view of.
        makers: submodules and parameters whose outputs this is made of.
        is_input: whether it depends on what the module was given.
        is_compared: whether activations were multiplied with each other on the way, as queries with keys.
        items: of a tuple that was written out.
        code: a function that was defined on the way.
        above: for `super()`, the class whose bases are meant.
    """

    known: Any = UNKNOWN
    modules: tuple[tuple[str, nn.Module], ...] = ()
    views: frozenset[View] = frozenset()
    makers: frozenset[str] = frozenset()
    is_input: bool = False
    is_compared: bool = False
    items: tuple[Value, ...] | None = None
    code: ast.FunctionDef | ast.Lambda | None = None
    above: type | None = None

    def derived(self) -> Value:
        """Computed from this, and no parameter any more."""
        return Value(makers=self.makers, is_input=self.is_input, is_compared=self.is_compared)


NOTHING = Value()
INPUT = Value(is_input=True)


def union(values: Iterable[Value]) -> Value:
    values = [value for value in values if value is not NOTHING]
    if not values:
        return NOTHING
    if len(values) == 1:
        return values[0]
    modules = {path: (path, module) for value in values for path, module in value.modules}
    objects = {id(value.known): value.known for value in values}
    return Value(
        known=values[0].known if len(objects) == 1 else UNKNOWN,
        modules=tuple(modules.values()),
        views=frozenset().union(*(value.views for value in values)),
        makers=frozenset().union(*(value.makers for value in values)),
        is_input=any(value.is_input for value in values),
        is_compared=any(value.is_compared for value in values),
        code=next((value.code for value in values if value.code is not None), None),
    )


def view_of(path: str, param: Tensor) -> View:
    ndim = len(full_shape(param))  # as the code sees it, not as a rank holds it
    return View(path, tuple(range(ndim)), ndim)


def enumerated(value: Value) -> dict[str, Any]:
    element = element_of(value)
    return {
        "modules": element.modules,
        "views": element.views,
        "makers": element.makers,
        "is_input": element.is_input,
    }


def element_of(value: Value) -> Value:
    """What an element of it may be."""
    if value.items is not None:
        return union(value.items)
    if value.modules:
        modules: list[tuple[str, nn.Module]] = []
        views: set[View] = set()
        for path, module in value.modules:
            if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                modules += [(f"{path}.{name}", child) for name, child in module._modules.items() if child is not None]
            elif isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                views |= {view_of(f"{path}.{name}", param) for name, param in module.named_parameters(recurse=False)}
            else:
                modules.append((path, module))
        return Value(modules=tuple(modules), views=frozenset(views))
    return replace(value, known=UNKNOWN)


def reordered(value: Value, order: Callable[[tuple[int, ...]], tuple[int, ...] | None]) -> Value:
    views = frozenset(
        replace(view, dims=order(view.dims) if view.dims is not None and len(view.dims) > 1 else view.dims)
        for view in value.views
    )
    return replace(value, views=views, known=UNKNOWN, items=None)


def last_swapped(dims: tuple[int, ...]) -> tuple[int, ...]:
    return (*dims[:-2], *reversed(dims[-2:]))


def transposed(operands: list[Value]) -> Value:
    axes = [value.known for value in operands[1:3]]

    def order(dims: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(axes) != 2 or not all(isinstance(axis, int) and -len(dims) <= axis < len(dims) for axis in axes):
            return None
        swapped = list(dims)
        swapped[axes[0]], swapped[axes[1]] = swapped[axes[1]], swapped[axes[0]]
        return tuple(swapped)

    return reordered(operands[0], order)


def permuted(operands: list[Value]) -> Value:
    items = operands[1].items if len(operands) == 2 and operands[1].items is not None else operands[1:]
    axes = [value.known for value in items]

    def order(dims: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(axes) != len(dims) or not all(
            isinstance(axis, int) and -len(dims) <= axis < len(dims) for axis in axes
        ):
            return None
        return tuple(dims[axis] for axis in axes)

    return reordered(operands[0], order)


def without_dims(value: Value) -> Value:
    return replace(value, views=frozenset(replace(view, dims=None) for view in value.views))


def indexed(view: View, indices: list[ast.expr], by_data: bool) -> tuple[tuple[int, ...] | None, bool]:
    """The dimensions that an index leaves, and whether it looks rows of a table up.

    Of a stack of three dimensions it takes one or some of the matrices.
    """
    if view.dims is None:
        return None, False
    dims = list(view.dims)
    left: list[int] = []
    dropped = 0
    for index in indices:
        if isinstance(index, ast.Slice):
            if dims:
                left.append(dims.pop(0))
        elif isinstance(index, ast.Constant) and index.value is None:
            left.append(-1)
        elif isinstance(index, ast.Constant) and index.value is Ellipsis:
            return None, False
        else:
            if dims:
                dims.pop(0)
            dropped += 1
    remaining = (*left, *dims)
    return remaining, bool(dropped) and by_data and len(remaining) < 2


def bind_arguments(
    signature: ast.arguments, args: list[Value], kwargs: dict[str, Value], default: Value
) -> dict[str, Value]:
    """What the names of a function's arguments stand for."""
    names = [arg.arg for arg in (*signature.posonlyargs, *signature.args)]
    bound = dict(zip(names, args))
    if signature.vararg is not None:
        bound[signature.vararg.arg] = union(args[len(names) :]) if len(args) > len(names) else default
    named = {*names, *(arg.arg for arg in signature.kwonlyargs)}
    bound |= {name: value for name, value in kwargs.items() if name in named}
    for name in named - bound.keys():
        bound[name] = default
    if signature.kwarg is not None:
        rest = [value for name, value in kwargs.items() if name not in named]
        bound[signature.kwarg.arg] = union(rest) if rest else default
    return bound
