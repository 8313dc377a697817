"""`lp-dist bench step`: how long a step takes, against other implementations in the same run.

`training_step.py` times training steps.
"""

from __future__ import annotations

import os
import random
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.markdown import markdown_table
from lp_dist.benchmarks.step.implementations import (
    COPY,
    PEER,
    SHAPES,
    Call,
    Missing,
    Tensors,
    implementations_for,
    start_compiler,
    transformer,
)
from lp_dist.benchmarks.step.training_step import ENGINES, UPDATE_EVERY, Shape, training_rows
from lp_dist.benchmarks.timing import benchmark_device, note, progress, quartiles, seconds_of
from lp_dist.errors import UsageError
from lp_dist.report import environment
from lp_dist.report.console import print_table

# Bytes a weight: the tensors, the copy's, and temporaries of the other implementations.
_NEEDED = 40
# Weights to which the shapes of a transformer can be scaled down.
_SMALLEST = 10_000


def step(
    *,
    sizes: str = "1e6,2e7",
    repeats: int = 11,
    out: str = "docs/results",
    training_steps: bool = True,
    seed: int = 0,
    compiled: bool = True,
    shape: Shape | None = None,
    engines: str = "; ".join(ENGINES),
) -> Path:
    """Runs `lp-dist bench step`: times every implementation's step, and training steps under every engine.

    Prints tables, appends a row for the run and one for every measurement to step.jsonl, and writes step.md from the
    rows of this run.

    Args:
        sizes: numbers of weights, with commas between them.
        repeats: rounds; in each, every implementation is called once.
        out: directory of step.jsonl and step.md.
        training_steps: whether training steps are timed as well.
        seed: of the tensors, the order of calls, and the training.
        compiled: whether torch.compile takes part.
        shape: of the model in training steps; None: the defaults.
        engines: of training steps, some of ENGINES with semicolons between them.
    Returns:
        The path of step.md.
    Raises:
        UsageError: a size cannot be read or is too small, or there is no such engine or group.
    """
    numbers, engine_names = _numbers(sizes), _engines(engines)
    shape = shape or Shape()
    shape.check()
    device = benchmark_device()
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "step.jsonl"
    options = f"--sizes {shlex.quote(sizes)} --repeats {repeats} --seed {seed}"
    options += "" if compiled else " --no-compiled"
    if training_steps:
        options += "".join(f" --{key.replace('_', '-')} {value}" for key, value in shape.described().items())
        options += f" --engines {shlex.quote('; '.join(engine_names))}" if engine_names != tuple(ENGINES) else ""
    else:
        options += " --no-training-steps"
    run = max((row["run"] for row in json_lines.read(path)), default=0) + 1
    json_lines.append(
        path,
        {
            "benchmark": "step",
            "run": run,
            "command": f"lp-dist bench step {options}",
            "seed": seed,
            "repeats": repeats,
            "device": _name(device),
            "machine": environment.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "versions": environment.versions(),
            **(shape.described() if training_steps else {}),
        },
    )
    for n in numbers:
        for kind in SHAPES:
            for row in time_group(n, kind, device, repeats, seed, compiled):
                json_lines.append(path, {"run": run, "measured": "step", **row})
    if training_steps:
        for row in training_rows(shape, seed, engine_names):
            json_lines.append(path, {"run": run, "measured": "training step", **row})
    results = StepResults.of_run(json_lines.read(path), run)
    print_tables(results)
    (directory / "step.md").write_text(markdown(results))
    return directory / "step.md"


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


def _engines(words: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in words.split(";"))
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise UsageError(f"--engines: there is no {unknown[0]!r}; there are {'; '.join(ENGINES)}")
    return names


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else str(device)


