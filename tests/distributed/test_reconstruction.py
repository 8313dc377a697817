"""Survivors that move on shards: right after an update every engine has the zeros of one process, and its weights but
for rounding; a stopped run goes on bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import axes, target_runs
from helpers.axes import Axes
from helpers.engines import Engine, ended, gathered, in_two_starts, make, quiet
from helpers.snapshots import joined, local_shards_of, snapshot
from helpers.target_runs import Case, batch_of, engine_of, trained
from lp_dist import LpAdamW, SparsityTarget, attach, groups_of, param_groups
from lp_dist.attachment.attachment import Attachment
from lp_dist.reconstruction import budget
from lp_dist.reconstruction.survivors import Reconstruction
from lp_dist.sharding.collectives import all_gather_objects
from lp_dist.sharding.engines import unwrap
from lp_dist.sparsity.selection import decayed_names

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2 offload", "zero3 offload")
# Updates are at the steps 2, 4, ..., 14, of which the first has nothing to remove; the final pruning is after step 16.
STEPS, FIRST_UPDATE, STOP = 24, 4, 7
# Conjugate gradients carry rounding along, and each engine adds up X'X otherwise.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


@dataclass(frozen=True)
class MovingCase(Case):
    """kind: weights, 2:4 or groups."""

    kind: str = "weights"


CASES = [
    MovingCase(engine, steps=STEPS, kind=kind)
    for number, engine in enumerate(ENGINES)
    for kind in (
        ("weights", "2:4", "groups") if engine in ("fsdp2", "zero2") else ("weights", ["2:4", "groups"][number % 2])
    )
]
RESUMED = [MovingCase("zero2", steps=STEPS), MovingCase("fsdp2", steps=STEPS, kind="groups")]


def target_of(case: MovingCase, model: nn.Module) -> SparsityTarget:
    common: dict[str, Any] = {"reconstruct": True, "update_every": 2}
    if case.kind == "groups":
        sets = groups_of(model, outputs="0", inputs="3", kind="first") + groups_of(
            model, outputs="3", inputs="5", kind="second"
        )
        return SparsityTarget(0.4, groups=sets, **common)
    # Not 0.5.weight: 163 inputs are no blocks of four.
    return SparsityTarget(pattern="2:4", **common) if case.kind == "2:4" else SparsityTarget(0.7, **common)


def attached_to(engine: Engine, case: MovingCase) -> Attachment:
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    target = target_of(case, unwrap(engine.handle))
    return attach(engine.handle, target=target, total_steps=case.steps, **others)


def mix_inputs() -> None:
    """Has inputs go together. With those of the other tests, which are independent, nothing is taken over by others.
    Here and on ranks, which are processes of their own.
    """

    def mixed(*numbers: int) -> tuple[Tensor, Tensor]:
        inputs, wanted = batch_of(*numbers)
        return inputs + 0.5 * inputs.roll(1, 1), wanted

    target_runs.batch_of = mixed
    # So that a layer's rows are joined and solved in several parts.
    budget.CHUNK = 2000


@pytest.fixture(autouse=True)
def mixed_inputs(monkeypatch):
    for module, name, value in ((target_runs, "batch_of", batch_of), (budget, "CHUNK", budget.CHUNK)):
        monkeypatch.setattr(module, name, value)  # to be put back
    mix_inputs()


def followed(case: MovingCase) -> dict[str, Any]:
    """Masters and the model right after the first update and at the end."""
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        remove = Reconstruction.remove

        def noted(self: Reconstruction, *arguments: Any) -> Any:
            results.setdefault("before", local_shards_of(attachment))
            return remove(self, *arguments)

        patch.setattr(Reconstruction, "remove", noted)
        trained(engine, attachment, case, 0, FIRST_UPDATE)
    results |= {"first": local_shards_of(attachment), "first model": gathered(engine)}
    trained(engine, attachment, case, FIRST_UPDATE, STEPS)
    attachment.finish()
    controller = attachment.controllers[0]
    results |= {
        "last model": gathered(engine),
        "moved": controller.reconstruction.moved,
        "zero share": controller.zero_share(),
        "joint": {
            name: (len(joint.rows), controller.reconstruction._shards[name].shape[0])
            for name, joint in controller.reconstruction._joint.items()
        },
    }
    ended(engine)
    return results


@cache
def alone(case: MovingCase) -> dict[str, Any]:
    return followed(replace(case, engine="plain"))


def resumed(case: MovingCase, directory: Path) -> tuple[list[str], int]:
    """What differs between a run that was stopped in the window and one that was not, and how much was compared."""

    def state_of(engine: Engine, attachment: Attachment) -> dict[str, Any]:
        return snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict())}

    engine = engine_of(case)
    attachment = attached_to(engine, case)
    trained(engine, attachment, case, 0, STOP)
    engine.save(directory, "stop")
    # As many loops: the others know nothing of it.
    state = all_gather_objects(attachment.state_dict() if torch.distributed.get_rank() == 0 else None)[0]
    trained(engine, attachment, case, STOP, STEPS)
    wanted = state_of(engine, attachment)
    ended(engine)
    engine = engine_of(case)
    attachment = attached_to(engine, case)
    engine.load(directory, "stop")
    if not hasattr(engine.handle, "load_checkpoint"):
        attachment.load_state_dict(state)
    trained(engine, attachment, case, STOP, STEPS)
    got = state_of(engine, attachment)
    ended(engine)
    return sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)), len(wanted)


def with_copies(model: nn.Module, optimizer_of: Any) -> Engine:
    """HSDP on four ranks: two copies of two shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "fsdp"))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    return Engine(model, optimizer_of(model))


