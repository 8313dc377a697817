"""The fused step: the base's step and the decay in one pass over memory. `cpu` is C++, built on first use; `triton` is
Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lp_dist.optim.batching import StepRow

LARGEST_GAMMA = 8.0  # the power's exponent is exact up to here; (√v̂+ε)^γ has left fp32's range long before
_WEIGHTS = (torch.float32, torch.bfloat16)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
_MODULES = {"cpu": "lp_dist.optim.kernels.cpu", "cuda": "lp_dist.optim.kernels.triton"}

# Rows, with the hyperparameters that hold for them.
ValuedRows = list[tuple[Mapping[str, Any], list[StepRow]]]


class Unavailable(Exception):
    """The fused step can't run on a kind of device here; its message says why."""


@cache
def _module(device_type: str) -> ModuleType | Unavailable:
    if device_type not in _MODULES:
        return Unavailable(f"there is none for {device_type} tensors, only for {' and '.join(_MODULES)}")
    try:
        module = importlib.import_module(_MODULES[device_type])
        module.prepare()
    except ImportError as error:
        return Unavailable(f"it needs triton there ({error})")
    except Unavailable as error:
        return error
    return module


def unavailable(device: torch.device) -> str | None:
    """Why the fused step can't run on tensors of `device`; None if it can. The first call for the CPU builds it."""
    module = _module(device.type)
    return str(module) if isinstance(module, Unavailable) else None


def refusal(row: StepRow, blocks: bool = False) -> str | None:
    """What keeps a row from the fused step; None if nothing does. blocks: whether it has an N:M pattern's."""
    weights, grads = row.weights, row.grads
    dtype, alike = weights.dtype, weights.is_contiguous() and grads.is_contiguous()
    if dtype not in _WEIGHTS:
        return f"weights of {dtype}; it takes float32 and bfloat16"
    if grads.dtype not in _GRADIENTS:
        return f"gradients of {grads.dtype}; it takes float32, bfloat16 and float16"
    for state in row.states:
        if state.dtype is not dtype:
            return f"state of {state.dtype} for weights of {dtype}; it takes both in one dtype"
        alike = alike and state.is_contiguous()
    if blocks and not weights.is_contiguous():
        return (
            f"blocks of a pattern that don't lie one after the other (weights of shape {tuple(weights.shape)}, stride"
            f" {weights.stride()})"
        )
    # A part of a row is known by its place in the order of the dimensions, which is that in memory only if contiguous.
    if not alike and (row.span is not None or not _laid_out_alike(row.tensors)):
        return (
            f"tensors that lie in memory in different ways, or with gaps (weights of shape {tuple(weights.shape)},"
            f" stride {weights.stride()})"
        )
    return None


def _laid_out_alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors fill memory without gaps and in the same order, as channels-last ones do: then they can be
    walked flat.
    """
    first = tensors[0]
    strides = first.stride()
    order = sorted(range(first.ndim), key=lambda i: (-strides[i], i))
    return all(t.stride() == strides for t in tensors) and first.permute(order).is_contiguous()


def step(device_type: str, base: str, valued_rows: ValuedRows) -> None:
    """One step of `base` ("adamw", "sgd", "lion") for rows on one kind of device, each list of them with the values
    that hold for it.

    Every row has passed `refusal`, and the device is not `unavailable`. Weights and state are changed in place.
    """
    module = _module(device_type)
    assert not isinstance(module, Unavailable)
    module.step(base, valued_rows)


def pull(device_type: str, base: str, values: Mapping[str, Any], row: StepRow) -> Tensor:
    """αλ/x of each weight of a row with a pattern, in fp32: the very numbers by which a step ranks it in its block.
    The row is used up.
    """
    weights = row.weights.float()
    ranked = StepRow(weights, row.grads, tuple(state.float() for state in row.states), row.step)
    step(device_type, base, [({**values, "ranked": True}, [ranked])])
    return weights
