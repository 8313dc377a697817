"""The report of a run: one JSON file beside the checkpoint. `console.py` prints it, and `page.py` draws it.

Entries of the report, beside the settings, versions and environment of the run:
    sparsity, zeros, decayed_weights: of the weights that decay, counted in the saved files.
    sparsity_of_all, parameters: the same zeros among all parameters of the model.
    kinds: {kind of layer: [zeros, elements]}. tensors: {parameter: [zeros, elements]}.
    window: [first, last] optimizer step of the decay window; null without one.
    target: {"sparsity", "final_pruning", "left_dense"} of a target of single weights; null without one.
    groups: these, and "kinds": {kind: [dead, all]}, of a target of groups; null without one.
    left_dense: what had no gradient when the window began, in words; the sparsity is a fraction of the rest.
    final_pruning: {"before", "after", "pruned_at_end"}, fractions of what the target counts: "before" became
        zero in the window.
        null where the run ended before the window did.
    histograms: of |w|, before and after. log: Trainer's log. reference: the same of the run that it is compared with.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lp_dist.errors import UsageError, first_line
from lp_dist.report.replacing import replace_text
from lp_dist.sparsity.measure import Histogram, Sparsity

_Check = Callable[[Any], bool]

VERSION = 3
# A file of its own, since loaders refuse keys of config.json that they don't know (vLLM's sparsity_config).
FILE = "lp_dist_report.json"


def write(directory: str | os.PathLike, report: dict[str, Any]) -> Path:
    """Writes the report beside the checkpoint, atomically: never a part of it. Returns its path."""
    text = json.dumps(_plain(report), indent=2, allow_nan=False) + "\n"
    return replace_text(Path(directory) / FILE, text)


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
        UsageError: there is none, it can't be read, is of another version, or lacks what a report has.
    """
    path = Path(directory) / FILE
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"no report of a finished run at {path} ({first_line(error)}); give the output_dir of one"
        ) from None
    version = report.get("version") if isinstance(report, dict) else type(report).__name__
    if version != VERSION:
        raise UsageError(
            f"{path} is of version {version!r}, and this lp_dist reads version {VERSION}; install the lp_dist that"
            " wrote it, or repeat the run with this one"
        )
    wrong = next((key for key, fits in _ENTRIES.items() if key not in report or not fits(report[key])), None)
    if wrong is not None:
        value = f"{report[wrong]!r:.80}" if wrong in report else "nothing"
        raise UsageError(f"{path} has {value} for {wrong}, which no report has; copy it anew, or repeat the run")
    return report


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    """Infinities and nans are text."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("inf", "-inf", "nan")


def _is_share(value: Any) -> bool:
    """[zeros, elements] of something that has elements."""
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1] > 0


def _or_null(fits: _Check) -> _Check:
    return lambda value: value is None or fits(value)


def _list_of(fits: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _mapping_to(fits: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _has(**entries: _Check) -> _Check:
    """An object with these entries, and perhaps others."""
    return lambda value: (
        isinstance(value, dict) and all(key in value and fits(value[key]) for key, fits in entries.items())
    )


def _is_log_entry(value: Any) -> bool:
    """What is drawn has a step; other values may be of any kind, as callbacks of others log them."""
    return (
        isinstance(value, dict)
        and _is_count(value.get("step", 0))
        and all(
            _is_number(item)
            for key, item in value.items()
            if key.startswith("lp/") or key in ("loss", "eval_perplexity", "eval_sparsity")
        )
    )


_COMPARED = {
    "output_dir": _is_text,
    "steps": _is_count,
    "parameters": _is_count,
    "zeros": _is_count,
    "sparsity": _is_number,
    "sparsity_of_all": _is_number,
    "perplexity_after": _or_null(_is_number),
    "log": _list_of(_is_log_entry),
}
_PRUNING = _or_null(_has(before=_is_number, after=_is_number, pruned_at_end=_is_number))
_TARGET = {"sparsity": _or_null(_is_number), "final_pruning": _PRUNING, "left_dense": _is_text}
_HISTOGRAMS = _has(
    edges=_list_of(_is_number),
    before=_list_of(_is_count),
    after=_list_of(_is_count),
    zeros_before=_is_count,
    zeros_after=_is_count,
)
# {entry: what it must be}, of those that tables, figures and a comparison read.
_ENTRIES: dict[str, _Check] = {
    **_COMPARED,
    "command": _is_text,
    "model": _is_text,
    "dataset": _is_text,
    "configuration": _mapping_to(lambda value: True),
    "decay": _has(),
    "sparsity_before": _is_number,
    "histograms": lambda value: (
        _HISTOGRAMS(value) and len(value["before"]) == len(value["after"]) == max(0, len(value["edges"]) - 1)
    ),
    "window": _or_null(lambda value: _list_of(_is_count)(value) and len(value) == 2),
    "target": _or_null(_has(**{**_TARGET, "sparsity": _is_number})),
    "groups": _or_null(_has(**_TARGET, kinds=_mapping_to(_is_share))),
    "reference": _or_null(_has(**_COMPARED)),
    "perplexity_before": _or_null(_is_number),
    "decayed_weights": _is_count,
    "kinds": _mapping_to(_is_share),
    "tensors": _mapping_to(_is_share),
    "seconds": _or_null(_is_number),
    "engine": _is_text,
    "world_size": _is_count,
    "environment": _mapping_to(lambda value: True),
    "weight_decay": _is_number,
    "versions": _mapping_to(lambda value: True),
    "next": _is_text,
}


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


def kinds_table(sparsity: Sparsity) -> dict[str, list[int]]:
    """JSON form of `Sparsity.by_kind`."""
    return {kind: list(counts) for kind, counts in sorted(sparsity.by_kind().items())}
