"""Shared by the tests: a small model of every family that transformers has, and the weights of its groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lp_dist.structured.groups import Member, WeightGroups

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=61,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
# Sizes, and how many channels, heads of the queries, heads of keys and values, experts, and channels of each expert a
# layer has; 0: these are not recognised. Without the last two: it has no experts.
FAMILIES: dict[str, tuple[dict, tuple[int, ...]]] = {
    "llama": (GROUPED, (48, 4, 2)),
    "mistral": (GROUPED, (48, 4, 2)),
    "qwen2": (GROUPED, (48, 4, 2)),
    "qwen3": ({**GROUPED, "head_dim": 16}, (48, 4, 2)),
    "gemma2": ({**GROUPED, "head_dim": 16}, (48, 4, 2)),
    "gemma3_text": ({**GROUPED, "head_dim": 16}, (48, 4, 2)),
    "phi3": (GROUPED, (48, 4, 2)),
    "gpt_neox": (SIZES, (48, 4, 4)),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0), (128, 4, 4)),
    "opt": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, (48, 4, 4)),
    "bert": ({**SIZES, "is_decoder": True}, (48, 4, 4)),
    "olmo2": (GROUPED, (48, 0, 0)),  # its norms of queries and keys go over all heads
    "falcon": (
        dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, bos_token_id=0, eos_token_id=0
        ),
        (128, 0, 0),
    ),
    "mixtral": (GROUPED, (0, 4, 2, 8, 48)),
}
# Mixtures alone: sizes, and how many experts a layer has and channels an expert. Layouts of all kinds: rows and
# columns the other way round, gate and up in turns, with biases, without a gate, routed by groups.
MIXTURES: dict[str, tuple[dict, tuple[int, int]]] = {
    "mixtral": (GROUPED, (8, 48)),
    "qwen3_moe": ({**EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}, (4, 24)),
    "gpt_oss": ({**EXPERTS, "head_dim": 8, "num_local_experts": 4}, (4, 48)),
    "llama4_text": (
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
        (4, 48),
    ),
    "minimax_m2": ({**EXPERTS, "head_dim": 8, "num_local_experts": 4}, (4, 48)),
    "deepseek_v3": (
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        (8, 24),
    ),
    "nemotron_h": (
        {
            **{key: value for key, value in EXPERTS.items() if key != "num_hidden_layers"},
            "layers_block_type": ["moe", "attention", "moe"],
            "head_dim": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
        },
        (4, 24),
    ),
}


def model_of(family: str, **more: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**(FAMILIES | MIXTURES).get(family, ({},))[0], **more})
    ).eval()
    with torch.no_grad():
        for param in model.parameters():  # biases start at zero, and would mask what forgets them
            param.add_(torch.randn(param.shape) * 0.1)
    return model


def slots(model: nn.Module, groups: WeightGroups, group: int, reads: bool) -> list[torch.Tensor]:
    """Views of the group's weights, as inputs of what reads it or as its own."""
    params = dict(model.named_parameters())
    return [
        view
        for member in groups.members
        if member.reads == reads and (view := slot_of(params[member.name].data, member, group)) is not None
    ]


def slot_of(tensor: torch.Tensor, member: Member, group: int) -> torch.Tensor | None:
    """A view of what a group has of a parameter, or of its gradient; None where it has nothing of it."""
    number = group - member.first
    if not 0 <= number < (member.stop - member.start) // member.width:
        return None
    tensor, dim = (tensor, member.dim) if member.expert is None else (tensor[member.expert], member.dim - 1)
    return tensor.narrow(dim, member.start + number * member.width, member.width)


def kill(model: nn.Module, groups: WeightGroups, dead: Iterable[int]) -> None:
    """Zeroes what reads these groups, and nothing else of theirs."""
    for group in dead:
        for slot in slots(model, groups, group, reads=True):
            slot.zero_()


class Own(nn.Module):
    """A layer that nothing is known of: two first layers, the last one before them."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.left, self.right, self.slope = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6), nn.PReLU(6)
