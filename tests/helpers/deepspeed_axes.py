"""Shared by the tests: models for DeepSpeed's AutoTP, linear in their weights, whose gradients are exact wherever
their weights lie; what ranks hold of them, put together by plain loops; and mixtures for its expert parallelism.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from helpers.engines import ZERO, Engine, deepspeed_config


class TensorCase(NamedTuple):
    """A run under AutoTP. stage: of ZeRO. how: "global" or "layer" (of a target), a pattern, "groups", or "by hand",
    with a λ.
    """

    stage: str
    how: str


# With the suite, and the long ones.
TENSOR_CASES = [TensorCase("zero1", "2:4"), TensorCase("zero1", "groups"), TensorCase("zero2", "layer")]
LONG_TENSOR_CASES = [
    TensorCase("zero0", "layer"),
    TensorCase("zero0", "4:8"),
    TensorCase("zero1", "global"),
    TensorCase("zero2", "2:4"),
    TensorCase("zero2", "by hand"),
    TensorCase("zero3", "global"),
    TensorCase("zero3", "groups"),
]


class ExpertCase(NamedTuple):
    """A run with experts. kind: "autoep", or "native" with `ep_size`. what: half of the weights, of groups, or a
    pattern.
    """

    kind: str
    stage: str
    what: str = "weights"
    ep_size: int = 2


EXPERT_CASES = [
    ExpertCase("autoep", "zero1", "2:4"),
    ExpertCase("native", "zero0", ep_size=1),
    ExpertCase("native", "zero1"),
]
LONG_EXPERT_CASES = [
    ExpertCase("autoep", "zero0"),
    ExpertCase("autoep", "zero2"),
    ExpertCase("autoep", "zero3"),
    ExpertCase("autoep", "zero1", "expert_channels"),
    ExpertCase("autoep", "zero3", "experts"),
    ExpertCase("native", "zero0", "2:4", ep_size=1),
    ExpertCase("native", "zero2", "2:4"),
]

# What a rank of two has along the divided dimension of each weight, written down by hand: (dimension, indices).
SLICES = {
    "up.weight": (0, [[*range(7)], [*range(7, 13)]]),
    "up.bias": (0, [[*range(7)], [*range(7, 13)]]),
    "down.weight": (1, [[*range(12)], [*range(12, 24)]]),
    "fused.weight": (
        0,
        [[*range(4), *range(8, 10), *range(12, 14)], [*range(4, 8), *range(10, 12), *range(14, 16)]],
    ),
}
PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r"up\.weight$"], "partition_type": "column"},
        {"patterns": [r"down\.weight$"], "partition_type": "row"},
        {"patterns": [r"fused\.weight$"], "partition_type": "column", "shape": [[8, 4, 4], -1], "partition_dim": 0},
    ],
}
INPUTS = 40


class SideBySide(nn.Module):
    """Layers side by side, each of the first of the inputs. One is divided by columns, unevenly, one by rows, one is
    three matrices in one, and one is left undivided, as is a vector.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(INPUTS, 13), nn.Linear(24, 9)
        self.fused, self.undivided = nn.Linear(16, 16, bias=False), nn.Linear(20, 5)
        self.scale = nn.Parameter(torch.ones(5))
        with torch.no_grad():
            for param in self.parameters():
                # Weights that bf16 holds, and none that is zero.
                param.copy_((param * 64).round() / 128)
                param[param == 0] = 1 / 64

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """By layer, what this rank has of the outputs."""
        down = self.down.weight.shape[1]
        first = 24 - down if getattr(self.down, "tp_index", 0) else 0
        return {
            "up": self.up(rows),
            "down": self.down(rows[:, first : first + down]),
            "fused": self.fused(rows[:, :16]),
            "undivided": self.undivided(rows[:, :20]),
            "scale": rows[:, :5] * self.scale,
        }


