"""Table and plot of the bench's rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from lp_dist.benchmarks.quality.methods import BASELINES, FORMS, OURS, Spec
from lp_dist.benchmarks.quality.runs import device_of
from lp_dist.benchmarks.quality.tasks import HELD_OUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
# the highest learning rate, the part of the run at which it begins to fall, and those at which the window starts and
# ends; -1: not given
Rate = tuple[float, float, float, float]
TUNED = "Each at the best of its learning rates and windows"
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
    "gmp": "GMP by |w|",
    "gmp:c=0.33": "GMP by |w|·(√v̂)^⅓",
    "gmp:c=0.33,scope=global": "GMP by |w|·(√v̂)^⅓, global",
    "gmp:c=0.67,scope=global": "GMP by |w|·(√v̂)^⅔, global",
    "lp": "ours",
    "lp:precondition=0.5": "ours, γ = ½",
    "lp:precondition=0": "ours, γ = 0",
    "lp:scope=layer": "ours, layer by layer",
    "lp:memory=1": "ours, memory = 1",
    "lp:memory=1,precondition=0.5": "ours, γ = ½, memory = 1",
    "lp:memory=0": "ours, without memory",
    "lp:memory=0,precondition=0.5": "ours, γ = ½, without memory",
}
_OURS: dict[str, dict[str, Any]] = {
    "lp:memory=0": {"color": "0.65"},
    "lp:memory=0,precondition=0.5": {"color": "0.65", "linestyle": "--"},
    "lp:memory=1,precondition=0.5": {"color": "0.35", "linestyle": ":"},
    "lp:precondition=0.5": {"color": "0.35", "linestyle": "--"},
    "lp": {"color": "0.35"},
}
_LOWEST = {"color": "black", "linestyle": "-", "linewidth": 2.4, "zorder": 3}
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
    *_OURS,
)


def name_of(method: str) -> str:
    """For people; a line that has no name of its own is called by what differs."""
    spec = Spec.read(method)
    without = spec.without("lr", "fall", "distill")
    rest = [
        words
        for words, value in (
            (f"learning rate {spec.lr}", spec.lr),
            (f"falling from {spec.fall:g}", spec.fall),
            (f"distilled by {spec.distill:g}", spec.distill),
        )
        if value
    ]
    return ", ".join([_NAMES.get(without.line, without.line), *rest])


def draw(rows: list[Row], directory: Path) -> Path:
    """Writes quality.md, with a section for each work on a CPU and on each kind of GPU, and a quality-….png for those
    with several sparsities; returns the page's path. A method is called by what differs from the defaults of now,
    whatever they were when it ran.
    """
    lines = [
        "# What sparsity costs: ours against the ways that others go",
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
            "`lp-dist bench quality --work W --text FILE --methods METHOD --sparsities PERCENT --seeds SEED`, with its"
            " values, makes it again."
        ),
    ]
    sections: dict[str, list[Row]] = {}
    for row in rows:
        named = {**row, "method": Spec.of(Spec.read(row["method"]).family, row["settings"]).line}
        sections.setdefault(json.dumps([row["work"], device_of(row)], sort_keys=True), []).append(named)
    for of_work in sections.values():
        parts = _title(of_work[0], [others[0]["work"] for others in sections.values()])
        picture = None
        if len(_sparsities(of_work)) > 1:  # one of them is no curve
            picture = (
                "-".join(
                    [
                        "quality",
                        *re.findall(r"[a-z0-9]+", " ".join(parts).lower().replace(",", "").replace(" steps", "", 1)),
                    ]
                )
                + ".png"
            )
            _figure(", ".join(parts), of_work).savefig(directory / picture, dpi=150)
        lines += ["", *_section(", ".join(parts), picture, of_work)]
    path = directory / "quality.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _title(row: Row, works: list[dict[str, Any]]) -> list[str]:
    """Name, length and device of a section, and between them what tells its work from others of that name and length:
    text, block and so on.
    """

    def flat(work: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{key} {inner}".strip(): value
            for key, part in work.items()
            for inner, value in (part.items() if isinstance(part, dict) else [("", part)])
        }

    own, others = flat(row["work"]), list(map(flat, works))
    alike = [other for other in others if all(other[key] == own[key] for key in ("name", "schedule steps"))]
    special = [
        str(value).removesuffix(HELD_OUT) if key == "text" else f"{key} {value}"
        for key, value in own.items()
        if any(other.get(key) != value for other in alike)
    ]
    return [
        own["name"],
        f"{own['schedule steps']:,} steps",
        *special,
        *([device_of(row)] if device_of(row) != "cpu" else []),
    ]


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Of a work's rows, by title; each with a line of columns, then a line for each method with a column for each
    sparsity: the methods that are compared, every form of ours, and what else was tried."""
    found = {row["method"] for row in rows}
    compared, forms = (
        [method for method in _shortest(lines) if method in found] for lines in ([*BASELINES, *OURS], FORMS)
    )
    if not set(forms) - set(compared):
        forms = []  # none beside those that are compared in any case
    others = sorted(found - {*compared, *forms})
    parts = {"": compared, "Forms of ours": forms, "Other settings": others}
    found_tables = {title: _table(rows, methods) for title, methods in parts.items() if methods}
    tuned = _tuned(rows, _shortest([*BASELINES, *OURS]))
    first = {"": found_tables.pop("")} if compared else {}
    return {**first, **({TUNED: tuned} if len(tuned) > 1 else {}), **found_tables}


