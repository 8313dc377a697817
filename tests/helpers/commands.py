"""Shared by the tests: the `lp-dist` command, in a process of its own or in this one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest


def lp_dist(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from lp_dist.cli import main; main()", *words], capture_output=True, text=True
    )


def lp_dist_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The command in this process, which has imported what it needs. Returns its exit code."""
    from lp_dist import cli

    monkeypatch.setattr(sys, "argv", ["lp-dist", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code
