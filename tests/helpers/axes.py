"""Runs of a tiny model over several axes of ranks, and in one process, with the same gradients.

What is elementwise then has to come to the same bits, whatever the products of a forward pass are added up in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.distributed import DistributedConfig

from helpers.engines import Engine
from helpers.models import tiny_llama
from helpers.targets import decaying
from lp_dist import LpAdamW, SparsityTarget, attach, measure_sparsity, param_groups
from lp_dist.attachment.attach import Attachment
from lp_dist.sparsity import quantiles

# Ways to shard that the lowest versions that pyproject.toml allows (torch 2.7, transformers 5.12) do not have.
needs_replicate = pytest.mark.skipif(
    find_spec("torch.distributed._composable.replicate_with_fsdp") is None,
    reason=f"torch {torch.__version__} has no replicate_with_fsdp",
)
needs_sharding_config = pytest.mark.skipif(
    "fsdp_size" not in {field.name for field in fields(DistributedConfig)},
    reason="this transformers has no DistributedConfig that shards",
)

STEPS = 18
# A block of four of the second layer's inputs, and every block of eight, lie on two ranks of tensor parallelism.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TARGETS: dict[str, Callable[[], SparsityTarget]] = {
    "weights": lambda: decaying(0.5, update_every=3),
    "weights by layer": lambda: decaying(0.6, scope="layer", update_every=3),
    "2:4": lambda: decaying(pattern="2:4", update_every=3),
    "4:8": lambda: decaying(pattern="4:8", scope="layer", update_every=3),
    "channels": lambda: decaying(0.4, groups="channels", update_every=3),
    "heads": lambda: decaying(0.5, groups="kv_groups", update_every=3),
}
OF_MIXTURES: dict[str, Callable[[], SparsityTarget]] = {
    "weights": TARGETS["weights"],
    "2:4": TARGETS["2:4"],
    "experts": lambda: decaying(0.5, groups="experts", update_every=3),
    "channels of experts": lambda: decaying(0.5, groups="expert_channels", update_every=3),
}


def dense() -> nn.Module:
    return tiny_llama(**SIZES)


def mixture() -> nn.Module:
    """Six experts, of which two ranks have three each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes))


_IN_WORDS = {
    "fsdp": "FSDP2",
    "tp": "tensor parallelism",
    "ddp": "`replicate`",
    "replicas": "HSDP's copies",
    "cp": "context parallelism",
    "dp": "data",
}
_PLANS = {
    "layers": ", head and norms outside of the plan",
    "head": ", the head in the plan",
    "norms": ", sequence parallelism of the norms",
}


@dataclass(frozen=True)
class Axes:
    """A way to shard: sizes of a mesh by axis, and what is done along them.

    Args:
        mesh: {name of the axis: ranks}.
        plan: whether the output head and the norms are in the plan of tensor parallelism: "layers", "head", "norms".
    """

    mesh: tuple[tuple[str, int], ...]
    plan: str = "layers"

    def __str__(self) -> str:
        along = " × ".join(f"{_IN_WORDS[name]} ({size})" for name, size in self.mesh)
        return along + _PLANS[self.plan] * ("tp" in dict(self.mesh))

    @property
    def is_by_replicate(self) -> bool:
        """Whether it needs torch's `replicate_with_fsdp`."""
        return "ddp" in dict(self.mesh)

    def shard(self, model: nn.Module) -> nn.Module:
        """Shards the model in place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            SequenceParallel,
            parallelize_module,
        )

        names = tuple(name for name, _ in self.mesh)
        mesh = init_device_mesh("cpu", tuple(size for _, size in self.mesh), mesh_dim_names=names)
        if "tp" in names:
            for layer in model.model.layers:
                columns = ("q_proj", "k_proj", "v_proj")
                plan: dict[str, Any] = {f"self_attn.{name}": ColwiseParallel() for name in columns}
                plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
                plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
                if self.plan == "norms":
                    plan |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), SequenceParallel())
                parallelize_module(layer, mesh["tp"], plan)
            if self.plan == "head":
                parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel()})
        data = tuple(name for name in names if name != "tp")
        if self.is_by_replicate:
            from torch.distributed._composable.replicate_with_fsdp import replicate

            for layer in model.model.layers:
                replicate(layer, mesh=mesh["ddp"])
            replicate(model, mesh=mesh["ddp"])
        elif data:
            # Shards are spread over the ranks that share a sequence too.
            along = mesh[data]._flatten("fsdp") if "cp" in data else mesh[data] if len(data) > 1 else mesh[data[0]]
            for layer in model.model.layers:
                fully_shard(layer, mesh=along)
            fully_shard(model, mesh=along)
        return model


@dataclass(frozen=True)
class Loaded:
    """A way to shard of transformers' own: by a `DistributedConfig` in from_pretrained.

    Args:
        config: arguments of it, in order.
        directory: where the ranks share files.
    """

    config: tuple[tuple[str, Any], ...]
    directory: str

    def __str__(self) -> str:
        return f"`DistributedConfig({', '.join(f'{key}={value!r}' for key, value in self.config)})`"

    def shard(self, model: nn.Module) -> nn.Module:
        """A model with these weights, sharded."""
        if torch.distributed.get_rank() == 0:
            model.save_pretrained(self.directory)
        torch.distributed.barrier()
        config = DistributedConfig(**dict(self.config))
        loaded = type(model).from_pretrained(self.directory, dtype=torch.float32, distributed_config=config)
        torch.distributed.barrier()
        return loaded


def gradients(shard: Callable[[nn.Module], nn.Module], model_of: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    """Four sets of gradients: parameters of models that are sharded as the trained one."""
    sets = []
    for seed in range(4):
        model = model_of()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 8)
        sets.append({name: param.detach().clone() for name, param in shard(model).named_parameters()})
    return sets


def complete(tensor: Any) -> Tensor:
    """All of a tensor, whatever shards it. Collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass
