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

import pytest

import lp_dist

PACKAGE = Path(lp_dist.__file__).parent


def imported_by(code: str) -> set[str]:
    """Packages beyond the standard library that a fresh Python has imported then."""
    code += "; import sys; print(*sorted({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


def test_importing_lp_dist_imports_nothing_and_the_optimizers_torch_alone():
    assert "torch" not in imported_by("import lp_dist")
    before = imported_by("import torch")
    assert imported_by("import torch, lp_dist; lp_dist.LpAdamW, lp_dist.measure_sparsity") - before == {"lp_dist"}


def test_help_needs_no_torch():
    code = "from typer.testing import CliRunner; from lp_dist.cli import app; CliRunner().invoke(app, {})"
    assert not {"torch", "transformers"} & imported_by(code.format(["--help"]))
    assert not {"torch", "transformers"} & imported_by(code.format(["inspect", "--help"]))


def test_every_public_name_is_where_it_is_said_to_be():
    assert {*lp_dist._MODULE_OF, "__version__"} == {*lp_dist.__all__} <= {*dir(lp_dist)}
    imports = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(Path(lp_dist.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lp_dist.")
        for alias in node.names
    }
    assert imports - {("lp_dist._version", "__version__")} == {
        (f"lp_dist.{module}", name) for name, module in lp_dist._MODULE_OF.items()
    }
    with pytest.raises(AttributeError, match="module 'lp_dist' has no attribute 'LpAdam'"):
        getattr(lp_dist, "LpAdam")  # noqa: B009


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
import pytest

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
