"""attach on several ranks: what differs between them is refused on all, and so is an engine of unknown shards."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lp_dist import LpAdamW, SparsityTarget, attach, groups_of, param_groups
from lp_dist.benchmarks.recording import Collectives
from lp_dist.errors import UsageError


def disagreeing(rank: int, world_size: int) -> list[str]:
    """Ranks that differ in λ, in an override, in what a group holds, in what decays: all of them must say so, and none
    hang.
    """
    errors = []
    one_or_other = ["0.weight"] if rank else ["2.weight"]
    for lam, names, arguments in (
        (0.1 + rank, None, {}),
        (0.1, None, {"overrides": {"0.weight": {"p": float(rank)}}}),
        (0.1, one_or_other, {}),
        (0.1, None, {"overrides": {"nothing": {"p": 0.0}} if rank else {}}),
        (0.1, None, {"names": one_or_other}),
        (0.0, None, {"names": one_or_other, "target": SparsityTarget(0.5), "total_steps": 100}),
    ):
        model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False))
        optimizer = LpAdamW(param_groups(model, lam, names=names), lr=1e-2, precondition=0.0)
        try:
            attach(model, optimizer, **arguments)
            errors.append("")
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    return errors


def test_ranks_that_disagree_are_refused_on_every_rank(run_ranks):
    ranks = run_ranks(disagreeing, 2)
    assert ranks[0][:3] == ranks[1][:3]
    assert (
        "'nothing' matches no parameter" in ranks[1][3]
        and ranks[0][3] == f"rank 1 could not attach its optimizer: {ranks[1][3]}"
    )
    assert "weight_decay of group 0 is 0.1 on rank 0 and 1.1 on rank 1" in ranks[0][0]
    assert "p of 0.weight is 0.0 on rank 0 and 1.0 on rank 1" in ranks[0][1]
    assert "param group of 0.weight is 1 on rank 0 and 0 on rank 1" in ranks[0][2]
    assert ranks[0][4:] == ranks[1][4:]
    assert "weight_decay of 0.weight is 0.0 on rank 0 and None on rank 1" in ranks[0][4]
    assert "decay of 0.weight is False on rank 0 and True on rank 1" in ranks[0][5]


def agreeing(rank: int, world_size: int) -> list[dict[str, Any]]:
    """What `attach` sends: of a small model, of a deep one, and where equal values print otherwise."""
    sent = []
    for layers, eps in ((1, 1e-8), (20, 1e-8), (1, 1 if rank else 1.0)):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        optimizer = LpAdamW(param_groups(model, 0.1), lr=1e-2, eps=eps)
        with Collectives() as collectives:
            attach(model, optimizer)
        sent.append(collectives.by_kind())
    return sent


def test_ranks_that_agree_compare_a_digest_and_exchange_nothing(run_ranks):
    ranks = run_ranks(agreeing, 2)
    assert ranks[0] == ranks[1]
    small, deep, printed_otherwise = ranks[0]
    assert small.keys() == deep.keys() == {"allreduce_"}
    # Numbers of each parameter, which are summed, and no names.
    assert deep["allreduce_"].bytes - small["allreduce_"].bytes <= 19 * 2 * 64
    assert printed_otherwise.keys() > {"allreduce_"}


def test_an_engine_that_does_not_know_where_its_parameters_lie_is_refused(run_ranks):
    run_ranks(with_round_robin, 1)


def with_round_robin(rank: int, world_size: int) -> None:
    from helpers.engines import ZERO, make

    ZERO["round robin"] = {"stage": 2, "round_robin_gradients": True}
    engine = make(
        "round robin", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), lambda model: LpAdamW(model.parameters())
    )
    with pytest.raises(RuntimeError, match="round_robin_gradients.*remove it from zero_optimization"):
        attach(engine.handle)


TOO_EARLY = ("zero0", "bf16_optimizer", "zero1", "zero2", "zero3", "zero3 offload", "accelerate zero2", "fsdp2", "ddp")


def too_early(rank: int, world_size: int) -> dict[str, str]:
    """attach before the engine is made: for each engine what its first step says, "" for nothing."""
    from helpers.engines import ended, make, quiet

    quiet()
    said = {}
    for kind in TOO_EARLY:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False))
        optimizer = LpAdamW(model.parameters(), lr=1e-2)
        attach(model, optimizer, target=SparsityTarget(0.5), total_steps=100)
        more = {} if kind != "zero2" else {"bf16": {"enabled": True}}
        engine = make(kind, model, lambda model: optimizer, lambda o: torch.optim.lr_scheduler.ConstantLR(o), **more)
        try:
            x = torch.ones(2, 7, dtype=next(model.parameters()).dtype)
            engine.step(engine(x).float().square().mean())
            said[kind] = ""
        except ValueError as error:
            said[kind] = str(error)
        ended(engine)
    return said


def test_an_engine_that_is_made_after_attach_is_refused_at_its_first_step(run_ranks):
    """Today's logs would say that a target is reached of which no zero is in the file."""
    for said in run_ranks(too_early, 2):
        for kind in ("bf16_optimizer", "zero1", "zero2", "zero3", "zero3 offload", "accelerate zero2"):
            assert "other tensors than when attach was called" in said[kind], (kind, said[kind])
        assert "parameters of the model are other tensors" in said["fsdp2"], said["fsdp2"]
        assert said["ddp"] == said["zero0"] == "", "these step the very parameters that attach has seen"


