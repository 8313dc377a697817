"""Whole training steps for `lp-dist bench step`: LpAdamW against AdamW under real engines, in turn within the same
processes.

`python -m lp_dist.benchmarks.step.training_step JSON FILE` is one rank of one engine's run; `whole_runs` starts them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks.timing import wait
from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.sparsity.measure import measure_sparsity
from lp_dist.structured.naming import structure
from lp_dist.targets.target import SparsityTarget

ENGINES = {
    "one process": None,
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-2, CPU offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}
# steps between two looks at the weights: the controller's, and a count of the zeros, as for a log; also the steps of a
# timed block
LOOK = 10
_LR, _LAMBDA, _VOCABULARY, _WARM = 1e-4, 0.1, 8192, 3


@dataclass(frozen=True)
class Shape:
    """The model, and how long it trains: `tokens` a step and rank, `blocks` timed blocks of LOOK steps for each
    optimizer.

    groups, interval: of the target; with no groups it is one for single weights.
    """

    layers: int = 8
    hidden: int = 320
    tokens: int = 1024
    blocks: int = 6
    groups: str = ""
    interval: int = 1

    def described(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if self.groups or key not in ("groups", "interval")}

    def check(self) -> None:
        """Raises UsageError if there are no such groups in the model, or an interval is of none."""
        if self.interval != 1 and not self.groups:
            raise UsageError(
                f"--interval {self.interval} is of groups, and none are named; add --groups channels, or leave it out"
            )
        if self.groups:
            with torch.device("meta"):
                structure(self.model(), self.groups)

    @property
    def target(self) -> SparsityTarget:
        """One that acts all the time, of the scope that looks at more."""
        of = {"groups": self.groups, "interval": self.interval} if self.groups else {"scope": "layer"}
        return SparsityTarget(0.5, start=_WARM, end=max(2, self.steps), every=LOOK, **of)

    @property
    def steps(self) -> int:
        return _WARM + self.blocks * LOOK

    def model(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = max(1, self.hidden // 64)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=self.hidden,
                intermediate_size=self.hidden * 8 // 3,
                num_hidden_layers=self.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=self.tokens,
                tie_word_embeddings=True,
            )
        )


# -- starting them ------------------------------------------------------------


def whole_runs(
    shape: Shape, seed: int, engines: tuple[str, ...] = tuple(ENGINES), timeout: float = 1800
) -> Iterator[dict[str, Any]]:
    """One row for each engine; one that fails says why in its row."""
    threads = torch.get_num_threads()
    for engine in tqdm(engines, desc="whole training steps", leave=False):
        try:
            ranks = 1 if engine == "one process" else _ranks()
            yield {
                "engine": engine,
                "ranks": ranks,
                "threads": max(1, threads // ranks),
                **_launched(engine, ranks, shape, seed, timeout),
            }
        except (ImportError, RuntimeError, subprocess.TimeoutExpired) as error:
            tqdm.write(f"{engine}: skipped, {error}")
            yield {"engine": engine, "skipped": f"{error}"[-600:]}


@cache
def _ranks() -> int:
    """Two on a CPU; on accelerators, two if there are two. Also compiles what DeepSpeed would compile on each rank,
    which has aborted runs.
    """
    if torch.accelerator.is_available():
        return min(2, torch.accelerator.device_count())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder

    build_shm_op()
    CPUAdamBuilder().load(verbose=False)
    return 2


def _launched(engine: str, ranks: int, shape: Shape, seed: int, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        told = Path(directory) / "row.json"
        launcher = (
            []
            if engine == "one process"
            else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        )
        words = [json.dumps({"engine": engine, "shape": shape.described(), "seed": seed}), str(told)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks)),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "lp_dist.benchmarks.step.training_step", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode or not told.exists():
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError(errors[0] if errors else done.stderr[-600:])
        return json.loads(told.read_text())


# -- on a rank ----------------------------------------------------------------


def trained(engine: str, shape: Shape, seed: int) -> dict[str, Any]:
    """Both optimizers in turn, a step each; on every rank. Tokens a second of all ranks together, over blocks of LOOK
    steps.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    runs = {"ours": _ours(engine, shape, seed, device), "peer": _peer(engine, shape, seed, device)}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    distributed = torch.distributed.is_initialized()
    world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)
    generator = torch.Generator().manual_seed(seed + rank)
    batches = [torch.randint(_VOCABULARY, (1, shape.tokens), generator=generator).to(device) for _ in range(LOOK)]
    for run in runs.values():
        for i in range(_WARM):
            run.step(batches[i])
    for _ in range(shape.blocks):
        seconds = dict.fromkeys(runs, 0.0)
        for i, batch in enumerate(batches):
            for name in (
                list(runs) if i % 2 else list(runs)[::-1]
            ):  # in turn, step by step, so that what disturbs the machine disturbs both
                _together(distributed)
                start = time.perf_counter()
                runs[name].step(batch)
                _together(distributed)
                seconds[name] += time.perf_counter() - start
        for name, value in seconds.items():
            speeds[name].append(world * shape.tokens * LOOK / value)
    quartiles = {
        name: (
            torch.tensor(values, dtype=torch.float64)
            .quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
            .tolist()
        )
        for name, values in speeds.items()
    }
    weights = sum(p.numel() for p in shape.model().parameters())
    return {
        "model": (
            f"A Llama with {weights:,} random weights ({shape.layers} layers of {shape.hidden}), {shape.tokens} tokens"
            f" a step and rank, {'bf16' if _low(device) else 'fp32'}"
        ),
        "blocks": shape.blocks,
        "ratio": median(ours / peer for ours, peer in zip(*speeds.values())),
        "zeros": measure_sparsity(runs["ours"].handle).total,
        **{
            name: {"name": runs[name].name, "tokens/s": q[1], "quartiles": [q[0], q[2]]}
            for name, q in quartiles.items()
        },
    }


