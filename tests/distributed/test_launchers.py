"""The training program under the real launchers, 2 CPU ranks each: same data, same zeros, a checkpoint that
reloads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.paths import ROOT
from lp_dist.report import schema

pytestmark = pytest.mark.long  # every launcher and engine in turn

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ACCELERATE = [*PYTHON, "accelerate.commands.launch", "--num_processes", "2"]
LAUNCHERS = {
    "deepspeed-zero1": (
        [*PYTHON, "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--module"],
        ["--deepspeed", "configs/ds_zero1.json"],
    ),
    "accelerate-ddp": ([*ACCELERATE, "--config_file", "configs/accelerate_ddp.yaml", "-m"], []),
    "accelerate-zero2": ([*ACCELERATE, "--config_file", "configs/accelerate_zero2.yaml", "-m"], []),
    "accelerate-zero3": ([*ACCELERATE, "--config_file", "configs/accelerate_zero3.yaml", "-m"], []),
}

# Under torchrun as well, one after the other in the same processes.
ENGINES = {
    "torchrun-ddp": [],
    "torchrun-zero3-offload": ["--deepspeed", "configs/ds_zero3_offload.json"],
    "torchrun-zero2-bf16": [
        "--deepspeed",
        "configs/ds_zero2.json",
        "--bf16",
        "true",
        "--gradient_checkpointing",
        "true",
    ],
}


def launch(launcher: list[str], words: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, "lp_dist.finetune", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="session")
def words(tiny_model, topics, cpu_op) -> list[str]:
    return [
        "--model",
        str(tiny_model),
        "--dataset",
        str(topics),
        "--block_size",
        "64",
        "--max_steps",
        "10",
        "--learning_rate",
        "1e-2",
        "--weight_decay",
        "0.1",
        "--precondition",
        "0",
        "--decay_start",
        "0.2",
        "--decay_end",
        "0.8",
        "--per_device_train_batch_size",
        "2",
        "--save_strategy",
        "no",
    ]


@pytest.fixture(scope="session")
def runs(words, tmp_path_factory, run_program) -> dict[str, Path]:
    """One run under each launcher and of each engine, by name; a failure shows what the launcher printed."""
    directories = {name: tmp_path_factory.mktemp("launchers") / name for name in (*ENGINES, *LAUNCHERS)}
    for name, (launcher, more) in LAUNCHERS.items():
        done = launch(launcher, [*words, *more, "--output_dir", str(directories[name])])
        assert done.returncode == 0, f"{name}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        assert done.stdout.count("Perplexity on held-out text") == 1, f"{name}: the table is for rank 0 alone"
    run_program([[*words, *more, "--output_dir", str(directories[name])] for name, more in ENGINES.items()])
    return directories


def test_every_launcher_leaves_a_sparse_checkpoint_that_reloads(runs):
    for name, out in runs.items():
        saved = schema.read(out)
        assert saved["world_size"] == 2, f"{name} ran alone"
        assert saved["zeros"] > 0.2 * saved["decayed_weights"], name
        assert saved["perplexity_after"] < saved["perplexity_before"], name
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == (torch.bfloat16 if "bf16" in name else torch.float32), name  # as the engine held it
        weights = model.state_dict()
        zeros = sum(
            int((w == 0).sum())
            for n, w in weights.items()
            if n in load_file(out / "model.safetensors") and "proj" in n
        )
        assert zeros == saved["zeros"], name


def test_every_launcher_reports_its_engine_and_the_sizes_of_all_weights(runs):
    before = {}
    for name, out in runs.items():
        saved, stage = schema.read(out), next((word[4] for word in name.split("-") if word.startswith("zero")), None)
        assert saved["engine"] == (
            "DDP" if stage is None else f"DeepSpeed ZeRO-{stage}" + (", offloaded" if "offload" in name else "")
        ), name
        histograms = saved["histograms"]
        assert histograms["zeros_after"] == saved["zeros"], name
        assert all(
            sum(histograms[when]) + histograms[f"zeros_{when}"] == saved["decayed_weights"]
            for when in ("before", "after")
        ), name
        before[name] = {edge: count for edge, count in zip(histograms["edges"], histograms["before"]) if count}
        assert before[name] == before["torchrun-ddp"], name
        assert (out / "report.html").exists(), name


def test_the_same_run_under_every_engine(runs):
    """ZeRO and DDP average the gradients of the ranks in different orders, so weights agree to rounding, and the sets
    of zeros but for weights that stand exactly on the edge."""
    wanted = load_file(runs["torchrun-ddp"] / "model.safetensors")
    for name, out in runs.items():
        if "bf16" in name:
            continue  # other gradients
        weights = load_file(out / "model.safetensors")
        assert weights.keys() - wanted.keys() <= {
            "lm_head.weight"
        }  # DeepSpeed's state dict forgets that the head is tied
        weights = {n: weights[n] for n in wanted}
        different = sum(int(((w == 0) != (wanted[n] == 0)).sum()) for n, w in weights.items())
        assert different <= 2, f"{name}: {different} zeros differ from DDP's"
        worst = max(float((w - wanted[n]).abs().max()) for n, w in weights.items())
        assert worst < 1e-4, f"{name}: a weight is {worst} away from DDP's"


def test_accelerates_swap_of_the_optimizer_under_offload_is_refused(words, tmp_path):
    """Trap 1: the Lp decay would be gone without a word."""
    config = json.loads((ROOT / "configs" / "ds_zero3_offload.json").read_text())
    del config["zero_force_ds_cpu_optimizer"]
    (tmp_path / "ds.json").write_text(json.dumps(config))
    done = launch(TORCHRUN, [*words, "--deepspeed", str(tmp_path / "ds.json"), "--output_dir", str(tmp_path / "out")])
    assert done.returncode != 0
    assert "lp-dist: error" in done.stderr and '"zero_force_ds_cpu_optimizer": false' in done.stderr


def test_fsdp_that_would_silently_be_ddp_is_refused(words, tmp_path):
    """Accelerate has FSDP on accelerators alone; on CPUs it takes the config and runs DDP."""
    assert not torch.accelerator.is_available(), (
        "on a machine with an accelerator run this test with CUDA_VISIBLE_DEVICES="
    )
    launcher = [*ACCELERATE, "--config_file", "configs/accelerate_fsdp2.yaml", "-m"]
    done = launch(launcher, [*words, "--output_dir", str(tmp_path / "out")])
    assert done.returncode != 0
    assert "FSDP was requested" in done.stderr and not (tmp_path / "out" / schema.FILE).exists()
