"""Tables of the benchmarks' pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """A table in Markdown, a line each.

    Args:
        columns: the header of each column; may be empty strings.
        rows: cells, as many as there are columns.
        left: numbers of the columns that are aligned left; the others are aligned right.
    """
    table = [list(columns), ["---" if i in left else "---:" for i, _ in enumerate(columns)], *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table]
