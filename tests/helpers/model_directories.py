"""Shared by the tests: directories of models in each form that can be exported, and changes to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor


def changed(source: Path, **changes: Any) -> None:
    """Sets keys of a config.json, or removes those that are None."""
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewritten(source: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


FORMS = ("plain", "zero", "dcp")


def written(directory: Path, model: torch.nn.Module) -> int:
    """The same weights in each form; gives their bytes."""
    tensors = {name: param.detach() for name, param in model.named_parameters()}
    for form in FORMS:
        (directory / form).mkdir(parents=True)
        model.config.save_pretrained(directory / form)
    save_file(tensors, directory / "plain" / "model.safetensors")
    dcp.save(tensors, checkpoint_id=directory / "dcp", no_dist=True)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
    torch.save(
        {"module": {}, "buffer_names": [], "param_shapes": shapes}, directory / "zero" / "mp_rank_00_model_states.pt"
    )
    for rank, partition in enumerate(flat.chunk(2)):
        state = {
            "zero_stage": 2,
            "partition_count": [2],
            "single_partition_of_fp32_groups": [partition.clone()],
            "base_optimizer_state": {"exp_avg": partition.clone()},
        }
        torch.save(
            {"optimizer_state_dict": state}, directory / "zero" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    return flat.nbytes
