"""Tables in the docs that tests write: with LP_DIST_WRITE_DOCS=1 they are written, else compared."""

from __future__ import annotations

import os

from helpers.paths import ROOT


def rows(*lines: list[str]) -> str:
    """A table in Markdown, the first line its head."""
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def hold(path: str, name: str, command: str, made: str) -> str:
    """Compares what stands between a table's markers with what was made, or writes it.

    Args:
        path: of the page.
        name: of the table, in its markers.
        command: that writes it, in its first marker.
        made: the table.
    Returns:
        The page.
    """
    first, last = f"<!-- {name}: {command} -->\n", f"\n<!-- end of {name} -->"
    text = (ROOT / path).read_text()
    assert text.count(first) == text.count(last) == 1, f"{path} lacks the markers of its table: {first}{last}"
    before, _, rest = text.partition(first)
    assert last in rest, f"{path}: a line must stand between the markers of a table: {first}{last}"
    written, _, after = rest.partition(last)
    if os.environ.get("LP_DIST_WRITE_DOCS") == "1":
        (ROOT / path).write_text(before + first + made + last + after)
        return text
    assert written == made, f"{path} says something else; LP_DIST_WRITE_DOCS=1 writes what ran"
    return text
