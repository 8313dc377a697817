"""The page of a run: one HTML file that loads nothing else, drawn from the report of the run alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lp_dist._version import __version__
from lp_dist.errors import UsageError, in_one_line
from lp_dist.report.console import groups_line, target_line
from lp_dist.report.inspection import GROUPS
from lp_dist.report.numbers import percent, perplexity
from lp_dist.report.replacing import replace_text, replaced
from lp_dist.report.schema import name_of, read
from lp_dist.sparsity.measure import layer_of

FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")


def build(report: dict[str, Any]) -> str:
    """The page of a report, as HTML. Entries that are null or empty are left out.

    Args:
        report: as `lp_dist.report.schema` describes it.
    Raises:
        UsageError: matplotlib or jinja2 is missing.
    """
    figures = _tools()[2]
    return _render(
        figures.DRAWINGS,
        report,
        heading="How it went",
        title=_title(report),
        story=_story(report),
        numbers=_numbers(report),
        counts=_counts(report),
        facts=_facts(report),
        source=report["output_dir"],
        command=report["command"],
        following=report["next"],
        ranks=report["world_size"],
    )


def build_inspection(inspection: dict[str, Any]) -> str:
    """The page of an inspection, as HTML: a map of the zeros, and tables of dead groups and 2:4 blocks.

    Args:
        inspection: as `lp-dist inspect --json` prints it.
    Raises:
        UsageError: matplotlib or jinja2 is missing.
    """
    figures = _tools()[2]
    counted = [tensor for tensor in inspection["tensors"] if tensor["counted"]]
    kinds: dict[str, list[int]] = {}
    for tensor in counted:
        _add(kinds, tensor["kind"], tensor["zeros"], tensor["elements"])
    report = {
        "tensors": {tensor["name"]: (tensor["zeros"], tensor["elements"]) for tensor in counted},
        "kinds": kinds,
        "zeros": inspection["zeros"],
    }
    numbers = [
        (
            "Zeros",
            percent(inspection["sparsity"]),
            f"{inspection['zeros']:,} of {inspection['decayed_weights']:,} weights that decay",
        ),
        (
            "Parameters",
            _short(inspection["parameters"]),
            f"{inspection['parameters']:,}, of which"
            f" {percent(inspection['zeros_of_all'] / max(1, inspection['parameters']))} are zero",
        ),
    ]
    return _render(
        [drawing for drawing in figures.DRAWINGS if drawing.draw is figures.heat],
        report,
        heading="Where the zeros are",
        numbers=numbers,
        title=f"{inspection['model'].rstrip('/').split('/')[-1]}, {percent(inspection['sparsity'])} zeros",
        story=[f"{inspection['model']}, {inspection['form']}."],
        counts=_counts(report),
        facts=_usable_zeros(inspection, counted),
        source=inspection["model"],
        command=None,
        following=None,
        ranks=1,
    )


def _add(counts: dict[Any, list[int]], key: Any, zeros: int, elements: int) -> None:
    """Adds to the zeros and elements of `key`."""
    sums = counts.setdefault(key, [0, 0])
    sums[0] += zeros
    sums[1] += elements


def _usable_zeros(inspection: dict[str, Any], counted: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The zeros that a runtime could use: dead rows, columns and groups, and 2:4 blocks."""

    def share(dead: int, total: int) -> str:
        return f"{dead:,} of {total:,}"

    matrices = [tensor for tensor in counted if tensor["blocks"] is not None]
    dead = {
        "rows that are all zero": share(
            sum(tensor["dead_rows"] for tensor in matrices), sum(tensor["rows"] for tensor in matrices)
        ),
        "columns that are all zero": share(
            sum(tensor["dead_columns"] for tensor in matrices), sum(tensor["columns"] for tensor in matrices)
        ),
    }
    for key, label in GROUPS.items():
        modules = inspection[key]
        if modules:
            dead[f"{label} without effect"] = share(*(sum(counts[i] for counts in modules.values()) for i in (0, 1)))
    blocks: dict[str, list[int]] = {}
    for tensor in matrices:
        _add(blocks, tensor["kind"], tensor["conforming"], tensor["blocks"])
    return {
        "Dead rows, columns and groups": dead,
        "Blocks of four that suit 2:4 tensor cores": {
            kind: percent(conforming / max(1, total), 1) for kind, (conforming, total) in blocks.items()
        },
    }


def _render(drawings: list[Any], report: dict[str, Any], **words: Any) -> str:
    jinja2, canvas, _ = _tools()
    shown = [
        {
            "title": drawing.title,
            "caption": drawing.caption(report),
            "picture": jinja2.utils.markupsafe.Markup(canvas.svg(drawing.name, figure)),
        }
        for drawing in drawings
        if (figure := drawing.draw(report)) is not None
    ]
    templates = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return templates.from_string(_TEMPLATE.read_text("utf-8")).render(
        light=canvas.COLOURS, dark=canvas.DARK, figures=shown, version=__version__, percent=percent, **words
    )


