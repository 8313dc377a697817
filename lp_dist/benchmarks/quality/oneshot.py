"""One-shot pruning, the published ways: magnitude, Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774).
Baselines for the bench.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

# What an input feature is multiplied with: a row of the weight in a linear layer's [out, in], a column in GPT-2's
# Conv1D, [in, out].
_TRANSPOSED = ("Conv1D",)


def smallest(scores: dict[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    """The exact share `sparsity` of the smallest scores, as masks that are True where a weight stays; scope "layer" or
    "global".
    """
    if scope == "layer":
        return {name: _kept(score.flatten(), sparsity).view_as(score) for name, score in scores.items()}
    flat = _kept(torch.cat([score.flatten() for score in scores.values()]), sparsity)
    return {
        name: part.view_as(score)
        for (name, score), part in zip(scores.items(), flat.split([score.numel() for score in scores.values()]))
    }


def _kept(scores: Tensor, sparsity: float) -> Tensor:
    """Along the last dimension, as many as that is; of equal scores any."""
    dead = scores.topk(round(sparsity * scores.shape[-1]), dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, dead, False)


def magnitude(model: nn.Module, names: Iterable[str], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Masks by |w|."""
    parameters = dict(model.named_parameters())
    return smallest({name: parameters[name].detach().abs() for name in names}, sparsity, scope)


@torch.no_grad()
def wanda(model: nn.Module, names: Iterable[str], sparsity: float, inputs: Tensor) -> dict[str, Tensor]:
    """Masks by |w|·‖x‖, compared within each output. inputs: token ids, [rows, block]."""

    def prune(weight: Tensor, gram: Tensor) -> Tensor:
        return _kept(weight.abs() * gram.diagonal().sqrt(), sparsity)

    return _block_by_block(model, set(names), inputs, prune)


@torch.no_grad()
def sparsegpt(model: nn.Module, names: Iterable[str], sparsity: float, inputs: Tensor) -> dict[str, Tensor]:
    """Masks, and weights that stay are moved to make up for those that go. With the paper's blocks of 128 and damping
    of 1 %.
    """
    return _block_by_block(model, set(names), inputs, lambda weight, gram: _sparsegpt(weight, gram, sparsity))


def _sparsegpt(weight: Tensor, gram: Tensor, sparsity: float, block: int = 128, damping: float = 0.01) -> Tensor:
    """The paper's algorithm 1 on a weight [out, in], changed in place; `gram` is X·Xᵀ. Returns the mask."""
    width = weight.shape[1]
    hessian = gram.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    weight[:, unused] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    # The inverse's Cholesky factor holds, row by row, the inverses of what remains of the Hessian when one input after
    # another is done with.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for first in range(0, width, block):
        last = min(first + block, width)
        part, factor = weight[:, first:last].clone(), inverse[first:last, first:last]
        errors = torch.zeros_like(part)
        scores = part.square() / factor.diagonal().square()
        alive = _kept(scores.flatten(), sparsity).view_as(scores)
        for i in range(last - first):
            column = part[:, i].clone()
            pruned = column * alive[:, i]
            errors[:, i] = (column - pruned) / factor[i, i]
            part[:, i:] -= errors[:, i : i + 1] * factor[i : i + 1, i:]
            part[:, i] = pruned
        weight[:, first:last], kept[:, first:last] = part, alive
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return kept


def _block_by_block(
    model: nn.Module, names: set[str], inputs: Tensor, prune: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Prunes one transformer block after another, each on what comes out of the pruned ones before it; weights are set
    to zero by the masks.

    prune: gives the mask of a weight [out, in], which it may change, from the sum of x·xᵀ of its inputs.
    """
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    modules = {f"{name}.weight": module for name, module in model.named_modules() if f"{name}.weight" in names}
    states, call = _first_inputs(model, blocks[0], inputs)
    masks: dict[str, Tensor] = {}
    for block in tqdm(blocks, desc="pruning", leave=False):
        inside = set(map(id, block.modules()))
        layers = {name: module for name, module in modules.items() if id(module) in inside}
        grams: dict[str, Tensor] = {}
        hooks = [module.register_forward_pre_hook(_summing(grams, name)) for name, module in layers.items()]
        for state in states:
            call(block, state)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            turned = type(module).__name__ in _TRANSPOSED
            weight = (module.weight.data.t() if turned else module.weight.data).float().clone()
            mask = prune(weight, grams[name])
            weight *= mask
            module.weight.data.copy_(weight.t() if turned else weight)
            masks[name] = mask.t().contiguous() if turned else mask
        states = [call(block, state) for state in states]
    return masks


def _summing(grams: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        grams[name] = grams.get(name, 0) + x.t() @ x

    return hook


class _Stop(Exception):
    pass


def _first_inputs(
    model: nn.Module, first: nn.Module, inputs: Tensor
) -> tuple[list[Tensor], Callable[[nn.Module, Tensor], Tensor]]:
    """What goes into the first block, row by row, and a function that calls a block with all else that it is called
    with.
    """
    states: list[Tensor] = []
    more: list[Any] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        more[:] = args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}
        raise _Stop

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    device = next(model.parameters()).device
    for row in inputs:
        with contextlib.suppress(_Stop):
            model(input_ids=row[None].to(device))
    hook.remove()

    def call(block: nn.Module, state: Tensor) -> Tensor:
        out = block(state, *more[0], **more[1])
        return out[0] if isinstance(out, tuple) else out

    return states, call
