"""Save, stop, start anew, load: the run goes on bit for bit as the one that was never stopped, in every phase of a
decay window.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_under_test import ZERO, Engine, gathered, make
from torch import Tensor, nn

from lp_dist import DecayWindow, LpAdamW, attach
from lp_dist.attachment.attach import Attachment, steps_taken

STEPS, WINDOW = 12, DecayWindow(3, 9)
STOPS = {2: "warm-up", 7: "decay", 10: "frozen"}
DECAYED = ("0.weight", "3.weight", "4.weight")
OVERRIDES = {"0.weight": {"p": 0.0, "weight_decay": 1.0}}
CELLS = {
    "one process": ("plain", "fp32"),
    "DDP": ("ddp", "fp32"),
    "FSDP2": ("fsdp2", "fp32"),
    "BF16_Optimizer": ("bf16_optimizer", "bf16"),
    **{
        f"{kind}, {dtype}": (kind, dtype)
        for kind in ("zero0", "zero1", "zero2", "zero3", "zero2 offload", "zero3 offload")
        for dtype in ("fp32", "bf16")
    },
    **{f"Accelerate, {kind}": (f"accelerate {kind}", "fp32") for kind in ("zero2", "zero3")},
}


def model_of() -> nn.Sequential:
    """Small and odd: shards end inside of rows, in padding, and (one row for two ranks) in nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 1))


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    """Two groups that decay with values of their own, and one that doesn't."""
    matrices = [model[0].weight, model[3].weight, model[4].weight]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        {"params": matrices[:2], "weight_decay": 3.0, "lr": 1e-2},
        {"params": matrices[2:], "weight_decay": 0.005, "p": -1.0, "lr": 2e-2},
        {"params": rest, "weight_decay": 0.0, "lr": 1e-2},
    ]


def optimizer_of(model: nn.Sequential) -> LpAdamW:
    return LpAdamW(groups_of(model), p=0.5, precondition=0.0)


def scheduler_of(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 16)


def batch_of(step: int, rank: int, world_size: int) -> Tensor:
    """A rank's share of the batch of a step: the same six rows, however many ranks there are."""
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]


def started(cell: str, more: Any = None) -> Engine:
    kind, dtype = CELLS[cell]
    return make(
        kind,
        model_of(),
        optimizer_of,
        scheduler_of,
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
        **(more or {}),
    )


def attached(engine: Engine) -> Attachment:
    optimizer = (
        None if hasattr(engine.handle, "load_checkpoint") else engine.optimizer
    )  # a DeepSpeed engine knows its own
    return attach(engine.handle, optimizer, overrides=OVERRIDES, lr_scheduler=engine.lr_scheduler)


def trained(engine: Engine, found: Attachment, start: int, until: int) -> list[tuple[float, ...]]:
    """As a user drives a window by hand: the step is asked of the optimizer, so that it needs no checkpoint of its
    own. Gives the learning rates of each step."""
    live, decayed = found.optimizer, {shard.group for shard in found.shards if shard.name in found.decayed}
    dtype, alone = (
        next(engine.handle.parameters()).dtype,
        isinstance(engine.handle, nn.Sequential) and not engine.is_sharded(),
    )
    share = (0, 1) if alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    rates = []
    for step in range(start, until):
        for group in decayed:
            live.param_groups[group].update(WINDOW.at(steps_taken(live), STEPS))
        rates.append(tuple(float(group["lr"]) for group in live.param_groups))
        engine.step(engine(batch_of(step, *share).to(dtype)).float().square().mean())
    return rates


def as_bytes(value: Any) -> Any:
    """A tensor bit for bit, by which 0 and -0 differ and nan equals itself."""
    if not isinstance(value, Tensor):
        return value
    value = value.to_local() if hasattr(value, "to_local") else value.detach()
    return str(value.dtype), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(engine: Engine, found: Attachment) -> dict[str, Any]:
    """All that a run goes on with, on this rank: weights, masters, states, step counts, groups, learning rates.

    But not the padding: under ZeRO-3 it is whatever the memory held before.
    """
    taken = {name: as_bytes(weight) for name, weight in gathered(engine).items()}
    for shard in found.shards:
        taken |= {
            f"master of {shard.name}": as_bytes(shard.piece.values),
            **{f"{key} of {shard.name}": as_bytes(value) for key, value in shard.state.items()},
        }
    for i, state in enumerate(found.optimizer.state.values()):
        taken |= {f"{key} of tensor {i}": as_bytes(value) if key == "step" else "" for key, value in state.items()}
    for i, group in enumerate(found.optimizer.param_groups):
        taken |= {f"{key} of group {i}": value for key, value in group.items() if key != "params"}
    return taken | {"scheduler": str(engine.lr_scheduler.state_dict())}


