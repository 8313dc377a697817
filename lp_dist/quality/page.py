"""Table and plot of the bench's rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from lp_dist.quality.methods import BASELINES, FORMS, OURS, Spec
from lp_dist.quality.runs import device_of

Row = dict[str, Any]
BEST = "lp"
_NAMES = {
    "dense": "dense", "magnitude:at=1": "magnitude, one shot", "magnitude": "magnitude, masked fine-tune", "wanda:at=1": "Wanda, one shot",
    "wanda": "Wanda, masked fine-tune", "sparsegpt:at=1": "SparseGPT, one shot", "sparsegpt": "SparseGPT, masked fine-tune",
    "pat": "torchao's PAT", "pat:c=0.33,scope=global": "PAT by |w|·(√v̂)^⅓, global",
    "pat:c=0.67,scope=global": "PAT by |w|·(√v̂)^⅔, global", "gmp": "GMP by |w|",
    "gmp:c=0.33": "GMP by |w|·(√v̂)^⅓", "gmp:c=0.33,scope=global": "GMP by |w|·(√v̂)^⅓, global",
    "gmp:c=0.67,scope=global": "GMP by |w|·(√v̂)^⅔, global", "lp": "ours", "lp:precondition=0.5": "ours, γ = ½", "lp:precondition=0": "ours, γ = 0",
    "lp:scope=layer": "ours, layer by layer",
    "lp:memory=1": "ours, memory = 1", "lp:memory=1,precondition=0.5": "ours, γ = ½, memory = 1",
    "lp:memory=0": "ours, without memory", "lp:memory=0,precondition=0.5": "ours, γ = ½, without memory"}
DRAWN = ("magnitude", "wanda", "sparsegpt", "pat", "pat:c=0.33,scope=global", "pat:c=0.67,scope=global", "gmp", "gmp:c=0.33,scope=global",
         "gmp:c=0.67,scope=global", "lp:memory=0", "lp:memory=0,precondition=0.5", "lp:memory=1,precondition=0.5", "lp:precondition=0.5", BEST)


def name_of(method: str) -> str:
    """For people; a line that has no name of its own is called by what differs."""
    spec = Spec.read(method)
    without = spec.without("lr", "distill")
    rest = ([f"learning rate {spec.lr:g}"] if spec.lr else []) + ([f"distilled by {spec.distill:g}"] if spec.distill else [])
    return ", ".join([_NAMES.get(without.line, without.line), *rest])


def draw(rows: list[Row], directory: Path) -> Path:
    """Writes quality.md, and quality-WORK-STEPS.png for each work on a CPU and on each kind of GPU, where it has several sparsities; returns the page's path.

    Rows of another work than the last one of its name and steps are left out of both, and stay in the file. A method is called by what differs
    from the defaults of now, whatever they were when it ran."""
    lines = [
        "# What sparsity costs: ours against the ways that others go", "",
        "Cross-entropy on held-out text, in nats a token (perplexity in brackets where the tokens are words), lower is better. Same data, tokens,",
        "seeds and evaluation for all; mean over seeds, ± half of the range between them. Every run is a row of [quality.jsonl](quality.jsonl), and",
        "`lp-dist bench quality --work W --text FILE --methods METHOD --sparsities PERCENT --seeds SEED`, with its values, makes it again."]
    for name, steps, device in dict.fromkeys(map(_about, rows)):
        of_name = [row for row in rows if _about(row) == (name, steps, device)]
        of_work = [{**row, "method": Spec.of(Spec.read(row["method"]).family, row["settings"]).line} for row in of_name if row["work"] == of_name[-1]["work"]]
        title = f"{name}, {steps:,} steps" + (f", {device}" if device != "cpu" else "")
        picture = None
        if len(_sparsities(of_work)) > 1:       # one of them is no curve
            picture = "-".join(["quality", name, str(steps), *(device.lower().split() if device != "cpu" else [])]) + ".png"
            _plot(title, of_work, directory / picture)
        lines += ["", *_section(title, picture, of_work)]
    path = directory / "quality.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _about(row: Row) -> tuple[str, int, str]:
    return row["work"]["name"], row["work"]["schedule"]["steps"], device_of(row)


def tables(rows: list[Row]) -> dict[str, list[list[str]]]:
    """Of a work's rows, by title; each with a line of columns, then a line for each method with a column for each sparsity: the methods
    that are compared, every form of ours, and what else was tried."""
    found = {row["method"] for row in rows}
    compared, forms = ([method for method in _shortest(lines) if method in found] for lines in ([*BASELINES, *OURS], FORMS))
    if not set(forms) - set(compared):
        forms = []      # none beside those that are compared in any case
    others = sorted(found - {*compared, *forms})
    parts = {"": compared, "Forms of ours": forms, "Other settings": others}
    found_tables = {title: _table(rows, methods) for title, methods in parts.items() if methods}
    tuned = _tuned(rows, _shortest([*BASELINES, *OURS]))
    first = {"": found_tables.pop("")} if compared else {}
    return {**first, **({"Each at the best of its learning rates": tuned} if len(tuned) > 1 else {}), **found_tables}


def _tuned(rows: list[Row], methods: list[str]) -> list[list[str]]:
    """A line for each method that was run at several learning rates, with the best one at each sparsity."""
    sparsities, cells = _sparsities(rows), []
    for method in methods:
        rates = _by_rate(rows, method)
        if len(rates) > 1:
            best = [_best(rates, s) for s in sparsities]
            cells.append([name_of(method), *(f"{_cell(found[1], False)} at {found[0]:g}" if found else "" for found in best),
                          ", ".join(f"{rate:g}" for rate in sorted(rates))])
    return [["method", *(f"{s:.0%}" for s in sparsities), "learning rates"], *cells]


def _best(rates: dict[float, list[Row]], sparsity: float) -> tuple[float, list[float]] | None:
    """The learning rate with the lowest mean over the seeds that all of them have there, and the losses of all its own seeds."""
    at = {rate: {row["seed"]: row["loss"] for row in rows if row["sparsity"] in (0.0, sparsity)} for rate, rows in rates.items()}
    at = {rate: losses for rate, losses in at.items() if losses and None not in losses.values()}
    shared = set.intersection(*map(set, at.values())) if at else set()
    if not shared:
        return None
    best = min(at, key=lambda rate: mean(at[rate][seed] for seed in shared))
    return best, list(at[best].values())


def _by_rate(rows: list[Row], method: str) -> dict[float, list[Row]]:
    """A method's rows by learning rate."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        spec = Spec.read(row["method"])
        if spec.without("lr").line == method:
            found.setdefault(spec.lr or row["work"]["schedule"]["lr"], []).append(row)
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
        cells.append([name_of(method), *(_cell(at[s] or at[0.0], words) for s in sparsities), str(max(map(len, at.values())))])
    return [["method", *(f"{s:.0%}" for s in sparsities), "seeds"], *cells]


