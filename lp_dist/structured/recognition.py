"""Feed-forward channels and attention heads, recognised from a model's modules.

They are recognised by which layers are linear, how wide these are, and which modules hold them. Names decide only
where shapes can't, as which of four square layers is the last one of an attention. Nothing is guessed.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape
from lp_dist.structured.groups import Layer, WeightGroups, layers_within, linear_layers, weight_groups
from lp_dist.structured.mixtures import mixtures
from lp_dist.structured.probing import HeadLayout, LayoutError, head_layout, structure_of

logger = logging.getLogger(__name__)


def channels(model: nn.Module) -> list[WeightGroups]:
    """The feed-forward channels of every layer of a model.

    A channel is output i of the first linear layers, with its bias, and input i of the last one. There is one first
    layer, or two of a gated feed-forward, or both in one.

    Raises:
        UsageError: none is recognised; the message says what was looked for.
    """
    layers, widths = linear_layers(model), hidden_widths(model)
    of_experts = mixtures(model)
    reasons = {mixture.name: "channels of experts are a kind of their own, expert_channels" for mixture in of_experts}
    attentions, shapes = _attentions(model), _shapes(model)
    attention = {layer.name for module in attentions for layer in layers_within(layers, module)}
    sets: list[WeightGroups] = []
    taken = attention | {layer.name for mixture in of_experts for layer in layers_within(layers, mixture.name)}
    for module in _stacked(model):
        candidates = [layer for layer in layers_within(layers, module) if layer.name not in taken]
        match = feed_forward(candidates, widths) or _square(
            type(model.get_submodule(module)).__name__, candidates, widths
        )
        if match is None:
            continue
        ups, down = match
        tied = _as_wide(shapes, attentions, module, {down.inputs, ups[0].outputs}, {layer.name for layer in layers})
        taken |= {layer.name for layer in (*ups, down)}
        if getattr(model.get_submodule(module), "activation_sparsity", 0):
            # Gemma 3n: a threshold from mean and spread of all channels.
            reasons[module] = "its activation_sparsity ties the channels together"
            continue
        if tied:
            reasons[module] = f"{tied} is as wide as the channels, and ties them together"
            continue
        members = [
            member
            for up in ups
            for start in range(0, up.outputs, down.inputs)
            for member in up.output_members(1, start, start + down.inputs)
        ]
        sets.append(weight_groups(model, module, "channels", down.inputs, [*members, *down.input_members()]))
    criteria = (
        "two or three linear layers in one module of a layer stack, outside of attention, from the model's width H to"
        " I (one, two, or one to 2·I) and back from I to H, with nothing else between them that is as wide as I"
    )
    return in_model_order(model, sets, "feed-forward channels", criteria, reasons)


def heads(model: nn.Module) -> list[WeightGroups]:
    """The attention heads of every layer of a model.

    A head is its outputs of the queries and its inputs of the last layer, and its outputs of keys and values where
    each head has its own. With grouped queries (fewer keys than queries) keys and values are in no group, since other
    heads read them; `kv_groups` has them.

    Raises:
        UsageError: none is recognised; the message says what was looked for.
    """
    return _heads(model, "heads")


def kv_groups(model: nn.Module) -> list[WeightGroups]:
    """The heads of keys and values of every layer, with all query heads that read them and the inputs of these of the
    last layer.

    They are those of `heads` where each query head has its own keys and values.

    Raises:
        UsageError: none is recognised; the message says what was looked for.
    """
    return _heads(model, "kv_groups")


# -- modules that may hold groups ------------------------------------------------------------


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all parameters before sharding, by name. Taken once for all layers, since there are as many as layers."""
    return {name: full_shape(param) for name, param in model.named_parameters()}


def _stacked(model: nn.Module) -> list[str]:
    """Modules inside of a stack of layers (their name has a number), the innermost first."""
    names = [
        name
        for name, module in model.named_modules()
        if any(step.isdigit() for step in name.split("."))
        and next(module.children(), None) is not None
        and not isinstance(module, nn.ModuleList)
    ]
    return sorted(names, key=lambda name: -name.count("."))


def _attentions(model: nn.Module) -> list[str]:
    """Modules whose class is called attention, the innermost first; without decoder layers that are called so
    (JambaAttentionDecoderLayer).
    """
    kinds = {name: type(module).__name__.lower() for name, module in model.named_modules()}
    named = [name for name in _stacked(model) if "attention" in kinds[name] or "attn" in kinds[name]]
    return [
        name
        for name in named
        if not (kinds[name].endswith(("layer", "block")) and any(other.startswith(name + ".") for other in named))
    ]


