"""Which parameters decay, and why the others don't: by what their modules are and do, by names only where that can't
be told. Decided on the model before it is sharded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lp_dist.modules.code import Use
from lp_dist.modules.model import ModelCode, read_model
from lp_dist.optim.batching import count_zeros, to_local
from lp_dist.sharding.collectives import all_reduce_sum
from lp_dist.sharding.shards import full_shape, is_dtensor
from lp_dist.sparsity.input_dims import input_dims, listed, share_left_out

logger = logging.getLogger(__name__)

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")
# Positions, codes and tokens, which may be multiplied as matrices are, by the last word of the name.
_POSITIONS = re.compile(
    r"(^|_)(pos|position|positions|positional|rel|relative)(_|$)|(^|_)embed(ding)?s?$"
    r"|codebook|probe|tokens?$|latents?$"
)
# Modules that make a bias of attention from positions, whatever they multiply: by a word of the path.
_POSITION_BIASES = re.compile(r"(^|_)(rel|relative|continuous)_pos(ition)?(_[a-z])?_bias|(^|_)position_bias")
# Where no code says what a parameter is used for, further words for what is no matrix: anywhere in the name, and in
# its last word.
_ANYWHERE = re.compile(r"embed|norm|bias|wte|wpe|rotary|position|cls_token")
_LAST_WORD = re.compile(r"quer(y|ies)(_|$)|(^|_)scale|gamma|a_log|time_|(^|_)dt(_|$)")
# Taps of a short depthwise convolution over time: one filter of a few weights for each channel.
_SHORT = 8


class Reason(Enum):
    """Why a parameter stays dense, or decays."""

    MATRIX = "operand of a matrix product"
    FOREIGN_MATRIX = "matrix of a module whose code can't be read, by its shape and name"
    QUANTIZED = "not floating-point"
    ADAPTER = "adapter, or trained whole beside one"
    COMPUTED = "weights are computed from it"
    EXEMPT = "the model exempts it from weight decay"
    EMBEDDING = "embedding"
    LOOKUP = "table whose rows are looked up"
    HEAD = "output head"
    ROUTER = "router"
    VECTOR = "vector: bias, norm, scale"
    TOKEN = "learned token or position, joined to the activations"
    ELEMENTWISE = "scales or shifts activations, or is a state space's"
    SHORT_CONVOLUTION = "short depthwise convolution"
    NO_MATRIX = "no matrix by its shape or name"


class Choice(NamedTuple):
    """Whether a parameter decays, and why."""

    decays: bool
    reason: Reason


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    *,
    include_embeddings: bool = False,
    names: Iterable[str] | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Makes two param groups for any of our optimizers: the trainable matrices with λ, all others without decay.

    Args:
        model: before DeepSpeed, DDP or FSDP2 wraps it.
        weight_decay: λ of the matrices. A `SparsityTarget` chooses λ itself, and needs none here.
        include_embeddings: also decay the embeddings and the output head.
        names: decay exactly these, as of `model.named_parameters()`, instead of what the rules choose.
        **overrides: further group keys (lr, p, precondition, ...), for both groups. With a pattern there is a group
            of matrices for each dimension in which the inputs may lie (`input_dim`), and what can't have it does not
            decay.
    Returns:
        `[{"params": [...], "weight_decay": λ, ...}, {"params": [...], "weight_decay": 0.0, ...}]`. A group that would
        be empty is left out. Each trainable parameter is in exactly one group, and a tied one comes once.
    Raises:
        ValueError: no parameter is left to decay, or one of `names` is not a trainable parameter.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    decayed = decayed_names(model, include_embeddings=include_embeddings) if names is None else set(names)
    unknown = sorted(decayed - {name for name, _ in trainable})
    if unknown:
        raise ValueError(
            f"{len(unknown)} names are not trainable parameters of {type(model).__name__}, such as {unknown[0]!r}; "
            "pass names as model.named_parameters() gives them"
        )
    decaying: dict[int | None, set[str]] = {None: decayed}
    of_others = overrides
    if overrides.get("pattern") and weight_decay > 0 and "input_dim" not in overrides:
        decaying = _by_input_dim(model, overrides["pattern"], [name for name, _ in trainable if name in decayed])
        decayed = set().union(*decaying.values())
        of_others = {**overrides, "pattern": None}
    groups = [
        {
            **overrides,
            **({} if dim is None else {"input_dim": dim}),
            "params": [p for name, p in trainable if name in names_of_dim],
            "weight_decay": weight_decay,
        }
        for dim, names_of_dim in decaying.items()
    ]
    groups.append({**of_others, "params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _by_input_dim(model: nn.Module, pattern: str, names: list[str]) -> dict[int | None, set[str]]:
    """The parameters that can have a pattern, by their dimension of inputs; warns of the others."""
    known = input_dims(model, dict.fromkeys(names, pattern))
    by_dim: dict[int | None, set[str]] = {}
    for name, dim in sorted(known.dims.items(), key=lambda item: -item[1]):
        by_dim.setdefault(dim, set()).add(name)
    if known.reasons and not known.dims:
        raise ValueError(f"no parameter that decays can have pattern={pattern!r}: {listed(known.reasons)}")
    if known.reasons:
        sizes = {name: full_shape(model.get_parameter(name)).numel() for name in names}
        logger.warning(
            "pattern=%r is not for %s, which stay dense: %s",
            pattern,
            share_left_out(sizes, known.reasons),
            listed(known.reasons),
        )
    return by_dim


def decayed_names(model: nn.Module, *, include_embeddings: bool = False) -> set[str]:
    """Names of the trainable parameters that `param_groups` decays.

    They are those of `matrix_names`, without the ones that are all zeros now.

    Args:
        model: before DeepSpeed, DDP or FSDP2 wraps it.
        include_embeddings: also the embeddings and the output head.
    Returns:
        Names as of `model.named_parameters()`.
    Raises:
        ValueError: there is no such parameter.
    """
    params = dict(model.named_parameters())
    reading = read_model(model)
    chosen_by_rules = _choose(model, reading, include_embeddings)
    candidates = [name for name, choice in chosen_by_rules.items() if choice.decays]
    trainable = sorted(name for name in candidates if params[name].requires_grad)
    zeros = _all_zero_names([(name, params[name]) for name in trainable])
    chosen = set(trainable) - set(zeros)
    _tell_foreign({name: reading.foreign[name] for name in sorted(chosen & reading.foreign.keys())})
    if zeros:
        logger.info("no decay for %d parameters that start at zero (zero absorbs), such as %s", len(zeros), zeros[0])
    if not chosen and _adapters(model):
        raise ValueError(
            f"only adapters are trained in {type(model).__name__}, and they never decay: a sparse adapter makes no"
            " sparse model. Unfreeze the matrices that are to become sparse (requires_grad_(True) on"
            " *.base_layer.weight), or train the adapter on a model that is sparse already and merge it by"
            " lp_dist.merge_adapter, which keeps the zeros"
        )
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no trainable matrix that could decay; its parameters are frozen, all zeros,"
            " or no operands of matrix products (embeddings, heads, routers, norms, tables). Unfreeze some, or build"
            " the param groups by hand"
        )
    return chosen


def matrix_names(model: nn.Module, *, include_embeddings: bool = False) -> set[str]:
    """Names of the parameters that `choices` lets decay. The rules look at no values.

    Args:
        model: before or after it is sharded, but unwrapped.
        include_embeddings: also the embeddings and the output head.
    Returns:
        Names as of `model.named_parameters()`.
    """
    return {name for name, choice in choices(model, include_embeddings=include_embeddings).items() if choice.decays}


def choices(model: nn.Module, *, include_embeddings: bool = False) -> dict[str, Choice]:
    """Decides for each parameter whether it decays, and why.

    What is an operand of a matrix product decays: of linear, convolution, attention and expert modules of any class.
    The rules look at no values, and at frozen parameters as at others.

    Args:
        model: before or after it is sharded, on any device, but unwrapped.
        include_embeddings: also the embeddings and the output head.
    Returns:
        {name as of `model.named_parameters()`: what holds for it}, a tied parameter once.
    """
    return _choose(model, read_model(model), include_embeddings)


def expert_stacks(model: nn.Module) -> set[str]:
    """Names of the parameters with a matrix for each index along their first dimension, as those of experts have.

    Args:
        model: before or after it is sharded, on any device, but unwrapped.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    return {
        names[id(param)]
        for module in model.modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for param in module.parameters(recurse=False)
        if len(shape := full_shape(param)) == 3 and min(shape) > 1
    }


