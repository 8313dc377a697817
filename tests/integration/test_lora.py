"""LoRA on sparse models: the base decays while adapters train, adapters merge with the zeros kept, and merged weights
train on with their zeros.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

from helpers.lora import EVERYWHERE, KINDS, llama, unfrozen
from helpers.tasks import TASKS
from lp_dist import LpAdamW, LpCallback, LpTrainer, SparsityTarget, measure_sparsity, param_groups
from lp_dist.cli import app
from lp_dist.errors import UsageError
from lp_dist.export.merge import merge_adapter
from lp_dist.sparsity.selection import decayed_names, matrix_names


def adapted(model: nn.Module, config: peft.PeftConfig) -> PeftModel:
    """With an adapter that does something: all that peft starts at 0 or 1 is moved."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _name, param in model.named_parameters():
            if param.requires_grad:
                param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


def data() -> list[dict]:
    return [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(0, 32, (40, 12), generator=torch.Generator().manual_seed(0))
    ]


def train(
    model: nn.Module, tmp_path: Path, callback: TrainerCallback | None, groups: list, steps: int = 30, **more
) -> None:
    args = TrainingArguments(
        tmp_path,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **more},
    )
    LpTrainer(
        model=model,
        args=args,
        train_dataset=data(),
        callbacks=[callback] if callback else [],
        optimizer_cls_and_kwargs=(LpAdamW, {"params": groups, "lr": 1e-2}),
    ).train()


# -- the base decays while adapters train -------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_adapter_is_a_matrix_that_decays(kind):
    model = get_peft_model(llama(), KINDS[kind])
    names = matrix_names(model)
    assert len(names) == 14 and not any("lora" in name or "lokr" in name or "ia3" in name for name in names)
    assert {name.replace("base_layer.", "").removeprefix("base_model.model.") for name in names} == matrix_names(
        llama()
    )
    assert matrix_names(model.to("meta")) == names  # by no value: as under zero.Init
    with pytest.raises(ValueError, match="only adapters are trained.*merge_adapter"):
        decayed_names(model)


def test_the_base_becomes_sparse_while_adapters_train(tmp_path):
    model = unfrozen(get_peft_model(llama(), KINDS["LoRA"]))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, tmp_path, LpCallback(target=SparsityTarget(0.5)), param_groups(model, 0.0))
    sparsity = measure_sparsity(model)
    assert abs(sparsity.total - 0.5) < 1e-3 and set(sparsity.by_kind()) == set(EVERYWHERE)
    for name, param in model.named_parameters():
        if "lora_" in name:  # B began at zero, where a decay of any λ would have kept it
            assert not torch.equal(param, before[name]) and bool((param != 0).all()), name
    merged = merge_adapter(model)
    assert measure_sparsity(merged.model).zeros == sparsity.zeros


def test_fused_experts_become_sparse_while_lora_trains_on_them(tmp_path):
    model = get_peft_model(
        TASKS["experts"].model(),
        LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )
    experts = [name for name, _ in model.named_parameters() if "base_layer." in name and "lora_" not in name]
    for name in experts:
        model.get_parameter(name).requires_grad_(True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, tmp_path, LpCallback(target=SparsityTarget(0.5)), param_groups(model, 0.0))
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in experts)
    elements = sum(model.get_parameter(name).numel() for name in experts)
    assert len(experts) == 4 and abs(zeros / elements - 0.5) < 1e-3
    for name, param in model.named_parameters():
        if "lora_" in name:
            assert not torch.equal(param, before[name]) and bool((param != 0).all()), name
    merged = merge_adapter(model)
    assert len(merged.layers) == 4 and merged.left_out > 0
    assert sum(int((merged.model.get_parameter(name) == 0).sum()) for name in merged.layers) == zeros


def test_overrides_of_lambda_keep_adapters_too(tmp_path):
    model = unfrozen(get_peft_model(llama(), KINDS["LoRA"]))
    trainable = [param for param in model.parameters() if param.requires_grad]
    train(
        model, tmp_path, LpCallback(), [{"params": trainable, "weight_decay": 100.0}], steps=3
    )  # as a script that knows of no groups
    assert all(bool((param != 0).all()) for name, param in model.named_parameters() if "lora_" in name)
    assert measure_sparsity(model).total > 0.5


