"""The report of a run: one JSON file beside the checkpoint. `console.py` prints it, and `page.py` draws it.

Entries of the report, beside the settings, versions and environment of the run:
    sparsity, zeros, decayed_weights: of the weights that decay, counted in the saved files.
    sparsity_of_all, parameters: the same zeros among all parameters of the model.
    kinds: {kind of layer: [zeros, elements]}. tensors: {parameter: [zeros, elements]}.
    window: [first, last] optimizer step of the decay window; null without one.
    target: {"sparsity", "final_pruning"} of a target of single weights; null without one.
    groups: {"sparsity", "final_pruning", "kinds": {kind: [dead, all]}} of a target of groups; null without one.
    final_pruning: {"before", "after", "pruned_at_end"}, fractions of what the target counts: "before" decayed to zero.
        null where the run ended before the window did.
    histograms: of |w|, before and after. log: Trainer's log. reference: the same of the run that it is compared with.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lp_dist.errors import UsageError
from lp_dist.optim.batching import count_zeros
from lp_dist.sparsity.measure import Histogram, Sparsity

VERSION = 3
# A file of its own, since loaders refuse keys of config.json that they don't know (vLLM's sparsity_config).
FILE = "lp_dist_report.json"


def write(directory: str | os.PathLike, report: dict[str, Any]) -> Path:
    """Writes the report beside the checkpoint, atomically: never a part of it. Returns its path."""
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
    """Reads the report of an earlier run.

    Args:
        directory: output_dir of that run.
    Raises:
        UsageError: there is none, it can't be read, or it is of another version.
    """
    path = Path(directory) / FILE
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"no report of a finished run at {path} ({error}); give the output_dir of one") from None
    version = report.get("version") if isinstance(report, dict) else type(report).__name__
    if version != VERSION:
        raise UsageError(
            f"{path} is of version {version!r}, and this lp_dist reads version {VERSION}; install the lp_dist that"
            " wrote it, or repeat the run with this one"
        )
    return report


def to_compare(reference: dict[str, Any]) -> dict[str, Any]:
    """The entries of a reference run that the report of another run keeps, so that it can be drawn by itself."""
    keys = ("output_dir", "steps", "parameters", "zeros", "sparsity", "sparsity_of_all", "perplexity_after")
    curves = [
        {key: entry[key] for key in ("step", "loss", "eval_perplexity") if key in entry} for entry in reference["log"]
    ]
    return {**{key: reference[key] for key in keys}, "log": [entry for entry in curves if len(entry) > 1]}


def name_of(reference: dict[str, Any]) -> str:
    """What tables and figures call a reference run."""
    return "compared run" if reference["zeros"] else "dense fine-tune"


def histograms(before: Histogram, after: Histogram) -> dict[str, Any]:
    """Histograms of |w| of all counted weights together, from the first to the last bin that is not empty.

    Args:
        before: of each parameter, at the start of the run.
        after: the same at its end, with the same edges.
    Returns:
        {"edges": n + 1 bounds of |w|, "before" and "after": n counts without zeros, "zeros_before", "zeros_after"}.
    """
    totals = [[sum(column) for column in zip(*histogram.counts.values())] for histogram in (before, after)]
    filled = [i for i, counts in enumerate(zip(*totals)) if any(counts)]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    return {
        "edges": list(before.edges[first : last + 1]),
        "before": totals[0][first:last],
        "after": totals[1][first:last],
        "zeros_before": sum(before.zeros.values()),
        "zeros_after": sum(after.zeros.values()),
    }


def count_saved(directory: str | os.PathLike, names: Iterable[str]) -> Sparsity:
    """Counts exact zeros in the safetensors files of a saved checkpoint, one tensor at a time.

    Args:
        directory: of the files.
        names: of the parameters that are counted.
    Raises:
        UsageError: a name is in none of the files.
    """
    from safetensors import safe_open

    counts: dict[str, tuple[int, int]] = {}
    requested = set(names)
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in requested & set(file.keys()):
                tensor = file.get_tensor(name)
                counts[name] = (int(count_zeros(tensor)), tensor.numel())
    missing = sorted(requested - counts.keys())
    if missing:
        raise UsageError(
            f"{len(missing)} parameters are in no safetensors file of {directory}, such as {missing[0]!r}"
        )
    return Sparsity(counts)


def kinds_table(sparsity: Sparsity) -> dict[str, list[int]]:
    """JSON form of `Sparsity.by_kind`."""
    return {kind: list(counts) for kind, counts in sorted(sparsity.by_kind().items())}
