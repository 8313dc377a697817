"""Heads that shapes do not tell, found by what an attention's code does: which weights they are, that they can be cut
out, and what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.families import EXPERTS, GROUPED, MIXTURES, SIZES, kill, model_of, slots
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.structured import recognition
from lp_dist.structured.probing import LayoutError, head_layout, structure_of
from lp_dist.structured.recognition import heads
from lp_dist.structured.resolve import resolve_groups

TOKENS = torch.arange(24).view(2, 12) % 61
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
# Sizes; how many layers have heads, and how many heads of queries, and of keys and values; and whether the
# configuration can have fewer.
FAMILIES: dict[str, tuple[dict, tuple[int, int, int], bool]] = {
    "gpt_oss": (MIXTURES["gpt_oss"][0], (2, 4, 2), True),
    "deepseek_v3": (MIXTURES["deepseek_v3"][0], (2, 4, 4), True),
    "qwen3_next": (
        {**EXPERTS, **LINEAR, "num_hidden_layers": 4, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
        (1, 4, 2),
        True,
    ),
    "qwen3_5_text": ({**GROUPED, **LINEAR, "num_hidden_layers": 4, "head_dim": 8}, (1, 4, 2), True),
    "mpt": (
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "vocab_size": 61, "max_seq_len": 64},
        (2, 4, 4),
        False,
    ),
}


def noise_is_harmless_once_unread(model: nn.Module, kind: str, counts: tuple[int, int]) -> None:
    resolved = resolve_groups(model, kind)
    assert [groups.count for groups in resolved] == [counts[1]] * counts[0]
    for groups in resolved:
        writers, readers = slots(model, groups, 1, False), slots(model, groups, 1, True)
        assert sum(slot.numel() for slot in (*writers, *readers)) == groups.elements
        with torch.no_grad():
            plain = model(TOKENS).logits
            changes = []
            for slot in writers:
                kept = slot.clone()
                slot.add_(torch.randn(slot.shape))
                changes.append(bool((model(TOKENS).logits - plain).abs().max() > 1e-6))
                slot.copy_(kept)
            # But the biases of keys, which softmax takes out.
            assert all(changed or slot.ndim == 1 for changed, slot in zip(changes, writers)) and any(changes)
            kill(model, groups, [1])
            before = model(TOKENS).logits
            for slot in writers:
                slot.add_(torch.randn(slot.shape))
            torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_in_a_head_does_nothing_once_what_reads_it_is_zero(family):
    sizes, (layers, heads, shared), _ = FAMILIES[family]
    noise_is_harmless_once_unread(model_of(family, **sizes), "heads", (layers, heads))
    noise_is_harmless_once_unread(model_of(family, **sizes), "kv_groups", (layers, shared))


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_ones_are_cut_out_where_the_configuration_can_say_so(family, tmp_path):
    sizes, (_, heads, shared), can_be_cut = FAMILIES[family]
    model = model_of(family, **sizes)
    for groups in resolve_groups(model, "kv_groups"):
        kill(model, groups, [0])
    model.save_pretrained(tmp_path / "masked")
    if not can_be_cut:
        with pytest.raises(UsageError, match="attention heads are dead and stay: all layers have one number"):
            export(tmp_path / "masked", tmp_path / "out", shrink=True)
        return
    done = export(tmp_path / "masked", tmp_path / "out", shrink=True, verify=True)
    assert done.verification["difference"] <= 1e-6
    small = type(model).from_pretrained(tmp_path / "out")
    assert small.config.num_attention_heads == heads - heads // shared
    torch.testing.assert_close(small(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-6)


def modernbert() -> Any:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    tokens = dict(cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return ModernBertForMaskedLM(ModernBertConfig(**{**SIZES, **tokens})).eval()


def test_modernbert_has_channels_and_heads_of_fused_layers(tmp_path: Path):
    model = modernbert()
    noise_is_harmless_once_unread(model, "heads", (2, 4))
    (first, _) = resolve_groups(model, "channels")
    assert (first.count, first.elements) == (48, 3 * 32)
    kill(model, first, range(8))
    kill(model, resolve_groups(model, "channels")[1], range(8, 16))
    model.save_pretrained(tmp_path / "masked")
    export(tmp_path / "masked", tmp_path / "out", shrink=True, verify=True)
    small = type(model).from_pretrained(tmp_path / "out").eval()
    assert small.config.intermediate_size == 40
    torch.testing.assert_close(small(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-6)


def test_the_tower_of_a_model_of_pictures_has_heads_of_its_own():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=2,
        hidden_size=24,
        intermediate_size=40,
        num_heads=3,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[1],
    )
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**GROUPED, "rope_parameters": rope}, vision_config=vision)
    )
    assert {(groups.name.split(".")[1], groups.count) for groups in resolve_groups(model, "heads")} == {
        ("language_model", 4),
        ("visual", 3),
    }


# -- attention that nobody knows ------------------------------------------------


class Gaze(nn.Module):
    """Three heads of four; values, a gate and queries in one layer, head by head, keys apart, one scale for each."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.head_dim, self.tie = 4, tie
        self.mix, self.key, self.end = nn.Linear(8, 36), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        self.warmth = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        values, gate, query = self.mix(states).view(batch, length, -1, 12).transpose(1, 2).split(4, dim=-1)
        key = self.key(states).view(batch, length, -1, 4).transpose(1, 2)
        weights = (query @ key.transpose(-1, -2) * self.warmth).softmax(-1)
        if self.tie:
            weights = weights - weights.mean(1, keepdim=True)
        seen = (weights @ values * gate.sigmoid()).transpose(1, 2).reshape(batch, length, -1)
        return self.end(seen)


