"""Shared by the tests: a tiny model of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 1}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
SOUND = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 16,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}


class Task(NamedTuple):
    """A tiny model of a task.

    Args:
        model: makes it.
        layers: what LoRA goes on, as peft's `target_modules`.
        head: what is trained beside LoRA, as peft's `modules_to_save`.
        kind: peft's `task_type`.
    """

    model: Callable[[], Any]
    layers: list[str] | str
    head: list[str] | None = None
    kind: str | None = None


def _of(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    return make


TASKS = {
    "a classifier": Task(
        _of("BertForSequenceClassification", "BertConfig", **TEXT, num_labels=3), ["query", "value"], kind="SEQ_CLS"
    ),
    "a classifier by a decoder": Task(
        _of("LlamaForSequenceClassification", "LlamaConfig", **GROUPED, num_labels=3),
        ["q_proj", "down_proj"],
        kind="SEQ_CLS",
    ),
    "a reward model": Task(
        _of("Qwen2ForSequenceClassification", "Qwen2Config", **GROUPED, num_labels=1), ["up_proj"], ["score"]
    ),
    "a tagger": Task(
        _of("BertForTokenClassification", "BertConfig", **TEXT, num_labels=4), ["dense"], kind="TOKEN_CLS"
    ),
    "question answering": Task(
        _of("BertForQuestionAnswering", "BertConfig", **TEXT), ["query"], ["qa_outputs"], "QUESTION_ANS"
    ),
    "a masked language model": Task(_of("BertForMaskedLM", "BertConfig", **TEXT), ["query"]),
    "an encoder": Task(_of("BertModel", "BertConfig", **TEXT), ["query"], kind="FEATURE_EXTRACTION"),
    "encoder and decoder": Task(
        _of("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0), ["q", "v"], kind="SEQ_2_SEQ_LM"
    ),
    "images": Task(
        _of("ViTForImageClassification", "ViTConfig", **IMAGE, num_labels=3), ["q_proj", "v_proj"], ["classifier"]
    ),
    "images without a head": Task(_of("ViTModel", "ViTConfig", **IMAGE), ["q_proj", "v_proj"]),
    "speech": Task(
        _of("Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=VOCABULARY, pad_token_id=0, **SOUND),
        ["q_proj", "v_proj"],
        ["lm_head"],
    ),
    "speech to text": Task(_of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), ["q_proj", "v_proj"]),
    "text and images": Task(
        _of(
            "CLIPModel",
            "CLIPConfig",
            text_config={**TEXT, "projection_dim": 8},
            vision_config={**IMAGE, "projection_dim": 8},
            projection_dim=8,
        ),
        ["q_proj"],
    ),
    "images in a text": Task(
        _of(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            text_config={
                **GROUPED,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config=QWEN_VISION,
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
        r".*language_model.*(q|v)_proj",
        kind="CAUSAL_LM",
    ),
    "images in a text, as pixels": Task(
        _of(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            text_config={**GROUPED, "head_dim": 8},
            vision_config=IMAGE,
            mm_tokens_per_image=4,
            image_token_id=60,
            boi_token_index=61,
            eoi_token_index=62,
        ),
        r".*language_model.*(q|v)_proj",
        kind="CAUSAL_LM",
    ),
    "experts": Task(
        _of("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3), ["q_proj"], kind="CAUSAL_LM"
    ),
}
