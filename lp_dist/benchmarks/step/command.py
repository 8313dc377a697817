"""`lp-dist bench step`: how long a step takes, against its peers in the same run; `stepping_whole` times whole
training steps.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lp_dist.benchmarks.step.implementations import (
    COPY,
    PEER,
    SHAPES,
    Call,
    Missing,
    Tensors,
    contenders,
    start_compiler,
    transformer,
)
from lp_dist.benchmarks.step.training_step import ENGINES, LOOK, Shape, whole_runs
from lp_dist.benchmarks.timing import wait
from lp_dist.errors import UsageError
from lp_dist.report import environment

_NEEDED = 40  # bytes a weight: the tensors, the copy's, the peers' temporaries
_SMALLEST = 10_000  # weights that the shapes of a transformer can be scaled down to


def step(
    sizes: str = "1e6,2e7",
    repeats: int = 11,
    out: str = "docs/results",
    whole: bool = True,
    seed: int = 0,
    compiled: bool = True,
    shape: Shape | None = None,
    engines: str = "; ".join(ENGINES),
) -> Path:
    """Times the step of every contender, and with `whole` whole training steps under every engine.

    Prints a table, appends a line for the run and one for every row to `step.jsonl` in `out`, writes `step.md` from
    the rows of this run, and returns its path. sizes: numbers of weights, by commas. repeats: rounds, of one call of
    every contender each. compiled: whether torch.compile takes part. shape: of the model of the whole steps. engines:
    of these, by semicolons.

    Raises:
        UsageError: the sizes can't be read, or are too small; there is no such engine, or no such groups.
    """
    numbers, under = _numbers(sizes), _engines(engines)
    shape = shape or Shape()
    shape.check()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "step.jsonl"
    words = f"--sizes {shlex.quote(sizes)} --repeats {repeats} --seed {seed}" + ("" if compiled else " --no-compiled")
    words += "".join(f" --{key} {value}" for key, value in shape.described().items()) if whole else " --no-whole"
    words += f" --engines {shlex.quote('; '.join(under))}" if whole and under != tuple(ENGINES) else ""
    run = max((row["run"] for row in rows_of(path)), default=0) + 1
    append(
        path,
        {
            "benchmark": "step",
            "run": run,
            "command": f"lp-dist bench step {words}",
            "seed": seed,
            "repeats": repeats,
            "device": _name(device),
            "machine": environment.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "versions": environment.versions(),
            **(shape.described() if whole else {}),
        },
    )
    for n in numbers:
        for kind in SHAPES:
            for row in _group(n, kind, device, repeats, seed, compiled):
                append(path, {"run": run, "part": "step", **row})
    if whole:
        for row in whole_runs(shape, seed, under):
            append(path, {"run": run, "part": "whole", **row})
    rows = [row for row in rows_of(path) if row["run"] == run]
    console = Console()
    for table in console_tables(rows):
        (console if console.is_terminal else Console(width=150)).print(table)
    (directory / "step.md").write_text(markdown(rows))
    return directory / "step.md"


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of all runs; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _numbers(sizes: str) -> list[int]:
    try:
        numbers = [int(float(size)) for size in sizes.split(",") if size.strip()]
    except ValueError:
        raise UsageError(f"--sizes {sizes}: these must be numbers of weights by commas, such as 1e6,2e7") from None
    if any(n < _SMALLEST for n in numbers):
        raise UsageError(
            f"--sizes {sizes}: a size must be at least {_SMALLEST:,}, for the shapes of a transformer to fit in"
        )
    return numbers


def _engines(names: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in names.split(";"))
    unknown = [name for name in found if name not in ENGINES]
    if unknown:
        raise UsageError(f"--engines: there is no {unknown[0]!r}; there are {'; '.join(ENGINES)}")
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else str(device)


def _available(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


# -- timing -------------------------------------------------------------------


def _group(
    n: int, kind: str, device: torch.device, repeats: int, seed: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    """A row for each contender, those that can't run too; one row alone if memory is short."""
    free = _available(device)
    if free < _NEEDED * n:
        why = f"{_NEEDED * n / 1e9:.1f} GB of memory needed and {free / 1e9:.1f} GB free"
        tqdm.write(f"{kind}, {n:,} weights: skipped, {why}")
        yield {"shape": kind, "weights": n, "contender": None, "skipped": why}
        return
    torch.manual_seed(seed)
    tensors = (
        Tensors.collapsing(n, device)
        if kind == "collapsing"
        else Tensors.made([(n,)] if kind == "flat" else transformer(n), device)
    )
    about = {
        "shape": kind,
        "weights": tensors.weight_count,
        "tensors": len(tensors.weights),
        "threads": torch.get_num_threads(),
    }
    calls, compiling, missing = {}, {}, {}
    if kind == "flat" and compiled:
        start_compiler()
    for name, make in tqdm(
        contenders(kind, device, compiled).items(), desc=f"{kind}, {n:,}: making ready", leave=False
    ):
        start = time.perf_counter()
        try:
            calls[name] = make(tensors)
        except Missing as error:
            missing[name] = str(error)
            tqdm.write(f"{name}: skipped, {error}")
        if name.startswith("torch.compile"):
            compiling[name] = time.perf_counter() - start
    times = _rounds(
        f"{kind}, {n:,}", calls, repeats, seed, _restorer(tensors) if kind == "collapsing" else lambda: None
    )
    quartiles = {name: [1e3 * q for q in _quartiles(ts)] for name, ts in times.items()}
    for name, (low, ms, high) in quartiles.items():
        moved = 26 if "bf16" in name else 28
        yield {
            **about,
            "contender": name,
            "ms": ms,
            "quartiles": [low, high],
            "repeats": repeats,
            "ratio": ms / quartiles[PEER][1],
            "bytes a weight": moved,
            "GB/s": moved * tensors.weight_count / ms / 1e6,
            "of copy": moved / 28 * quartiles[COPY][1] / ms,
            **({"compile s": compiling[name]} if name in compiling else {}),
        }
    for name, why in missing.items():
        yield {**about, "contender": name, "skipped": why}


