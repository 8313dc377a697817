"""Another number of ranks: DeepSpeed's universal checkpoint and torch.distributed.checkpoint, from 2 ranks to 3 and to
1.

Right after loading everything is bit for bit what was saved. Later steps average gradients over the ranks in another
order: equal to 1e-6 in fp32 and 1e-3 in bf16, with the same zeros.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.decay_runs import DECAYED, STEPS, attached, groups_of, model_of, optimizer_of, scheduler_of, trained
from helpers.engines import Engine, convert, ended, gathered, make, quiet
from helpers.snapshots import joined
from lp_dist import LpLion, LpSGD
from lp_dist.sharding.engines import inner_optimizer
from lp_dist.sharding.shards import locate_shards

STOP = 7  # in the middle of the decay
KINDS = ("zero1", "zero2", "zero3", "bf16_optimizer", "fsdp2")
WHEN = ("attach before", "attach after", "no attach")
OTHERS = {
    "LpSGD": lambda model: LpSGD(groups_of(model), momentum=0.9),
    "LpLion": lambda model: LpLion(groups_of(model)),
}


def seen(engine: Engine) -> dict[str, Any]:
    """This rank's shards of masters and moments, and the rest of what a run goes on with. (Not by DeepSpeed's own
    safe_get_full_optimizer_state, which at ZeRO 1 and 2 finds the moments of the first group alone.)"""
    inner = inner_optimizer(engine.optimizer)
    shards = []
    for shard in locate_shards(engine.handle, None if hasattr(engine.handle, "load_checkpoint") else engine.optimizer):
        if shard.length:
            shards += [
                (f"{key} of {shard.name}", shard.start, values.flatten().clone())
                for key, values in {"master": shard.local.values, **shard.state}.items()
            ]
    return {
        "shards": shards,
        "model": {name: weight.float().flatten() for name, weight in gathered(engine).items()},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
        "steps": [float(state["step"]) for state in inner.state.values()],
        "step tensors": len({id(state["step"]) for state in inner.state.values()}),
        "schedule": engine.lr_scheduler.last_epoch,
    }


def before(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """On 2 ranks: each engine saved at STOP, and trained on to the end."""
    quiet()
    results = {}
    for kind in KINDS:
        engine = make(kind, model_of(), optimizer_of, scheduler_of)
        attachment = attached(engine)
        trained(engine, attachment, 0, STOP)
        engine.save(directory / kind, "saved")
        results[kind] = {"saved": seen(engine)}
        trained(engine, attachment, STOP, STEPS)
        results[kind]["end"] = seen(engine)
        ended(engine)
    for name, other_of in OTHERS.items():
        for kind in ("zero1", "zero3"):
            engine = make(kind, model_of(), other_of, scheduler_of)
            trained(engine, attached(engine), 0, 1)
            engine.save(directory / f"{name} {kind}", "saved")
            ended(engine)
    return results


def after(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """On another number of ranks: each engine as it is after loading, and at the end."""
    quiet()
    results: dict[str, Any] = {}
    for kind in KINDS:
        more, tag = ({}, "saved") if kind == "fsdp2" else ({"checkpoint": {"load_universal": True}}, "universal")
        results[kind] = {}
        for when in WHEN:
            engine = make(kind, model_of(), optimizer_of, scheduler_of, **more)
            attachment = attached(engine) if when == "attach before" else None
            engine.load(directory / kind, tag)
            if when == "attach after":
                attachment = attached(engine)
            results[kind][when] = {"loaded": seen(engine)}
            if attachment is not None:
                trained(engine, attachment, STOP, STEPS)
                results[kind][when]["end"] = seen(engine)
            ended(engine)
    engine = make("zero3", model_of(), optimizer_of, checkpoint={"load_universal": True})
    attached(engine)
    engine.load(directory / "zero3", "universal")
    results["rates without a scheduler"] = [group["lr"] for group in engine.optimizer.param_groups]
    ended(engine)
    engine = make("zero2", model_of(), optimizer_of)
    with pytest.raises(Exception, match="DP world size of 2 but the current world size is"):
        engine.load(directory / "zero2", "saved")
    ended(engine)
    return results


_saved: list[Any] = []
_after: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture
def saved(run_ranks, tmp_path, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the checkpoints of 2 ranks are, and what these tell; run once."""
    if not _saved:
        directory = tmp_path_factory.mktemp("saved")
        ranks = run_ranks(before, 2, directory)
        for kind in KINDS:
            if kind != "fsdp2":
                convert(directory / kind)
        _saved.extend([directory, ranks])
        for left in tmp_path.iterdir():  # where other ranks could meet the old ones
            left.unlink()
    return tuple(_saved)


