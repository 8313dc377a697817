"""Shared by the tests: adapters of every kind, and a Llama that they go on."""

from __future__ import annotations

import peft
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaForCausalLM

from helpers.models import tiny_llama
from lp_dist.sparsity.selection import matrix_names

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "LoRA": LoraConfig(r=2, target_modules=EVERYWHERE),
    "rank-stabilised": LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=EVERYWHERE),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=EVERYWHERE),
    "LoKr": peft.LoKrConfig(r=2, target_modules=EVERYWHERE),
    "IA3": peft.IA3Config(target_modules=EVERYWHERE, feedforward_modules=["down_proj"]),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
}


def llama(sparsity: float = 0.0) -> LlamaForCausalLM:
    model = tiny_llama(num_hidden_layers=2, bos_token_id=0, eos_token_id=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in matrix_names(model):
                param[torch.rand(param.shape, generator=generator) < sparsity] = 0.0
    return model


def unfrozen(model: nn.Module) -> nn.Module:
    for name, param in model.named_parameters():
        if name.endswith("base_layer.weight"):
            param.requires_grad_(True)
    return model