def transposed_after_an_update(kind: str) -> dict[str, Tensor]:
    """Masters of layers whose weights are (inputs, outputs), right after the first update. kind: as of `make`, or
    hsdp.
    """
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(37, 64), nn.Tanh(), Conv1D(7, 37))
    names = ["0.weight", "2.weight"]
    begin = with_copies if kind == "hsdp" else partial(make, kind)
    engine = begin(model, lambda model: LpAdamW(param_groups(model, 0.0, names=names), lr=1e-3))
    others = {} if hasattr(engine.handle, "load_checkpoint") else {"optimizer": engine.optimizer}
    target = SparsityTarget(0.6, update_every=2, reconstruct=True)
    attachment = attach(engine.handle, target=target, names=names, total_steps=STEPS, **others)
    for step in range(FIRST_UPDATE + 1):
        ranks = (0, 1) if kind == "plain" else [torch.distributed.get_rank() % 2]
        losses = [target_runs.loss_of(engine, 0, step, rank) / len(ranks) for rank in ranks]
        for loss in losses[1:]:
            loss.backward()
        engine.step(losses[0])
        attachment.after_step()
    assert attachment.weight_controller.reconstruction.moved == 1
    weights = gathered(engine)
    ended(engine)
    return {name: weights[name] for name in names}


def on_a_rank(rank: int, world_size: int, directory: Path, engines: tuple[str, ...]) -> dict[str, Any]:
    quiet()
    mix_inputs()
    return {
        "transposed": {engine: transposed_after_an_update(engine) for engine in engines},
        "runs": {case: followed(case) for case in CASES if case.engine in engines},
        "resumed": {case: resumed(case, directory / case.engine) for case in RESUMED if case.engine in engines},
    }


_results: dict[tuple[str, ...], list[dict[str, Any]]] = {}


@pytest.fixture(params=in_two_starts(ENGINES))
def results(request, run_ranks, tmp_path_factory) -> list[dict[str, Any]]:
    """By rank what `on_a_rank` tells of some engines, run once."""
    if request.param not in _results:
        _results[request.param] = run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("moved"), request.param)
    return _results[request.param]


