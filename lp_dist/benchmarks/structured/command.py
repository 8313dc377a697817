"""`lp-dist bench structured`: a language model with fewer channels, heads or experts.

It measures what the model loses, and how much smaller and faster it is once they are removed.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.quality import runs, tasks
from lp_dist.benchmarks.quality.methods import Spec
from lp_dist.benchmarks.structured import mixtures
from lp_dist.benchmarks.structured.methods import STRUCTURED, fraction_in_groups
from lp_dist.benchmarks.timing import note, progress, seconds_of
from lp_dist.errors import UsageError
from lp_dist.export.writer import export

_NAMES = {
    "groups": "lp_dist",
    "masked": "lp_dist, routers can't choose what has died",
    "gcut": "cut gradually, by the norm",
    "gcut:c=0.67": "cut gradually, by lp_dist's saliency ‖w·(√v̂)^⅔‖",
    "pathprox": "PathProx, then cut by ‖w‖·‖v‖",
    "cut": "cut before the fine-tune, by the norm",
    "cut:criterion=taylor": "cut before the fine-tune, by Taylor (LLM-Pruner's)",
    "cut:criterion=frequency": "cut before the fine-tune, by how often the router chooses",
    "cut:criterion=reap": "cut before the fine-tune, by REAP",
    "lp": "single zeros, as many parameters left",
    "dense": "dense fine-tune",
}
# What tells one run from another.
_KEYS = ("task", "device", "method", "settings", "groups", "sparsity", "seed")


def structured(
    *,
    task: str = "lm",
    model: str,
    text: str,
    methods: str,
    shares: str,
    seeds: str,
    groups: str,
    steps: int | None,
    block: int,
    tokens: int,
    out: str,
) -> Path:
    """Runs `lp-dist bench structured`.

    Args:
        task: "lm", or a tiny mixture of experts that is trained here: one of `mixtures.FAMILIES`.
        model: of "lm" alone: a directory, hub id or .gguf file.
        text: a text file or hub dataset to fine-tune on; "", of a mixture alone: Python's help texts.
        methods: lines with spaces between them, of dense, lp and STRUCTURED.
        shares: percents of each layer's groups, with spaces between them.
        seeds: integers, with spaces between them.
        groups: "channels", "heads", "kv_groups", "experts" or "expert_channels".
        steps: of the fine-tune; None: the task's.
        block: tokens a sequence, of "lm" alone.
        tokens: generated to time a model.
        out: directory of structured.jsonl and structured.md.
    Returns:
        The path of the page.
    Raises:
        UsageError: an option cannot be read, or is missing.
    """
    if task not in ("lm", *mixtures.FAMILIES):
        raise UsageError(f"--task {task}: it must be lm, {' or '.join(mixtures.FAMILIES)}")
    if model and task != "lm":
        raise UsageError(f"--model is for --task lm, and not for {task}, which is trained here")
    if task == "lm" and not (model and text):
        raise UsageError(
            "--model and --text are needed: a directory, hub id or .gguf file, and a text file or hub dataset to"
            " fine-tune it on"
        )
    specs = [Spec.read(line) for line in methods.split()]
    unknown = next((spec.line for spec in specs if spec.family not in ("dense", "lp", *STRUCTURED)), None)
    if unknown is not None:
        raise UsageError(f"--methods {unknown}: this bench has dense, lp, {', '.join(STRUCTURED)}")
    try:
        sparsities, numbers = [float(word) / 100 for word in shares.split()], [int(word) for word in seeds.split()]
    except ValueError:
        raise UsageError(
            f"--shares {shares} --seeds {seeds}: these must be numbers, such as '20 30 50' and '0 1'"
        ) from None
    if not all(0 < sparsity < 1 for sparsity in sparsities):
        raise UsageError(f"--shares {shares}: these are percents between 0 and 100")
    of_name = tasks.lm(model, text, steps, block) if task == "lm" else mixtures.mixture(task, text, steps)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "structured.jsonl"
    planned = _planned_rows(of_name, specs, sparsities, numbers, groups)
    measured = {key_of(row) for row in json_lines.read(path)}
    missing = [row for row in planned if key_of(row) not in measured]
    note(f"{len(planned) - len(missing)} of {len(planned)} runs are in {path} already")
    context = runs.run_context(torch.get_num_threads())
    for row in progress(missing, "runs", unit="run", leave=True):
        json_lines.append(path, {**row, **_measure_row(of_name, row, tokens), **context})
    return draw(json_lines.read(path), directory)


def _planned_rows(
    task: tasks.Task, specs: list[Spec], sparsities: list[float], seeds: list[int], groups: str
) -> list[ResultRow]:
    """The rows of runs that are wanted, without their results. A dense run has no sparsity and is planned once."""
    return [
        {
            "task": task.described(),
            "device": runs.device_name(),
            "method": spec.line,
            "settings": spec.settings,
            "groups": groups,
            "sparsity": sparsity,
            "seed": seed,
        }
        for seed in seeds
        for sparsity in sparsities
        for spec in specs
        if spec.family != "dense" or sparsity == sparsities[0]
    ]


def _is_dense(row: ResultRow) -> bool:
    return Spec.read(row["method"]).family == "dense"


def _name_of(method: str) -> str:
    spec = Spec.read(method)
    plain = spec.without("lr")
    name = _NAMES.get(plain.line) or ", ".join(
        [_NAMES.get(plain.family, plain.family), *(f"{key} = {value}" for key, value in plain.given)]
    )
    return f"{name}, learning rate {spec.lr:g}" if spec.lr else name


def key_of(row: ResultRow) -> str:
    """The key of a run: rows with the same key are the same run.

    Args:
        row: planned or measured, as `json_lines.read` gives it.
    Returns:
        JSON.
    """
    return json.dumps([row[key] for key in _KEYS], sort_keys=True)


def _measure_row(task: tasks.Task, row: ResultRow, tokens: int) -> ResultRow:
    """Trains and evaluates; removes what is zero, and evaluates and times that beside the full model."""
    spec, sparsity, start = Spec.read(row["method"]), row["sparsity"], time.perf_counter()
    model = runs.dense(task, row["seed"])
    if task.name in mixtures.FAMILIES:
        model.config.output_router_logits = False
    if spec.family == "lp":
        run = runs.prepare_run(task, model, row["seed"], sparsity, task.schedule)
        sparsity *= fraction_in_groups(run, row["groups"])
    if spec.family in STRUCTURED:
        spec = Spec(spec.family, tuple(sorted({**dict(spec.given), "groups": row["groups"]}.items())))
    run = runs.train(task, model, row["seed"], sparsity, runs.schedule_for(task, spec), spec)
    result = {
        "loss": task.evaluate(model),
        "parameters": sum(param.numel() for param in model.parameters()),
        "zeros": sum(int((weight == 0).sum()) for weight in run.weights.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return result if spec.family not in STRUCTURED else {**result, **_measure_shrunk(task, model, tokens)}


def _measure_shrunk(task: tasks.Task, model: nn.Module, tokens: int) -> ResultRow:
    """Loss, size and speed of the model without its zero groups, beside the full one's."""
    with tempfile.TemporaryDirectory() as folder:
        full, small = Path(folder) / "full", Path(folder) / "small"
        model.save_pretrained(full)
        export(full, small, shrink=True)
        shrunk = (
            type(model)
            .from_pretrained(small, dtype=next(model.parameters()).dtype)
            .to(next(model.parameters()).device)
        )
        sizes = [sum(file.stat().st_size for file in saved.glob("*.safetensors")) for saved in (full, small)]
    speeds = _generation_speeds([model.eval(), shrunk.eval()], task.text.held_out[:32], tokens)
    return {
        "loss cut": task.evaluate(shrunk),
        "parameters cut": sum(param.numel() for param in shrunk.parameters()),
        "bytes": sizes[0],
        "bytes cut": sizes[1],
        "tokens a second": speeds[0],
        "tokens a second cut": speeds[1],
        "generated": tokens,
    }


