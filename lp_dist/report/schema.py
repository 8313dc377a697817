"""The sparsity report: one JSON file beside the checkpoint, and the tables that a run ends with. `page.py` draws
it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lp_dist.errors import UsageError
from lp_dist.sparsity.measure import Histogram, Sparsity

VERSION = 2
FILE = (  # not in config.json: loaders trip over keys that they don't know (vLLM's sparsity_config)
    "lp_dist_report.json"
)


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


def kinds_table(sparsity: Sparsity) -> dict[str, list[int]]:
    """JSON form of `Sparsity.by_kind`."""
    return {kind: list(counts) for kind, counts in sorted(sparsity.by_kind().items())}