def test_right_after_an_update_zeros_are_those_of_one_process_and_weights_are_near(results):
    for case, run in results[0]["runs"].items():
        wanted = joined([{"shards": alone(case)["first"]}])
        masters = joined([{"shards": rank["runs"][case]["first"]} for rank in results])
        for name, weights in wanted.items():
            assert torch.equal(masters[name] == 0, weights == 0), f"{case}: {name}"
            torch.testing.assert_close(
                masters[name], weights, **TOLERANCE, msg=lambda m, case=case, name=name: f"{case}: {name}: {m}"
            )
            model = run["first model"][name].flatten()
            assert torch.equal(model, masters[name]), f"{case}: {name}: the model's copy is another one"


def test_layers_whose_weights_are_transposed_move_as_well(results):
    alone = transposed_after_an_update("plain")
    for rank in results:
        for engine, weights in rank["transposed"].items():
            compare_near(weights, alone, engine)


def compare_near(weights: dict[str, Tensor], expected: dict[str, Tensor], way: str) -> None:
    for name, wanted in expected.items():
        assert torch.equal(weights[name] == 0, wanted == 0) and (wanted == 0).any(), f"{way}: {name}"
        torch.testing.assert_close(
            weights[name], wanted, rtol=5e-3, atol=1e-3, msg=lambda m, n=name: f"{way}: {n}: {m}"
        )


def test_survivors_have_moved(results):
    """Else the comparison above would say nothing of them: the tolerance is a small part of how far they moved."""
    for case, run in results[0]["runs"].items():
        before, after = (joined([{"shards": alone(case)[when]}]) for when in ("before", "first"))
        stay = {name: weights[after[name] != 0] for name, weights in before.items()}
        moves = torch.cat([after[name][after[name] != 0] - weights for name, weights in stay.items()])
        far = moves.abs() > 5 * TOLERANCE["atol"] + 5 * TOLERANCE["rtol"] * torch.cat([*stay.values()]).abs()
        assert int(far.sum()) > 500, f"{case}: {int(far.sum())}"
        assert alone(case)["moved"] == run["moved"] == 7, case


def test_ranks_solve_together_what_is_divided_or_lies_on_some_of_them(results):
    """Of DDP all rows; of ZeRO-1 and 2 all rows of the layers that lie on one rank, and those at an edge; of ZeRO-3
    those at an edge; of FSDP2 none.
    """
    for case, run in results[0]["runs"].items():
        kind, joint = case.engine.split()[0], run["joint"].values()
        if kind == "ddp":
            assert joint and all(count == rows for count, rows in joint), case
        elif kind in ("zero1", "zero2"):
            assert any(count == rows for count, rows in joint), case
        elif kind == "zero3":
            assert joint and all(count < rows for count, rows in joint), case
        else:
            assert not joint, case


def test_at_the_end_ranks_have_the_same_weights_and_the_target_is_met(results):
    for case, run in results[0]["runs"].items():
        other = results[1]["runs"][case]
        for name, weights in run["last model"].items():
            assert torch.equal(weights, other["last model"][name]), f"{case}: {name}"
        assert run["zero share"] == other["zero share"] == alone(case)["zero share"], case
        differ = total = 0
        for name, weights in run["last model"].items():
            differ += int(((weights == 0) != (alone(case)["last model"][name] == 0)).sum())
            total += weights.numel()
        assert differ < 0.05 * total, f"{case}: {differ} of {total} zeros are others"


def test_a_stopped_run_goes_on_bit_for_bit(results):
    for rank in results:
        assert rank["resumed"] or "zero1" in {case.engine for case in rank["runs"]}
        for case, (differs, compared) in rank["resumed"].items():
            assert not differs and compared > 15, case


# -- several axes -------------------------------------------------------------

