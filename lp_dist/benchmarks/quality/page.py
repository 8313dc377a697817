"""Tables and plots of the bench's rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.quality.methods import BASELINES, FORMS, LP_DIST, PATTERNS, RIVALS, Spec
from lp_dist.benchmarks.quality.runs import device_of
from lp_dist.benchmarks.quality.tasks import HELD_OUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TUNED = "Each at the best of its learning rates and windows"
FORMS_TITLE = "Forms of lp_dist"
OTHERS_TITLE = "Other settings"
_COMPARED = (*BASELINES, *LP_DIST, *RIVALS, *PATTERNS)
_NAMES = {
    "dense": "dense",
    "magnitude:at=1": "magnitude, one shot",
    "magnitude": "magnitude, masked fine-tune",
    "wanda:at=1": "Wanda, one shot",
    "wanda": "Wanda, masked fine-tune",
    "sparsegpt:at=1": "SparseGPT, one shot",
    "sparsegpt": "SparseGPT, masked fine-tune",
    "pat": "torchao's PAT",
    "pat:c=0.33,scope=global": "PAT by |w|·(√v̂)^⅓, global",
    "pat:c=0.67,scope=global": "PAT by |w|·(√v̂)^⅔, global",
    "magnitude:at=0.7": "magnitude at 0.7 of the steps",
    "normdecay": "norm decay, then magnitude at 0.7 of the steps",
    "weissi": "weight-scale-shift invariant penalty, then magnitude at 0.7 of the steps",
    "gmp": "GMP by |w|",
    "gmp:c=0.33": "GMP by |w|·(√v̂)^⅓",
    "gmp:c=0.33,scope=global": "GMP by |w|·(√v̂)^⅓, global",
    "gmp:c=0.67,scope=global": "GMP by |w|·(√v̂)^⅔, global",
    "gmp:c=0.67,correct=1,scope=global": "GMP by |w|·(√v̂)^⅔, global, corrected",
    "trust_region": "trust region by v̂·w²",
    "trust_region:correct=1": "trust region by v̂·w², corrected",
    "elsa:penalty=0.0001": "ELSA, λ = 0.0001",
    "elsa": "ELSA, λ = 0.001",
    "elsa:penalty=0.01": "ELSA, λ = 0.01",
    "sparsegpt:at=1,pattern=2:4": "SparseGPT 2:4, one shot",
    "sparsegpt:pattern=2:4": "SparseGPT 2:4, masked fine-tune",
    "pat:pattern=2:4": "PAT 2:4 by |w|",
    "pat:c=0.67,pattern=2:4": "PAT 2:4 by |w|·(√v̂)^⅔",
    "lp:pattern=2:4": "lp_dist 2:4",
    "lp:reconstruct=1": "lp_dist, survivors move",
    "lp": "lp_dist, survivors stay",
    "lp:precondition=0.5": "lp_dist, γ = ½",
    "lp:precondition=0": "lp_dist, γ = 0",
    "lp:scope=layer": "lp_dist, layer by layer",
    "lp:latent_windows=1": "lp_dist, latent_windows = 1",
    "lp:latent_windows=1,precondition=0.5": "lp_dist, γ = ½, latent_windows = 1",
    "lp:latent_windows=0": "lp_dist, no latent weights",
    "lp:latent_windows=0,precondition=0.5": "lp_dist, γ = ½, no latent weights",
}
LP_STYLES: dict[str, dict[str, Any]] = {
    "lp:latent_windows=0": {"color": "0.65"},
    "lp:latent_windows=0,precondition=0.5": {"color": "0.65", "linestyle": "--"},
    "lp:latent_windows=1,precondition=0.5": {"color": "0.35", "linestyle": ":"},
    "lp:precondition=0.5": {"color": "0.35", "linestyle": "--"},
    "lp": {"color": "0.35"},
}
_LOWEST_STYLE = {"color": "black", "linestyle": "-", "linewidth": 2.4, "zorder": 3}
DRAWN = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "pat",
    "pat:c=0.33,scope=global",
    "pat:c=0.67,scope=global",
    "gmp",
    "gmp:c=0.33,scope=global",
    "gmp:c=0.67,scope=global",
    *LP_STYLES,
)


class Rate(NamedTuple):
    """The learning rates and the window of a run; -1: not given.

    Args:
        lr: the highest learning rate.
        stable_fraction: the fraction of the steps until which the rate stays there.
        start: of the window, as a fraction of the steps.
        end: of the window, as a fraction of the steps.
    """

    lr: float
    stable_fraction: float
    start: float
    end: float

    def __str__(self) -> str:
        """As tables have it, such as "0.002, stable until 0.7, window from 0.1 to 0.7"."""
        window = (f" from {self.start:g}" if self.start >= 0 else "") + (f" to {self.end:g}" if self.end >= 0 else "")
        stable = f", stable until {self.stable_fraction:g}" if self.stable_fraction >= 0 else ""
        return f"{self.lr:g}" + stable + (f", window{window}" if window else "")


class BestRate(NamedTuple):
    """The best rate of a method at a sparsity, and the losses of all its seeds in nats a token."""

    rate: Rate
    losses: list[float]


def name_of(method: str) -> str:
    """The name of a method for people.

    Args:
        method: its line.
    Returns:
        A name and the settings that differ from it; the line, if it has no name.
    """
    spec = Spec.read(method)
    named = spec.without("lr", "stable_fraction", "distill", "teacher", "optimizer")
    settings = [
        words
        for words, value in (
            ("with Lion" if spec.lr else "with Lion at a third of the learning rate", spec.optimizer == "lion"),
            (f"learning rate {spec.lr}", spec.lr),
            (f"stable until {spec.stable_fraction:g}", spec.stable_fraction),
            (f"distilled by {spec.distill:g}" + " from itself" * (spec.teacher == "self"), spec.distill),
        )
        if value
    ]
    return ", ".join([_NAMES.get(named.line, named.line), *settings])


def draw(rows: list[ResultRow], directory: Path) -> Path:
    """Writes quality.md, and a quality-….png for each section with several sparsities.

    There is a section for each task on CPUs and on each kind of GPU. A method is called by what differs from the
    defaults of now, whatever they were when it ran.

    Args:
        rows: as `json_lines.read` gives them.
        directory: where the files are written.
    Returns:
        The path of the page.
    """
    lines = [
        "# What sparsity costs: lp_dist against other methods",
        "",
        (
            "Cross-entropy on held-out text, in nats a token (perplexity in brackets where the tokens are words),"
            " lower is better. Same data, tokens,"
        ),
        (
            "seeds and evaluation for all; mean over seeds, ± half of the range between them. Every run is a row of"
            " [quality.jsonl](quality.jsonl), and"
        ),
        (
            "`lp-dist bench quality --task TASK --text FILE --methods METHOD --sparsities PERCENT --seeds SEED`, with"
            " its values, makes it again."
        ),
        "“Stable until 0.7”: the learning rate stays at its highest until 0.7 of the steps, and then falls.",
    ]
    sections: dict[str, list[ResultRow]] = {}
    for row in rows:
        named = {**row, "method": Spec.from_settings(Spec.read(row["method"]).family, row["settings"]).line}
        sections.setdefault(json.dumps([row["task"], device_of(row)], sort_keys=True), []).append(named)
    all_tasks = [section[0]["task"] for section in sections.values()]
    for section in sections.values():
        words = _title_words(section[0], all_tasks)
        picture = None
        # One sparsity makes no curve.
        if len(_sparsities(section)) > 1:
            name = " ".join(words).lower().replace(",", "").replace(" steps", "", 1)
            picture = "-".join(["quality", *re.findall(r"[a-z0-9]+", name)]) + ".png"
            draw_figure(", ".join(words), section).savefig(directory / picture, dpi=150)
        lines += ["", *_section(", ".join(words), picture, section)]
    path = directory / "quality.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _title_words(row: ResultRow, all_tasks: list[dict[str, Any]]) -> list[str]:
    """Name, length and device of a section, and what differs from other tasks of that name and length."""

    def flat(task: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{key} {inner}".strip(): value
            for key, entry in task.items()
            for inner, value in (entry.items() if isinstance(entry, dict) else [("", entry)])
        }

    task = flat(row["task"])
    same_name = [
        other for other in map(flat, all_tasks) if all(other[key] == task[key] for key in ("name", "schedule steps"))
    ]
    differences = [
        str(value).removesuffix(HELD_OUT) if key == "text" else f"{key} {value}"
        for key, value in task.items()
        if any(other.get(key) != value for other in same_name)
    ]
    device = device_of(row)
    return [task["name"], f"{task['schedule steps']:,} steps", *differences, *([device] if device != "cpu" else [])]


def tables(rows: list[ResultRow]) -> dict[str, list[list[str]]]:
    """The tables of a section: the compared methods, every form of lp_dist, and other settings.

    Args:
        rows: of one task and device.
    Returns:
        Tables by title; each has a line of columns, then a line for each method with a column for each sparsity.
    """
    measured = {row["method"] for row in rows}
    compared, forms = ([method for method in _shortest(lines) if method in measured] for lines in (_COMPARED, FORMS))
    # A table of forms needs one that is not compared in any case.
    if not set(forms) - set(compared):
        forms = []
    others = sorted(measured - {*compared, *forms})
    methods_of = {"": compared, FORMS_TITLE: forms, OTHERS_TITLE: others}
    by_title = {title: _table(rows, methods) for title, methods in methods_of.items() if methods}
    tuned = _tuned(rows, _shortest(_COMPARED))
    first = {"": by_title.pop("")} if compared else {}
    return {**first, **({TUNED: tuned} if len(tuned) > 1 else {}), **by_title}


def _tuned(rows: list[ResultRow], methods: list[str]) -> list[list[str]]:
    """A line for each method that was run at several learning rates or windows, with the best one at each sparsity."""
    sparsities, lines = _sparsities(rows), []
    for method in methods:
        rates = _by_rate(rows, method)
        if len(rates) > 1:
            bests = [_best(rates, s) for s in sparsities]
            cells = (f"{format_losses(best.losses, False)} at {best.rate}" if best else "" for best in bests)
            lines.append([name_of(method), *cells, "; ".join(map(str, sorted(rates)))])
    return [["method", *(f"{s:.0%}" for s in sparsities), "learning rates, and windows"], *lines]


def _best(rates: dict[Rate, list[ResultRow]], sparsity: float) -> BestRate | None:
    """The rate that is not above most others, each compared by the seeds that both have.

    Where several are alike in that, it is the one with the most seeds, then the one with the lowest mean.
    """
    at = {
        rate: {row["seed"]: row["loss"] for row in rows if row["sparsity"] in (0.0, sparsity)}
        for rate, rows in rates.items()
    }
    at = {rate: losses for rate, losses in at.items() if losses and None not in losses.values()}
    if not at:
        return None

    def standing(rate: Rate) -> tuple[int, int, float]:
        by_seed = at[rate]
        shared = ((losses, by_seed.keys() & losses.keys()) for losses in at.values())
        ahead = sum(
            mean(by_seed[seed] for seed in seeds) <= mean(losses[seed] for seed in seeds)
            for losses, seeds in shared
            if seeds
        )
        return ahead, len(by_seed), -mean(by_seed.values())

    best = max(at, key=standing)
    return BestRate(best, list(at[best].values()))


def _by_rate(rows: list[ResultRow], method: str) -> dict[Rate, list[ResultRow]]:
    """A method's rows by learning rate and window."""
    by_rate: dict[Rate, list[ResultRow]] = {}
    for row in rows:
        spec = Spec.read(row["method"])
        if spec.without(*Rate._fields).line == method:
            given = {"lr": row["task"]["schedule"]["lr"], **dict(spec.given)}
            by_rate.setdefault(Rate(*(given.get(key, -1.0) for key in Rate._fields)), []).append(row)
    return by_rate


