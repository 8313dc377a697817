"""The style of all figures, and how they are written: as SVG in the colours of a page, and as PNG for papers."""

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

# As they are on white. On a page each is the CSS variable of its name, so no two may be alike, and nothing else may be
# drawn in one of them.
COLOURS = {
    "ink": "#1c2127",
    "muted": "#5a6472",
    "grid": "#dfe3e8",
    "shade": "#eceff3",
    "paper": "#fffffe",
    "primary": "#0b63c5",
    "secondary": "#b4500c",
}
DARK = {
    "ink": "#e8ecf1",
    "muted": "#9aa6b4",
    "grid": "#333c46",
    "shade": "#222931",
    "paper": "#181d23",
    "primary": "#62aaff",
    "secondary": "#f0985a",
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
    """Decorates a function that draws a report: it draws in STYLE."""

    @functools.wraps(draw)
    def in_style(report: dict[str, Any]) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return draw(report)

    return in_style


def canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of 4 by 2.8 inches, which can be read on a phone and in a column of a paper."""
    figure = Figure(figsize=(4.0, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def with_legend(figure: Figure, axes: Axes) -> Figure:
    """Adds a legend above the axes if they have several labels, in one row if it fits."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        # A label's line and gaps are as wide as about five letters.
        fits = sum(map(len, labels)) + 5 * len(labels) <= 55
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
    """An <svg> element for a page that defines COLOURS as CSS variables. The same figure gives the same bytes.

    Args:
        name: the prefix of all ids in it, so that figures of one page do not share any.
        figure: drawn in STYLE. Its text takes the font of the page.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = stream.getvalue()
    # Its <style> would be that of the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text)
    # A hundredth of a point is enough.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def png(figure: Figure, path: Path) -> None:
    """Writes a figure for papers: 300 dots an inch, on white."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=300, facecolor="white")
