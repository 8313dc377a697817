"""Shared by the tests: small checkpoints of every form that `open_checkpoint` knows, made in one process."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from lp_dist.checkpoints import bitmask

WEIGHTS = {
    "a.weight": torch.arange(35.0).view(5, 7),
    "b.weight": torch.arange(24.0).view(4, 6) * (torch.arange(24).view(4, 6) % 3 == 0),
}


def safetensors(directory: Path) -> None:
    save_file(WEIGHTS, directory / "model.safetensors")


def sharded(directory: Path) -> None:
    files = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(WEIGHTS, 1)}
    for name, file in files.items():
        save_file({name: WEIGHTS[name]}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def pickled(directory: Path) -> None:
    torch.save(WEIGHTS, directory / "pytorch_model.bin")


def in_bitmask_form(directory: Path) -> None:
    tensors: dict[str, Tensor] = {"a.weight": WEIGHTS["a.weight"]}
    packed = bitmask.pack(WEIGHTS["b.weight"])
    assert packed is not None
    tensors["b.weight.bitmask"], tensors["b.weight.values"] = packed
    shapes = {name: list(tensor.shape) for name, tensor in WEIGHTS.items()}
    save_file(tensors, directory / "bitmask.safetensors", {bitmask.METADATA_KEY: json.dumps(shapes)})


def model_states(**more: Any) -> dict[str, Any]:
    shapes = [{name: tensor.shape for name, tensor in WEIGHTS.items()}]
    return {"module": {}, "buffer_names": [], "param_shapes": shapes, "client": {"epoch": 3}, **more}


def zero2(directory: Path) -> None:
    flat = torch.cat([tensor.flatten() for tensor in WEIGHTS.values()] + [torch.zeros(1)])
    tagged(directory).mkdir()
    torch.save(model_states(module=dict(WEIGHTS)), tagged(directory) / "mp_rank_00_model_states.pt")
    for rank, shard in enumerate(flat.chunk(2)):
        state = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [shard.clone()]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, tagged(directory) / name)


def zero3(directory: Path) -> None:
    tagged(directory).mkdir()
    for rank in range(2):
        shards = [torch.nn.functional.pad(w.flatten(), (0, w.numel() % 2)).chunk(2)[rank] for w in WEIGHTS.values()]
        state = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.cat(shards)]}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state}, tagged(directory) / f"{name}_optim_states.pt")
        torch.save(model_states(), tagged(directory) / f"{name}_model_states.pt")


def without_zero(directory: Path) -> None:
    tagged(directory).mkdir()
    torch.save(model_states(module=dict(WEIGHTS), param_shapes=None), tagged(directory) / "mp_rank_00_model_states.pt")


def universal(directory: Path) -> None:
    tagged(directory).mkdir()
    torch.save(model_states(), tagged(directory) / "mp_rank_00_model_states.pt")
    for name, tensor in WEIGHTS.items():
        (tagged(directory) / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, tagged(directory) / "zero" / name / "fp32.pt")


def tagged(directory: Path) -> Path:
    (directory / "latest").write_text("step3")
    return directory / "step3"


def distributed(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(dict(WEIGHTS), checkpoint_id=directory, no_dist=True)


def of_trainer(directory: Path) -> None:
    """What Trainer writes in one process."""
    import numpy as np
    from transformers import TrainingArguments

    safetensors(directory)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(WEIGHTS["a.weight"].clone())])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(5, 7)
    optimizer.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), directory / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": np.random.RandomState(0).get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, directory / "rng_state.pth")
    torch.save(TrainingArguments(str(directory), use_cpu=True), directory / "training_args.bin")
    callbacks = {"LpCallback": {"args": {}, "attributes": {}, "progress": {}}}
    state = {"global_step": 3, "max_steps": 9, "epoch": 0.5, "log_history": [], "stateful_callbacks": callbacks}
    (directory / "trainer_state.json").write_text(json.dumps(state))


def under_deepspeed(directory: Path) -> None:
    """What Trainer writes under DeepSpeed."""
    of_trainer(directory)
    (directory / "optimizer.pt").unlink()
    zero2(directory)


def under_fsdp2(directory: Path) -> None:
    """What Trainer writes under FSDP2: what is no tensor lies in the files of the tensors."""
    of_trainer(directory)
    (directory / "optimizer.pt").unlink()
    distributed(directory / "pytorch_model_fsdp_0")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state = {"exp_avg": torch.zeros(3), "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "phase": "decay"}]}
        dcp.save({"optimizer": state}, checkpoint_id=directory / "optimizer_0", no_dist=True)


RUNS = {make.__name__: make for make in (of_trainer, under_deepspeed, under_fsdp2)}
FORMS = {
    make.__name__: make
    for make in (
        safetensors, sharded, pickled, in_bitmask_form, zero2, zero3, without_zero, universal, distributed
    )
}  # fmt: skip
