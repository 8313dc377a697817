"""Which weights belong to one group, of every family of models: zeroing a recognised group must be the same as
cutting it out.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.families import FAMILIES, Own, model_of, slot_of, slots
from lp_dist.errors import UsageError
from lp_dist.structured.resolve import KINDS, groups_of, resolve_groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_group_is_has_an_effect_by_what_reads_it_alone(family, kind):
    """Noise in a group's own weights changes the model; once its inputs of the last layer are zero it changes nothing,
    and its elements are all there.
    """
    counts = FAMILIES[family][1]
    # Every expert is chosen, so that each has an effect.
    model = model_of(family, **({"num_experts_per_tok": counts[3]} if len(counts) > 3 else {}))
    expected = dict(zip(KINDS, counts)).get(kind, 0)
    if not expected:
        with pytest.raises(
            UsageError,
            match=f"recognised in {type(model).__name__}. Looked for: .* Describe them by lp_dist.groups_of",
        ):
            resolve_groups(model, kind)
        return
    resolved, tokens = resolve_groups(model, kind), torch.arange(24).view(2, 12) % 61
    sets = 2 * counts[3] if kind == "expert_channels" else 2
    assert [groups.count for groups in resolved] == [expected] * sets
    grouped_query = kind == "heads" and FAMILIES[family][1][1] != FAMILIES[family][1][2]
    for groups in resolved:
        group = groups.count - 1
        writers, readers = slots(model, groups, group, False), slots(model, groups, group, True)
        assert sum(slot.numel() for slot in (*writers, *readers)) == groups.elements

        def noise(of=writers) -> torch.Tensor:
            with torch.no_grad():
                before = [slot.clone() for slot in of]
                for slot in of:
                    slot.add_(torch.randn(slot.shape))
                logits = model(tokens).logits
                for slot, old in zip(of, before):
                    slot.copy_(old)
            return logits

        plain = model(tokens).logits
        for slot in writers:  # each of them counts, but the bias of keys, which softmax takes out
            changed = (noise([slot]) - plain).abs().max() > 1e-5
            assert changed or slot.ndim == 1
        for slot in readers:
            slot.zero_()
        torch.testing.assert_close(noise(), model(tokens).logits, rtol=0, atol=1e-6)
        if (
            not grouped_query
            # nothing else of its layer belongs to it: with its weights zero as well, gradients there are zero, so
            # nothing brings it back
        ):
            for slot in writers:
                slot.zero_()
            model.zero_grad()
            model(tokens).logits.square().mean().backward()
            grads = {name: param.grad for name, param in model.named_parameters()}
            for member in groups.members:
                assert not slot_of(grads[member.name], member, group).any(), member


def test_custom_groups_are_described_by_patterns():
    model = nn.Sequential(Own(), Own())
    resolved = groups_of(
        model, outputs=["*.left", "*.right"], inputs="*.back", along="*.slope.weight", kind="channels"
    )
    assert [(groups.label, groups.count, groups.elements) for groups in resolved] == [
        ("0 channels", 6, 2 * (4 + 1) + 4 + 1),
        ("1 channels", 6, 15),
    ]
    assert {(member.name, member.dim, member.stop, member.reads) for member in resolved[1].members} == {
        ("1.left.weight", 0, 6, False),
        ("1.left.bias", 0, 6, False),
        ("1.right.weight", 0, 6, False),
        ("1.right.bias", 0, 6, False),
        ("1.slope.weight", 0, 6, False),
        ("1.back.weight", 1, 6, True),
    }
    assert resolve_groups(model, resolved) == resolved
    pairs = groups_of(model, outputs="*.left", width=2)
    assert [(groups.count, groups.elements) for groups in pairs] == [(3, 10)] * 2
    described = groups_of(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), outputs="0", inputs="2")
    assert [(groups.name, groups.count, groups.elements, len(groups.members)) for groups in described] == [
        ("0.weight", 6, 7, 3)
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(outputs="*.up"), r"'\*.up' matches no linear layer of Sequential; names look like '0.back'"),
        (dict(along="*.up"), r"matches no parameter of Sequential; names look like"),
        (dict(outputs="*t"), r"'\*t' matches two of the same layer \(0.left, 0.right\)"),
        (dict(outputs=["*.left", "*.back"]), "the groups of 0 are 4 and 6 wide, and width=1"),
        (dict(outputs="*.left", width=4), "the groups of 0 are 6 wide, and width=4"),
        ({}, "no patterns are given"),
    ],
)
def test_patterns_that_say_no_groups_are_refused(arguments, says):
    with pytest.raises(UsageError, match=says):
        groups_of(nn.Sequential(Own(), Own()), **arguments)


def test_groups_that_share_weights_and_unknown_ones_are_refused():
    model = model_of("llama")
    with pytest.raises(
        UsageError, match="q_proj.weight belongs to .* kv_groups and to .* heads as well; leave one of them out"
    ):
        resolve_groups(model, ["heads", "kv_groups"])
    with pytest.raises(
        UsageError,
        match=(
            "groups='neurons' is none of channels, heads, kv_groups, experts, expert_channels; name one, or describe"
            " your own"
        ),
    ):
        resolve_groups(model, "neurons")
    with pytest.raises(UsageError, match="no groups are named"):
        resolve_groups(model, [])
    assert len(resolve_groups(model, ["channels", "kv_groups"])) == 4


def test_adapters_must_be_merged_first():
    peft = pytest.importorskip("peft")
    with pytest.raises(UsageError, match="q_proj has an adapter beside it, .* merge the adapter first"):
        resolve_groups(peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"])), "channels")


def test_fused_layers_and_experts_are_described_as_they_are_recognised():
    """Phi-3 has queries, keys and values in one layer, and fewer of the latter; Mixtral its experts in two tensors."""
    model = model_of("phi3")
    described = groups_of(
        model,
        outputs={"*.self_attn.qkv_proj": [32, 16, 16]},
        inputs="*.self_attn.o_proj",
        width=16,
        kind="kv_groups",
    )
    for groups, recognised in zip(described, resolve_groups(model, "kv_groups"), strict=True):
        assert (groups.count, groups.elements, {*groups.members}) == (
            recognised.count,
            recognised.elements,
            {*recognised.members},
        )
    with pytest.raises(UsageError, match="has 64 outputs, which are not blocks of 32, 16 with as many groups each"):
        groups_of(model, outputs={"*.qkv_proj": [32, 16]}, inputs="*.o_proj", width=16)
    model = model_of("mixtral")
    described = groups_of(model, along=["*.experts.gate_up_proj", "*.experts.down_proj"], kind="bodies")
    recognised = resolve_groups(model, "experts")
    assert [(g.count, g.elements) for g in described] == [(g.count, g.elements) for g in recognised]


def test_layers_of_gpt2_are_known_in_a_class_that_fsdp2_has_made():
    """It gives every module that it shards a subclass with a name of its own."""
    from lp_dist.structured.groups import linear_layers

    model = model_of("gpt2")
    expected = linear_layers(model)
    assert any(layer.transposed for layer in expected)
    for module in model.modules():
        cls = type(module)
        module.__class__ = type(f"FSDP{cls.__name__}", (cls,), {})
    assert linear_layers(model) == expected
