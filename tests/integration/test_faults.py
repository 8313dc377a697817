"""What goes wrong in long runs of the training program: killed ranks, a full disk, a broken checkpoint, another script
on an old one.

Each ends in a clear error or in the run that was meant, never in another run without a word. The engines without the
program are in test_broken_checkpoints.py, inf and nan gradients in test_skipped_steps.py, ranks with different configs
in test_attach_ranks.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.damage import Touching
from helpers.paths import ROOT
from lp_dist.report import schema
from lp_dist.training import finetune

SEED = int(os.environ.get("LP_DIST_SEED", random.randrange(1000)))  # of the kills; a failure tells it

# -- killed ranks -------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
import torch, transformers
from lp_dist.training import arguments, finetune

runs, hook, step, ranks = json.loads(sys.argv[1])

def kill(self, args, state, control, **kwargs):
    if args.output_dir == runs[-1][-1] and state.global_step == step and args.process_index in ranks:
        os.kill(os.getpid(), signal.SIGKILL)

transformers.trainer.DEFAULT_CALLBACKS.append(type("Killer", (transformers.TrainerCallback,), {hook: kill}))
for words in runs:
    finetune.run(*arguments.parse(words))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def words(tiny_model, topics) -> list[str]:
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
        "0.7",
        "--per_device_train_batch_size",
        "2",
        "--logging_steps",
        "1",
        "--save_steps",
        "3",
        "--use_cpu",
        "true",
    ]


def launched(
    script: Path, runs: list[list[str]], kill: tuple[str, int, list[int]] = ("on_step_end", -1, [])
) -> subprocess.CompletedProcess:
    """Runs one after the other under torchrun, and in the last one kills these ranks in this hook of this step."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        json.dumps([runs, *kill]),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_killed_runs_resume_to_the_weights_of_the_uninterrupted_ones(words, cpu_op, tmp_path):
    """ZeRO-2 with one of two ranks killed, ZeRO-3 with both, anywhere between two saves; learning rates and losses as
    well.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    chance = random.Random(SEED)

    def run(name: str, stage: int, *more: str) -> list[str]:
        return [
            *words,
            "--deepspeed",
            f"configs/ds_zero{stage}.json",
            *more,
            "--output_dir",
            str(tmp_path / f"{name}{stage}"),
        ]

    def kill(ranks: list[int]) -> tuple[str, int, list[int]]:
        return (
            chance.choice(["on_step_begin", "on_pre_optimizer_step", "on_step_end"]),
            chance.choice([4, 5, 7, 8]),
            ranks,
        )

    again = ["--resume_from_checkpoint", "true"]
    for runs, death in (
        ([run("uninterrupted", 2), run("uninterrupted", 3), run("killed", 2)], kill([chance.randrange(2)])),
        ([run("killed", 2, *again), run("killed", 3)], kill([0, 1])),
        ([run("killed", 3, *again)], None),
    ):
        done = launched(tmp_path / "script.py", runs, *([death] if death else []))
        assert (done.returncode != 0 and "SIGKILL" in done.stderr) if death else done.returncode == 0, (
            f"seed {SEED}: {done.stderr[-6000:]}"
        )
        assert Path(runs[-1][-1], schema.FILE).exists() == (death is None), f"seed {SEED}"
    for stage in (2, 3):
        uninterrupted, killed = (
            load_file(tmp_path / f"{name}{stage}" / "model.safetensors") for name in ("uninterrupted", "killed")
        )
        assert sum(int((w == 0).sum()) for w in uninterrupted.values()) > 1000
        assert [name for name, w in uninterrupted.items() if not torch.equal(w, killed[name])] == [], (
            f"ZeRO-{stage}, seed {SEED}"
        )
        logged = [
            [
                (entry["step"], entry["learning_rate"], entry["loss"])
                for entry in schema.read(tmp_path / f"{name}{stage}")["log"]
                if "learning_rate" in entry
            ]
            for name in ("uninterrupted", "killed")
        ]
        assert logged[0] == logged[1] and len(logged[0]) == 10, f"ZeRO-{stage}, seed {SEED}"


# -- full disks, broken checkpoints, another script ---------------------------


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    finetune.main([*words, "--output_dir", str(out)])
    return out


def interrupted(uninterrupted: Path, out: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(uninterrupted / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out


def resumed(words: list[str], out: Path, *more: str) -> dict[str, torch.Tensor]:
    finetune.main([*words, "--output_dir", str(out), "--resume_from_checkpoint", "true", *more])
    return load_file(out / "model.safetensors")


def same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_checkpoint_that_a_full_disk_cut_short_is_passed_over(words, uninterrupted, tmp_path, monkeypatch, caplog):
    save = torch.save

    def full(thing, path, *args, **kwargs):
        save(thing, path, *args, **kwargs)
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device.*checkpoint-6"):
        finetune.main([*words, "--output_dir", str(tmp_path)])
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-6" / "model.safetensors").exists()
    with caplog.at_level(logging.WARNING):
        assert same(resumed(words, tmp_path), load_file(uninterrupted / "model.safetensors"))
    assert "checkpoint-6 is incomplete" in caplog.text


def test_a_checkpoint_whose_last_file_was_cut_short_is_passed_over(words, uninterrupted, tmp_path, caplog):
    out = interrupted(uninterrupted, tmp_path, 3, 6)
    (out / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": ')
    (out / "checkpoint-best").mkdir()  # somebody's own
    with caplog.at_level(logging.WARNING):
        assert same(resumed(words, out), load_file(uninterrupted / "model.safetensors"))
    assert "checkpoint-6 is incomplete" in caplog.text


def test_a_truncated_checkpoint_is_an_error_before_anything_is_loaded(words, uninterrupted, tmp_path):
    for file, message in (
        ("optimizer.pt", "is no complete file of torch.save"),
        ("scheduler.pt", "is no complete file of torch.save"),
        ("model.safetensors", "is no complete safetensors file"),
    ):
        out = interrupted(uninterrupted, tmp_path / file, 6)
        os.truncate(out / "checkpoint-6" / file, (out / "checkpoint-6" / file).stat().st_size // 2)
        with pytest.raises(SystemExit, match=f"lp-dist: error: .*{file} {message}"):
            resumed(words, out)


def test_a_checkpoint_that_someone_sent_runs_no_code(words, uninterrupted, tmp_path):
    out = interrupted(uninterrupted, tmp_path, 6)
    torch.save(Touching(tmp_path / "it ran"), out / "checkpoint-6" / "scheduler.pt")
    with pytest.raises(SystemExit, match="scheduler.pt names posix.mkdir, whose code would run .*--trust-pickles"):
        resumed(words, out)
    (out / "checkpoint-6" / "trainer_state.json").write_text('{"unknown": 3}')
    with pytest.raises(SystemExit, match="trainer_state.json is not Trainer's: reading it ended with TypeError"):
        resumed(words, out, "--resume_from_checkpoint", str(out / "checkpoint-6"), "--trust_pickles", "true")
    with pytest.raises(SystemExit, match="there is no checkpoint .*nowhere to resume from"):
        resumed(words, out, "--resume_from_checkpoint", str(out / "nowhere"))
    assert not (tmp_path / "it ran").exists()


def test_a_checkpoint_without_optimizer_state_is_gone_on_with_but_said(words, uninterrupted, tmp_path, caplog):
    out = interrupted(uninterrupted, tmp_path, 6)
    (out / "checkpoint-6" / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING):
        resumed(words, out)
    assert "resuming at step 6 without optimizer state" in caplog.text


def test_other_values_than_the_checkpoints_hold_with_a_warning(words, uninterrupted, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for step in (6, 9):  # of the decay, and frozen
            assert same(
                resumed(words, interrupted(uninterrupted, tmp_path / f"same {step}", step)),
                load_file(uninterrupted / "model.safetensors"),
            )
    assert "param group" not in caplog.text  # the phases of the window are no news
    for name, more, message in (
        (
            "λ",
            ["--weight_decay", "0.2"],
            "param group 0 has weight_decay=0.1, from a checkpoint perhaps; going on with weight_decay=0.2",
        ),
        ("p", ["--p", "0"], "param group 0 has p=0.5, from a checkpoint perhaps; going on with p=0.0"),
    ):
        with caplog.at_level(logging.WARNING):
            assert not same(
                resumed(words, interrupted(uninterrupted, tmp_path / name, 6), *more),
                load_file(uninterrupted / "model.safetensors"),
            )
        assert message in caplog.text

    with caplog.at_level(logging.WARNING):  # the schedule is the checkpoint's, and says so
        assert same(
            resumed(words, interrupted(uninterrupted, tmp_path / "rate", 6), "--learning_rate", "2e-2"),
            load_file(uninterrupted / "model.safetensors"),
        )
    assert "from a rate of 0.01; the rate of 0.02 with which the optimizer was made" in caplog.text


def test_another_base_or_model_is_an_error(words, uninterrupted, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="checkpoint is of another optimizer than LpLion: it has exp_avg_sq"):
        resumed(words, interrupted(uninterrupted, tmp_path / "base", 6), "--base", "lion")
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    for name, change in (("narrower", {"intermediate_size": 64}), ("deeper", {"num_hidden_layers": 3})):
        shutil.copytree(tiny_model, tmp_path / name)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config.to_dict(), **change})).save_pretrained(
            tmp_path / name
        )
        with pytest.raises((RuntimeError, ValueError), match="size"):
            resumed(words, interrupted(uninterrupted, tmp_path / f"{name} run", 6), "--model", str(tmp_path / name))
