"""The engines that tests put a small model into, each made the same way: `make(kind, model, optimizer)` → an
`Engine`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

# Odd sizes, so that every split over two or three ranks is uneven or padded, and small sub-groups, so that ZeRO-3 has
# several.
ZERO = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2 offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3 offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero3 hpz": {"stage": 3, "zero_hpz_partition_size": 2},
}

# Of runs with every engine, those that take part with the suite; the others are long.
WITH_THE_SUITE = ("zero2", "fsdp2")


def in_two_starts(engines: Iterable[str], with_the_suite: Iterable[str] = WITH_THE_SUITE) -> list[Any]:
    """Parameters of a fixture: some of these engines with the suite, and the others under the marker `long`."""
    engines, some = tuple(engines), tuple(with_the_suite)
    assert set(some) < set(engines), f"{some} of {engines}"
    others = tuple(engine for engine in engines if engine not in some)
    return [
        pytest.param(some, id=" and ".join(some)),
        pytest.param(others, id="others", marks=pytest.mark.long),
    ]


@dataclass
class Engine:
    """A wrapped model: call it, then `step(loss)`; `handle` is what a user hands to lp_dist. Saved and loaded by the
    engine's own means.
    """

    handle: Any
    optimizer: Any
    lr_scheduler: Any = None

    def __call__(self, *args: Any) -> Any:
        return self.handle(*args)

    def step(self, loss: torch.Tensor) -> None:
        if hasattr(self.handle, "backward"):
            self.handle.backward(loss)
            self.handle.step()
        else:
            loss.backward()
            self.optimizer.step()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self.optimizer.zero_grad()

    def save(self, directory: Path, tag: str) -> None:
        """DeepSpeed's checkpoint; torch.distributed.checkpoint where there are DTensors; else torch.save."""
        if hasattr(self.handle, "save_checkpoint"):
            self.handle.save_checkpoint(directory, tag=tag)
            return
        place = directory / tag
        if self.is_sharded():
            dcp.save(self._sharded_state(), checkpoint_id=place)
        elif torch.distributed.get_rank() == 0:
            place.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"model": self.handle.state_dict(), "optimizer": self.optimizer.state_dict()}, place / "state.pt"
            )
        if self.lr_scheduler is not None and torch.distributed.get_rank() == 0:
            torch.save(self.lr_scheduler.state_dict(), place / "scheduler.pt")
        torch.distributed.barrier()

    def load(self, directory: Path, tag: str) -> None:
        if hasattr(self.handle, "load_checkpoint"):
            assert self.handle.load_checkpoint(directory, tag=tag)[0] is not None
            return
        place = directory / tag
        if self.is_sharded():
            from torch.distributed.checkpoint.state_dict import set_state_dict

            state = self._sharded_state()
            dcp.load(state, checkpoint_id=place)
            set_state_dict(
                self.handle, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        else:
            state = torch.load(place / "state.pt", weights_only=True)
            self.handle.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(torch.load(place / "scheduler.pt", weights_only=True))

    def is_sharded(self) -> bool:
        return any(hasattr(param, "placements") for param in self.handle.parameters())

    def _sharded_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.handle, self.optimizer)
        return {"model": model, "optimizer": optimizer}


@dataclass
class Accelerated(Engine):
    """What `accelerator.prepare` makes of them, in a loop as Accelerate's pages show it."""

    accelerator: Any = None

    def step(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()

    def save(self, directory: Path, tag: str) -> None:
        self.accelerator.save_state(str(directory / tag))

    def load(self, directory: Path, tag: str) -> None:
        self.accelerator.load_state(str(directory / tag))


def deepspeed_config(kind: str, **more: Any) -> dict[str, Any]:
    zero = dict(ZERO.get(kind, {"stage": 0}))
    if kind == "bf16_optimizer":
        zero = {"stage": 1}
        more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **more}
    if zero["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 20}
    # DeepSpeed clips the gradients' norm to 1.0 unless it is told otherwise.
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **more,
    }


def gloo_adds() -> bool:
    """Whether gloo adds up where it should average, and so FSDP2 the gradients on CPUs: torch 2.7 does
    (https://github.com/pytorch/pytorch/issues/162338). Collective.
    """
    ones, average = torch.ones(torch.distributed.get_world_size()), torch.zeros(1)
    torch.distributed.reduce_scatter_tensor(average, ones, torch.distributed.ReduceOp.AVG)
    return average.item() != 1


def make(
    kind: str, model: nn.Module, optimizer_of: Any, scheduler_of: Any = lambda optimizer: None, **more: Any
) -> Engine:
    """kind: plain, ddp, fsdp2, zero0, a key of ZERO, bf16_optimizer, or "accelerate " and a key of ZERO.
    optimizer_of(model) → optimizer, made when the engine wants it; scheduler_of(optimizer) → its learning-rate
    scheduler. more: into the DeepSpeed config.
    """
    if kind == "plain":
        return _engine(model, optimizer_of(model), scheduler_of)
    if kind == "ddp":
        return _engine(nn.parallel.DistributedDataParallel(model), optimizer_of(model), scheduler_of)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        return _engine(model, optimizer_of(model), scheduler_of)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    if kind.startswith("accelerate "):
        return _accelerated(deepspeed_config(kind.removeprefix("accelerate "), **more), model, optimizer, scheduler)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(kind, **more),
        dist_init_required=False,
    )
    return Engine(engine, optimizer, scheduler)


def _engine(handle: nn.Module, optimizer: Any, scheduler_of: Any) -> Engine:
    return Engine(handle, optimizer, scheduler_of(optimizer))


def _accelerated(config: dict[str, Any], *things: Any) -> Accelerated:
    import os

    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    from lp_dist.sharding.deepspeed import join_deepspeed

    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_TORCH_DEVICE="cpu")
    join_deepspeed()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return Accelerated(*accelerator.prepare(*things), accelerator)


def full(param: torch.Tensor) -> torch.Tensor:
    """The unsharded parameter, a copy, on every rank."""
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
    data = param.detach()
    return (
        data.full_tensor() if hasattr(data, "full_tensor") else data
    ).clone()  # on one rank full_tensor() is the parameter itself


def gathered(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter unsharded, by name of the unwrapped model."""
    from lp_dist.sharding.engines import unwrap

    return {name: full(param) for name, param in unwrap(engine.handle).named_parameters()}


def ended(engine: Engine) -> None:
    if hasattr(engine.handle, "destroy"):
        engine.handle.destroy()


def quiet() -> None:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)


def convert(folder: Path) -> None:
    """What `ds_to_universal.py --inject_missing_state` does, without processes of its own."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(folder / "saved"),
            output_folder=str(folder / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
