"""--verify passes on what was written right, and tells of every way in which it was not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from helpers.export_runs import SPARSE, llama
from helpers.model_directories import changed, rewritten
from helpers.tasks import TASKS
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import DiffersError, UsageError
from lp_dist.export.outputs import outputs_of
from lp_dist.export.verify import verify_export
from lp_dist.export.writer import export

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def saved_alive(model: Any, directory: Path) -> Path:
    """As an engine's checkpoint: the names and tensors that it has in memory."""
    model.save_pretrained(directory / "hf")
    (directory / "alive").mkdir()
    shutil.copyfile(directory / "hf" / "config.json", directory / "alive" / "config.json")
    torch.save(model.state_dict(), directory / "alive" / "pytorch_model_fsdp.bin")
    return directory / "alive"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_it_passes_on_models_of_all_kinds_by_runtime_names_and_hf_names(name, dtype, tmp_path):
    alive = saved_alive(TASKS[name].model(), tmp_path)
    first = export(alive, tmp_path / "one", dtype=dtype, verify=True)
    second = export(tmp_path / "hf", tmp_path / "other", dtype=dtype, verify=True, shard_size="2KB")
    assert first.verification == second.verification and first.verification["logits"] > 0
    assert first.verification["tensors"] == len(first.counts) == len(second.counts)


@pytest.fixture
def alive(tmp_path) -> Path:
    return saved_alive(llama(), tmp_path)


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def one_bit_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP].view(torch.int32)[3, 4] += 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out: rewritten(out, one_bit_more), f"{UP} in .* is not what .* has"),
        (
            lambda out: rewritten(out, lambda tensors: tensors[SPARSE].masked_fill_(tensors[SPARSE] == 0, -0.0)),
            f"{SPARSE} in",
        ),
        (lambda out: rewritten(out, lambda tensors: tensors.update({NORM: tensors[NORM].double()})), f"{NORM} in"),
        (lambda out: rewritten(out, lambda tensors: tensors.update({UP: tensors[UP].view(21, 23)})), f"{UP} in"),
        (lambda out: rewritten(out, lambda tensors: tensors.pop(NORM)), f"has no {NORM}"),
        (
            lambda out: rewritten(out, lambda tensors: tensors.update({"more": torch.ones(1)})),
            "has more, which .* has not",
        ),
        (lambda out: changed(out, tie_word_embeddings=False), "1 missing keys, such as lm_head.weight"),
        (lambda out: changed(out, num_hidden_layers=3), "9 missing keys"),
        (lambda out: changed(out, num_hidden_layers=1), "9 unexpected keys"),
        (lambda out: changed(out, vocab_size=98), "mismatched keys"),
    ],
    ids=[
        "a bit",
        "-0",
        "dtype",
        "shape",
        "missing",
        "more",
        "initialised anew",
        "a layer more",
        "a layer less",
        "another shape",
    ],
)
@pytest.mark.parametrize("source", ["alive", "hf"])
def test_it_tells_of_a_change_in_what_was_written(source, change, message, alive, tmp_path):
    checkpoint = open_checkpoint(tmp_path / source)
    out = export(tmp_path / source, tmp_path / "out").out
    verify_export(checkpoint, out, config=tmp_path / source)
    change(out)
    with pytest.raises(DiffersError, match=message):
        verify_export(checkpoint, out, config=tmp_path / source)


def test_it_tells_of_a_config_by_which_the_same_weights_say_something_else(alive, tmp_path):
    out = export(tmp_path / "hf", tmp_path / "out").out
    changed(out, rms_norm_eps=1.0)
    with pytest.raises(DiffersError, match="the logits of .* are not those of"):
        verify_export(open_checkpoint(tmp_path / "hf"), out, config=tmp_path / "hf")


def test_it_does_not_trust_the_way_by_which_tensors_get_their_hf_names(tmp_path, monkeypatch):
    """Two experts' weights swapped on the way out: the names and bits of both sides agree, what the model says does
    not.
    """
    from lp_dist.checkpoints import hf_names

    alive = saved_alive(TASKS["experts"].model(), tmp_path)
    right = hf_names.to_hf_tensors

    def swapped(*arguments: Any) -> list[hf_names.HfTensor]:
        def read(hf_tensor: hf_names.HfTensor) -> dict[str, torch.Tensor]:
            tensors = hf_tensor.read()
            first, second = (
                "model.layers.0.block_sparse_moe.experts.0.w2.weight",
                "model.layers.0.block_sparse_moe.experts.1.w2.weight",
            )
            return {**tensors, first: tensors[second], second: tensors[first]} if first in tensors else tensors

        return [
            replace(hf_tensor, read=lambda hf_tensor=hf_tensor: read(hf_tensor)) for hf_tensor in right(*arguments)
        ]

    monkeypatch.setattr(hf_names, "to_hf_tensors", swapped)
    with pytest.raises(DiffersError, match="the logits"):
        export(alive, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()


def test_what_differs_is_left_for_inspection_and_out_stays_as_it_was(alive, tmp_path, monkeypatch):
    out = export(alive, tmp_path / "out").out
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        "lp_dist.export.writer.loadable_config", lambda config, dtype: {**config, "tie_word_embeddings": False}
    )
    with pytest.raises(DiffersError, match="out.partial has 1 missing keys"):
        export(alive, out, dtype="bfloat16", verify=True, overwrite=True)
    assert (
        (out / "model.safetensors").read_bytes()
        == before
        != (tmp_path / "out.partial" / "model.safetensors").read_bytes()
    )
    monkeypatch.undo()
    export(alive, out, dtype="bfloat16", verify=True, overwrite=True)
    assert (
        not (tmp_path / "out.partial").exists()
        and json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    )


