"""A teacher on several ranks: sharded where the model is, and the same training as in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import student
from lp_dist.report import schema
from lp_dist.sharding.engines import unwrap
from lp_dist.training import finetune
from lp_dist.training.distillation import sharded_alike


@pytest.fixture(scope="session")
def words(tiny_model, topics, cpu_op, tmp_path_factory) -> list[str]:
    """The teacher is another one than the model, so that being taught shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher = tmp_path_factory.mktemp("teacher")
    shutil.copytree(tiny_model, teacher, dirs_exist_ok=True)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model)).save_pretrained(teacher)
    return [
        "--model",
        str(tiny_model),
        "--dataset",
        str(topics),
        "--block_size",
        "64",
        "--max_steps",
        "16",
        "--learning_rate",
        "3e-3",
        "--sparsity",
        "0.5",
        "--per_device_train_batch_size",
        "2",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
        "--max_eval_blocks",
        "4",
        "--teacher",
        str(teacher),
        "--distill",
        "0.7",
    ]


WAYS = {
    "ddp": [],
    "zero3": ["--deepspeed", "configs/ds_zero3.json"],
    "zero2-bf16": ["--deepspeed", "configs/ds_zero2.json", "--bf16", "true"],
}


@pytest.fixture(scope="session")
def runs(words, tmp_path_factory, run_program) -> dict[str, Path]:
    out = {name: tmp_path_factory.mktemp("taught") / name for name in ("alone", *WAYS)}
    finetune.main(
        [*words, "--gradient_accumulation_steps", "2", "--output_dir", str(out["alone"])]
    )  # the ranks' batches, one after the other
    run_program([[*words, *more, "--output_dir", str(out[name])] for name, more in WAYS.items()])
    return out


@pytest.mark.long
def test_ranks_that_share_a_teacher_come_to_what_one_process_does(runs):
    """To rounding: gradients are averaged in other orders."""
    wanted = load_file(runs["alone"] / "model.safetensors")
    first = {
        name: next(entry["loss"] for entry in schema.read(out)["log"] if "loss" in entry) for name, out in runs.items()
    }
    for name, engine in zip(WAYS, ("DDP", "DeepSpeed ZeRO-3", "DeepSpeed ZeRO-2")):
        assert (schema.read(runs[name])["world_size"], schema.read(runs[name])["engine"]) == (2, engine)
        assert schema.read(runs[name])["decay"]["distill"] == 0.7
        assert first[name] == pytest.approx(first["alone"], rel=2e-2 if "bf16" in name else 1e-4), name
        assert schema.read(runs[name])["sparsity"] == pytest.approx(0.5, abs=2e-3), name
    for name in ("ddp", "zero3"):
        weights = load_file(runs[name] / "model.safetensors")
        zeros = [sum(int((w == 0).sum()) for w in state_dict.values()) for state_dict in (weights, wanted)]
        assert abs(zeros[0] - zeros[1]) <= 4, name
        apart = torch.cat([(weights[key] - w).abs().flatten() for key, w in wanted.items()])
        assert float(apart.mean()) < 1e-5 and float((apart > 1e-3).float().mean()) < 1e-3, (
            f"{name}: {float(apart.mean())}, {float(apart.max())}"
        )


@pytest.mark.long
def test_the_teacher_s_term_is_in_the_loss(runs, words, tmp_path):
    plain = [word for word in words if word not in ("--teacher", "--distill", "0.7") and "teacher" not in word]
    finetune.main([*plain, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path)])
    with_teacher, without_teacher = (
        load_file(path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        for path in (runs["alone"], tmp_path)
    )
    assert float((with_teacher - without_teacher).abs().max()) > 1e-3


def _sharded(accelerator: SimpleNamespace, rank: int) -> tuple[torch.nn.Module, dict]:
    """The teacher as it is on this rank, and how it compares with the unsharded teacher."""
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        unsharded_logits = student(7).eval()(ids).logits
        teacher = sharded_alike(student(7), accelerator)
        same = torch.equal(teacher(input_ids=ids).logits, unsharded_logits)
    return teacher, {
        "same": same,
        "trains": any(param.requires_grad for param in teacher.parameters()),
        "mode": unwrap(teacher).training,
    }


def _fsdp2(rank: int, world_size: int) -> dict:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    # What accelerate's own has; on CPUs it would make none for FSDP.
    teacher, results = _sharded(
        SimpleNamespace(
            distributed_type="FSDP",
            is_fsdp2=True,
            state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None),
            mixed_precision="no",
            device=torch.device("cpu"),
            is_main_process=rank == 0,
        ),
        rank,
    )
    params = list(teacher.parameters())
    return {
        **results,
        "here": sum(param.to_local().numel() for param in params) / sum(param.numel() for param in params),
    }


def _zero3(rank: int, world_size: int) -> dict:
    config = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu"},
        }
    }
    teacher, results = _sharded(
        SimpleNamespace(
            distributed_type="DEEPSPEED",
            state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)),
            device=torch.device("cpu"),
        ),
        rank,
    )
    params = list(teacher.parameters())
    assert sum(param.numel() for param in params) == 0, "gathered after the pass"
    return {
        **results,
        "here": sum(param.ds_tensor.numel() for param in params) / sum(param.ds_numel for param in params),
    }


@pytest.mark.parametrize("engine", [_fsdp2, _zero3])
def test_engines_that_shard_weights_shard_the_teacher_as_well(engine, run_ranks):
    for results in run_ranks(engine, 2):
        assert results == {"same": True, "trains": False, "mode": False, "here": pytest.approx(0.5, abs=0.05)}