def redundancy(rank: int, world_size: int) -> list[str]:
    """torch's ZeroRedundancyOptimizer, and what lies inside of it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), LpAdamW, lr=1e-2)
    said = []
    for given in (optimizer, optimizer.optim):
        with pytest.raises(RuntimeError) as caught:
            attach(model, given, target=SparsityTarget(0.5), total_steps=100)
        said.append(str(caught.value))
    return said


def test_torchs_zero_redundancy_optimizer_is_refused_by_name_on_every_rank(run_ranks):
    for outer, inner in run_ranks(redundancy, 2):
        assert outer.startswith("torch's ZeroRedundancyOptimizer gives each rank whole parameters of its own")
        assert "so their optimizers step other parameters" in inner and "ZeroRedundancyOptimizer" in inner
        assert all("DeepSpeed's ZeRO-1" in said for said in (outer, inner))


MIDWAY = ("ddp", "bf16_optimizer", "zero1", "zero2", "zero3", "zero3 offload", "accelerate zero2", "fsdp2")
UNIVERSAL = ("bf16_optimizer", "zero1", "zero2", "zero3")


def midway_engine(kind: str, **more):
    from helpers.engines import make

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False))
    return make(
        kind,
        model,
        lambda model: LpAdamW(model.parameters(), lr=1e-2),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        **more,
    )


def midway_step(engine, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16_optimizer" else torch.float32
    engine.step(engine(torch.ones(4, 7, dtype=dtype)).float().square().mean())


def saved_midway(rank: int, world_size: int, directory: Path) -> None:
    """Checkpoints from the middle of a window, one of each engine."""
    from helpers.engines import ended, quiet

    quiet()
    for kind in MIDWAY:
        engine = midway_engine(kind)
        attached = attach(engine.handle, engine.optimizer, target=SparsityTarget(0.5, start=2, end=14), total_steps=20)
        for _ in range(6):
            midway_step(engine, kind)
            attached.after_step()
        engine.save(directory / kind, "saved")
        ended(engine)


def without_its_target(
    rank: int, world_size: int, directory: Path, kinds: tuple[str, ...], tag: str, more: dict
) -> dict[str, list[str]]:
    """What an engine says that goes on there without `attach`, and one that was attached without the target."""
    from helpers.engines import ended, quiet

    quiet()
    said: dict[str, list[str]] = {}
    for kind in kinds:
        said[kind] = []
        for is_attached in (False, True):
            engine = midway_engine(kind, **more)
            try:
                if is_attached:
                    attach(engine.handle, engine.optimizer)
                engine.load(directory / kind, tag)
                midway_step(engine, kind)
                said[kind].append("")
            except UsageError as error:
                said[kind].append(str(error))
            ended(engine)
    return said


def test_no_engine_goes_on_in_a_window_without_the_target(run_ranks, tmp_path, tmp_path_factory):
    """Torch's distributed and DeepSpeed's universal checkpoints say so too."""
    from helpers.engines import convert

    directory = tmp_path_factory.mktemp("midway")
    run_ranks(saved_midway, 2, directory)
    ranks: list[dict[str, list[str]]] = []
    for kinds, tag, more in (
        (MIDWAY, "saved", {}),
        (UNIVERSAL, "universal", {"checkpoint": {"load_universal": True}}),
    ):
        for left in tmp_path.iterdir():  # where the next ranks could meet those before
            left.unlink()
        if tag == "universal":
            for kind in kinds:
                convert(directory / kind)
        ranks += run_ranks(without_its_target, 2, directory, kinds, tag, more)
    assert len(ranks) == 4
    for said in ranks:
        for kind, (alone, attached) in said.items():
            assert "from the middle of a target's window, and no target goes on with it" in alone, kind
            assert "no target goes on with it" in attached or "and now there is no target of weights" in attached, kind


USED = ("bf16_optimizer", "zero2", "zero3")


def attached_to_a_used_engine(rank: int, world_size: int) -> dict[str, tuple[float, int]]:
    """Some dense steps, then a target from the first step on. For each engine the zeros, and the run's steps."""
    from helpers.engines import ended, gathered, make, quiet

    quiet()
    seen = {}
    for kind in USED:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False))
        # ZeRO 1 and 2 show the optimizer one group at a time, and the first is not the one that decays.
        engine = make(kind, model, lambda model: LpAdamW(param_groups(model, 0.0)[::-1], lr=1e-2))
        for _ in range(3):
            midway_step(engine, kind)
        target = SparsityTarget(0.5, start=0, end=14, latent_windows=0, precondition=0.0)
        attached = attach(engine.handle, engine.optimizer, target=target, total_steps=20)
        assert len(attached.optimizer.param_groups) == 2
        for _ in range(20):
            midway_step(engine, kind)
            attached.after_step()
        attached.finish()
        zeros = zeros_in(gathered(engine), attached.decayed)
        assert attached.logs["lp/measured"] == zeros
        seen[kind] = (zeros, attached.steps.taken)
        ended(engine)
    return seen


