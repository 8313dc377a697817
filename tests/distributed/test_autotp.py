"""DeepSpeed's AutoTP with ZeRO: four ranks, two of them for the tensors, come to the bits of one process with a target,
a pattern and groups; counted once each, resumed bit for bit.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.deepspeed_axes import SLICES, SideBySide, engine_of, loss_of, put_together
from helpers.engines import Engine, ended, quiet
from lp_dist import LpAdamW, SparsityTarget, attach, measure_histogram, measure_sparsity, param_groups
from lp_dist.attachment.attachment import Attachment
from lp_dist.structured.resolve import groups_of

STEPS, HALF = 15, 8
SHAPES = {name: param.shape for name, param in SideBySide().named_parameters()}


class Case(NamedTuple):
    """stage: of ZeRO. how: "global" or "layer" (of a target), a pattern, "groups", or "by hand", with a λ."""

    stage: str
    how: str


CASES = [
    Case("zero0", "layer"),
    Case("zero0", "4:8"),
    Case("zero1", "global"),
    Case("zero1", "2:4"),
    Case("zero1", "groups"),
    Case("zero2", "layer"),
    Case("zero2", "2:4"),
    Case("zero2", "by hand"),
    Case("zero3", "global"),
    Case("zero3", "groups"),
]
RESUMED = [Case("zero1", "2:4"), Case("zero2", "layer")]


def optimizer_of(case: Case) -> Any:
    def made(model: SideBySide) -> LpAdamW:
        if case.how == "by hand":
            return LpAdamW(param_groups(model, 0.02), lr=5e-3, precondition=0.5)
        return LpAdamW(param_groups(model, 0.0), lr=5e-3)

    return made


def scheduler_of(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, STEPS)


def attached_to(engine: Engine, case: Case) -> Attachment:
    is_sharded = hasattr(engine.handle, "load_checkpoint")
    others = {} if is_sharded else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    if case.how == "by hand":
        return attach(engine.handle, **others)
    if case.how == "groups":
        # Rows of a matrix that AutoTP divides unevenly, and columns of one that it divides by columns.
        model = engine.handle.module if is_sharded else engine.handle
        sets = groups_of(model, outputs="up", kind="rows") + groups_of(model, inputs="down", kind="columns")
        target = SparsityTarget(0.4, groups=sets, update_every=2, start=2, end=12, precondition=0.0)
        return attach(engine.handle, target=target, total_steps=STEPS, **others)
    pattern = case.how if ":" in case.how else None
    target = SparsityTarget(
        None if pattern else 0.5, pattern=pattern, scope="layer" if case.how == "layer" else "global", update_every=2
    )
    return attach(engine.handle, target=target, total_steps=STEPS, **others)


def train(engine: Engine, attachment: Attachment, steps: range, rank: int) -> None:
    for step in steps:
        engine.step(loss_of(engine, step, rank // 2, rank % 2))
        attachment.after_step()


def results_of(engine: Engine, attachment: Attachment) -> dict[str, Any]:
    return {
        "slices": {
            shard.name: (shard.param.shape if not hasattr(shard.param, "ds_shape") else shard.param.ds_shape)
            for shard in attachment.shards
        },
        "shards": [
            (f"{key} of {shard.name}", shard.name, shard.start, values.flatten().clone())
            for shard in attachment.shards
            if shard.length
            for key, values in {"master": shard.local.values, **shard.state}.items()
        ],
        "state": json.dumps(attachment.state_dict()),
        "counts": measure_sparsity(engine.handle).counts,
        "masters": measure_sparsity(engine.handle, engine.handle.optimizer).counts,
        "histogram": measure_histogram(engine.handle).zeros,
        "all": measure_sparsity(engine.handle, names=[*SHAPES]).counts,
    }


def on_a_rank(rank: int, world_size: int, directory: Path) -> dict[Case, dict[str, Any]]:
    quiet()
    results = {}
    for case in CASES:
        engine = engine_of(case.stage, optimizer_of(case), scheduler_of)
        attachment = attached_to(engine, case)
        train(engine, attachment, range(HALF), rank)
        if case in RESUMED:
            engine.save(directory / str(CASES.index(case)), "half")
        train(engine, attachment, range(HALF, STEPS), rank)
        results[case] = results_of(engine, attachment)
        ended(engine)
        if case in RESUMED:
            engine = engine_of(case.stage, optimizer_of(case), scheduler_of)
            attachment = attached_to(engine, case)
            engine.load(directory / str(CASES.index(case)), "half")
            train(engine, attachment, range(HALF, STEPS), rank)
            results[case]["resumed"] = results_of(engine, attachment)["shards"]
            ended(engine)
    return results


@cache
def alone(case: Case) -> dict[str, Any]:
    """One process: what becomes of the weights, the controller's state, and what is counted."""
    model = SideBySide()
    optimizer = optimizer_of(case)(model)
    engine = Engine(model, optimizer, scheduler_of(optimizer))
    attachment = attached_to(engine, case)
    for step in range(STEPS):
        (loss_of(model, step, 0) / 2).backward()
        engine.step(loss_of(model, step, 1) / 2)
        attachment.after_step()
    states = {name: optimizer.state[param] for name, param in model.named_parameters()}
    tensors = {f"master of {name}": param.detach() for name, param in model.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{key} of {name}": state[key] for name, state in states.items()}
    return {
        "tensors": tensors,
        "state": json.dumps(attachment.state_dict()),
        "counts": measure_sparsity(model).counts,
        "all": measure_sparsity(model, names=[*SHAPES]).counts,
    }


def tensors_of(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Masters and moments, put together from the ranks' shards."""
    parts_of: dict[str, dict[int, dict[int, Tensor]]] = {}
    names = {}
    for rank, result in enumerate(ranks):
        for key, name, start, values in result["shards"]:
            names[key] = name
            parts_of.setdefault(key, {}).setdefault(rank % 2, {})[start] = values
    return {
        key: put_together(
            names[key],
            SHAPES[names[key]],
            [
                (index, torch.cat([parts[start] for start in sorted(parts)]), ranks[index]["slices"][names[key]])
                for index, parts in by_index.items()
            ],
        )
        for key, by_index in parts_of.items()
    }


@pytest.fixture(scope="module")
def results(module_ranks, tmp_path_factory) -> list[dict[Case, dict[str, Any]]]:
    return module_ranks(on_a_rank, 4, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices_of_two_ranks_are_one_process_bit_for_bit(results, case):
    ranks, single = [rank[case] for rank in results], alone(case)
    tensors = tensors_of(ranks)
    assert tensors.keys() == single["tensors"].keys() and len(tensors) == 3 * len(SHAPES)
    differs = [key for key in tensors if not tensors[key].equal(single["tensors"][key])]
    assert not differs, differs
    assert all(rank["state"] == single["state"] for rank in ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_element_is_counted_once(results, case):
    single = alone(case)
    assert {name: elements for name, (_, elements) in single["all"].items()} == {
        name: shape.numel() for name, shape in SHAPES.items()
    }
    for rank in results:
        assert rank[case]["counts"] == single["counts"] == rank[case]["masters"]
        assert rank[case]["all"] == single["all"]
        assert rank[case]["histogram"] == {name: zeros for name, (zeros, _) in single["counts"].items()}
    assert 0 < sum(zeros for zeros, _ in single["counts"].values()) < sum(n for _, n in single["counts"].values())


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(results, case):
    for rank in results:
        for (key, _, start, values), (key_, _, start_, resumed) in zip(rank[case]["shards"], rank[case]["resumed"]):
            assert (key, start) == (key_, start_) and values.equal(resumed), key


def test_slices_are_uneven_and_begin_inside_of_rows(results):
    starts = [start for rank in results for _, name, start, _ in rank[Case("zero1", "2:4")]["shards"] if start]
    assert starts and results[0][CASES[0]]["slices"]["up.weight"] != results[1][CASES[0]]["slices"]["up.weight"]
    assert {name for name in SHAPES if results[0][CASES[0]]["slices"][name] != SHAPES[name]} == {*SLICES}
