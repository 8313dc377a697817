"""The sparsity report: one JSON file beside the checkpoint, and the tables that a run ends with."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lp_dist.errors import UsageError
from lp_dist.sparsity import Sparsity

FILE = "lp_dist_report.json"  # not in config.json: loaders trip over keys that they don't know (vLLM's sparsity_config)


def versions() -> dict[str, str]:
    """Versions of what a run stands on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "deepspeed"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(directory: str | os.PathLike, report: dict[str, Any]) -> Path:
    """Writes the report beside the checkpoint, whole or not at all."""
    path = Path(directory) / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def _plain(value: Any) -> Any:
    """Infinities and nans as text, since JSON has neither and strict readers refuse the file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(directory: str | os.PathLike) -> dict[str, Any]:
    """The report of an earlier run.

    Raises:
        UsageError: there is none, or it can't be read.
    """
    path = Path(directory) / FILE
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"no report of a finished run at {path} ({error}); give the output_dir of one") from None


def count_saved(directory: str | os.PathLike, names: Iterable[str]) -> Sparsity:
    """Counts exact zeros in a saved checkpoint, one tensor at a time, from its safetensors files.

    Raises:
        UsageError: a name is in none of the files.
    """
    from safetensors import safe_open
    counts: dict[str, tuple[int, int]] = {}
    wanted = set(names)
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                tensor = file.get_tensor(name)
                counts[name] = (int((tensor == 0).sum()), tensor.numel())
    missing = sorted(wanted - counts.keys())
    if missing:
        raise UsageError(f"{len(missing)} parameters are in no safetensors file of {directory}, such as {missing[0]!r}")
    return Sparsity(counts)


def show(report: dict[str, Any], reference: dict[str, Any] | None = None) -> None:
    """Prints what was gained: perplexity before and after, sparsity overall and per kind of layer, where it was saved."""
    console = Console()
    runs = Table(title="Perplexity on held-out text, and exact zeros in the weights that decay")
    for column in ("", "perplexity", "zeros", "of all parameters"):
        runs.add_column(column, justify="left" if not column else "right")
    runs.add_row("before", _number(report["perplexity_before"]), f"{report['sparsity_before']:.2%}", "")
    rows = [("after", report)]
    if reference:
        kind = "compared run" if reference["zeros"] else "dense fine-tune"
        rows.insert(0, (f"{kind} ({reference['output_dir']})", reference))
    for label, run in rows:
        runs.add_row(label, _number(run["perplexity_after"]), f"{run['sparsity']:.2%}", f"{run['sparsity_of_all']:.2%}")
    console.print(runs)
    if report["sparsity"] > 0:
        kinds = Table(title="Exact zeros per kind of layer")
        for column in ("layer", "weights", "zeros", "share"):
            kinds.add_column(column, justify="left" if column == "layer" else "right")
        for kind, (zeros, elements) in report["kinds"].items():
            kinds.add_row(kind, f"{elements:,}", f"{zeros:,}", f"{zeros / elements:.2%}")
        console.print(kinds)
    if target := report.get("target"):
        closed = target["closed"]
        rest = (f"; {closed['before']:.2%} died by decay, {closed['by_threshold']:.2%} at the last threshold." if closed
                else ", but the run was stopped before its window ended.")
        console.print(f"Target: {target['sparsity']:.2%} zeros{rest}", soft_wrap=True)
    console.print(f"Saved to [bold]{report['output_dir']}[/bold], {report['zeros']:,} exact zeros counted in its files; loads with "
                  "from_pretrained.", soft_wrap=True, highlight=False)
    console.print(f"Next: {report['next']}", soft_wrap=True, highlight=False, markup=False)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def kinds_table(sparsity: Sparsity) -> dict[str, list[int]]:
    """JSON form of `Sparsity.by_kind`."""
    return {kind: list(counts) for kind, counts in sorted(sparsity.by_kind().items())}
