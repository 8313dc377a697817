"""Runs of the bench: one trains a model by one method to one sparsity, and is one row. What has a row is not run
again.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lp_dist.benchmarks.quality.methods import Run, Spec
from lp_dist.benchmarks.quality.tasks import Schedule, Work, cached
from lp_dist.optim import batching
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.report import environment
from lp_dist.sparsity.selection import decayed_names, param_groups

CALIBRATION = 64  # windows of the training text that Wanda and SparseGPT see; at most 32,768 tokens
Made = Callable[[], Work]


def key_of(row: dict[str, Any]) -> str:
    """Runs with the same key have the same row. A 1 in a method's line is a 1.0."""
    settings = {key: float(value) if type(value) is int else value for key, value in row["settings"].items()}
    return json.dumps(
        [row["work"], device_of(row), Spec.read(row["method"]).family, settings, row["sparsity"], row["seed"]],
        sort_keys=True,
    )


def device_of(row: dict[str, Any]) -> str:
    """What it was computed on: rows are compared with those of the same kind of device alone, since a GPU multiplies
    in tf32.
    """
    return row.get("device", "cpu")  # rows of before are of CPUs


def wanted(
    work: Work, specs: Iterable[Spec], sparsities: Iterable[float], seeds: Iterable[int]
) -> list[dict[str, Any]]:
    """The rows that are asked for, as far as they are known before a run. A dense run has no sparsity."""
    found, device = [], device_name()
    for seed in seeds:
        for spec in specs:
            for sparsity in sparsities if spec.family != "dense" else [0.0]:
                found.append(
                    {
                        "work": work.described(),
                        "device": device,
                        "method": spec.line,
                        "settings": spec.settings,
                        "sparsity": sparsity,
                        "seed": seed,
                    }
                )
    return found


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def device_name() -> str:
    device = _device()
    return torch.cuda.get_device_name() if device.type == "cuda" else str(device)


def run_all(make: Made, rows: list[dict[str, Any]], path: Path, jobs: int) -> None:
    """Runs what `path` doesn't have yet, and appends each row as soon as it is there. jobs: processes at a time, with
    one thread each if there are several. make: makes the work anew in each of them, so it must be picklable."""
    have = {key_of(row) for row in read(path)}
    left = [row for row in rows if key_of(row) not in have]
    tqdm.write(f"{len(rows) - len(left)} of {len(rows)} runs are in {path} already")
    context = {
        "machine": environment.processor(),
        "threads": 1 if jobs > 1 else torch.get_num_threads(),
        "versions": environment.versions(),
    }
    bar = tqdm(total=len(left), desc="runs", unit="run")
    # What others build on comes first, so that no two processes make the same dense model.
    stages = [[row for row in left if (row["method"] == "dense") is dense] for dense in (True, False)]
    seeds = sorted({row["seed"] for row in left})
    if jobs == 1:
        _begin()
        work = make()
        for row in sum(stages, []):
            append(path, {**row, **one(work, row), **context})
            bar.update()
        return
    pool = workers(jobs)
    try:
        list(pool.map(_in_process, repeat(make), repeat(_prepare), seeds))
        for stage in stages:
            waiting = {pool.submit(_in_process, make, one, row): row for row in stage}
            for done in as_completed(waiting):
                append(path, {**waiting[done], **done.result(), **context})
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes with one thread each, which end with this one, however it ends."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker)


def _begin() -> None:
    if _device().type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32, as one trains on GPUs


def _begin_worker() -> None:
    torch.set_num_threads(1)
    _begin()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a worker waits for work on a queue that it holds open itself, so it would never know


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; those from before `fall` was a setting have 0, as they were run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{**row, "settings": {"fall": 0.0, **row["settings"]}} for row in rows]


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


_works: list[Work] = []  # of this process


def _in_process(make: Made, do: Callable[[Work, Any], dict[str, Any]], what: Any) -> dict[str, Any]:
    if not _works:
        _works.append(make())
    return do(_works[0], what)


