"""Shared by the tests: a small model of every family that transformers has, and the weights of its groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lp_dist.structured.groups import WeightGroups

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
# Sizes, and how many channels, heads of the queries, and heads of keys and values a layer has; 0: these are not
# recognised.
FAMILIES: dict[str, tuple[dict, tuple[int, int, int]]] = {
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
    "mixtral": (GROUPED, (0, 4, 2)),  # its experts are one tensor
}


def model_of(family: str, **more: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**FAMILIES.get(family, ({},))[0], **more})
    ).eval()
    with torch.no_grad():
        for param in model.parameters():  # biases start at zero, and would mask what forgets them
            param.add_(torch.randn(param.shape) * 0.1)
    return model


def slots(model: nn.Module, groups: WeightGroups, group: int, reads: bool) -> list[torch.Tensor]:
    """Views of the group's weights, as inputs of what reads it or as its own."""
    params = dict(model.named_parameters())
    return [
        params[member.name].data.narrow(member.dim, member.start + group * member.width, member.width)
        for member in groups.members
        if member.reads == reads
    ]


class Own(nn.Module):
    """A layer that nothing is known of: two first layers, the last one before them."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.left, self.right, self.slope = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6), nn.PReLU(6)
