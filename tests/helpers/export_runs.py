"""A small tied Llama of uneven sizes, trained for two steps under each engine and saved by its own means, for the
tests of the export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from helpers.engines import Engine, ended, gathered, make, quiet
from lp_dist import LpAdamW, param_groups

FROZEN = "model.layers.1.mlp.up_proj.weight"
SPARSE = "model.layers.0.mlp.down_proj.weight"
BF16 = {"bf16": {"enabled": True}}
# name: (engine, more of its config). In bf16, where masters and the model's own weights differ.
CELLS = {
    "zero0": ("zero0", {}),
    "zero0 bf16": ("zero0", BF16),
    "zero1": ("zero1", BF16),
    "zero2": ("zero2", BF16),
    "zero3": ("zero3", BF16),
    "bf16_optimizer": ("bf16_optimizer", {}),
    "zero2 offload": ("zero2 offload", BF16),
    "zero3 offload": ("zero3 offload", BF16),
    "zero2 round robin": ("zero2", {**BF16, "zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    "zero2 aligned": ("zero2", {**BF16, "zero_optimization": {"stage": 2, "parameter_alignment": True}}),
    "compiled": ("zero2", BF16),
    "fsdp2": ("fsdp2", {}),
}
UNEVEN = ("zero1", "zero2", "zero3")


def llama(**more: Any) -> Any:
    """Every matrix has an odd number of elements, so that shards end within rows and in padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 97,
                "hidden_size": 21,
                "intermediate_size": 23,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "head_dim": 6,
                "max_position_embeddings": 32,
                "tie_word_embeddings": True,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "architectures": ["LlamaForCausalLM"],
                **more,
            }
        )
    )
    weight = model.get_parameter(SPARSE).data
    weight[weight.abs() < 0.01] = 0.0
    return model


def optimizer_of(model: Any) -> LpAdamW:
    return LpAdamW(param_groups(model, weight_decay=1e-3), lr=1e-3, p=0.5)


def started(cell: str) -> Engine:
    kind, more = CELLS[cell]
    model = llama()
    model.get_parameter(FROZEN).requires_grad_(False)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return Engine(model, optimizer_of(model))
    return make(kind, torch.compile(model) if cell == "compiled" else model, optimizer_of, **more)


def masters_of(engine: Engine) -> dict[str, Tensor]:
    """What DeepSpeed itself gathers on the ranks; of frozen parameters, and without masters, the model's own."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = gathered(engine)
    if not hasattr(engine.handle, "zero_optimization") or not engine.handle.zero_optimization():
        return weights
    if getattr(engine.handle.optimizer, "round_robin_gradients", False):
        masters = flat_masters_of(engine)  # safe_get_full_fp32_param gives other parameters' (DeepSpeed 0.19.8)
    else:
        masters = {
            name: safe_get_full_fp32_param(param).clone()
            for name, param in engine.handle.module.named_parameters()
            if param.requires_grad
        }
    masters = {name.removeprefix("_orig_mod."): tensor for name, tensor in masters.items()}
    assert all(torch.equal(tensor.to(weights[name].dtype), weights[name]) for name, tensor in masters.items()), (
        "these are not the masters"
    )
    return {name: masters.get(name, tensor) for name, tensor in weights.items()}


def flat_masters_of(engine: Engine) -> dict[str, Tensor]:
    masters, optimizer = {}, engine.handle.optimizer
    groups = zip(
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        optimizer.single_partition_of_fp32_groups,
    )
    for params, offsets, partition in groups:
        partitions = [torch.empty_like(partition) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(partitions, partition.detach())
        for param, offset in zip(params, offsets):
            masters[engine.handle.param_names[param]] = (
                torch.cat(partitions)[offset : offset + param.numel()].view(param.shape).detach().clone()
            )
    return masters


def save(rank: int, world_size: int, directory: Path, cells: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Trains and saves each; gives their master weights."""
    quiet()
    masters = {}
    for cell in cells:
        engine = started(cell)
        for step in range(0 if cell == "compiled" else 2):  # only its names are of interest
            tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))
            engine.step(engine.handle(input_ids=tokens, labels=tokens).loss)
        engine.save(directory / cell, "saved")
        if cell in ("zero2", "zero3"):
            engine.handle.save_checkpoint(
                directory / f"{cell} without frozen", tag="saved", exclude_frozen_parameters=True
            )
        if cell == "fsdp2":
            state = engine.handle.state_dict()
            dcp.save(state, checkpoint_id=directory / "bare")
            dcp.save({"model": state}, checkpoint_id=directory / "accelerate" / "pytorch_model_fsdp_0")
        masters[cell] = masters_of(engine)
        ended(engine)
    return masters
