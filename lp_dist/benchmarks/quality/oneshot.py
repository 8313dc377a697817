"""One-shot pruning as published: magnitude, Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774).

They are baselines of the bench.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.benchmarks.timing import progress
from lp_dist.errors import UsageError
from lp_dist.optim import nm
from lp_dist.sharding.deepspeed_slices import is_transposed


def keep_largest(scores: dict[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Masks without the exact fraction `sparsity` of smallest scores.

    Args:
        scores: by name of the weight, in its shape.
        sparsity: the fraction that is pruned, from 0 to 1, rounded to a whole weight.
        scope: "layer", the fraction of each tensor, or "global", of all together.
    Returns:
        Masks by name, bool in the shape of the scores: True where a weight is kept.
    """
    if scope == "layer":
        return {name: _kept(score.flatten(), sparsity).view_as(score) for name, score in scores.items()}
    flat = _kept(torch.cat([score.flatten() for score in scores.values()]), sparsity)
    masks = flat.split([score.numel() for score in scores.values()])
    return {name: mask.view_as(score) for (name, score), mask in zip(scores.items(), masks)}


def _kept(scores: Tensor, sparsity: float) -> Tensor:
    """The mask along the last dimension; of equal scores any may be pruned."""
    pruned = scores.topk(round(sparsity * scores.shape[-1]), dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, pruned, False)