def write(report: dict[str, Any], path: Path, png: bool = False) -> list[Path]:
    """Writes the page of a report.

    Args:
        report: as of `build`.
        path: of the HTML file.
        png: write each figure beside it as well, as NAME-FIGURE.png.
    Returns:
        The paths that were written, the page first.
    Raises:
        UsageError: matplotlib or jinja2 is missing, or the files can't be written there.
    """
    written = [write_text(path, build(report))]
    if png:
        _, canvas, figures = _tools()
        for drawing in figures.DRAWINGS:
            if (figure := drawing.draw(report)) is not None:
                written.append(path.with_name(f"{path.stem}-{drawing.name}.png"))
                with _write_errors(written[-1]), replaced(written[-1]) as partial:
                    canvas.png(figure, partial)
    return written


def draw_again(run: str | Path, out: str | Path = "", png: bool = False) -> list[Path]:
    """`lp-dist report`: draws the page of a finished run again.

    Args:
        run: its output_dir.
        out: of the HTML file; empty: report.html in `run`.
        png: as of `write`.
    Returns:
        The paths that were written, the page first.
    Raises:
        UsageError: there is no report, nothing can be drawn from it, or as of `write`.
    """
    report = read(run)
    with in_one_line(
        f"the report in {run} is damaged: drawing it ended with", "copy it anew, or repeat the run for another one"
    ):
        return write(report, Path(out or Path(run) / FILE), png)


def write_text(path: Path, text: str) -> Path:
    """Writes a page and returns its path.

    Raises:
        UsageError: the file can't be written.
    """
    with _write_errors(path):
        return replace_text(path, text)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Errors of the file system become UsageErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"can't write {path}: {error.strerror}; name a file in a directory that exists and can be written to"
        ) from None


def _tools() -> tuple[Any, Any, Any]:
    """Imports what only drawing needs: jinja2, and the modules `canvas` and `figures`, which need matplotlib."""
    try:
        import jinja2

        from lp_dist.report import canvas, figures
    except ImportError as error:
        raise UsageError(
            f"the page needs {error.name}; install the extra: pip install '.[finetune]' in the project"
        ) from None
    return jinja2, canvas, figures


def _title(report: dict[str, Any]) -> str:
    name = str(report["model"]).rstrip("/").split("/")[-1]
    return f"{name}, {percent(report['sparsity'])} zeros" if report["zeros"] else f"{name}, a dense fine-tune"


def _story(report: dict[str, Any]) -> list[str]:
    """The run in a few sentences."""
    before, after, reference = report["perplexity_before"], report["perplexity_after"], report["reference"]
    target, groups = report["target"], report["groups"]
    words = [
        f"Fine-tuned for {report['steps']:,} steps on {report['dataset']}.",
        f"Perplexity on held-out text is {perplexity(after)}"
        + ("." if before is None else f", and was {perplexity(before)} before."),
    ]
    if reference:
        words.append(
            f"The {name_of(reference)} in {reference['output_dir']} has {perplexity(reference['perplexity_after'])}."
        )
    return [
        " ".join(words),
        *([target_line(target)] if target else []),
        *([groups_line(groups)] if groups and groups["final_pruning"] else []),
    ]


def _numbers(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: a name, the number, and a line below it."""
    reference = report["reference"]
    comparison = [f"{name_of(reference)} {perplexity(reference['perplexity_after'])}"] if reference else []
    which = "that decay" if report["zeros"] else "that were counted"
    numbers = [
        (
            "Zeros",
            percent(report["sparsity"]),
            f"{report['zeros']:,} of {report['decayed_weights']:,} weights {which}",
        ),
        (
            "Perplexity",
            perplexity(report["perplexity_after"]),
            ", ".join([*comparison, f"before {perplexity(report['perplexity_before'])}"]),
        ),
        (
            "Parameters",
            _short(report["parameters"]),
            f"{report['parameters']:,}, of which {percent(report['sparsity_of_all'])} are zero",
        ),
        ("Steps", f"{report['steps']:,}", f"learning rate {report['learning_rate']:g}, seed {report['seed']}"),
    ]
    if report["seconds"] is not None:
        resumed = "since it was resumed, " if report["configuration"].get("resume_from_checkpoint") else ""
        numbers.append(("Time", _duration(float(report["seconds"])), f"{resumed}evaluations included"))
    return numbers


def _short(count: int) -> str:
    unit, name = next(
        ((10**power, name) for power, name in ((9, " B"), (6, " M"), (3, " K")) if count >= 10**power), (1, "")
    )
    return f"{count / unit:.4g}{name}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _counts(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """Zeros and weights for each kind of layer and for each layer."""
    if not report["zeros"]:
        return []
    layers: dict[int | None, list[int]] = {}
    for name, (zeros, elements) in report["tensors"].items():
        _add(layers, layer_of(name), zeros, elements)
    rows = sorted(layers.items(), key=lambda row: float("inf") if row[0] is None else row[0])
    tables = [("kind of layer", [(kind, *counts) for kind, counts in report["kinds"].items()])]
    return tables + (
        [("layer", [("none" if layer is None else str(layer), *counts) for layer, counts in rows])] if layers else []
    )


def _facts(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Tables of two columns: {heading: {key: value}}."""
    tables = {
        "Configuration, where it is not the default": report["configuration"],
        "Environment": report["environment"] | {"engine": report["engine"]},
        "Versions": report["versions"],
    }
    return {
        heading: {key: value if isinstance(value, str) else json.dumps(value) for key, value in rows.items()}
        for heading, rows in tables.items()
    }
