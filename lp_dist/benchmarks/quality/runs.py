"""Runs of the bench: each trains a model by one method to one sparsity, and is one row.

A run that has a row is not run again.
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
from copy import deepcopy
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.quality.methods import OPTIMIZERS, Spec, TrainingRun
from lp_dist.benchmarks.quality.tasks import Schedule, Task, cached
from lp_dist.benchmarks.timing import benchmark_device, note, progress
from lp_dist.optim import batching
from lp_dist.optim.optimizers import LpAdamW, LpLion
from lp_dist.report import environment
from lp_dist.sparsity.selection import decayed_names, param_groups

# Sequences of the training text for Wanda and SparseGPT, and 32,768 tokens at most.
CALIBRATION = 64
MakeTask = Callable[[], Task]


def key_of(row: ResultRow) -> str:
    """The key of a run: rows with the same key are the same run.

    Args:
        row: planned or measured, as `json_lines.read` gives it.
    Returns:
        JSON of task, device, method with all settings, sparsity and seed. A setting of 1 is a 1.0.
    """
    settings = {key: float(value) if type(value) is int else value for key, value in row["settings"].items()}
    return json.dumps(
        [row["task"], device_of(row), Spec.read(row["method"]).family, settings, row["sparsity"], row["seed"]],
        sort_keys=True,
    )


def device_of(row: ResultRow) -> str:
    """What a row was computed on. Rows of two kinds of devices are not compared: a GPU multiplies in tf32.

    Args:
        row: planned or measured.
    Returns:
        "cpu", or the name of the GPU. Rows without a device are of CPUs.
    """
    return row.get("device", "cpu")


def planned_rows(
    task: Task, specs: Iterable[Spec], sparsities: Iterable[float], seeds: Iterable[int]
) -> list[ResultRow]:
    """The rows of runs that are wanted, without their results.

    Args:
        task: what is trained.
        specs: the methods.
        sparsities: fractions of zeros; a dense run has none, a pattern its own, and each is planned once.
        seeds: of the weights and batches.
    Returns:
        A row for each combination.
    """
    rows, device = [], device_name()
    for seed in seeds:
        for spec in specs:
            for sparsity in spec.sparsities(sparsities):
                rows.append(
                    {
                        "task": task.described(),
                        "device": device,
                        "method": spec.line,
                        "settings": spec.settings,
                        "sparsity": sparsity,
                        "seed": seed,
                    }
                )
    return rows


def device_name() -> str:
    """The name of the device that this process computes on: "cpu", or the name of the GPU."""
    device = benchmark_device()
    return torch.cuda.get_device_name() if device.type == "cuda" else str(device)


def run_all(make: MakeTask, rows: list[ResultRow], path: Path, jobs: int) -> None:
    """Runs the rows that a file does not have, and appends each as soon as it is measured.

    Args:
        make: makes the task, anew in each process, so it must be picklable.
        rows: as `planned_rows` gives them.
        path: the file.
        jobs: processes at a time; several have one thread each.
    """
    measured = {key_of(row) for row in json_lines.read(path)}
    missing = [row for row in rows if key_of(row) not in measured]
    note(f"{len(rows) - len(missing)} of {len(rows)} runs are in {path} already")
    context = run_context(1 if jobs > 1 else torch.get_num_threads())
    bar = progress(None, "runs", total=len(missing), unit="run", leave=True)
    # Dense runs come first, so that no two processes make the same dense model.
    stages = [[row for row in missing if (row["method"] == "dense") is dense_first] for dense_first in (True, False)]
    seeds = sorted({row["seed"] for row in missing})
    if jobs == 1:
        _set_precision()
        task = make()
        for row in sum(stages, []):
            json_lines.append(path, {**row, **measure_row(task, row), **context})
            bar.update()
        return
    pool = workers(jobs)
    try:
        list(pool.map(_call_in_worker, repeat(make), repeat(_prepare), seeds))
        for stage in stages:
            waiting = {pool.submit(_call_in_worker, make, measure_row, row): row for row in stage}
            for done in as_completed(waiting):
                json_lines.append(path, {**waiting[done], **done.result(), **context})
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def run_context(threads: int) -> dict[str, Any]:
    """Where a row is measured: machine, threads of a run, and versions.

    Args:
        threads: of each run.
    Returns:
        Keys of a row, in plain JSON types.
    """
    return {"machine": environment.processor(), "threads": threads, "versions": environment.versions()}


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes with one thread each, which end with this one, however it ends.

    Args:
        jobs: number of processes.
    Returns:
        The pool.
    """
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _set_precision() -> None:
    if benchmark_device().type == "cuda":
        # tf32, as models are trained on GPUs.
        torch.set_float32_matmul_precision("high")


def _start_worker() -> None:
    torch.set_num_threads(1)
    _set_precision()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # A worker waits on a queue that it holds open itself, so it would never know that the parent has ended.
    os._exit(1)


# The task of this process, if it is a worker.
_process_task: list[Task] = []