@pytest.fixture(params=[3, 1], ids=["3 ranks", "1 rank"])
def loaded(request, run_ranks, saved) -> list[dict[str, Any]]:
    if request.param not in _after:
        _after[request.param] = run_ranks(after, request.param, saved[0])
    return _after[request.param]


def test_right_after_loading_all_is_bit_for_bit_what_was_saved(saved, loaded):
    for kind in KINDS:
        old = [rank[kind]["saved"] for rank in saved[1]]
        wanted = joined(old)
        assert len(wanted) == 21 and all((wanted[f"master of {name}"] == 0).any() for name in DECAYED), (
            "nothing has become zero"
        )
        for when in WHEN:
            new = [rank[kind][when]["loaded"] for rank in loaded]
            got = joined(new)
            assert got.keys() == wanted.keys()
            assert not [what for what in wanted if not torch.equal(got[what], wanted[what])], f"{kind}, {when}"
            for rank in new:
                assert set(rank["steps"]) == {STOP} and rank["schedule"] == STOP, f"{kind}, {when}"
                assert rank["model"].keys() == old[0]["model"].keys()
                wrong = [
                    name for name, weight in rank["model"].items() if not torch.equal(weight, old[0]["model"][name])
                ]
                assert not wrong, f"{kind}, {when}"


def test_trap_13_universal_stage_3_copies_group_0(saved, loaded):
    """Into every group; attach puts back the requested values, before loading or after it."""
    requested = {"weight_decay": [3.0, 0.005, 0.0], "p": [0.5, -1.0, 0.5], "cutoff": [math.inf] * 3}
    rates = [group["lr"] for group in saved[1][0]["zero3"]["saved"]["groups"]]
    assert rates[1] == 2 * rates[0] == 2 * rates[2]
    for rank in loaded:
        for kind in KINDS:
            for when in ("attach before", "attach after"):
                groups = rank[kind][when]["loaded"]["groups"]
                assert {key: [group[key] for group in groups] for key in requested} == requested, f"{kind}, {when}"
                assert [group["lr"] for group in groups] == rates, f"{kind}, {when}"
        unguarded = rank["zero3"]["no attach"]["loaded"]["groups"]
        assert [group["weight_decay"] for group in unguarded] == [
            3.0,
            3.0,
            3.0,
        ], "DeepSpeed has changed: is the guard still needed?"
        assert [group["p"] for group in unguarded] == [0.5, 0.5, 0.5]


def test_trap_13_learning_rates_of_groups_hold_without_a_scheduler_too(saved, loaded):
    rates = [group["lr"] for group in saved[1][0]["zero3"]["saved"]["groups"]]
    for rank in loaded:
        assert rank["rates without a scheduler"] == rates


def test_step_counts_stay_right_though_the_loader_gives_all_sub_groups_one_tensor(loaded):
    for rank in loaded:
        for kind in KINDS:
            assert set(rank[kind]["attach before"]["end"]["steps"]) == {STEPS}, kind
        assert (
            rank["zero3"]["no attach"]["loaded"]["step tensors"]
            == 1
            < len(rank["zero3"]["no attach"]["loaded"]["steps"])
        )


def test_it_goes_on_as_it_would_have(saved, loaded):
    for kind in KINDS:
        start, wanted = (joined([rank[kind][phase] for rank in saved[1]]) for phase in ("saved", "end"))
        assert all((start[f"master of {name}"] - wanted[f"master of {name}"]).abs().max() > 1e-2 for name in DECAYED)
        for when in ("attach before", "attach after"):
            got = joined([rank[kind][when]["end"] for rank in loaded])
            for what, tensor in wanted.items():
                torch.testing.assert_close(
                    got[what],
                    tensor,
                    rtol=0,
                    atol=1e-3 if kind == "bf16_optimizer" else 1e-6,
                    msg=lambda m: f"{kind}, {when}: {what}: {m}",
                )
                assert "master" not in what or torch.equal(got[what] == 0, tensor == 0), (
                    f"{kind}, {when}: other zeros in {what}"
                )


@pytest.mark.parametrize("name, missing", [("LpSGD", "exp_avg"), ("LpLion", "exp_avg_sq")])
def test_trap_12_bases_with_other_state_than_adams_are_not_converted(saved, name, missing):
    for kind in ("zero1", "zero3"):
        with pytest.raises(KeyError, match=f"'{missing}'"):
            convert(saved[0] / f"{name} {kind}")