def loss_of(model: Any, step: int, data_rank: int, tensor_rank: int = 0) -> Tensor:
    """Of which the gradients are small integers whatever the weights are, so that averages over ranks are exact."""
    generator = torch.Generator().manual_seed(10 * step + data_rank)
    outputs = model(torch.randint(-1, 2, (4, INPUTS), generator=generator).float())
    loss = torch.zeros(())
    for name, width in {"up": 13, "down": 9, "fused": 16, "undivided": 5, "scale": 5}.items():
        slopes = torch.randint(-1, 2, (4, width), generator=generator).float() / 16
        if outputs[name].shape[1] != width:
            slopes = slopes[:, SLICES[f"{name}.weight"][1][tensor_rank]]
        loss = loss + (outputs[name] * slopes).sum()
    return loss


def engine_of(stage: str, optimizer_of: Any, scheduler_of: Any, tensor_ranks: int = 2, **more: Any) -> Engine:
    """The model under AutoTP and a stage of ZeRO ("zero0" to "zero3", "bf16_optimizer")."""
    import deepspeed

    model = SideBySide()
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    config = deepspeed_config(
        stage, tensor_parallel={"autotp_size": tensor_ranks, "partition_config": PARTITION}, **more
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
    )
    assert stage in {"zero0", "bf16_optimizer", *ZERO}
    return Engine(engine, optimizer, scheduler)


def put_together(name: str, shape: torch.Size, held: list[tuple[int, Tensor, torch.Size]]) -> Tensor:
    """A parameter from what the ranks of each tensor-parallel index have of it.

    Args:
        name: of the parameter.
        shape: of the parameter.
        held: of every tensor-parallel index: (index, all values of its slice in order, the slice's shape).
    """
    if name not in SLICES:
        assert all(values.equal(held[0][1]) for _, values, _ in held), f"{name} differs between copies"
        return held[0][1].view(shape)
    dim, indices = SLICES[name]
    result = torch.full(shape, torch.nan)
    for index, values, slice_shape in held:
        result.index_copy_(dim, torch.tensor(indices[index]), values.view(slice_shape))
    assert not result.isnan().any()
    return result


# --- experts ---

EXPERTS, HIDDEN, CHANNELS, VOCABULARY = 4, 16, 12, 40
AUTOEP = {
    "enabled": True,
    "autoep_size": 2,
    "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
    "num_experts_attr": "num_experts",
    "route_norm": False,
}


def mixture() -> nn.Module:
    """OLMoE, whose experts AutoEP finds by a pattern of names."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            hidden_size=HIDDEN,
            intermediate_size=CHANNELS,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
            eos_token_id=1,
            attn_implementation="eager",
        )
    )


def with_all_experts() -> nn.Module:
    """The mixture as AutoEP makes it, in one process."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    model = mixture()
    converter = AutoEP(model, parse_autoep_config({**AUTOEP, "autoep_size": 1}))
    converter.replace_moe_layers(converter.ep_parser(), ep_size=1, ep_rank=0)
    return model


def marked_groups(groups: list[dict[str, Any]], experts: set[int], name: str) -> list[dict[str, Any]]:
    """Param groups as ZeRO 1 and 2 want them: experts in groups of their own.

    Args:
        groups: of all parameters.
        experts: ids of those of experts.
        name: of the expert-parallel groups of ranks.
    """
    result = []
    for number, group in enumerate(groups):
        for of_experts in (False, True):
            params = [param for param in group["params"] if (id(param) in experts) == of_experts]
            if params:
                marks = {"moe": True, "name": name} if of_experts else {"name": f"group {number}"}
                result.append({**group, "params": params, **marks})
    return result


class NativeMixture(nn.Module):
    """`deepspeed.moe.MoE` between two layers. Its experts have biases, and no token is dropped.

    Args:
        ep_size: ranks that share the experts.
    """

    def __init__(self, ep_size: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        expert = nn.Sequential(nn.Linear(8, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 8))
        self.moe = MoE(8, expert, num_experts=EXPERTS, ep_size=ep_size, k=1, drop_tokens=False, use_rts=False)
        self.last = nn.Linear(8, 4, bias=False)
        rank = torch.distributed.get_rank() % ep_size
        for i, local in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            number = rank * (EXPERTS // ep_size) + i
            generator = torch.Generator().manual_seed(100 + number)
            for param in local.parameters():
                param.data.copy_(torch.randn(param.shape, generator=generator) / 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(rows + self.moe(torch.tanh(self.first(rows)))[0])
