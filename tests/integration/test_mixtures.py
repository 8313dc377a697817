"""`lp-dist finetune` on models that are saved in another form than they have in memory, then export to the bitmask
form and back, and the report: every figure is what lies in the files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers.mixture_directories import TO_HALF, check_figures, mixture_directory
from helpers.saved_models import files_of
from lp_dist.cli import app
from lp_dist.report import schema
from lp_dist.report.inspection import inspect
from lp_dist.training import finetune


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3_moe", "deepseek_v3", "jamba", "gpt_oss")),
    ],
)
def test_a_mixture_goes_the_way_and_its_figures_are_those_of_the_files(name, tiny_model, topics, tmp_path):
    model = mixture_directory(tmp_path / "model", name, tiny_model)
    out = tmp_path / "out"
    words = ["--model", str(model), "--dataset", str(topics), *TO_HALF, "--use_cpu", "true"]
    finetune.main([*words, "--output_dir", str(out)])
    check_figures(out)
    saved = schema.read(out)
    assert saved["target"]["final_pruning"]["after"] == pytest.approx(0.5, abs=1e-4)
    # Experts that no token reached before the window stay as they are, and the target is half of the rest.
    half = saved["decayed_weights"] // 2
    assert saved["zeros"] < half if saved["target"]["left_dense"] else saved["zeros"] == half
    assert any("experts" in name for name in saved["tensors"])
    for source, target, more in ((out, "bitmask", ["--bitmask"]), (tmp_path / "bitmask", "back", [])):
        exported = CliRunner().invoke(app, ["export", str(source), str(tmp_path / target), *more, "--verify"])
        assert exported.exit_code == 0, exported.output
        assert inspect(tmp_path / target).total() == (saved["zeros"], saved["decayed_weights"])
    files, back = files_of(out), files_of(tmp_path / "back")
    assert files.keys() == back.keys() and all(torch.equal(files[name], back[name]) for name in files)
    shown = CliRunner().invoke(app, ["report", str(out)])
    assert shown.exit_code == 0, shown.output


def test_a_run_whose_files_could_not_be_counted_ends_before_it_begins(
    tiny_model, topics, tmp_path, monkeypatch, capsys
):
    from transformers.core_model_loading import revert_weight_conversion

    model = mixture_directory(tmp_path / "model", "mixtral", tiny_model)

    def revert(model, state):
        reverted = revert_weight_conversion(model, state)
        return {name: tensor for name, tensor in reverted.items() if "layers.1.block_sparse_moe" not in name}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    words = ["--model", str(model), "--dataset", str(topics), *TO_HALF, "--use_cpu", "true"]
    with pytest.raises(SystemExit) as ended:
        finetune.main([*words, "--output_dir", str(tmp_path / "out")])
    message = str(ended.value)
    assert "can't be read back" in message and "model.layers.1.mlp.experts.down_proj" in message
    assert not list(Path(tmp_path).glob("out/*.safetensors"))
