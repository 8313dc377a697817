"""What `lp-dist inspect` says of a model is what is in it: zeros, dead rows and columns, channels and heads without
effect, 2:4 blocks.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from helpers.families import MIXTURES, model_of, slots
from helpers.families import kill as kill_groups
from helpers.model_directories import rewritten, written
from lp_dist.cli import app
from lp_dist.report.inspection import inspect
from lp_dist.sparsity.measure import layer_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """12 layers, so that the order of names matters; grouped-query attention; the head tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=10,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                param[torch.rand(param.shape, generator=generator) < 0.4] = 0.0
        kill(model)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def kill(model) -> None:
    """In layer 1 channel 0 by its column, 1 by its up row, 2 by its gate row; in layer 2 head 1 by its columns, heads
    2 and 3 by their values.
    """
    feed, attention = model.model.layers[1].mlp, model.model.layers[2].self_attn
    feed.down_proj.weight[:, 0] = feed.up_proj.weight[1] = feed.gate_proj.weight[2] = 0.0
    attention.o_proj.weight[:, 4:8] = attention.v_proj.weight[4:] = 0.0


def test_every_tensor_is_counted_once_and_in_the_order_of_the_model(llama):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama)
    inspection = inspect(llama)
    assert [tensor.name for tensor in inspection.tensors] == [name for name, _ in model.named_parameters()]
    for tensor, (name, param) in zip(inspection.tensors, model.named_parameters()):
        assert (tensor.zeros, tensor.elements, tensor.shape, tensor.dtype) == (
            int((param == 0).sum()),
            param.numel(),
            list(param.shape),
            "float32",
        )
        assert tensor.counted == name.endswith("_proj.weight")
    decayed = [param for name, param in model.named_parameters() if name.endswith("_proj.weight")]
    assert inspection.total() == (
        sum(int((param == 0).sum()) for param in decayed),
        sum(param.numel() for param in decayed),
    )
    assert inspection.total(counted_alone=False)[1] == sum(param.numel() for param in model.parameters())
    assert list(inspection.tensors_by("layer")) == list(range(12))
    assert list(inspection.tensors_by("kind")) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_dead_rows_columns_and_blocks_against_plain_loops(llama):
    from transformers import LlamaForCausalLM

    params = dict(LlamaForCausalLM.from_pretrained(llama).named_parameters())
    for tensor in inspect(llama).tensors:
        matrix = params[tensor.name].tolist()
        if not isinstance(matrix[0], list):
            assert tensor.dead_rows is tensor.dead_columns is tensor.blocks is tensor.conforming is None
            continue
        assert tensor.dead_rows == sum(all(weight == 0 for weight in row) for row in matrix)
        assert tensor.dead_columns == sum(all(weight == 0 for weight in column) for column in zip(*matrix))
        blocks = [
            row[i : i + 4] for row in matrix for i in range(0, len(row) - 3, 4)
        ]  # what is left of a row of 10 is no block
        assert (tensor.blocks, tensor.conforming) == (len(blocks), sum(block.count(0) >= 2 for block in blocks))


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def test_dead_channels_and_heads_have_no_effect_and_others_have(llama):
    from transformers import LlamaForCausalLM

    inspection = inspect(llama)
    assert inspection.channels["model.layers.1.mlp"] == [3, 10] and inspection.channels["model.layers.3.mlp"][1] == 10
    assert inspection.heads["model.layers.2.self_attn"] == [3, 4] and inspection.heads["model.layers.3.self_attn"] == [
        0,
        4,
    ]
    assert len(inspection.channels) == len(inspection.heads) == 12

    model = LlamaForCausalLM.from_pretrained(llama)
    before = logits(model)
    feed, attention = model.model.layers[1].mlp, model.model.layers[2].self_attn
    with torch.no_grad():  # whatever else the dead ones have may change
        feed.up_proj.weight[0], feed.gate_proj.weight[1], feed.down_proj.weight[:, 2] = 5.0, 5.0, 5.0
        attention.q_proj.weight[4:8], attention.o_proj.weight[:, 8:] = 5.0, 5.0
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        feed.down_proj.weight[:, 3] += 1.0
    assert not torch.equal(logits(model), before)


