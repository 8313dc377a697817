"""Helpers of the tests of quantiles: slices, shards, drawn numbers, and ranks that are threads."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from lp_dist.sharding.shards import Shard
from lp_dist.sparsity import census, quantiles
from lp_dist.sparsity.quantiles import ScoredSlice

quick = settings(max_examples=150, deadline=None, derandomize=True)
SMALLEST = 2.0**-149  # the smallest denormal of fp32
AWKWARD = (0.0, -0.0, SMALLEST, -1e-40, 1e-38, 1e-13, 0.25, -0.25, 0.2500001, 1.0, -1.0, 3.0, 1e20, 3e38, -3e38)
number = st.one_of(
    st.sampled_from(AWKWARD),
    st.floats(-4.0, 4.0, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
vector = st.lists(number, min_size=1, max_size=40)


def scored_slice(scope: str, weights, p: float = 1.0, exp_avg_sq=None, **values) -> ScoredSlice:
    """With p = 1 and nothing else the saliency is |w|, so that numpy can sort it."""
    return ScoredSlice(
        scope, torch.as_tensor(weights, dtype=torch.float32), exp_avg_sq, {"p": p, **values}, values.get("step", 0.0)
    )


def ordered(x) -> np.ndarray:
    return np.sort(np.abs(np.asarray(x, dtype=np.float32)))


def cut(flat: torch.Tensor, fractions: list[float]) -> list[tuple[int, int]]:
    """The ranges between `fractions` of a tensor: first element, and the one after the last."""
    edges = [0, *sorted(round(fraction * flat.numel()) for fraction in fractions), flat.numel()]
    return list(zip(edges, edges[1:]))


@contextmanager
def meeting(ranks: int):
    """Ranks that are threads: within it reductions are over them. Gives a function that runs one per rank."""
    barrier, current, slots = threading.Barrier(ranks, timeout=30), threading.local(), [None] * ranks

    def all_gather(counts: torch.Tensor) -> torch.Tensor:
        slots[current.rank] = counts.clone()
        barrier.wait()
        gathered = torch.stack(slots)
        barrier.wait()
        return gathered

    def all_reduce_sum(counts: torch.Tensor) -> torch.Tensor:
        return all_gather(counts).sum(0, dtype=counts.dtype)

    def all_reduce_max(numbers: torch.Tensor) -> torch.Tensor:
        return all_gather(numbers).amax(0)

    def run(functions):
        results = [None] * ranks

        def run_rank(rank: int) -> None:
            current.rank = rank
            results[rank] = functions[rank]()

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    with (
        mock.patch.object(quantiles, "all_reduce_sum", all_reduce_sum),
        mock.patch.object(census, "all_reduce_sum", all_reduce_sum),
        mock.patch.object(census, "all_reduce_max", all_reduce_max),
    ):
        yield run


def shard_of(flat: torch.Tensor, shape: tuple[int, ...], first: int, last: int, gap: int = 0, **replica: int) -> Shard:
    """Elements first to last of the parameter, inside a tensor with `gap` other elements on both sides."""
    tensor = torch.cat([torch.ones(gap), flat[first:last], torch.ones(gap)])
    return Shard("w", flat, torch.Size(shape), first, tensor, gap, last - first, 0, lambda _: {}, **replica)
