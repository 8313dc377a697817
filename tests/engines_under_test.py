"""The engines that tests put a small model into, each made the same way: `make(kind, model, optimizer)` → an `Engine`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Odd sizes, so that every split over two or three ranks is uneven or padded, and small sub-groups, so that ZeRO-3 has several.
ZERO = {
    "zero1": {"stage": 1}, "zero2": {"stage": 2}, "zero3": {"stage": 3},
    "zero2 offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3 offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero3 hpz": {"stage": 3, "zero_hpz_partition_size": 2},
}


@dataclass
class Engine:
    """A wrapped model: call it, then `step(loss)`; `handle` is what a user hands to lp_dist."""

    handle: Any
    optimizer: Any

    def __call__(self, *args: Any) -> Any:
        return self.handle(*args)

    def step(self, loss: torch.Tensor) -> None:
        if hasattr(self.handle, "backward"):
            self.handle.backward(loss)
            self.handle.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def deepspeed_config(kind: str, **more: Any) -> dict[str, Any]:
    zero = dict(ZERO.get(kind, {"stage": 0}))
    if kind == "bf16_optimizer":
        zero = {"stage": 1}
        more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **more}
    if zero["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 50}
    return {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero, **more}


def make(kind: str, model: nn.Module, optimizer_of: Any, **more: Any) -> Engine:
    """kind: plain, ddp, fsdp2, zero0, a key of ZERO, or bf16_optimizer. optimizer_of(model) → optimizer, made when the engine wants it.
    more: into the DeepSpeed config."""
    if kind == "plain":
        return Engine(model, optimizer_of(model))
    if kind == "ddp":
        return Engine(nn.parallel.DistributedDataParallel(model), optimizer_of(model))
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        return Engine(model, optimizer_of(model))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    optimizer = optimizer_of(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(kind, **more), dist_init_required=False)
    return Engine(engine, optimizer)


def full(param: torch.Tensor) -> torch.Tensor:
    """The whole parameter, a copy, on every rank."""
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
    data = param.detach()
    return data.full_tensor() if hasattr(data, "full_tensor") else data.clone()


def gathered(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter whole, by name of the unwrapped model."""
    from lp_dist.shards import unwrap

    return {name: full(param) for name, param in unwrap(engine.handle).named_parameters()}