def test_a_bias_keeps_a_channel_alive(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=10,
            num_hidden_layers=1,
            num_attention_heads=4,
            mlp_bias=True,
            attention_bias=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    feed, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    with torch.no_grad():
        feed.up_proj.weight[1] = attention.v_proj.weight[:4] = 0.0
        feed.up_proj.bias[1] = attention.v_proj.bias[3] = 1.0
    model.save_pretrained(tmp_path / "alive")
    with torch.no_grad():
        feed.up_proj.bias[1] = attention.v_proj.bias[:] = 0.0
    model.save_pretrained(tmp_path / "dead")
    alive, dead = inspect(tmp_path / "alive"), inspect(tmp_path / "dead")
    assert alive.channels["model.layers.0.mlp"] == [0, 10] and dead.channels["model.layers.0.mlp"] == [1, 10]
    assert alive.heads["model.layers.0.self_attn"] == [0, 4] and dead.heads["model.layers.0.self_attn"] == [1, 4]


@pytest.mark.parametrize("act, dead", [("silu", 1), ("sigmoid", 0)])
def test_a_gate_that_is_open_at_zero_makes_nothing_dead(tmp_path, act, dead):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=10,
            num_hidden_layers=1,
            num_attention_heads=4,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.model.layers[0].mlp.gate_proj.weight.data[1] = 0.0
    model.save_pretrained(tmp_path)
    assert inspect(tmp_path).channels["model.layers.0.mlp"] == [dead, 10]
    before = logits(model)
    model.model.layers[0].mlp.up_proj.weight.data[1] = 5.0
    assert torch.equal(logits(model), before) == bool(dead)


def test_gpt2_stores_its_matrices_the_other_way(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0))
    layer = model.transformer.h[0]
    with torch.no_grad():
        layer.mlp.c_fc.weight[3] = 0.0  # an input of 16
        layer.mlp.c_fc.weight[:, 5:7] = 0.0  # two outputs of 64, which their biases may keep alive
        layer.mlp.c_proj.weight[9] = 0.0  # a channel
        layer.attn.c_proj.weight[4:8] = 0.0  # a head
    model.save_pretrained(tmp_path)
    inspection = inspect(tmp_path)
    fc = next(tensor for tensor in inspection.tensors if tensor.name == "transformer.h.0.mlp.c_fc.weight")
    assert (fc.dead_rows, fc.dead_columns, fc.counted) == (2, 1, True)
    assert inspection.channels == {"transformer.h.0.mlp": [1, 64], "transformer.h.1.mlp": [0, 64]}
    assert inspection.heads == {"transformer.h.0.attn": [1, 4], "transformer.h.1.attn": [0, 4]}


# Of the first layer: weights and biases of one head of values; and of two channels, one of either of the two rows that
# are multiplied.
SILENT = {
    "phi3": (
        lambda layer: [layer.self_attn.qkv_proj.weight[56:]],
        lambda layer: [layer.mlp.gate_up_proj.weight[5], layer.mlp.gate_up_proj.weight[48 + 9]],
    ),
    "qwen2": (
        lambda layer: [layer.self_attn.v_proj.weight[8:], layer.self_attn.v_proj.bias[8:]],
        lambda layer: [layer.mlp.gate_proj.weight[5], layer.mlp.up_proj.weight[9]],
    ),
    "gpt2": (lambda layer: [layer.attn.c_attn.weight[:, 88:], layer.attn.c_attn.bias[88:]], lambda layer: []),
    "opt": (lambda layer: [layer.self_attn.v_proj.weight[24:], layer.self_attn.v_proj.bias[24:]], lambda layer: []),
    "bert": (
        lambda layer: [layer.attention.self.value.weight[24:], layer.attention.self.value.bias[24:]],
        lambda layer: [],
    ),
}


