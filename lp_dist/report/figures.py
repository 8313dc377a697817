"""Figures of a run, each drawn from the report alone. A function returns None if the report has nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from lp_dist.report.canvas import COLOURS, Draw, canvas, power, styled, with_legend
from lp_dist.report.numbers import percent
from lp_dist.report.schema import name_of
from lp_dist.sparsity.measure import kind_of, layer_of

Report = dict[str, Any]
# Points of a curve at most.
MAX_POINTS = 250
# A target logs a λ below this where nothing was left to prune.
_NO_DECAY = 1e-29

# -- against steps ------------------------------------------------------------


def points(log: list[dict[str, Any]], key: str) -> dict[int, float]:
    """A curve of logged values, with at most MAX_POINTS points.

    Args:
        log: Trainer's log, entries with a "step". Infinities and nans are text in a report.
        key: of the values.
    Returns:
        {step: value}. A point is the mean of `values_per_point` values, at the step of the last one. A point without a
        finite value is nan, which is drawn as a gap. Empty if all are.
    """
    logged = {entry["step"]: float(entry[key]) for entry in log if key in entry and "step" in entry}
    steps, size = sorted(logged), values_per_point(log, key)
    means = {}
    for chunk in (steps[i : i + size] for i in range(0, len(steps), size)):
        finite = [logged[step] for step in chunk if math.isfinite(logged[step])]
        means[chunk[-1]] = sum(finite) / len(finite) if finite else math.nan
    return {} if all(map(math.isnan, means.values())) else means


def values_per_point(log: list[dict[str, Any]], key: str) -> int:
    """How many logged values a point of a curve is the mean of."""
    return math.ceil(len({entry.get("step") for entry in log if key in entry}) / MAX_POINTS) or 1


def _plot(axes: Axes, curve: dict[int, float], colour: str, label: str, **style: Any) -> None:
    axes.plot(list(curve), list(curve.values()), color=COLOURS[colour], label=label, **style)


def _plot_reference(axes: Axes, report: Report, key: str, marker: str | None = None) -> None:
    reference = report["reference"]
    if reference and (curve := points(reference["log"], key)):
        # It is above the run's own curve, which shows between its dashes.
        _plot(axes, curve, "secondary", name_of(reference), linestyle="--", marker=marker, zorder=4)


def _finish(figure: Figure, axes: Axes, report: Report) -> Figure:
    """Shades the decay window, and scales the axis to all steps of the longer run."""
    steps = max(report["steps"], (report["reference"] or report)["steps"])
    axes.set_xlim(-0.02 * steps, 1.02 * steps)
    if (window := report["window"]) and window[0] < report["steps"]:
        axes.axvspan(
            window[0], min(window[1], report["steps"]), color=COLOURS["shade"], linewidth=0, zorder=0, label="decay"
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return with_legend(figure, axes)


def _log_axis(axis: Any, form: Callable[[float], str]) -> None:
    axis.axes.set_yscale("log")
    low, high = axis.axes.get_ylim()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda y, _: form(y)))
    axis.set_minor_formatter(NullFormatter())
    axis.axes.minorticks_off()


@styled
def loss(report: Report) -> Figure | None:
    """The training loss of the run, and of its reference."""
    curve = points(report["log"], "loss")
    if len(curve) < 2:
        return None
    figure, axes = canvas("optimizer step", "nats a token")
    _plot(axes, curve, "primary", "this run", zorder=3)
    _plot_reference(axes, report, "loss")
    return _finish(figure, axes, report)


@styled
def perplexity(report: Report) -> Figure | None:
    """The perplexity at evaluations, of the run and of its reference."""
    curve = points(report["log"], "eval_perplexity")
    if len(curve) < 2:
        return None
    figure, axes = canvas("optimizer step", "perplexity")
    markers = len(curve) < 30
    _plot(axes, curve, "primary", "this run", marker="o" if markers else None, zorder=3)
    _plot_reference(axes, report, "eval_perplexity", "s" if markers else None)
    before = float(report["perplexity_before"] or "nan")
    if math.isfinite(before):
        axes.axhline(before, color=COLOURS["muted"], linestyle=":", linewidth=1.2, label="before")
    finite = [value for value in curve.values() if math.isfinite(value)]
    if max(finite) > 8 * min(finite):
        _log_axis(axes.yaxis, lambda y: f"{y:,.10g}" if y < 1e6 else power(y))
    return _finish(figure, axes, report)


@styled
def sparsity(report: Report) -> Figure | None:
    """The planned and the counted fraction of zeros."""
    log = report["log"]
    plan, counted, evaluated, near_zero = (
        points(log, key) for key in ("lp/plan", "lp/measured", "eval_sparsity", "lp/near_zero")
    )
    # A dense run, or a single update.
    if max([0.0, *plan.values(), *evaluated.values()]) < 1e-3 or len({*plan, *evaluated}) < 2:
        return None
    figure, axes = canvas("optimizer step", "share of zeros")
    if counted:
        _plot(axes, counted, "primary", "counted", zorder=3)
        _plot(axes, plan, "ink", "planned", linestyle="--", linewidth=1.1, zorder=4)
    if not counted or len(evaluated) < 30:
        _plot(
            axes,
            evaluated,
            "primary",
            "at evaluations",
            linestyle="" if counted else "-",
            marker="o" if len(evaluated) < 30 else None,
            zorder=3,
        )
    if any(abs(near_zero[step] - counted.get(step, near_zero[step])) > 1e-3 for step in near_zero):
        _plot(axes, near_zero, "secondary", "near zero", linestyle=":", zorder=3)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return _finish(figure, axes, report)


@styled
def strength(report: Report) -> Figure | None:
    """λ over the tensors: its median, and its range."""
    # After the window the log repeats the last update.
    until = (report["window"] or (0, math.inf))[1]
    low, middle, high = (
        {
            step: value
            for step, value in points(report["log"], f"lp/lambda_{which}").items()
            if value > _NO_DECAY and step <= until
        }
        for which in ("min", "median", "max")
    )
    if len(middle) < 2:
        return None
    figure, axes = canvas("optimizer step", "")
    axes.set_ylabel("λ", rotation=0, ha="right", labelpad=6)
    _plot(axes, middle, "primary", "median", zorder=3)
    both = [step for step in middle if step in low and step in high]
    if any(high[step] > 1.01 * low[step] for step in both):
        axes.fill_between(
            both,
            [low[step] for step in both],
            [high[step] for step in both],
            color=COLOURS["primary"],
            alpha=0.22,
            linewidth=0,
            label="lowest to highest",
        )
    _log_axis(axes.yaxis, power)
    return _finish(figure, axes, report)


# -- of the weights -----------------------------------------------------------


def zero_shares(tensors: dict[str, list[int]]) -> tuple[list[int | None], list[str], list[list[float]]]:
    """The fraction of zeros by kind of layer and by layer.

    Args:
        tensors: {parameter: [zeros, elements]}, in the order of the model.
    Returns:
        The layers, in order, None at the end for parameters outside of the layers; the kinds, in the order of the
        model, where two modules with one name (attn.c_proj, mlp.c_proj) are two kinds; and a row of fractions for each
        kind, nan where a layer has none of it.
    """
    paths = {
        name: [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()] for name in tensors
    }
    modules = {
        kind: {tuple(path) for name, path in paths.items() if kind_of(name) == kind} for kind in map(kind_of, tensors)
    }
    kinds = {
        name: kind_of(name) if len(modules[kind_of(name)]) == 1 else ".".join(path[-2:])
        for name, path in paths.items()
    }
    counts: dict[tuple[str, int | None], tuple[int, int]] = {}
    for name, (zeros, elements) in tensors.items():
        sums = counts.get((kinds[name], layer_of(name)), (0, 0))
        counts[kinds[name], layer_of(name)] = sums[0] + zeros, sums[1] + elements
    layers = sorted({layer for _, layer in counts}, key=lambda layer: math.inf if layer is None else layer)
    rows = list(dict.fromkeys(kinds.values()))
    return (
        layers,
        rows,
        [
            [counts[row, layer][0] / counts[row, layer][1] if (row, layer) in counts else math.nan for layer in layers]
            for row in rows
        ],
    )


@styled
def heat(report: Report) -> Figure | None:
    """A map of the fraction of zeros, by layer and kind of layer."""
    tensors = report["tensors"]
    if not any(zeros for zeros, _ in tensors.values()):
        return None
    layers, kinds, shares = zero_shares(tensors)
    finite = [share for row in shares for share in row if not math.isnan(share)]
    low = math.floor(20 * min(finite)) / 20
    high = max(math.ceil(20 * max(finite)) / 20, low + 0.05)
    figure, axes = canvas("layer", "")
    mesh = axes.pcolormesh(
        shares,
        cmap=matplotlib.colormaps["viridis"].resampled(32),
        vmin=low,
        vmax=high,
        edgecolors=COLOURS["paper"],
        linewidth=min(1.2, 12 / len(layers)),
    )
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    stride = math.ceil(len(layers) / 8)
    axes.set_xticks(
        [i + 0.5 for i in range(0, len(layers), stride)],
        ["none" if layer is None else str(layer) for layer in layers[::stride]],
    )
    axes.set_yticks(
        [i + 0.5 for i in range(len(kinds))], [kind if len(kind) < 20 else f"…{kind[-18:]}" for kind in kinds]
    )
    if len(layers) <= 6:
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                light = share < low + 0.6 * (high - low)
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    "" if math.isnan(share) else percent(share, 1),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#f7f9fb" if light else "#10151b",
                )
    bar = figure.colorbar(
        mesh, ax=axes, format=PercentFormatter(1.0, decimals=0, symbol=" %"), fraction=0.05, pad=0.02
    )
    # Else seams show between its colours.
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


@styled
def weights(report: Report) -> Figure | None:
    """Histograms of |w| before and after, and their zeros at the left, so that every area is a fraction of weights."""
    histograms = report["histograms"]
    if not histograms["before"]:
        return None
    edges = histograms["edges"]
    density, zeros = {}, {}
    for when in ("before", "after"):
        total = sum(histograms[when]) + histograms[f"zeros_{when}"]
        zeros[when] = histograms[f"zeros_{when}"] / total
        # Bins differ in width.
        density[when] = [count / total / math.log2(b / a) for count, a, b in zip(histograms[when], edges, edges[1:])]
    highest = [max(pair) for pair in zip(*density.values())]
    shown = [i for i, height in enumerate(highest) if height > 0.01 * max(highest)]
    first, last = shown[0], shown[-1] + 1
    figure, axes = canvas("|w|", "share a doubling")
    # The bar of the zeros is one doubling wide, so that its area is a fraction as well.
    zero_bar = (edges[first] / 4, edges[first] / 2)
    for when, colour, style, alpha, order in (("before", "muted", "--", 0.18, 2), ("after", "primary", "-", 0.28, 3)):
        steps = [
            (density[when][first:last], edges[first : last + 1]),
            *([([zeros[when]], zero_bar)] if zeros[when] > 1e-3 else []),
        ]
        for i, (heights, borders) in enumerate(steps):
            axes.stairs(heights, borders, fill=True, color=COLOURS[colour], alpha=alpha, linewidth=0, zorder=order)
            axes.stairs(
                heights,
                borders,
                color=COLOURS[colour],
                linestyle=style,
                linewidth=1.4,
                zorder=order,
                label="" if i else f"{when}, {percent(zeros[when], 1)} zeros",
            )
    axes.set_xscale("log")
    powers = [10.0**i for i in range(-14, 6) if edges[first] <= 10.0**i <= edges[last]]
    ticks = {
        **({math.sqrt(zero_bar[0] * zero_bar[1]): "0"} if max(zeros.values()) > 1e-3 else {}),
        **{x: power(x) for x in powers},
    }
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return with_legend(figure, axes)


# -- all of them --------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Args:
        name: of its file, and the prefix of its ids.
        title: above it.
        caption: the sentence below the title, of a report.
        draw: draws it.
    """

    name: str
    title: str
    caption: Callable[[Report], str]
    draw: Draw


def _loss_caption(report: Report) -> str:
    decay, size = report["decay"], values_per_point(report["log"], "loss")
    mean = f" Means of {size} logged values each." if size > 1 else ""
    if decay.get("teacher"):
        return (
            f"{percent(float(decay['distill']), 0)} of it comes from the teacher, so it does not compare with a run"
            f" without one.{mean}"
        )
    return f"Cross-entropy of the training batches; lower is better.{mean}"


DRAWINGS = (
    Drawing("loss", "Training loss", _loss_caption, loss),
    Drawing(
        "perplexity",
        "Perplexity on held-out text",
        lambda _: "Of text that was not trained on; lower is better.",
        perplexity,
    ),
    Drawing(
        "sparsity",
        "Zeros, planned and counted",
        lambda _: "Share of exact zeros among the weights that decay.",
        sparsity,
    ),
    Drawing("lambda", "Strength of the decay", lambda _: "λ over the tensors, updated every few steps.", strength),
    Drawing("heat", "Where the zeros are", lambda _: "Share of exact zeros in each matrix.", heat),
    Drawing(
        "weights",
        "Sizes of the weights",
        lambda _: "Share of the weights for each doubling of |w|; at 0 the zeros.",
        weights,
    ),
)