def available_bytes(device: torch.device) -> int:
    """Free memory.

    Args:
        device: a GPU, or the CPU.
    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


# -- timing -------------------------------------------------------------------


@dataclass
class _Prepared:
    """Implementations by name: calls of a step, seconds of their compilation, and why the others cannot run."""

    calls: dict[str, Call] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def time_group(
    n: int, kind: str, device: torch.device, repeats: int, seed: int, compiled: bool
) -> Iterator[ResultRow]:
    """Times all implementations on the same tensors.

    Args:
        n: number of weights.
        kind: of SHAPES.
        device: where the tensors lie.
        repeats: rounds, of one call of each implementation.
        seed: of the tensors and of the order of calls.
        compiled: whether torch.compile takes part.
    Returns:
        A row for each implementation, also for those that cannot run; one row if memory is short.
    """
    free = available_bytes(device)
    if free < _NEEDED * n:
        reason = f"{_NEEDED * n / 1e9:.1f} GB of memory needed and {free / 1e9:.1f} GB free"
        note(f"{kind}, {n:,} weights: skipped, {reason}")
        yield {"shape": kind, "weights": n, "implementation": None, "skipped": reason}
        return
    torch.manual_seed(seed)
    tensors = (
        Tensors.collapsing(n, device)
        if kind == "collapsing"
        else Tensors.random([(n,)] if kind == "flat" else transformer(n), device)
    )
    description = {
        "shape": kind,
        "weights": tensors.weight_count,
        "tensors": len(tensors.weights),
        "threads": torch.get_num_threads(),
    }
    if kind == "flat" and compiled:
        start_compiler()
    prepared = _prepare(f"{kind}, {n:,}: preparing", implementations_for(kind, device, compiled), tensors)
    restore = restorer(tensors) if kind == "collapsing" else lambda: None
    times = _time_rounds(f"{kind}, {n:,}", prepared.calls, repeats, seed, restore)
    milliseconds = {name: [1e3 * q for q in quartiles(values)] for name, values in times.items()}
    for name, (low, ms, high) in milliseconds.items():
        moved = 26 if "bf16" in name else 28
        yield {
            **description,
            "implementation": name,
            "ms": ms,
            "quartiles": [low, high],
            "repeats": repeats,
            "ratio": ms / milliseconds[PEER][1],
            "bytes a weight": moved,
            "GB/s": moved * tensors.weight_count / ms / 1e6,
            "of copy": moved / 28 * milliseconds[COPY][1] / ms,
            **({"compile s": prepared.compile_seconds[name]} if name in prepared.compile_seconds else {}),
        }
    for name, reason in prepared.missing.items():
        yield {**description, "implementation": name, "skipped": reason}


def _prepare(title: str, implementations: dict[str, Any], tensors: Tensors) -> _Prepared:
    prepared = _Prepared()
    for name, make in progress(implementations.items(), title):
        start = time.perf_counter()
        try:
            prepared.calls[name] = make(tensors)
        except Missing as error:
            prepared.missing[name] = str(error)
            note(f"{name}: skipped, {error}")
        if name.startswith("torch.compile"):
            prepared.compile_seconds[name] = time.perf_counter() - start
    return prepared


def restorer(tensors: Tensors) -> Call:
    """A call that sets the weights and moments back to what they are now.

    Args:
        tensors: what steps will change.
    Returns:
        The call; it keeps copies.
    """
    changing = [*tensors.weights, *tensors.exp_avgs, *tensors.exp_avg_sqs]
    copies = [t.clone() for t in changing]
    return lambda: torch._foreach_copy_(changing, copies)


@torch.no_grad()
def _time_rounds(title: str, calls: dict[str, Call], repeats: int, seed: int, restore: Call) -> dict[str, list[float]]:
    """Seconds of `repeats` rounds, after one that is not counted.

    In a round each implementation is called once, in a new order, after `restore`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    for i in progress(range(repeats + 1), title):
        shuffle(order)
        for name in order:
            restore()
            seconds = seconds_of(calls[name])
            if i:
                times[name].append(seconds)
    return times


# -- tables -------------------------------------------------------------------

_TITLES = {
    "flat": "one flat tensor",
    "many": "the tensors of a transformer",
    "collapsing": "one flat tensor, collapsing",
}
_COLUMNS = ("", "ms", "quartiles", "× torch fused", "GB/s", "of copy")
_TRAINING_COLUMNS = (
    "engine, ranks × threads",
    "LpAdamW tokens/s",
    "peer",
    "peer tokens/s",
    "ratio",
    "zeros at the end",
)


@dataclass
class StepResults:
    """The rows of one run.

    Args:
        run: the run's row: its command, machine and versions.
        steps: rows of the step, by shape and number of weights.
        training_steps: rows of training steps.
    """

    run: ResultRow
    steps: dict[tuple[str, int], list[ResultRow]]
    training_steps: list[ResultRow]

    @classmethod
    def of_run(cls, rows: Iterable[ResultRow], run: int) -> StepResults:
        """Selects one run.

        Args:
            rows: of step.jsonl, as `json_lines.read` gives them.
            run: its number.
        Returns:
            Its results.
        """
        header, *measured = (row for row in rows if row["run"] == run)
        steps: dict[tuple[str, int], list[ResultRow]] = {}
        for row in measured:
            if row["measured"] == "step":
                steps.setdefault((row["shape"], row["weights"]), []).append(row)
        return cls(header, steps, [row for row in measured if row["measured"] == "training step"])


