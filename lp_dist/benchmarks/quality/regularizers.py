"""Penalties of other papers, as their gradient on one matrix. They are baselines of the bench."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lp_dist.errors import UsageError
from lp_dist.structured.groups import linear_layers

# Whose largest absolute sum is the norm: rows for the matrix as a map of the ∞-norm, columns for one of the 1-norm. A
# row has the weights of an output, a column those of an input, however the parameter is stored.
NORMS = ("rows", "columns")


def output_dims(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Along which dimension of each matrix its outputs lie.

    Args:
        model: it has the matrices.
        names: of matrices.
    Returns:
        0 or 1 by name: 0 for a linear layer's [outputs, inputs], 1 for GPT-2's [inputs, outputs].
    Raises:
        UsageError: a matrix is of no linear layer.
    """
    dims = {f"{layer.name}.weight": int(layer.transposed) for layer in linear_layers(model)}
    unknown = next((name for name in names if name not in dims), None)
    if unknown is not None:
        raise UsageError(
            f"{unknown} is not the weight of a linear layer, so that its rows are unknown; this method is for models"
            " of linear layers"
        )
    return {name: dims[name] for name in names}


def norm_decay(weight: Tensor, dim: int) -> Tensor:
    """The gradient of norm decay (Liang and Huang, arXiv 2009.08435), whose penalty is the norm of a linear map.

    That norm is the largest absolute sum of a row (∞-norm) or of a column (1-norm). Its gradient is sign(w) there, and
    zero elsewhere.

    Args:
        weight: a matrix.
        dim: along which the sums are compared; each is over the other dimension.
    Returns:
        In the shape of the weight, with one row or column that is not zero.
    """
    line = int(weight.abs().sum(1 - dim).argmax())
    gradient = torch.zeros_like(weight)
    gradient.select(dim, line).copy_(weight.select(dim, line).sign())
    return gradient


def scale_shift_invariant(weight: Tensor, norms: float, direction: float) -> Tensor:
    """The gradient of the weight-scale-shift invariant penalty (WEISSI; Liu, Cui and Chan, arXiv 2008.02965).

    The penalty of a model with matrices W_l is, in Frobenius norms,

        λ1·log Π_l ‖W_l‖ + λ2·Σ_l ‖W_l/‖W_l‖‖_1

    It stays as it is where one matrix is divided by a number and another one multiplied by it.

    Args:
        weight: one of the matrices.
        norms: λ1, of the logarithm of the product of norms.
        direction: λ2, of the L1 norm of the direction, which alone prefers small weights over large ones.
    Returns:
        λ1·W/‖W‖² + λ2·(sign(W)/‖W‖ − ‖W‖_1·W/‖W‖³), in the shape of the weight; zero for a matrix of zeros.
    """
    norm = weight.norm().clamp_min(torch.finfo(weight.dtype).eps)
    unit = weight / norm
    return (norms * unit + direction * (weight.sign() - unit.abs().sum() * unit)) / norm
