"""Shared by the tests: the `lp-dist` command in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def lp_dist(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from lp_dist.cli import main; main()", *words], capture_output=True, text=True
    )
