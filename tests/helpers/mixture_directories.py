"""Shared by the tests: tiny mixtures with a tokenizer, as directories that the training program reads, and an
independent count of what it saved.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.saved_models import files_of, saved_model
from lp_dist.report import schema
from lp_dist.report.inspection import inspect

# Of a run to half of the weights, in a few steps.
TO_HALF = [
    "--block_size",
    "64",
    "--max_steps",
    "18",
    "--learning_rate",
    "1e-2",
    "--sparsity",
    "0.5",
    "--decay_start",
    "0.2",
    "--decay_end",
    "0.9",
    "--per_device_train_batch_size",
    "2",
    "--eval_strategy",
    "no",
    "--max_eval_blocks",
    "2",
    "--save_strategy",
    "no",
]


def mixture_directory(directory: Path, name: str, tokenizer: Path) -> Path:
    """A model of SAVED_MODELS with the tokenizer of another directory, whose vocabulary it gets."""
    model = saved_model(name)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.05)
    model.resize_token_embeddings(384)
    model.save_pretrained(directory)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def check_figures(directory: Path) -> None:
    """Asserts that the report, `inspect` and the files have the same zeros, counted in three ways."""
    saved, inspection, files = schema.read(directory), inspect(directory), files_of(directory)
    params = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    counts = {name: [int((params[name] == 0).sum()), params[name].numel()] for name in saved["tensors"]}
    assert saved["tensors"] == counts
    zeros, elements = (sum(column) for column in zip(*counts.values()))
    assert (saved["zeros"], saved["decayed_weights"]) == inspection.total() == (zeros, elements)
    assert [tensor.zeros for tensor in inspection.tensors] == [
        int((files[tensor.name] == 0).sum()) for tensor in inspection.tensors
    ]
    assert len(inspection.tensors) == len(files)