@torch.no_grad()
def _generation_speeds(models: list[nn.Module], prompt: torch.Tensor, tokens: int, repeats: int = 5) -> list[float]:
    """Tokens a second of greedy `generate`, the median of several turns.

    The models take turns, so that a disturbance of the machine hits all of them.
    """

    def generate(model: nn.Module) -> None:
        model.generate(
            prompt[None].to(model.device),
            attention_mask=torch.ones_like(prompt[None]).to(model.device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )

    times: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, seconds in zip(models, times):
            elapsed = seconds_of(lambda model=model: generate(model))
            # The first turn warms up.
            if turn:
                seconds.append(elapsed)
    return [round(tokens / median(seconds), 2) for seconds in times]


def draw(rows: list[ResultRow], directory: Path) -> Path:
    """Writes structured.md, with a table for each task, kind of groups and device.

    Args:
        rows: as `json_lines.read` gives them.
        directory: where the page is written.
    Returns:
        Its path.
    """
    lines = [
        "# Fewer channels, heads and experts: what it costs, and what it gains",
        "",
        "Perplexity on held-out text, or the loss in nats a character (lower is better), mean over seeds, with the",
        "same data, tokens and evaluation. `lp-dist export --shrink` removes the channels, heads and experts that are",
        "zero (column *cut*). `from_pretrained` loads the result. It is evaluated and timed beside the full model:",
        "greedy `generate`, one sequence, medians of turns side by side. Every run is a row of",
        "[structured.jsonl](structured.jsonl); `lp-dist bench structured` with its values makes it again.",
    ]
    for section in dict.fromkeys(map(_section_of, rows)):
        lines += _section([row for row in rows if _section_of(row) == section])
    path = directory / "structured.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _section(rows: list[ResultRow]) -> list[str]:
    first, task = rows[0], rows[0]["task"]
    family = "" if task["name"] == "lm" else f"{task['name']}, "
    quality = "loss" if family else "perplexity"
    machines = dict.fromkeys(f"{row['machine']} ({row['threads']} thread{'s' * (row['threads'] > 1)})" for row in rows)
    lines = [
        "",
        (
            f"## {family}{first['groups']}, {task['text']}, {task['schedule']['steps']} steps of"
            f" {task['rows'] * task['block']} tokens, {' and '.join(machines)}"
        ),
        "",
        f"| share | method | seeds | {quality} | cut | parameters | file | tokens a second |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    cells: dict[tuple[float, str], list[ResultRow]] = {}
    for row in rows:
        cells.setdefault((0.0 if _is_dense(row) else row["sparsity"], row["method"]), []).append(row)
    by_loss = sorted(
        cells.items(), key=lambda cell: (cell[0][0], mean(row.get("loss cut", row["loss"]) for row in cell[1]))
    )
    return lines + [_line(sparsity, method, cell) for (sparsity, method), cell in by_loss]


def _section_of(row: ResultRow) -> tuple[str, str, str]:
    return row["groups"], row["device"], json.dumps(row["task"], sort_keys=True)


def _line(sparsity: float, method: str, rows: list[ResultRow]) -> str:
    is_lm = rows[0]["task"]["name"] == "lm"

    def quality(key: str) -> str:
        values = sorted(math.exp(row[key]) if is_lm else row[key] for row in rows)
        digits = 2 if is_lm else 3
        spread = f" ± {(values[-1] - values[0]) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    cells = [f"{sparsity:.0%}" if sparsity else "", _name_of(method), str(len(rows)), quality("loss")]
    if "loss cut" in rows[0]:
        before, after = rows[0]["parameters"], rows[0]["parameters cut"]
        speed = median(row["tokens a second cut"] / row["tokens a second"] for row in rows)
        cells += [
            quality("loss cut"),
            f"{_millions(before)} M → {_millions(after)} M ({after / before:.1%})",
            f"{_millions(rows[0]['bytes'], 0)} → {_millions(rows[0]['bytes cut'], 0)} MB",
            # A tiny mixture takes the time of its calls, whatever its size.
            f"×{speed:.2f} ({rows[0]['tokens a second']:.1f} → {rows[0]['tokens a second cut']:.1f})" if is_lm else "",
        ]
    else:
        cells += [
            "",
            f"{_millions(rows[0]['parameters'])} M"
            + (f", {_millions(rows[0]['zeros'])} M zeros" if rows[0]["zeros"] else ""),
            "",
            "",
        ]
    return f"| {' | '.join(cells)} |"


def _millions(number: int, digits: int = 1) -> str:
    """Of what is below ten millions with two digits more."""
    return f"{number / 1e6:.{digits + 2 * (number < 1e7)}f}"