def _restorer(tensors: Tensors) -> Call:
    changing = [*tensors.weights, *tensors.exp_avgs, *tensors.exp_avg_sqs]
    kept = [t.clone() for t in changing]
    return lambda: torch._foreach_copy_(changing, kept)


@torch.no_grad()
def _rounds(title: str, calls: dict[str, Call], repeats: int, seed: int, before: Call) -> dict[str, list[float]]:
    """Seconds of `repeats` rounds after one that is not counted: a call of each contender, in another order every
    time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    for i in tqdm(range(repeats + 1), desc=title, leave=False):
        shuffle(order)
        for name in order:
            before()
            wait()
            start = time.perf_counter()
            calls[name]()
            wait()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def _quartiles(times: list[float]) -> list[float]:
    return (
        torch.tensor(times, dtype=torch.float64)
        .quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        .tolist()
    )


# -- tables -------------------------------------------------------------------

_TITLES = {
    "flat": "one flat tensor",
    "many": "the tensors of a transformer",
    "collapsing": "one flat tensor, collapsing",
}
_COLUMNS = ("", "ms", "quartiles", "× torch fused", "GB/s", "of copy")


def _cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [row["contender"] or "all", "skipped: " + row["skipped"].splitlines()[0], *[""] * 4]
    low, high = row["quartiles"]
    name = row["contender"] + (f" (compiled in {row['compile s']:.1f} s)" if "compile s" in row else "")
    return [
        name,
        _ms(row["ms"]),
        f"{_ms(low)} to {_ms(high)}",
        f"{row['ratio']:.2f}",
        f"{row['GB/s']:.1f}",
        f"{row['of copy']:.0%}",
    ]


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _whole_cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [row["engine"], "skipped: " + row["skipped"].splitlines()[-1], *[""] * 4]
    speeds = [
        f"{row[key]['tokens/s']:.0f} ({row[key]['quartiles'][0]:.0f} to {row[key]['quartiles'][1]:.0f})"
        for key in ("ours", "peer")
    ]
    return [
        f"{row['engine']}, {row['ranks']} × {row['threads']}",
        speeds[0],
        row["peer"]["name"],
        speeds[1],
        f"{row['ratio']:.3f}",
        f"{row['zeros']:.0%}",
    ]


_WHOLE_COLUMNS = ("engine, ranks × threads", "LpAdamW tokens/s", "peer", "peer tokens/s", "ratio", "zeros at the end")


def _parts(
    rows: list[dict[str, Any]],
) -> tuple[dict[str, Any], dict[tuple[str, int], list[dict[str, Any]]], list[dict[str, Any]]]:
    """The run's own line, the rows of the step by shape and number of weights, and those of whole steps."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows[1:]:
        if row["part"] == "step":
            groups.setdefault((row["shape"], row["weights"]), []).append(row)
    return rows[0], groups, [row for row in rows[1:] if row["part"] == "whole"]


