"""Models and a task for the tests of the bench of quality."""

from __future__ import annotations

import torch

from lp_dist.benchmarks.quality import methods
from lp_dist.benchmarks.quality.tasks import Schedule, Task, Text

STEPS, SPARSITY = 40, 0.6
LINES = [
    "dense",
    *methods.BASELINES[1:],
    "magnitude:at=0.5,scope=global",
    "lp",
    "lp:scope=layer",
    "trust_region",
    "elsa",
    "elsa:end=1,interval=5,penalty=0.1,scope=layer",
    "lp:cap=none,latent_windows=0,lr=0.001,p=0",
]


def gpt2(seed: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=17,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            use_cache=False,
        )
    )


def tiny() -> Task:
    tokens = torch.arange(3000) * 7 % 17 * (torch.arange(3000) % 3) % 17
    return Task(
        "tiny",
        Text(tokens[:2500], tokens[2500:], 17, "counting"),
        gpt2,
        Schedule(20, 3e-3, 2),
        Schedule(STEPS, 3e-3, 2),
        rows=4,
        block=16,
        evaluated=20,
    )