def hidden_widths(model: nn.Module) -> set[int]:
    """The hidden size of the model; several where it has several towers. Empty where neither a config nor an embedding
    has one.
    """
    config = getattr(model, "config", None)
    configs = (
        [config, *(inner for inner in vars(config).values() if hasattr(inner, "to_dict"))]
        if config is not None
        else []
    )
    sizes = (getattr(inner, key, None) for inner in configs for key in ("hidden_size", "d_model"))
    widths = {size for size in sizes if size is not None}
    return widths or {module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding)}


def _as_wide(
    shapes: dict[str, torch.Size], attentions: list[str], module: str, widths: set[int], linear: set[str]
) -> str | None:
    """A parameter in `module`, outside of attention and linear layers, that has a dimension of one of these widths;
    None if there is none.

    Args:
        shapes: of all parameters of the model.
        attentions: all of its attention modules.
        module: its name.
        widths: of the channels.
        linear: names of the linear layers.
    """
    inner = [name for name in attentions if name.startswith(module + ".")]
    for name, shape in shapes.items():
        owner = name.rsplit(".", 1)[0]
        if (
            name.startswith(module + ".")
            and owner not in linear
            and not any(name.startswith(attention + ".") for attention in inner)
        ) and widths & set(shape):
            return name
    return None


# -- feed-forward -------------------------------------------------------------

_LAST_FORWARD = re.compile(r"\.(down[a-z_]*|c_proj|fc2|w2|wo|lin2|dense_4h_to_h)$")


def feed_forward(candidates: list[Layer], widths: set[int]) -> tuple[list[Layer], Layer] | None:
    """The first layers and the last one, if these layers are those of one feed-forward network."""
    matches = []
    for down in candidates:
        wide = [up for up in candidates if up.position < down.position and up.inputs == down.outputs != down.inputs]
        ups = [up for up in wide if up.outputs == down.inputs] or [up for up in wide if up.outputs == 2 * down.inputs]
        fused = bool(ups) and ups[0].outputs == 2 * down.inputs
        if ups and len(ups) <= (1 if fused else 2) and (not widths or down.outputs in widths):
            matches.append((ups, down))
    return matches[0] if len(matches) == 1 else None


def _square(kind: str, candidates: list[Layer], widths: set[int]) -> tuple[list[Layer], Layer] | None:
    """As `feed_forward`, where there are as many channels as the model is wide (as removal can leave it). Names must
    then tell which layer is the last one.
    """
    if len(candidates) not in (2, 3):
        return None
    *ups, down = candidates
    if not re.search("mlp|ffn|feedforward", kind.lower()) or not _LAST_FORWARD.search(down.name):
        return None
    return (
        (ups, down)
        if {width for layer in candidates for width in (layer.inputs, layer.outputs)} == {down.inputs}
        and (not widths or down.inputs in widths)
        else None
    )


# -- attention ----------------------------------------------------------------

# What modules call the size of a head.
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
# How one layer that makes queries, keys and values at once lays out its outputs. Shapes can't tell.
_ONE_AFTER_ANOTHER = ("GPT2Attention", "Phi3Attention")
_HEAD_BY_HEAD = ("GPTNeoXAttention", "BloomAttention")
_BORROWS = "has queries alone, and reads another layer's keys and values"
_LAST = re.compile(r"(^|\.)(o|wo|out|dense|c_proj|[a-z_]*(o_proj|out)[a-z_]*)$")


@dataclass(frozen=True)
class _Attention:
    """The linear layers of an attention.

    Args:
        size: of a head.
        heads: number of query heads.
        shared: number of heads of keys and values.
        queries: the layers of the queries, each with the first of its outputs.
        others: the layers of keys and values, each with the first of its outputs.
        last: the layer that reads the heads.
        by_head: whether one layer has queries, keys and values head by head.
    """

    size: int
    heads: int
    shared: int
    queries: list[tuple[Layer, int]]
    others: list[tuple[Layer, int]]
    last: Layer
    by_head: bool = False