def _choose(model: nn.Module, reading: ModelCode, include_embeddings: bool = False) -> dict[str, Choice]:
    """As `choices`, of a model whose code has been read."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            # What is an embedding stays one where it is tied to another layer.
            if id(param) not in owners or isinstance(module, _EMBEDDINGS):
                owners[id(param)] = module
    rules = _Rules(
        reading,
        adapters=_adapters(model),
        computed=set(factors_of_weights(model)),
        exempt=_exempt(model),
        heads=_heads(model) | reading.heads,
        include_embeddings=include_embeddings,
    )
    return {name: rules.choose(name, param, owners[id(param)]) for name, param in model.named_parameters()}


class _Rules:
    """The rules, the first that holds decides.

    Args:
        reading: what the model's code does with its parameters.
        adapters: ids of the parameters of adapters and of what is trained whole beside them.
        computed: names of the factors of weights.
        exempt: names of those that the model exempts from weight decay.
        heads: names of the output heads.
        include_embeddings: whether embeddings and heads decay.
    """

    def __init__(
        self,
        reading: ModelCode,
        *,
        adapters: set[int],
        computed: set[str],
        exempt: set[str],
        heads: set[str],
        include_embeddings: bool,
    ) -> None:
        self._reading, self._adapters, self._computed = reading, adapters, computed
        self._exempt, self._heads, self._include_embeddings = exempt, heads, include_embeddings

    def choose(self, name: str, param: Tensor, owner: nn.Module) -> Choice:
        """What holds for a parameter of the module `owner`."""
        shape = full_shape(param)
        reason = self._by_role(name, param, owner)
        if reason in (Reason.EMBEDDING, Reason.HEAD):
            return Choice(self._include_embeddings and len(shape) >= 2, reason)
        reason = reason or self._by_shape(name, shape, owner) or self._by_use(name, shape)
        return Choice(reason in (Reason.MATRIX, Reason.FOREIGN_MATRIX), reason)

    def _by_role(self, name: str, param: Tensor, owner: nn.Module) -> Reason | None:
        if not param.is_floating_point():
            return Reason.QUANTIZED
        if id(param) in self._adapters or ".lora_" in f".{name}":
            return Reason.ADAPTER
        if name in self._computed:
            return Reason.COMPUTED
        if isinstance(owner, _EMBEDDINGS):
            return Reason.EMBEDDING
        if name in self._heads or any(word in _HEAD_NAMES for word in name.split(".")):
            return Reason.HEAD
        if name in self._exempt:
            return Reason.EXEMPT
        if name in self._reading.routers or any("router" in word.split("_") for word in name.lower().split(".")):
            return Reason.ROUTER
        return None

    def _by_shape(self, name: str, shape: torch.Size, owner: nn.Module) -> Reason | None:
        if isinstance(owner, _NORMS) or len(shape) < 2:
            return Reason.VECTOR
        if sum(size > 1 for size in shape) < 2 and name in self._reading.foreign:
            return Reason.VECTOR
        if isinstance(owner, nn.MultiheadAttention) and shape[:2] == (1, 1):  # bias_k, bias_v
            return Reason.VECTOR
        if isinstance(owner, nn.Conv1d) and 1 < owner.groups == owner.in_channels and shape[-1] <= _SHORT:
            return Reason.SHORT_CONVOLUTION
        return None

    def _by_use(self, name: str, shape: torch.Size) -> Reason:
        uses = self._reading.uses.get(name, set())
        if any(_POSITION_BIASES.search(word) for word in name.lower().split(".")[:-1]):
            return Reason.TOKEN
        if name not in self._reading.foreign:
            return Reason.MATRIX
        if Use.LOOKUP in uses:
            return Reason.LOOKUP
        is_stack = len(shape) == 2 or (len(shape) == 3 and min(shape) > 1)
        if Use.PRODUCT in uses and Use.COMPUTED not in uses:
            is_matrix = (is_stack or len(shape) > 3) and not _POSITIONS.search(name.rpartition(".")[2].lower())
            return Reason.MATRIX if is_matrix else Reason.NO_MATRIX
        if Use.TOKEN in uses:
            return Reason.TOKEN
        if Use.ELEMENTWISE in uses:
            return Reason.ELEMENTWISE
        if Use.COMPUTED in uses:
            return Reason.COMPUTED
        kind = self._reading.foreign[name].lower()
        is_known_otherwise = "norm" in kind or "embed" in kind or not named_like_a_matrix(name, shape)
        return Reason.FOREIGN_MATRIX if is_stack and not is_known_otherwise else Reason.NO_MATRIX


def _tell_foreign(classes: dict[str, str]) -> None:
    """Names matrices of modules that are none of torch's, a line for all layers together.

    Args:
        classes: {name of a parameter: class of the module that has it}.
    """
    kinds = dict.fromkeys(f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} ({kind})" for name, kind in classes.items())
    if kinds:
        logger.info(
            "matrices of modules that are none of torch's decay too: %s; names= chooses otherwise", ", ".join(kinds)
        )


def _heads(model: nn.Module) -> set[str]:
    """Names of the parameters of the output head that a model of Transformers names itself."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    heads = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return {name for name, param in model.named_parameters() if id(param) in heads}


