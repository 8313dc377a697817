"""Which parameters decay: by module type first, by name second, decided on the model before it is sharded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lp_dist.optim.batching import count_zeros
from lp_dist.sharding.collectives import all_reduce_sum
from lp_dist.sharding.shards import full_shape, is_dtensor, local_shard

logger = logging.getLogger(__name__)

_MATRIX_MODULES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_EMBEDDING_MODULES = (nn.Embedding, nn.EmbeddingBag)
# Known by name of class, as importing transformers for an isinstance would cost seconds: GPT-2's linear layer.
_MATRIX_CLASS_NAMES = ("Conv1D",)
_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")
# A parameter of an unknown kind of module (a fused expert tensor, a hand-written linear layer) decays if it is a
# matrix and its name contains none of these.
_NOT_MATRIX_NAMES = ("embed", "norm", "bias", "wte", "wpe", "rotary", "position", "cls_token")


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
        **overrides: further group keys (lr, p, precondition, ...), for both groups.
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
    groups = [
        {**overrides, "params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {**overrides, "params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
    candidates = matrix_names(model, include_embeddings=include_embeddings)
    trainable = sorted(name for name in candidates if params[name].requires_grad)
    zeros = _all_zero_names([(name, params[name]) for name in trainable])
    chosen = set(trainable) - set(zeros)
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
            " or of modules that are not linear, convolution or attention layers. Unfreeze some, or build the param"
            " groups by hand"
        )
    return chosen


def matrix_names(model: nn.Module, *, include_embeddings: bool = False) -> set[str]:
    """Names of the matrices of linear, convolution and attention modules. The rules look at no values.

    Left out are biases, norms, embeddings, output heads, and all parameters of peft's adapters: LoRA's B starts at
    zero, and a sparse A makes no weight of the model zero. So are those of `factors_of_weights`.

    Args:
        model: before or after it is sharded, but unwrapped.
        include_embeddings: also the embeddings and the output head.
    Returns:
        Names as of `model.named_parameters()`.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, _EMBEDDING_MODULES) for p in m.parameters(recurse=False)
    }
    # A method of the models of Transformers.
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    adapters = _adapters(model)
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), module)
    names = set()
    computed = set(factors_of_weights(model))
    # It yields a tied parameter once, under its first name.
    for name, param in model.named_parameters():
        if not param.is_floating_point() or id(param) in adapters or ".lora_" in f".{name}" or name in computed:
            continue
        if id(param) in embeddings or id(param) in heads or any(word in _HEAD_NAMES for word in name.split(".")):
            if include_embeddings and len(full_shape(param)) >= 2:
                names.add(name)
        elif _is_matrix(name, param, owners[id(param)]):
            names.add(name)
    return names


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
    """The ids of the parameters that peft added to the layers that it wraps."""
    # Layers of all of peft's tuners have these two attributes.
    return {
        id(param)
        for module in model.modules()
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")
        for name, param in module.named_parameters()
        if not name.startswith("base_layer.")
    }


def _is_matrix(name: str, param: Tensor, owner: nn.Module) -> bool:
    if len(full_shape(param)) < 2:
        return False
    if isinstance(owner, _MATRIX_MODULES) or type(owner).__name__ in _MATRIX_CLASS_NAMES:
        # nn.MultiheadAttention keeps these as (1, 1, embed_dim).
        return not name.endswith(("bias_k", "bias_v"))
    kind = type(owner).__name__.lower()
    return not ("norm" in kind or "embed" in kind) and named_like_a_matrix(name, full_shape(param))


def named_like_a_matrix(name: str, shape: Iterable[int]) -> bool:
    """Whether a parameter of an unknown kind of module counts as a matrix.

    Args:
        name: of the parameter.
        shape: of the parameter before sharding; a matrix has at least two dimensions.
    """
    return (
        len(tuple(shape)) >= 2
        and not any(word in name for word in _NOT_MATRIX_NAMES)
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
            values = local_shard(param).counted if is_dtensor(param) else param.detach()
            nonzero.append(values.numel() - int(count_zeros(values)))
    if any(is_dtensor(param) for _, param in named):
        nonzero = all_reduce_sum(torch.tensor(nonzero)).tolist()
    return [name for (name, _), count in zip(named, nonzero) if not count]
