"""The page of a run: one HTML file that needs nothing beside it, drawn from the run's report alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lp_dist._version import __version__
from lp_dist.errors import UsageError
from lp_dist.report.console import dead_groups, landing, number
from lp_dist.report.schema import name_of
from lp_dist.sparsity.measure import layer_of

FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")


def build(report: dict[str, Any]) -> str:
    """The page of a report, of any version; what a report does not have is left out.

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


def build_inspection(found: dict[str, Any]) -> str:
    """The page of what `lp-dist inspect --json` gives: a map of the zeros, and what else was found.

    Raises:
        UsageError: matplotlib or jinja2 is missing.
    """
    figures = _tools()[2]
    counted = [tensor for tensor in found["tensors"] if tensor["counted"]]
    kinds: dict[str, list[int]] = {}
    for tensor in counted:
        old = kinds.setdefault(tensor["kind"], [0, 0])
        old[0], old[1] = old[0] + tensor["zeros"], old[1] + tensor["elements"]
    report = {
        "tensors": {tensor["name"]: (tensor["zeros"], tensor["elements"]) for tensor in counted},
        "kinds": kinds,
        "zeros": found["zeros"],
    }
    numbers = [
        (
            "Zeros",
            f"{found['sparsity']:.2%}",
            f"{found['zeros']:,} of {found['decayed_weights']:,} weights that decay",
        ),
        (
            "Parameters",
            _short(found["parameters"]),
            f"{found['parameters']:,}, of which {found['zeros_of_all'] / max(1, found['parameters']):.2%} are zero",
        ),
    ]
    return _render(
        [one for one in figures.DRAWINGS if one.draw is figures.heat],
        report,
        heading="Where they lie",
        numbers=numbers,
        title=f"{found['model'].rstrip('/').split('/')[-1]}, {found['sparsity']:.2%} zeros",
        story=[f"{found['model']}, {found['form']}."],
        counts=_counts(report),
        facts=_structure(found, counted),
        source=found["model"],
        command=None,
        following=None,
        ranks=1,
    )


def _structure(found: dict[str, Any], counted: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """What of the zeros a runtime could use."""

    def of(dead: int, all_: int) -> str:
        return f"{dead:,} of {all_:,}"

    matrices = [tensor for tensor in counted if tensor["blocks"] is not None]
    whole = {
        "rows that are all zero": of(
            sum(tensor["dead_rows"] for tensor in matrices), sum(tensor["rows"] for tensor in matrices)
        ),
        "columns that are all zero": of(
            sum(tensor["dead_columns"] for tensor in matrices), sum(tensor["columns"] for tensor in matrices)
        ),
    }
    for what, modules in (
        ("feed-forward channels without effect", found["channels"]),
        ("attention heads without effect", found["heads"]),
    ):
        if modules:
            whole[what] = of(*(sum(counts[i] for counts in modules.values()) for i in (0, 1)))
    blocks: dict[str, list[int]] = {}
    for tensor in matrices:
        old = blocks.setdefault(tensor["kind"], [0, 0])
        old[0], old[1] = old[0] + tensor["conforming"], old[1] + tensor["blocks"]
    return {
        "Dead as a whole": whole,
        "Blocks of four that suit 2:4 tensor cores": {
            kind: f"{conforming / max(1, all_):.1%}" for kind, (conforming, all_) in blocks.items()
        },
    }


def _render(drawings: list[Any], report: dict[str, Any], **words: Any) -> str:
    jinja2, canvas, _ = _tools()
    shown = [
        {
            "title": one.title,
            "caption": one.caption(report),
            "picture": jinja2.utils.markupsafe.Markup(canvas.svg(one.name, figure)),
        }
        for one in drawings
        if (figure := one.draw(report)) is not None
    ]
    paper = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return paper.from_string(_TEMPLATE.read_text("utf-8")).render(
        light=canvas.COLOURS, dark=canvas.DARK, figures=shown, version=__version__, **words
    )


def write(report: dict[str, Any], path: Path, png: bool = False) -> list[Path]:
    """Writes the page, and with `png` each figure beside it, as NAME-FIGURE.png; returns the paths, the page's first.

    Raises:
        UsageError: matplotlib or jinja2 is missing, or the files can't be written there.
    """
    written = [write_text(path, build(report))]
    if png:
        _, canvas, figures = _tools()
        for one in figures.DRAWINGS:
            if (figure := one.draw(report)) is not None:
                written.append(path.with_name(f"{path.stem}-{one.name}.png"))
                with _told():
                    canvas.png(figure, written[-1])
    return written


def write_text(path: Path, text: str) -> Path:
    """Writes a page. Raises UsageError where that can't be."""
    with _told():
        path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"can't write {error.filename}: {error.strerror}; name a file in a directory that is there and may be"
            " written to"
        ) from None


