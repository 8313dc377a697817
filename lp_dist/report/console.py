"""Every table and line that a command of this library prints at its end.

rich is imported where something is printed: `import lp_dist` comes here by `merge_adapter`, and imports torch alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lp_dist.report.numbers import percent, perplexity
from lp_dist.report.schema import name_of


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    no_wrap: Collection[str] = (),
    width: int | None = None,
) -> None:
    """Prints a table to stdout: the first column aligned left, the others right.

    Args:
        title: the line above the table.
        columns: the header of each column; may be empty strings.
        rows: the cells of each row, as printed, as many as there are columns.
        no_wrap: headers of the columns whose cells and header stay on one line.
        width: characters a line where stdout is no terminal. None: rich's own choice (80, or what COLUMNS says).
    """
    from rich.console import Console

    table = _table(title, columns, rows, no_wrap, ())
    console = Console()
    (console if width is None or console.is_terminal else Console(width=width)).print(table)


def table_text(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Collection[str] = (),
    no_wrap: Collection[str] = (),
    width: int = 100,
) -> str:
    """A table as plain text, for what prints itself.

    Args:
        title: as of `print_table`.
        columns: as of `print_table`.
        rows: as of `print_table`.
        texts: headers of further columns that are aligned left.
        no_wrap: as of `print_table`.
        width: characters a line.
    """
    from rich.box import SIMPLE
    from rich.console import Console

    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    table = _table("", columns, rows, no_wrap, texts)
    table.box, table.pad_edge = SIMPLE, False
    console.print(table)
    assert isinstance(console.file, StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join([title, *filter(None, lines)])


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], no_wrap: Collection[str], texts: Collection[str]
) -> Any:
    from rich.table import Table
    from rich.text import Text

    # As text: names of a checkpoint may hold brackets, which rich would read as markup.
    table = Table(title=Text(title, style="table.title") if title else None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if not i or column in texts else "right", no_wrap=column in no_wrap)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def say(line: str) -> None:
    """Prints one line of text to stdout, as it is: not wrapped, without highlights, brackets not read as markup."""
    from rich.console import Console

    Console().print(line, soft_wrap=True, highlight=False, markup=False)


def show(report: dict[str, Any], page: Path | None = None) -> None:
    """Prints what a run gained: perplexity, zeros overall and per kind of layer, and where it was saved.

    Args:
        report: of the finished run, as `lp_dist.report.schema` describes it.
        page: where the page of the report is; None: there is none.
    """
    rows = [
        ("before", perplexity(report["perplexity_before"]), percent(report["sparsity_before"]), ""),
        _run_row("after", report),
    ]
    if reference := report["reference"]:
        rows.insert(1, _run_row(f"{name_of(reference)} ({reference['output_dir']})", reference))
    print_table(
        "Perplexity on held-out text, and exact zeros in the weights that decay",
        ("", "perplexity", "zeros", "of all parameters"),
        rows,
    )
    if report["sparsity"] > 0:
        print_table(
            "Exact zeros per kind of layer",
            ("layer", "weights", "zeros", "share"),
            (
                (kind, f"{elements:,}", f"{zeros:,}", percent(zeros / elements))
                for kind, (zeros, elements) in report["kinds"].items()
            ),
        )
    if report["target"]:
        say(target_line(report["target"]))
    if (groups := report["groups"]) and groups["final_pruning"]:
        say(groups_line(groups))
    say(
        f"Saved to {report['output_dir']}, {report['zeros']:,} exact zeros counted in its files; loads with"
        " from_pretrained."
    )
    if page is not None:
        say(f"Page: {page}")
    say(f"Next: {report['next']}")


def _run_row(label: str, run: dict[str, Any]) -> tuple[str, str, str, str]:
    return label, perplexity(run["perplexity_after"]), percent(run["sparsity"]), percent(run["sparsity_of_all"])


def target_line(target: dict[str, Any]) -> str:
    """How a target of single weights was reached, in one sentence.

    Args:
        target: the report's entry: {"sparsity", "final_pruning": {"before", "after", "pruned_at_end"} or None,
            "left_dense"}.
    """
    pruning = target["final_pruning"]
    if not pruning:
        return f"Target {percent(target['sparsity'])} not reached: the run was stopped before its window ended."
    return (
        f"Target {percent(target['sparsity'])} reached: {percent(pruning['before'])} became zero in the window,"
        f" {percent(pruning['pruned_at_end'])} pruned in the final step.{_of_the_rest(target)}"
    )


def groups_line(groups: dict[str, Any]) -> str:
    """How many channels, heads or experts are zero, in one sentence.

    Args:
        groups: the report's entry: {"sparsity", "final_pruning": as of the target, "kinds": {kind: [dead, all]}}.
    """
    counts = ", ".join(f"{dead:,} of {total:,} {kind}" for kind, (dead, total) in groups["kinds"].items())
    pruning = groups["final_pruning"]
    return (
        f"Groups: {counts} are zero; {percent(pruning['before'])} became zero in the window,"
        f" {percent(pruning['pruned_at_end'])} pruned in the final step.{_of_the_rest(groups)}"
    )


def _of_the_rest(target: dict[str, Any]) -> str:
    """What the target does not hold of, in a sentence."""
    left = target["left_dense"]
    return f" That is of the rest: {left} had no gradient when the window began, and stayed dense." if left else ""
