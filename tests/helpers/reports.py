"""Reports as a run writes them, with numbers that can be counted by hand."""

from __future__ import annotations

import copy
from typing import Any

# zeros and weights: kinds of two layers, in the order of a model
TENSORS = {
    "model.layers.0.self_attn.q_proj.weight": [8, 16],
    "model.layers.0.mlp.up_proj.weight": [8, 32],
    "model.layers.0.mlp.down_proj.weight": [4, 32],
    "model.layers.1.self_attn.q_proj.weight": [12, 16],
    "model.layers.1.mlp.up_proj.weight": [16, 32],
    "model.layers.1.mlp.down_proj.weight": [0, 32],
}
_ZEROS, _WEIGHTS = 48, 160
_UPDATES = {
    4: (0.1, 0.08, 1e-4),
    8: (0.25, 0.24, 2e-4),
    12: (0.3, 0.3, 1e-30),
    16: (0.3, 0.3, 3e-4),
}  # plan, counted, λ


def full() -> dict[str, Any]:
    """With everything that a report has: 16 steps, a window from 2 to 12, a dense run beside it."""
    log: list[dict[str, Any]] = [{"eval_loss": 3.0, "eval_perplexity": 20.0, "eval_sparsity": 0.0, "step": 0}]
    for step, (plan, counted, strength) in _UPDATES.items():
        log.append(
            {
                "loss": 3.0 - step / 16,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "step": step,
                "lp/target": 0.3,
                "lp/plan": plan,
                "lp/measured": counted,
                "lp/near_zero": counted,
                "lp/dead_channels": 0.0,
                "lp/lambda_min": strength / 2,
                "lp/lambda_median": strength,
                "lp/lambda_max": 2 * strength,
            }
        )
        log.append({"eval_loss": 2.5, "eval_perplexity": 20.0 - step / 2, "eval_sparsity": counted, "step": step})
    log += [
        {"train_runtime": 3724.2, "train_loss": 2.5, "step": 16},
        {"eval_loss": 2.5, "eval_perplexity": 12.0, "eval_sparsity": 0.3, "step": 16},
    ]
    dense = {
        "output_dir": "runs/dense",
        "steps": 16,
        "parameters": 1_000,
        "zeros": 0,
        "sparsity": 0.0,
        "sparsity_of_all": 0.0,
        "perplexity_after": 11.25,
        "log": [
            {"step": 0, "eval_perplexity": 20.0},
            {"step": 4, "loss": 2.5},
            {"step": 16, "loss": 2.0},
            {"step": 16, "eval_perplexity": 11.25},
        ],
    }
    return copy.deepcopy(
        {
            "version": 3,
            "output_dir": "runs/sparse",
            "command": "lp-dist finetune --model hub/small --sparsity 0.3",
            "model": "hub/small",
            "dataset": "hub/text",
            "configuration": {
                "model": "hub/small",
                "sparsity": 0.3,
                "bf16": True,
                "lr_scheduler_kwargs": {"num_cycles": 2},
            },
            "decay": {"sparsity": 0.3, "p": 0.5, "cutoff": "inf", "teacher": None, "distill": 0.5},
            "sparsity_before": 0.0,
            "parameters": 1_234_567,
            "histograms": {
                "edges": [0.125, 0.1875, 0.25, 0.5, 1.0],
                "before": [40, 40, 60, 20],
                "after": [16, 24, 56, 16],
                "zeros_before": 0,
                "zeros_after": _ZEROS,
            },
            "window": [2, 12],
            "target": {
                "sparsity": 0.3,
                "final_pruning": {"before": 0.29, "after": 0.3, "pruned_at_end": 0.01},
                "left_dense": "",
            },
            "groups": None,
            "reference": dense,
            "perplexity_before": 20.0,
            "perplexity_after": 12.0,
            "sparsity": _ZEROS / _WEIGHTS,
            "sparsity_of_all": _ZEROS / 1_234_567,
            "zeros": _ZEROS,
            "decayed_weights": _WEIGHTS,
            "kinds": {"down_proj": [4, 64], "q_proj": [20, 32], "up_proj": [24, 64]},
            "tensors": TENSORS,
            "steps": 16,
            "seconds": 3724.2,
            "engine": "DeepSpeed ZeRO-2",
            "world_size": 2,
            "environment": {
                "system": "Linux",
                "processor": "a processor",
                "cores": 2,
                "device": "CPU",
                "threads": 1,
                "ranks": 2,
            },
            "weight_decay": 0.0,
            "learning_rate": 1e-3,
            "seed": 7,
            "versions": {"lp_dist": "0.1.0", "torch": "2.13.0"},
            "log": log,
            "next": "python -c \"print('next')\"",
        }
    )


def dense() -> dict[str, Any]:
    """A dense fine-tune without zeros."""
    log = [{key: value for key, value in entry.items() if not key.startswith("lp/")} for entry in full()["log"]]
    return full() | {
        "zeros": 0,
        "sparsity": 0.0,
        "sparsity_of_all": 0.0,
        "target": None,
        "window": None,
        "reference": None,
        "tensors": {name: [0, count] for name, (_, count) in TENSORS.items()},
        "kinds": {"q_proj": [0, 32], "up_proj": [0, 64], "down_proj": [0, 64]},
        "log": [entry | ({"eval_sparsity": 0.0} if "eval_sparsity" in entry else {}) for entry in log],
    }


def by_lambda() -> dict[str, Any]:
    """With a λ by hand: evaluations count the zeros, and nothing is planned."""
    log = [{key: value for key, value in entry.items() if not key.startswith("lp/")} for entry in full()["log"]]
    return full() | {"target": None, "weight_decay": 0.1, "log": log}


def bare() -> dict[str, Any]:
    """With every entry empty that may be: no reference, window, time or weights that were counted one by one."""
    return full() | {
        "configuration": {"cutoff": "inf"},
        "histograms": {"edges": [1.0], "before": [], "after": [], "zeros_before": 0, "zeros_after": _ZEROS},
        "window": None,
        "reference": None,
        "tensors": {},
        "seconds": None,
    }


def stopped() -> dict[str, Any]:
    """Stopped after 8 of its 16 steps."""
    log = [entry for entry in full()["log"] if entry["step"] <= 8]
    return full() | {"steps": 8, "log": log, "target": {"sparsity": 0.3, "final_pruning": None, "left_dense": ""}}