def magnitude(model: nn.Module, names: Iterable[str], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Masks by |w|.

    Args:
        model: it is not changed.
        names: of the matrices that are pruned.
        sparsity: the fraction that is pruned, from 0 to 1.
        scope: "layer" or "global".
    Returns:
        Masks by name, bool: True where a weight is kept.
    """
    parameters = dict(model.named_parameters())
    return keep_largest({name: parameters[name].detach().abs() for name in names}, sparsity, scope)


@torch.no_grad()
def wanda(model: nn.Module, names: Iterable[str], sparsity: float, inputs: Tensor) -> dict[str, Tensor]:
    """Prunes by Wanda: |w|·‖x‖, compared within each output (arXiv 2306.11695).

    Args:
        model: pruned weights are set to zero in it.
        names: of the matrices that are pruned, all of them in transformer blocks.
        sparsity: the fraction of each output's weights that is pruned, from 0 to 1.
        inputs: token ids for calibration, int64 [rows, block].
    Returns:
        Masks by name, bool: True where a weight is kept.
    """

    def prune(weight: Tensor, gram: Tensor) -> Tensor:
        return _kept(weight.abs() * gram.diagonal().sqrt(), sparsity)

    return _block_by_block(model, set(names), inputs, prune)


@torch.no_grad()
def sparsegpt(
    model: nn.Module, names: Iterable[str], sparsity: float, inputs: Tensor, pattern: str | None = None
) -> dict[str, Tensor]:
    """Prunes by SparseGPT, which moves the kept weights to make up for the pruned ones (arXiv 2301.00774).

    With the paper's blocks of 128 and damping of 1 %.

    Args:
        model: its weights are changed.
        names: of the matrices that are pruned, all of them in transformer blocks.
        sparsity: the fraction of each block of 128 inputs that is pruned, from 0 to 1; a pattern has its own.
        inputs: token ids for calibration, int64 [rows, block].
        pattern: such as "2:4"; None: single weights.
    Returns:
        Masks by name, bool: True where a weight is kept.
    Raises:
        UsageError: a matrix has inputs that are no multiple of the pattern's M.
    """
    return _block_by_block(
        model, set(names), inputs, lambda weight, gram: sparsegpt_layer(weight, gram, sparsity, pattern=pattern)
    )


def sparsegpt_layer(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    block: int = 128,
    damping: float = 0.01,
    pattern: str | None = None,
) -> Tensor:
    """Algorithm 1 of the SparseGPT paper, on one matrix.

    Args:
        weight: [out, in], changed in place: pruned weights become zero, kept ones are updated.
        gram: X·Xᵀ of the layer's inputs, [in, in].
        sparsity: the fraction of each block of inputs that is pruned, from 0 to 1; a pattern has its own.
        block: inputs a block, a multiple of the pattern's M.
        damping: added to the diagonal, as a fraction of its mean.
        pattern: such as "2:4": of M inputs the N of largest score are kept in each output, chosen when the inputs
            before them are done. None: single weights, chosen at the start of each block.
    Returns:
        The mask, bool [out, in]: True where a weight is kept.
    Raises:
        UsageError: the inputs are no multiple of the pattern's M.
    """
    if pattern and (reason := nm.why_no_blocks(weight.shape, 0, nm.parse_pattern(pattern)[1], 1)):
        raise UsageError(f"pattern={pattern}: a matrix can't have it, since {reason}")
    width = weight.shape[1]
    hessian = gram.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    weight[:, unused] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    # The Cholesky factor of the inverse holds, row by row, the inverses of what remains of the Hessian as inputs are
    # done one after another.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for first in range(0, width, block):
        last = min(first + block, width)
        columns, factor = weight[:, first:last].clone(), inverse[first:last, first:last]
        errors = torch.zeros_like(columns)
        if not pattern:
            scores = columns.square() / factor.diagonal().square()
            mask = _kept(scores.flatten(), sparsity).view_as(scores)
        else:
            n, m = nm.parse_pattern(pattern)
            mask = torch.ones_like(columns, dtype=torch.bool)
        for i in range(last - first):
            if pattern and i % m == 0:
                mask[:, i : i + m] = nm.is_kept(
                    columns[:, i : i + m].square() / factor.diagonal()[i : i + m].square(), n
                )
            column = columns[:, i].clone()
            pruned = column * mask[:, i]
            errors[:, i] = (column - pruned) / factor[i, i]
            columns[:, i:] -= errors[:, i : i + 1] * factor[i : i + 1, i:]
            columns[:, i] = pruned
        weight[:, first:last], kept[:, first:last] = columns, mask
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return kept


def _block_by_block(
    model: nn.Module, names: set[str], inputs: Tensor, prune: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Prunes one transformer block after another, each on the outputs of the pruned ones before it.

    prune: gives the mask of a weight [out, in], which it may change, from the sum of x·xᵀ of its inputs.
    """
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    modules = {f"{name}.weight": module for name, module in model.named_modules() if f"{name}.weight" in names}
    states, call = _first_inputs(model, layers[0], inputs)
    masks: dict[str, Tensor] = {}
    for layer in progress(layers, "pruning"):
        submodules = set(map(id, layer.modules()))
        linears = {name: module for name, module in modules.items() if id(module) in submodules}
        grams: dict[str, Tensor] = {}
        hooks = [module.register_forward_pre_hook(_add_gram(grams, name)) for name, module in linears.items()]
        for state in states:
            call(layer, state)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            transposed = is_transposed(module)
            weight = (module.weight.data.t() if transposed else module.weight.data).float().clone()
            mask = prune(weight, grams[name])
            weight *= mask
            module.weight.data.copy_(weight.t() if transposed else weight)
            masks[name] = mask.t().contiguous() if transposed else mask
        states = [call(layer, state) for state in states]
    return masks


def _add_gram(grams: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        grams[name] = grams.get(name, 0) + x.t() @ x

    return hook


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


def _first_inputs(
    model: nn.Module, first: nn.Module, inputs: Tensor
) -> tuple[list[Tensor], Callable[[nn.Module, Tensor], Tensor]]:
    """The inputs of the first block, row by row, and a function that calls a block with its other arguments."""
    states: list[Tensor] = []
    arguments: list[Any] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        arguments[:] = args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}
        raise _Stop

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    device = next(model.parameters()).device
    for row in inputs:
        with contextlib.suppress(_Stop):
            model(input_ids=row[None].to(device))
    hook.remove()

    def call(block: nn.Module, state: Tensor) -> Tensor:
        out = block(state, *arguments[0], **arguments[1])
        return out[0] if isinstance(out, tuple) else out

    return states, call