class TrainedModel:
    """A model that is trained with given gradients."""

    model: nn.Module
    optimizer: LpAdamW
    attachment: Attachment
    sets: list[dict[str, Tensor]]
    lr_scheduler: Any

    @classmethod
    def begin(
        cls,
        shard: Callable[[nn.Module], nn.Module],
        target: str,
        sets: list[dict[str, Tensor]],
        model_of: Callable[[], nn.Module] = dense,
    ) -> TrainedModel:
        model = shard(model_of())
        optimizer = LpAdamW(param_groups(model, 0.0), lr=4e-3)
        lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, STEPS)
        attachment = attach(
            model, optimizer, target={**TARGETS, **OF_MIXTURES}[target](), total_steps=STEPS, lr_scheduler=lr_scheduler
        )
        return cls(model, optimizer, attachment, sets, lr_scheduler)

    def take(self, first: int, last: int) -> None:
        """Takes some steps, with samples that are smaller than the model."""
        with mock.patch.object(quantiles, "SAMPLE_SIZE", 256):
            self._take(first, last)

    def _take(self, first: int, last: int) -> None:
        for step in range(first, last):
            for name, param in self.model.named_parameters():
                # Powers of two and signs, so that no set comes twice.
                param.grad = self.sets[step % 4][name] * ((-1) ** (step // 4) * 2.0 ** (step % 3 - 1))
            self.optimizer.step()
            self.lr_scheduler.step()
            self.attachment.after_step()

    @property
    def engine(self) -> Engine:
        """To save and load it by."""
        return Engine(self.model, self.optimizer, self.lr_scheduler)

    def save(self, directory: Path) -> None:
        """Writes a checkpoint, and the target's state. Collective."""
        self.engine.save(directory, "step")
        if torch.distributed.get_rank() == 0:
            (directory / "target.json").write_text(json.dumps(self.attachment.state_dict()))
        torch.distributed.barrier()

    def load(self, directory: Path) -> None:
        """Goes on from a checkpoint. Collective."""
        self.engine.load(directory, "step")
        self.attachment.load_state_dict(json.loads((directory / "target.json").read_text()))

    def results(self) -> dict[str, Any]:
        """What holds now. Collective."""
        counts = measure_sparsity(self.model).counts
        masters = measure_sparsity(self.model, self.optimizer).counts
        return {
            "weights": {name: complete(param) for name, param in self.model.named_parameters()},
            "state": json.dumps(self.attachment.state_dict()),
            "logs": self.attachment.logs,
            "counts": counts,
            "masters": masters,
        }


def followed(
    shard: Callable[[nn.Module], nn.Module], targets: Iterable[str], model_of: Callable[[], nn.Module] = dense
) -> dict[str, dict[str, Any]]:
    """By target, what a run comes to."""
    sets = gradients(shard, model_of)
    results = {}
    for target in targets:
        run = TrainedModel.begin(shard, target, sets, model_of)
        run.take(0, STEPS)
        results[target] = run.results()
    return results


def unsharded(model: nn.Module) -> nn.Module:
    return model
