"""Shared by the tests: tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def small_model() -> nn.Sequential:
    """Odd sizes, so that every split over two ranks is uneven or padded; a third of the weights are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False), nn.Linear(3, 1))
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand_like(param) < 1 / 3] = 0
    return model


SMALL_MATRICES = {"0.weight", "2.weight", "3.weight"}


def tiny_llama(seed: int = 0, **sizes: int) -> Any:
    """Some thousand weights; sizes: other ones than these."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 32,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                **sizes,
            }
        )
    )


def student(seed: int = 0, vocabulary: int = 32) -> Any:
    """What is taught, and from another seed its teacher."""
    return tiny_llama(seed, vocab_size=vocabulary, intermediate_size=40, num_hidden_layers=2)
