"""NVMe offload: bitwise CPU offload where DeepSpeed's asynchronous I/O is to be had (libaio); elsewhere DeepSpeed's
own error.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.engines import ZERO, gathered, make
from lp_dist import LpAdamW, attach, measure_sparsity, param_groups

AIO = {"aio": {"block_size": 4096, "queue_depth": 4, "intra_op_parallelism": 1}}


def model_of() -> nn.Sequential:
    """The second matrix is large enough (1 MB) that DeepSpeed really swaps it out."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 1000), nn.Tanh(), nn.Linear(1000, 600, bias=False), nn.Tanh(), nn.Linear(600, 1)
    )


def optimizer_of(model: nn.Module) -> LpAdamW:
    return LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.5)


def run(kind: str, **more) -> dict:
    engine = make(kind, model_of(), optimizer_of, **more)
    attached = attach(engine.handle, overrides={"2.weight": {"p": 0.0}})
    swapped = {shard.name for shard in attached.shards if shard.tensor.numel() < shard.length}
    for step in range(4):
        x = torch.randn(3, 20, generator=torch.Generator().manual_seed(step))
        engine.step(engine(x).square().mean())
    masters = {shard.name: shard.local.values.clone() for shard in attached.shards}
    return {
        "swapped": swapped,
        "masters": masters,
        "weights": gathered(engine),
        "counts": measure_sparsity(engine.handle, engine.handle.optimizer).counts,
    }


def on_a_rank(rank: int, world_size: int, directory: str, available: bool) -> dict | str:
    ZERO["nvme"] = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": directory, "pin_memory": False, "buffer_count": 4},
    }
    if available:
        return {kind: run(kind, **more) for kind, more in (("nvme", AIO), ("zero3 offload", {}))}
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as error:
        patch.setattr(
            PinMemoryBuilder, "load", lambda self, verbose=False: None
        )  # which is compiled first, for minutes, and in vain
        run("nvme", **AIO)
    return str(error.value)


def test_nvme_offload_is_cpu_offload_or_deepspeeds_own_error(run_ranks, tmp_path):
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    available = AsyncIOBuilder().is_compatible()
    if available:
        AsyncIOBuilder().load()  # compiled once here, before the ranks want it
    (result,) = run_ranks(on_a_rank, 1, str(tmp_path), available)
    if not available:
        assert "Unable to JIT load the async_io op" in result
        return
    nvme, cpu = result["nvme"], result["zero3 offload"]
    assert nvme["swapped"] == {"2.weight"} and not cpu["swapped"]
    for what in ("masters", "weights"):
        for name, tensor in cpu[what].items():
            assert torch.equal(nvme[what][name], tensor), (what, name)
    assert nvme["counts"] == cpu["counts"] and nvme["counts"]["2.weight"][0] > 0
