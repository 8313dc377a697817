"""Feed-forward channels and attention heads, recognised from a model's modules: from which layers are linear, how wide
they are, and which of them stand together. Names decide only where shapes can't (which of four square layers is the
last of an attention). What is not recognised is not guessed.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.shards import full_shape
from lp_dist.structured.groups import Groups, Layer, layers_of, made_of, within

logger = logging.getLogger(__name__)


def channels(model: nn.Module) -> list[Groups]:
    """Feed-forward channels of every layer: output i of the first linear layers (one, or two of a gated layer, or both
    in one) with its bias, and input i of the last.

    Raises:
        UsageError: none is recognised; says what was looked for.
    """
    layers, widths = layers_of(model), _widths(model)
    reasons = dict.fromkeys(_experts(model), "its experts are one tensor for all of them, which is not known")
    attention = {layer.name for module in _attentions(model) for layer in within(layers, module)}
    found: list[Groups] = []
    taken = set(attention)
    for module in _stacked(model):
        own = [layer for layer in within(layers, module) if layer.name not in taken]
        match = _feed_forward(own, widths) or _square(type(model.get_submodule(module)).__name__, own, widths)
        if match is None:
            continue
        ups, down = match
        odd = _as_wide(model, module, {down.inputs, ups[0].outputs}, {layer.name for layer in layers})
        taken |= {layer.name for layer in (*ups, down)}
        if getattr(
            model.get_submodule(module), "activation_sparsity", 0
        ):  # Gemma 3n: a threshold from mean and spread of all channels
            reasons[module] = "its activation_sparsity ties the channels together"
            continue
        if odd:
            reasons[module] = f"{odd} is as wide as the channels, and ties them together"
            continue
        members = [
            member
            for up in ups
            for start in range(0, up.outputs, down.inputs)
            for member in up.of_outputs(1, start, start + down.inputs)
        ]
        found.append(made_of(model, module, "channels", down.inputs, [*members, *down.of_inputs()]))
    looked = (
        "two or three linear layers in one module of a layer stack, outside of attention, from the model's width H to"
        " I (one, two, or one to 2·I) and back from I to H, with nothing else between them that is as wide as I"
    )
    return _sorted(model, found, "feed-forward channels", looked, reasons)


def heads(model: nn.Module) -> list[Groups]:
    """Attention heads: a head's outputs of the queries and inputs of the last layer, and of keys and values as well
    where each head has its own.

    With grouped queries (fewer keys than queries) keys and values stay, since other heads read them; `kv_groups` takes
    them all.
    Raises UsageError as `channels` does.
    """
    return _heads(model, "heads")


def kv_groups(model: nn.Module) -> list[Groups]:
    """Heads of keys and values with all the query heads that read them, and their inputs of the last layer. As `heads`
    where each head has its own.
    """
    return _heads(model, "kv_groups")


# -- where to look ------------------------------------------------------------


def _stacked(model: nn.Module) -> list[str]:
    """Modules inside of a stack of layers (a number is in their name), the innermost first."""
    names = [
        name
        for name, module in model.named_modules()
        if any(part.isdigit() for part in name.split("."))
        and next(module.children(), None) is not None
        and not isinstance(module, nn.ModuleList)
    ]
    return sorted(names, key=lambda name: -name.count("."))


def _attentions(model: nn.Module) -> list[str]:
    """Modules that call themselves attention, the innermost first; without whole layers that do so
    (JambaAttentionDecoderLayer).
    """
    kinds = {name: type(module).__name__.lower() for name, module in model.named_modules()}
    named = [name for name in _stacked(model) if "attention" in kinds[name] or "attn" in kinds[name]]
    return [
        name
        for name in named
        if not (kinds[name].endswith(("layer", "block")) and any(other.startswith(name + ".") for other in named))
    ]


def _experts(model: nn.Module) -> list[str]:
    """Modules with a matrix for each of many experts in one tensor."""
    return sorted(
        {
            name.rpartition(".")[0]
            for name, param in model.named_parameters()
            if "experts" in name and len(full_shape(param)) == 3
        }
    )


def _widths(model: nn.Module) -> set[int]:
    """How wide the model is between its layers; several where a model has several parts. Empty where neither a config
    nor an embedding tells.
    """
    config = getattr(model, "config", None)
    configs = (
        [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))] if config is not None else []
    )
    widths = {getattr(one, key, None) for one in configs for key in ("hidden_size", "d_model")} - {None}
    return widths or {module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding)}


def _as_wide(model: nn.Module, module: str, widths: set[int], linear: set[str]) -> str | None:
    """A parameter in `module` that is no linear layer's and has a dimension of one of these widths, if there is one
    outside of attention.
    """
    inner = [name for name in _attentions(model) if name.startswith(module + ".")]
    for name, param in model.named_parameters():
        owner = name.rsplit(".", 1)[0]
        if (
            name.startswith(module + ".")
            and owner not in linear
            and not any(name.startswith(one + ".") for one in inner)
        ) and widths & set(full_shape(param)):
            return name
    return None


# -- feed-forward -------------------------------------------------------------

_LAST_FORWARD = re.compile(r"\.(down[a-z_]*|c_proj|fc2|w2|wo|lin2|dense_4h_to_h)$")


def _feed_forward(own: list[Layer], widths: set[int]) -> tuple[list[Layer], Layer] | None:
    """The first layers and the last one, if these layers hold one feed-forward part and not several."""
    matches = []
    for down in own:
        wide = [up for up in own if up.place < down.place and up.inputs == down.outputs != down.inputs]
        ups = [up for up in wide if up.outputs == down.inputs] or [up for up in wide if up.outputs == 2 * down.inputs]
        fused = bool(ups) and ups[0].outputs == 2 * down.inputs
        if ups and len(ups) <= (1 if fused else 2) and (not widths or down.outputs in widths):
            matches.append((ups, down))
    return matches[0] if len(matches) == 1 else None


def _square(kind: str, own: list[Layer], widths: set[int]) -> tuple[list[Layer], Layer] | None:
    """The same where the channels are as many as the model is wide (as cutting can leave it), so that names must tell
    which layer is the last one.
    """
    *ups, down = own if len(own) in (2, 3) else [None]
    if down is None or not re.search("mlp|ffn|feedforward", kind.lower()) or not _LAST_FORWARD.search(down.name):
        return None
    return (
        (ups, down)
        if {width for layer in own for width in (layer.inputs, layer.outputs)} == {down.inputs}
        and (not widths or down.inputs in widths)
        else None
    )


# -- attention ----------------------------------------------------------------

HEAD_SIZES = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
)  # what modules call the size of a head
# How one layer that makes queries, keys and values at once lays out its outputs; shapes can't tell.
_ONE_AFTER_ANOTHER = ("GPT2Attention", "Phi3Attention")
_HEAD_BY_HEAD = ("GPTNeoXAttention", "BloomAttention")
_BORROWS = "has queries alone, and reads another layer's keys and values"
_LAST = re.compile(r"(^|\.)(o|wo|out|dense|c_proj|[a-z_]*(o_proj|out)[a-z_]*)$")


@dataclass(frozen=True)
class _Attention:
    """size: of a head. heads, shared: numbers of heads of the queries, and of keys and values. queries, others: their
    members; last: the inputs of the last layer.
    """

    size: int
    heads: int
    shared: int
    queries: list[tuple[Layer, int]]
    others: list[tuple[Layer, int]]
    last: Layer
    by_head: bool = False


def _heads(model: nn.Module, kind: str) -> list[Groups]:
    layers, found, reasons = layers_of(model), [], {}
    taken: set[str] = set()
    lent: list[str] = []  # modules of which keys and values are in a group
    for module in _attentions(model):
        own = [layer for layer in within(layers, module) if layer.name not in taken]
        if len(own) < 2 or any(layer.name in taken for layer in within(layers, module)):
            continue
        attention = _attention(model, module, own)
        if isinstance(attention, str):
            reasons[module] = attention
            continue
        taken |= {layer.name for layer in own}
        whole = kind == "kv_groups" or attention.shared == attention.heads
        lent += [module] * whole
        count = attention.shared if whole else attention.heads
        wide = attention.size * (attention.heads // count)  # of a group's queries, and of its inputs of the last layer
        members = []
        if attention.by_head:
            members += attention.queries[0][0].of_outputs(3 * attention.size)
        else:
            for layer, start in attention.queries:
                members += layer.of_outputs(wide, start, start + attention.heads * attention.size)
            for layer, start in attention.others if whole else []:
                members += layer.of_outputs(attention.size, start, start + attention.shared * attention.size)
        found.append(made_of(model, module, kind, count, [*members, *attention.last.of_inputs(wide)]))
    borrows = next((module for module, reason in reasons.items() if reason == _BORROWS), None)
    if borrows is not None:  # Gemma 3n's last layers: whose keys they read is in no shape
        found = [groups for groups in found if groups.name not in lent]
        reasons |= dict.fromkeys(lent, f"{borrows} {_BORROWS}, which may be its")
    looked = (
        "modules whose class is called attention, with a head size (head_dim and the like), linear layers of queries,"
        " keys, values and a last one, or one for the first three in the layout of"
        f" {', '.join((*_ONE_AFTER_ANOTHER, *_HEAD_BY_HEAD))}, and nothing else that is as wide as the heads"
    )
    return _sorted(model, found, "attention heads", looked, reasons)


def _attention(model: nn.Module, module: str, own: list[Layer]) -> _Attention | str:
    """What is in an attention module, or why it is not known."""
    inside = model.get_submodule(module)
    size = next(
        (
            value
            for part in inside.modules()
            for key in HEAD_SIZES
            if isinstance(value := getattr(part, key, None), int)
        ),
        None,
    )
    if size is None:
        return f"its modules have none of {', '.join(HEAD_SIZES)}"
    if len(own) == 2:
        if own[0].outputs == own[1].inputs and own[0].inputs == own[1].outputs:
            return _BORROWS
        last, first = sorted(own, key=lambda layer: layer.outputs)
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
    elif len(own) == 4:
        *firsts, last = sorted(own, key=lambda layer: layer.place)
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
        return f"{len(own)} linear layers ({', '.join(layer.name.rsplit('.', 1)[-1] for layer in own)})"
    return _not_of_heads(model, module, attention, {layer.name for layer in own}) or attention


def _not_of_heads(model: nn.Module, module: str, attention: _Attention, linear: set[str]) -> str | None:
    """Why what stands in the module besides its linear layers is not the same for all heads, or None. (What stands
    beside the last layer in a module of its own, as BERT's norm does, comes after the heads.)"""
    widths = {
        attention.heads * attention.size,
        attention.shared * attention.size,
        attention.heads,
        attention.shared,
    } - {attention.size, 1}
    after = attention.last.name.rsplit(".", 1)[0]
    for name, param in model.named_parameters():
        owner = name.rsplit(".", 1)[0]
        if (
            name.startswith(module + ".")
            and owner not in linear
            and not (after != module and name.startswith(after + "."))
        ):
            shape = full_shape(param)
            if widths & set(shape):
                return f"{name} is as wide as the heads, and ties them together"
            if "norm" not in type(model.get_submodule(owner)).__name__.lower() and shape.numel() > 1:
                # gpt-oss's sinks, where there are as many heads as each is wide; DiffLlama's lambdas, by which one
                # head is taken from another
                return f"it is not known what {name} does to the heads"
    for name, part in model.get_submodule(module).named_modules():
        if (
            isinstance(part, nn.ModuleList) and next(part.parameters(), None) is not None
        ):  # StableLM's norms, one for each head
            return f"{module}.{name} is a list, and it is not known what is whose head's"
    return None


# -- what is found ------------------------------------------------------------


def _sorted(model: Any, found: list[Groups], what: str, looked: str, reasons: dict[str, str]) -> list[Groups]:
    """In the order of the model; raises UsageError where nothing was found. reasons: by module, why what looked like
    one is none.
    """
    whole = [groups.name for groups in found]
    # What was found around a module, or is missing within it as well, says nothing new.
    told = [
        f"{name}: {reason}"
        for name, reason in reasons.items()
        if not any(name.startswith(other + ".") for other in whole)
        and not any(other.startswith(name + ".") for other in reasons)
    ]
    if not found:
        why = f" Found: {'; '.join(told[:2])}." if told else ""
        raise UsageError(
            f"no {what} are recognised in {type(model).__name__}. Looked for: {looked}.{why} Describe them by"
            " lp_dist.groups_of(model, outputs=[...], inputs=[...])"
        )
    if told:
        logger.warning(
            "no %s are recognised in %d parts of the model, which stay as they are: %s", what, len(told), told[0]
        )
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda groups: place[groups.name])
