"""The package itself: what importing it costs, what it carries, and that imports run in one direction."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
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


def test_what_needs_transformers_is_there_when_asked_for():
    from transformers import Trainer, TrainerCallback

    assert issubclass(lp_dist.LpCallback, TrainerCallback)
    assert issubclass(lp_dist.LpTrainer, Trainer)
    assert all(hasattr(lp_dist, name) for name in lp_dist.__all__)


def test_an_installed_package_is_typed_and_says_its_version():
    assert (PACKAGE / "py.typed").exists()
    assert importlib.metadata.version("lp_dist") == lp_dist.__version__


# Each room may import those before it, never one after it.
ORDER = [
    "errors",
    "outputs",
    "patterns",
    "decay",
    "slices",
    "kernels",
    "segments",
    "blocks",
    "latents",
    "base",
    "optim",
    "hooks",
    "engines",
    "shards",
    "groups",
    "schedule",
    "sparsity",
    "parts",
    "recognition",
    "structure",
    "rates",
    "quantiles",
    "patterned",
    "target",
    "feasible",
    "planned",
    "control",
    "places",
    "grouped",
    "group_control",
    "grouping",
    "attached",
    "restoring",
    "attachment",
    "footprint",
    "distillation",
    "live",
    "trainer",
    "report",
    "canvas",
    "figures",
    "page",
    "data",
    "merging",
    "checkpoints",
    "widths",
    "compaction",
    "verification",
    "export",
    "channels",
    "inspection",
    "bench",
    "trajectories",
    "stepping_whole",
    "stepping_contenders",
    "stepping",
    "dequantise",
    "quality",
    "arguments",
    "finetune",
    "cli",
]


def imports(path: Path) -> set[str]:
    """Rooms that a room imports; `path` is a file, or the folder of one with several."""
    found = set()
    nodes = [
        node
        for file in (path.glob("*.py") if path.is_dir() else [path])
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "lp_dist":
            found |= {
                alias.name
                for alias in node.names
                if (PACKAGE / f"{alias.name}.py").exists() or (PACKAGE / alias.name).is_dir()
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lp_dist."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lp_dist.")}
    return found


def test_imports_run_in_one_direction():
    rooms = {
        path.parent.name if path.name == "__init__.py" else path.stem
        for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py"))
    }
    rooms -= {"lp_dist"}
    assert rooms == set(ORDER)
    for room in rooms:
        path = PACKAGE / room
        own = {room} if path.is_dir() else set()
        later = {
            other
            for other in imports(path if path.is_dir() else path.with_suffix(".py")) - own
            if ORDER.index(other) >= ORDER.index(room)
        }
        assert not later, f"{room} imports {later}"


def test_the_mathematics_and_the_optimizers_know_no_engine():
    for room in ("decay", "segments", "optim", "hooks"):
        text = (PACKAGE / f"{room}.py").read_text()
        assert not any(
            f"import {engine}" in text or f"from {engine}" in text
            for engine in ("deepspeed", "accelerate", "transformers")
        )
        assert "shards" not in imports(PACKAGE / f"{room}.py")