def test_a_run_whose_checkpoints_would_lack_the_base_is_refused(tmp_path):
    model = unfrozen(get_peft_model(llama(), KINDS["LoRA"]))
    with pytest.raises(UsageError, match="save_strategy='no'"):
        train(model, tmp_path, LpCallback(target=SparsityTarget(0.5)), param_groups(model, 0.0), save_strategy="steps")


# -- merging ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_pefts_where_the_base_is_not_zero_and_zero_elsewhere(kind):
    base = dict(llama(0.4).named_parameters())
    wanted = dict(adapted(llama(0.4), KINDS[kind]).merge_and_unload().named_parameters())
    merged = merge_adapter(adapted(llama(0.4), KINDS[kind]))
    assert type(merged.model) is LlamaForCausalLM and not any(
        "lora" in name for name, _ in merged.model.named_parameters()
    )
    changed = 0
    for name, param in merged.model.named_parameters():
        dead = base[name] == 0
        if name in merged.layers:
            assert torch.equal(param, torch.where(dead, 0.0, wanted[name])), name
            layer = merged.layers[name]
            assert (layer.zeros, layer.elements, layer.revived) == (
                int(dead.sum()),
                param.numel(),
                int((wanted[name][dead] != 0).sum()),
            )
            square = (wanted[name].double() - base[name].double()).square()
            assert layer.change == pytest.approx(
                float(square.detach().sum()), rel=1e-5
            ) and layer.lost == pytest.approx(float(square.detach()[dead].sum()), rel=1e-5)
            changed += not torch.equal(param, base[name])
        else:
            assert torch.equal(param, wanted[name])
    assert changed >= 2
    assert measure_sparsity(merged.model).zeros >= sum(
        int((base[name] == 0).sum()) for name in matrix_names(merged.model)
    )


