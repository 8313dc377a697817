"""Patterns along the inputs of every layout on shards: ZeRO-1, 2, 3 and FSDP2 come to the same bits as one process,
and to the pattern, wherever shards end.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers.engines import Engine, gathered, make, quiet
from helpers.layouts import DIMS, LEFT_OUT, WIDTH, in_blocks, layers_of
from helpers.snapshots import joined
from helpers.targets import decaying
from lp_dist import LpAdamW, attach, param_groups
from lp_dist.attachment.attach import Attachment
from lp_dist.optim.nm import block_stride, parse_pattern
from lp_dist.sparsity import quantiles

STEPS, SAMPLE = 15, 256


class Case(NamedTuple):
    """engine: a kind of `helpers.engines.make`. how: to a target ("global", "layer"), or "by hand", with a λ."""

    engine: str
    pattern: str = "2:4"
    how: str = "global"


CASES = [
    Case("zero1"),
    Case("zero2", "2:4", "layer"),
    Case("zero3", "4:8"),
    Case("fsdp2", "4:8"),
    Case("zero3", "4:8", "by hand"),
    Case("fsdp2", how="by hand"),
]


def engine_of(case: Case) -> Engine:
    def optimizer_of(model: nn.Module) -> Any:
        if case.how == "by hand":
            return LpAdamW(param_groups(model, 0.5, pattern=case.pattern), lr=5e-3, precondition=0.5)
        return LpAdamW(param_groups(model, 0.0), lr=5e-3)

    return make(
        case.engine,
        layers_of(),
        optimizer_of,
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, STEPS),
    )


def attached_to(engine: Engine, case: Case) -> Attachment:
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    if case.how == "by hand":
        return attach(engine.handle, **others)
    target = decaying(pattern=case.pattern, scope=case.how, update_every=2)
    return attach(engine.handle, target=target, total_steps=STEPS, **others)


def loss_of(engine: Engine, step: int, rank: int) -> Tensor:
    """Of which the gradients are small integers whatever the weights are, so that averages over ranks are exact."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    predictions = engine(torch.randint(-1, 2, (4, WIDTH), generator=generator).float())
    slopes = torch.randint(-1, 2, (4, predictions.shape[1]), generator=generator).float()
    return (predictions * (4 * slopes / 64)).sum()


def followed(case: Case, world: int) -> dict[str, Any]:
    quantiles.SAMPLE_SIZE, before = SAMPLE, quantiles.SAMPLE_SIZE
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    for step in range(STEPS):
        if case.engine == "plain":
            for rank in range(world - 1):
                (loss_of(engine, step, rank) / world).backward()
            engine.step(loss_of(engine, step, world - 1) / world)
        else:
            engine.step(loss_of(engine, step, torch.distributed.get_rank()))
        attachment.after_step()
    quantiles.SAMPLE_SIZE = before
    m = parse_pattern(case.pattern)[1]
    results = {
        "shards": [
            (f"{key} of {shard.name}", shard.start, values.flatten().clone())
            for shard in attachment.shards
            if shard.length
            for key, values in {"master": shard.local.values, **shard.state}.items()
        ],
        "model": gathered(engine),
        "state": json.dumps(attachment.state_dict()),
        "inside": [
            shard.name
            for shard in attachment.shards
            if shard.length and shard.name in DIMS and shard.start % (m * block_stride(shard.shape, DIMS[shard.name]))
        ],
    }
    if hasattr(engine.handle, "destroy"):
        engine.handle.destroy()
    return results


@cache
def alone(pattern: str, how: str, world: int) -> dict[str, Any]:
    return followed(Case("plain", pattern, how), world)


def on_ranks(rank: int, world_size: int) -> dict[Case, dict[str, Any]]:
    quiet()
    return {case: followed(case, world_size) for case in CASES}


@pytest.fixture(scope="module")
def results(rank_pool) -> list[dict[Case, dict[str, Any]]]:
    return rank_pool(on_ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_are_one_process_bit_for_bit(results, case):
    single = alone(case.pattern, case.how, 2)
    sharded, expected = joined([rank[case] for rank in results]), joined([single])
    assert sharded.keys() == expected.keys() and len(sharded) >= 30
    differs = [key for key in sharded if not sharded[key].equal(expected[key])]
    assert not differs, differs
    assert all(rank[case]["state"] == single["state"] for rank in results)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_block_ends_in_the_pattern_and_what_has_none_is_dense(results, case):
    n, m = parse_pattern(case.pattern)
    weights = results[0][case]["model"]
    for name, dim in DIMS.items():
        alive = (in_blocks(weights[name], dim, m) != 0).sum(1)
        assert (alive >= n).all() and (case.how == "by hand" or (alive == n).all()), name
        assert (alive == n).any() or case.how == "by hand", name
    assert all((weights[name] != 0).all() for name in LEFT_OUT)


def test_some_blocks_do_lie_on_several_ranks(results):
    inside = {case: {name for rank in results for name in rank[case]["inside"]} for case in CASES}
    # Of ZeRO-3 a shard of each parameter; of ZeRO-1 and 2 there is one border in all.
    assert {name for case in CASES if case.engine == "zero3" for name in inside[case]} >= {
        "0.weight", "1.matrices", "3.layer.weight", "6.weight",
    }  # fmt: skip
    assert inside[Case("fsdp2", "4:8")] == {"0.weight"}, "rows of the inputs: 12 and 12"
