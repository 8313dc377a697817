"""Reads what a module does with its parameters from the code of its `forward`: which of them are operands of matrix
products, which are looked up, scaled with, or joined to the activations, and where the outputs of submodules go.

Nothing is run. Statements are followed one after another with the module at hand, so that names stand for what
they are: `self.w` for a parameter, `F.linear` for torch's function. Both sides of a branch are followed, a loop twice.
What can't be followed (compiled code, code without a source) is not in the result.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import logging
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from lp_dist.errors import first_line
from lp_dist.modules.values import (
    INPUT,
    NOTHING,
    UNKNOWN,
    Value,
    View,
    bind_arguments,
    element_of,
    enumerated,
    indexed,
    last_swapped,
    permuted,
    reordered,
    transposed,
    union,
    view_of,
    without_dims,
)
from lp_dist.sharding.shards import full_shape

logger = logging.getLogger(__name__)


class Use(Enum):
    """What is done with a parameter."""

    PRODUCT = "operand of a matrix product"
    LOOKUP = "its rows are looked up"
    ELEMENTWISE = "scales or shifts activations"
    TOKEN = "joined to the activations"
    COMPUTED = "weights are computed from it"


@dataclass(frozen=True)
class Product:
    """How a parameter enters a matrix product.

    Args:
        inputs: the dimension that is summed over.
        outputs: the dimension of what comes out.
        experts: the dimension that numbers matrices of which each acts on activations of its own; None for one matrix.
    """

    inputs: int
    outputs: int
    experts: int | None = None


@dataclass
class ModuleCode:
    """What the code of a module does. Paths are relative to the module, as in its `named_parameters`.

    Args:
        uses: {parameter: what is done with it}.
        products: {parameter: how it enters a product}, where that can be told. Of several ways the first.
        unclear: the parameters that enter products in several ways, by different branches of the code perhaps.
        choosing: submodules and parameters whose outputs are ranked, to choose what acts next.
        feeding: submodules and parameters whose outputs go into another one.
        feeding_themselves: those whose outputs go into themselves, as those of a stack of layers.
        returned: submodules and parameters whose outputs are returned.
        made: of each thing in the tuple that it returns, whether it is made by a submodule or parameter; empty where
            that can't be told.
    """

    uses: dict[str, set[Use]] = field(default_factory=dict)
    products: dict[str, Product] = field(default_factory=dict)
    unclear: set[str] = field(default_factory=set)
    choosing: set[str] = field(default_factory=set)
    feeding: set[str] = field(default_factory=set)
    feeding_themselves: set[str] = field(default_factory=set)
    returned: set[str] = field(default_factory=set)
    made: tuple[bool, ...] = ()


# By the class of the module and its form, so that each of a hundred layers is not read anew. It holds no module.
_CODES: WeakKeyDictionary[type, dict[tuple[Any, ...], ModuleCode | None]] = WeakKeyDictionary()


def code_of(module: nn.Module) -> ModuleCode | None:
    """What the code of a module does with its parameters and submodules.

    Args:
        module: of any kind.
    Returns:
        None: its `forward` has no source that can be read.
    """
    form = (
        # The classes by reference, so that none is kept alive by what was read of it.
        *((name, ref(type(child))) for name, child in module.named_modules()),
        *(
            (name, len(full_shape(param)), _is_long_in(param, 2))
            for name, param in module.named_parameters(remove_duplicate=False)
        ),
    )
    codes = _CODES.setdefault(type(module), {})
    if form not in codes:
        reader = _Reader(module)
        try:
            codes[form] = reader.code if reader.read() else None
        except Exception as error:  # anything may stand in the code of a module
            logger.warning(
                "the code of %s can't be followed (%s: %s); its parameters are known by shape and name alone",
                type(module).__name__,
                type(error).__name__,
                first_line(error),
            )
            codes[form] = None
    return codes[form]


def has_matrices(module: nn.Module) -> bool:
    """Whether a module has matrices of its own. A vector may be written in two dimensions; a layer of torch may have
    one output.
    """
    fewest = 0 if type(module).__module__.startswith("torch.nn.") else 2
    return any(len(full_shape(param)) > 1 and _is_long_in(param, fewest) for param in module.parameters(recurse=False))


def _is_long_in(param: Tensor, dims: int) -> bool:
    """Whether as many dimensions of a parameter are above 1."""
    return sum(size > 1 for size in full_shape(param)) >= dims


# -- what functions do --------------------------------------------------------------------------------

# By the names that torch's functions and a tensor's methods have. Where both exist they do the same.
_PRODUCTS = {"matmul", "mm", "bmm", "mv", "_grouped_mm", "grouped_mm", "_scaled_mm", "dot", "inner"}
_PRODUCTS_ADDED = {"addmm", "baddbmm", "addmm_", "baddbmm_", "addbmm"}
_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_LOOKUPS = {"embedding", "embedding_bag", "gather", "index_select", "take", "take_along_dim"}
_SAME = {
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach", "cuda", "cpu",
    "requires_grad_", "to_local", "full_tensor", "wait", "chunk", "split", "tensor_split",
}  # fmt: skip
_RESHAPED = {
    "view", "reshape", "flatten", "unflatten", "expand", "expand_as", "repeat", "repeat_interleave", "squeeze",
    "unsqueeze", "broadcast_to", "tile", "narrow", "roll", "flip", "movedim",
}  # fmt: skip
_LINED_UP = {"cat", "concat", "concatenate", "hstack", "vstack"}
_JOINED = {*_LINED_UP, "stack", "pad", "scaled_dot_product_attention"}
_SCALED = {"mul", "mul_", "multiply", "div", "div_", "divide"}
_SHIFTED = {
    "add", "add_", "sub", "sub_", "rsub", "lerp", "addcmul", "where", "layer_norm", "rms_norm", "group_norm",
    "batch_norm", "instance_norm", "prelu",
}  # fmt: skip
_TRANSFORMED = {
    "exp", "expm1", "log", "log1p", "softplus", "sigmoid", "tanh", "softmax", "log_softmax", "logsigmoid", "relu",
    "cos", "sin", "pow", "square", "sqrt", "rsqrt", "abs", "clamp", "normalize", "norm", "cumsum", "cumprod",
}  # fmt: skip
_COMPARISONS = {"cosine_similarity", "cdist", "pairwise_distance"}
_RANKINGS = {"topk", "argmax", "argsort", "sort", "multinomial", "gumbel_softmax"}
_ADDS_TO_ITSELF = {"append", "extend", "insert", "update", "setdefault"}

_DEPTH = 8  # of functions that call each other


@lru_cache(maxsize=2048)
def _tree(code: types.CodeType) -> ast.FunctionDef | None:
    """The syntax of a function; None where it has no source. Of its code, since a function may hold a model."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError, IndentationError):
        return None
    first = tree.body[0] if tree.body else None
    return first if isinstance(first, ast.FunctionDef) else None


