"""The folder in which lp_dist keeps what it makes once: the built step, dequantised models, the benchmarks' models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(*folders: str) -> Path:
    """The user's cache folder of lp_dist, or a folder below it. It need not exist yet.

    Args:
        folders: names of the folders below, outermost first.
    Returns:
        `LP_DIST_CACHE` where it is set; else `lp_dist` in `XDG_CACHE_HOME`, or in ~/.cache where that is not set.
    """
    root = os.environ.get("LP_DIST_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lp_dist"
    return base.joinpath(*folders)
