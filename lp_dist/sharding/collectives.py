"""Small reductions and exchanges over all ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many ranks there are; (0, 1) without a process group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_simulated() -> bool:
    """Whether the other ranks are only made up (torch's fake process group), so that sums over them mean nothing."""
    return torch.distributed.is_initialized() and torch.distributed.get_backend() == "fake"


def reduction_device() -> torch.device:
    """The device on which a tensor must lie to be reduced over the ranks.

    NCCL accepts no CPU tensor, and gloo is meant for the CPU.
    """
    if torch.accelerator.is_available() and torch.distributed.get_backend() != "gloo":
        device = torch.accelerator.current_accelerator()
        if device is not None:
            return device
    return torch.device("cpu")


def all_reduce_sum(counts: Tensor) -> Tensor:
    """Sums a small tensor elementwise over all ranks. Collective: every rank must call it.

    Args:
        counts: int64, any shape, the same on every rank.
    Returns:
        The sum, of the same shape, on `reduction_device()`. Without a process group it is `counts` itself.
    """
    if torch.distributed.is_initialized() and counts.numel():
        counts = counts.to(reduction_device())
        torch.distributed.all_reduce(counts)
    return counts


def all_reduce_max(numbers: Tensor) -> Tensor:
    """Takes the elementwise maximum of a small tensor over all ranks. Collective: every rank must call it.

    Args:
        numbers: int64 or uint8, any shape, the same on every rank.
    Returns:
        The maximum, of the same shape, on the CPU.
    """
    if torch.distributed.is_initialized() and numbers.numel():
        numbers = numbers.to(reduction_device())
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return numbers.cpu()


def all_gather_numbers(numbers: Tensor) -> Tensor:
    """Gathers a small tensor from each rank. Collective: every rank must call it.

    Args:
        numbers: int64 [count], the same count on every rank.
    Returns:
        int64 [ranks, count], on the CPU.
    """
    if not torch.distributed.is_initialized():
        return numbers[None]
    numbers = numbers.to(reduction_device())
    gathered = numbers.new_empty(torch.distributed.get_world_size() * numbers.numel())
    torch.distributed.all_gather_into_tensor(gathered, numbers)
    return gathered.view(-1, numbers.numel()).cpu()


def all_gather_objects(value: Any) -> list[Any]:
    """Gathers one object from each rank. Collective: every rank must call it.

    Args:
        value: small, and it can be pickled.
    Returns:
        The values of all ranks, by rank.
    """
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def assert_same_on_all_ranks(settings: dict[str, Any] | Exception) -> None:
    """Checks that all ranks give the optimizer the same settings. Collective: every rank must call it.

    It takes one reduction of sixteen numbers. The settings themselves are exchanged only where their digests differ,
    or a rank failed: they are some ten kilobytes, from each rank to every other.

    Args:
        settings: what this rank is going to do, or the error with which it failed. A rank that failed must call this
            too, so that the others do not wait for it.
    Raises:
        RuntimeError: the ranks disagree, or another rank failed. All ranks raise it, except those that failed: they
            have an error of their own to raise.
    """
    if _is_same_everywhere(settings):
        return
    per_rank = all_gather_objects(str(settings) if isinstance(settings, Exception) else settings)
    if isinstance(settings, Exception):
        return  # the caller raises it, and it says more
    for rank, other in enumerate(per_rank):
        if isinstance(other, str):
            raise RuntimeError(f"rank {rank} could not attach its optimizer: {other}")
        only_one_has = sorted(key for key in set(per_rank[0]) ^ set(other) if key.startswith("param group of "))
        if only_one_has:
            raise RuntimeError(
                f"ranks disagree: {only_one_has[0]} is known to one of the ranks 0 and {rank} alone, so their"
                " optimizers step other parameters. Where that is meant, as by torch's ZeroRedundancyOptimizer,"
                " lp_dist can't count them: use DeepSpeed's ZeRO-1 or FSDP2. Else start every rank with the same"
                " script and config"
            )
        for key in sorted(set(per_rank[0]) | set(other)):
            if per_rank[0].get(key) != other.get(key):
                raise RuntimeError(
                    f"ranks disagree: {key} is {per_rank[0].get(key)!r} on rank 0 and {other.get(key)!r} on rank "
                    f"{rank}; start every rank with the same script and config"
                )


def _is_same_everywhere(settings: dict[str, Any] | Exception) -> bool:
    """Whether all ranks have settings of the same digest, or all of them failed; False for some that are equal and
    print otherwise (1 and 1.0). The same on every rank. Collective.
    """
    text = "" if isinstance(settings, Exception) else repr(sorted(settings.items()))
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int32).long()
    # The least of the numbers is minus the largest of the negative ones.
    maximum, negated = all_reduce_max(torch.stack([digest, -digest]))
    return torch.equal(maximum, -negated)
