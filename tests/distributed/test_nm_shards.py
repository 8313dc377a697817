"""Blocks of a pattern that lie on several ranks: every engine comes to the same bits as one process, and to the
pattern, also when resumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.engines import Engine, gathered, make, quiet
from helpers.snapshots import joined
from helpers.target_runs import BF16
from helpers.targets import decaying
from lp_dist import LpAdamW, LpLion, attach, param_groups
from lp_dist.attachment.attach import Attachment
from lp_dist.optim.nm import parse_pattern, split_at_blocks
from lp_dist.sparsity import quantiles

STEPS, STOP, SAMPLE = 14, 6, 512
# [inputs, outputs], with uneven numbers of blocks, so that halves end inside of them; 3.weight is one block. A
# target's updates sample some of the blocks.
SIZES = {"2:4": ((60, 51), (20, 7), (12, 9), (4, 1), (28, 1)), "4:8": ((72, 41), (40, 7), (24, 9), (8, 1), (40, 1))}


class Side(nn.Sequential):
    """Layers side by side, each with its part of the inputs, so that their sizes may be uneven."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([layer(inputs[:, : layer.in_features]) for layer in self], dim=1)


@dataclass(frozen=True)
class Case:
    """engine: a kind of `engines_under_test.make`. how: to a target ("global", "layer") or "by hand", with a λ. dtype:
    by DeepSpeed's config.
    """

    engine: str
    pattern: str = "2:4"
    how: str = "global"
    dtype: str = "fp32"
    world: int = 2

    @property
    def divides(self) -> bool:
        return self.engine not in ("ddp", "fsdp2", "plain")


CASES = [
    Case("ddp"),
    Case("fsdp2"),
    Case("zero1"),
    Case("zero2"),
    Case("zero3"),
    Case("zero2", "4:8", "layer"),
    Case("zero3", "4:8", "layer"),
    Case("zero3", how="by hand"),
    Case("bf16_optimizer", dtype="bf16"),
]
THREE = [Case("zero2", world=3), Case("zero3", "4:8", "layer", world=3), Case("fsdp2", world=3)]
RESUMED = [Case("fsdp2"), Case("zero1"), Case("zero3")]


def model_of(pattern: str) -> Side:
    """Weights that bf16 holds exactly, so there are equal ones, and so that all dtypes start alike."""
    torch.manual_seed(0)
    model = Side(*(nn.Linear(*size, bias=i == 0) for i, size in enumerate(SIZES[pattern])))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    return model


def engine_of(case: Case) -> Engine:
    def optimizer_of(model: nn.Module) -> Any:
        if case.how == "by hand":  # foreach has an arithmetic of its own
            return LpAdamW(
                param_groups(model, 0.5), lr=5e-3, precondition=0.5, pattern=case.pattern, implementation="foreach"
            )
        if case.how == "layer":
            return LpLion(param_groups(model, 0.0), lr=1e-3, p=0.0)
        return LpAdamW(param_groups(model, 0.0), lr=5e-3)

    return make(
        case.engine,
        model_of(case.pattern),
        optimizer_of,
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, STEPS),
        **(BF16 if case.dtype == "bf16" and case.engine.startswith("zero") else {}),
    )


def attached_to(engine: Engine, case: Case) -> Attachment:
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    if case.how == "by hand":
        return attach(engine.handle, **others)
    return attach(
        engine.handle,
        target=decaying(pattern=case.pattern, scope=case.how, update_every=2),
        total_steps=STEPS,
        **others,
    )


def loss_of(engine: Engine, case: Case, step: int, rank: int) -> Tensor:
    """Of which the gradients are small integers whatever the weights are, so that averages over 1, 2 or 3 ranks
    are exact in any dtype.
    """
    generator = torch.Generator().manual_seed(10 * step + rank)
    outputs = sum(size[1] for size in SIZES[case.pattern])
    inputs, slopes = (
        torch.randint(-1, 2, (4, n), generator=generator).float() for n in (SIZES[case.pattern][0][0], outputs)
    )
    predictions = engine(inputs.to(next(engine.handle.parameters()).dtype))
    return (predictions.float() * (6 * slopes / 64)).sum()


def trained(engine: Engine, attachment: Attachment, case: Case, start: int, until: int) -> None:
    for step in range(start, until):
        if case.engine == "plain":
            for rank in range(case.world - 1):
                (loss_of(engine, case, step, rank) / case.world).backward()
            engine.step(loss_of(engine, case, step, case.world - 1) / case.world)
        else:
            engine.step(loss_of(engine, case, step, torch.distributed.get_rank()))
        attachment.after_step()


def shards_of(attachment: Attachment) -> list[tuple[str, int, Tensor]]:
    return [
        (f"{key} of {shard.name}", shard.start, values.flatten().clone())
        for shard in attachment.shards
        if shard.length
        for key, values in {"master": shard.local.values, **shard.state}.items()
    ]


