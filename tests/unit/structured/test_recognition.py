"""Channels and heads of families that are easily taken for another: what has a part that is not known is refused, and
says which.
"""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors import safe_open
from torch import nn

from helpers.families import GROUPED, SIZES, Own, model_of, slots
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.report.inspection import inspect
from lp_dist.structured.resolve import groups_of, resolve_groups

TOKENS = torch.arange(24).view(2, 12) % 61


@pytest.mark.parametrize(
    "family, sizes, kind, says",
    [
        (
            "diffllama",
            GROUPED,
            "kv_groups",
            "it is not known what model.layers.0.self_attn.lambda_q1 does to the heads",
        ),
        (
            "stablelm",
            {**GROUPED, "qk_layernorm": True},
            "kv_groups",
            "q_layernorm.norms is a list, and it is not known which head uses which element",
        ),
        (
            "gemma3n_text",
            {
                **GROUPED,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "vocab_size_per_layer_input": 61,
                "hidden_size_per_layer_input": 12,
                "laurel_rank": 6,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.0] * 4,
            },
            "kv_groups",
            "model.layers.2.self_attn: has queries alone, and reads another layer's keys and values",
        ),
    ],
)
def test_heads_that_hang_together_otherwise_are_refused(family, sizes, kind, says):
    with pytest.raises(UsageError, match=says):
        resolve_groups(model_of(family, **sizes), kind)


def test_queries_may_go_where_their_keys_are_read_by_another_layer():
    resolved = resolve_groups(
        model_of(
            "gemma3n_text",
            **{
                **GROUPED,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "vocab_size_per_layer_input": 61,
                "hidden_size_per_layer_input": 12,
                "laurel_rank": 6,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.0] * 4,
            },
        ),
        "heads",
    )
    assert [groups.count for groups in resolved] == [4, 4]
    assert {member.name.split(".")[-2] for groups in resolved for member in groups.members} == {"q_proj", "o_proj"}


def test_a_layer_that_calls_itself_attention_has_channels_too():
    model = model_of(
        "jamba",
        **GROUPED,
        num_experts=1,
        attn_layer_offset=1,
        attn_layer_period=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    )
    assert "Attention" in type(model.model.layers[1]).__name__
    assert [groups.name for groups in resolve_groups(model, "channels")] == [
        "model.layers.0.feed_forward",
        "model.layers.1.feed_forward",
    ]


def test_channels_of_experts_are_told_to_be_another_kind(caplog):
    sizes = {
        **GROUPED,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    with caplog.at_level(logging.WARNING, "lp_dist"):
        resolved = resolve_groups(model_of("qwen2_moe", **sizes), "channels")
    assert [groups.name for groups in resolved] == [
        "model.layers.0.mlp.shared_expert",
        "model.layers.1.mlp.shared_expert",
    ]
    assert (
        "recognised in 2 parts of the model, which stay as they are: model.layers.0.mlp.experts: channels of"
        " experts are a kind of their own, expert_channels" in caplog.text
    )


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("llama", {**GROUPED, "intermediate_size": 32}),
        ("gpt2", {"n_inner": 32}),
        ("opt", {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 32}),
        ("bert", {**SIZES, "intermediate_size": 16}),
    ],
)
def test_as_many_channels_as_the_model_is_wide_or_half(family, sizes):
    """A norm as wide as the model is as wide as two of its layers together, and ties nothing."""
    model = model_of(family, **sizes)
    resolved = resolve_groups(model, "channels")
    assert [groups.count for groups in resolved] == [
        min(sizes.get(key, 99) for key in ("intermediate_size", "n_inner", "ffn_dim"))
    ] * 2
    for slot in slots(model, resolved[1], 5, reads=True):
        slot.zero_()
    before = model(TOKENS).logits
    for slot in slots(model, resolved[1], 5, reads=False):
        slot.add_(1.0)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-6)


def test_layers_that_wildcards_name_keep_rows_and_columns_of_a_sequential_together():
    """The 0 and 2 in the patterns are places in a layer, and no layers."""
    model = nn.Sequential(
        *(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))}) for _ in range(12))
    )
    for outputs, inputs in (("*.mlp.0", "*.mlp.2"), ("[0-9]*.mlp.0", "*.2")):
        resolved = groups_of(model, outputs=outputs, inputs=inputs, kind="channels")
        assert [(groups.label, groups.count, groups.elements) for groups in resolved] == [
            (f"{i} channels", 6, 4 + 1 + 4) for i in range(12)
        ]
    assert [groups.label for groups in groups_of(model, outputs="1?.mlp.0", inputs="1?.mlp.2")] == [
        "10 groups",
        "11 groups",
    ]
    with pytest.raises(UsageError, match=r"'1\?.mlp.2' matches nothing in 0, so that groups there would not be whole"):
        groups_of(model, outputs="*.mlp.0", inputs="1?.mlp.2")
    with pytest.raises(UsageError, match=r"'0.left' matches nothing in the layers that others name by wildcards"):
        groups_of(nn.Sequential(Own(), Own()), outputs="0.left", inputs="*.back")


def test_towers_of_two_widths_and_names_of_their_own_in_the_file(tmp_path):
    """Gemma 3 with pictures: the text model has other names in the file than in memory, and the vision tower another
    width.
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**GROUPED, "head_dim": 8, "vocab_size": 64, "sliding_window": 8, "max_position_embeddings": 64}
    vision = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=63,
            boi_token_index=62,
            eoi_token_index=61,
        )
    )
    resolved = resolve_groups(model, "channels")
    assert sorted(groups.count for groups in resolved) == [40, 40, 48, 48]
    for groups in resolved:
        for i in range(groups.count // 2):
            for slot in slots(model, groups, i, reads=True):
                slot.zero_()
    model.save_pretrained(tmp_path / "unshrunk")
    with safe_open(tmp_path / "unshrunk" / "model.safetensors", "pt") as file:
        assert not any(name.startswith("model.language_model") for name in set(file.keys())), (
            "as in memory, so that this tests nothing"
        )
    assert {tuple(of) for of in inspect(tmp_path / "unshrunk").channels.values()} == {(20, 40), (24, 48)}
    export(tmp_path / "unshrunk", tmp_path / "small", shrink=True)
    small = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert small.config.text_config.intermediate_size == 24
    torch.testing.assert_close(
        small(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits, rtol=0, atol=1e-5
    )


def test_a_submodel_with_a_configuration_of_its_own_is_as_wide_as_that_says():
    from transformers import PretrainedConfig

    model = nn.Module()
    model.config = PretrainedConfig(hidden_size=16)
    model.config.vision_config = PretrainedConfig(hidden_size=24)
    model.layers = nn.ModuleList(
        nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for width in (16, 24, 20)
    )
    assert [groups.count for groups in resolve_groups(model, "channels")] == [
        32,
        48,
    ], "of a width that no configuration has it is none"


def test_encoder_and_decoder_of_one_width_are_cut_each_to_its_own(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=61,
            d_model=16,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    ).eval()
    model.model.encoder.layers[0].fc2.weight.data[:, :16] = 0
    model.save_pretrained(tmp_path / "unshrunk")
    export(tmp_path / "unshrunk", tmp_path / "small", shrink=True)
    small = BartForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    assert (small.config.encoder_ffn_dim, small.config.decoder_ffn_dim) == (16, 32)
    torch.testing.assert_close(small(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, rtol=0, atol=1e-5)
