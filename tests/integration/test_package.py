"""The package itself: what importing it costs, what it carries, and that imports run in one direction."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lp_dist

PACKAGE = Path(lp_dist.__file__).parent


def test_importing_lp_dist_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import lp_dist; lp_dist.LpAdamW, lp_dist.measure_sparsity; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["lp_dist"]


def test_what_needs_transformers_is_there_when_requested():
    from transformers import Trainer, TrainerCallback

    assert issubclass(lp_dist.LpCallback, TrainerCallback)
    assert issubclass(lp_dist.LpTrainer, Trainer)
    assert all(hasattr(lp_dist, name) for name in lp_dist.__all__)


def test_an_installed_package_is_typed_and_says_its_version():
    assert (PACKAGE / "py.typed").exists()
    assert importlib.metadata.version("lp_dist") == lp_dist.__version__


def test_a_wheel_holds_every_file_and_imports_with_torch_alone(tmp_path):
    """An editable install would mask what the package data or the list of packages leaves out."""
    source = tmp_path / "source"  # pip builds in the tree
    shutil.copytree(PACKAGE, source / "lp_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PACKAGE.parent / name, source)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.startswith("lp_dist/")}
        file.extractall(tmp_path / "installed")
    tracked = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tracked
    code = """
import importlib, pkgutil, sys
sys.modules["numpy"] = None  # torch does not require it
import lp_dist
assert lp_dist.__file__.startswith(sys.argv[1])
from lp_dist import attach, LpAdamW, SparsityTarget, GroupDecay
"""
    installed = str(tmp_path / "installed")
    subprocess.run(
        [sys.executable, "-c", code, installed],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": installed},
        check=True,
    )


def test_each_package_is_one_sentence():
    for path in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        docstring = ast.get_docstring(tree)
        assert docstring and docstring.endswith("."), path
        if path.parent != PACKAGE:
            assert len(tree.body) == 1 and re.search(r"[.!?] ", docstring) is None, path
