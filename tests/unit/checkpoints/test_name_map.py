"""The map of names in memory to names in files: for models of each form that transformers saves, it agrees with what
`save_pretrained` writes and `from_pretrained` reads, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from helpers.saved_models import SAVED_MODELS, files_of, saved_model, unequal_params, zeros_of
from lp_dist.checkpoints.hf_names import NameMap, check_saved_names, hf_shapes_of, name_map, skeleton_of
from lp_dist.errors import UsageError
from lp_dist.report.inspection import inspect
from lp_dist.report.saved_zeros import count_saved
from lp_dist.sparsity.measure import measure_sparsity
from lp_dist.sparsity.selection import matrix_names

# One of each kind of conversion.
SAMPLE = ["llama, tied", "mixtral", "granitemoe", "hrm_text", "bert", "vit", "qwen2_5_vl", "ernie4_5_vl_moe"]


def sampled(names: Any) -> list[Any]:
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.long) for name in names]


def map_of(model: Any, directory: Path) -> NameMap:
    return name_map(skeleton_of(model), {name: tuple(t.shape) for name, t in files_of(directory).items()})


@pytest.mark.parametrize("name", sampled(SAVED_MODELS))
def test_both_ways_agree_with_save_pretrained_and_from_pretrained(name, tmp_path):
    model = saved_model(name)
    for directory in (tmp_path / "first", tmp_path / "again"):
        model.save_pretrained(directory)
        files = {name: tuple(tensor.shape) for name, tensor in files_of(directory).items()}
        assert hf_shapes_of(skeleton_of(model)) == files
        names = map_of(model, directory)
        assert not names.duplicates
        assert names.by_tensor.keys() == files.keys()
        assert names.by_param.keys() >= {name for name, _ in model.named_parameters()}
        assert not unequal_params(model, names, files_of(directory))
        model = type(model).from_pretrained(directory)


@pytest.mark.parametrize("name", sampled(SAVED_MODELS))
def test_what_is_counted_in_the_files_is_what_the_model_has(name, tmp_path):
    model = saved_model(name)
    model.save_pretrained(tmp_path)
    matrices = matrix_names(model)
    assert count_saved(tmp_path, matrices).counts == zeros_of(model, matrices.__contains__)
    assert inspect(tmp_path).total() == tuple(map(sum, zip(*zeros_of(model, matrices.__contains__).values())))


def test_a_map_names_all_experts_of_a_fused_parameter_and_no_other_tensor(tmp_path):
    model = saved_model("mixtral")
    model.save_pretrained(tmp_path)
    conversion = map_of(model, tmp_path).by_param["model.layers.1.mlp.experts.gate_up_proj"]
    assert conversion.is_of_one_param and not conversion.is_renaming
    assert set(conversion.hf_shapes) == {
        f"model.layers.1.block_sparse_moe.experts.{expert}.{which}.weight"
        for expert in range(4)
        for which in ("w1", "w3")
    }


@pytest.mark.parametrize("name", ["mixtral", "bert", "vit", "qwen2_5_vl", "minimax_m2"])
def test_a_model_of_a_class_with_a_head_and_one_without_read_the_files_of_each_other(name, tmp_path):
    head = saved_model(name)
    base = getattr(head, head.base_model_prefix)
    head.save_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    for cls, directory in ((type(base), "head"), (type(head), "base")):
        loaded, info = cls.from_pretrained(tmp_path / directory, output_loading_info=True)
        loaded.save_pretrained(tmp_path / f"{directory} of the other")
        names = map_of(loaded, tmp_path / directory)
        assert not unequal_params(loaded, names, files_of(tmp_path / directory))
        in_memory = {name for name, _ in loaded.named_parameters()}
        assert in_memory - names.by_param.keys() == in_memory & info["missing_keys"]
        again = map_of(loaded, tmp_path / f"{directory} of the other")
        assert not unequal_params(loaded, again, files_of(tmp_path / f"{directory} of the other"))
        assert again.by_param.keys() >= in_memory


def test_an_engines_names_are_taken_as_they_are():
    # In files its experts may be transposed.
    model = saved_model("qwen3_vl_moe")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = name_map(model, shapes, runtime_names=True)
    assert names.renamed == {name: name for name in shapes}


def test_a_tied_tensor_may_be_there_twice_or_by_its_second_name_alone(tmp_path):
    model = saved_model("llama, tied")
    shape = tuple(model.lm_head.weight.shape)
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    twice = name_map(model, {second: shape, first: shape})
    assert twice.renamed == {first: first} and twice.duplicates == {second: first}
    assert name_map(model, {second: shape}).renamed == {first: second}


@pytest.mark.parametrize(
    "param, change",
    [
        ("mlp.experts.gate_up_proj", lambda files: files.pop("block_sparse_moe.experts.2.w1.weight")),
        # What is left is as it should be, with an expert less.
        ("mlp.experts.down_proj", lambda files: files.pop("block_sparse_moe.experts.2.w2.weight")),
        (
            "mlp.experts.down_proj",
            lambda files: files.update(
                {f"block_sparse_moe.experts.{i}.w2.weight": torch.ones(32, 47) for i in range(4)}
            ),
        ),
        ("self_attn.o_proj.weight", lambda files: files.update({"self_attn.o_proj.weight": torch.ones(32, 31)})),
    ],
    ids=["half of an expert is missing", "an expert is missing", "experts of another shape", "another shape"],
)
def test_a_parameter_that_is_not_complete_in_the_files_is_named(param, change, tmp_path):
    model = saved_model("mixtral")
    model.save_pretrained(tmp_path)
    layer = "model.layers.1."
    files = files_of(tmp_path)
    of_layer = {name.removeprefix(layer): files.pop(name) for name in [*files] if name.startswith(layer)}
    change(of_layer)
    files |= {layer + name: tensor for name, tensor in of_layer.items()}
    save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"^1 parameters are not in .* such as '{layer}{param}'"):
        count_saved(tmp_path, matrix_names(model))


def test_a_model_that_was_read_in_the_form_of_memory_is_saved_in_it_again(tmp_path):
    saved_model("mixtral").save_pretrained(tmp_path / "memory", save_original_format=False)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "memory")
    model.save_pretrained(tmp_path / "again")
    shapes = {name: tuple(tensor.shape) for name, tensor in files_of(tmp_path / "again").items()}
    assert "model.layers.0.mlp.experts.down_proj" in shapes
    assert hf_shapes_of(skeleton_of(model)) == shapes
    assert count_saved(tmp_path / "again", matrix_names(model)) == measure_sparsity(model)


def test_what_a_class_does_not_save_is_not_expected_in_its_files(tmp_path):
    model = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=97,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )
    model.save_pretrained(tmp_path)
    skeleton = skeleton_of(model)
    assert hf_shapes_of(skeleton) == {name: tuple(tensor.shape) for name, tensor in files_of(tmp_path).items()}
    positions = "model.encoder.embed_positions.weight"
    check_saved_names(skeleton, matrix_names(model))
    with pytest.raises(UsageError, match=f"1 parameters of MarianMTModel .* such as {positions}"):
        check_saved_names(skeleton, [positions])


def test_a_class_that_transformers_does_not_know_is_saved_as_it_is_in_memory(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.data[0] = 0
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    names = ["0.weight", "1.weight"]
    assert count_saved(tmp_path, names) == measure_sparsity(model, names=names)
    with pytest.raises(UsageError, match="1 parameters .* such as '2.weight'"):
        count_saved(tmp_path, [*names, "2.weight"])


def test_a_parameter_that_would_not_come_back_is_refused_before_the_run(monkeypatch):
    skeleton = skeleton_of(saved_model("mixtral"))
    name = "model.layers.0.mlp.experts.down_proj"
    check_saved_names(skeleton, [name])
    from transformers.core_model_loading import revert_weight_conversion

    def revert(model: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {name.replace(".w2.", ".w4."): meta for name, meta in revert_weight_conversion(model, state).items()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    check_saved_names(skeleton, ["model.layers.0.mlp.experts.gate_up_proj"])
    with pytest.raises(UsageError, match=f"1 parameters of MixtralForCausalLM .* such as {name}; load"):
        check_saved_names(skeleton, [name])


def test_a_form_that_can_not_be_made_is_refused_before_the_run(monkeypatch):
    def revert(model: Any, state: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("gate")

    skeleton = skeleton_of(saved_model("mixtral"))
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    with pytest.raises(UsageError, match=r"MixtralForCausalLM can't be brought .*KeyError: 'gate'"):
        check_saved_names(skeleton, ["lm_head.weight"])
