"""The models of the simulation, on the meta device, and how FSDP2 and tensor parallelism shard them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

# Ranks of tensor parallelism, and of expert parallelism in a mixture.
TENSOR_PARALLEL = 8


@dataclass(frozen=True)
class ModelShape:
    """A model that is built from its config.

    Args:
        title: for tables.
        config: of transformers' class; without the number of layers and experts.
        layers: how many it has.
        groups: the kind of groups that its target of groups has.
        least_ranks: with as many a rank's shard at full size fits into 12 GB.
        experts: of a layer; 0 for a dense model.
    """

    title: str
    config: dict[str, Any]
    layers: int
    groups: str
    least_ranks: int
    experts: int = 0

    def build(self, layers: int | None = None, experts: int | None = None) -> nn.Module:
        """The model on the meta device.

        Args:
            layers: another number of them; None: its usual one.
            experts: another number of them; None: its usual one.
        """
        import transformers

        config: dict[str, Any] = {**self.config, "num_hidden_layers": layers or self.layers}
        with torch.device("meta"):
            if self.experts:
                config["num_experts"] = experts or self.experts
                return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


MODELS = {
    "8B": ModelShape(
        "Llama-3-8B",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        layers=32,
        groups="channels",
        least_ranks=64,
    ),
    "70B": ModelShape(
        "Llama-3-70B",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        layers=80,
        groups="channels",
        least_ranks=256,
    ),
    "235B": ModelShape(
        "Qwen3-235B-A22B",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts_per_tok": 8,
        },
        layers=94,
        groups="experts",
        least_ranks=512,
        experts=128,
    ),
    # For tests.
    "tiny": ModelShape(
        "tiny Llama",
        {
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        layers=4,
        groups="channels",
        least_ranks=4,
    ),
    "tiny-mixture": ModelShape(
        "tiny Qwen3-MoE",
        {
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 8,
            "num_experts_per_tok": 2,
        },
        layers=4,
        groups="experts",
        least_ranks=4,
        experts=8,
    ),
}


def _fsdp2(model: Any, mesh: DeviceMesh, placement: Callable[[nn.Parameter], Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def _tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Columns of what begins a block and rows of what ends it, as the plans of these models have it; experts by their
    first dimension. Norms, embedding, head and routers lie outside of the plan, and so do keys and values of fewer
    heads than ranks.
    """
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    columns = ["self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"]
    if model.config.num_key_value_heads % mesh.size() == 0:
        columns += ["self_attn.k_proj", "self_attn.v_proj"]
    for layer in model.model.layers:
        styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
        styles |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        modules = dict(layer.named_modules())
        parallelize_module(layer, mesh, {name: style for name, style in styles.items() if name in modules})
        experts = modules.get("mlp.experts")
        for name, param in list(experts.named_parameters(recurse=False)) if experts is not None else ():
            experts.register_parameter(name, nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])))


def shard(model: nn.Module, ranks: int, tensor_parallel: bool) -> None:
    """Shards a model of `ModelShape` over the ranks of the process group, in place. Stacked experts are sharded along
    their second dimension where there are fewer of them than ranks, as torchtitan does.

    Args:
        model: on the meta device.
        ranks: all of them.
        tensor_parallel: TENSOR_PARALLEL neighbouring ranks divide the matrices of a layer, and FSDP2 what they have.
    """
    from torch.distributed.tensor import Shard

    if tensor_parallel:
        names = ("data", "tensor")
        mesh = torch.distributed.init_device_mesh(
            "cpu", (ranks // TENSOR_PARALLEL, TENSOR_PARALLEL), mesh_dim_names=names
        )
        _tensor_parallel(model, mesh["tensor"])
        mesh = mesh["data"]
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (ranks,))

    def placement(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.ndim == 3 and len(param) < ranks else None

    _fsdp2(model, mesh, placement)
