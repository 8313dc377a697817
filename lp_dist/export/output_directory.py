"""Directories that are written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lp_dist.errors import DiffersError, UsageError

_PARTS = ("additional_chat_templates",)  # directories that a model's own directory may have


def replaceable(out: str | Path, overwrite: bool, *sources: Path) -> Path:
    """`out` as an absolute path, once it is known that nothing would be lost there.

    Args:
        sources: what is read meanwhile, which must not lie within it.
    Raises:
        UsageError: it is a file, is not empty and may not be overwritten, has directories of its own, or holds a
            source.
    """
    out = Path(out).resolve()
    for source in sources:
        for place in (out, _partial(out)):
            if place in (source.resolve(), *source.resolve().parents):
                raise UsageError(
                    f"{place} is or holds {source}, which it is to be made from; choose another place for it"
                )
    if not out.exists():
        return out
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose another place")
    if any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} exists and is not empty; choose another place, or replace it by --overwrite")
    odd = [inner for inner in out.iterdir() if inner.is_dir() and inner.name not in _PARTS]
    if odd:
        raise UsageError(
            f"{out} is no earlier output, since it has a directory {odd[0].name}, which --overwrite would delete;"
            " choose another place"
        )
    return out


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A directory `out`.partial to write into, which takes the place of `out` at the end. After an error it is removed
    and `out` is as it was; after a DiffersError it stays, to be looked at."""
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
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