def _prepare(work: Work, seed: int) -> dict[str, Any]:
    dense(work, seed)
    return {}


# -- one run ------------------------------------------------------------------


def one(work: Work, row: dict[str, Any]) -> dict[str, Any]:
    """Trains and evaluates; what the row gets from it."""
    spec, seed = Spec.read(row["method"]), row["seed"]
    start = time.perf_counter()
    model = dense(work, seed)
    before = cached(["loss", {**work.described(), "schedule": None}, seed], lambda: work.evaluate(model))
    if spec.family == "dense" or dict(spec.given).get("at") == 1:
        model.load_state_dict(_fine_tuned(work, seed, spec))
        run = run_of(work, model, seed, row["sparsity"], schedule_of(work, spec))
        spec.method(run).after_step(run.steps)  # a dense one does nothing there
    else:
        run = train(work, model, seed, row["sparsity"], schedule_of(work, spec), spec)
    zeros = sum(int(batching.count_zeros(weight)) for weight in run.weights.values())
    loss = work.evaluate(model)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "loss before": before,
        "zeros": zeros / sum(weight.numel() for weight in run.weights.values()),
        "weights": sum(weight.numel() for weight in run.weights.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def schedule_of(work: Work, spec: Spec) -> Schedule:
    return replace(work.schedule, lr=work.schedule.lr if spec.lr is None else spec.lr, fall=spec.fall)


def dense(work: Work, seed: int) -> nn.Module:
    """The model that is to become sparse: as it is given, or trained once for each seed."""
    model = work.build(seed).to(_device())
    if work.pretraining is not None:
        described = {**work.described(), "schedule": None}

        def pretrained() -> dict[str, Any]:
            return train(work, model, seed, 0.0, work.pretraining, Spec("dense", ())).model.state_dict()

        model.load_state_dict(cached(["pretrained", described, seed], pretrained))
    return model


def _fine_tuned(work: Work, seed: int, spec: Spec) -> dict[str, Any]:
    """What the dense fine-tune makes at the learning rates of a method."""

    def trained() -> dict[str, Any]:
        return train(work, dense(work, seed), seed, 0.0, schedule_of(work, spec), Spec("dense", ())).model.state_dict()

    return cached(["fine-tuned", work.described(), seed, spec.lr, *([spec.fall] if spec.fall else [])], trained)


def _teacher(work: Work, seed: int) -> nn.Module:
    teacher = dense(work, seed)
    teacher.load_state_dict(_fine_tuned(work, seed, Spec("dense", ())))
    return teacher.eval()


def run_of(work: Work, model: nn.Module, seed: int, sparsity: float, schedule: Schedule) -> Run:
    names = sorted(decayed_names(model))
    optimizer = LpAdamW(
        param_groups(model, 0.0, names=names), lr=schedule.lr, betas=work.betas
    )  # torch's AdamW, unless something decays

    def inputs() -> torch.Tensor:
        rows = min(CALIBRATION * work.rows, 32768 // work.block)
        return work.text.batch(torch.Generator().manual_seed(seed + 10**6), rows, work.block)[0]

    return Run(model, optimizer, schedule.of(optimizer), names, sparsity, schedule.steps, inputs)


def train(work: Work, model: nn.Module, seed: int, sparsity: float, schedule: Schedule, spec: Spec) -> Run:
    run = run_of(work, model, seed, sparsity, schedule)
    method = spec.method(run)
    teacher = _teacher(work, seed) if spec.distill else None
    generator = torch.Generator().manual_seed(seed + (10**5 if schedule is work.pretraining else 0))
    model.train()
    method.start()
    for t in tqdm(range(1, run.steps + 1), desc=f"{spec.line} to {sparsity:.0%}", leave=False, mininterval=1):
        work.loss_of(
            model, *work.text.batch(generator, work.rows, work.block), teacher=teacher, distill=spec.distill
        ).backward()
        nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        method.after_step(t)
    return run
