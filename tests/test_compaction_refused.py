"""What `export --shrink` refuses and why, what --verify finds in a shrunk model, and what the command says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compaction import half_dead, kill, save
from test_export import rewritten
from test_structure import model_of
from typer.testing import CliRunner

from lp_dist import compaction
from lp_dist.cli import app
from lp_dist.errors import DiffersError, UsageError
from lp_dist.export import export

MAMBA = dict(hidden_size=16, num_hidden_layers=2, vocab_size=61, state_size=4, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def half(tmp_path) -> Path:
    return half_dead(tmp_path / "half")


def of(family: str, **more: Any) -> Any:
    return lambda directory: save(model_of(family, **more), directory)


def uneven(directory: Path) -> None:
    model = model_of("llama")
    kill(model, "channels", [], [3])
    save(model, directory)


def without_a_config(directory: Path) -> None:
    (save(model_of("llama"), directory) / "config.json").unlink()


def of_other_names(directory: Path) -> None:
    save(model_of("llama"), directory)
    rewritten(directory, lambda tensors: [tensors.update({f"x.{name}": tensors.pop(name)}) for name in [*tensors]])


@pytest.mark.parametrize("make, parts", [
    (of("llama"), ["finds nothing to remove: of 96 feed-forward channels and 8 attention heads of LlamaForCausalLM none is dead.",
                   'groups="channels"']),
    (of("mixtral"), ["of 8 attention heads of MixtralForCausalLM none is dead"]),
    (of_other_names, ["the checkpoint's tensors have other names than those of LlamaForCausalLM"]),
    (uneven, ["can remove nothing: 1 of 96 feed-forward channels are dead and stay: all layers have one width, and model.layers.0.mlp needs 48"]),
    (of("mamba", **MAMBA), ["nothing to look at: no feed-forward channels are recognised in MambaForCausalLM", "; no attention heads are"]),
    (without_a_config, ["--shrink rewrites the model's config.json", "--config MODEL"])],
    ids=["nothing dead", "heads alone", "other names", "uneven", "neither", "no config"])
def test_what_can_not_be_shrunk_says_why(make, parts, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(UsageError) as caught:
        export(tmp_path / "model", tmp_path / "out", shrunk=True)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "out").exists() and "groups_of" not in str(caught.value)


def test_a_multiple_of_nothing_is_refused(half, tmp_path):
    with pytest.raises(UsageError, match="--multiple says what --shrink rounds widths up to"):
        export(half, tmp_path / "out", multiple=8)


def test_verify_tells_of_a_live_channel_that_went_and_of_another_model(half, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_dead", lambda parts, *_: {groups.label: torch.arange(groups.count) < 30 * (groups.kind == "channels")
                                                              for groups in parts})
        with pytest.raises(DiffersError, match="layers.0.mlp.down_proj.weight in .*half has other weights than zeros in what was left out of"):
            export(half, tmp_path / "out", shrunk=True, verified=True)
    monkeypatch.setattr("lp_dist.export.loadable", lambda config, dtype: {**config, "rms_norm_eps": 1e-5})
    with pytest.raises(DiffersError, match=r"logits of .* are up to .* away from those of .*half, and rounding explains .*e-05"):
        export(half, tmp_path / "out", shrunk=True, verified=True)


def test_the_command_tells_what_went_and_what_stayed(half, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = CliRunner().invoke(app, ["export", str(half), str(tmp_path / "out"), "--shrink", "--multiple", "16", "--verify"]).stdout
    assert "52 of 96 feed-forward channels are dead, 32 are gone: 48 → 32 in each of 2 layers; all layers have one width, and model." in told
    assert re.search(r"after, shrunk +│ +\d", told) and "what the checkpoint has, without these, bit for bit; 915 logits differ by" in told