def _shortest(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(Spec.from_settings(spec.family, spec.settings).line for spec in map(Spec.read, lines)))


def _sparsities(rows: list[ResultRow]) -> list[float]:
    return sorted({row["sparsity"] for row in rows} - {0.0})


def _table(rows: list[ResultRow], methods: list[str]) -> list[list[str]]:
    sparsities = _sparsities(rows)
    words = rows[0]["task"]["name"] == "lm"
    lines = []
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        at = {s: [row["loss"] for row in of_method if row["sparsity"] == s] for s in (0.0, *sparsities)}
        cells = (format_losses(at[s] or at[0.0], words) for s in sparsities)
        lines.append([name_of(method), *cells, str(max(map(len, at.values())))])
    return [["method", *(f"{s:.0%}" for s in sparsities), "seeds"], *lines]


def format_losses(losses: list[float | None], words: bool) -> str:
    """A cell of a table: the mean over seeds, and half of the range between them.

    Args:
        losses: of the seeds, in nats a token; None: not finite.
        words: the tokens are words, so the perplexity is added.
    Returns:
        Such as "3.000 ± 0.010 (20.09)"; empty without losses.
    """
    if not losses:
        return ""
    if None in losses:
        return "diverged"
    middle, spread = mean(losses), (max(losses) - min(losses)) / 2
    return (
        f"{middle:.3f}"
        + (f" ± {spread:.3f}" if len(losses) > 1 else "")
        + (f" ({math.exp(middle):.2f})" if words else "")
    )