@dataclass
class _Run:
    """handle: the engine, or the plain model. after: what follows each step."""

    name: str
    handle: Any
    optimizer: Any
    device: torch.device
    after: Callable[[], Any] = lambda: None

    def step(self, batch: torch.Tensor) -> None:
        if hasattr(self.handle, "backward"):
            self.handle.backward(self.handle(input_ids=batch, labels=batch).loss)
            self.handle.step()
        else:
            with torch.autocast(self.device.type, torch.bfloat16) if _low(self.device) else nullcontext():
                loss = self.handle(input_ids=batch, labels=batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.after()


def _low(device: torch.device) -> bool:
    """Accelerators compute in bf16."""
    return device.type != "cpu"


def _ours(engine: str, shape: Shape, seed: int, device: torch.device) -> _Run:
    torch.manual_seed(seed)
    model = shape.model().to(device)
    optimizer = LpAdamW(model.parameters(), lr=_LR, precondition=0.5, implementation="fused")
    run = _Run("LpAdamW", _wrapped(engine, model, device, optimizer=optimizer), optimizer, device)
    attached = attach(run.handle, None if ENGINES[engine] else optimizer, target=shape.target, total_steps=shape.steps)
    taken = 0

    def after() -> None:
        nonlocal taken
        taken += 1
        attached.after_step()
        if taken % LOOK == 0:
            measure_sparsity(run.handle)

    run.after = after
    return run


def _peer(engine: str, shape: Shape, seed: int, device: torch.device) -> _Run:
    """torch's fused AdamW, or DeepSpeed's own under offload."""
    torch.manual_seed(seed)
    model = shape.model().to(device)
    if "offload" in engine:
        own = {"optimizer": {"type": "AdamW", "params": {"lr": _LR, "weight_decay": _LAMBDA}}}
        handle = _wrapped(engine, model, device, own, model_parameters=model.parameters())
        return _Run(type(handle.optimizer.optimizer).__name__, handle, None, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_LAMBDA, fused=True)
    return _Run("torch AdamW fused", _wrapped(engine, model, device, optimizer=optimizer), optimizer, device)


def _wrapped(
    engine: str, model: nn.Module, device: torch.device, config: dict[str, Any] | None = None, **parts: Any
) -> Any:
    if ENGINES[engine] is None:
        return model
    import deepspeed

    zero = {**ENGINES[engine], "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    handle, *_ = deepspeed.initialize(
        model=model,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": _low(device)},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
            **(config or {}),
        },
        **parts,
    )
    return handle


def _together(distributed: bool) -> None:
    wait()
    if distributed:
        torch.distributed.barrier()


def main(told: dict[str, Any], path: str) -> None:
    engine, on_accelerator = told["engine"], torch.accelerator.is_available()
    if engine != "one process":
        if on_accelerator:
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if on_accelerator else "gloo", auto_mpi_discovery=False)
    row = trained(engine, Shape(**told["shape"]), told["seed"])
    if int(os.environ.get("RANK", "0")) == 0:
        Path(path).write_text(json.dumps(row))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
