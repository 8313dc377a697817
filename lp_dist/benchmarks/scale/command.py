"""`lp-dist bench scale`: times, collectives and memory of one rank of hundreds."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.scale.models import MODELS, TENSOR_PARALLEL
from lp_dist.benchmarks.scale.page import markdown, tables
from lp_dist.benchmarks.scale.simulation import SHARDINGS, Configuration, measure
from lp_dist.benchmarks.timing import note, progress
from lp_dist.errors import UsageError
from lp_dist.report import environment
from lp_dist.report.console import print_table

# Imported once, in the server that the processes are forked from.
_PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    __name__,
]


def scale(*, models: str = "8B 70B 235B", ranks: str = "64 512 1024", out: str = "docs/results") -> Path:
    """Runs `lp-dist bench scale`: simulates single ranks of many, each in a process of its own.

    Prints tables, appends a row for the run and one for each simulated rank to scale.jsonl, and writes scale.md from
    the rows of this run.

    Args:
        models: of MODELS, with commas or spaces between them.
        ranks: numbers of ranks, likewise. A model is sharded over those that it fits on.
        out: directory of scale.jsonl and scale.md.
    Returns:
        The path of scale.md.
    Raises:
        UsageError: there is no such model, a number can't be read, or no model fits on so many ranks.
    """
    names = _models(models)
    configurations = planned(names, _numbers(ranks))
    if not configurations:
        least = ", ".join(f"{name} needs {MODELS[name].least_ranks}" for name in names)
        raise UsageError(f"--ranks {ranks}: none of the models fits on so few ranks; {least}")
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "scale.jsonl"
    run = max((row["run"] for row in json_lines.read(path)), default=0) + 1
    command = f"lp-dist bench scale --models {shlex.quote(','.join(names))} --ranks {shlex.quote(ranks)}"
    header = {
        "benchmark": "scale",
        "run": run,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": environment.processor(),
        "cores": os.cpu_count(),
        "versions": environment.versions(),
    }
    json_lines.append(path, header)
    for configuration in progress(configurations, "simulated ranks", unit="rank"):
        json_lines.append(path, {"run": run, **in_process(configuration)})
    header, *rows = (row for row in json_lines.read(path) if row["run"] == run)
    for table in tables(rows):
        print_table(table.title, table.columns, table.rows, width=150)
    (directory / "scale.md").write_text(markdown(header, rows))
    return directory / "scale.md"


def _models(words: str) -> list[str]:
    names = words.replace(",", " ").split()
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise UsageError(f"--models {words}: there is no {unknown or 'name'}; there are {', '.join(MODELS)}")
    return names


def _numbers(words: str) -> list[int]:
    try:
        numbers = [int(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--ranks {words}: these must be numbers of ranks, such as '64 256 1024'") from None
    if not numbers or any(number < 2 for number in numbers):
        raise UsageError(f"--ranks {words}: a number of ranks is at least 2")
    return sorted(set(numbers))


def planned(models: Sequence[str], ranks: Sequence[int]) -> list[Configuration]:
    """What is measured.

    Args:
        models: of MODELS.
        ranks: numbers of ranks, ascending.
    Returns:
        For each model: the first, a middle and the last rank of each number of ranks that it fits on (of groups the
        first and the last); of the least number also tensor parallelism, half of the layers, half of the experts, and
        full size.
    """
    configurations = []
    for model in models:
        shape = MODELS[model]
        numbers = [number for number in ranks if number >= shape.least_ranks]
        for number in numbers:
            measured = [("weights", rank) for rank in (0, number // 2, number - 1)]
            measured += [(shape.groups, rank) for rank in (0, number - 1)]
            configurations += [
                Configuration(model, number, rank, SHARDINGS[0], target, is_cut=True) for target, rank in measured
            ]
        for number in numbers[:1]:
            if number % TENSOR_PARALLEL == 0:
                configurations += [
                    Configuration(model, number, rank, SHARDINGS[1], "weights", is_cut=True)
                    for rank in (0, number // 2, number - 1)
                ]
            halves = [{"layers": shape.layers // 2}, *([{"experts": shape.experts // 2}] if shape.experts else [])]
            configurations += [
                Configuration(model, number, 0, SHARDINGS[0], target, is_cut=True, **half)
                for target in ("weights", shape.groups)
                for half in halves
            ]
            configurations += [
                Configuration(model, number, 0, SHARDINGS[0], target, is_cut=False)
                for target in ("weights", shape.groups)
            ]
    return configurations


def in_process(configuration: Configuration) -> ResultRow:
    """Measures in a process of its own, so that each begins with the same memory.

    Args:
        configuration: what to measure.
    Returns:
        As `measure`; with the reason why it was "skipped" where that raised an error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, configuration))
    process.start()
    sender.close()
    try:
        row = receiver.recv()
    except EOFError:
        process.join()
        row = {**asdict(configuration), "skipped": f"the process ended with {process.exitcode}"}
    process.join()
    if "skipped" in row:
        note(f"{configuration.model}, {configuration.ranks} ranks, {configuration.target}: skipped, {row['skipped']}")
    return row


def _send_result(sender: Any, configuration: Configuration) -> None:
    try:
        row = measure(configuration)
    except Exception as error:  # of torch, and of any kind: the other ranks are measured all the same
        row = {**asdict(configuration), "skipped": str(error) or type(error).__name__}
    sender.send(row)
