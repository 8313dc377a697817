"""Short runs of the models of `helpers.architectures`, shared by the tests of all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from helpers.architectures import Architecture, loss_of
from lp_dist import LpAdamW, SparsityTarget, attach, param_groups

WRITES = os.environ.get("LP_DIST_WRITE_DOCS") == "1"
STEPS, START = 12, 3
# Of each kind: language models with and without shared keys and values, fused layers, experts, state spaces, an
# encoder-decoder, a classifier, images, sound, both towers, a vision-language model.
SAMPLE = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "Phi3ForCausalLM",
    "MixtralForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "MambaForCausalLM",
    "T5ForConditionalGeneration",
    "DebertaV2ForSequenceClassification",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "CLIPModel",
    "Qwen2_5_VLForConditionalGeneration",
]
# Pruning groups takes longest.


def sampled(names: Iterable[str], sample: list[str] = SAMPLE) -> list[Any]:
    return [name if name in sample else pytest.param(name, marks=pytest.mark.long) for name in names]


def train(architecture: Architecture, model: Any, target: SparsityTarget) -> dict[str, torch.Tensor]:
    """A few steps to a target, on random inputs.

    Returns:
        {name: bool, whether a parameter had a gradient before step START; of each expert where it has several}.
    """
    model.train()
    reached = {
        name: torch.zeros(len(p) if is_stack(model, name) else 1, dtype=bool) for name, p in model.named_parameters()
    }
    optimizer = LpAdamW(param_groups(model), lr=1e-2)
    attached = attach(model, optimizer, target=target, total_steps=STEPS)
    for step in range(STEPS):
        torch.manual_seed(step)
        loss_of(model(**architecture.inputs(model.config))).backward()
        for name, param in model.named_parameters() if step < START else ():
            if param.grad is not None:
                # What is too small for a second moment, without denormals, is no gradient.
                second = 1e-3 * param.grad.square()
                reached[name] |= (second > torch.finfo(second.dtype).tiny).view(len(reached[name]), -1).any(1)
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step()
    attached.finish()
    return reached


def is_stack(model: Any, name: str) -> bool:
    """Whether a parameter has several matrices, and is not a convolution's."""
    owner = model.get_submodule(name.rpartition(".")[0])
    param = model.get_parameter(name)
    return param.dim() == 3 and min(param.shape) > 1 and not isinstance(owner, torch.nn.modules.conv._ConvNd)