def _section(title: str, picture: str | None, rows: list[ResultRow]) -> Iterable[str]:
    task = rows[0]["task"]
    schedule, machines = (
        task["schedule"],
        sorted({f"{row['machine']}, {row['threads']} thread{'s' * (row['threads'] > 1)} a run" for row in rows}),
    )
    before = (
        f"A dense model trained for {task['pretraining']['steps']:,} steps, then"
        if task["pretraining"]
        else "The model as it is given, then"
    )
    lines: list[str] = []
    for heading, (columns, *cells) in tables(rows).items():
        lines += ["", f"### {heading}"] if heading else []
        ruler = ["---", *["---:"] * (len(columns) - 1)]
        lines += [
            "",
            *(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                for line in (columns, ruler, *cells)
            ),
        ]
    return [
        f"## {title}",
        "",
        (
            f"{task['text']}. {before} {schedule['steps']:,} steps of {task['rows']} × {task['block']} tokens,"
            f" learning rate {schedule['lr']:g} unless the method's"
        ),
        f"name says another one. Measured on {'; '.join(machines)}.",
        *(["", f"![loss against sparsity]({picture})"] if picture else []),
        *lines,
    ]


def draw_figure(title: str, rows: list[ResultRow]) -> Figure:
    """Loss against sparsity of the methods in DRAWN.

    Baselines have the same colours in every plot. Forms of lp_dist are grey, and the one that is the lowest of them
    most often is black.

    Args:
        title: of the plot.
        rows: of one task and device.
    Returns:
        A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    best_dense = _best(_by_rate(rows, "dense"), 0.0)
    shown = []
    if best_dense:
        shown.append(mean(best_dense.losses))
        axes.axhline(shown[0], color="0.4", linestyle=":", label="dense")
    losses_of = {method: _best_losses(rows, method) for method in DRAWN}
    lowest = _lowest({method: {s: mean(losses) for s, losses in losses_of[method].items()} for method in LP_STYLES})
    for i, (method, at) in enumerate(losses_of.items()):
        if not at:
            continue
        if Spec.read(method).family in ("gmp", "lp"):
            shown += map(mean, at.values())
        # C7 is a grey.
        style = _LOWEST_STYLE if method == lowest else LP_STYLES.get(method, {"color": f"C{i + (i > 6)}"})
        _draw_curve(axes, at, label=name_of(method), style=style)
    if len(shown) > 1 and (span := max(shown) - min(shown)):
        # Methods that are far worse would flatten the others.
        axes.set_ylim(min(shown) - 0.08 * span, max(shown) + 0.15 * span)
    axes.set(
        xlabel="zeros of the weights of linear layers (%)",
        ylabel="held-out loss (nats a token)",
        title=f"{title}: each at its best learning rate and window, lower is better",
    )
    axes.title.set_fontsize(10)
    # Beside the lines: inside it would hide some of them.
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    return figure


def _best_losses(rows: list[ResultRow], method: str) -> dict[float, list[float]]:
    """A method's losses at its best rate, by sparsity."""
    rates = _by_rate(rows, method)
    bests = {s: _best(rates, s) for s in _sparsities(rows)}
    return {s: best.losses for s, best in bests.items() if best}


def _draw_curve(axes: Axes, losses_at: dict[float, list[float]], label: str, style: dict[str, Any]) -> None:
    """The means over sparsity, and the range between seeds."""
    points, losses = [100 * s for s in losses_at], list(losses_at.values())
    (line,) = axes.plot(
        points,
        list(map(mean, losses)),
        marker="o",
        markersize=4,
        **{"linewidth": 1.3, "zorder": 2, **style},
        label=label,
    )
    axes.fill_between(
        points, list(map(min, losses)), list(map(max, losses)), alpha=0.12, color=line.get_color(), linewidth=0
    )


def _lowest(means: dict[str, dict[float, float]]) -> str | None:
    """The method that is lowest at most of the sparsities, the first of several; from means by sparsity."""
    wins = [
        min((at[s], i) for i, at in enumerate(means.values()) if s in at)[1]
        for s in sorted({s for at in means.values() for s in at})
    ]
    return list(means)[max(sorted(set(wins)), key=wins.count)] if wins else None
