"""Where lp_dist keeps what it makes once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lp_dist.optim.cache import cache_directory


@pytest.mark.parametrize(
    "variables, root",
    [
        ({"LP_DIST_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lp_dist"),
        ({"LP_DIST_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/user/.cache/lp_dist"),
        ({}, "/home/user/.cache/lp_dist"),
    ],
)
def test_a_variable_of_ours_comes_before_that_of_the_desktop(variables, root, monkeypatch):
    for name in ("LP_DIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(root)
    assert cache_directory("quality", "models") == Path(root, "quality", "models")