def _heads(model: nn.Module, kind: str) -> list[WeightGroups]:
    layers = linear_layers(model)
    sets: list[WeightGroups] = []
    reasons: dict[str, str] = {}
    taken: set[str] = set()
    layouts: dict[Any, HeadLayout | LayoutError | None] = {}  # one for all layers of one structure
    lent: list[str] = []  # modules whose keys and values are in a group
    shapes = _shapes(model)
    for module in _attentions(model):
        candidates = [layer for layer in layers_within(layers, module) if layer.name not in taken]
        if len(candidates) < 2 or any(layer.name in taken for layer in layers_within(layers, module)):
            continue
        attention = _attention(model, shapes, module, candidates)
        if isinstance(attention, str) and attention != _BORROWS:
            attention = _as_run(model, module, kind, attention, layouts)
        if isinstance(attention, str):
            reasons[module] = attention
            continue
        if isinstance(attention, WeightGroups):
            taken |= {layer.name for layer in layers_within(layers, module)}
            sets.append(attention)
            continue
        taken |= {layer.name for layer in candidates}
        with_keys = kind == "kv_groups" or attention.shared == attention.heads
        lent += [module] * with_keys
        count = attention.shared if with_keys else attention.heads
        # Of a group's queries, and of its inputs of the last layer.
        width = attention.size * (attention.heads // count)
        members = []
        if attention.by_head:
            members += attention.queries[0][0].output_members(3 * attention.size)
        else:
            for layer, start in attention.queries:
                members += layer.output_members(width, start, start + attention.heads * attention.size)
            for layer, start in attention.others if with_keys else []:
                members += layer.output_members(attention.size, start, start + attention.shared * attention.size)
        sets.append(weight_groups(model, module, kind, count, [*members, *attention.last.input_members(width)]))
    borrows = next((module for module, reason in reasons.items() if reason == _BORROWS), None)
    if borrows is not None:
        # Gemma 3n's last layers. Shapes do not tell whose keys they read.
        sets = [groups for groups in sets if groups.name not in lent]
        reasons |= dict.fromkeys(lent, f"{borrows} {_BORROWS}, which may be its")
    criteria = (
        "modules whose class is called attention, with a head size (head_dim and the like), linear layers of queries,"
        " keys, values and a last one, or one for the first three in the layout of"
        f" {', '.join((*_ONE_AFTER_ANOTHER, *_HEAD_BY_HEAD))}, and nothing else that is as wide as the heads"
    )
    return in_model_order(model, sets, "attention heads", criteria, reasons)


def _as_run(
    model: nn.Module, module: str, kind: str, reason: str, layouts: dict[Any, HeadLayout | LayoutError | None]
) -> WeightGroups | str:
    """The groups of an attention whose layers do not tell what its heads are, by what its code does; or why not.

    Args:
        model: the model.
        module: name of the attention.
        kind: of groups.
        reason: why its layers do not tell.
        layouts: of attentions that were run before, by their structure; this one is added.
    """
    inside = model.get_submodule(module)
    size = _head_size(inside, ("v_head_dim", *HEAD_SIZES))
    if size is None:
        return reason
    key = (size, structure_of(inside))
    if key not in layouts:
        try:
            layouts[key] = head_layout(inside, size)
        except LayoutError as error:
            layouts[key] = error
    layout = layouts[key]
    if isinstance(layout, LayoutError):
        return f"{reason}; by what its code does, {layout}"
    if layout is None:
        return reason
    with_keys = kind == "kv_groups" or layout.shared == layout.heads
    members = layout.shared_members if with_keys else layout.members
    if members is None:
        return f"{reason}; single heads do not lie in a row beside keys and values of several of them, take kv_groups"
    count = layout.shared if with_keys else layout.heads
    last = next(layer for layer in linear_layers(model) if layer.name == f"{module}.{layout.last}")
    complete = [replace(member, name=f"{module}.{member.name}") for member in members]
    return weight_groups(model, module, kind, count, [*complete, *last.input_members(last.inputs // count)])


def _head_size(module: nn.Module, keys: tuple[str, ...]) -> int | None:
    """The size of a head by the first of these attributes that a module has."""
    return next(
        (
            value
            for submodule in module.modules()
            for key in keys
            if isinstance(value := getattr(submodule, key, None), int)
        ),
        None,
    )


def _attention(
    model: nn.Module, shapes: dict[str, torch.Size], module: str, candidates: list[Layer]
) -> _Attention | str:
    """The layers of an attention module, or why they are not recognised. `shapes` are those of all parameters."""
    inside = model.get_submodule(module)
    size = _head_size(inside, HEAD_SIZES)
    if size is None:
        return f"its modules have none of {', '.join(HEAD_SIZES)}"
    if len(candidates) == 2:
        if candidates[0].outputs == candidates[1].inputs and candidates[0].inputs == candidates[1].outputs:
            return _BORROWS
        last, first = sorted(candidates, key=lambda layer: layer.outputs)
        heads, rest = divmod(last.inputs, size)
        shared = (first.outputs // size - heads) // 2
        if (
            rest
            or first.inputs != last.outputs
            or heads < 1
            or shared < 1
            or (heads + 2 * shared) * size != first.outputs
            or heads % shared
        ):
            return f"two linear layers ({first.name}, {last.name}) whose widths fit no heads of {size}"
        kind = type(inside).__name__.removeprefix("FSDP")
        if kind in _HEAD_BY_HEAD and shared == heads:
            attention = _Attention(size, heads, shared, [(first, 0)], [], last, by_head=True)
        elif kind in _ONE_AFTER_ANOTHER:
            starts = [0, heads * size, (heads + shared) * size]
            attention = _Attention(
                size, heads, shared, [(first, starts[0])], [(first, start) for start in starts[1:]], last
            )
        else:
            return f"{first.name} makes queries, keys and values at once, in a layout that is not known of {kind}"
    elif len(candidates) == 4:
        *firsts, last = sorted(candidates, key=lambda layer: layer.position)
        if not _LAST.search(last.name):
            return (
                f"the last of its four linear layers is called {last.name.rsplit('.', 1)[-1]}, as no last layer of an"
                " attention is"
            )
        heads, rest = divmod(last.inputs, size)
        queries = [layer for layer in firsts if layer.outputs == last.inputs]
        others = [layer for layer in firsts if layer.outputs != last.inputs]
        shared = others[0].outputs // size if others else heads
        alike = (
            all(layer.outputs == shared * size for layer in others) and len({layer.inputs for layer in firsts}) <= 2
        )
        if rest or not alike or len(queries) not in (1, 3) or shared < 1 or heads % shared:
            return f"four linear layers whose widths fit no heads of {size}"
        if not others:
            queries, others = queries[:1], queries[1:]
        attention = _Attention(
            size, heads, shared, [(layer, 0) for layer in queries], [(layer, 0) for layer in others], last
        )
    else:
        return f"{len(candidates)} linear layers ({', '.join(layer.name.rsplit('.', 1)[-1] for layer in candidates)})"
    return _not_of_heads(model, shapes, module, attention, {layer.name for layer in candidates}) or attention


def _not_of_heads(
    model: nn.Module, shapes: dict[str, torch.Size], module: str, attention: _Attention, linear: set[str]
) -> str | None:
    """Why a parameter of the module outside of its linear layers is not the same for all heads; None if all are.

    Parameters beside the last layer, where it is in a module of its own (BERT's norm), come after the heads.
    """
    widths = {
        attention.heads * attention.size,
        attention.shared * attention.size,
        attention.heads,
        attention.shared,
    } - {attention.size, 1}
    after = attention.last.name.rsplit(".", 1)[0]
    for name, shape in shapes.items():
        owner = name.rsplit(".", 1)[0]
        if (
            name.startswith(module + ".")
            and owner not in linear
            and not (after != module and name.startswith(after + "."))
        ):
            if widths & set(shape):
                return f"{name} is as wide as the heads, and ties them together"
            if "norm" not in type(model.get_submodule(owner)).__name__.lower() and shape.numel() > 1:
                # gpt-oss's sinks, where there are as many heads as each is wide; DiffLlama's lambdas, by which one
                # head is subtracted from another.
                return f"it is not known what {name} does to the heads"
    for name, submodule in model.get_submodule(module).named_modules():
        # StableLM's norms, one for each head.
        if isinstance(submodule, nn.ModuleList) and next(submodule.parameters(), None) is not None:
            return f"{module}.{name} is a list, and it is not known which head uses which element"
    return None


# -- results ------------------------------------------------------------------


def in_model_order(
    model: Any, sets: list[WeightGroups], what: str, criteria: str, reasons: dict[str, str]
) -> list[WeightGroups]:
    """Sorts the groups in the order of the model.

    Args:
        model: that they belong to.
        sets: the groups.
        what: the name of the kind in messages.
        criteria: what was looked for.
        reasons: {module: why it looked like a module of this kind and is none}.
    Raises:
        UsageError: there are no groups.
    """
    complete = [groups.name for groups in sets]
    # A module inside of a recognised one, or around one with a reason of its own, adds nothing.
    failures = [
        f"{name}: {reason}"
        for name, reason in reasons.items()
        if not any(name.startswith(other + ".") for other in complete)
        and not any(other.startswith(name + ".") for other in reasons)
    ]
    if not sets:
        why = f" Found: {'; '.join(failures[:2])}." if failures else ""
        raise UsageError(
            f"no {what} are recognised in {type(model).__name__}. Looked for: {criteria}.{why} Describe them by"
            " lp_dist.groups_of(model, outputs=[...], inputs=[...])"
        )
    if failures:
        logger.warning(
            "no %s are recognised in %d parts of the model, which stay as they are: %s",
            what,
            len(failures),
            failures[0],
        )
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    # Sets of one module stay in their order.
    return sorted(sets, key=lambda groups: position[groups.name])
