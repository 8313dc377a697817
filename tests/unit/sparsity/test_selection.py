"""Which parameters decay: rules by module type, then by name; each trainable parameter in exactly one group."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lp_dist import param_groups
from lp_dist.sparsity.selection import decayed_names


def llama(**overrides) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
                **overrides,
            }
        )
    )


LLAMA = {
    f"model.layers.0.{name}.weight"
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}


def assert_claimed_once(model: nn.Module, groups: list[dict]) -> None:
    claimed = [id(p) for group in groups for p in group["params"]]
    assert len(claimed) == len(set(claimed))
    assert set(claimed) == {id(p) for p in model.parameters() if p.requires_grad}


def test_llama_decays_the_matrices_of_its_layers_alone():
    for model in (llama(), llama(tie_word_embeddings=False)):
        assert decayed_names(model) == LLAMA
        assert_claimed_once(model, param_groups(model, 0.1))


def test_a_switch_includes_embeddings_and_the_head():
    assert decayed_names(llama(), include_embeddings=True) == LLAMA | {"model.embed_tokens.weight"}  # tied: once
    untied = decayed_names(llama(tie_word_embeddings=False), include_embeddings=True)
    assert untied == LLAMA | {"model.embed_tokens.weight", "lm_head.weight"}


def test_gpt2_whose_linear_layers_are_of_a_class_of_its_own():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    assert decayed_names(model) == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert_claimed_once(model, param_groups(model, 0.1))


def test_an_output_head_is_known_by_its_role_not_only_by_its_name():
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            tie_word_embeddings=False,
        )
    )
    names = decayed_names(model)
    assert "cls.predictions.decoder.weight" not in names
    assert {"bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.output.dense.weight"} <= names
    assert "cls.predictions.decoder.weight" in decayed_names(model, include_embeddings=True)


def test_fused_expert_tensors_decay():
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )
    names = decayed_names(model)
    assert any("experts" in name for name in names)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in names)
    assert_claimed_once(model, param_groups(model, 0.1))


def test_modules_of_torch():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "norm": nn.LayerNorm(8),
            "group_norm": nn.GroupNorm(2, 4),
            "embedding": nn.Embedding(5, 8),
            "linear": nn.Linear(8, 8),
        }
    )
    assert decayed_names(model) == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "linear.weight",
    }


def test_what_starts_at_zero_is_left_out_since_zero_absorbs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    assert decayed_names(model) == {"0.weight"}
    assert_claimed_once(model, param_groups(model, 0.1))


def test_under_zero_init_the_shape_of_a_parameter_lies():
    # DeepSpeed leaves a tensor of shape (0,) and puts the real shape beside it; the rules must not see one dimension.
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    for param in model.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0)
    assert decayed_names(model) == {"0.weight"}


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert decayed_names(model) == {"1.weight"}
    assert_claimed_once(model, param_groups(model, 0.1))


def test_groups_carry_lambda_and_the_overrides_and_none_is_empty():
    decayed, rest = param_groups(llama(), 0.3, p=0.8, lr=1e-4)
    assert (decayed["weight_decay"], decayed["p"], decayed["lr"]) == (0.3, 0.8, 1e-4)
    assert (rest["weight_decay"], rest["lr"]) == (0.0, 1e-4)
    assert (
        len(param_groups(nn.Linear(3, 3, bias=False), 0.3)) == 1
    )  # DeepSpeed drops empty groups, which shifts indices


def test_a_target_needs_no_lambda_in_the_groups():
    decayed, rest = param_groups(model := llama())
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.0, 0.0)
    names = {id(param): name for name, param in model.named_parameters()}
    assert {names[id(param)] for param in decayed["params"]} == LLAMA
    assert_claimed_once(model, [decayed, rest])


def test_nothing_to_decay_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="no trainable matrix"):
        param_groups(nn.LayerNorm(4), 0.1)
    with pytest.raises(ValueError, match="Unfreeze"):
        param_groups(nn.Linear(4, 4).requires_grad_(False), 0.1)


def test_names_replace_the_rules_and_unknown_ones_raise():
    model = llama()
    decayed, rest = param_groups(model, 0.1, names=["model.norm.weight"])
    assert [id(p) for p in decayed["params"]] == [id(model.model.norm.weight)]
    assert_claimed_once(model, [decayed, rest])
    with pytest.raises(ValueError, match="'model.nom.weight'"):
        param_groups(model, 0.1, names=["model.nom.weight"])
