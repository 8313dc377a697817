"""Directories that are written whole or not at all: the one place for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lp_dist.errors import DiffersError, UsageError

_MODEL_DIRECTORIES = ("additional_chat_templates",)  # that a model's own directory may have


def check_output_directory(out: str | Path, overwrite: bool, *sources: Path) -> Path:
    """Checks that nothing is lost where `out` is written.

    Args:
        out: the directory to write.
        overwrite: whether an earlier output there may be replaced.
        sources: directories that are read meanwhile, which must not lie within `out`.
    Returns:
        `out` as an absolute path.
    Raises:
        UsageError: it is a file, is not empty and may not be overwritten, has directories that no output has, or holds
            a source.
    """
    out = Path(out).resolve()
    for source in sources:
        for directory in (out, _partial(out), _replaced(out)):
            if directory in (source.resolve(), *source.resolve().parents):
                raise UsageError(
                    f"{directory} is or holds {source}, which it is to be made from; choose another place for it"
                )
    if not out.exists():
        return out
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose another place")
    if any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} exists and is not empty; choose another place, or replace it by --overwrite")
    unknown = [inner for inner in out.iterdir() if inner.is_dir() and inner.name not in _MODEL_DIRECTORIES]
    if unknown:
        raise UsageError(
            f"{out} is no earlier output, since it has a directory {unknown[0].name}, which --overwrite would delete;"
            " choose another place"
        )
    return out


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A directory `out`.partial to write into, which replaces `out` at the end.

    After an error it is removed, and `out` is as it was. After a DiffersError it stays, so that one can look at it.
    What was in `out` is moved aside first, and removed when the new directory is in its place: killed in between, a
    process leaves it as `out`.replaced.
    """
    partial = _partial(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except DiffersError:
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not out.exists():
        partial.rename(out)
        return
    before = _replaced(out)
    shutil.rmtree(before, ignore_errors=True)
    out.rename(before)
    try:
        partial.rename(out)
    except BaseException:
        before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _replaced(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")