def test_a_model_of_its_own_code_is_run_only_when_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    alive = saved_alive(llama(), tmp_path)
    (alive / "modeling_own.py").write_text(OWN)
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    changed(alive, model_type="own", architectures=["Own"], auto_map=code)
    with pytest.raises(UsageError, match="--trust-remote-code"):
        export(alive, tmp_path / "out")
    done = export(alive, tmp_path / "out", verify=True, trust_remote_code=True)
    assert done.verification["logits"] and (tmp_path / "out" / "modeling_own.py").exists()
    assert export(tmp_path / "out", tmp_path / "again", verify=True, trust_remote_code=True).verification["logits"]


# -- what is compared, and what is not ----------------------------------------

INPUTS = {
    "images": ["an image"],
    "images without a head": ["an image"],
    "speech": ["sound"],
    "speech to text": ["sound", "tokens"],
    "text and images": ["tokens", "an image"],
    "images in a text": ["tokens", "an image"],
    "images in a text, as pixels": ["tokens", "an image"],
}


@pytest.mark.parametrize("name", TASKS)
def test_outputs_are_of_inputs_of_the_models_kind_and_read_all_its_weights(name):
    outputs = outputs_of(TASKS[name].model())
    assert outputs.inputs == INPUTS.get(name, ["tokens"]) and not outputs.reason
    # What is for masked inputs has no part in any output of inference, and Gemma's pooling none in its features.
    assert set(outputs.unread) <= {"wav2vec2.masked_spec_embed", "model.vision_tower.head"}


@pytest.mark.parametrize("name", TASKS)
def test_every_weight_that_is_not_told_as_unread_changes_the_outputs(name):
    model = TASKS[name].model()
    before = outputs_of(model)
    for path, param in model.named_parameters():
        if param.ndim < 2:
            continue
        kept = param.detach().clone()
        with torch.no_grad():
            param += torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
        after = outputs_of(model)
        with torch.no_grad():
            param.copy_(kept)
        changes = any(not torch.equal(after.values[key], value) for key, value in before.values.items())
        assert changes != f"{path}.".startswith(tuple(f"{name}." for name in before.unread)), path


class Pair(nn.Module):
    """A model of which a module is not used."""

    config = transformers.BertConfig(vocab_size=30)
    main_input_name = "input_ids"
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.table, self.second = nn.Embedding(30, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.used, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, input_ids: torch.Tensor) -> dict[str, Any]:
        return {"scores": self.used(self.table(input_ids)), "count": input_ids.sum(), "states": (torch.ones(2),)}


def test_a_model_of_sound_gets_a_row_of_tokens_for_each_codebook():
    sizes = dict(vocab_size=61, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.MusicgenDecoderConfig(**sizes, num_codebooks=2)
    outputs = outputs_of(transformers.MusicgenForCausalLM(config))
    assert outputs.inputs == ["tokens"] and outputs.values["logits"].shape[0] == 2


def test_what_no_output_was_computed_from_is_named():
    outputs = outputs_of(Pair())
    assert list(outputs.values) == ["scores", "states.0"] and outputs.values["scores"].shape == (3, 5, 4)
    assert sorted(outputs.unread) == ["scale", "second"] and outputs.reason == ""


def test_a_model_that_takes_none_of_the_inputs_is_told_with_its_reason(alive, tmp_path, monkeypatch):
    def refuse(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("needs a map of the stars\nand more")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", refuse)
    done = export(alive, tmp_path / "out", verify=True)
    assert done.verification["logits"] is None
    assert done.verification["reason"].endswith("(ValueError: needs a map of the stars)")
    assert "bit for bit. No outputs were compared: LlamaForCausalLM" in done.verification_line()


@pytest.mark.parametrize(
    "name, line",
    [
        ("encoder and decoder", "values of logits and encoder_last_hidden_state for tokens."),
        ("images", "and so are 3 logits for an image."),
        ("question answering", "and so are 30 values of start_logits and end_logits for tokens."),
    ],
)
def test_the_line_says_what_was_compared(name, line, tmp_path):
    TASKS[name].model().save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "out", verify=True).verification_line().endswith(line)


def test_the_line_says_what_the_outputs_say_nothing_of(tmp_path):
    TASKS["speech"].model().save_pretrained(tmp_path / "model")
    line = export(tmp_path / "model", tmp_path / "out", verify=True).verification_line()
    assert line.endswith(" These outputs say nothing of wav2vec2.masked_spec_embed.")


@pytest.mark.parametrize("name", ["images", "speech", "text and images", "images in a text"])
def test_it_tells_of_a_config_by_which_other_inputs_say_something_else(name, tmp_path):
    TASKS[name].model().save_pretrained(tmp_path / "model")
    out = export(tmp_path / "model", tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())
    # Another activation, in the tower that does not read text.
    tower = config.get("vision_config", config)
    key = "hidden_act"
    assert tower[key] != "relu"
    tower[key] = "relu"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DiffersError, match="of .* are not those of"):
        verify_export(open_checkpoint(tmp_path / "model"), out, config=tmp_path / "model")
