"""Trainer with a model that transformers has sharded itself (`DistributedConfig`): FSDP2, replicas of shards, experts
spread over ranks; to the zeros in the saved files. Trainer resumes no such model, and says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from helpers import axes
from helpers.engines import quiet
from lp_dist import LpAdamW, LpCallback, SparsityTarget, measure_sparsity
from lp_dist.report.saved_zeros import count_saved
from lp_dist.sparsity.selection import matrix_names

STEPS = 24
WAYS = {
    "fsdp2": ((("fsdp_size", 4),), axes.dense, SparsityTarget(0.5)),
    "hsdp": ((("fsdp_size", 2), ("dp_replicate_size", 2)), axes.dense, SparsityTarget(pattern="2:4")),
    # Trainer makes a param group for the parameters of each mesh.
    "experts": ((("fsdp_size", 4), ("ep_size", 2)), axes.mixture, SparsityTarget(0.5)),
}
RESUMED = "Resuming is not supported for models sharded at load time"
REFUSED = (("fsdp_size", 2), ("tp_size", 2), ("tp_plan", "auto"))
# What Accelerate says on a CPU to every model that is sharded by tensor parallelism.
ANSWER = "ParallelismConfig is only compatible DistributedType.FSDP (version 2)"


def trainer_of(way: axes.Loaded, model: Any, directory: Path, target: SparsityTarget, **arguments: Any) -> Trainer:
    tokens = torch.randint(0, 40, (96, 8), generator=torch.Generator().manual_seed(0))
    return Trainer(
        model=way.shard(model),
        args=TrainingArguments(
            str(directory),
            max_steps=STEPS,
            learning_rate=4e-3,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **{"save_strategy": "no", **arguments},
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens],
        optimizer_cls_and_kwargs=(LpAdamW, {}),
        callbacks=[LpCallback(target=target)],
    )


def on_ranks(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    quiet()
    results: dict[str, Any] = {}
    for name, (config, model_of, target) in WAYS.items():
        way = axes.Loaded(config, str(directory / "model"))
        trainer = trainer_of(way, model_of(), directory / name, target)
        trainer.train()
        trainer.save_model(str(directory / name))
        counts = measure_sparsity(trainer.model)
        results[name] = {
            "counts": (counts.zeros, counts.elements),
            "saved": count_saved(directory / name, matrix_names(trainer.model)).zeros,
            "weights": {key: axes.complete(param) for key, param in trainer.model.named_parameters()},
            "param groups": len(trainer.optimizer.param_groups),
        }
    model = axes.dense()
    with pytest.raises(ValueError) as error:
        trainer_of(axes.Loaded(REFUSED, str(directory / "model")), model, directory / "refused", SparsityTarget(0.5))
    with pytest.raises(ValueError, match=RESUMED):
        trainer_of(way, model_of(), directory / "resumed", target, save_strategy="steps")
    return results | {"refused": str(error.value)}


@pytest.mark.long
def test_trainer_with_what_transformers_shards(run_ranks, tmp_path):
    by_rank = run_ranks(on_ranks, 4, tmp_path)
    for name in WAYS:
        for results in by_rank:
            zeros, elements = results[name]["counts"]
            assert zeros == round(elements / 2) == results[name]["saved"]
        files = load_file(tmp_path / name / "model.safetensors")
        if name != "experts":
            assert all(torch.equal(files[key], value) for key, value in by_rank[0][name]["weights"].items())
    assert by_rank[0]["experts"]["param groups"] > 2
    assert all(ANSWER in results["refused"] for results in by_rank)