@pytest.mark.parametrize("family", [*SILENT, "gpt_neox"])
def test_what_each_family_calls_its_layers_makes_no_difference(family, tmp_path):
    from helpers.families import FAMILIES
    from lp_dist.structured.resolve import resolve_groups

    model, (width, heads, shared) = model_of(family), FAMILIES[family][1]
    structures = {kind: resolve_groups(model, kind)[0] for kind in ("channels", "heads")}
    values, ups = SILENT.get(family, (lambda layer: [], lambda layer: []))
    layer = model.get_submodule(re.match(r".*?\.0(?=\.|$)", structures["channels"].name)[0])
    dead = {
        "channels": [2, *([5, 9] if ups(layer) else [])],
        "heads": [0, *range(heads - heads // shared, heads if values(layer) else 0)],
    }
    for slot in (*values(layer), *ups(layer)):
        slot.data.zero_()
    for kind, first in (("channels", 2), ("heads", 0)):
        for slot in slots(model, structures[kind], first, reads=True):
            slot.zero_()
    model.save_pretrained(tmp_path)
    inspection = inspect(tmp_path)
    assert inspection.channels[structures["channels"].name] == [len(dead["channels"]), width]
    assert inspection.heads[structures["heads"].name] == [len(dead["heads"]), heads]
    assert [sum(counts[0] for counts in of.values()) for of in (inspection.channels, inspection.heads)] == [
        len(dead["channels"]),
        len(dead["heads"]),
    ]
    before = logits(model)
    for kind, groups in dead.items():
        for group in groups[1:]:
            for slot in slots(model, structures[kind], group, reads=True):
                slot.add_(1.0)
    assert torch.equal(logits(model), before)


def test_gpt2_as_it_is_on_the_hub_without_a_prefix(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    rewritten(
        tmp_path,
        lambda tensors: [
            tensors["transformer.h.0.mlp.c_proj.weight"][3].zero_(),
            tensors["transformer.h.0.attn.c_proj.weight"][:4].zero_(),
        ],
    )
    prefixed = inspect(tmp_path)
    rewritten(
        tmp_path,
        lambda tensors: [
            tensors.update({name.removeprefix("transformer."): tensors.pop(name)}) for name in [*tensors]
        ],
    )
    bare = inspect(tmp_path)
    assert bare.channels == prefixed.channels == {"transformer.h.0.mlp": [1, 64]} and bare.heads == prefixed.heads == {
        "transformer.h.0.attn": [1, 4]
    }
    assert [replace(t, name="") for t in bare.tensors] == [replace(t, name="") for t in prefixed.tensors]


def test_experts_whose_hf_names_are_not_their_runtime_names_are_counted(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    from lp_dist import measure_sparsity

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 2:
                param.view(-1)[::3] = 0.0
    model.save_pretrained(tmp_path)
    counted, inspection = measure_sparsity(model), inspect(tmp_path)
    assert inspection.total() == (counted.zeros, counted.elements) and counted.zeros > 1000
    assert {"w1", "w2", "w3"} <= set(inspection.tensors_by("kind"))


# By family: the experts' matrices [outputs, inputs] that a tensor of the files has.
ONE_BY_ONE, INPUTS_FIRST, OUTPUTS_FIRST = (lambda t: [t]), (lambda t: [m.T for m in t]), (lambda t: [*t])
IN_FILES = {
    "mixtral": ONE_BY_ONE,
    "qwen3_moe": ONE_BY_ONE,
    "minimax_m2": ONE_BY_ONE,
    "deepseek_v3": ONE_BY_ONE,
    "gpt_oss": INPUTS_FIRST,
    "llama4_text": INPUTS_FIRST,
    "granitemoe": OUTPUTS_FIRST,
}
GRANITE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}


def by_loops(matrix: Tensor) -> tuple[int, int, int, int]:
    """Zeros, dead rows, dead columns, and blocks of four inputs with two zeros or more."""
    rows = matrix.tolist()
    blocks = [row[i : i + 4] for row in rows for i in range(0, len(row) - 3, 4)]
    return (
        sum(row.count(0.0) for row in rows),
        sum(not any(row) for row in rows),
        sum(not any(column) for column in zip(*rows)),
        sum(block.count(0.0) >= 2 for block in blocks),
    )


def sparse_mixture(family: str) -> Any:
    """Half of the weights of experts are zero, by chance; and of the third expert single rows and columns."""
    model = model_of(family, **(GRANITE if family == "granitemoe" else {}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 3:
                param[torch.rand(param.shape, generator=generator) < 0.5] = 0.0
                param[2, 5] = 0.0
                param[2, :, 7] = 0.0
    return model


@pytest.mark.parametrize("family", IN_FILES)
def test_experts_are_matrices_each_for_itself(family, tmp_path):
    from safetensors.torch import load_file

    sparse_mixture(family).save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    tensors = [t for t in inspect(tmp_path).tensors if t.counted and (len(t.shape) > 2 or ".experts." in t.name)]
    assert len(tensors) >= 4
    for tensor in tensors:
        matrices = IN_FILES[family](files[tensor.name])
        counts = [by_loops(matrix) for matrix in matrices]
        outputs, inputs = matrices[0].shape
        assert (tensor.zeros, tensor.dead_rows, tensor.dead_columns, tensor.conforming) == tuple(
            map(sum, zip(*counts))
        )
        assert (tensor.rows, tensor.columns) == (len(matrices) * outputs, len(matrices) * inputs)
        assert tensor.blocks == len(matrices) * outputs * (inputs // 4)
        if len(files[tensor.name].shape) == 3:
            assert [tuple(asdict(expert).values()) for expert in tensor.by_expert] == counts
            assert tensor.experts == len(matrices) and tensor.dead_experts == 0
        else:
            assert tensor.experts is tensor.dead_experts is tensor.by_expert is None
    assert sum(t.dead_rows for t in tensors) and sum(t.dead_columns for t in tensors)


@pytest.mark.parametrize("form", ["files", "engine"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_dead_experts_and_their_channels_have_no_effect(family, form, tmp_path):
    from lp_dist.structured.resolve import resolve_groups

    model = sparse_mixture(family)
    _, (count, width) = MIXTURES[family]
    experts, channels = (resolve_groups(model, kind) for kind in ("experts", "expert_channels"))
    kill_groups(model, experts[0], [1])
    third = next(groups for groups in channels if groups.section == "[2]")
    kill_groups(model, third, [0, 4, 9])
    if form == "files":
        model.save_pretrained(tmp_path)
    else:
        model.config.architectures = [type(model).__name__]
        written(tmp_path, model)
    inspection = inspect(tmp_path / ("dcp" if form == "engine" else ""))
    name = experts[0].name
    assert len(inspection.experts) > 1
    assert inspection.experts == {key: [0, count] for key in inspection.experts} | {name: [1, count]}
    # In each layer one by `sparse_mixture`; in this one all of the dead expert, and three more of another one.
    assert inspection.expert_channels == {key: [1, count * width] for key in inspection.experts} | {
        name: [1 + width + 3, count * width]
    }
    before = logits(model)
    for groups, dead in ((experts[0], [1]), (third, [0, 4, 9])):
        for group in dead:
            for slot in slots(model, groups, group, reads=False):
                slot.add_(1.0)
    assert torch.equal(logits(model), before)


def test_a_dead_expert_is_told_of_the_tensor_and_in_words(tmp_path):
    model = sparse_mixture("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] = 0.0
        model.model.layers[0].mlp.experts.down_proj_bias[1] = 0.0
        model.model.layers[1].mlp.experts.gate_up_proj[0] = 0.0
    model.save_pretrained(tmp_path)
    tensors = {tensor.name: tensor for tensor in inspect(tmp_path).tensors}
    down, gate_up = (
        tensors[f"model.layers.{i}.mlp.experts.{name}"] for i, name in enumerate(("down_proj", "gate_up_proj"))
    )
    assert down.dead_experts == gate_up.dead_experts == 1
    assert down.by_expert[1].zeros == 48 * 32 and down.by_expert[1].dead_rows == 32
    # Experts whose first matrix is zero still add their biases.
    assert tensors["model.layers.0.mlp.experts.down_proj_bias"].rows is None
    page = tmp_path / "zeros.html"
    text = CliRunner().invoke(app, ["inspect", str(tmp_path), "--page", str(page)]).stdout
    assert str(page) in text and "experts without effect" in page.read_text() and "1 of 8" in page.read_text()
    text = CliRunner().invoke(app, ["inspect", str(tmp_path)]).stdout
    assert "1 of 8 experts can't have an effect" in text
    printed = json.loads(
        next(
            line
            for line in CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).stdout.splitlines()
            if line.startswith("{")
        )
    )
    assert printed["experts"]["model.layers.0.mlp.experts"] == [1, 4] and printed["version"] == 2
    by_expert = next(t for t in printed["tensors"] if t["name"] == down.name)["by_expert"]
    assert by_expert[1] == asdict(down.by_expert[1])


def test_files_that_have_experts_the_other_way_round(tmp_path):
    """Qwen3-VL-MoE's on the hub have inputs before outputs, and are read so by their shapes; saved they have not."""
    model = qwen3_vl_moe()
    model.save_pretrained(tmp_path)
    saved = {tensor.name: tensor for tensor in inspect(tmp_path).tensors}
    experts = [name for name in saved if ".experts." in name]

    def turn(tensors: dict[str, Tensor]) -> None:
        for name in experts:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    rewritten(tmp_path, turn)
    turned = inspect(tmp_path)
    assert len(experts) == 2 and saved[experts[0]].dead_rows
    for tensor in turned.tensors:
        if tensor.name in experts:
            assert tensor.shape != saved[tensor.name].shape
            assert replace(tensor, shape=[]) == replace(saved[tensor.name], shape=[])
    assert list(turned.experts.values()) == [[1, 4]]


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 20, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    experts = model.model.language_model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in experts.parameters():
            param[torch.rand(param.shape, generator=generator) < 0.5] = 0.0
            param[0, 3] = 0.0
        experts.down_proj[1] = 0.0
    return model


def test_convolutions_have_channels_for_columns(tmp_path):
    """RegNet's have groups. Blocks are of four input channels at one output and place of the kernel."""
    from safetensors.torch import load_file
    from transformers import RegNetConfig, RegNetModel

    torch.manual_seed(0)
    model = RegNetModel(
        RegNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], groups_width=8, layer_type="x")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 4:
                param[torch.rand(param.shape, generator=generator) < 0.5] = 0.0
                param[:8, 1] = 0.0
                param[9:] *= torch.rand(param[9:].shape[:2], generator=generator)[..., None, None] < 0.8
                param[-1] = 0.0
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    groups = {
        f"{name}.weight": module.groups
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }
    convolutions = [tensor for tensor in inspect(tmp_path).tensors if tensor.name in groups]
    assert len(convolutions) == len(groups) and any(count > 1 for count in groups.values())
    for tensor in convolutions:
        outputs, channels, height, width = tensor.shape
        weight, count = files[tensor.name].tolist(), groups[tensor.name]
        in_group = outputs // count
        dead_columns = sum(
            not any(
                weight[o][i][y][x]
                for o in range(g * in_group, (g + 1) * in_group)
                for y in range(height)
                for x in range(width)
            )
            for g in range(count)
            for i in range(channels)
        )
        blocks = [
            [weight[o][4 * b + k][y][x] for k in range(4)]
            for o in range(outputs)
            for b in range(channels // 4)
            for y in range(height)
            for x in range(width)
        ]
        assert (tensor.rows, tensor.columns, tensor.dead_columns) == (outputs, channels * count, dead_columns)
        assert tensor.dead_rows >= 1 and tensor.dead_rows == int((files[tensor.name].flatten(1) == 0).all(1).sum())
        assert (tensor.blocks, tensor.conforming) == (len(blocks), sum(block.count(0.0) >= 2 for block in blocks))
    assert sum(tensor.dead_columns for tensor in convolutions)


def test_without_a_config_it_is_not_known_what_three_dimensions_are(tmp_path):
    sparse_mixture("gpt_oss").save_pretrained(tmp_path)
    known = {tensor.name: tensor for tensor in inspect(tmp_path).tensors}
    (tmp_path / "config.json").unlink()
    for tensor in inspect(tmp_path).tensors:
        assert tensor.zeros == known[tensor.name].zeros
        assert (tensor.rows is None) == (len(tensor.shape) != 2), tensor.name


def test_buffers_are_no_parameters(tmp_path):
    """A ResNet has running means, and counters of batches."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    inspection = inspect(tmp_path)
    assert inspection.total(counted_alone=False)[1] == model.num_parameters() == inspection.as_json()["parameters"]
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers and {t.name for t in inspection.tensors if t.is_buffer} == buffers


def test_an_engines_names_are_those_of_the_model(llama, tmp_path):
    """A script's checkpoint of torch.distributed.checkpoint, with the model under a key of its own and its tied head
    twice.
    """
    import torch.distributed.checkpoint as dcp
    from transformers import LlamaForCausalLM

    dcp.save({"model": LlamaForCausalLM.from_pretrained(llama).state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    engines, hf_tensors = inspect(tmp_path), inspect(llama)
    assert (
        engines.tensors == hf_tensors.tensors
        and engines.channels == hf_tensors.channels
        and engines.heads == hf_tensors.heads
    )


def test_without_a_config_names_decide(llama, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    bare, with_config = inspect(tmp_path), inspect(llama)
    assert {tensor.name for tensor in bare.tensors if tensor.counted} == {
        tensor.name for tensor in with_config.tensors if tensor.counted
    }
    assert bare.total() == with_config.total() and bare.channels == bare.heads == {}
    assert list(bare.tensors_by("layer")) == list(range(12))


def test_a_tensor_is_gone_before_the_next_is_read(llama, monkeypatch):
    import weakref

    from lp_dist.checkpoints.files import TensorLocation

    read, alive, most = TensorLocation.read, [], []

    def watched(place: TensorLocation) -> Tensor:
        most.append(sum(reference() is not None for reference in alive))
        tensor = read(place)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorLocation, "read", watched)
    inspect(llama)
    assert len(most) > 50 and max(most) == 0


def test_the_command(llama, tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(llama), "--json"])
    printed = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert (
        printed["sparsity"] == inspect(llama).total()[0] / inspect(llama).total()[1]
        and len(printed["tensors"]) == 1 + 12 * 9 + 1
    )
    text = CliRunner().invoke(app, ["inspect", str(llama)]).stdout
    for words in ("q_proj", "of 48 attention heads", "3 of 120 feed-forward", "weights that decay are exactly zero"):
        assert words in text, text
    missing = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing")])
    assert missing.exit_code != 0 and "lp-dist: error" in str(missing.exception or missing.output)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("model.layers.3.mlp.up_proj.weight", 3),
        ("transformer.h.11.attn.c_attn.weight", 11),
        ("0.weight", 0),
        ("lm_head.weight", None),
        ("model.layers.2.experts.7.w1.weight", 2),
        ("conv2d.weight", None),
    ],
)
def test_layers_are_the_first_number_in_a_name(name, layer):
    assert layer_of(name) == layer


def test_the_page_has_the_map_and_the_numbers_and_loads_nothing(llama, tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(llama), "--page", str(tmp_path / "zeros.html")])
    assert result.exit_code == 0 and result.stdout.strip().splitlines()[-1] == str(tmp_path / "zeros.html")
    page, inspection = (tmp_path / "zeros.html").read_text(), inspect(llama)
    zeros, elements = inspection.total()
    for words in (
        f"{100 * zeros / elements:.2f} %",
        f"{zeros:,} of {elements:,} weights that decay",
        "Where the zeros are",
        "3 of 120",
        "3 of 48",
        "<svg",
        "q_proj",
    ):
        assert words in page, words
    dead = sum(tensor.dead_rows or 0 for tensor in inspection.tensors if tensor.counted)
    assert f"{dead:,} of {sum(tensor.rows or 0 for tensor in inspection.tensors if tensor.counted):,}" in page
    assert "<script" not in page and "src=" not in page and "How to load it" not in page
    refused = CliRunner().invoke(app, ["inspect", str(llama), "--page", str(tmp_path / "nowhere" / "zeros.html")])
    assert refused.exit_code != 0 and "can't write" in str(refused.exception or refused.output)