def results_of(engine: Engine, attachment: Attachment, case: Case) -> dict[str, Any]:
    m = parse_pattern(case.pattern)[1]
    ends = [
        (shard.name, shard.start + at)
        for shard in attachment.shards
        if shard.length and shard.name.endswith("weight")
        for head, middle in [split_at_blocks(shard.start, shard.length, m)]
        for at, length in ((0, head), (head + middle, shard.length - head - middle))
        if length
    ]
    results = {
        "shards": shards_of(attachment),
        "model": gathered(engine),
        "state": json.dumps(attachment.state_dict()),
        "ends": ends,
    }
    if hasattr(engine.handle, "destroy"):
        engine.handle.destroy()
    return results


def followed(case: Case) -> dict[str, Any]:
    assert quantiles.SAMPLE_SIZE == SAMPLE
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, STEPS)
    return results_of(engine, attachment, case)


@cache
def alone(pattern: str, how: str, world: int) -> dict[str, Any]:
    return followed(Case("plain", pattern, how, world=world))


def resumed(case: Case, directory: Path) -> dict[str, Any]:
    """Saved in the middle of the window, and gone on with by new objects."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, STOP)
    engine.save(directory, case.engine)
    state = json.loads(json.dumps(attachment.state_dict()))
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    engine.load(directory, case.engine)
    if not hasattr(engine.handle, "load_checkpoint"):
        attachment.load_state_dict(state)
    trained(engine, attachment, case, STOP, STEPS)
    return results_of(engine, attachment, case)


def on_ranks(rank: int, world_size: int, directory: Path) -> dict[str, dict[Case, dict[str, Any]]]:
    quiet()
    quantiles.SAMPLE_SIZE = SAMPLE
    results = {"runs": {case: followed(case) for case in (CASES if world_size == 2 else THREE)}}
    return results | {"resumed": {case: resumed(case, directory) for case in RESUMED if world_size == 2}}


_results: dict[int, list[Any]] = {}


@pytest.fixture
def results(run_ranks, tmp_path, tmp_path_factory):
    """`results(world)` → by rank what `on_ranks` tells, run once."""

    def of(world: int) -> list[Any]:
        if world not in _results:
            for left in tmp_path.iterdir():  # where the next ranks could meet the last ones
                left.unlink()
            _results[world] = run_ranks(on_ranks, world, tmp_path_factory.mktemp("checkpoints"))
        return _results[world]

    return of


@pytest.mark.parametrize("world", [2, 3])
def test_shards_are_one_process_bit_for_bit(results, world, monkeypatch):
    monkeypatch.setattr(quantiles, "SAMPLE_SIZE", SAMPLE)
    ranks = results(world)
    for case, _run in ranks[0]["runs"].items():
        single = alone(case.pattern, case.how, world)
        sharded, wanted = joined([rank["runs"][case] for rank in ranks]), joined([single])
        assert sharded.keys() == wanted.keys() and len(sharded) >= 12, case
        differs = [key for key in sharded if not sharded[key].equal(wanted[key])]
        assert not differs, f"{case}: {differs}"
        assert all(rank["runs"][case]["state"] == single["state"] for rank in ranks), case


@pytest.mark.parametrize("world", [2, 3])
def test_some_blocks_do_lie_on_several_ranks(results, world):
    ranks, names = results(world), set()
    for case in ranks[0]["runs"]:
        ends = [end for rank in ranks for end in rank["runs"][case]["ends"]]
        assert bool(ends) == case.divides, case
        names |= {name for name, _ in ends} if case.engine == "zero3" else set()
        if world == 3 and case.pattern == "4:8":
            assert len([name for name, _ in ends if name == "3.weight"]) == 3, "a block on three ranks"
    assert names >= ({"0.weight", "1.weight", "2.weight", "3.weight"} if world == 2 else {"1.weight", "3.weight"})


@pytest.mark.parametrize("world", [2, 3])
def test_each_block_ends_in_the_pattern_in_masters_and_copies(results, world):
    ranks = results(world)
    for case, run in ranks[0]["runs"].items():
        n, m = parse_pattern(case.pattern)
        masters = joined([rank["runs"][case] for rank in ranks])
        for name, weight in run["model"].items():
            master = masters[f"master of {name}"]
            assert (weight.flatten() == 0).equal(master == 0), (case, name)
            if name.endswith("weight") and case.how != "by hand":
                assert ((master.view(-1, m) != 0).sum(1) == n).all(), (case, name)
        assert case.how != "by hand" or (masters["master of 0.weight"] == 0).float().mean() > 0.1, "it decays"


def test_resumed_in_the_middle_of_the_window_it_goes_on_bit_for_bit(results):
    for rank in results(2):
        for case, run in rank["resumed"].items():
            wanted = rank["runs"][case]
            assert run["state"] == wanted["state"] and len(run["shards"]) == len(wanted["shards"]), case
            for (what, start, values), (other, begins, expected) in zip(run["shards"], wanted["shards"]):
                assert (what, start) == (other, begins) and values.equal(expected), (case, what)
