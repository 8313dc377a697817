"""Training steps for `lp-dist bench step`: LpAdamW against AdamW under real engines, in turn in the same processes.

`python -m lp_dist.benchmarks.step.training_step JSON FILE` is one rank of one engine's run; `training_rows` starts
them.
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

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.timing import benchmark_device, note, progress, quartiles, synchronize
from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.sparsity.measure import measure_sparsity
from lp_dist.structured.resolve import resolve_groups
from lp_dist.targets.target import SparsityTarget

ENGINES = {
    "one process": None,
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-2, CPU offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}
# Steps between two updates of λ, and between two counts of the zeros, as for a log; also the steps of a timed round.
UPDATE_EVERY = 10
_LR, _LAMBDA, _VOCABULARY, _WARM = 1e-4, 0.1, 8192, 3


@dataclass(frozen=True)
class Shape:
    """The model, and how long it trains.

    Args:
        layers: of the model.
        hidden_size: width of the model; a head has 64.
        tokens: of a step on each rank.
        rounds: timed rounds of UPDATE_EVERY steps for each optimizer.
        groups: of the target, such as "channels"; empty: it is for single weights.
        interval: of the target, steps between two decays of groups.
    """

    layers: int = 8
    hidden_size: int = 320
    tokens: int = 1024
    rounds: int = 6
    groups: str = ""
    interval: int = 1

    def described(self) -> dict[str, Any]:
        """The shape as keys of a row, which are also the command's options."""
        return {key: value for key, value in asdict(self).items() if self.groups or key not in ("groups", "interval")}

    def check(self) -> None:
        """Checks the groups.

        Raises:
            UsageError: the model has no such groups, or there is an interval without groups.
        """
        if self.interval != 1 and not self.groups:
            raise UsageError(
                f"--interval {self.interval} is of groups, and none are named; add --groups channels, or leave it out"
            )
        if self.groups:
            with torch.device("meta"):
                resolve_groups(self.model(), self.groups)

    @property
    def target(self) -> SparsityTarget:
        """A target that acts in all timed steps, with the scope that costs more."""
        settings = {"groups": self.groups, "interval": self.interval} if self.groups else {"scope": "layer"}
        return SparsityTarget(0.5, start=_WARM, end=max(2, self.steps), update_every=UPDATE_EVERY, **settings)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return _WARM + self.rounds * UPDATE_EVERY

    def model(self) -> nn.Module:
        """A new Llama with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = max(1, self.hidden_size // 64)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=self.hidden_size,
                intermediate_size=self.hidden_size * 8 // 3,
                num_hidden_layers=self.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=self.tokens,
                tie_word_embeddings=True,
            )
        )


# -- starting them ------------------------------------------------------------


def training_rows(
    shape: Shape, seed: int, engines: tuple[str, ...] = tuple(ENGINES), timeout: float = 1800
) -> Iterator[ResultRow]:
    """Runs the training steps of each engine in new processes.

    Args:
        shape: the model, and how long it trains.
        seed: of the weights and tokens.
        engines: of ENGINES.
        timeout: seconds for each engine.
    Returns:
        A row for each engine; of one that fails, the row says why.
    """
    threads = torch.get_num_threads()
    for engine in progress(engines, "training steps"):
        try:
            ranks = 1 if engine == "one process" else _ranks()
            yield {
                "engine": engine,
                "ranks": ranks,
                "threads": max(1, threads // ranks),
                **launch(engine, ranks, shape, seed, timeout),
            }
        except (ImportError, RuntimeError, subprocess.TimeoutExpired) as error:
            note(f"{engine}: skipped, {error}")
            yield {"engine": engine, "skipped": f"{error}"[-600:]}


@cache
def _ranks() -> int:
    """Two on a CPU; on accelerators, two if there are two.

    It also compiles DeepSpeed's ops: compiling them on each rank at once has aborted runs.
    """
    if torch.accelerator.is_available():
        return min(2, torch.accelerator.device_count())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder

    build_shm_op()
    CPUAdamBuilder().load(verbose=False)
    return 2


def launch(engine: str, ranks: int, shape: Shape, seed: int, timeout: float) -> ResultRow:
    """Runs one engine in new processes.

    Args:
        engine: of ENGINES.
        ranks: number of processes.
        shape: the model, and how long it trains.
        seed: of the weights and tokens.
        timeout: seconds.
    Returns:
        What `train_in_turn` returns on the first rank.
    Raises:
        RuntimeError: a process failed; the message is its error.
        subprocess.TimeoutExpired: it took longer.
    """
    with tempfile.TemporaryDirectory() as directory:
        row_file = Path(directory) / "row.json"
        launcher = (
            []
            if engine == "one process"
            else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        )
        words = [json.dumps({"engine": engine, "shape": shape.described(), "seed": seed}), str(row_file)]
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
        if done.returncode or not row_file.exists():
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError(errors[0] if errors else done.stderr[-600:])
        return json.loads(row_file.read_text())


# -- on a rank ----------------------------------------------------------------


def train_in_turn(engine: str, shape: Shape, seed: int) -> ResultRow:
    """Trains with both optimizers in turn, a step each. Called on every rank.

    Args:
        engine: of ENGINES.
        shape: the model, and how long it trains.
        seed: of the weights and tokens.
    Returns:
        Keys of a row: tokens a second of all ranks together (the median over rounds, and quartiles) of "lp_dist" and
        "peer", the median ratio, and the fraction of zeros at the end.
    """
    device = benchmark_device()
    trainers = {
        "lp_dist": _lp_trainer(engine, shape, seed, device),
        "peer": _peer_trainer(engine, shape, seed, device),
    }
    distributed = torch.distributed.is_initialized()
    world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)
    generator = torch.Generator().manual_seed(seed + rank)
    batches = [
        torch.randint(_VOCABULARY, (1, shape.tokens), generator=generator).to(device) for _ in range(UPDATE_EVERY)
    ]
    for trainer in trainers.values():
        for i in range(_WARM):
            trainer.step(batches[i])
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(shape.rounds):
        for name, seconds in _round_seconds(trainers, batches, distributed).items():
            speeds[name].append(world * shape.tokens * UPDATE_EVERY / seconds)
    weights = sum(p.numel() for p in shape.model().parameters())
    row: ResultRow = {
        "model": (
            f"A Llama with {weights:,} random weights ({shape.layers} layers of {shape.hidden_size}), {shape.tokens}"
            f" tokens a step and rank, {'bf16' if _low_precision(device) else 'fp32'}"
        ),
        "rounds": shape.rounds,
        "ratio": median(lp_dist / peer for lp_dist, peer in zip(speeds["lp_dist"], speeds["peer"])),
        "zeros": measure_sparsity(trainers["lp_dist"].handle).total,
    }
    for name, values in speeds.items():
        low, middle, high = quartiles(values)
        row[name] = {"name": trainers[name].name, "tokens/s": middle, "quartiles": [low, high]}
    return row


def _round_seconds(trainers: dict[str, _Trainer], batches: list[torch.Tensor], distributed: bool) -> dict[str, float]:
    """Seconds of a round by trainer. They take turns step by step, so that a disturbance hits both."""
    seconds = dict.fromkeys(trainers, 0.0)
    for i, batch in enumerate(batches):
        for name in list(trainers) if i % 2 else list(trainers)[::-1]:
            _barrier(distributed)
            start = time.perf_counter()
            trainers[name].step(batch)
            _barrier(distributed)
            seconds[name] += time.perf_counter() - start
    return seconds


@dataclass
class _Trainer:
    """A model and its optimizer.

    Args:
        name: of the optimizer.
        handle: the engine, or the plain model.
        optimizer: None where the engine has made it.
        device: of the batches.
        after: called after each step.
    """

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
            with torch.autocast(self.device.type, torch.bfloat16) if _low_precision(self.device) else nullcontext():
                loss = self.handle(input_ids=batch, labels=batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.after()


def _low_precision(device: torch.device) -> bool:
    """Accelerators compute in bf16."""
    return device.type != "cpu"


def _lp_trainer(engine: str, shape: Shape, seed: int, device: torch.device) -> _Trainer:
    torch.manual_seed(seed)
    model = shape.model().to(device)
    optimizer = LpAdamW(model.parameters(), lr=_LR, precondition=0.5, implementation="fused")
    trainer = _Trainer("LpAdamW", _wrapped(engine, model, device, optimizer=optimizer), optimizer, device)
    attached = attach(
        trainer.handle, None if ENGINES[engine] else optimizer, target=shape.target, total_steps=shape.steps
    )
    steps_taken = 0

    def after() -> None:
        nonlocal steps_taken
        steps_taken += 1
        attached.after_step()
        if steps_taken % UPDATE_EVERY == 0:
            measure_sparsity(trainer.handle)

    trainer.after = after
    return trainer


def _peer_trainer(engine: str, shape: Shape, seed: int, device: torch.device) -> _Trainer:
    """torch's fused AdamW, or DeepSpeed's own under offload."""
    torch.manual_seed(seed)
    model = shape.model().to(device)
    if "offload" in engine:
        config = {"optimizer": {"type": "AdamW", "params": {"lr": _LR, "weight_decay": _LAMBDA}}}
        handle = _wrapped(engine, model, device, config, model_parameters=model.parameters())
        return _Trainer(type(handle.optimizer.optimizer).__name__, handle, None, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_LAMBDA, fused=True)
    return _Trainer("torch AdamW fused", _wrapped(engine, model, device, optimizer=optimizer), optimizer, device)


def _wrapped(
    engine: str, model: nn.Module, device: torch.device, config: dict[str, Any] | None = None, **arguments: Any
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
            "bf16": {"enabled": _low_precision(device)},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
            **(config or {}),
        },
        **arguments,
    )
    return handle


def _barrier(distributed: bool) -> None:
    synchronize()
    if distributed:
        torch.distributed.barrier()


def main(settings: dict[str, Any], path: str) -> None:
    """One rank of a run.

    Args:
        settings: "engine", "shape" and "seed", as `launch` passes them.
        path: where the first rank writes the row, as JSON.
    """
    engine, on_accelerator = settings["engine"], torch.accelerator.is_available()
    if engine != "one process":
        if on_accelerator:
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if on_accelerator else "gloo", auto_mpi_discovery=False)
    row = train_in_turn(engine, Shape(**settings["shape"]), settings["seed"])
    if int(os.environ.get("RANK", "0")) == 0:
        Path(path).write_text(json.dumps(row))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
