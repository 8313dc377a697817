"""How percentages and perplexities of a run, an export and an inspection are printed."""

from __future__ import annotations


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as it is printed: 0.4 is "40.00 %"."""
    return f"{100 * fraction:.{digits}f} %"


def perplexity(value: float | str | None) -> str:
    """A perplexity as it is printed. None: it was not measured. A string is "inf" or "nan", as JSON holds it."""
    if value is None:
        return "not measured"
    return f"{float(value):,.2f}" if abs(float(value)) < 1e6 else f"{float(value):.3g}"