WAYS = [
    Axes((("fsdp", 2), ("tp", 2))),
    Axes((("tp", 4),)),
    Axes((("replicas", 2), ("fsdp", 2))),
]
BY_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def llama_after_an_update(shard: Callable[[nn.Module], nn.Module], batches: list[Tensor], movable: Any) -> dict:
    """Weights before and after the first update of a Llama, whose gradients are given.

    Args:
        shard: of the model.
        batches: token ids of this rank.
        movable: tells by its name whether a parameter may decay.
    """
    sets = axes.gradients(shard, axes.dense)
    model = shard(axes.dense())
    names = [name for name in decayed_names(model) if movable(name)]
    optimizer = LpAdamW(param_groups(model, 0.0), lr=4e-3)
    target = SparsityTarget(0.5, update_every=3, reconstruct=True)
    attachment = attach(model, optimizer, target=target, names=names, total_steps=axes.STEPS)
    controller = attachment.weight_controller
    while controller.reconstruction.moved == 0:
        if controller.is_due:
            model.zero_grad()
            for batch in batches:
                model(input_ids=batch).logits.sum().backward()  # FSDP2 shards anew when the backward pass has ended
        for name, param in model.named_parameters():
            param.grad = sets[0][name]
        optimizer.step()
        before = {name: axes.complete(param).clone() for name, param in model.named_parameters() if name in names}
        attachment.after_step()
    after = {name: axes.complete(param).clone() for name, param in model.named_parameters() if name in names}
    return {"before": before, "after": after, "reasons": controller.reconstruction.reasons}


def batch_for(data_rank: int) -> Tensor:
    return torch.randint(0, 40, (6, 16), generator=torch.Generator().manual_seed(data_rank))


def llamas_on_ranks(rank: int, world_size: int) -> dict[Axes, Any]:
    quiet()
    results = {}
    for way in WAYS:
        tp = dict(way.mesh).get("tp", 1)
        batches = [batch_for(rank // tp % 2)] if tp == 2 else [batch_for(data) for data in (0, 1)] * (tp == 4)
        batches = batches or [batch_for(rank % 2)]  # HSDP: each half has both
        movable = (lambda name: not name.endswith(BY_COLUMNS)) if tp > 1 else (lambda name: True)
        results[way] = llama_after_an_update(way.shard, batches, movable)
    mix_inputs()
    results["copies"] = transposed_after_an_update("hsdp")
    results["named"] = llama_after_an_update(WAYS[0].shard, [batch_for(rank // 2)], lambda name: True)["reasons"]
    return results


@pytest.mark.long
def test_under_several_axes_rows_move_as_in_one_process(run_ranks):
    """Ranks of tensor parallelism have the same tokens, which count once."""
    batches = [batch_for(0), batch_for(1)]
    ranks = run_ranks(llamas_on_ranks, 4)
    for way in WAYS:
        has_tp = "tp" in dict(way.mesh)
        movable = (lambda name: not name.endswith(BY_COLUMNS)) if has_tp else (lambda name: True)
        alone = llama_after_an_update(axes.unsharded, batches, movable)
        for rank in ranks:
            assert rank[way]["reasons"] == {}, way
            for name, weights in alone["after"].items():
                got = rank[way]["after"][name]
                assert torch.equal(rank[way]["before"][name], alone["before"][name]), f"{way}: {name}"
                assert torch.equal(got == 0, weights == 0), f"{way}: {name}"
                torch.testing.assert_close(got, weights, **TOLERANCE, msg=lambda m, n=name, w=way: f"{w}: {n}: {m}")
            far = [(w - alone["before"][n])[w != 0].abs() > 1e-3 for n, w in alone["after"].items()]
            assert int(torch.cat(far).sum()) > 300, way
    copies = transposed_after_an_update("plain")
    for rank in ranks:
        compare_near(rank["copies"], copies, "HSDP")
        assert {name.partition("layers.")[2][2:] for name in rank["named"]} == {*BY_COLUMNS}
        assert set(rank["named"].values()) == {"is divided along its inputs by tensor parallelism"}