def _tuned(rows: list[Row], methods: list[str]) -> list[list[str]]:
    """A line for each method that was run at several learning rates or windows, with the best one at each sparsity."""
    sparsities, cells = _sparsities(rows), []
    for method in methods:
        rates = _by_rate(rows, method)
        if len(rates) > 1:
            best = [_best(rates, s) for s in sparsities]
            cells.append(
                [
                    name_of(method),
                    *(f"{_cell(found[1], False)} at {_rate_word(found[0])}" if found else "" for found in best),
                    "; ".join(map(_rate_word, sorted(rates))),
                ]
            )
    return [["method", *(f"{s:.0%}" for s in sparsities), "learning rates, and windows"], *cells]


def _rate_word(rate: Rate) -> str:
    lr, fall, start, end = rate
    window = (f" from {start:g}" if start >= 0 else "") + (f" to {end:g}" if end >= 0 else "")
    return f"{lr:g}" + (f" from {fall:g}" if fall >= 0 else "") + (f", window{window}" if window else "")


def _best(rates: dict[Rate, list[Row]], sparsity: float) -> tuple[Rate, list[float]] | None:
    """The rate that is not above most others, each by the seeds that both have, and the losses of all its own seeds;
    where several are alike in that, the one with the most seeds, and the lowest mean."""
    at = {
        rate: {row["seed"]: row["loss"] for row in rows if row["sparsity"] in (0.0, sparsity)}
        for rate, rows in rates.items()
    }
    at = {rate: losses for rate, losses in at.items() if losses and None not in losses.values()}
    if not at:
        return None

    def standing(rate: Rate) -> tuple[int, int, float]:
        own = at[rate]
        shared = ((losses, own.keys() & losses.keys()) for losses in at.values())
        ahead = sum(
            mean(own[seed] for seed in seeds) <= mean(losses[seed] for seed in seeds)
            for losses, seeds in shared
            if seeds
        )
        return ahead, len(own), -mean(own.values())

    best = max(at, key=standing)
    return best, list(at[best].values())


def _by_rate(rows: list[Row], method: str) -> dict[Rate, list[Row]]:
    """A method's rows by learning rate and window."""
    found: dict[Rate, list[Row]] = {}
    for row in rows:
        spec = Spec.read(row["method"])
        if spec.without("lr", "fall", "start", "end").line == method:
            given = {"lr": row["work"]["schedule"]["lr"], **dict(spec.given)}
            lr, fall, start, end = (given.get(key, -1.0) for key in ("lr", "fall", "start", "end"))
            found.setdefault((lr, fall, start, end), []).append(row)
    return found


def _shortest(lines: Iterable[str]) -> list[str]:
    return [Spec.of(spec.family, spec.settings).line for spec in map(Spec.read, lines)]


