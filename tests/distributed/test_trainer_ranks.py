"""Trainer on two ranks, under DeepSpeed: its arguments are the optimizer's defaults, and what the callback
says of the best model is what a save writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from helpers.engines import deepspeed_config, full, quiet
from helpers.trainer_runs import END, train
from lp_dist import LpAdamW, LpCallback, SparsityTarget
from lp_dist.sharding.deepspeed import join_deepspeed
from lp_dist.sharding.engines import unwrap

STAGES = ("zero2", "zero3")
ARGUMENTS = {
    "learning_rate": 2e-3,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
}
NAMED = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-6}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "load_best_model_at_end": True,
}


class Worse(Trainer):
    """Its evaluations get worse from step to step."""

    def __init__(self, **kwargs) -> None:
        super().__init__(eval_dataset=kwargs["train_dataset"][:8], **kwargs)

    def _determine_best_metric(self, metrics, trial):
        metrics["eval_loss"] = 1.0 + self.state.global_step / 100
        return super()._determine_best_metric(metrics, trial)


def engine_of(stage: str) -> dict[str, Any]:
    config = deepspeed_config(stage, train_micro_batch_size_per_gpu="auto", gradient_clipping="auto")
    if stage == "zero3":
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return {"deepspeed": config}


def on_two_ranks(rank: int, world_size: int, directory: Path) -> dict[str, dict[str, Any]]:
    quiet()
    join_deepspeed()
    seen: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        weights = []
        for kwargs in ({}, NAMED):
            trainer = train(
                directory / f"{stage} {len(kwargs)}",
                [LpCallback(target=SparsityTarget(0.5))],
                ways=lambda model, kwargs=kwargs: {"optimizer_cls_and_kwargs": (LpAdamW, kwargs)},
                **ARGUMENTS,
                **engine_of(stage),
            )
            module = unwrap(trainer.model_wrapped)
            weights.append({name: full(param) for name, param in module.named_parameters()})
        differs = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
        callback = LpCallback(target=SparsityTarget(0.5))
        trainer = train(
            directory / f"{stage} best",
            [callback],
            ways=lambda model: {"optimizer_cls_and_kwargs": (LpAdamW, {})},
            trainer=Worse,
            **BEST,
            **engine_of(stage),
        )
        trainer.save_model(str(directory / f"{stage} model"))
        torch.distributed.barrier()
        saved = load_file(directory / f"{stage} model" / "model.safetensors")
        matrices = [saved[name] for name in callback.attached.decayed]
        seen[stage] = {
            "differs": differs,
            "best": trainer.state.best_global_step,
            "said": callback.attached.logs["lp/measured"],
            "saved": sum(int((m == 0).sum()) for m in matrices) / sum(m.numel() for m in matrices),
        }
    return seen


@pytest.mark.long
def test_arguments_are_defaults_and_what_is_said_of_the_best_model_is_in_the_file(run_ranks, tmp_path_factory):
    for seen in run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("trainers")):
        for stage in STAGES:
            assert seen[stage]["differs"] == [], stage
            assert seen[stage]["best"] == 18 >= END - 1, stage
            assert seen[stage]["said"] == seen[stage]["saved"] == pytest.approx(0.5, abs=1e-3), stage