def zeros_of(engine: Engine) -> int:
    return sum(int((weight == 0).sum()) for name, weight in gathered(engine).items() if name in DECAYED)


def ended(engine: Engine) -> None:
    if hasattr(engine.handle, "destroy"):
        engine.handle.destroy()


def quiet() -> None:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage for every engine, which takes longer than the steps


def masters_of(engine: Engine) -> dict[str, Tensor]:
    """The whole fp32 weights of a ZeRO engine, by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.handle.module.named_parameters()}


def on_a_rank(rank: int, world_size: int, directory: Path) -> dict[str, dict[str, Any]]:
    """For each engine: what differs after going on from each stop, how many zeros there were, and the masters at the
    last stop.
    """
    quiet()
    told: dict[str, dict[str, Any]] = {}
    for cell in CELLS:
        engine = started(cell)
        found = attached(engine)
        rates, wanted = trained(engine, found, 0, STEPS), snapshot(engine, found)
        told[cell] = {
            "differs": {},
            "zeros": {STEPS: zeros_of(engine)},
            "counted": len(wanted),
            "rates": {"whole": rates},
        }
        ended(engine)

        engine, step = started(cell), 0  # another one saves, so that saving is seen to change nothing
        found = attached(engine)
        for stop in STOPS:
            trained(engine, found, step, stop)
            engine.save(directory / cell, str(stop))
            told[cell]["zeros"][stop], step = zeros_of(engine), stop
        if CELLS[cell][0] in ZERO:
            told[cell]["masters"] = masters_of(engine)
        ended(engine)

        for stop, phase in STOPS.items():
            engine = started(cell)
            if stop != 7:  # either order is right
                found = attached(engine)
                engine.load(directory / cell, str(stop))
            else:
                engine.load(directory / cell, str(stop))
                found = attached(engine)
            told[cell]["rates"][stop] = trained(engine, found, stop, STEPS)
            got = snapshot(engine, found)
            told[cell]["differs"][phase] = sorted(
                key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)
            )
            ended(engine)
    return told


_told: list[dict[str, dict[str, Any]]] = []


@pytest.fixture
def told(run_ranks, checkpoints) -> list[dict[str, dict[str, Any]]]:
    """By rank what `on_a_rank` tells, run once."""
    if not _told:
        _told.extend(run_ranks(on_a_rank, 2, checkpoints))
    return _told


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(told):
    wrong = {
        f"{cell}, rank {rank}, stopped in {phase}": differs
        for rank, cells in enumerate(told)
        for cell, seen in cells.items()
        for phase, differs in seen["differs"].items()
        if differs
    }
    assert not wrong
    for cells in told:
        assert cells.keys() == CELLS.keys()
        assert all(set(seen["differs"]) == set(STOPS.values()) and seen["counted"] > 40 for seen in cells.values())


def test_trap_15_a_resume_does_not_reset_the_learning_rates(told):
    wanted = [(lr, 2 * lr, lr) for lr in (1e-2 * (1.0 - step / 16) for step in range(STEPS))]
    for cell, seen in told[0].items():
        assert [lr for rates in seen["rates"]["whole"] for lr in rates] == pytest.approx(
            [lr for rates in wanted for lr in rates]
        )
        for stop in STOPS:
            assert seen["rates"][stop] == seen["rates"]["whole"][stop:], f"{cell}, stopped at {stop}"


def test_the_runs_were_stopped_in_every_phase(told):
    assert not {
        cell: seen["zeros"]
        for cell, seen in told[0].items()
        if not 0 == seen["zeros"][2] < seen["zeros"][7] < seen["zeros"][10] == seen["zeros"][STEPS]
    }


def test_zero_to_fp32_gives_the_masters_with_their_zeros(told, checkpoints, tmp_path):
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
    from safetensors.torch import load_file

    cells = [cell for cell, (kind, _) in CELLS.items() if kind in ZERO]
    assert len(cells) == 10
    for cell in cells:
        convert_zero_checkpoint_to_fp32_state_dict(
            checkpoints / cell, tmp_path / cell, tag="10", safe_serialization=True
        )
        written, masters = load_file(tmp_path / cell / "model.safetensors"), told[0][cell]["masters"]
        assert written.keys() == masters.keys()
        for name, master in masters.items():
            assert as_bytes(written[name]) == as_bytes(master) and written[name].shape == master.shape, (
                f"{cell}: {name}"
            )
        assert sum(int((written[name] == 0).sum()) for name in DECAYED) == told[0][cell]["zeros"][10], cell
    with pytest.raises(ValueError, match="is not a zero checkpoint"):  # BF16_Optimizer's it can't read
        convert_zero_checkpoint_to_fp32_state_dict(checkpoints / "BF16_Optimizer", tmp_path / "bf16", tag="10")