def _call_in_worker(make: MakeTask, call: Callable[[Task, Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
    if not _process_task:
        _process_task.append(make())
    return call(_process_task[0], argument)


def _prepare(task: Task, seed: int) -> dict[str, Any]:
    dense(task, seed)
    return {}


# -- one run ------------------------------------------------------------------


def measure_row(task: Task, row: ResultRow) -> dict[str, Any]:
    """Trains by the method of a row, and evaluates.

    Args:
        task: what is trained.
        row: its method, sparsity and seed.
    Returns:
        Keys that are added to the row: losses in nats a token (None: not finite), the fraction of zeros, the number of
        weights, and seconds.
    """
    spec, seed = Spec.read(row["method"]), row["seed"]
    start = time.perf_counter()
    model = dense(task, seed)
    loss_before = cached(["loss", {**task.described(), "schedule": None}, seed], lambda: task.evaluate(model))
    if spec.follows_dense:
        model.load_state_dict(_fine_tuned(task, seed, spec))
        run = prepare_run(task, model, seed, row["sparsity"], schedule_for(task, spec))
        # This prunes what the dense fine-tune has made; a dense method does nothing here.
        spec.method(run).after_step(run.steps)
    else:
        run = train(task, model, seed, row["sparsity"], schedule_for(task, spec), spec)
    zeros = sum(int(batching.count_zeros(weight)) for weight in run.weights.values())
    loss = task.evaluate(model)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "loss before": loss_before,
        "zeros": zeros / sum(weight.numel() for weight in run.weights.values()),
        "weights": sum(weight.numel() for weight in run.weights.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def schedule_for(task: Task, spec: Spec) -> Schedule:
    """The task's schedule with the learning rates of a method.

    Args:
        task: what is trained.
        spec: the method.
    Returns:
        The schedule of the run that makes the model sparse.
    """
    return replace(
        task.schedule,
        lr=task.schedule.lr * OPTIMIZERS[spec.optimizer] if spec.lr is None else spec.lr,
        stable_fraction=spec.stable_fraction,
    )


def dense(task: Task, seed: int) -> nn.Module:
    """The dense model that is to become sparse: the task's, or one that is trained once for each seed.

    Args:
        task: what is trained.
        seed: of the weights and batches.
    Returns:
        The model on this process's device.
    """
    model = task.build(seed).to(benchmark_device())
    if task.pretraining is not None:
        described = {**task.described(), "schedule": None}

        def pretrained() -> dict[str, Any]:
            return train(task, model, seed, 0.0, task.pretraining, Spec("dense", ())).model.state_dict()

        model.load_state_dict(cached(["pretrained", described, seed], pretrained))
    return model


def _fine_tuned(task: Task, seed: int, spec: Spec) -> dict[str, Any]:
    """The dense fine-tune by the optimizer and learning rates of a method, as a state dict."""

    def trained() -> dict[str, Any]:
        dense_spec = Spec.from_settings("dense", {**Spec("dense", ()).settings, "optimizer": spec.optimizer})
        return train(task, dense(task, seed), seed, 0.0, schedule_for(task, spec), dense_spec).model.state_dict()

    # Those without it keep their keys from before.
    stable_fraction = [spec.stable_fraction] if spec.stable_fraction else []
    optimizer = [spec.optimizer] if spec.optimizer != "adamw" else []
    return cached(["fine-tuned", task.described(), seed, spec.lr, *stable_fraction, *optimizer], trained)


def load_teacher(task: Task, seed: int) -> nn.Module:
    """The dense fine-tune as a teacher.

    Args:
        task: what is trained.
        seed: of the weights and batches.
    Returns:
        The model, in evaluation mode.
    """
    teacher = dense(task, seed)
    teacher.load_state_dict(_fine_tuned(task, seed, Spec("dense", ())))
    return teacher.eval()


def prepare_run(
    task: Task, model: nn.Module, seed: int, sparsity: float, schedule: Schedule, optimizer_name: str = "adamw"
) -> TrainingRun:
    """A run with its optimizer and scheduler, before its first step.

    Args:
        task: what is trained.
        model: the dense model.
        seed: of the calibration text.
        sparsity: the fraction of zeros at the end.
        schedule: steps and learning rates.
        optimizer_name: a key of OPTIMIZERS.
    Returns:
        The run.
    """
    names = sorted(decayed_names(model))
    # With a weight decay of 0 this is torch's AdamW, or Lion with the betas of its paper.
    groups = param_groups(model, 0.0, names=names)
    optimizer = (
        LpLion(groups, lr=schedule.lr)
        if optimizer_name == "lion"
        else LpAdamW(groups, lr=schedule.lr, betas=task.betas)
    )

    def inputs() -> torch.Tensor:
        rows = min(CALIBRATION * task.rows, 32768 // task.block)
        return task.text.batch(torch.Generator().manual_seed(seed + 10**6), rows, task.block)[0]

    return TrainingRun(model, optimizer, schedule.scheduler(optimizer), names, sparsity, schedule.steps, inputs)


def train(task: Task, model: nn.Module, seed: int, sparsity: float, schedule: Schedule, spec: Spec) -> TrainingRun:
    """Trains a model by a method.

    Args:
        task: what is trained.
        model: the dense model; it is changed.
        seed: of the batches; those of the pretraining differ from those of the fine-tune.
        sparsity: the fraction of zeros at the end.
        schedule: steps and learning rates.
        spec: the method.
    Returns:
        The run after its last step.
    """
    run = prepare_run(task, model, seed, sparsity, schedule, spec.optimizer)
    method = spec.method(run)
    teacher = None
    if spec.distill:
        teacher = deepcopy(model).eval() if spec.teacher == "self" else load_teacher(task, seed)
    generator = torch.Generator().manual_seed(seed + (10**5 if schedule is task.pretraining else 0))
    model.train()
    method.start()
    for t in progress(range(1, run.steps + 1), f"{spec.line} to {sparsity:.0%}", mininterval=1):
        batch = task.text.batch(generator, task.rows, task.block)
        task.loss(model, *batch, teacher=teacher, distill=spec.distill).backward()
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        method.after_step(t)
    return run
