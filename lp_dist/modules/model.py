"""What is done with each parameter of a model: by the type of the module that has it where that is one of torch's,
else by the code of the modules around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from lp_dist.modules.code import ModuleCode, Product, Use, code_of, has_matrices
from lp_dist.sharding.shards import full_shape

# Modules of torch whose parameters of two dimensions and more are operands of products.
_MATRIX_MODULES = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class ModelCode:
    """What a model does with its parameters. All names are those of its `named_parameters`.

    Args:
        uses: {parameter: what is done with it}; empty where no code that can be read uses it.
        products: {parameter: how it enters a matrix product}, where that is known. Of several ways the first.
        unclear: the parameters that enter products in several ways.
        heads: the parameters of the modules whose outputs the model returns, behind all others.
        routers: the parameters whose products choose which experts or tokens take part.
        foreign: {parameter: class of the module that has it}, of modules that are none of torch's.
    """

    uses: dict[str, set[Use]] = field(default_factory=dict)
    products: dict[str, Product] = field(default_factory=dict)
    unclear: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    routers: set[str] = field(default_factory=set)
    foreign: dict[str, str] = field(default_factory=dict)

    def note_product(self, name: str, product: Product) -> None:
        """Takes note of how a parameter enters a product."""
        if self.products.setdefault(name, product) != product:
            self.unclear.add(name)


def read_model(model: nn.Module) -> ModelCode:
    """Reads the modules of a model. No weight is looked at and nothing is run.

    Args:
        model: before or after it is sharded, on any device (meta as well), but unwrapped.
    """
    reading = ModelCode()
    names = {id(param): name for name, param in model.named_parameters()}
    codes: dict[str, ModuleCode] = {}
    for module in reversed([*model.modules()]):
        # Inner ones first: what is read of one asks for those in it, and Python can't call as deep as all of them are.
        if _has_code(module):
            code_of(module)
    for path, module in model.named_modules():
        known = isinstance(module, (*_MATRIX_MODULES, *_TABLES))
        for name, param in module.named_parameters(recurse=False):
            reading.uses.setdefault(names[id(param)], set())
            if known and len(full_shape(param)) > 1:
                reading.uses[names[id(param)]].add(Use.PRODUCT if isinstance(module, _MATRIX_MODULES) else Use.LOOKUP)
                if (product := _product_of(module, name)) is not None:
                    reading.note_product(names[id(param)], product)
            elif not known:
                reading.foreign.setdefault(names[id(param)], type(module).__name__)
        if known or not _has_code(module):
            continue
        code = code_of(module)
        if code is None:
            continue
        codes[path] = code
        for name, param in _parameters_of(module, code.uses):
            reading.uses.setdefault(names[id(param)], set()).update(code.uses[name])
            if name in code.products:
                reading.note_product(names[id(param)], code.products[name])
            if name in code.unclear:
                reading.unclear.add(names[id(param)])
    reading.heads = {names[id(param)] for param in _head_parameters(model, codes, reading.products)}
    chosen_by = [*_chosen_by_code(model, codes), *_as_wide_as_experts(model, codes, reading)]
    reading.routers = {names[id(param)] for param in chosen_by}
    return reading


def _product_of(module: nn.Module, name: str) -> Product | None:
    """How a parameter of a module of torch enters a product."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Product(0, 1) if name == "weight" else None
    if isinstance(module, nn.Bilinear):
        return None
    if isinstance(module, _MATRIX_MODULES):
        return None if name.endswith(("bias_k", "bias_v")) else Product(1, 0)
    return None


