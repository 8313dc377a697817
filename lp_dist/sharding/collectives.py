"""Small reductions and exchanges over all ranks."""

from __future__ import annotations

from typing import Any

import torch


def reduction_device() -> torch.device:
    """Where a tensor must lie to be reduced over the ranks: NCCL takes none on the CPU, and gloo is for the CPU."""
    if torch.accelerator.is_available() and torch.distributed.get_backend() != "gloo":
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def summed(counts: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a small tensor of integers; every rank must call it. The tensor itself where there is
    one process.
    """
    if torch.distributed.is_initialized() and counts.numel():
        counts = counts.to(reduction_device())
        torch.distributed.all_reduce(counts)
    return counts


def largest(numbers: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over all ranks of a small tensor of integers, on the CPU; every rank must call it."""
    if torch.distributed.is_initialized() and numbers.numel():
        numbers = numbers.to(reduction_device())
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return numbers.cpu()


def everyones(told: Any) -> list[Any]:
    """What each rank tells, by rank; every rank must call it. Small things that pickle."""
    if not torch.distributed.is_initialized():
        return [told]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, told)
    return everyone


def agree(told: dict[str, Any] | Exception) -> None:
    """Raises RuntimeError, on every rank, if ranks disagree on what the optimizer is to do, or if another one
    failed.
    """
    everyone = everyones(str(told) if isinstance(told, Exception) else told)
    if isinstance(told, Exception):
        return  # its own error says more
    for rank, other in enumerate(everyone):
        if isinstance(other, str):
            raise RuntimeError(f"rank {rank} could not attach its optimizer: {other}")
        for key in sorted(set(everyone[0]) | set(other)):
            if everyone[0].get(key) != other.get(key):
                raise RuntimeError(
                    f"ranks disagree: {key} is {everyone[0].get(key)!r} on rank 0 and {other.get(key)!r} on rank "
                    f"{rank}; start every rank with the same script and config"
                )
