"""Shared by the tests: all that a run goes on with, bit for bit, on a rank and put together from all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from helpers.engines import Engine, ended, gathered
from lp_dist.attachment.attach import Attachment


def as_bytes(value: Any) -> Any:
    """A tensor bit for bit, by which 0 and -0 differ and nan equals itself."""
    if not isinstance(value, Tensor):
        return value
    value = value.to_local() if hasattr(value, "to_local") else value.detach()
    return str(value.dtype), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(engine: Engine, attachment: Attachment) -> dict[str, Any]:
    """All that a run goes on with, on this rank: weights, masters, states, step counts, groups, learning rates.

    But not the padding: under ZeRO-3 it is whatever the memory held before.
    """
    taken = {name: as_bytes(weight) for name, weight in gathered(engine).items()}
    for shard in attachment.shards:
        taken |= {
            f"master of {shard.name}": as_bytes(shard.local.values),
            **{f"{key} of {shard.name}": as_bytes(value) for key, value in shard.state.items()},
        }
    for i, state in enumerate(attachment.optimizer.state.values()):
        taken |= {f"{key} of tensor {i}": as_bytes(value) if key == "step" else "" for key, value in state.items()}
    for i, group in enumerate(attachment.optimizer.param_groups):
        taken |= {f"{key} of group {i}": value for key, value in group.items() if key != "params"}
    return taken | {"scheduler": str(engine.lr_scheduler.state_dict())}


def joined(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Masters and moments joined from the ranks' shards, flat, by what they are of."""
    tensors: dict[str, dict[int, Tensor]] = {}
    for rank in ranks:
        for name, start, values in rank["shards"]:
            tensors.setdefault(name, {})[start] = values
    return {
        name: torch.cat([by_start[start] for start in sorted(by_start)]) for name, by_start in sorted(tensors.items())
    }


def local_shards_of(attachment: Attachment) -> list[tuple[str, int, Tensor]]:
    return [
        (shard.name, shard.start, shard.local.values.flatten().clone()) for shard in attachment.shards if shard.length
    ]


def results_of(engine: Engine, attachment: Attachment) -> dict[str, Any]:
    """What a finished run is compared by, on this rank. Ends the engine."""
    results = {
        "shards": local_shards_of(attachment),
        "model": gathered(engine),
        "state": json.dumps(attachment.state_dict()),
    }
    ended(engine)
    return results


def check_one_process(
    ranks: list[dict[Any, dict[str, Any]]], cases: Iterable[Any], alone: Callable[[Any], Any]
) -> None:
    """Asserts that all ranks together come to the masters of one process, bit for bit, and each to its state.

    Args:
        ranks: of each rank {case: its `results_of`}.
        cases: to compare.
        alone: gives the results of one process.
    """
    for case in cases:
        wanted = joined([{"shards": alone(case)["shards"]}])
        masters = joined([{"shards": rank[case]["shards"]} for rank in ranks])
        for name, weights in wanted.items():
            assert masters[name].flatten().equal(weights.flatten()), f"{case}: {name}"
        assert all(rank[case]["state"] == alone(case)["state"] for rank in ranks), case
