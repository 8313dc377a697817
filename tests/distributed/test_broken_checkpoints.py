"""A full disk while saving, files cut short or gone, another script or model on an old checkpoint: in every engine an
error, or the script's values with a warning. On one rank, whose failure leaves no other one waiting.
"""

from __future__ import annotations

import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.decay_runs import CELLS, STEPS, attached, model_of, optimizer_of, scheduler_of, trained
from helpers.engines import ended, in_two_starts, make, quiet
from helpers.snapshots import snapshot
from lp_dist import LpAdamW

ENGINES = ("one process", "FSDP2", "zero2, fp32", "zero3, fp32", "zero3, bf16", "BF16_Optimizer")


def error_of(deed: Any) -> str:
    """What it raises. (torch.distributed.checkpoint's exception is a BaseException alone.)"""
    try:
        deed()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def full_disk(deed: Any) -> str:
    """What a deed raises that can write no more than 3,000 bytes to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        return error_of(deed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def wider() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 5, bias=False), nn.Linear(5, 1))


def another_script(model: nn.Sequential) -> LpAdamW:
    groups = optimizer_of(model).param_groups
    return LpAdamW(
        [
            {"params": groups[0]["params"], "lr": 1e-2, "weight_decay": 4.0},
            {"params": groups[1]["params"], "lr": 2e-2, "p": 0.0},
            {"params": groups[2]["params"], "lr": 1e-2, "weight_decay": 0.0},
        ],
        p=0.5,
        weight_decay=0.25,
        precondition=0.0,
    )


def on_one_rank(rank: int, world_size: int, directory: Path, cells: tuple[str, ...]) -> dict[str, Any]:
    quiet()
    results: dict[str, Any] = {}
    for cell in cells:
        place = directory / cell

        def new(
            tag: str | None = None, optimizer_of: Any = optimizer_of, where: Path = place, model_of: Any = model_of
        ) -> tuple[Any, Any, str]:
            kind, dtype = CELLS[cell]
            engine = make(
                kind,
                model_of(),
                optimizer_of,
                scheduler_of,
                **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
            )
            attachment = attached(engine)
            return engine, attachment, error_of(lambda: engine.load(where, tag)) if tag else ""

        engine, attachment, _ = new()
        trained(engine, attachment, 0, 2)
        engine.save(place, "2")
        trained(engine, attachment, 2, 4)
        seen = results[cell] = {"disk": full_disk(lambda: engine.save(place, "4")), "broken": {}}
        trained(engine, attachment, 4, STEPS)
        wanted = snapshot(engine, attachment)
        ended(engine)
        seen["latest"] = (place / "latest").read_text() if "zero" in cell or "BF16" in cell else "2"
        engine, attachment, seen["half"] = new("4")
        ended(engine)

        engine, attachment, error = new(seen["latest"])
        trained(engine, attachment, 2, STEPS)
        seen["differs"] = (
            [error] if error else [key for key, value in snapshot(engine, attachment).items() if wanted[key] != value]
        )
        ended(engine)

        for file in sorted(path.relative_to(place) for path in (place / "2").rglob("*") if path.is_file()):
            shutil.rmtree(directory / "broken", ignore_errors=True)
            shutil.copytree(place, directory / "broken")
            content = (place / file).read_bytes()
            for how, damaged in {
                "half": content[: len(content) // 2],
                "all but a byte": content[:-1],
                "nothing": None,
            }.items():
                if damaged is None:
                    (directory / "broken" / file).unlink()
                else:
                    (directory / "broken" / file).write_bytes(damaged)
                engine, _, seen["broken"][f"{how} of {file.name}"] = new("2", where=directory / "broken")
                ended(engine)

        engine, _, seen["model"] = new("2", model_of=wider)
        ended(engine)
        log: list[str] = []
        logging.getLogger("lp_dist.attachment.restoring").addFilter(lambda record: log.append(record.getMessage()))
        engine, attachment, seen["error"] = new("2", optimizer_of=another_script)
        seen["groups"], seen["log"] = (
            [(group["weight_decay"], group["p"]) for group in attachment.optimizer.param_groups],
            log,
        )
        logging.getLogger("lp_dist.attachment.restoring").filters.clear()
        ended(engine)
    return results


_one_rank: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.fixture(params=in_two_starts(ENGINES, ("FSDP2", "zero2, fp32")))
def alone(request, run_ranks, tmp_path_factory) -> dict[str, Any]:
    """What `on_one_rank` tells of some cells, run once."""
    if request.param not in _one_rank:
        (_one_rank[request.param],) = run_ranks(on_one_rank, 1, tmp_path_factory.mktemp("alone"), request.param)
    return _one_rank[request.param]


def test_a_full_disk_is_an_error_and_the_checkpoint_before_resumes(alone):
    for cell, seen in alone.items():
        assert seen["disk"] and seen["half"], f"{cell}: {seen['disk']!r}, {seen['half']!r}"
        assert seen["latest"] == "2" and seen["differs"] == [], cell


def test_a_truncated_or_missing_file_is_an_error(alone):
    for cell, seen in alone.items():
        assert len(seen["broken"]) >= 6 and all(seen["broken"].values()), f"{cell}: {seen['broken']}"


def test_another_script_on_a_checkpoint_gets_its_own_values_with_a_warning_or_an_error(alone):
    for cell, seen in alone.items():
        assert "size" in seen["model"].lower(), f"{cell}: {seen['model']!r}"
        assert seen["error"] == "" and seen["groups"] == [(4.0, 0.5), (0.25, 0.0), (0.0, 0.5)], cell
        text = "\n".join(seen["log"])
        for phrase in (
            "param group 0 has weight_decay=3.0, from a checkpoint perhaps; going on with weight_decay=4.0",
            "weight_decay=0.005",
            "going on with weight_decay=0.25",
            "param group 1 has p=-1.0, from a checkpoint perhaps; going on with p=0.0",
        ):
            assert phrase in text, f"{cell}: {text}"
