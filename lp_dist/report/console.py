"""The tables that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lp_dist.report.schema import name_of


def show(report: dict[str, Any], page: Path | None = None) -> None:
    """Prints what was gained: perplexity before and after, sparsity overall and per kind of layer, where it was saved,
    and where its page is.
    """
    console = Console()
    runs = Table(title="Perplexity on held-out text, and exact zeros in the weights that decay")
    for column in ("", "perplexity", "zeros", "of all parameters"):
        runs.add_column(column, justify="left" if not column else "right")
    runs.add_row("before", number(report["perplexity_before"]), f"{report['sparsity_before']:.2%}", "")
    rows = [("after", report)]
    if reference := report.get("reference"):
        rows.insert(0, (f"{name_of(reference)} ({reference['output_dir']})", reference))
    for label, run in rows:
        runs.add_row(label, number(run["perplexity_after"]), f"{run['sparsity']:.2%}", f"{run['sparsity_of_all']:.2%}")
    console.print(runs)
    if report["sparsity"] > 0:
        kinds = Table(title="Exact zeros per kind of layer")
        for column in ("layer", "weights", "zeros", "share"):
            kinds.add_column(column, justify="left" if column == "layer" else "right")
        for kind, (zeros, elements) in report["kinds"].items():
            kinds.add_row(kind, f"{elements:,}", f"{zeros:,}", f"{zeros / elements:.2%}")
        console.print(kinds)
    if report.get("target"):
        console.print(f"Target: {landing(report['target'])}", soft_wrap=True)
    if (groups := report.get("groups")) and groups["closed"]:
        console.print(f"Groups: {dead_groups(groups)}", soft_wrap=True)
    console.print(
        f"Saved to [bold]{report['output_dir']}[/bold], {report['zeros']:,} exact zeros counted in its files; loads"
        " with from_pretrained.",
        soft_wrap=True,
        highlight=False,
    )
    if page is not None:
        console.print(f"Page: {page}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Next: {report['next']}", soft_wrap=True, highlight=False, markup=False)


def landing(target: dict[str, Any]) -> str:
    """How a target was reached, in a sentence."""
    if not (closed := target["closed"]):
        return f"{target['sparsity']:.2%} zeros, but the run was stopped before its window ended."
    return (
        f"{target['sparsity']:.2%} zeros; {closed['before']:.2%} died by decay, {closed['by_threshold']:.2%} at the"
        " last threshold."
    )


def dead_groups(groups: dict[str, Any]) -> str:
    """Which whole groups are zero, in a sentence."""
    dead = ", ".join(f"{dead:,} of {all_:,} {kind}" for kind, (dead, all_) in groups["kinds"].items())
    return (
        f"{dead} are zero; {groups['closed']['before']:.2%} died by decay, {groups['closed']['by_threshold']:.2%} at"
        " the last threshold."
    )


def number(value: float | str | None) -> str:
    """A perplexity for people; what is neither finite nor measured as well."""
    if value is None:
        return "not measured"
    return f"{float(value):,.2f}" if abs(float(value)) < 1e6 else f"{float(value):.3g}"
