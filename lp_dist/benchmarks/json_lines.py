"""Results as JSON lines: one row a measurement, appended as soon as it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lp_dist.benchmarks.row_names import current_names

ResultRow = dict[str, Any]


def to_line(row: ResultRow) -> str:
    """A row as one line of JSON, without the line's end.

    Args:
        row: plain JSON types, all numbers finite.
    Raises:
        ValueError: a number is infinite or no number, which JSON cannot hold.
    """
    return json.dumps(row, allow_nan=False)


def append(path: Path, row: ResultRow) -> None:
    """Appends one row to a file, and makes the file if there is none.

    Args:
        path: the .jsonl file; its directory exists.
        row: plain JSON types, all numbers finite.
    Raises:
        ValueError: a number is infinite or no number, which JSON cannot hold.
    """
    with path.open("a") as file:
        file.write(to_line(row) + "\n")


def read(path: Path) -> list[ResultRow]:
    """Reads all rows of a file, with the names of today.

    Args:
        path: the .jsonl file; it may be missing.
    Returns:
        The rows in the order in which they were appended; an empty list without a file. Older names in them are
        replaced (`row_names.current_names`).
    """
    if not path.exists():
        return []
    return [current_names(json.loads(line)) for line in path.read_text().splitlines()]
