"""`lp-dist bench counting`: what counting zeros costs, as a share of the training steps between two counts."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lp_dist.benchmarks.timing import benchmark_device, median_seconds
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.report import environment
from lp_dist.sparsity.measure import measure_histogram, measure_sparsity
from lp_dist.sparsity.selection import param_groups


def counting(
    layers: int = 30, hidden_size: int = 576, tokens: int = 512, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Times counting zeros and a histogram of |w|, and a training step of the same Llama with random weights.

    The defaults have the shape of SmolLM2-135M, and as many tokens a step as the demo.

    Args:
        layers: of the model.
        hidden_size: width of the model; a head has 64.
        tokens: of a training step.
        repeats: timed calls; the medians are reported.
        seed: of the weights and tokens.
    Returns:
        One row: medians in seconds, their shares of 10 training steps, and where it was measured.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    device = benchmark_device()
    heads = max(1, hidden_size // 64)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 or 1,
            tie_word_embeddings=True,
        )
    ).to(device)
    optimizer = LpAdamW(param_groups(model, 0.03), lr=3e-4)
    batch = torch.randint(0, 49152, (1, tokens), device=device)

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {"step": step, "count": lambda: measure_sparsity(model), "histogram": lambda: measure_histogram(model)}
    times = {name: median_seconds(name, call, repeats) for name, call in calls.items()}
    return {
        "benchmark": "counting",
        "seconds": times,
        "share of 10 steps": times["count"] / (10 * times["step"]),
        "share of 10 steps, histogram": times["histogram"] / (10 * times["step"]),
        "weights counted": measure_sparsity(model).elements,
        "tokens a step": tokens,
        "seed": seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": environment.versions(),
    }
