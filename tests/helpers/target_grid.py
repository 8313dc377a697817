"""`python tests/helpers/target_grid.py`: trains to every target of the grid under every engine.

It writes docs/results/target.jsonl, one row a run, and the page target.md. A run that has a row is skipped, so the
program may be stopped at any time. `--table` only writes the page.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from queue import Empty
from statistics import median
from typing import Any

import torch

if __name__ == "__main__":
    # Modules are found in the folder of `helpers`, not in this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from helpers.paths import ROOT
from helpers.target_runs import FORMS, LARGE, RANKS, ROWS, Case, run
from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.timing import progress
from lp_dist.report import environment

RESULTS = ROOT / "docs" / "results"
COMMAND, SEED = "python tests/helpers/target_grid.py", 0
PS, TARGETS, SCOPES = (-1.0, 0.0, 0.5, 0.8), (0.3, 0.5, 0.7, 0.9), ("layer", "global")
ENGINES = {"one process": "plain", "ZeRO 1": "zero1", "ZeRO 2": "zero2", "ZeRO 3": "zero3", "FSDP2": "fsdp2"}
# The largest error that is allowed, as a fraction of the weights.
ALLOWED = 0.005
KEYS = ("engine", "form", "p", "target", "scope")


def grid() -> list[tuple]:
    return list(product(ENGINES, FORMS, PS, TARGETS, SCOPES))


def cell(row: dict[str, Any]) -> tuple:
    return tuple(row[key] for key in KEYS)


def row_of(key: tuple) -> dict[str, Any]:
    engine, *rest = key
    case = Case(ENGINES[engine], *rest, seed=SEED)
    return {
        **dict(zip(KEYS, key)),
        "ranks": 1 if engine == "one process" else RANKS,
        "steps": case.steps,
        "seed": SEED,
        **run(case),
        "machine": machine(),
        "versions": environment.versions(),
        "command": COMMAND,
    }


def machine() -> str:
    try:
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"


# -- the runs -----------------------------------------------------------------


def on_a_rank(rank: int, directory: str, cells: list[tuple], rows: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, of names that DeepSpeed uses
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=RANKS
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    for key in cells:
        gc.freeze()  # DeepSpeed collects garbage several times an engine, which would take longer than the steps
        row = row_of(key)
        if rank == 0:
            rows.put(row)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sharded(cells: list[tuple]) -> Iterator[dict[str, Any]]:
    """Rows of the runs on two ranks, in one group of processes for all of them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()  # compiled once, before both ranks want it
    context = torch.multiprocessing.get_context("spawn")
    rows = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            context.Process(target=on_a_rank, args=(rank, directory, cells, rows), daemon=True)
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        for _ in cells:
            while True:
                try:
                    yield rows.get(timeout=5)
                    break
                except Empty:
                    if any(process.exitcode for process in ranks):
                        for process in ranks:
                            process.kill()
                        raise SystemExit(
                            "a rank failed; its traceback is above, and the runs before it are kept"
                        ) from None
        for process in ranks:
            process.join()


def run_cells(cells: list[tuple]) -> Iterator[dict[str, Any]]:
    one_process = [key for key in cells if key[0] == "one process"]
    yield from map(row_of, one_process)
    if len(one_process) < len(cells):
        yield from sharded([key for key in cells if key[0] != "one process"])


def read() -> dict[tuple, dict[str, Any]]:
    return {cell(row): row for row in json_lines.read(RESULTS / "target.jsonl")}


# -- the table -----------------------------------------------------------------


def in_total(row: dict[str, Any], key: str = "achieved") -> float:
    return abs(row[key] - row["target"])


def in_a_tensor(row: dict[str, Any]) -> float:
    return max(
        abs(zeros / elements - row["target"]) for zeros, elements in row["tensors"].values() if elements >= LARGE
    )


