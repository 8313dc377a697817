"""Targets of weight groups in Hugging Face's Trainer and in `lp-dist finetune`, and what the export then makes of the
model.
"""

from __future__ import annotations

import pytest

from helpers.targets import decaying
from lp_dist import measure_sparsity


def test_trainer_resumes_two_targets_from_its_own_checkpoint(tmp_path):
    """Made anew from the arguments that the checkpoint keeps, and with their state."""
    from transformers.trainer_utils import get_last_checkpoint

    from helpers.trainer_runs import Interrupted, train
    from helpers.trainer_runs import same as same_models
    from lp_dist import LpCallback

    targets = [
        decaying(0.4, groups="channels", start=2, end=14, scope="global", update_every=2),
        decaying(0.6, start=14, end=24),
    ]
    uninterrupted = train(tmp_path / "uninterrupted", [LpCallback(target=targets)], steps=30)
    train(tmp_path / "cut", [LpCallback(target=targets), Interrupted(9)], steps=30)
    again = train(
        tmp_path / "cut",
        [LpCallback(target=targets)],
        steps=30,
        resume=get_last_checkpoint(tmp_path / "cut"),
        restore_callback_states_from_checkpoint=True,
    )
    assert same_models(uninterrupted, again)
    mlp = again.model.model.layers[0].mlp
    gone = (mlp.down_proj.weight == 0).all(0)
    assert int(gone.sum()) == 16 and not mlp.up_proj.weight[gone].any() and not mlp.gate_proj.weight[gone].any()
    assert measure_sparsity(again.model).total == pytest.approx(0.6, abs=2e-3)
    with pytest.raises(ValueError, match="a target and a λ for groups were given"):
        LpCallback(target=targets, groups={"groups": "channels", "weight_decay": 0.1})


def test_a_lambda_for_groups_in_trainer_is_logged_and_kept(tmp_path):
    from helpers.trainer_runs import train
    from lp_dist import GroupDecay, LpCallback, LpTrainer

    trainer = train(
        tmp_path, [LpCallback(groups=GroupDecay("channels", 0.5, p=0.0))], trainer=LpTrainer, logging_steps=8
    )
    channels = (trainer.model.model.layers[0].mlp.down_proj.weight == 0).all(0)
    assert channels.all(), "they are all of about one size, and become zero together"
    assert all("lp/measured" in logs for logs in trainer.state.log_history if "loss" in logs)


@pytest.fixture
def words(tiny_model, topics, tmp_path) -> list[str]:
    return [
        "--model",
        str(tiny_model),
        "--dataset",
        str(topics),
        "--block_size",
        "64",
        "--max_steps",
        "40",
        "--learning_rate",
        "5e-3",
        "--per_device_train_batch_size",
        "2",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--max_eval_blocks",
        "4",
        "--output_dir",
        str(tmp_path / "out"),
        "--logging_steps",
        "10",
    ]


def test_the_program_takes_groups_and_zeros(words, tmp_path, capsys):
    from lp_dist.report import schema
    from lp_dist.training import finetune

    finetune.main([*words, "--groups", "channels", "kv_groups", "--group_sparsity", "0.5", "--sparsity", "0.7"])
    saved = schema.read(tmp_path / "out")
    assert (
        saved["groups"]["kinds"] == {"channels": [96, 192], "kv_groups": [2, 4]}
        and saved["groups"]["final_pruning"]["after"] == 0.5
    )
    assert saved["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert [entry["step"] for entry in saved["log"] if entry.get("lp/groups_measured") == 0.5] == [20, 30, 40]
    said = capsys.readouterr().out
    assert "Groups: 96 of 192 channels, 2 of 4 kv_groups are zero;" in said and "--shrink --verify" in said
    assert "Groups: 96 of 192 channels, 2 of 4 kv_groups are zero;" in (tmp_path / "out" / "report.html").read_text()
    # What the report says to do next
    from transformers import AutoModelForCausalLM
    from typer.testing import CliRunner

    from lp_dist.cli import app

    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "out"), str(tmp_path / "out-small"), "--shrink", "--verify"]
    )
    assert done.exit_code == 0, done.output
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out-small")
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (48, 1)


@pytest.mark.parametrize(
    "added, says",
    [
        (["--group_sparsity", "0.3"], "--group_sparsity 0.3 belongs to --groups, and none are named"),
        (["--groups", "channels"], "--groups need one of --group_sparsity"),
        (
            ["--groups", "channels", "--budget", "1", "--group_sparsity", "0.1"],
            "--groups need one of --group_sparsity, .* and --budget",
        ),
        (
            ["--groups", "channels,heads", "--group_sparsity", "0.1"],
            "--groups channels,heads is none of channels, heads, kv_groups, experts, expert_channels; name one, or"
            " several with spaces",
        ),
        (["--groups", "channels", "--group_sparsity", "1.5"], "--group_sparsity 1.5 must be between 0 and 1"),
        (["--groups", "heads", "--budget", "0"], "--budget 0 must be"),
        (
            ["--groups", "channels", "--group_sparsity", "0.3", "--pattern", "2:4"],
            "--pattern 2:4 and --groups: once dead groups are removed",
        ),
        (
            ["--groups", "channels", "--group_sparsity", "0.1", "--weight_decay", "1"],
            "--groups channels finds λ by itself",
        ),
        (
            ["--groups", "channels", "--group_sparsity", "0.1", "--latent_windows", "1"],
            "--latent_windows 1.0 belongs to a --sparsity",
        ),
        (
            ["--groups", "channels", "--group_sparsity", "0.1", "--sparsity", "0.5", "--decay_start", "4"],
            "--decay_start 4 and --decay_end 0.7 are a fraction and a step",
        ),
    ],
)
def test_the_program_refuses_what_contradicts_itself(words, added, says):
    from lp_dist.training import finetune

    with pytest.raises(SystemExit, match=says):
        finetune.main([*words, *added])
