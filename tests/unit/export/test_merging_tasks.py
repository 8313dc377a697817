"""Adapters of models of every task: merged into the class that they are of, with all that they bring, zeros kept."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from helpers.lora import llama
from helpers.tasks import GROUPED, TASKS, VOCABULARY, Task
from lp_dist.errors import UsageError
from lp_dist.export.adapters import Adapter, adapted_model
from lp_dist.export.merge import merge, merge_adapter, show
from lp_dist.export.outputs import outputs_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def halved(model: nn.Module) -> nn.Module:
    """With zeros in half of each matrix, heads and embeddings too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim >= 2:
                param[torch.rand(param.shape, generator=generator) < 0.5] = 0.0
    return model


def trained(model: Any, **config: Any) -> PeftModel:
    """With an adapter of which everything has moved."""
    adapted = get_peft_model(model, LoraConfig(r=2, **config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param += 0.1 * torch.randn(param.shape, generator=generator)
    return adapted.eval()


def adapted_by(task: Task, model: Any) -> PeftModel:
    return trained(model, target_modules=task.layers, modules_to_save=task.head, task_type=task.kind)


def saved(model: Any, adapted: PeftModel, directory: Path) -> tuple[Path, Path]:
    model.save_pretrained(directory / "base")
    adapted.save_pretrained(directory / "adapter")
    return directory / "base", directory / "adapter"


def reread(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(directory).eval()


def tokenizer_of(tokens: int, template: str | None = None) -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TASKS)
def test_what_is_merged_is_of_the_same_class_and_says_what_the_adapter_said(name, tmp_path):
    task = TASKS[name]
    adapted = adapted_by(task, task.model())
    base, adapter = saved(task.model(), adapted, tmp_path)
    merged = merge(base, adapter, tmp_path / "out")
    assert load_file(base / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    assert merged.left_out == 0.0 and type(reread(tmp_path / "out")) is type(task.model())
    expected, actual = outputs_of(adapted.get_base_model()), outputs_of(reread(tmp_path / "out"))
    assert expected.values.keys() == actual.values.keys() and expected.count > 0
    before = outputs_of(task.model())
    for key, value in expected.values.items():
        torch.testing.assert_close(actual.values[key], value, rtol=0, atol=1e-5)
    assert any(not torch.equal(before.values[key], value) for key, value in actual.values.items())


@pytest.mark.parametrize("name", TASKS)
def test_zeros_are_kept_in_all_that_an_adapter_changes(name, tmp_path):
    task = TASKS[name]
    base, adapter = saved(halved(task.model()), adapted_by(task, halved(task.model())), tmp_path)
    merged = merge(base, adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    plain = adapted_by(task, halved(task.model())).merge_and_unload()
    assert merged.layers and 0.1 < merged.left_out < 0.9
    for key, old in before.items():
        if old.ndim >= 2:
            assert torch.equal(after[key] == 0, old == 0), key
    parameters = dict(halved(task.model()).named_parameters())
    for key, layer in merged.layers.items():
        old, new = parameters[key], plain.get_parameter(key)
        assert layer.zeros == int((old == 0).sum()) > 0 and layer.revived == int((new[old == 0] != 0).sum())
        square = (new.double() - old.double()).square().detach()
        assert layer.change == pytest.approx(float(square.sum()), rel=1e-4)
        assert layer.lost == pytest.approx(float(square[old == 0].sum()), rel=1e-4)
        torch.testing.assert_close(merged.model.get_parameter(key), torch.where(old == 0, 0.0, new), rtol=0, atol=1e-6)
    for word in task.head or ():
        assert any(f"{word}." in f"{key}." for key in merged.layers), "the head is measured too"


def test_a_head_of_zeros_and_its_bias_are_no_zeros_of_a_sparse_model():
    def classifier() -> Any:
        model = TASKS["a classifier"].model()
        model.classifier.weight.data.zero_()
        return model

    adapted = trained(classifier(), target_modules=["query"], task_type="SEQ_CLS")
    wanted = adapted.base_model.model.classifier.modules_to_save["default"].state_dict()
    merged = merge_adapter(adapted).model.classifier.state_dict()
    assert all(torch.equal(merged[name], wanted[name]) and bool((merged[name] != 0).all()) for name in wanted)


def test_a_model_in_half_precision_stays_in_it():
    adapted = trained(TASKS["a classifier"].model().bfloat16(), target_modules=["query"], task_type="SEQ_CLS")
    adapted.base_model.model.classifier.modules_to_save.float()
    assert {param.dtype for param in merge_adapter(adapted).model.parameters()} == {torch.bfloat16}


def test_a_classifier_trained_from_a_language_model_becomes_a_classifier(tmp_path):
    base = halved(LlamaForCausalLM(LlamaConfig(**GROUPED)))
    base.save_pretrained(tmp_path / "base")
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    adapted = trained(classifier, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    out = reread(tmp_path / "out")
    assert type(out) is LlamaForSequenceClassification and out.score.weight.shape == (5, 16)
    assert torch.equal(out.score.weight, adapted.base_model.model.score.modules_to_save["default"].weight)
    assert "The adapter is of LlamaForSequenceClassification, and the base is LlamaForCausalLM." in merged.notes
    assert any("5 labels, without names" in note for note in merged.notes)


def test_a_class_that_is_tried_leaves_the_configuration_as_it_is(tmp_path):
    """Whisper's decoder, by itself, is made of a changed one."""
    TASKS["speech to text"].model().save_pretrained(tmp_path)
    settings = transformers.AutoConfig.from_pretrained(tmp_path)
    renamed = Adapter(tmp_path, {"task_type": "CAUSAL_LM"}, {"renamed.weight": (1, 1)})
    model = adapted_model(tmp_path, settings, renamed, trust_remote_code=False)
    assert model.cls is transformers.WhisperForConditionalGeneration and model.settings.is_encoder_decoder


def test_weights_that_neither_has_are_not_made_up(tmp_path):
    transformers.BertForMaskedLM(TASKS["a classifier"].model().config).save_pretrained(tmp_path / "base")
    adapted_by(TASKS["a classifier"], TASKS["a classifier"].model()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"no weights for bert.pooler.dense.bias, which BertForSequenceClassif.*ran"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_tensors_that_the_base_has_no_place_for_is_refused(tmp_path):
    base, _ = saved(llama(), trained(llama(), target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({**load_file(file), "base_model.model.model.layers.0.mlp.gate.weight": torch.ones(2, 2)}, file)
    with pytest.raises(UsageError, match=r"has 1 tensors that LlamaForCausalLM has no place for, such as .*gate"):
        merge(base, tmp_path / "adapter", tmp_path / "out")


# -- tokens and tokenizers ----------------------------------------------------


def test_the_adapters_tokenizer_and_template_are_those_of_the_merged_model(tmp_path, capsys):
    """In a padded vocabulary, whose unused rows are zeros that no training made. So is that of the padding token."""

    def padded() -> Any:
        model = halved(LlamaForCausalLM(LlamaConfig(**{**GROUPED, "vocab_size": 70})))
        model.lm_head.weight.data[VOCABULARY:] = model.model.embed_tokens.weight.data[VOCABULARY:] = 0.0
        return model

    torch.manual_seed(0)
    adapted = trained(padded(), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    torch.manual_seed(0)
    base, adapter = saved(padded(), adapted, tmp_path)
    tokenizer_of(VOCABULARY).save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    richer = tokenizer_of(VOCABULARY, "{% for m in messages %}<think>{{ m.content }}{% endfor %}")
    richer.add_tokens(["<think>", "</think>"], special_tokens=True)
    richer.save_pretrained(adapter)
    merged = merge(base, adapter, tmp_path / "out")
    out, read = tmp_path / "out", AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("<think> w1 </think>").input_ids == richer("<think> w1 </think>").input_ids and read.chat_template
    for file in adapter.glob("tokenizer*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert "From the adapter: tokenizer." in merged.notes
    model = reread(out)
    for module in (model.model.embed_tokens, model.lm_head):
        assert bool((module.weight[VOCABULARY:] != 0).all()), "unused rows were taken for zeros of a sparse model"
        assert 0.4 < float((module.weight[:VOCABULARY] == 0).float().mean()) < 0.6
    show(merged, out)
    assert "13 rows of tokens that were all zero in the base have values now." in " ".join(
        capsys.readouterr().out.split()
    )


def test_without_its_own_tokenizer_the_bases_stays_and_a_template_alone_is_taken(tmp_path):
    base, adapter = saved(llama(), trained(llama(), target_modules=["q_proj"]), tmp_path)
    tokenizer_of(32, "of the base").save_pretrained(base)
    (adapter / "chat_template.jinja").write_text("of the adapter")
    merged = merge(base, adapter, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the adapter"
    assert "From the adapter: chat template." in merged.notes


def test_a_processor_is_kept(tmp_path):
    task = TASKS["images"]
    base, adapter = saved(task.model(), adapted_by(task, task.model()), tmp_path)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == (
        base / "preprocessor_config.json"
    ).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by", ["modules_to_save", "trainable_token_indices"])
def test_resized_embeddings_come_with_the_adapter(by, tied, tmp_path):
    def larger() -> Any:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(5)
        model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        return model

    base = halved(LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=tied)))
    base.save_pretrained(tmp_path / "base")
    brought = {
        "modules_to_save": ["embed_tokens"] if tied else ["embed_tokens", "lm_head"],
        "trainable_token_indices": [VOCABULARY, VOCABULARY + 2],
    }
    adapted = trained(larger(), target_modules=["v_proj"], task_type="CAUSAL_LM", **{by: brought[by]})
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer_of(VOCABULARY + 3).save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "The embeddings have 67 rows, as the adapter was trained with." in merged.notes
    model = reread(tmp_path / "out")
    wanted = adapted.merge_and_unload()
    for old, new, plain in zip(
        (base.model.embed_tokens, base.lm_head),
        (model.model.embed_tokens, model.lm_head),
        (wanted.model.embed_tokens, wanted.lm_head),
    ):
        # The padding token has a row of zeros, which no target made.
        zeros = (old.weight == 0) & (old.weight != 0).any(1, keepdim=True)
        torch.testing.assert_close(
            new.weight[:VOCABULARY], torch.where(zeros, 0.0, plain.weight[:VOCABULARY]), rtol=0, atol=1e-6
        )
        assert torch.equal(new.weight[VOCABULARY:], plain.weight[VOCABULARY:])
    untied = tied and by == "modules_to_save"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (tied and not untied)
    assert any("no longer tied" in note for note in merged.notes) == untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (tied and not untied)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_merged_and_their_zeros_kept(tied):
    def sparse() -> Any:
        torch.manual_seed(0)
        return halved(LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=tied)))

    config: dict[str, Any] = {"target_modules": ["v_proj"], "trainable_token_indices": [3, 9]}
    old = sparse().model.embed_tokens.weight
    wanted = trained(sparse(), **config).merge_and_unload().model.embed_tokens.weight
    merged = merge_adapter(trained(sparse(), **config))
    assert torch.equal(merged.model.model.embed_tokens.weight, torch.where(old == 0, 0.0, wanted))
    layer = merged.layers["model.embed_tokens.weight"]
    assert layer.revived == int((wanted[old == 0] != 0).sum()) > 0
    assert layer.change == pytest.approx(float((wanted - old).square().sum()), rel=1e-5)
    assert not torch.equal(merged.model.model.embed_tokens.weight[3], old[3])


def test_two_adapters_of_tied_weights_are_measured_together():
    def sparse() -> Any:
        torch.manual_seed(0)
        return halved(LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)))

    adapted = trained(sparse(), target_modules=["embed_tokens", "lm_head"])
    inner = adapted.base_model.model
    squares = [
        layer.get_delta_weight("default").detach().square() for layer in (inner.model.embed_tokens, inner.lm_head)
    ]
    layer = merge_adapter(adapted).layers["model.embed_tokens.weight"]
    assert layer.change == pytest.approx(float(sum(square.sum() for square in squares)), rel=1e-4)
    zeros = (sparse().lm_head.weight == 0) & (sparse().lm_head.weight != 0).any(1, keepdim=True)
    assert layer.lost == pytest.approx(float(sum(square[zeros].sum() for square in squares)), rel=1e-4)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    base, adapter = saved(llama(), trained(llama(), target_modules=["q_proj"]), tmp_path)
    tokenizer_of(33).save_pretrained(adapter)
    with pytest.raises(UsageError, match="has the token 32, and the model has embeddings for 32 tokens.*modules_to_s"):
        merge(base, adapter, tmp_path / "out")


# -- experts ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_lora_on_fused_experts_is_merged_with_the_zeros_kept(family, tmp_path):
    """Mixtral's are (experts, outputs, inputs), GPT-OSS's (experts, inputs, outputs)."""

    def sparse() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, family).config_class(
            **GROUPED, num_local_experts=3, num_experts_per_tok=2, head_dim=8
        )
        return halved(getattr(transformers, family)(config)).eval()

    def adapted() -> PeftModel:
        return trained(
            sparse(),
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            task_type="CAUSAL_LM",
        )

    base, adapter = saved(sparse(), adapted(), tmp_path)
    merged = merge(base, adapter, tmp_path / "out")
    old, plain = dict(sparse().named_parameters()), adapted().merge_and_unload()
    experts = [name for name in merged.layers if "experts" in name]
    assert len(experts) == 4 and len(merged.layers) == 6
    for name, layer in merged.layers.items():
        wanted = plain.get_parameter(name)
        assert torch.equal(merged.model.get_parameter(name), torch.where(old[name] == 0, 0.0, wanted)), name
        assert layer.revived == int((wanted[old[name] == 0] != 0).sum()) > 0
        assert layer.change == pytest.approx(float((wanted - old[name]).square().sum()), rel=1e-5)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before if before[name].ndim >= 2)


def test_prompts_are_refused_with_the_reason():
    model = get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UsageError, match="type PROMPT_TUNING adds tokens to the input and changes no weights"):
        merge_adapter(model)


def test_perplexity_of_what_is_no_language_model_is_refused_before_weights_are_read(tmp_path):
    task = TASKS["a classifier"]
    base, adapter = saved(task.model(), adapted_by(task, task.model()), tmp_path)
    (base / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="and .*base is BertForSequenceClassification; leave it out"):
        merge(base, adapter, tmp_path / "out", dataset="text.txt")


def test_attention_of_torch_whose_merge_makes_new_tensors():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.attention(states, states, states)[0]

    def adapted() -> PeftModel:
        return trained(halved(Attending()), target_modules=["attention"])

    old, wanted = halved(Attending()), adapted().merge_and_unload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge_adapter(adapted())
    assert not any("already merged" in str(warning.message) for warning in caught), "the projection was merged twice"
    assert merged.layers.keys() == {"attention.in_proj_weight", "attention.out_proj.weight"}
    for name in merged.layers:
        zeros = old.get_parameter(name) == 0
        assert torch.equal(merged.model.get_parameter(name), torch.where(zeros, 0.0, wanted.get_parameter(name))), name
        assert merged.layers[name].revived == int(zeros.sum()) > 10
