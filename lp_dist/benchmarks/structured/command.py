"""`lp-dist bench structure`: a language model with fewer channels or heads, what it loses, and how much smaller and
faster it is when they are cut out.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lp_dist.benchmarks.quality import runs, tasks
from lp_dist.benchmarks.quality.methods import Spec
from lp_dist.benchmarks.structured.methods import STRUCTURED, share_of
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.report import environment

_NAMES = {
    "groups": "ours",
    "gcut": "cut gradually, by the norm",
    "gcut:c=0.67": "cut gradually, by our saliency ‖w·(√v̂)^⅔‖",
    "cut": "cut before the fine-tune, by the norm",
    "cut:criterion=taylor": "cut before the fine-tune, by Taylor (LLM-Pruner's)",
    "lp": "single zeros, as many parameters left",
    "dense": "dense fine-tune",
}


def structure(
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
    """See `lp-dist bench structure --help`; returns the page's path.

    Raises:
        UsageError: something in it can't be read, or is missing.
    """
    if not (model and text):
        raise UsageError(
            "--model and --text are needed: a directory, hub id or .gguf file, and a text file or hub dataset to"
            " fine-tune it on"
        )
    specs = [Spec.read(line) for line in methods.split()]
    odd = next((spec.line for spec in specs if spec.family not in ("dense", "lp", *STRUCTURED)), None)
    if odd is not None:
        raise UsageError(f"--methods {odd}: this bench has dense, lp, {', '.join(STRUCTURED)}")
    try:
        parts, numbers = [float(word) / 100 for word in shares.split()], [int(word) for word in seeds.split()]
    except ValueError:
        raise UsageError(
            f"--shares {shares} --seeds {seeds}: these must be numbers, such as '20 30 50' and '0 1'"
        ) from None
    if not all(0 < part < 1 for part in parts):
        raise UsageError(f"--shares {shares}: these are percents between 0 and 100")
    work, directory = tasks.lm(model, text, steps, block), Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "structure.jsonl"
    asked = [
        {
            "work": work.described(),
            "device": runs.device_name(),
            "method": spec.line,
            "settings": spec.settings,
            "groups": groups,
            "sparsity": part,
            "seed": seed,
        }
        for seed in numbers
        for part in parts
        for spec in specs
    ]
    asked = [row for i, row in enumerate(asked) if not _is_dense(row) or row["sparsity"] == parts[0]]
    have = {_key(row) for row in runs.read(path)}
    left = [row for row in asked if _key(row) not in have]
    tqdm.write(f"{len(asked) - len(left)} of {len(asked)} runs are in {path} already")
    context = {
        "machine": environment.processor(),
        "threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }
    for row in tqdm(left, desc="runs", unit="run"):
        runs.append(path, {**row, **_one(work, row, tokens), **context})
    return _page(runs.read(path), directory)


def _is_dense(row: dict[str, Any]) -> bool:
    return Spec.read(row["method"]).family == "dense"


def _name_of(method: str) -> str:
    spec = Spec.read(method)
    plain = spec.without("lr")
    name = _NAMES.get(plain.line) or ", ".join(
        [_NAMES.get(plain.family, plain.family), *(f"{key} = {value}" for key, value in plain.given)]
    )
    return f"{name}, learning rate {spec.lr:g}" if spec.lr else name


def _key(row: dict[str, Any]) -> str:
    return json.dumps(
        [row[key] for key in ("work", "device", "method", "settings", "groups", "sparsity", "seed")], sort_keys=True
    )


def _one(work: tasks.Work, row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Trains and evaluates; cuts out what is dead, and evaluates and times that beside the whole."""
    spec, share, start = Spec.read(row["method"]), row["sparsity"], time.perf_counter()
    model = runs.dense(work, row["seed"])
    if spec.family == "lp":
        share *= share_of(runs.run_of(work, model, row["seed"], share, work.schedule), row["groups"])
    if spec.family in STRUCTURED:
        spec = Spec(spec.family, tuple(sorted({**dict(spec.given), "groups": row["groups"]}.items())))
    run = runs.train(work, model, row["seed"], share, runs.schedule_of(work, spec), spec)
    told = {
        "loss": work.evaluate(model),
        "parameters": sum(param.numel() for param in model.parameters()),
        "zeros": sum(int((weight == 0).sum()) for weight in run.weights.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return told if spec.family not in STRUCTURED else {**told, **_cut(work, model, tokens)}


def _cut(work: tasks.Work, model: nn.Module, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole", Path(folder) / "small"
        model.save_pretrained(whole)
        export(whole, small, shrunk=True)
        cut = (
            type(model)
            .from_pretrained(small, dtype=next(model.parameters()).dtype)
            .to(next(model.parameters()).device)
        )
        sizes = [sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (whole, small)]
    rates = _rates([model.eval(), cut.eval()], work.text.held_out[:32], tokens)
    return {
        "loss cut": work.evaluate(cut),
        "parameters cut": sum(param.numel() for param in cut.parameters()),
        "bytes": sizes[0],
        "bytes cut": sizes[1],
        "tokens a second": rates[0],
        "tokens a second cut": rates[1],
        "generated": tokens,
    }


@torch.no_grad()
def _rates(models: list[nn.Module], prompt: torch.Tensor, tokens: int, repeats: int = 5) -> list[float]:
    """Tokens a second of plain `generate`, greedy; the median of turns taken one after the other, so that what else
    the machine does hits both.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, own in zip(models, seconds):
            start = time.perf_counter()
            model.generate(
                prompt[None].to(model.device),
                attention_mask=torch.ones_like(prompt[None]).to(model.device),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                own.append(time.perf_counter() - start)
    return [round(tokens / median(own), 2) for own in seconds]


def _page(rows: list[dict[str, Any]], directory: Path) -> Path:
    """structure.md: rows of the same work, groups and device in one table."""
    lines = [
        "# Fewer channels and heads: what it costs, and what it gains",
        "",
        (
            "Perplexity on held-out text (lower is better), mean over seeds; the same data, tokens and evaluation for"
            " all. `lp-dist export --shrink` cuts out what"
        ),
        (
            "is dead, the result is loaded by `from_pretrained`, and evaluated and timed (greedy `generate`, one"
            " sequence, medians of turns taken side by side)"
        ),
        (
            "beside the whole. Every run is a row of [structure.jsonl](structure.jsonl); `lp-dist bench structure`"
            " with its values makes it again."
        ),
    ]
    for about in dict.fromkeys(map(_about, rows)):
        mine = [row for row in rows if _about(row) == about]
        first = mine[0]
        machines = dict.fromkeys(
            f"{row['machine']} ({row['threads']} thread{'s' * (row['threads'] > 1)})" for row in mine
        )
        lines += [
            "",
            (
                f"## {first['groups']}, {first['work']['text']}, {first['work']['schedule']['steps']} steps of"
                f" {first['work']['block']} tokens, {' and '.join(machines)}"
            ),
            "",
            "| share | method | seeds | perplexity | cut | parameters | file | tokens a second |",
            "|---:|---|---:|---:|---:|---:|---:|---:|",
        ]
        cells: dict[tuple[float, str], list[dict[str, Any]]] = {}
        for row in mine:
            cells.setdefault((0.0 if _is_dense(row) else row["sparsity"], row["method"]), []).append(row)
        for (share, method), of in sorted(
            cells.items(), key=lambda cell: (cell[0][0], mean(row["loss"] for row in cell[1]))
        ):
            lines.append(_line(share, method, of))
    path = directory / "structure.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _about(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["groups"], row["device"], json.dumps(row["work"], sort_keys=True)


def _line(share: float, method: str, rows: list[dict[str, Any]]) -> str:
    def perplexity(key: str) -> str:
        values = sorted(math.exp(row[key]) for row in rows)
        return f"{mean(values):.2f}" + (f" ± {(values[-1] - values[0]) / 2:.2f}" if len(values) > 1 else "")

    cells = [f"{share:.0%}" if share else "", _name_of(method), str(len(rows)), perplexity("loss")]
    if "loss cut" in rows[0]:
        before, after = rows[0]["parameters"], rows[0]["parameters cut"]
        speed = median(row["tokens a second cut"] / row["tokens a second"] for row in rows)
        cells += [
            perplexity("loss cut"),
            f"{before / 1e6:.1f} M → {after / 1e6:.1f} M ({after / before:.1%})",
            f"{rows[0]['bytes'] / 1e6:.0f} → {rows[0]['bytes cut'] / 1e6:.0f} MB",
            f"×{speed:.2f} ({rows[0]['tokens a second']:.1f} → {rows[0]['tokens a second cut']:.1f})",
        ]
    else:
        cells += [
            "",
            f"{rows[0]['parameters'] / 1e6:.1f} M"
            + (f", {rows[0]['zeros'] / 1e6:.1f} M zeros" if rows[0]["zeros"] else ""),
            "",
            "",
        ]
    return f"| {' | '.join(cells)} |"
