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

from helpers.export_runs import SPARSE, llama
from helpers.model_directories import changed, rewritten
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import DiffersError, UsageError
from lp_dist.export.verify import verify_export
from lp_dist.export.writer import export

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT, IMAGE = {**SMALL, "vocab_size": 64}, {**SMALL, "image_size": 8, "patch_size": 4}
T5 = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
MODELS = {
    "a language model": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "experts": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=2)
    ),
    "encoder and decoder": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "no head": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "other input": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE)),
    "text and other input": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**TEXT, "max_position_embeddings": 8}, vision_config=IMAGE, projection_dim=8
        )
    ),
}
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_it_passes_on_models_of_all_kinds_by_runtime_names_and_hf_names(name, dtype, tmp_path):
    torch.manual_seed(0)
    alive = saved_alive(MODELS[name](), tmp_path)
    first = export(alive, tmp_path / "one", dtype=dtype, verify=True)
    second = export(tmp_path / "hf", tmp_path / "other", dtype=dtype, verify=True, shard_size="2KB")
    assert first.verification == second.verification and (first.verification["logits"] is None) == ("other" in name)
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

    alive = saved_alive(MODELS["experts"](), tmp_path)
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
