"""The sparsity report: one JSON file beside the checkpoint, and the tables that a run ends with. `page.py` draws
it.
"""

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

import torch
from rich.console import Console
from rich.table import Table

from lp_dist.errors import UsageError
from lp_dist.sparsity import Histogram, Sparsity

VERSION = 2
FILE = (  # not in config.json: loaders trip over keys that they don't know (vLLM's sparsity_config)
    "lp_dist_report.json"
)


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


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """The machine of this rank, not by its name; `device` is what it trains on."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": "CPU" if module is None else name,
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


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
    """The report of an earlier run, of this version or an older one.

    Raises:
        UsageError: there is none, or it can't be read.
    """
    path = Path(directory) / FILE
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"no report of a finished run at {path} ({error}); give the output_dir of one") from None
    if not isinstance(report, dict) or report.get("version") not in range(1, VERSION + 1):
        found = report.get("version") if isinstance(report, dict) else type(report).__name__
        raise UsageError(
            f"{path} is of version {found!r}, and this lp_dist reads up to {VERSION}; install the one that wrote it"
        )
    return report


def to_compare(reference: dict[str, Any]) -> dict[str, Any]:
    """What another run's report has to hold of this one, to be drawn without it."""
    keys = ("output_dir", "steps", "parameters", "zeros", "sparsity", "sparsity_of_all", "perplexity_after")
    curves = [
        {key: entry[key] for key in ("step", "loss", "eval_perplexity") if key in entry} for entry in reference["log"]
    ]
    return {**{key: reference[key] for key in keys}, "log": [entry for entry in curves if len(entry) > 1]}


def name_of(reference: dict[str, Any]) -> str:
    """What the run is that another one is compared with."""
    return "compared run" if reference["zeros"] else "dense fine-tune"


def histograms(before: Histogram, after: Histogram) -> dict[str, Any]:
    """|w| of all counted weights together, in the bins from the first to the last that holds some of them; zeros
    apart.
    """
    totals = [[sum(column) for column in zip(*one.counts.values())] for one in (before, after)]
    used = [i for i, counts in enumerate(zip(*totals)) if any(counts)]
    first, last = (used[0], used[-1] + 1) if used else (0, 0)
    return {
        "edges": list(before.edges[first : last + 1]),
        "before": totals[0][first:last],
        "after": totals[1][first:last],
        "zeros_before": sum(before.zeros.values()),
        "zeros_after": sum(after.zeros.values()),
    }


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
        raise UsageError(
            f"{len(missing)} parameters are in no safetensors file of {directory}, such as {missing[0]!r}"
        )
    return Sparsity(counts)


def show(report: dict[str, Any], page: Path | None = None) -> None:
    """Prints what was gained: perplexity before and after, sparsity overall and per kind of layer, where it was saved,
    and where its page is.
    """
    console = Console()
    runs = Table(title="Perplexity on held-out text, and exact zeros in the weights that decay")
    for column in ("", "perplexity", "zeros", "of all parameters"):
        runs.add_column(column, justify="left" if not column else "right")
    runs.add_row("before", number(report["perplexity_before"]), f"{report['sparsity_before']:.2%}", "")
    rows = [("after", report)]
    if reference := report.get("reference"):
        rows.insert(0, (f"{name_of(reference)} ({reference['output_dir']})", reference))
    for label, run in rows:
        runs.add_row(label, number(run["perplexity_after"]), f"{run['sparsity']:.2%}", f"{run['sparsity_of_all']:.2%}")
    console.print(runs)
    if report["sparsity"] > 0:
        kinds = Table(title="Exact zeros per kind of layer")
        for column in ("layer", "weights", "zeros", "share"):
            kinds.add_column(column, justify="left" if column == "layer" else "right")
        for kind, (zeros, elements) in report["kinds"].items():
            kinds.add_row(kind, f"{elements:,}", f"{zeros:,}", f"{zeros / elements:.2%}")
        console.print(kinds)
    if report.get("target"):
        console.print(f"Target: {landing(report['target'])}", soft_wrap=True)
    if (groups := report.get("groups")) and groups["closed"]:
        console.print(f"Groups: {dead_groups(groups)}", soft_wrap=True)
    console.print(
        f"Saved to [bold]{report['output_dir']}[/bold], {report['zeros']:,} exact zeros counted in its files; loads"
        " with from_pretrained.",
        soft_wrap=True,
        highlight=False,
    )
    if page is not None:
        console.print(f"Page: {page}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Next: {report['next']}", soft_wrap=True, highlight=False, markup=False)


def landing(target: dict[str, Any]) -> str:
    """How a target was reached, in a sentence."""
    if not (closed := target["closed"]):
        return f"{target['sparsity']:.2%} zeros, but the run was stopped before its window ended."
    return (
        f"{target['sparsity']:.2%} zeros; {closed['before']:.2%} died by decay, {closed['by_threshold']:.2%} at the"
        " last threshold."
    )


def dead_groups(groups: dict[str, Any]) -> str:
    """Which whole groups are zero, in a sentence."""
    dead = ", ".join(f"{dead:,} of {all_:,} {kind}" for kind, (dead, all_) in groups["kinds"].items())
    return (
        f"{dead} are zero; {groups['closed']['before']:.2%} died by decay, {groups['closed']['by_threshold']:.2%} at"
        " the last threshold."
    )


def number(value: float | str | None) -> str:
    """A perplexity for people; what is neither finite nor measured as well."""
    if value is None:
        return "not measured"
    return f"{float(value):,.2f}" if abs(float(value)) < 1e6 else f"{float(value):.3g}"


def kinds_table(sparsity: Sparsity) -> dict[str, list[int]]:
    """JSON form of `Sparsity.by_kind`."""
    return {kind: list(counts) for kind, counts in sorted(sparsity.by_kind().items())}
