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

from lp_dist.cli import app
from lp_dist.errors import DiffersError, UsageError
from lp_dist.export import shrink
from lp_dist.export.writer import export
from lp_dist.targets.target import SparsityTarget

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


@pytest.mark.parametrize(
    "make, parts",
    [
        (
            of("llama"),
            [
                (
                    "finds nothing to remove: of 96 feed-forward channels and 8 attention heads of LlamaForCausalLM"
                    " none is dead."
                ),
                'groups="channels"',
            ],
        ),
        (of("mixtral"), ["of 8 attention heads of MixtralForCausalLM none is dead"]),
        (of_other_names, ["the checkpoint's tensors have other names than those of LlamaForCausalLM"]),
        (
            uneven,
            [
                "can remove nothing: 1 of 96 feed-forward channels are dead and stay: all layers have one width, and"
                " model.layers.0.mlp needs 48"
            ],
        ),
        (
            of("mamba", **MAMBA),
            [
                "nothing to look at: no feed-forward channels are recognised in MambaForCausalLM",
                "; no attention heads are",
            ],
        ),
        (without_a_config, ["--shrink rewrites the model's config.json", "--config MODEL"]),
    ],
    ids=["nothing dead", "heads alone", "other names", "uneven", "neither", "no config"],
)
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
        patch.setattr(
            shrink,
            "_dead",
            lambda parts, *_: {
                groups.label: torch.arange(groups.count) < 30 * (groups.kind == "channels") for groups in parts
            },
        )
        with pytest.raises(
            DiffersError,
            match="layers.0.mlp.down_proj.weight in .*half has other weights than zeros in what was left out of",
        ):
            export(half, tmp_path / "out", shrunk=True, verified=True)
    monkeypatch.setattr("lp_dist.export.writer.loadable", lambda config, dtype: {**config, "rms_norm_eps": 1e-5})
    with pytest.raises(
        DiffersError, match=r"logits of .* are up to .* away from those of .*half, and rounding explains .*e-05"
    ):
        export(half, tmp_path / "out", shrunk=True, verified=True)


def test_the_command_tells_what_went_and_what_stayed(half, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = (
        CliRunner()
        .invoke(app, ["export", str(half), str(tmp_path / "out"), "--shrink", "--multiple", "16", "--verify"])
        .stdout
    )
    assert (
        "52 of 96 feed-forward channels are dead, 32 are gone: 48 → 32 in each of 2 layers; all layers have one width,"
        " and model." in told
    )
    assert (
        re.search(r"after, shrunk +│ +\d", told)
        and "what the checkpoint has, without these, bit for bit; 915 logits differ by" in told
    )


@pytest.mark.parametrize(
    "family, asked, wanted",
    [
        ("llama", {"groups": ["channels", "kv_groups"]}, [(48, 96), (2, 4)]),
        ("llama", {"groups": "heads"}, [(2, 4)]),
        ("gpt2", {"groups": "channels"}, [(128, 256)]),
        ("gpt2", {"groups": "heads"}, [(0, 8)]),
        ("falcon", {"groups": "channels", "scope": "global"}, [(128, 256)]),
        ("qwen3", {"sparsity": None, "budget": 24_288, "groups": "channels"}, [(14, 96)]),
    ],
)
def test_what_can_be_cut_out_is_known_before_a_run(family, asked, wanted):
    """(gone, all) of each kind; what stays says why."""
    model = model_of(family)
    found = shrink.foreseen(type(model), model.config, SparsityTarget(**{"sparsity": 0.5, **asked}))
    assert [(one.gone, sum(one.before)) for one in found] == wanted
    assert all(one.gone or "makes a model of other ones" in str(one) for one in found)


def test_the_program_says_before_the_run_what_will_stay(tmp_path, topics, tiny_model, caplog):
    """Heads of GPT-2 die and stay: its configuration has no head size of its own."""
    from transformers import AutoTokenizer

    from lp_dist.report import schema
    from lp_dist.training import finetune

    directory = save(
        model_of("gpt2", vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)), n_positions=64), tmp_path / "gpt2"
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    finetune.main(
        [
            "--model",
            str(directory),
            "--dataset",
            str(topics),
            "--block_size",
            "32",
            "--max_steps",
            "16",
            "--per_device_train_batch_size",
            "2",
            "--use_cpu",
            "true",
            "--report_to",
            "none",
            "--max_eval_blocks",
            "2",
            "--output_dir",
            str(tmp_path / "out"),
            "--groups",
            "heads",
            "--group_sparsity",
            "0.5",
            "--logging_steps",
            "4",
        ]
    )
    said = [record.getMessage() for record in caplog.records]
    at = next(
        i
        for i, line in enumerate(said)
        if "what dies will not be cut out by lp-dist export --shrink" in line and "4 of 8 attention heads" in line
    )
    assert any("Lp decay on" in line for line in said[at:]), "before the decay is attached"
    saved = schema.read(tmp_path / "out")
    measured = [entry["lp/measured"] for entry in saved["log"] if "lp/measured" in entry]
    assert measured[-1] == pytest.approx(saved["sparsity"]) and 0.0 < saved["sparsity"] < 0.3, (
        "of all that may decay, in the log as at the end"
    )
