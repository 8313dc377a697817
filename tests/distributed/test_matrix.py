"""Every optimizer under every engine and dtype, against one process; what comes out is the table in docs/matrix.md and
in README.md.

LP_DIST_WRITE_DOCS=1 writes the tables instead of comparing with them.
"""

from __future__ import annotations

import gc
import logging
import re
from collections import defaultdict
from dataclasses import replace
from functools import cache

import pytest
import torch

from helpers import matrix
from helpers.matrix import DEEPSPEED, DTYPES, ENGINES, OPTIMIZERS, Cell, How, TrainedRun, cells_of, how, one_process
from helpers.tables import hold, rows

TOLERANCE, WITHIN = {"rtol": 1e-5, "atol": 1e-6}, "rtol 1e-5, atol 1e-6"
THREE = "fp32, 3 ranks"
COLUMNS = (*DTYPES, THREE)
RESULTS: dict[tuple[str, str], list[str]] = defaultdict(
    list
)  # (engine, column of the table) → the verdict of each run
ANSWERS: dict[str, str] = {}  # what was asked of DeepSpeed → its answer

NO_FP16 = "ValueError: Type fp16 is not supported on your device"
# What bare DeepSpeed says to a config that lacks something, or that asks for what there is not.
ASKED = {
    'an optimizer that it does not know, without `"zero_allow_untested_optimizer": true`': (
        [Cell("ZeRO 1"), Cell("ZeRO 2"), Cell("ZeRO 3")],
        {"zero_allow_untested_optimizer": False},
    ),
    'ours with CPU offload, without `"zero_force_ds_cpu_optimizer": false`': (
        [Cell("ZeRO 2, CPU offload"), Cell("ZeRO 3, CPU offload")],
        {"zero_force_ds_cpu_optimizer": True},
    ),
    "fp16, on a CPU that is not made for it": ([Cell(engine, "fp16") for engine in DEEPSPEED], {}),
    '`"grad_accum_dtype": "fp32"` at stage 1, but no bf16': ([Cell("BF16_Optimizer")], {}),
}
UNTESTED, OFFLOAD, FP16, NO_BF16 = ASKED


@cache
def unclipped(does: How, cell: Cell, world_size: int) -> TrainedRun:
    return one_process(does, cell, world_size, [])


def verdict(cell: Cell, runs: list[TrainedRun], world_size: int) -> str:
    """Compares what the ranks hold with one process: "bitwise", or the tolerance within which it is. Fails beyond
    that.
    """
    run, does = runs[0], how(cell)
    if cell.clipped:
        wanted = one_process(does, cell, world_size, run.norms)
    else:
        wanted = unclipped(does, replace(cell, engine="any that does so"), world_size)
    for other in runs[1:]:
        pairs = zip(sum(run.weights, []), sum(other.weights, []), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{cell}: the ranks differ"
    if cell.clipped:
        norm_is_reported = (cell.engine, cell.dtype) != ("ZeRO 0", "fp32")  # there, DeepSpeed keeps the norm to itself
        assert len(run.norms) == norm_is_reported * matrix.STEPS and any(
            norm > matrix.MAX_NORM for norm in wanted.norms
        )
        for step, norm in enumerate(run.norms):
            assert float(norm) == pytest.approx(float(wanted.norms[step]), rel=1e-6), f"{cell}: norm of step {step}"
    share = float((matrix.decayed(run.weights[-1]) == 0).float().mean())
    assert 0.05 < share < 0.95, f"{cell}: {share:.0%} zeros, so comparing them means nothing"
    pairs = list(zip(sum(run.weights, []), sum(wanted.weights, []), strict=True))
    if all(torch.equal(a, b) for a, b in pairs):
        return "bitwise"
    for a, b in pairs:
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m: f"{cell}: {m}")
        assert torch.equal(a == 0, b == 0), f"{cell}: other zeros than in one process"
    return WITHIN


