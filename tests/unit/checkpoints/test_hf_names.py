"""From an engine's tensors to a model with Hugging Face names: the names and bits that transformers itself writes, and
a refusal where something is amiss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from helpers.export_runs import llama
from helpers.snapshots import as_bytes
from lp_dist.checkpoints.entries import Checkpoint, Entry
from lp_dist.checkpoints.hf_names import hf_tensors, loadable_config
from lp_dist.errors import UsageError

MOE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**MOE, "tie_word_embeddings": True}),
    "Llama, not tied": ("LlamaForCausalLM", "LlamaConfig", MOE),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 4}),
    "Qwen2Moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**MOE, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4},
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 64}),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 64},
    ),
    "BERT": (
        "BertForMaskedLM",
        "BertConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 64,
        },
    ),
    "HRM": ("HrmTextForCausalLM", "HrmTextConfig", {**MOE, "num_key_value_heads": 2}),
}


def checkpoint_of(tensors: dict[str, Tensor], **more: Any) -> Checkpoint:
    return Checkpoint(
        Path("somewhere"),
        "a test",
        {name: Entry(tuple(t.shape), t.dtype, t.clone) for name, t in tensors.items()},
        runtime_names=True,
        **more,
    )


def written(checkpoint: Checkpoint, config: Path | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for hf_tensor in hf_tensors(checkpoint, config):
        tensors |= hf_tensor.read()
    return tensors


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("config")
    llama().config.save_pretrained(directory)
    return directory


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return dict(llama().named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_names_and_bits_of_save_pretrained(name, tmp_path):
    cls, config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**values))
    for param in model.parameters():
        param.data.normal_()  # biases and norms too, which would be alike
    model.save_pretrained(tmp_path)
    got, wanted = written(checkpoint_of(model.state_dict()), tmp_path), load_file(tmp_path / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert not [key for key in wanted if as_bytes(got[key]) != as_bytes(wanted[key])]
    if name in ("Mixtral", "Qwen2Moe"):
        assert len(wanted) > len(model.state_dict()), "the experts are not taken apart"
    if name == "HRM":
        assert len(wanted) < len(model.state_dict()), "gates, queries, keys and values are not joined"


def test_they_keep_the_order_of_the_checkpoint(config, tensors):
    names = [*tensors]
    assert [*written(checkpoint_of(tensors), config)] == names != sorted(names)


def test_a_form_that_needs_all_tensors_at_once_is_refused(config, tensors, monkeypatch):
    def revert(_: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(state) < len(tensors):
            raise KeyError("another")
        return {"all": torch.cat([tensor.flatten() for tensor in state.values()])}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    with pytest.raises(UsageError, match="LlamaForCausalLM's weights .* trainer.save_model"):
        hf_tensors(checkpoint_of(tensors), config)


@pytest.mark.parametrize("prefix", ["model.", "module.", "state.model."])
def test_the_name_under_which_a_script_kept_the_model_is_taken_off(prefix, config, tensors):
    kept = {prefix + name: tensor for name, tensor in tensors.items()}
    got = written(
        checkpoint_of({**kept, "step": torch.tensor(3), "lr_scheduler.last_lr": torch.ones(1)}), config
    )  # the script's own
    assert got.keys() == tensors.keys()
    assert not [name for name in tensors if as_bytes(got[name]) != as_bytes(tensors[name])]


def test_a_tied_tensor_may_have_either_name(config, tensors):
    embedding = tensors.pop("model.embed_tokens.weight")
    got = written(checkpoint_of({**tensors, "lm_head.weight": embedding}), config)
    assert "lm_head.weight" not in got and as_bytes(got["model.embed_tokens.weight"]) == as_bytes(embedding)


def test_a_script_may_tie_what_the_config_does_not(tensors, tmp_path):
    llama(tie_word_embeddings=False).config.save_pretrained(tmp_path)
    got = written(checkpoint_of(tensors, tied={"lm_head.weight": "model.embed_tokens.weight"}), tmp_path)
    assert (
        as_bytes(got["lm_head.weight"]) == as_bytes(tensors["model.embed_tokens.weight"])
        and len(got) == len(tensors) + 1
    )


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop(NORM), [f"has no {NORM}", "LlamaForCausalLM needs", "--config MODEL", "frozen"]),
        (
            lambda tensors: tensors.update({NORM: torch.ones(22)}),
            [f"{NORM} has the shape [22]", "and [21] by", "--config MODEL"],
        ),
        (
            lambda tensors: tensors.update({"model.extra": torch.ones(1), "model.extra2": torch.ones(1)}),
            ["2 tensors", "model.extra;", "--config MODEL"],
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.lora_A.default.weight": torch.ones(1)}),
            ["1 tensors", "LoRA", "lp-dist merge"],
        ),
        (
            lambda tensors: (
                [
                    tensors.update(
                        {f"base_model.model.{name.replace('.weight', '.base_layer.weight')}": tensors.pop(name)}
                    )
                    for name in [*tensors]
                ]
                + [tensors.update({"base_model.model.lora_B": torch.ones(1)})]
            ),
            ["has no ", "LoRA", "lp-dist merge"],
        ),
    ],
    ids=["missing", "shape", "foreign", "an adapter's", "an adapter around it"],
)
def test_other_tensors_than_the_models_are_refused(change, words, config, tensors):
    change(tensors)
    with pytest.raises(UsageError) as caught:
        hf_tensors(checkpoint_of(tensors), config)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ["no config.json", "--config MODEL"]),
        ({"model_type": "nothing_like_it"}, ["does not read", "--config MODEL", "--trust-remote-code"]),
        (
            {"model_type": "llama", "architectures": ["LlamaForNothing"]},
            ["LlamaForNothing", transformers.__version__, "--trust-remote-code"],
        ),
        ({"model_type": "llama"}, ["architecture None"]),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 0},
            ["LlamaForCausalLM can't be made", "--config MODEL"],
        ),
    ],
    ids=["none", "model_type", "architecture", "no architecture", "of no model"],
)
def test_a_config_of_no_known_model_is_refused_for_an_engines_tensors_alone(text, words, tensors, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(json.dumps(text))
    checkpoint = checkpoint_of(tensors)
    with pytest.raises(UsageError) as caught:
        hf_tensors(checkpoint, tmp_path if text is not None else None)
    assert all(word in str(caught.value) for word in words), caught.value
    plain = Checkpoint(checkpoint.path, checkpoint.form, checkpoint.entries)
    assert [*written(plain, tmp_path if text is not None else None)] == [*tensors]


def test_a_tied_tensor_with_two_hf_names_is_written_once_if_it_is_the_same(config, tensors):
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].detach().clone()}
    plain = [
        Checkpoint(Path("somewhere"), "a test", checkpoint_of({**tensors, "lm_head.weight": weight}).entries)
        for weight in (head["lm_head.weight"], head["lm_head.weight"] + 1e-3, head["lm_head.weight"].bfloat16())
    ]
    assert [written(checkpoint, config).keys() == tensors.keys() for checkpoint in plain] == [True, False, False]


def test_config_json_is_of_the_new_dtype_and_has_nothing_that_a_loader_trips_over():
    config = {
        "dtype": "float32",
        "architectures": ["A"],
        "sparsity_config": {"format": "dense"},
        "text_config": {"torch_dtype": "float32", "a": [1]},
        "compression_config": {},
        "quantization_config": {},
    }
    assert loadable_config(config, torch.bfloat16) == {
        "dtype": "bfloat16",
        "architectures": ["A"],
        "text_config": {"torch_dtype": "bfloat16", "a": [1]},
    }
    assert loadable_config(config, None) == {
        "dtype": "float32",
        "architectures": ["A"],
        "text_config": {"torch_dtype": "float32", "a": [1]},
    }
    assert loadable_config({}, torch.float16) == {"dtype": "float16"} and loadable_config({}, None) == {}