def _has_code(module: nn.Module) -> bool:
    """Whether a module has parameters and code that is not torch's."""
    return not type(module).__module__.startswith("torch.nn.") and _has_parameters(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _parameters_of(module: nn.Module, paths: dict[str, set[Use]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters at these paths of a module."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        param = module.get_submodule(owner)._parameters.get(name)
        if param is not None:
            yield path, param


def _at(module: nn.Module, label: str) -> list[Tensor]:
    """The parameters of a submodule, or the one parameter, that a label of `ModuleCode` names."""
    owner, _, name = label.rpartition(".")
    parent = module.get_submodule(owner)
    param = parent._parameters.get(name)
    return [param] if param is not None else list(module.get_submodule(label).parameters())


# -- output heads -------------------------------------------------------------------------------------


def _is_matrix_alone(module: nn.Module) -> bool:
    """Whether a module has matrices of its own, and no modules with matrices in it."""
    return has_matrices(module) and not any(
        has_matrices(inner) for child in module.children() for inner in child.modules()
    )


def _has_blocks(module: nn.Module) -> bool:
    """Whether a stack of layers is in it: a list or sequence of modules that have modules with parameters."""
    return any(
        isinstance(stack, (nn.ModuleList, nn.Sequential))
        and any(_has_parameters(part) for layer in stack.children() for part in layer.children())
        for stack in module.modules()
    )


def _head_parameters(
    model: nn.Module,
    codes: dict[str, ModuleCode],
    products: dict[str, Product],
    path: str = "",
    is_tower: bool = False,
) -> list[Tensor]:
    """The parameters of what a model's `forward` returns the output of, behind other layers.

    A layer that is last is a head, unless it leads back to the width that the layers before it take, as in a block
    that stands alone. Behind a stack of blocks all that is last is a head, but for several layers of a tower (of
    images or text, which returns features beside others). What is last and has a stack itself is a model in the model.
    """
    module = model.get_submodule(path)
    code = codes.get(path)
    if code is None or isinstance(module, (nn.Sequential, nn.ModuleList)):
        return []
    heads: list[Tensor] = []
    last = sorted(code.returned - code.feeding - code.feeding_themselves)
    taken = {width for label in code.feeding for width in _widths(module, label, path, products)[0]}
    behind_blocks = _behind_blocks(module, code.feeding)
    for label in last:
        owner, _, name = label.rpartition(".")
        is_param = name in module.get_submodule(owner)._parameters
        part = module if is_param else module.get_submodule(label)
        if not is_param and _has_blocks(part):
            inner = f"{path}.{label}".lstrip(".")
            heads += _head_parameters(model, codes, products, inner, is_tower or len(last) > 1)
            continue
        is_layer = is_param or _is_matrix_alone(part)
        leads_back = bool(taken & _widths(module, label, path, products)[1])
        if (is_layer and bool(code.feeding) and not leads_back) or (behind_blocks and (is_layer or not is_tower)):
            heads += _at(module, label)
    holders = [name for name, child in module.named_children() if _has_parameters(child)]
    if not last and len(holders) == 1:  # a wrapper that hands all on, in a way that can't be followed
        return _head_parameters(model, codes, products, f"{path}.{holders[0]}".lstrip("."), is_tower)
    return heads


def _widths(module: nn.Module, label: str, path: str, products: dict[str, Product]) -> tuple[set[int], set[int]]:
    """How many inputs and outputs the matrices have that a label names."""
    ids = {id(param) for param in _at(module, label)}
    inputs, outputs = set(), set()
    for name, param in module.named_parameters():
        product = products.get(f"{path}.{name}".lstrip("."))
        if id(param) in ids and product is not None:
            inputs.add(full_shape(param)[product.inputs])
            outputs.add(full_shape(param)[product.outputs])
    return inputs, outputs


def _behind_blocks(module: nn.Module, labels: set[str]) -> bool:
    children = dict(module.named_modules())
    return any(label in children and _has_blocks(children[label]) for label in labels)


# -- routers ------------------------------------------------------------------------------------------


def _chosen_by_code(model: nn.Module, codes: dict[str, ModuleCode]) -> Iterator[Tensor]:
    """The parameters whose outputs are ranked, as scores of experts or tokens are."""
    for path, code in codes.items():
        module = model.get_submodule(path)
        for label in code.choosing:
            if label in dict(module.named_modules()) and _has_blocks(module.get_submodule(label)):
                continue  # a model whose outputs are ranked
            yield from _at(module, label)


def _as_wide_as_experts(model: nn.Module, codes: dict[str, ModuleCode], reading: ModelCode) -> Iterator[Tensor]:
    """The matrices beside experts that have an output for each of them, or a single one, for a shared expert."""
    by_block: dict[str, set[int]] = {}
    experts: set[str] = set()
    shapes = {name: full_shape(param) for name, param in model.named_parameters()}
    for name, product in reading.products.items():
        if product.experts is not None:
            owner = name.rpartition(".")[0]
            experts.add(owner)
            for block in (owner, owner.rpartition(".")[0]):  # the router lies beside them, or beside their module
                by_block.setdefault(block, set()).add(shapes[name][product.experts])
    for path, code in codes.items():
        module = model.get_submodule(path)
        for label, child in module.named_modules():
            # A list of equal modules that act beside each other, and not one after another.
            if (
                isinstance(child, nn.ModuleList)
                and len({type(each) for each in child}) == 1 < len(child)
                and label in code.feeding | code.returned
                and label not in code.feeding_themselves
            ):
                full = f"{path}.{label}".lstrip(".")
                experts.add(full)
                by_block.setdefault(path, set()).add(len(child))
    for block, counts in by_block.items():
        module = model.get_submodule(block)
        beside = [*module.named_parameters(recurse=False)]
        for label, child in module.named_children():
            if f"{block}.{label}".lstrip(".") not in experts and _is_matrix_alone(child):
                beside += child.named_parameters(prefix=label)
        for name, param in beside:
            full, shape = f"{block}.{name}".lstrip("."), full_shape(param)
            product = reading.products.get(full)
            if product is not None and len(shape) == 2 and shape[product.outputs] in counts | {1}:
                yield param