def _sparsities(rows: list[Row]) -> list[float]:
    return sorted({row["sparsity"] for row in rows} - {0.0})


def _table(rows: list[Row], methods: list[str]) -> list[list[str]]:
    sparsities = _sparsities(rows)
    words = rows[0]["work"]["name"] == "lm"
    cells = []
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        at = {s: [row["loss"] for row in of_method if row["sparsity"] == s] for s in (0.0, *sparsities)}
        cells.append(
            [name_of(method), *(_cell(at[s] or at[0.0], words) for s in sparsities), str(max(map(len, at.values())))]
        )
    return [["method", *(f"{s:.0%}" for s in sparsities), "seeds"], *cells]


def _cell(losses: list[float | None], words: bool) -> str:
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


def _section(title: str, picture: str | None, rows: list[Row]) -> Iterable[str]:
    work = rows[0]["work"]
    schedule, machines = (
        work["schedule"],
        sorted({f"{row['machine']}, {row['threads']} thread{'s' * (row['threads'] > 1)} a run" for row in rows}),
    )
    before = (
        f"A dense model trained for {work['pretraining']['steps']:,} steps, then"
        if work["pretraining"]
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
            f"{work['text']}. {before} {schedule['steps']:,} steps of {work['rows']} × {work['block']} tokens,"
            f" learning rate {schedule['lr']:g} unless the method's"
        ),
        f"name says another one. Measured on {'; '.join(machines)}.",
        *(["", f"![loss against sparsity]({picture})"] if picture else []),
        *lines,
    ]


def _figure(title: str, rows: list[Row]) -> Figure:
    """Loss against sparsity of DRAWN: baselines in colours, which are the same in every plot, ours in grey, and in
    black the form of ours that is the lowest of them most often."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    dense = found[1] if (found := _best(_by_rate(rows, "dense"), 0.0)) else []
    if dense:
        axes.axhline(mean(dense), color="0.4", linestyle=":", label="dense")
    tuned = {
        method: {s: found[1] for s in _sparsities(rows) if (found := _best(_by_rate(rows, method), s))}
        for method in DRAWN
    }
    shown = [mean(dense)] if dense else []
    lowest = _lowest({method: {s: mean(losses) for s, losses in tuned[method].items()} for method in _OURS})
    for i, (method, at) in enumerate(tuned.items()):
        if not at:
            continue
        points, means = [100 * s for s in at], list(map(mean, at.values()))
        if Spec.read(method).family in ("gmp", "lp"):
            shown += means
        look = _LOWEST if method == lowest else _OURS.get(method, {"color": f"C{i + (i > 6)}"})  # C7 is a grey
        (line,) = axes.plot(
            points, means, marker="o", markersize=4, **{"linewidth": 1.3, "zorder": 2, **look}, label=name_of(method)
        )
        axes.fill_between(
            points,
            list(map(min, at.values())),
            list(map(max, at.values())),
            alpha=0.12,
            color=line.get_color(),
            linewidth=0,
        )
    if len(shown) > 1 and (span := max(shown) - min(shown)):
        axes.set_ylim(min(shown) - 0.08 * span, max(shown) + 0.15 * span)  # what is far worse would flatten the rest
    axes.set(
        xlabel="zeros of the weights of linear layers (%)",
        ylabel="held-out loss (nats a token)",
        title=f"{title}: each at its best learning rate and window, lower is better",
    )
    axes.title.set_fontsize(10)
    figure.legend(fontsize=8, loc="outside right upper")  # beside the lines: inside it would hide some of them
    axes.grid(alpha=0.3)
    return figure


def _lowest(means: dict[str, dict[float, float]]) -> str | None:
    """Of several methods' means by sparsity the one that is lowest at most of the sparsities; where several are, the
    first.
    """
    wins = [
        min((at[s], i) for i, at in enumerate(means.values()) if s in at)[1]
        for s in sorted({s for at in means.values() for s in at})
    ]
    return list(means)[max(sorted(set(wins)), key=wins.count)] if wins else None