def _tools() -> tuple[Any, Any, Any]:
    """What only drawing needs: jinja2, and our rooms that need matplotlib."""
    try:
        import jinja2

        from lp_dist.report import canvas, figures
    except ImportError as error:
        raise UsageError(
            f"the page needs {error.name}; install the extra: pip install '.[finetune]' in the project"
        ) from None
    return jinja2, canvas, figures


def _title(report: dict[str, Any]) -> str:
    name = str(report.get("model", report["output_dir"])).rstrip("/").split("/")[-1]
    return f"{name}, {report['sparsity']:.2%} zeros" if report["zeros"] else f"{name}, a dense fine-tune"


def _story(report: dict[str, Any]) -> list[str]:
    """The run in a few sentences."""
    before, after, reference, target = (
        report["perplexity_before"],
        report["perplexity_after"],
        report.get("reference"),
        report.get("target"),
    )
    words = [
        f"Fine-tuned for {report['steps']:,} steps" + (f" on {report['dataset']}." if "dataset" in report else "."),
        f"Perplexity on held-out text is {number(after)}"
        + ("." if before is None else f", and was {number(before)} before."),
    ]
    if reference:
        words.append(
            f"The {name_of(reference)} in {reference['output_dir']} has {number(reference['perplexity_after'])}."
        )
    groups = report.get("groups") if (report.get("groups") or {}).get("closed") else None
    return [
        " ".join(words),
        *([f"Target: {landing(target)}"] if target else []),
        *([f"Groups: {dead_groups(groups)}"] if groups else []),
    ]


def _numbers(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What one wants to know first: name, number, and what belongs to it."""
    reference = report.get("reference")
    beside = [f"{name_of(reference)} {number(reference['perplexity_after'])}"] if reference else []
    which = "that decay" if report["zeros"] else "that were counted"
    found = [
        (
            "Zeros",
            f"{report['sparsity']:.2%}",
            f"{report['zeros']:,} of {report['decayed_weights']:,} weights {which}",
        ),
        (
            "Perplexity",
            number(report["perplexity_after"]),
            ", ".join([*beside, f"before {number(report['perplexity_before'])}"]),
        ),
        (
            "Parameters",
            _short(report["parameters"]),
            f"{report['parameters']:,}, of which {report['sparsity_of_all']:.2%} are zero",
        ),
        ("Steps", f"{report['steps']:,}", f"learning rate {report['learning_rate']:g}, seed {report['seed']}"),
    ]
    if report.get("seconds") is not None:
        resumed = "since it was resumed, " if report["configuration"].get("resume_from_checkpoint") else ""
        found.append(("Time", _duration(float(report["seconds"])), f"{resumed}evaluations included"))
    return found


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
    for name, (zeros, elements) in report.get("tensors", {}).items():
        old = layers.setdefault(layer_of(name), [0, 0])
        old[0], old[1] = old[0] + zeros, old[1] + elements
    rows = sorted(layers.items(), key=lambda row: float("inf") if row[0] is None else row[0])
    tables = [("kind of layer", [(kind, *counts) for kind, counts in report["kinds"].items()])]
    return tables + (
        [("layer", [("none" if layer is None else str(layer), *counts) for layer, counts in rows])] if layers else []
    )


def _facts(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Tables of two columns; a report of version 1 knows its configuration in part."""
    known = {key: report[key] for key in ("learning_rate", "weight_decay", "seed")} | report["decay"]
    asked = report.get("configuration", {key: value for key, value in known.items() if value is not None})
    machine = report.get("environment", {"ranks": report["world_size"]}) | (
        {"engine": report["engine"]} if "engine" in report else {}
    )
    tables = {
        "Configuration, where it is not the default": asked,
        "Environment": machine,
        "Versions": report["versions"],
    }
    return {
        heading: {key: value if isinstance(value, str) else json.dumps(value) for key, value in rows.items()}
        for heading, rows in tables.items()
    }