def _exempt(model: nn.Module) -> set[str]:
    """Names of the parameters that the model itself marks as without weight decay: by the attributes that state-space
    models put on them, or by a method, as vision models have it.
    """
    exempt = {
        name
        for name, param in model.named_parameters()
        if getattr(param, "_no_weight_decay", False)
        or (getattr(param, "_optim", None) or {}).get("weight_decay", 1) == 0
    }
    for path, module in model.named_modules():
        names: Any = getattr(module, "no_weight_decay", None)
        keywords: Any = getattr(module, "no_weight_decay_keywords", None)
        exact = {f"{path}.{name}".lstrip(".") for name in (names() if callable(names) else ())}
        fragments = tuple(keywords() if callable(keywords) else ())
        exempt |= {
            name
            for name, _ in module.named_parameters(prefix=path)
            if name in exact or any(fragment in name for fragment in fragments)
        }
    return exempt


def factors_of_weights(model: nn.Module) -> list[str]:
    """Names of the parameters from which a module computes its weights at each use, so that zeros in them are not
    those of the model: of torch's parametrizations, weight norm and `torch.nn.utils.prune`.

    Args:
        model: before or after it is sharded, but unwrapped.
    """
    names = []
    for path, module in model.named_modules(remove_duplicate=False):
        params = dict(module.named_parameters(recurse=False))
        # Older ones hang a plain tensor on the module, computed before each use from parameters that are called alike.
        tensors = {key: value.shape for key, value in vars(module).items() if isinstance(value, Tensor)}
        computed = tuple(
            f"{key}_"
            for key, shape in tensors.items()
            if any(name.startswith(f"{key}_") and full_shape(param) == shape for name, param in params.items())
        )
        is_list = isinstance(module, ParametrizationList)
        names += [f"{path}.{name}".lstrip(".") for name in params if is_list or name.startswith(computed)]
    return names


