"""Files that are written whole or not at all: the one place for them. Directories: `export/output_directory.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into, which replaces it at the end. After an error `path` is as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> Path:
    """Writes a text file in UTF-8, and returns its path."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
