"""How figures look: their style, and how they become SVG in a page's own colours, and PNG for papers."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# As they are on white. On a page each is the CSS variable of its name, so no two are alike, and nothing else is drawn
# in one of them.
COLOURS = {
    "ink": "#1c2127",
    "muted": "#5a6472",
    "grid": "#dfe3e8",
    "shade": "#eceff3",
    "paper": "#fffffe",
    "ours": "#0b63c5",
    "other": "#b4500c",
}
DARK = {
    "ink": "#e8ecf1",
    "muted": "#9aa6b4",
    "grid": "#333c46",
    "shade": "#222931",
    "paper": "#181d23",
    "ours": "#62aaff",
    "other": "#f0985a",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.1,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
}

Draw = Callable[[dict[str, Any]], "Figure | None"]


def styled(draw: Draw) -> Draw:
    """A function that draws a report, in the style of all."""

    @functools.wraps(draw)
    def in_style(report: dict[str, Any]) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return draw(report)

    return in_style


def canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of 4 by 2.8 inches: readable as wide as a phone, and in a column of a paper."""
    figure = Figure(figsize=(4.0, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def with_legend(figure: Figure, axes: Axes) -> Figure:
    """The legend above the axes, in one row where there is room for it, where there is more than one thing to tell
    apart.
    """
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        fits = sum(map(len, labels)) + 5 * len(labels) <= 55  # a letter is about a fifth of what stands before a label
        figure.legend(
            handles, labels, loc="outside upper left", ncols=len(labels) if fits else math.ceil(len(labels) / 2)
        )
    return figure


def power(x: float) -> str:
    """2e-05 as 2·10⁻⁵, and 1e-05 as 10⁻⁵."""
    exponent = math.floor(math.log10(x) + 1e-9)
    ten = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if math.isclose(x, 10.0**exponent) else f"{x / 10.0**exponent:.3g}·{ten}"


def svg(name: str, figure: Figure) -> str:
    """An <svg> element for a page that defines COLOURS as CSS variables. Its ids begin with `name`, its text takes the
    page's font, and the same figure gives the same bytes."""
    stream = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = stream.getvalue()
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.DOTALL
    )  # it would style the whole page
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text)
    text = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text
    )  # a hundredth of a point is enough
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def png(figure: Figure, path: Path) -> None:
    """For papers: 300 dots an inch, on white."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=300, facecolor="white")
