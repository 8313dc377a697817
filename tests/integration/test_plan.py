"""`lp-dist plan` before a run, and the lines of it that `lp-dist finetune` prints: of configurations alone, compared
with what is counted in the models that are made of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
import yaml
from huggingface_hub import constants
from torch import nn

from helpers.commands import lp_dist_here
from helpers.families import model_of
from helpers.tasks import TASKS
from lp_dist import param_groups
from lp_dist.report import schema
from lp_dist.sparsity.selection import decayed_names
from lp_dist.training import finetune, planning

MODELS = {
    "a mixture": lambda: model_of("qwen3_moe"),
    "a mixture with latent attention": lambda: model_of("deepseek_v3"),
    "text and images": TASKS["text and images"].model,
    "a classifier": TASKS["a classifier"].model,
    "a decoder": lambda: model_of("llama"),
}


def configured(directory: Path, model: nn.Module) -> Path:
    """A directory with the configuration of a model, and nothing else."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    assert [path.name for path in directory.iterdir() if path.suffix != ".json"] == []
    return directory


def planned(capsys, *words: str) -> dict:
    planning.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_without_weights_is_planned_as_the_model_is_trained(name, tmp_path, capsys):
    model = MODELS[name]()
    values = planned(capsys, str(configured(tmp_path, model)), "--sparsity", "0.5", "--max_steps", "1000")
    params = dict(model.named_parameters())
    names = {entry["name"] for entry in values["tensors"] if entry["decays"]}
    (decayed, _) = param_groups(model)
    elements = sum(param.numel() for param in decayed["params"])
    assert names == decayed_names(model) and values["decayed_weights"] == elements
    assert values["model"] == type(model).__name__
    assert values["parameters"] == sum(param.numel() for param in params.values())
    (target,) = values["targets"]
    assert (
        target["zeros"] == round(0.5 * elements) and target["share_of_all"] == target["zeros"] / values["parameters"]
    )
    assert (target["window"]["first"], target["window"]["last"], target["window"]["total"]) == (100, 700, 1000)
    causal = type(model).__name__.endswith("ForCausalLM")
    assert any("is no causal language model" in note for note in values["notes"]) != causal
    assert {kind["kind"] for kind in values["groups"]} >= {"channels", "heads", "experts"}


def test_a_recipe_is_read_as_by_finetune_and_flags_win(tmp_path, capsys):
    directory = configured(tmp_path / "model", model_of("llama"))
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model": str(directory),
        "dataset": "nobody/reads-this",
        "sparsity": 0.5,
        "groups": "channels",
        "group_sparsity": 0.25,
        "decay_start": 0.2,
        "decay_end": 0.6,
        "max_steps": 100,
        "overrides": {"*.layers.0.self_attn.*": {"weight_decay": 0}},
        "bf16": True,
        "gpus": [16],
    }
    recipe.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key != "gpus"}))
    values = planned(capsys, str(recipe), "--group_sparsity", "0.5", "--gpus", "16")
    groups, weights = values["targets"]
    assert groups["groups"] == {"channels": [48, 96]} and (groups["window"]["first"], groups["window"]["last"]) == (
        20,
        40,
    )
    assert (weights["window"]["first"], weights["window"]["last"]) == (40, 60)
    left_out = [entry["name"] for entry in values["tensors"] if entry["reason"] == "left out by an override"]
    assert sorted(left_out) == [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "koqv"]
    assert {need["gpus"] for need in values["memory"]} == {16}
    # A key of the plan alone is none of a recipe's.
    recipe.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="the recipe .* has the key 'gpus'"):
        planning.main([str(recipe)])


def test_the_strategy_of_a_recipe_is_marked(tmp_path, capsys):
    directory = configured(tmp_path / "model", model_of("llama"))
    planning.main([str(directory), "--sparsity", "0.5", "--deepspeed", "configs/ds_zero3_offload.json", "--gpus", "8"])
    assert "ZeRO-3, offload (this run)" in capsys.readouterr().out


def test_of_a_hub_id_the_configuration_is_enough(tmp_path, monkeypatch, capsys):
    """The hub's cache holds it, and nothing else of the model; there is no network."""
    model = model_of("mixtral")
    cached = tmp_path / "models--some-org--some-mixture"
    configured(cached / "snapshots" / "c0ffee", model)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    values = planned(capsys, "some-org/some-mixture", "--sparsity", "0.5")
    names = decayed_names(model)
    assert {entry["name"] for entry in values["tensors"] if entry["decays"]} == names
    assert values["decayed_weights"] == sum(model.get_parameter(name).numel() for name in names)
    with pytest.raises(SystemExit, match="some-org/another can't be read: its config.json ended with"):
        planning.main(["some-org/another"])


def test_nothing_is_made_that_holds_weights(tmp_path, monkeypatch, capsys):
    """A model of 8 billion parameters: its weights would not fit where this is planned."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    makes = []
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lambda *_, **__: makes.append(1))
    values = planned(capsys, str(tmp_path), "--sparsity", "0.5")
    per_layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert values["decayed_weights"] == 2 * per_layer and not makes
    assert values["parameters"] == 2 * per_layer + 2 * 128256 * 4096 + 5 * 4096


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no model is named"),
        (["{empty}"], "can't be read: its config.json ended with"),
        (["{model}", "--sparsiti", "0.5"], "--sparsiti"),
        (["{model}", "--sparsity", "0.9", "--relative_to", "all"], "--sparsity 0.9 of all .* can't be reached"),
        (["{model}", "--groups", "experts", "--group_sparsity", "0.5"], "no experts are recognised"),
        (["{model}", "--groups", "channels", "--budget", "10"], "--budget 10 can't be reached"),
        (["{model}", "--sparsity", "0.5", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["{model}", "--sparsity", "1.5"], "must be between 0 and 1"),
        (["{adapter}"], "holds an adapter"),
    ],
)
def test_bad_input_ends_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    for name in ("empty", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    places = {"model": configured(tmp_path / "model", model_of("llama")), "empty": tmp_path / "empty"}
    places["adapter"] = tmp_path / "adapter"
    ended = lp_dist_here(monkeypatch, "plan", *(word.format(**places) for word in words))
    assert isinstance(ended, str) and ended.startswith("lp-dist: error: ") and "\n" not in ended
    assert re.search(message, ended), ended
    assert "Traceback" not in capsys.readouterr().err


def test_finetune_prints_the_short_form_and_does_what_it_says(tiny_model, topics, tmp_path, capsys):
    words = ["--model", str(tiny_model), "--dataset", str(topics), "--block_size", "64", "--max_steps", "20"]
    words += ["--sparsity", "0.5", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2"]
    words += ["--eval_strategy", "no", "--max_eval_blocks", "2", "--save_strategy", "no", "--use_cpu", "true"]
    finetune.main([*words, "--output_dir", str(tmp_path / "run")])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    report = schema.read(tmp_path / "run")
    (plan,) = (line for line in lines if line.startswith("Plan: "))
    assert plan.startswith(f"Plan: {report['decayed_weights']:,} of {report['parameters']:,} parameters decay")
    (target,) = (line for line in lines if line.startswith("Target: "))
    assert f"become zero: {report['zeros']:,}, or {100 * report['sparsity_of_all']:.2f} % of all" in target
    first, last = report["window"]
    assert f"steps {first}–{last} of {report['steps']}" in target
    assert lines.index(plan) < next(i for i, line in enumerate(lines) if line.startswith("Saved to"))
    planning.main([*words])
    assert target in capsys.readouterr().out.splitlines()