def points(shares: Iterable[float]) -> str:
    return f"{100 * max(shares):.4f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for engine, form, p in product(ENGINES, FORMS, PS):
        form_rows = [row for row in rows if cell(row)[:3] == (engine, form, p)]
        decay = [100 * in_total(row, "by_decay") for row in form_rows]
        lines.append(
            f"| {engine} | {form} | {p:g} | {points(map(in_total, form_rows))} |"
            f" {points(in_a_tensor(row) for row in form_rows if row['scope'] == 'layer')} | {max(decay):.2f} |"
            f" {median(decay):.2f} |"
        )
    return "\n".join(lines)


def text(rows: list[dict[str, Any]]) -> str:
    by_layer = [row for row in rows if row["scope"] == "layer"]
    total, tensor, decay = (
        max(rows, key=in_total),
        max(by_layer, key=in_a_tensor),
        [in_total(row, "by_decay") for row in rows],
    )
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    first, last = (median(row["losses"][i] for row in rows) for i in (0, 1))
    versions = "; ".join(
        sorted({", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in rows})
    )
    matrices = " → ".join(f"{elements:,}" for _, elements in rows[0]["tensors"].values())
    exponents, targets = ", ".join(f"{p:g}" for p in PS), ", ".join(f"{100 * t:g} %" for t in TARGETS)
    in_a_cell, steps = len(TARGETS) * len(SCOPES), rows[0]["steps"]
    worst_in_total, worst_in_a_tensor = points([in_total(total)]), points([in_a_tensor(tensor)])
    return f"""# What a target reaches

`{COMMAND}` trains a small model to each target: p in {{{exponents}}}, targets of
{targets}, LpAdamW plain, preconditioned (γ = 0.5)
and capped (γ = 0.5, cap 1, latent_windows 8), both scopes, one process and {RANKS} ranks: {len(rows)} runs.
Below is the largest |achieved − target| of each {in_a_cell} of them, in points, counted by `measure_sparsity` on the
model's own copy after the last step. The fp32 masters have as many zeros in each tensor.

**Worst of all: {worst_in_total} points in total, {worst_in_a_tensor} points in a tensor of {LARGE:,} weights or
more.** That is the rounding to a whole weight, since the final pruning is exact. Before it, the decay by itself had
come within {100 * max(decay):.2f} points (worst) and {100 * median(decay):.2f} (median), the last two columns.

The model has matrices of {matrices} weights, uneven sizes, so that shards end within rows and in padding. It takes
{steps} steps of {RANKS} × {ROWS} rows that a fixed teacher has labelled, with a cosine schedule after a warm-up, and
the target's own defaults (window 0.1 to 0.7, cubic). It learns: the median loss falls from {first:.2f} to {last:.2f}.
Seed {SEED}. {machines}, no GPU, other jobs beside it; gloo; {versions}.
Each run as it was printed: [target.jsonl](target.jsonl).

When these ran, the final pruning of the forms with γ took p = 1 for the saliency, as the target itself named no p. It
takes that of the decay now, so that more of the zeros are there before it than the last two columns say.

| engine | form | p | in total | per tensor | by decay alone, worst | by decay alone, median |
|---|---|---:|---:|---:|---:|---:|
{table(rows)}

"In total" is over both scopes, "per tensor" over `scope="layer"`, where each tensor has the target to itself.
"""


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    rows = read()
    missing = [] if "--table" in arguments else [key for key in grid() if key not in rows]
    for row in progress(run_cells(missing), "runs", total=len(missing), disable=not missing, leave=True):
        rows[cell(row)] = row
        json_lines.append(RESULTS / "target.jsonl", row)
    measured = [rows[key] for key in grid() if key in rows]
    if len(measured) < len(grid()):
        raise SystemExit(f"{len(grid()) - len(measured)} runs are missing; run {COMMAND} without --table")
    (RESULTS / "target.md").write_text(text(measured))
    missed = [
        cell(row)
        for row in measured
        if in_total(row) > ALLOWED
        or (row["scope"] == "layer" and in_a_tensor(row) > ALLOWED)
        or row["masters"] != row["tensors"]
    ]
    for key in missed:
        print("missed:", *key)
    print(
        f"{len(measured)} runs; {len(missed)} miss their target by more than {100 * ALLOWED:g} points, or have other"
        " zeros in the masters"
    )
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