def _plain(function: Any) -> types.FunctionType | None:
    """The function as it was written, inside of decorators that keep it."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, (staticmethod, classmethod, types.MethodType)):
        function = function.__func__
    try:
        function = inspect.unwrap(function)
    except ValueError:
        return None
    return function if isinstance(function, types.FunctionType) else None


def _static(thing: Any, name: str) -> Any:
    """An attribute that is there already, `UNKNOWN` if there is none. It runs no code of the object, as properties and
    modules that are imported when they are used would.
    """
    return getattr(thing, "__dict__", {}).get(name, UNKNOWN)


@dataclass
class _Frame:
    """A function that is being followed.

    Args:
        function: whose globals names stand for.
        names: what local names stand for.
        owner: the class that holds the function, for `super()`.
        results: what it returned so far.
    """

    function: types.FunctionType
    names: dict[str, Value]
    owner: type | None = None
    results: list[Value] = field(default_factory=list)


class _Reader:
    """Follows the `forward` of one module.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.code = ModuleCode()
        self._frames: list[_Frame] = []
        self._active: set[tuple[Any, str]] = set()

    def read(self) -> bool:
        """Fills in `code`. False: there is no source."""
        owner, function = _method(type(self.module), "forward")
        if function is None or _tree(function.__code__) is None:
            return False
        result = self._follow(function, Value(modules=(("", self.module),)), [], {}, owner, inputs=True)
        self.code.returned |= result.makers
        self.code.made = tuple(bool(item.makers or item.views) for item in result.items or ())
        return True

    # -- functions ----------------------------------------------------------------------------------

    def _follow(
        self,
        function: types.FunctionType,
        bound: Value | None,
        args: list[Value],
        kwargs: dict[str, Value],
        owner: type | None = None,
        inputs: bool = False,
    ) -> Value:
        """What a function returns."""
        tree = _tree(function.__code__)
        key = (function, bound.modules[0][0] if bound is not None and bound.modules else "")
        if tree is None or key in self._active or len(self._frames) >= _DEPTH:
            return union([*args, *kwargs.values()]).derived()
        given = [bound, *args] if bound is not None else args
        names = bind_arguments(tree.args, given, kwargs, INPUT if inputs else NOTHING)
        return self._run(_Frame(function, names, owner), tree.body, key)

    def _run(self, frame: _Frame, body: list[ast.stmt], key: tuple[Any, str]) -> Value:
        self._active.add(key)
        self._frames.append(frame)
        try:
            self._statements(body)
        finally:
            self._frames.pop()
            self._active.discard(key)
        if len(frame.results) == 1:
            return frame.results[0]
        return union(frame.results)

    # -- statements ---------------------------------------------------------------------------------

    def _statements(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        follow = getattr(self, f"_follow_{type(node).__name__.lower()}", None)
        if follow is not None:  # others name no values
            follow(node)

    def _follow_assign(self, node: ast.Assign) -> None:
        value = self._value(node.value)
        for target in node.targets:
            self._bind(target, value)

    def _follow_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, self._value(node.value))

    def _follow_augassign(self, node: ast.AugAssign) -> None:
        self._bind(node.target, self._binary(node.op, self._value(node.target), self._value(node.value)))

    def _follow_expr(self, node: ast.Expr) -> None:
        self._value(node.value)

    def _follow_return(self, node: ast.Return) -> None:
        if node.value is not None:
            self._frames[-1].results.append(self._value(node.value))

    def _follow_if(self, node: ast.If) -> None:
        self._value(node.test)
        self._branches(node.body, node.orelse)

    def _follow_for(self, node: ast.For) -> None:
        for _ in range(2):  # what one turn made goes into the next
            self._bind(node.target, element_of(self._value(node.iter)))
            self._branches(node.body, [])
        self._statements(node.orelse)

    def _follow_while(self, node: ast.While) -> None:
        for _ in range(2):
            self._value(node.test)
            self._branches(node.body, [])
        self._statements(node.orelse)

    def _follow_with(self, node: ast.With) -> None:
        for item in node.items:
            value = self._value(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, value)
        self._statements(node.body)

    def _follow_try(self, node: ast.Try) -> None:
        self._branches(node.body, [])
        for handler in node.handlers:
            self._branches(handler.body, [])
        self._statements([*node.orelse, *node.finalbody])

    def _follow_functiondef(self, node: ast.FunctionDef) -> None:
        self._frames[-1].names[node.name] = Value(code=node)

    def _branches(self, *bodies: list[ast.stmt]) -> None:
        """Follows each of the bodies from here; afterwards names stand for what any of them gave them."""
        frame = self._frames[-1]
        before, after = frame.names, []
        for body in bodies:
            frame.names = dict(before)
            self._statements(body)
            after.append(frame.names)
        frame.names = {
            name: union([names[name] for names in after if name in names]) for name in {k for n in after for k in n}
        }

    def _bind(self, target: ast.expr, value: Value) -> None:
        names = self._frames[-1].names
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            starred = any(isinstance(element, ast.Starred) for element in target.elts)
            if value.items is not None and len(value.items) == len(target.elts) and not starred:
                for element, item in zip(target.elts, value.items):
                    self._bind(element, item)
            else:
                for element in target.elts:
                    self._bind(element, element_of(value))
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value)
        elif isinstance(target, (ast.Subscript, ast.Attribute)):
            self._add_to(target.value, value)

    def _add_to(self, node: ast.expr, value: Value) -> None:
        """What is written into a thing is in it from then on."""
        while isinstance(node, (ast.Subscript, ast.Attribute)):
            node = node.value
        names = self._frames[-1].names
        if isinstance(node, ast.Name) and node.id in names and not names[node.id].modules:
            names[node.id] = union([names[node.id], value.derived()])

    # -- expressions --------------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> Value:
        value_of = getattr(self, f"_value_of_{type(node).__name__.lower()}", None)
        return NOTHING if value_of is None else value_of(node)

    def _value_of_name(self, node: ast.Name) -> Value:
        return self._name(node.id)

    def _value_of_constant(self, node: ast.Constant) -> Value:
        return Value(known=node.value)

    def _value_of_attribute(self, node: ast.Attribute) -> Value:
        return self._attribute(self._value(node.value), node.attr)

    def _value_of_subscript(self, node: ast.Subscript) -> Value:
        return self._subscript(node)

    def _value_of_call(self, node: ast.Call) -> Value:
        return self._call(node)

    def _value_of_binop(self, node: ast.BinOp) -> Value:
        return self._binary(node.op, self._value(node.left), self._value(node.right))

    def _value_of_unaryop(self, node: ast.UnaryOp) -> Value:
        value = self._value(node.operand)
        if not isinstance(node.op, ast.USub):
            return value.derived()
        return Value(known=-value.known) if isinstance(value.known, (int, float)) else value

    def _value_of_tuple(self, node: ast.Tuple | ast.List) -> Value:
        items = tuple(self._value(element) for element in node.elts)
        return replace(union(items), items=items, known=UNKNOWN)

    _value_of_list = _value_of_tuple

    def _value_of_listcomp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        self._comprehension(node.generators)
        return self._value(node.elt)

    _value_of_setcomp = _value_of_generatorexp = _value_of_listcomp

    def _value_of_dictcomp(self, node: ast.DictComp) -> Value:
        self._comprehension(node.generators)
        return self._value(node.value)

    def _value_of_dict(self, node: ast.Dict) -> Value:
        return replace(union(self._value(value) for value in node.values), known=UNKNOWN)

    def _value_of_ifexp(self, node: ast.IfExp) -> Value:
        self._value(node.test)
        return union([self._value(node.body), self._value(node.orelse)])

    def _value_of_boolop(self, node: ast.BoolOp) -> Value:
        return union([self._value(value) for value in node.values])

    def _value_of_lambda(self, node: ast.Lambda) -> Value:
        return Value(code=node)

    def _value_of_namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self._value(node.value)
        self._bind(node.target, value)
        return value

    def _value_of_starred(self, node: ast.Starred) -> Value:
        return self._value(node.value)

    def _value_of_compare(self, node: ast.Compare) -> Value:
        return union([self._value(node.left), *(self._value(other) for other in node.comparators)]).derived()

    def _comprehension(self, generators: list[ast.comprehension]) -> None:
        for generator in generators:
            self._bind(generator.target, element_of(self._value(generator.iter)))

    def _name(self, name: str) -> Value:
        frame = self._frames[-1]
        if name in frame.names:
            return frame.names[name]
        function = frame.function
        if function.__closure__ and name in function.__code__.co_freevars:
            cell = function.__closure__[function.__code__.co_freevars.index(name)]
            try:
                return self._object(cell.cell_contents)
            except ValueError:
                return NOTHING
        if name in function.__globals__:
            return self._object(function.__globals__[name])
        return self._object(getattr(builtins, name)) if hasattr(builtins, name) else NOTHING

    def _object(self, value: Any) -> Value:
        return NOTHING if isinstance(value, (Tensor, nn.Module)) else Value(known=value)

    def _attribute(self, base: Value, name: str) -> Value:
        if base.modules:
            return union([self._of_module(path, module, name) for path, module in base.modules])
        if base.known is not UNKNOWN:
            return self._object(_static(base.known, name))
        if name in ("T", "mT", "H", "mH"):
            return reordered(base, last_swapped)
        if name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad"):
            return NOTHING
        return replace(base, known=UNKNOWN, items=None)

    def _of_module(self, path: str, module: nn.Module, name: str) -> Value:
        prefix = f"{path}." if path else ""
        child = module._modules.get(name)
        if child is not None:
            return Value(modules=((prefix + name, child),))
        param = module._parameters.get(name)
        if param is not None:
            return Value(views=frozenset([view_of(prefix + name, param)]))
        if name in module.__dict__:
            value = module.__dict__[name]
            if isinstance(value, nn.Module):
                return next(
                    (
                        Value(modules=((inner, child),))
                        for inner, child in self.module.named_modules()
                        if child is value
                    ),
                    NOTHING,
                )
            if isinstance(value, (list, tuple)) and all(isinstance(item, nn.Module) for item in value):
                return NOTHING
            return self._object(value)
        static = inspect.getattr_static(type(module), name, None)
        if isinstance(static, property):
            function = _plain(static.fget)
            if function is None:
                return NOTHING
            return self._follow(function, Value(modules=((path, module),)), [], {}, type(module))
        return self._object(static) if static is not None and not callable(static) else NOTHING

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self._value(node.value)
        index = self._value(node.slice) if not isinstance(node.slice, ast.Slice) else NOTHING
        if base.modules:
            return element_of(base) if not isinstance(node.slice, ast.Slice) else base
        if (
            base.items is not None
            and isinstance(index.known, int)
            and -len(base.items) <= index.known < len(base.items)
        ):
            return base.items[index.known]
        if isinstance(base.known, (dict, list, tuple)):
            try:
                return self._object(base.known[index.known])
            except (KeyError, IndexError, TypeError):
                return NOTHING
        if not base.views:
            return replace(base.derived(), is_input=base.is_input or index.is_input)
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        views = set()
        for view in base.views:
            dims, looked_up = indexed(view, indices, index.is_input or index.known is UNKNOWN)
            views.add(replace(view, dims=dims))
            if looked_up:
                self._use(view, Use.LOOKUP)
        return Value(views=frozenset(views), makers=base.makers, is_input=base.is_input)

    # -- operations ---------------------------------------------------------------------------------

    def _use(self, view: View, use: Use) -> None:
        self.code.uses.setdefault(view.path, set()).add(use)

    def _use_all(self, value: Value, use: Use) -> None:
        for view in value.views:
            self._use(view, use)

    def _feed(self, makers: Iterable[str], into: str) -> None:
        for maker in makers:
            (self.code.feeding_themselves if maker == into else self.code.feeding).add(maker)

    def _binary(self, op: ast.operator, left: Value, right: Value) -> Value:
        if isinstance(op, ast.MatMult):
            return self._product(left, right)
        if isinstance(op, (ast.Mult, ast.Div)):
            return self._scaled(left, right)
        return self._shifted(left, right)

    def _scaled(self, left: Value, right: Value) -> Value:
        """A product by elements. Of a parameter and a number, or another parameter, it is still that parameter: zeros
        stay where they are.
        """
        if left.is_input or right.is_input:
            self._use_all(left, Use.ELEMENTWISE)
            self._use_all(right, Use.ELEMENTWISE)
            return union([left, right]).derived()
        if isinstance(left.known, (int, float)) and isinstance(right.known, (int, float)):
            return NOTHING
        return replace(union([left, right]), known=UNKNOWN, items=None)

    def _shifted(self, left: Value, right: Value) -> Value:
        """A sum by elements: zeros of a parameter do not stay."""
        use = Use.ELEMENTWISE if left.is_input or right.is_input else Use.COMPUTED
        self._use_all(left, use)
        self._use_all(right, use)
        return union([left, right]).derived()

    def _product(self, left: Value, right: Value, right_inputs: int = -2) -> Value:
        """A matrix product. right_inputs: the dimension of the right operand that is summed over."""
        both = not (left.is_input or right.is_input) and bool(left.views) and bool(right.views)
        labels: set[str] = set()
        for value, inputs in ((left, -1), (right, right_inputs)):
            for view in value.views:
                self._use(view, Use.COMPUTED if both else Use.PRODUCT)
                self._note(view, inputs)
                labels.add(view.path)
        makers = left.makers | right.makers
        if not labels:  # of two activations
            return Value(makers=makers, is_input=left.is_input or right.is_input, is_compared=True)
        for label in labels:
            self._feed(makers, label)
        return Value(makers=frozenset(labels), is_input=True)

    def _note(self, view: View, inputs: int) -> None:
        """Notes which dimensions of a parameter a product sums over."""
        dims = view.dims
        if dims is None or len(dims) < 2 or any(dim < 0 for dim in dims):
            return
        at = len(dims) + inputs
        outputs = next(dim for i, dim in reversed([*enumerate(dims)]) if i != at and i >= len(dims) - 2)
        rest = [dim for dim in range(view.ndim) if dim not in (dims[at], outputs)]
        product = Product(dims[at], outputs, rest[0] if len(rest) == 1 else None)
        if len(rest) <= 1:
            self._note_product(view.path, product)

    def _note_product(self, path: str, product: Product) -> None:
        if self.code.products.setdefault(path, product) != product:
            self.code.unclear.add(path)

    def _call_module(self, modules: tuple[tuple[str, nn.Module], ...], args: list[Value]) -> Value:
        """The output of submodules. Those without matrices (activations, norms) hand on what they get."""
        given = union(args)
        holding = [path for path, module in modules if any(map(has_matrices, module.modules()))]
        if not holding:
            for value in args:
                self._use_all(value, Use.TOKEN)
            return given.derived()
        for value in args:
            self._use_all(value, Use.TOKEN)
        labels = [self._label(path) for path in holding]
        for label in labels:
            self._feed(given.makers, label)
        result = Value(makers=frozenset(labels), is_input=True)
        code = code_of(modules[0][1]) if len(modules) == 1 else None
        if code is not None and any(code.made):
            # What it hands on as it was is none of its outputs.
            return replace(result, items=tuple(result if made else given.derived() for made in code.made))
        return result

    def _label(self, path: str) -> str:
        """The list that a module is in, for one of its elements: they stand for each other."""
        parent, _, number = path.rpartition(".")
        return parent if number.isdigit() and parent else path

    # -- calls --------------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> Value:
        args = [self._value(arg) for arg in node.args]
        kwargs = {keyword.arg or "**": self._value(keyword.value) for keyword in node.keywords}
        everything = [*args, *kwargs.values()]
        if isinstance(node.func, ast.Name) and node.func.id == "super" and "super" not in self._frames[-1].names:
            return self._super()
        if isinstance(node.func, ast.Attribute):
            base = self._value(node.func.value)
            name = node.func.attr
            if base.modules:
                return union(
                    [self._call_of_module(base, path, module, name, args, kwargs) for path, module in base.modules]
                )
            if isinstance(base.known, types.ModuleType) and base.known.__name__.split(".")[0] == "torch":
                # By this name, whatever an engine has put in its place: DeepSpeed replaces F.linear under ZeRO-3.
                return self._operation(name, args, kwargs)
            if base.known is not UNKNOWN and not isinstance(base.known, (int, float, str, bool, type(None))):
                return self._function(_static(base.known, name), args, kwargs, name)
            if name in _ADDS_TO_ITSELF or (name.endswith("_") and not name.endswith("__")):
                self._add_to(node.func.value, union(everything))
            return self._operation(name, [base, *args], kwargs)
        func = self._value(node.func)
        if func.modules:
            return self._call_module(func.modules, everything)
        if func.code is not None:
            return self._closure(func.code, args, kwargs)
        if func.known is getattr and len(args) >= 2 and isinstance(args[1].known, str):
            return self._attribute(args[0], args[1].known)
        if any(func.known is same for same in (list, tuple, iter, reversed, sorted, next)):
            return args[0] if args else NOTHING
        if func.known is enumerate:
            return Value(items=None, **enumerated(args[0])) if args else NOTHING
        if func.known is zip:
            return replace(union(element_of(arg) for arg in args), items=tuple(element_of(arg) for arg in args))
        if func.known is UNKNOWN:
            return union(everything).derived()
        return self._function(func.known, args, kwargs, getattr(func.known, "__name__", ""))

    def _super(self) -> Value:
        frame = next((frame for frame in reversed(self._frames) if frame.owner is not None), None)
        if frame is None:
            return NOTHING
        bound = next(iter(frame.names.values()), NOTHING)
        return replace(bound, above=frame.owner)

    def _call_of_module(
        self, base: Value, path: str, module: nn.Module, name: str, args: list[Value], kwargs: dict[str, Value]
    ) -> Value:
        """A call of `module.name(...)`."""
        everything = [*args, *kwargs.values()]
        child = module._modules.get(name)
        if child is not None:
            return self._call_module(((f"{path}.{name}" if path else name, child),), everything)
        if path and name in ("forward", "__call__") and base.above is None:
            return self._call_module(((path, module),), everything)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and name in (
            "values",
            "items",
            "children",
        ):
            return replace(element_of(Value(modules=((path, module),))))
        attribute = module.__dict__.get(name)
        if attribute is not None:
            return self._function(attribute, args, kwargs, name)
        owner, function = _method(type(module), name, base.above)
        if function is None or inspect.getattr_static(type(module), name, None).__class__ is staticmethod:
            return self._function(function, args, kwargs, name) if function else union(everything).derived()
        return self._follow(function, Value(modules=((path, module),)), args, kwargs, owner)

    def _closure(self, code: ast.FunctionDef | ast.Lambda, args: list[Value], kwargs: dict[str, Value]) -> Value:
        key = (code, "")
        if key in self._active or len(self._frames) >= _DEPTH:
            return union([*args, *kwargs.values()]).derived()
        outer = self._frames[-1]
        names = {**outer.names, **bind_arguments(code.args, args, kwargs, NOTHING)}
        body = code.body if isinstance(code.body, list) else [ast.Return(value=code.body)]
        return self._run(_Frame(outer.function, names, outer.owner), body, key)

    def _function(self, target: Any, args: list[Value], kwargs: dict[str, Value], name: str) -> Value:
        """A call of a function that is there already."""
        everything = [*args, *kwargs.values()]
        home = getattr(target, "__module__", None) or ""
        if home.split(".")[0] == "torch" or isinstance(target, types.BuiltinFunctionType):
            return self._operation(getattr(target, "__name__", name), args, kwargs)
        function = _plain(target)
        if function is not None and not isinstance(target, type):
            return self._follow(function, None, args, kwargs)
        return union(everything).derived()

    def _operation(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """A function of torch, or a method of a tensor, whose first argument is the tensor."""
        operands = [*args, *kwargs.values()]
        if (multiply := _MULTIPLYING.get(name)) is not None:
            return multiply(self, name, args, kwargs)
        if (view := _VIEWING.get(name)) is not None and operands:
            return replace(view(operands), items=None, known=UNKNOWN)
        joined = union(operands)
        if name in _COMPARISONS and not joined.views:
            return replace(joined.derived(), is_compared=True)
        if name in _RANKINGS and not joined.is_compared:  # as scores of attention are
            self.code.choosing |= joined.makers
        elif name in _SCALED and len(operands) > 1:
            return self._scaled(operands[0], operands[1])
        elif name in _LOOKUPS:
            self._use_all(joined, Use.LOOKUP)
        elif name in _LINED_UP and not joined.is_input and joined.views:
            # Several matrices one after the other are still what they were.
            return replace(joined, items=None, known=UNKNOWN)
        elif name in _JOINED:
            self._use_all(joined, Use.TOKEN if joined.is_input else Use.COMPUTED)
        elif name in _SHIFTED:
            self._use_all(joined, Use.ELEMENTWISE if joined.is_input else Use.COMPUTED)
        elif name in _TRANSFORMED:
            self._use_all(joined, Use.ELEMENTWISE)
        return joined.derived()

    def _linear(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        given = bind_arguments(_LINEAR, args, kwargs, NOTHING)
        self._use_all(given["bias"], Use.ELEMENTWISE)
        return self._product(given["input"], given["weight"], right_inputs=-1)

    def _matmul(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        operands = [*args, *kwargs.values()]
        if name in _PRODUCTS_ADDED and len(operands) > 2:
            self._use_all(operands.pop(0), Use.ELEMENTWISE)
        return self._product(operands[0], operands[1]) if len(operands) > 1 else union(operands).derived()

    def _convolution(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        given = bind_arguments(
            _LINEAR, args[:3], {key: kwargs[key] for key in kwargs.keys() & {"weight", "input"}}, NOTHING
        )
        is_transposed = "transpose" in name
        for view in given["weight"].views:
            self._use(view, Use.PRODUCT)
            self._note_product(view.path, Product(int(not is_transposed), int(is_transposed)))
            self._feed(given["input"].makers, view.path)
        labels = frozenset(view.path for view in given["weight"].views)
        return Value(makers=labels or given["input"].makers, is_input=True)

    def _attention(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        joined = union([*args, *kwargs.values()])
        for view in joined.views:
            self._use(view, Use.PRODUCT if view.ndim == 2 else Use.ELEMENTWISE)
        return joined.derived()

    def _einsum(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if len(args) < 2:
            return union(args).derived()
        operands = list(args[1].items) if len(args) == 2 and args[1].items is not None else args[1:]
        makers = union(operands).makers
        labels = {view.path for value in operands for view in value.views}
        equation = args[0].known.replace(" ", "") if isinstance(args[0].known, str) else ""
        terms = equation.partition("->")[0].split(",")
        result = equation.partition("->")[2]
        for i, value in enumerate(operands):
            others = "".join(term for j, term in enumerate(terms) if j != i)
            for view in value.views:
                self._use(view, Use.PRODUCT)
                letters = terms[i] if len(terms) == len(operands) else ""
                if view.dims is None or len(letters) != len(view.dims) or "." in letters:
                    continue
                inputs = [view.dims[k] for k, letter in enumerate(letters) if letter not in result]
                outputs = [
                    view.dims[k] for k, letter in enumerate(letters) if letter in result and letter not in others
                ]
                experts = [view.dims[k] for k, letter in enumerate(letters) if letter in result and letter in others]
                if not experts and len(outputs) == 2:
                    experts = [outputs.pop(0)]
                if len(inputs) == len(outputs) == 1 and len(experts) <= 1:
                    self._note_product(view.path, Product(inputs[0], outputs[0], *experts))
        for label in labels:
            self._feed(makers, label)
        return Value(makers=frozenset(labels) or makers, is_input=True)


def _method(cls: type, name: str, above: type | None = None) -> tuple[type | None, types.FunctionType | None]:
    """The class that defines a method, and the method as it was written. above: look only in the bases after it."""
    order = cls.__mro__
    for base in order[order.index(above) + 1 :] if above in order else order:
        if name in base.__dict__:
            return base, _plain(base.__dict__[name])
    return None, None


_LINEAR = ast.arguments(
    posonlyargs=[], args=[ast.arg(arg=name) for name in ("input", "weight", "bias")], kwonlyargs=[], vararg=None,
    kwarg=None,
)  # fmt: skip
_MULTIPLYING: dict[str, Callable[..., Value]] = {
    "linear": _Reader._linear,
    "einsum": _Reader._einsum,
    "multi_head_attention_forward": _Reader._attention,
    **dict.fromkeys(_PRODUCTS | _PRODUCTS_ADDED, _Reader._matmul),
    **dict.fromkeys(_CONVOLUTIONS, _Reader._convolution),
}
_VIEWING: dict[str, Callable[[list[Value]], Value]] = {
    **dict.fromkeys(_SAME, lambda operands: operands[0]),
    **dict.fromkeys(_RESHAPED, lambda operands: without_dims(operands[0])),
    **dict.fromkeys(("t", "adjoint"), lambda operands: reordered(operands[0], last_swapped)),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transposed),
    "permute": permuted,
    "unbind": lambda operands: reordered(operands[0], lambda dims: dims[1:]),
}