def _cells(row: ResultRow) -> list[str]:
    if "skipped" in row:
        return [row["implementation"] or "all", "skipped: " + row["skipped"].splitlines()[0], *[""] * 4]
    low, high = row["quartiles"]
    name = row["implementation"] + (f" (compiled in {row['compile s']:.1f} s)" if "compile s" in row else "")
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


def _training_cells(row: ResultRow) -> list[str]:
    if "skipped" in row:
        return [row["engine"], "skipped: " + row["skipped"].splitlines()[-1], *[""] * 4]
    speeds = [
        f"{row[key]['tokens/s']:.0f} ({row[key]['quartiles'][0]:.0f} to {row[key]['quartiles'][1]:.0f})"
        for key in ("lp_dist", "peer")
    ]
    return [
        f"{row['engine']}, {row['ranks']} × {row['threads']}",
        speeds[0],
        row["peer"]["name"],
        speeds[1],
        f"{row['ratio']:.3f}",
        f"{row['zeros']:.0%}",
    ]


def print_tables(results: StepResults) -> None:
    """Prints the tables of a run: one for each kind of tensors, and one of training steps.

    Args:
        results: of the run.
    """
    run = results.run
    machine = f"{run['machine']}, {run['device']}"
    for (kind, n), rows in results.steps.items():
        title = f"{n:,} weights, {_TITLES[kind]}: a step, median of {run['repeats']} rounds on {machine}"
        print_table(f"{title}, threads: {run['threads']}", _COLUMNS, map(_cells, rows), width=150)
    if results.training_steps:
        print_table(
            f"Training steps on {machine}", _TRAINING_COLUMNS, map(_training_cells, results.training_steps), width=150
        )


def markdown(results: StepResults) -> str:
    """The page of a run.

    Args:
        results: of the run.
    Returns:
        The text of step.md.
    """
    run = results.run
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
            f"Medians of {run['repeats']} rounds after one that isn't counted; a round is one call of every"
            " implementation, in another order each time, all"
        ),
        "on the same memory. Every row as it was measured: [step.jsonl](step.jsonl).",
    ]
    if results.steps:
        lines += [
            "",
            "GB/s: the bytes that a step must move, over its time: 28 a weight, and 26 with bf16 gradients.",
            "These are weights and two moments, read and written, and fp32 gradients, read.",
            "Copy: torch's `copy_` of as many bytes, read and written.",
            "Weights, state and gradients are fp32. All tensors decay, and steps are so small that the weights stay",
            "as they are. Capped: the cutoff is the median saliency.",
            "Collapsing: weights from 1e-14 to 1, moments down to denormals, half of the gradients zero. All are put",
            "back before each call, and with this λ half of the weights shrink to a half or less in it.",
        ]
    for (kind, n), rows in results.steps.items():
        count = f", {rows[0]['tensors']} in all" if kind == "many" and "tensors" in rows[0] else ""
        lines += ["", f"## {n:,} weights: {_TITLES[kind]}{count}", "", *markdown_table(_COLUMNS, map(_cells, rows))]
    if results.training_steps:
        lines += ["", "## Training steps", "", *_training_lines(results)]
    return "\n".join(lines) + "\n"


def _training_lines(results: StepResults) -> list[str]:
    """How training steps were timed, and their table."""
    lines: list[str] = []
    succeeded = next((row for row in results.training_steps if "model" in row), None)
    if succeeded:
        lines += [
            f"{succeeded['model']}.",
            f"LpAdamW has p = 0.5, γ = 0.5 and a `SparsityTarget`{_groups_words(results.run)} that acts all the time.",
            f"λ is updated, and zeros are counted, every {UPDATE_EVERY} steps.",
            "Both optimizers train in the same processes, a step each in turn.",
            f"Medians over {succeeded['rounds']} rounds of {UPDATE_EVERY} steps, quartiles in brackets; the ratio is",
            "the median of the rounds' ratios.",
            "",
        ]
    return lines + markdown_table(_TRAINING_COLUMNS, map(_training_cells, results.training_steps), left=(0, 2))


def _groups_words(run: ResultRow) -> str:
    if not run.get("groups"):
        return ""
    return f" of {run['groups']} (a decay every {'step' if run['interval'] == 1 else str(run['interval']) + ' steps'})"