def test_a_target_for_an_engine_that_has_stepped_before_begins_with_the_first_step_of_the_run(run_ranks):
    for seen in run_ranks(attached_to_a_used_engine, 2):
        assert seen.keys() == set(USED)
        for kind, (zeros, steps) in seen.items():
            assert zeros == pytest.approx(0.5, abs=0.01) and steps == 20, kind


COPIES = ("zero0", "bf16_optimizer", "zero1", "zero2", "zero3", "fsdp2")


def overwritten(rank: int, world_size: int) -> dict[str, tuple[float, ...]]:
    """Weights that a script loads into the model's own copy, past the engine, when all is done. For each engine what
    finish says of weights and groups, and what a save writes.
    """
    import deepspeed

    from helpers.engines import ended, gathered, make, quiet

    quiet()
    seen = {}
    for kind in COPIES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8, bias=False))
        channels = groups_of(model, outputs="0", inputs="2", kind="channels")
        targets = [
            SparsityTarget(0.25, groups=channels, start=2, end=11),
            SparsityTarget(0.5, start=11, end=19),
        ]
        more = {"bf16": {"enabled": True}} if kind in ("zero0", "zero2") else {}
        engine = make(kind, model, lambda model: LpAdamW(model.parameters(), lr=1e-2), **more)
        attached = attach(engine.handle, engine.optimizer, target=targets, total_steps=20)
        for _ in range(20):
            dtype = torch.bfloat16 if more or kind == "bf16_optimizer" else torch.float32
            engine.step(engine(torch.ones(4, 8, dtype=dtype)).float().square().mean())
            attached.after_step()
        attached.finish()
        assert attached.logs["lp/measured"] == zeros_in(gathered(engine), attached.decayed)
        assert attached.logs["lp/groups_measured"] == 0.25
        params = list(model.parameters())
        context = deepspeed.zero.GatheredParameters(params, modifier_rank=0) if kind == "zero3" else nullcontext()
        with context, torch.no_grad():
            for param in params:
                if kind != "zero3" or rank == 0:
                    param.fill_(0.5)
        attached.finish()
        logs = attached.logs
        zeros = zeros_in(gathered(engine), attached.decayed)
        seen[kind] = logs["lp/measured"], logs["lp/groups_measured"], zeros
        ended(engine)
    return seen


def zeros_in(weights: dict[str, torch.Tensor], names) -> float:
    matrices = [weights[name] for name in names]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


def test_finish_counts_the_copy_that_a_save_writes(run_ranks):
    for seen in run_ranks(overwritten, 2):
        assert seen == dict.fromkeys(COPIES, (0.0, 0.0, 0.0))
