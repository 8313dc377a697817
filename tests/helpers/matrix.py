"""The matrix: every optimizer under every engine and dtype, and one process that adds up the same gradients in the
same order.

An engine only shares out the work. One process that knows where an engine rounds (`How`) must therefore reach the
same weights, bit for bit: the average over two ranks is (a + b) / 2, one rounding, in whatever order a collective
takes them.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist import LpAdamW, LpLion, LpSGD, attach, param_groups

STEPS, HALVES, MAX_NORM = 8, (4, 8), 0.25
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEEPSPEED = {
    "ZeRO 0": 0,
    "ZeRO 1": 1,
    "ZeRO 2": 2,
    "ZeRO 3": 3,
    "ZeRO 2, CPU offload": 2,
    "ZeRO 3, CPU offload": 3,
    "BF16_Optimizer": 1,
}
ENGINES = ("one process", "DDP", *DEEPSPEED, "FSDP2")
MAIN = ("one process", "DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2")  # these get every combination in fp32
# With powers of which nothing is a product or a root: the fused step gives the same bits wherever a weight lies, for
# any p and γ.
OPTIMIZERS = {
    "LpAdamW": (LpAdamW, {"lr": 1e-2, "weight_decay": 2.0, "p": 0.8, "precondition": 0.0}),
    "LpAdamW, preconditioned, capped": (
        LpAdamW,
        {"lr": 1e-2, "weight_decay": 0.01, "p": 0.3, "precondition": 0.6, "cutoff": 0.005},
    ),
    "LpSGD": (LpSGD, {"lr": 2e-2, "weight_decay": 0.005, "p": -0.7, "momentum": 0.9}),
    "LpLion": (LpLion, {"lr": 1e-2, "weight_decay": 0.5, "p": 0.4}),
}


@dataclass(frozen=True)
class Cell:
    engine: str
    dtype: str = "fp32"
    optimizer: str = "LpAdamW"
    accumulation: int = 1
    clipped: bool = False


@dataclass
class TrainedRun:
    """weights: in fp32, after each half. norms: of each step's gradients, if the engine gives them. wrapper:
    DeepSpeed's, around the optimizer.
    """

    weights: list[list[Tensor]] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)
    wrapper: str = ""


def cells_of(dtype: str) -> list[Cell]:
    """In fp32 all 16 combinations for the main engines; else 8 that hold every pair, and in fp16 4 that hold every
    value.
    """
    cells = []
    for engine, (i, optimizer), accumulation, clipped in product(
        ENGINES, enumerate(OPTIMIZERS), (1, 2), (False, True)
    ):
        even = (i + accumulation // 2 + clipped) % 2 == 0
        if (even and clipped == i // 2) if dtype == "fp16" else (even or (dtype == "fp32" and engine in MAIN)):
            cells.append(Cell(engine, dtype, optimizer, accumulation, clipped))
    return [cell for cell in cells if cell.engine != "BF16_Optimizer" or dtype == "bf16"]


def model_of() -> nn.Sequential:
    """Small and uneven: shards end inside of rows and in padding, and one row for two ranks leaves one of them
    nothing.
    """
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 1))


def decayed(weights: list[Tensor]) -> Tensor:
    return torch.cat([weights[i].flatten() for i in (0, 4, 5)])  # the matrices


@cache
def batch_of(step: int, micro: int, rank: int) -> Tensor:
    """The same on every rank in the first half of a run, another on each in the second."""
    seed = 10_000 * step + 100 * micro + (rank if step >= HALVES[0] else 0)
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def optimizer_of(cell: Cell, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    cls, settings = OPTIMIZERS[cell.optimizer]
    settings = {**settings, **more}
    return cls(param_groups(model, settings.pop("weight_decay")), **settings)


# --- one process
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How an engine comes by its gradients.

    copies: 16 bits are a copy of fp32 weights, else autocast. rounded: the fp32 weights start as that copy. sums:
    dtype in which micro-batches are added. averages: dtype in which ranks are. each: ranks are averaged after each
    micro-batch, not after all. late: gradients are divided by the number of ranks after adding them up, not before
    (fp16's denormals notice). scale: of the loss in fp16; ZeRO 0 divides the gradients by it without having multiplied
    the loss (DeepSpeed #8393), so there it must be 1.
    """

    copies: bool = True
    rounded: bool = True
    sums: torch.dtype = torch.float32
    averages: torch.dtype = torch.float32
    each: bool = False
    late: bool = False
    scale: float = 1.0