# --- the runs
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_setting_matters(optimizer):
    """Else an engine that loses a key of a group would pass."""
    cell = Cell("one process", optimizer=optimizer)
    weights = unclipped(how(cell), cell, 2).weights[-1]
    cls, settings = OPTIMIZERS[optimizer]
    others = {"lr": 1e-3, "weight_decay": 0.1, "p": 1.0, "precondition": 0.25, "cutoff": 1.0, "momentum": 0.0}
    for key, value in others.items():
        if key in settings:
            OPTIMIZERS["another"] = (cls, {**settings, key: value})
            other = one_process(how(cell), replace(cell, optimizer="another"), 2, []).weights[-1]
            del OPTIMIZERS["another"]
            assert not torch.equal(matrix.decayed(weights), matrix.decayed(other)), f"{optimizer}: {key}"


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_process(dtype):
    for cell in cells_of(dtype):
        if cell.engine == "one process":
            RESULTS[cell.engine, dtype].append(verdict(cell, [matrix.torch_run(cell, 0, 1)], 1))


def get_fp16() -> None:
    """DeepSpeed wants a CPU with fp16 instructions; torch computes fp16 on any."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def on_a_rank(rank: int, world_size: int, cells: list[Cell]) -> list[TrainedRun]:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    get_fp16()
    runs = []
    for cell in cells:
        gc.freeze()  # DeepSpeed looks for garbage several times an engine, which would take longer than the steps
        try:
            runs.append(
                (matrix.deepspeed_run if cell.engine in DEEPSPEED else matrix.torch_run)(cell, rank, world_size)
            )
        except Exception as error:
            raise RuntimeError(f"in {cell}") from error
    return runs


# Every optimizer, and all that the engines do otherwise than each other.
SOME = [
    Cell(engine, dtype, optimizer, accumulation=2, clipped=engine == "ZeRO 2")
    for engine, dtype in [("ZeRO 2", "fp32"), ("ZeRO 3", "bf16"), ("FSDP2", "fp32")]
    for optimizer in OPTIMIZERS
]


def test_some_of_them_on_two_ranks_are_one_process(run_ranks):
    for cell, *runs in zip(SOME, *run_ranks(on_a_rank, 2, SOME), strict=True):
        assert verdict(cell, runs, 2) == "bitwise", cell


@pytest.mark.long
@pytest.mark.parametrize("dtypes", ["fp32", "bf16 fp16"])
def test_two_ranks_are_one_process(run_ranks, dtypes):
    cells = [cell for dtype in dtypes.split() for cell in cells_of(dtype) if cell.engine != "one process"]
    for cell, *runs in zip(cells, *run_ranks(on_a_rank, 2, cells), strict=True):
        said = verdict(cell, runs, 2)
        assert said == "bitwise", f"{cell}: {said}; find out why before it gets a tolerance"
        assert (runs[0].wrapper == "BF16_Optimizer") == (cell.engine == "BF16_Optimizer"), (
            f"{cell} ran {runs[0].wrapper}"
        )
        RESULTS[cell.engine, cell.dtype].append(said)


@pytest.mark.long
def test_three_ranks(run_ranks):
    """Uneven splits. Thirds are not exact, and each engine adds them up in another order, so here is a tolerance."""
    cells = [Cell(engine) for engine in ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2")]
    for cell, *runs in zip(cells, *run_ranks(on_a_rank, 3, cells), strict=True):
        verdict(cell, runs, 3)
        RESULTS[cell.engine, THREE].append(WITHIN)  # bitwise is luck here


def ask(rank: int, world_size: int) -> tuple[dict[str, str], list[TrainedRun]]:
    import deepspeed

    def answer(cell: Cell, changes: dict) -> str:
        model = matrix.model_of()
        optimizer, config = matrix.optimizer_of(cell, model), matrix.config_of(cell) | changes
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        except Exception as error:
            message = re.sub(r" \(<class .*?>\)", "", str(error))  # ours may move
            return f"{type(error).__name__}: {message.split('. ')[0].rstrip('.')}"
        return f"takes {type(engine.optimizer).__name__}"

    answers = {
        what: " or ".join(sorted({answer(cell, changes) for cell in cells}))
        for what, (cells, changes) in ASKED.items()
    }
    get_fp16()
    dry, sgd = Cell("ZeRO 0", "bf16", "LpAdamW, preconditioned, capped"), Cell("ZeRO 0", "fp16", "LpSGD")
    scales = ({"enabled": True, "loss_scale": scale} for scale in (1.0, 128.0))
    return answers, [
        matrix.deepspeed_run(dry, 0, 1, attached=False),
        *(matrix.deepspeed_run(sgd, 0, 1, fp16=scale) for scale in scales),
    ]


@pytest.mark.long
def test_what_deepspeed_refuses_or_does_wrong(run_ranks):
    """The rest of this file says what works; this holds what does not, so that it is noticed when it changes."""
    ((answers, (dry, unscaled, scaled)),) = run_ranks(ask, 1)
    ANSWERS.update(answers)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        ANSWERS[FP16] = NO_FP16  # this CPU is made for it; the table is for one that is not
    assert ANSWERS[FP16] == NO_FP16
    assert ANSWERS[UNTESTED].startswith("AssertionError: ") and ANSWERS[OFFLOAD].startswith("ZeRORuntimeException: ")
    assert ANSWERS[NO_BF16] == "takes DeepSpeedZeroOptimizer"
    # ZeRO 0 in 16 bits takes a step with zero gradients when it is made: √v̂ is 0, so everything that decays becomes
    # zero.
    assert not matrix.decayed(dry.weights[-1]).any(), (
        "no longer so? Then docs/matrix.md and engines.undo_dry_step can forget it"
    )
    # And it divides the gradients by a loss scale that the loss was not multiplied by.
    ends = [matrix.decayed(run.weights[-1]) for run in (unscaled, scaled)]
    assert not torch.allclose(*ends, rtol=1e-3), "mended? Then docs/matrix.md and matrix.how can forget it"


# --- the tables
# -----------------------------------------------------------------------------

# Where an entry needs more than a word, docs/matrix.md has a footnote of this name.
NOTES = {
    **{(engine, "fp16"): "cpu" for engine in DEEPSPEED},
    **{("BF16_Optimizer", column): "bf16" for column in DTYPES},
    ("ZeRO 0", "bf16"): "zero0",
    ("ZeRO 0", "fp16"): "zero0",
}


def table(results: dict[tuple[str, str], list[str]], answers: dict[str, str]) -> str:
    def entry(engine: str, column: str) -> str:
        if verdicts := results.get((engine, column)):
            said = f"{' or '.join(sorted(set(verdicts)))}, {len(verdicts)} run{'s' * (len(verdicts) > 1)}"
        else:
            said = "not run" if column == THREE else f"impossible: {answers[NO_BF16]}"
        return said + (f" [^{NOTES[engine, column]}]" if (engine, column) in NOTES else "")

    return "\n\n".join(
        [
            rows(
                ["engine", *COLUMNS], *([engine, *(entry(engine, column) for column in COLUMNS)] for engine in ENGINES)
            ),
            rows(
                ["asked of bare DeepSpeed", "its answer"], *([what, f"`{answer}`"] for what, answer in answers.items())
            ),
        ]
    )


def works_with(results: dict[tuple[str, str], list[str]]) -> str:
    def short(engine: str, column: str) -> str:
        if not results.get((engine, column)):
            return "no"
        return "[with care](docs/matrix.md)" if NOTES.get((engine, column)) == "zero0" else "yes"

    def compared(engine: str) -> str:
        ranks = results.get((engine, THREE))
        verdicts = {verdict for column in DTYPES for verdict in results.get((engine, column), [])}
        return " or ".join(sorted(verdicts)) + (f"; on 3 ranks {ranks[0]}" if ranks else "")

    return rows(
        ["engine", *DTYPES, "compared with one process"],
        *([engine, *(short(engine, column) for column in DTYPES), compared(engine)] for engine in ENGINES),
    )


@pytest.mark.long
@pytest.mark.parametrize("path, name", [("docs/matrix.md", "table"), ("README.md", "works with")])
def test_the_tables_say_what_ran(path, name):
    runs = sum(len(cells_of(dtype)) for dtype in DTYPES) + 5
    assert sum(map(len, RESULTS.values())) == runs and ANSWERS, "run the whole file, and mend what failed before this"
    made = table(RESULTS, ANSWERS) if name == "table" else works_with(RESULTS)
    text = hold(path, name, "python -m pytest tests/distributed/test_matrix.py", made)
    assert all(f"[^{note}]:" in text for note in re.findall(r"\[\^(\w+)\]", made)), f"{path} lacks a footnote"