def _adapters(model: nn.Module) -> set[int]:
    """The ids of the parameters that peft added: to the layers that it wraps, and copies of modules that it trains
    whole.
    """
    ids: set[int] = set()
    for module in model.modules():
        # Layers of all of peft's tuners have these two attributes, and its copies of modules the others.
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            ids |= {id(param) for name, param in module.named_parameters() if not name.startswith("base_layer.")}
        elif hasattr(module, "original_module") and hasattr(module, "_adapters"):
            ids |= {id(param) for name, param in module.named_parameters() if not name.startswith("original_module.")}
    return ids


def named_like_a_matrix(name: str, shape: Iterable[int]) -> bool:
    """Whether a parameter of an unknown kind of module counts as a matrix.

    Args:
        name: of the parameter.
        shape: of the parameter before sharding; a matrix has at least two dimensions.
    """
    last = name.rpartition(".")[2].lower()
    return (
        sum(size > 1 for size in shape) >= 2
        and not _ANYWHERE.search(name.lower())
        and not _POSITIONS.search(last)
        and not _LAST_WORD.search(last)
        and not any(word in _HEAD_NAMES for word in name.split("."))
    )


def _all_zero_names(named: list[tuple[str, Tensor]]) -> list[str]:
    """Names of the parameters that are all zeros. Collective with FSDP2, where a rank has only a part of each."""
    nonzero = []
    for _, param in named:
        if param.is_meta or param.numel() == 0:
            # The values are not known: on the meta device, or partitioned by ZeRO-3.
            nonzero.append(1)
        else:
            values = to_local(param.detach())
            nonzero.append(values.numel() - int(count_zeros(values)))
    if any(is_dtensor(param) for _, param in named):
        nonzero = all_reduce_sum(torch.tensor(nonzero)).tolist()
    return [name for (name, _), count in zip(named, nonzero) if not count]
