"""`lp-dist finetune` on a mixture whose experts are saved one by one, under ZeRO-2 and ZeRO-3 on two ranks: the run
ends well, and every figure is what lies in the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.mixture_directories import TO_HALF, check_figures, mixture_directory
from helpers.paths import ROOT
from helpers.saved_models import files_of
from lp_dist.report import schema

pytestmark = pytest.mark.long

STAGES = ("zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tiny_model, topics, tmp_path_factory, run_program) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("mixtures")
    model = mixture_directory(directory / "qwen3_moe", "qwen3_moe", tiny_model)
    out = {stage: directory / stage for stage in STAGES}
    for stage in STAGES:
        config = json.loads((ROOT / "configs" / f"ds_{stage}.json").read_text())
        # Buffers for a large model take longer than the steps of a tiny one.
        config["zero_optimization"] |= {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
        (directory / f"{stage}.json").write_text(json.dumps(config))
    run_program(
        [
            [
                *("--model", str(model), "--dataset", str(topics), *TO_HALF),
                *("--deepspeed", str(directory / f"{stage}.json"), "--output_dir", str(path)),
            ]
            for stage, path in out.items()
        ]
    )
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_a_mixture_ends_well_and_its_figures_are_those_of_the_files(stage, runs):
    check_figures(runs[stage])
    saved = schema.read(runs[stage])
    assert saved["world_size"] == 2 and saved["engine"] == f"DeepSpeed ZeRO-{stage[-1]}"
    assert saved["zeros"] == saved["decayed_weights"] // 2
    assert "model.layers.0.mlp.experts.gate_up_proj" in saved["tensors"]
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in files_of(runs[stage])
