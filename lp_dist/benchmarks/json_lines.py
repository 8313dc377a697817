"""Results as JSON lines: one row a measurement, appended as soon as it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lp_dist.benchmarks.row_names import current_names
from lp_dist.errors import in_one_line

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
        path: the .jsonl file; its directory exists. After an error it is as it was.
        row: plain JSON types, all numbers finite.
    Raises:
        ValueError: a number is infinite or no number, which JSON cannot hold.
        OSError: it can't be written.
    """
    left = (to_line(row) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def read(path: Path) -> list[ResultRow]:
    """Reads all rows of a file, with the names of today.

    Args:
        path: the .jsonl file; it may be missing.
    Returns:
        The rows in the order in which they were appended; an empty list without a file. Older names in them are
        replaced (`row_names.current_names`).
    Raises:
        UsageError: a line is no JSON, or no row.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with in_one_line(
            f"line {number} of {path} is no row: reading it ended with", "remove it, or copy the file anew"
        ):
            rows.append(current_names(json.loads(line)))
    return rows
