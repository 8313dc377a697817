"""Save, stop, start anew, load: the run goes on bit for bit as the one that was never stopped, in every phase of a
decay window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers.decay_runs import CELLS, DECAYED, STEPS, attached, model_of, optimizer_of, scheduler_of, trained
from helpers.engines import ZERO, Engine, ended, gathered, in_two_starts, make, quiet
from helpers.snapshots import as_bytes, snapshot

STOPS = {2: "warm-up", 7: "decay", 10: "frozen"}
WITH_THE_SUITE = ("FSDP2", "zero2, fp32", "zero3, bf16", "BF16_Optimizer")


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


def zeros_of(engine: Engine) -> int:
    return sum(int((weight == 0).sum()) for name, weight in gathered(engine).items() if name in DECAYED)


def masters_of(engine: Engine) -> dict[str, Tensor]:
    """The unsharded fp32 weights of a ZeRO engine, by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.handle.module.named_parameters()}


def on_a_rank(rank: int, world_size: int, directory: Path, cells: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """For each engine: what differs after going on from each stop, how many zeros there were, and the masters at the
    last stop.
    """
    quiet()
    results: dict[str, dict[str, Any]] = {}
    for cell in cells:
        engine = started(cell)
        attachment = attached(engine)
        rates, wanted = trained(engine, attachment, 0, STEPS), snapshot(engine, attachment)
        results[cell] = {
            "differs": {},
            "zeros": {STEPS: zeros_of(engine)},
            "counted": len(wanted),
            "rates": {"uninterrupted": rates},
        }
        ended(engine)

        engine, step = started(cell), 0  # another one saves, so that saving is seen to change nothing
        attachment = attached(engine)
        for stop in STOPS:
            trained(engine, attachment, step, stop)
            engine.save(directory / cell, str(stop))
            results[cell]["zeros"][stop], step = zeros_of(engine), stop
        if CELLS[cell][0] in ZERO:
            results[cell]["masters"] = masters_of(engine)
        ended(engine)

        for stop, phase in STOPS.items():
            engine = started(cell)
            if stop != 7:  # either order is right
                attachment = attached(engine)
                engine.load(directory / cell, str(stop))
            else:
                engine.load(directory / cell, str(stop))
                attachment = attached(engine)
            results[cell]["rates"][stop] = trained(engine, attachment, stop, STEPS)
            got = snapshot(engine, attachment)
            results[cell]["differs"][phase] = sorted(
                key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)
            )
            ended(engine)
    return results


_results: dict[tuple[str, ...], list[dict[str, dict[str, Any]]]] = {}


@pytest.fixture(params=in_two_starts(CELLS, WITH_THE_SUITE))
def results(request, run_ranks, checkpoints) -> list[dict[str, dict[str, Any]]]:
    """By rank what `on_a_rank` tells of some cells, run once."""
    if request.param not in _results:
        _results[request.param] = run_ranks(on_a_rank, 2, checkpoints, request.param)
    return _results[request.param]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(results):
    wrong = {
        f"{cell}, rank {rank}, stopped in {phase}": differs
        for rank, cells in enumerate(results)
        for cell, seen in cells.items()
        for phase, differs in seen["differs"].items()
        if differs
    }
    assert not wrong
    for cells in results:
        assert cells.keys() == results[0].keys() and cells
        assert all(set(seen["differs"]) == set(STOPS.values()) and seen["counted"] > 40 for seen in cells.values())


def test_trap_15_a_resume_does_not_reset_the_learning_rates(results):
    wanted = [(lr, 2 * lr, lr) for lr in (1e-2 * (1.0 - step / 16) for step in range(STEPS))]
    for cell, seen in results[0].items():
        assert [lr for rates in seen["rates"]["uninterrupted"] for lr in rates] == pytest.approx(
            [lr for rates in wanted for lr in rates]
        )
        for stop in STOPS:
            assert seen["rates"][stop] == seen["rates"]["uninterrupted"][stop:], f"{cell}, stopped at {stop}"


def test_the_runs_were_stopped_in_every_phase(results):
    assert not {
        cell: seen["zeros"]
        for cell, seen in results[0].items()
        if not 0 == seen["zeros"][2] < seen["zeros"][7] < seen["zeros"][10] == seen["zeros"][STEPS]
    }


def test_zero_to_fp32_gives_the_masters_with_their_zeros(results, checkpoints, tmp_path):
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
    from safetensors.torch import load_file

    cells = [cell for cell in results[0] if CELLS[cell][0] in ZERO]
    assert len(cells) == (2 if results[0].keys() == {*WITH_THE_SUITE} else 8)
    for cell in cells:
        convert_zero_checkpoint_to_fp32_state_dict(
            checkpoints / cell, tmp_path / cell, tag="10", safe_serialization=True
        )
        written, masters = load_file(tmp_path / cell / "model.safetensors"), results[0][cell]["masters"]
        assert written.keys() == masters.keys()
        for name, master in masters.items():
            assert as_bytes(written[name]) == as_bytes(master) and written[name].shape == master.shape, (
                f"{cell}: {name}"
            )
        assert sum(int((written[name] == 0).sum()) for name in DECAYED) == results[0][cell]["zeros"][10], cell
    if "BF16_Optimizer" in results[0]:
        with pytest.raises(ValueError, match="is not a zero checkpoint"):  # this one it can't read
            convert_zero_checkpoint_to_fp32_state_dict(checkpoints / "BF16_Optimizer", tmp_path / "bf16", tag="10")
