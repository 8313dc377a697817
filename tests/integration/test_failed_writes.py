"""A disk that is full, or a limit on the size of files, in the midst of a write: what was there before is whole, and
nothing half written is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from helpers import reports as cases
from helpers.damage import files_of
from helpers.export_runs import llama
from helpers.trainer_runs import same, train
from lp_dist import LpCallback, SparsityTarget
from lp_dist.benchmarks import json_lines
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.report import page, schema

SEED = int(os.environ.get("LP_DIST_SEED", random.randrange(1000)))  # a failure tells it
WRITES = 10


def content_of(directory: Path) -> dict[str, str]:
    """Digests of all files below it; empty ones of directories."""
    paths = sorted(directory.rglob("*"))
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in paths
    }


def limits(full_size: int, count: int = WRITES) -> list[int]:
    """Sizes of files at which a write fails: of every order of magnitude, below that of the file."""
    chance = random.Random(SEED)
    return [int(math.exp(chance.uniform(0.0, math.log(full_size)))) - 1 for _ in range(count)]


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file grows beyond it. What is printed goes to no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_failing_writes(directory: Path, write: Callable[[], Any], full_size: int) -> None:
    """`write` fails at every limit, and leaves the directory as it was."""
    before = content_of(directory)
    for limit in limits(full_size):
        error: BaseException | None = None
        try:
            with file_size_limit(limit):
                write()
        except Exception as caught:
            error = caught
        assert error is not None, f"seed {SEED}: nothing failed at {limit} bytes of {full_size}"
        assert content_of(directory) == before, f"seed {SEED}, {limit} bytes: {error}"


@pytest.mark.parametrize("more", [{}, {"bitmask": True}, {"shard_size": "4KB"}], ids=str)
def test_an_export_that_fails_leaves_the_earlier_one(more, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", dtype="float32")
    written = export(tmp_path / "model", tmp_path / "measured", overwrite=True, dtype="bfloat16", **more)
    full_size = max((written.out / file).stat().st_size for file in written.files)
    check_failing_writes(
        tmp_path,
        lambda: export(tmp_path / "model", tmp_path / "out", overwrite=True, dtype="bfloat16", **more),
        full_size,
    )


def test_an_export_that_can_not_take_its_place_leaves_the_earlier_one(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", dtype="float32")
    before, rename = content_of(tmp_path), Path.rename

    def failing(self, target):
        if self.name == "out.partial":
            raise OSError("a disk that is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="a disk that is gone"):
        export(tmp_path / "model", tmp_path / "out", overwrite=True, dtype="bfloat16")
    assert {name: content for name, content in content_of(tmp_path).items() if ".partial" not in name} == before


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path):
    schema.write(tmp_path, cases.full())
    again = cases.full() | {"steps": 17}
    check_failing_writes(tmp_path, lambda: schema.write(tmp_path, again), (tmp_path / schema.FILE).stat().st_size)


def test_a_page_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    drawings = page.build(cases.full())
    monkeypatch.setattr(page, "build", lambda report: drawings + str(report["steps"]))
    page.write(cases.full(), tmp_path / "report.html")
    again = cases.full() | {"steps": 17}
    full_size = (tmp_path / "report.html").stat().st_size
    check_failing_writes(tmp_path, lambda: page.write(again, tmp_path / "report.html"), full_size)


def test_a_figure_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    from lp_dist.report import figures

    monkeypatch.setattr(figures, "DRAWINGS", figures.DRAWINGS[:1])
    html, figure = page.write(cases.full(), tmp_path / "report.html", png=True)
    before = content_of(tmp_path)
    with (
        file_size_limit(html.stat().st_size),
        pytest.raises(UsageError, match="can't write .*-loss.png: File too large"),
    ):
        page.write(cases.dense(), html, png=True)
    assert figure.stat().st_size > html.stat().st_size and content_of(tmp_path)[figure.name] == before[figure.name]
    assert set(content_of(tmp_path)) == set(before)


def test_a_row_that_fails_leaves_the_earlier_ones(tmp_path):
    for i in range(20):
        json_lines.append(tmp_path / "rows.jsonl", {"task": "a", "seed": i})
    size = (tmp_path / "rows.jsonl").stat().st_size
    before = content_of(tmp_path)
    for limit in (size, size + 1, size + 20):
        with file_size_limit(limit), pytest.raises(OSError, match="File too large"):
            json_lines.append(tmp_path / "rows.jsonl", {"task": "a", "seed": 20})
        assert content_of(tmp_path) == before
    assert len(json_lines.read(tmp_path / "rows.jsonl")) == 20


class Limited(TrainerCallback):
    """Lets no file grow beyond a size from the end of a step on, which Trainer then saves."""

    def __init__(self, step: int, size: int, stack: contextlib.ExitStack) -> None:
        self.step, self.size, self.stack = step, size, stack

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.stack.enter_context(file_size_limit(self.size))


def test_a_state_that_fails_leaves_the_checkpoint_from_which_the_run_goes_on(tmp_path):
    """Trainer's checkpoints, which hold the target's state."""

    def run(directory: Path, *callbacks: TrainerCallback, **more: Any) -> Any:
        target = LpCallback(target=SparsityTarget(0.5, update_every=4))
        return train(directory, [target, *callbacks], save_strategy="steps", save_steps=8, **more)

    uninterrupted = run(tmp_path / "uninterrupted")
    second = tmp_path / "uninterrupted" / "checkpoint-16"
    full_size = max((second / file).stat().st_size for file in files_of(second))
    shutil.copytree(tmp_path / "uninterrupted" / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    before = content_of(tmp_path / "run")
    for limit in limits(full_size):
        with contextlib.ExitStack() as stack, contextlib.suppress(Exception):
            run(tmp_path / "run", Limited(16, limit, stack), resume=str(tmp_path / "run" / "checkpoint-8"))
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
        after = content_of(tmp_path / "run")
        assert {name: after[name] for name in before} == before, f"seed {SEED}, {limit} bytes"
        partial = tmp_path / "run" / "checkpoint-16"
        assert content_of(partial) != content_of(second), f"seed {SEED}, {limit} bytes: nothing failed"
        shutil.rmtree(partial)
    assert same(uninterrupted, run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-8")))