def how(cell: Cell) -> How:
    low, scale = DTYPES[cell.dtype], 128.0 if cell.dtype == "fp16" else 1.0
    if cell.engine == "FSDP2":
        return How(rounded=False, scale=scale)  # sums and averages are in reduce_dtype
    if cell.engine not in DEEPSPEED:
        return How(copies=False, scale=scale)
    if cell.engine == "BF16_Optimizer":
        return How(averages=low)  # unless the config's communication_data_type says otherwise
    late = cell.engine == "ZeRO 0"
    return How(sums=low, averages=low, each=DEEPSPEED[cell.engine] >= 2, late=late, scale=1.0 if late else scale)


def sum_in(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return reduce(torch.add, [t.to(dtype) for t in tensors])


def averaged(tensors: list[Tensor], does: How) -> Tensor:
    if does.late:
        return sum_in(tensors, does.averages) / len(tensors)
    return sum_in([t.to(does.averages) / len(tensors) for t in tensors], does.averages)


def one_process(does: How, cell: Cell, world_size: int, norms: list[Any]) -> TrainedRun:
    """The ranks one after another, then one step of the optimizer. It clips by the engine's `norms`, where there are
    any, since each engine adds up squares in an order of its own; its own norms are in the result, to be compared."""
    low, run, masters = DTYPES[cell.dtype], TrainedRun(), model_of()
    if does.copies and does.rounded:
        masters.to(low).float()
    params, optimizer = list(masters.parameters()), optimizer_of(cell, masters)
    model = copy.deepcopy(masters).to(low) if does.copies else masters

    def gradients(step: int, micro: int, rank: int) -> tuple[Tensor, ...]:
        batch = batch_of(step, micro, rank)
        with torch.autocast("cpu", low, enabled=not does.copies and cell.dtype != "fp32"):
            loss = loss_of(model(batch.to(low) if does.copies else batch)) / cell.accumulation
        return torch.autograd.grad(loss * does.scale, list(model.parameters()))

    for step in range(STEPS):
        ranks = [[gradients(step, micro, rank) for micro in range(cell.accumulation)] for rank in range(world_size)]
        for i, p in enumerate(params):
            if does.each:
                total = sum_in(
                    [averaged([micros[m][i] for micros in ranks], does) for m in range(cell.accumulation)], does.sums
                )
            else:
                total = averaged([sum_in([micro[i] for micro in micros], does.sums) for micros in ranks], does)
            p.grad = total.float() / does.scale
        run.norms.append(torch.stack([p.grad.norm() for p in params]).pow(2).sum().sqrt())
        if cell.clipped:
            clip(cell, params, norms[step] if norms else run.norms[step])
        optimizer.step()
        if does.copies:
            model.load_state_dict(masters.state_dict())
        run.weights += [[p.detach().clone() for p in params]] if step + 1 in HALVES else []
    return run


def clip(cell: Cell, params: list[Tensor], norm: Any) -> None:
    """DeepSpeed's ZeRO divides by norm / maximum, everyone else multiplies by maximum / norm: that rounds
    differently.
    """
    divides = cell.engine.startswith("ZeRO") and (cell.engine, cell.dtype) != ("ZeRO 0", "fp32")
    factor = 1.0 / ((norm + 1e-6) / MAX_NORM) if divides else MAX_NORM / (norm + 1e-6)
    for p in params:
        p.grad.mul_(min(factor, 1.0))


# --- the engines
# -----------------------------------------------------------------------------


def torch_run(cell: Cell, rank: int, world_size: int) -> TrainedRun:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    run, low, model, fsdp = TrainedRun(), DTYPES[cell.dtype], model_of(), cell.engine == "FSDP2"
    if fsdp:
        mesh, policy = (
            torch.distributed.init_device_mesh("cpu", (world_size,)),
            MixedPrecisionPolicy(low, torch.float32),
        )
        for layer in [*(layer for layer in model if list(layer.parameters())), model]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    optimizer = optimizer_of(cell, model)
    engine = nn.parallel.DistributedDataParallel(model) if cell.engine == "DDP" else model
    scaler = torch.amp.GradScaler("cpu", init_scale=how(cell).scale, enabled=cell.dtype == "fp16")
    for step in range(STEPS):
        for micro in range(cell.accumulation):
            last = micro == cell.accumulation - 1
            if fsdp:
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last)
            with engine.no_sync() if cell.engine == "DDP" and not last else contextlib.nullcontext():
                with torch.autocast("cpu", low, enabled=not fsdp and cell.dtype != "fp32"):
                    loss = loss_of(engine(batch_of(step, micro, rank))) / cell.accumulation
                scaler.scale(loss).backward()
        if cell.clipped:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            run.norms.append(norm.full_tensor() if fsdp else norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step + 1 in HALVES:
            run.weights.append([(p.full_tensor() if fsdp else p).detach().clone() for p in model.parameters()])
    return run


def config_of(cell: Cell) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": DEEPSPEED[cell.engine], "reduce_bucket_size": 100}
    if zero["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 50}  # nothing stays whole
    if "offload" in cell.engine:
        zero |= {
            f"offload_{what}": {"device": "cpu"}
            for what in (("optimizer", "param") if zero["stage"] == 3 else ("optimizer",))
        }
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": cell.accumulation,
        "zero_optimization": zero,
        "gradient_clipping": MAX_NORM if cell.clipped else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": cell.dtype == "bf16"},
        "fp16": {"enabled": cell.dtype == "fp16", "loss_scale": how(cell).scale},
    }
    return config | ({"data_types": {"grad_accum_dtype": "fp32"}} if cell.engine == "BF16_Optimizer" else {})


def deepspeed_run(cell: Cell, rank: int, world_size: int, attached: bool = True, **changes: Any) -> TrainedRun:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    run, low, model = TrainedRun(), DTYPES[cell.dtype], model_of()
    params, optimizer = list(model.parameters()), optimizer_of(cell, model)
    places = {id(p): i for i, p in enumerate(q for group in optimizer.param_groups for q in group["params"])}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config_of(cell) | changes, dist_init_required=False
    )
    run.wrapper = type(engine.optimizer).__name__
    if attached and run.wrapper == "FP16_UnfusedOptimizer":
        attach(engine)  # which takes back a step with zero gradients that this one took when it was made

    def master(p: Tensor) -> Tensor:
        if cell.engine == "ZeRO 0":  # the optimizer's own, one for each and not flat
            return [q for group in optimizer.param_groups for q in group["params"]][places[id(p)]]
        return safe_get_full_fp32_param(p).view(getattr(p, "ds_shape", p.shape))

    for step in range(STEPS):
        for micro in range(cell.accumulation):
            engine.backward(loss_of(engine(batch_of(step, micro, rank).to(low))))
            engine.step()
        if cell.clipped and (norm := engine.get_global_grad_norm()) is not None:
            run.norms.append(norm + 0.0)
        if step + 1 in HALVES:
            run.weights.append([master(p).detach().clone() for p in params])
    with deepspeed.zero.GatheredParameters(params, enabled=DEEPSPEED[cell.engine] == 3):
        assert all(torch.equal(p, w.to(low)) for p, w in zip(params, run.weights[-1])), (
            "the model is no copy of its fp32 weights"
        )
    engine.destroy()
    return run