def console_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Of one run: the step alone, and whole training steps if there are any."""
    run, groups, whole = _parts(rows)
    where = f"{run['machine']}, {run['device']}"
    found = []
    if groups:
        found.append(table := Table(title=f"One step, median of {run['repeats']} rounds on {where}"))
        for column in (*_COLUMNS, "weights", "threads"):
            table.add_column(column, justify="right" if column else "left")
        for (kind, n), group in groups.items():
            table.add_row(f"[bold]{_TITLES[kind]}[/bold]")
            for row in group:
                table.add_row(*_cells(row), f"{n:,}", str(run["threads"]))
            table.add_section()
    if whole:
        found.append(table := Table(title=f"Whole training steps on {where}"))
        for column in _WHOLE_COLUMNS:
            table.add_column(column, justify="left" if column in ("engine, ranks × threads", "peer") else "right")
        for row in whole:
            table.add_row(*_whole_cells(row))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page of one run."""
    run, groups, whole = _parts(rows)
    versions = ", ".join(
        f"{name} {version}"
        for name, version in run["versions"].items()
        if name in ("torch", "deepspeed", "transformers")
    )
    lines = [
        "# What a step costs",
        "",
        f"`{run['command']}`",
        "",
        (
            f"{run['machine']}, {run['cores']} cores, threads: {run['threads']}, device: {run['device']}; {versions};"
            f" seed {run['seed']}."
        ),
        (
            f"Medians of {run['repeats']} rounds after one that isn't counted; a round is one call of every contender,"
            " in another order each time, all"
        ),
        "on the same memory. Every row as it was measured: [step.jsonl](step.jsonl).",
    ]
    if groups:
        lines += [
            "",
            (
                "GB/s: the bytes that a step can't do without, 28 a weight (weights and two moments read and written,"
                " fp32 gradients read; 26 with"
            ),
            (
                "bf16 gradients), over the time. Copy: torch's `copy_` of as many bytes, read and written. Weights,"
                " state and gradients are fp32, all"
            ),
            (
                "tensors decay, and steps are so small that the weights stay as they are. Capped: the cutoff is the"
                " median of x. Collapsing: weights"
            ),
            (
                "from 1e-14 to 1, moments down to denormals, half of the gradients zero, all put back before each"
                " call, and a λ by which half of the"
            ),
            "weights shrink to a half or less in it.",
        ]
    for (kind, n), group in groups.items():
        count = f", {group[0]['tensors']} in all" if kind == "many" and "tensors" in group[0] else ""
        lines += ["", f"## {n:,} weights: {_TITLES[kind]}{count}", "", *_markdown_table(_COLUMNS, map(_cells, group))]
    if whole:
        lines += ["", "## Whole training steps", ""]
        for row in [row for row in whole if "model" in row][:1]:
            lines += [
                f"{row['model']}.",
                (
                    f"LpAdamW has p = 0.5, γ = 0.5 and a `SparsityTarget`{_target_of(run)} that acts all the time and"
                    f" looks at the weights every {LOOK} steps, and"
                ),
                (
                    f"zeros are counted every {LOOK} steps. Both train in the same processes, a step each in turn;"
                    " medians over"
                ),
                (
                    f"{row['blocks']} blocks of {LOOK} steps, quartiles in brackets; the ratio is the median of the"
                    " blocks' ratios."
                ),
                "",
            ]
        lines += _markdown_table(_WHOLE_COLUMNS, map(_whole_cells, whole), left=(0, 2))
    return "\n".join(lines) + "\n"


def _target_of(run: dict[str, Any]) -> str:
    return (
        f" of {run['groups']} (a decay every {'step' if run['interval'] == 1 else str(run['interval']) + ' steps'})"
        if run.get("groups")
        else ""
    )


def _markdown_table(columns: Iterable[str], rows: Iterable[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    table = [list(columns), ["---" if i in left else "---:" for i, _ in enumerate(columns)], *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table]