def test_by_hand():
    """W + mask·(α/r)·B·A, in float64."""
    model = adapted(llama(0.4), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight, a, b = (
        tensor.detach().double().clone()
        for tensor in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    merged = merge_adapter(model)
    merged_weight = merged.model.model.layers[0].self_attn.q_proj.weight.double()
    assert torch.allclose(merged_weight, weight + (weight != 0) * 3.0 * (b @ a), rtol=0, atol=1e-6)
    change = (3.0 * (b @ a)).square()
    assert merged.layers["model.layers.0.self_attn.q_proj.weight"].lost == pytest.approx(
        float(change[weight == 0].sum()), rel=1e-5
    )
    assert 0.2 < merged.left_out < 0.6  # near the share of zeros, as the adapter knows nothing of them


def test_a_plain_merge_can_be_requested_and_measured():
    wanted = adapted(llama(0.4), KINDS["LoRA"]).merge_and_unload().state_dict()
    merged = merge_adapter(adapted(llama(0.4), KINDS["LoRA"]), keep_zeros=False)
    assert all(torch.equal(value, wanted[name]) for name, value in merged.model.state_dict().items())
    assert (
        sum(layer.revived for layer in merged.layers.values()) > 1000 and measure_sparsity(merged.model).total < 0.01
    )


def test_on_a_dense_base_it_predicts_what_the_adapter_did():
    model, ids = adapted(llama(), KINDS["LoRA"]).eval(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        merged = merge_adapter(model)
        assert torch.allclose(merged.model(ids).logits, before, atol=1e-5) and merged.left_out == 0.0


def test_gpt2_whose_matrices_lie_the_other_way():
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
        )
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.weight[:, ::3] = 0.0
        return model

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    wanted, merged = adapted(gpt2(), config).merge_and_unload(), merge_adapter(adapted(gpt2(), config)).model
    merged_weight, wanted_weight = (model.transformer.h[0].attn.c_attn.weight for model in (merged, wanted))
    assert (
        bool((merged_weight[:, ::3] == 0).all())
        and torch.equal(merged_weight[:, 1::3], wanted_weight[:, 1::3])
        and bool((wanted_weight[:, ::3] != 0).all())
    )


def test_what_can_not_be_merged_is_refused():
    with pytest.raises(UsageError, match="no adapter"):
        merge_adapter(llama())
    model = adapted(llama(0.4), KINDS["LoRA"])
    model.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        merge_adapter(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model) -> tuple[Path, Path]:
    """A sparse base with its tokenizer, and an adapter, on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("lora")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for name in matrix_names(base):
            base.get_parameter(name).view(-1)[::2] = 0.0
    base.save_pretrained(place / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(place / "base")
    adapted(base, LoraConfig(r=2, target_modules=EVERYWHERE)).save_pretrained(place / "adapter")
    return place / "base", place / "adapter"


def test_the_command_writes_a_model_with_the_same_zeros_and_says_what_it_cost(saved, topics, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = saved
    result = CliRunner().invoke(
        app,
        [
            "merge",
            str(base),
            str(adapter),
            str(tmp_path / "out"),
            "--dataset",
            str(topics),
            "--blocks",
            "2",
            "--block-size",
            "64",
        ],
    )
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for expected in (
        "50.00 %",
        "0.00 %",
        "Perplexity on held-out text: base ",
        "with the adapter ",
        "merged, zeros kept ",
        "fell on zeros",
    ):
        assert expected in words, words
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    for name in matrix_names(out):
        assert bool((out.get_parameter(name).view(-1)[::2] == 0).all()) and bool(
            (out.get_parameter(name).view(-1)[1::2] != 0).all()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = CliRunner().invoke(app, ["merge", str(base), str(adapter), str(tmp_path / "out")])
    assert again.exit_code != 0 and "--overwrite" in again.output + str(again.exception)


def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    other = llama()
    other.save_pretrained(tmp_path / "other")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(saved[0]).save_pretrained(tmp_path / "other")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "other"), str(saved[1]), str(tmp_path / "out")])
    assert (
        result.exit_code != 0
        and "not one of" in result.output + str(result.exception)
        and not (tmp_path / "out").exists()
    )


def test_what_is_not_there_is_told_in_one_line(saved, tmp_path, monkeypatch):
    for base, adapter, message in (
        (tmp_path / "nothing", saved[1], "can't be read as a model"),
        (saved[0], tmp_path / "nothing", "is not there, or not one of"),
    ):
        result = CliRunner().invoke(app, ["merge", str(base), str(adapter), str(tmp_path / "out")])
        assert (
            message in str(result.exception)
            and isinstance(result.exception, SystemExit)
            and not (tmp_path / "out").exists()
        )
    monkeypatch.setitem(sys.modules, "peft", None)
    result = CliRunner().invoke(app, ["merge", str(saved[0]), str(saved[1]), str(tmp_path / "out")])
    assert "pip install peft" in str(result.exception) and isinstance(result.exception, SystemExit)


def test_nothing_is_merged_where_one_layer_can_not_be():
    model = adapted(llama(0.4), KINDS["LoRA"])
    layers = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    layers[-1].merge()
    before = layers[0].get_base_layer().weight.detach().clone()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        merge_adapter(model)
    assert torch.equal(layers[0].get_base_layer().weight, before)


# -- training on --------------------------------------------------------------


class Masked(TrainerCallback):
    """The slow way: puts the zeros back after every step."""

    def __init__(self, model: nn.Module) -> None:
        self.dead = {name: model.get_parameter(name) == 0 for name in matrix_names(model)}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, zeros in self.dead.items():
                model.get_parameter(name)[zeros] = 0.0


def test_merged_weights_train_on_with_exactly_their_zeros(tmp_path):
    model = merge_adapter(adapted(llama(0.4), KINDS["LoRA"])).model
    slow, masked = copy.deepcopy(model), Masked(model)
    train(model, tmp_path, None, param_groups(model, 1.0, p=1.0, cutoff=0.0))  # x = |w| > 0: free; zero: stays
    train(slow, tmp_path, masked, param_groups(slow, 0.0))
    assert all(torch.equal(model.get_parameter(name) == 0, zeros) for name, zeros in masked.dead.items())
    for name, param in slow.named_parameters():
        assert torch.allclose(model.get_parameter(name), param, rtol=0, atol=1e-7), name


def test_merged_weights_become_sparser_by_a_target(tmp_path):
    model = merge_adapter(adapted(llama(0.4), KINDS["LoRA"])).model
    dead = {name: model.get_parameter(name) == 0 for name in matrix_names(model)}
    train(
        model, tmp_path, LpCallback(target=SparsityTarget(0.6, latent_windows=0, regrowth=0)), param_groups(model, 0.0)
    )
    assert abs(measure_sparsity(model).total - 0.6) < 1e-3
    assert all(bool((model.get_parameter(name)[zeros] == 0).all()) for name, zeros in dead.items())
