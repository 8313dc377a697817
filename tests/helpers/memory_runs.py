"""Shared by the tests: every engine on two ranks, its bytes alive and its bytes sent."""

from __future__ import annotations

import gc
import logging

import torch
from torch import nn

from lp_dist import LpAdamW, measure_histogram, measure_sparsity, param_groups
from lp_dist.benchmarks.recording import Allocated, Collectives

RANKS, WIDTH, LAYERS = 2, 64, 40
LARGEST = WIDTH * WIDTH
PARAMETERS = LAYERS * LARGEST + LAYERS // 8 * WIDTH


# Bytes that a rank sends of each byte of a collective's largest tensor, by ring algorithms, times N/(N-1).
PASSES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}


def sent(collectives: Collectives) -> int:
    """Bytes that a rank sends. A KeyError is a collective that nobody has thought of."""
    return sum(
        round(PASSES[call.kind] * call.largest_numel * call.itemsize * (RANKS - 1) / RANKS)
        for call in collectives.calls
    )


def bytes_of(tensors) -> int:
    """Bytes of the storages on this rank, each counted once."""
    local = (
        t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None and t.device.type != "meta"
    )
    return sum({s.data_ptr(): s.nbytes() for s in (t.detach().untyped_storage() for t in local)}.values())


def alive() -> list[torch.Tensor]:
    """All tensors that Python knows of since `gc.freeze`, and the gradients of those."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return tensors + [t.grad for t in tensors if t.is_leaf]


# -- on the ranks -------------------------------------------------------------


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=i == 0) for i in range(8))) for _ in range(LAYERS // 8))
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return bytes_of(v for state in optimizer.state.values() for k, v in state.items() if k != "step")


def deepspeed_run(stage: int, dtype: str, offload: bool, base=LpAdamW):
    import deepspeed

    model = model_of()
    zero = {
        "stage": stage,
        "reduce_bucket_size": LARGEST,
        "allgather_bucket_size": LARGEST,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "offload_optimizer": {"device": "cpu" if offload else "none", "pin_memory": False},
    }
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
    }
    optimizer = base(param_groups(model, 0.1), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    flats = (
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )

    def held() -> dict[str, int]:
        return dict(
            model=bytes_of(p.ds_tensor if stage == 3 else p for p in model.parameters()),
            masters=bytes_of(flats),
            optimizer_state=state_bytes(optimizer),
        )

    x = torch.randn(2, WIDTH, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    return engine, lambda: engine(x).float().square().mean(), engine.backward, engine.step, held


def torch_run(stage: int | str, dtype: str, offload: bool):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    model = model_of()
    engine = nn.parallel.DistributedDataParallel(model, init_sync=False) if stage == 0 else model
    if stage == "fsdp2":
        for module in (*model, model):
            fully_shard(
                module,
                mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if dtype == "bf16" else None),
                offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
            )
    optimizer = LpAdamW(param_groups(model, 0.1), lr=1e-3)
    x = torch.randn(2, WIDTH)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=stage == 0 and dtype == "bf16"):
            return engine(x).float().square().mean()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def held() -> dict[str, int]:
        return dict(model=0, masters=bytes_of(model.parameters()), optimizer_state=state_bytes(optimizer))

    return engine, loss, torch.Tensor.backward, step, held


def measured(make, stage: int | str, dtype: str, offload: bool) -> dict[str, int]:
    """Steps to warm up, one under the profiler, one under the watch for collectives. `beside`: bytes of all but what
    `held` names.
    """
    # DDP makes its buckets anew in the second forward; and accumulating, it has gradients beside the copies that
    # autocast makes.
    times = 2 if stage == 0 else 1
    gc.collect()
    gc.freeze()  # what is there already is no concern of `alive`
    allocated, inner, step_of_ours = Allocated(), Collectives(), LpAdamW.step

    def watched(self, closure=None):
        allocated.mark("inner")
        with inner:
            return step_of_ours(self, closure)

    with allocated:
        engine, loss, backward, step, held = make(stage, dtype, offload)
        allocated.mark("made")
        for _ in range(times):
            backward(loss())
            step()
        LpAdamW.step = watched
        try:
            at_rest = bytes_of(alive())
            allocated.mark("rest")
            for _ in range(times):
                backward(loss())
            before_step = bytes_of(alive())
            allocated.mark("step")
            step()
        finally:
            LpAdamW.step = step_of_ours
    held_bytes, at, peak = held(), allocated.at, allocated.peak
    # gloo may free what it takes on a thread that the profiler does not see. So only spans without gathers are read,
    # on top of what is alive when they begin; the buckets of DDP, of which Python knows nothing, as they were made.
    if stage in (3, "fsdp2"):
        most = before_step + peak["step"] - at["step"]
    else:
        buckets = at["made"] - held_bytes["masters"] if stage == 0 else 0
        most = at_rest + buckets + max(peak["rest"], peak["step"]) - at["rest"]
    with Collectives() as seen:
        backward(loss())
        step()
    with Collectives() as counting:
        counted = len(measure_sparsity(engine).counts)
    with Collectives() as binning:
        measure_histogram(engine)
    if make is deepspeed_run:
        engine.destroy()
    return dict(
        held_bytes,
        beside=most - sum(held_bytes.values()),
        sent=sent(seen),
        calls_of_inner_step=len(inner.calls),
        counted=counted,
        sent_to_count=sent(counting),
        calls_to_count=len(counting.calls),
        sent_to_bin=sent(binning),
    )


def with_adamw() -> dict[str, int]:
    _engine, loss, backward, step, held = deepspeed_run(2, "bf16", False, torch.optim.AdamW)
    with Collectives() as seen:
        backward(loss())
        step()
    return dict(held(), sent=sent(seen))


# torch's own first: ZeRO-3 puts a linear function of its own into torch, which keeps no copy for backward under
# autocast.
CELLS = [
    (0, "bf16", False),
    (0, "fp32", False),
    ("fsdp2", "bf16", False),
    ("fsdp2", "fp32", False),
    ("fsdp2", "fp32", True),
]
CELLS += [(stage, dtype, offload) for stage in (1, 2, 3) for dtype in ("bf16", "fp32") for offload in (False, True)]


def on_a_rank(rank: int, world_size: int) -> dict:
    logging.disable(logging.WARNING)
    result = {cell: measured(torch_run if cell[0] in (0, "fsdp2") else deepspeed_run, *cell) for cell in CELLS}
    return {**result, "AdamW": with_adamw()}
