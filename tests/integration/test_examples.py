"""The loops that the documentation shows run as they stand, make the model sparse, and are the user's own loop without
the marked lines.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from lp_dist import measure_sparsity
from lp_dist.report.saved_zeros import count_saved

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def text(topics, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "text.txt"
    path.write_text("\n".join(json.loads(line)["text"] for line in topics.open()))
    return path


def run(script: Path, *arguments: object) -> dict:
    before = sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        return runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def without_marks(script: Path, directory: Path) -> Path:
    """The script as it was before lp_dist: lines marked (+) gone, those marked (-) as they were."""
    lines = []
    for line in script.read_text().splitlines():
        if line.startswith(('"""', "#")) or "# (" not in line:
            lines.append(line)
        elif "# (-) " in line:
            lines.append(line.split("=")[0] + "= " + line.split("# (-) ")[1])
    dense = directory / script.name
    dense.write_text("\n".join(lines) + "\n")
    assert "lp_dist" not in dense.read_text().split('"""')[2] and "attached" not in dense.read_text()
    return dense


def zero_fraction_of(directory: Path) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(directory)
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained(directory))
    assert count_saved(directory, counted.counts) == counted
    return counted.total


@pytest.mark.parametrize("name", ["plain_torch", "accelerate_loop", "trl_sft"])
def test_an_example_makes_the_model_sparse_and_without_its_marked_lines_does_not(
    name, tiny_model, text, topics, tmp_path
):
    if name == "trl_sft":
        pytest.importorskip("trl")
    data = topics if name == "trl_sft" else text
    run(EXAMPLES / f"{name}.py", tiny_model, data, tmp_path / "sparse")
    assert zero_fraction_of(tmp_path / "sparse") == pytest.approx(0.5, abs=1e-4)
    run(without_marks(EXAMPLES / f"{name}.py", tmp_path), tiny_model, data, tmp_path / "dense")
    assert zero_fraction_of(tmp_path / "dense") < 1e-3


def run_on_ranks(ranks: int, *words: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    ended = subprocess.run(
        [*command, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.mark.long
def test_fsdp2_and_tensor_parallelism_make_the_model_sparse_and_without_the_marked_lines_do_not(
    tiny_model, text, tmp_path
):
    run_on_ranks(4, EXAMPLES / "fsdp2_tp.py", tiny_model, text, tmp_path / "sparse")
    assert zero_fraction_of(tmp_path / "sparse") == pytest.approx(0.5, abs=1e-4)
    run_on_ranks(4, without_marks(EXAMPLES / "fsdp2_tp.py", tmp_path), tiny_model, text, tmp_path / "dense")
    assert zero_fraction_of(tmp_path / "dense") < 1e-3


@pytest.mark.long  # under torchrun, where both ranks import everything
def test_the_bare_engine_and_the_model_of_its_checkpoint(tiny_model, text, tmp_path, cpu_op):
    from lp_dist.export.writer import export

    run_on_ranks(2, EXAMPLES / "deepspeed_engine.py", tiny_model, text, tmp_path / "out")
    export(tmp_path / "out" / "checkpoint", tmp_path / "out" / "model", config=str(tiny_model), verify=True)
    assert zero_fraction_of(tmp_path / "out" / "model") == pytest.approx(0.5, abs=1e-4)
    assert "zero_allow" not in without_marks(EXAMPLES / "deepspeed_engine.py", tmp_path).read_text()


@pytest.mark.long  # Ray starts a cluster of its own on this machine, and two workers that import everything
def test_ray_train_on_two_workers(tiny_model, topics, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    for script, out in (
        (EXAMPLES / "ray_train.py", "sparse"),
        (without_marks(EXAMPLES / "ray_train.py", tmp_path), "dense"),
    ):
        command = [sys.executable, str(script), str(tiny_model), str(topics), str(tmp_path / out), "2"]
        ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    assert zero_fraction_of(tmp_path / "sparse") == pytest.approx(0.5, abs=1e-4)
    assert zero_fraction_of(tmp_path / "dense") < 1e-3
    assert (tmp_path / "sparse" / "checkpoint-40" / "rng_state_1.pth").exists(), "the second worker trained alone"
    # Ray's copy of the last checkpoint is what it would go on from: it has the zeros, and the target's state.
    (kept,) = (tmp_path / "sparse" / "ray").glob("checkpoint_*/checkpoint")
    assert zero_fraction_of(kept) == pytest.approx(0.5, abs=1e-4)
    state = json.loads((kept / "trainer_state.json").read_text())
    assert state["global_step"] == 40 and "LpCallback" in state["stateful_callbacks"]


def test_an_adapter_on_a_sparse_model_leaves_one_with_the_same_zeros(tiny_model, topics, tmp_path, capsys):
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lp_dist.sparsity.selection import matrix_names

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    dead = {}
    with torch.no_grad():
        for name in matrix_names(base):
            base.get_parameter(name).view(-1)[::3] = 0.0
            dead[name] = base.get_parameter(name) == 0
    base.save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "sparse")
    run(EXAMPLES / "lora.py", tmp_path / "sparse", topics, tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert all(torch.equal(out.get_parameter(name) == 0, zeros) for name, zeros in dead.items())
    said = capsys.readouterr().out
    assert "with the adapter" in said and "after some steps with 33.3" in said