def test_an_attention_that_nobody_knows_is_read_by_what_it_does():
    layout = head_layout(Gaze(), 4)
    assert (layout.heads, layout.shared, layout.last) == (3, 3, "end")
    assert {(m.name, m.dim, m.start, m.stop, m.width) for m in layout.members} == {
        ("mix.weight", 0, 0, 36, 12),
        ("mix.bias", 0, 0, 36, 12),
        ("key.weight", 0, 0, 12, 4),
        ("warmth", 0, 0, 3, 1),
    }
    assert head_layout(Gaze().to("meta"), 4) == layout, "the model's own weights are not read"


def test_heads_that_are_compared_with_each_other_are_refused():
    with pytest.raises(LayoutError):
        head_layout(Gaze(tie=True), 4)


class Shared(Gaze):
    """What it says depends on how many heads there are."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) / len(self.warmth)


def test_a_module_that_computes_something_else_without_a_head_is_refused():
    with pytest.raises(LayoutError, match="without a head it computes something else"):
        head_layout(Shared(), 4)


class Closed(Gaze):
    def forward(self, states: Tensor, map_of_the_house: Tensor) -> Tensor:
        return super().forward(states) + F.relu(map_of_the_house.sum())


def test_what_can_not_be_run_alone_has_no_layout():
    assert head_layout(Closed(), 4) is None


@pytest.mark.parametrize("family", ["olmo2", "diffllama"])
def test_heads_that_hang_together_are_refused_with_the_reason(family):
    with pytest.raises(UsageError, match="ties them together; by what|by what its code does"):
        resolve_groups(model_of(family, **GROUPED), "kv_groups")


def test_layers_of_one_structure_are_run_once(monkeypatch):
    """What an attention is, is the same in each; another one is run as well."""
    calls = []

    def counted(module: nn.Module, size: int):
        calls.append(module)
        return head_layout(module, size)

    monkeypatch.setattr(recognition, "head_layout", counted)
    model = model_of("deepseek_v3", num_hidden_layers=3)
    sets = heads(model)
    assert len(sets) == 3 and len(calls) == 1
    assert len({tuple(replace(member, name="") for member in groups.members) for groups in sets}) == 1
    model.model.layers[1].self_attn.scaling *= 2
    assert len(heads(model)) == 3 and len(calls) == 3


def test_a_structure_is_what_the_code_sees():
    first, second = (layer.self_attn for layer in model_of("deepseek_v3").model.layers)
    assert structure_of(first) == structure_of(second)
    second.o_proj = nn.Linear(second.o_proj.in_features, second.o_proj.out_features, bias=True)
    assert structure_of(first) != structure_of(second)