def _cell(losses: list[float | None], words: bool) -> str:
    if not losses:
        return ""
    if None in losses:
        return "diverged"
    middle, spread = mean(losses), (max(losses) - min(losses)) / 2
    return f"{middle:.3f}" + (f" ± {spread:.3f}" if len(losses) > 1 else "") + (f" ({math.exp(middle):.2f})" if words else "")


def _section(title: str, picture: str | None, rows: list[Row]) -> Iterable[str]:
    work = rows[0]["work"]
    schedule, machines = work["schedule"], sorted({f"{row['machine']}, {row['threads']} thread{'s' * (row['threads'] > 1)} a run" for row in rows})
    before = f"A dense model trained for {work['pretraining']['steps']:,} steps, then" if work["pretraining"] else "The model as it is given, then"
    lines: list[str] = []
    for heading, (columns, *cells) in tables(rows).items():
        lines += ["", f"### {heading}"] if heading else []
        ruler = ["---", *["---:"] * (len(columns) - 1)]
        lines += ["", *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (columns, ruler, *cells))]
    return [
        f"## {title}", "",
        f"{work['text']}. {before} {schedule['steps']:,} steps of {work['rows']} × {work['block']} tokens, learning rate {schedule['lr']:g} unless the method's",
        f"name says another one. Measured on {'; '.join(machines)}.", *(["", f"![loss against sparsity]({picture})"] if picture else []), *lines]


def _plot(title: str, rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    dense = [row["loss"] for row in rows if row["method"] == "dense"]
    if dense:
        axes.axhline(mean(dense), color="0.4", linestyle=":", label="dense")
    highest = mean(dense) if dense else 0.0
    for method in DRAWN:
        rates = _by_rate(rows, method)
        at = {sparsity: found[1] for sparsity in _sparsities(rows) if (found := _best(rates, sparsity))}
        if not at:
            continue
        points, means = list(at), list(map(mean, at.values()))
        highest = max(highest, means[-1]) if Spec.read(method).family in ("gmp", "lp") else highest
        line, = axes.plot([100 * s for s in points], means, marker="o", markersize=4, linewidth=2.4 if method == BEST else 1.3,
                          label=name_of(method), color="black" if method == BEST else None, zorder=3 if method == BEST else 2)
        axes.fill_between([100 * s for s in points], list(map(min, at.values())), list(map(max, at.values())), alpha=0.2, color=line.get_color())
    if highest and dense:
        axes.set_ylim(mean(dense) * 0.98, highest * 1.03)     # what is far worse would flatten the rest
    axes.set(xlabel="zeros of the weights of linear layers (%)", ylabel="held-out loss (nats a token)", title=f"{title}: each at its best learning rate, lower is better")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
