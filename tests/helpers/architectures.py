"""Shared by the tests: tiny models of many architectures of transformers, with inputs that reach all of their
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from helpers.saved_models import DEEPSEEK, EXPERTS, JAMBA, QWEN_VISION, TEXT, VISION

# Token ids that stand for images and for sound, as in the configurations below. Others are smaller.
_IMAGE, _VIDEO, _START, _END, _SOUND = 96, 95, 94, 93, 92
_BATCH, _LENGTH = 2, 16

Inputs = Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Args:
        chapter: of docs/models.md.
        cls: class of transformers.
        sizes: for the configuration of that class.
        inputs: makes keyword arguments of `forward` from the configuration; random ones.
        base: sizes that the configuration gets too, as far as it knows them.
    """

    chapter: str
    cls: str
    sizes: dict[str, Any]
    inputs: Inputs
    base: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The configuration."""
        cls = getattr(transformers, self.cls).config_class
        known = cls()
        return cls(**{key: value for key, value in self.base.items() if hasattr(known, key)} | self.sizes)

    def model(self) -> Any:
        """The model, with the same random weights each time. None of its matrices is all zeros, as some are before the
        first step of their training.
        """
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)(self.config())
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() > 1 and not param.any():
                    param.normal_(std=0.02)
        return model


# -- inputs -------------------------------------------------------------------


def _ids(length: int = _LENGTH, rows: int = _BATCH) -> Tensor:
    return torch.randint(5, _SOUND, (rows, length))


def tokens(config: Any) -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def tokens_to_tokens(config: Any) -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(10)}


def image(config: Any) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(_BATCH, 3, 32, 32)}


def image_and_tokens(config: Any) -> dict[str, Tensor]:
    ids = _ids()
    ids[:, -1] = TEXT["eos_token_id"]
    return {"input_ids": ids, "pixel_values": torch.randn(_BATCH, 3, 32, 32)}


def wave(config: Any) -> dict[str, Tensor]:
    return {"input_values": torch.randn(_BATCH, 400)}


def text_with(count: int, of: int = _IMAGE, **more: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs of a text in which tokens stand for an image or a sound.

    Args:
        count: of these tokens.
        of: their id.
        **more: other inputs, from the token ids.
    """

    def inputs(config: Any) -> dict[str, Tensor]:
        ids = _ids(count + 12, rows=1)
        ids[:, 1] = _START
        ids[:, 2 : 2 + count] = of
        return {"input_ids": ids, **{name: make(ids) for name, make in more.items()}}

    return inputs


def picture(*leading: int, side: int = 32) -> Callable[[Tensor], Tensor]:
    return lambda ids: torch.randn(*leading, 3, side, side)


def is_image(ids: Tensor) -> Tensor:
    return (ids == _IMAGE).long()


def _qwen(ids: Tensor) -> Tensor:
    return torch.randn(16, 3 * 2 * 4 * 4)


# 16 patches, four of which make a token.
patches = text_with(
    4, pixel_values=_qwen, image_grid_thw=lambda ids: torch.tensor([[1, 4, 4]]), mm_token_type_ids=is_image
)


# -- the table ----------------------------------------------------------------


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [*sections], "rope_theta": 1e4}}


_HEADS = {"head_dim": 8}
_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_DELTA = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}
_CAUSAL: dict[str, dict[str, dict[str, Any]]] = {
    "Language models": {
        "Llama": {},
        "Mistral": {},
        "Ministral3": _HEADS,
        "Qwen2": {},
        "Qwen3": _HEADS,
        "Gemma": _HEADS,
        "Gemma2": _HEADS,
        "Gemma3": _HEADS,
        "Gemma3n": {
            **_HEADS,
            "num_hidden_layers": 4,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 12,
            "laurel_rank": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
        "Gemma4": {
            **_HEADS,
            "global_head_dim": 8,
            "num_hidden_layers": 4,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 12,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "Phi": {},
        "Phi3": {},
        "Glm": _HEADS,
        "Glm4": _HEADS,
        "Olmo": {},
        "Olmo2": {},
        "Olmo3": {},
        "Granite": {},
        "Falcon": {"num_kv_heads": 2, "ffn_hidden_size": 48},
        "SmolLM3": {},
        "Starcoder2": {},
        "Cohere": {},
        "Cohere2": _HEADS,
        "Nemotron": {},
        "Helium": _HEADS,
        "Ernie4_5": _HEADS,
        "HunYuanDenseV1": _HEADS,
        "SeedOss": _HEADS,
        "Apertus": _HEADS,
        "Arcee": _HEADS,
        "Exaone4": _HEADS,
        "BitNet": {},
        "DiffLlama": {},
        "StableLm": {},
        "Persimmon": {},
        "VaultGemma": _HEADS,
        "NanoChat": {},
        "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "GPTBigCode": {"n_inner": 48},
        "GPTNeoX": {},
        "GPTJ": {"rotary_dim": 4, "n_inner": 48},
        "CodeGen": {"rotary_dim": 4, "n_inner": 48, "n_head": 4},
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "Bloom": {"n_layer": 2, "n_head": 4},
        "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
        "XGLM": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
        "BioGpt": {},
        "ModernBertDecoder": {"cls_token_id": 1, "sep_token_id": 2},
    },
    "Mixtures of experts": {
        "Mixtral": {"num_local_experts": 4},
        "Llama4": {
            **_HEADS,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
        },
        "Qwen2Moe": _SHARED,
        "Qwen3Moe": {**EXPERTS, **_HEADS},
        "GptOss": {**_FOUR, **_HEADS},
        "DeepseekV2": {**DEEPSEEK, "n_routed_experts": 8, "topk_method": "group_limited_greedy"},
        "DeepseekV3": {**DEEPSEEK, "n_routed_experts": 8},
        "Glm4Moe": {**DEEPSEEK, "n_group": 1, **_HEADS},
        "GraniteMoe": _FOUR,
        "GraniteMoeShared": {**_FOUR, "shared_intermediate_size": 24},
        "MiniMaxM2": {**_FOUR, **_HEADS},
        "FlexOlmo": {"num_experts": 4, "num_experts_per_tok": 2},
        "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "Phimoe": {"num_local_experts": 4},
        "Doge": {"num_experts": 16, "is_moe": True, "num_experts_per_tok": 2},
        "Dots1": {**DEEPSEEK, "n_group": 1, **_HEADS},
        "Ernie4_5_Moe": {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 20,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        "HunYuanMoEV1": {**_HEADS, "num_experts": 4, "moe_topk": 2},
        "JetMoe": {"num_local_experts": 4, "kv_channels": 8, "num_layers": 2},
        "LongcatFlash": {
            "num_layers": 2,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 20,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 4,
        },
    },
    "Hybrids and state spaces": {
        "Qwen3Next": {**_SHARED, **_DELTA},
        "Qwen3_5": _DELTA,
        "Qwen3_5Moe": {**_SHARED, **_DELTA},
        "GraniteMoeHybrid": {
            **_FOUR,
            **_MAMBA,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
        "FalconH1": {**_MAMBA, **_HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4},
        "Mamba": {"state_size": 8},
        "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        "FalconMamba": {"state_size": 8},
        "Jamba": JAMBA,
        "Bamba": {**_MAMBA, "attn_layer_indices": [1]},
        "Zamba2": {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "hybrid_layer_ids": [1, 3],
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
        "NemotronH": {
            "layers_block_type": ["mamba", "moe", "attention"],
            **_HEADS,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
        },
        "Lfm2": {"layer_types": ["conv", "full_attention"]},
        "Lfm2Moe": {
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "moe_intermediate_size": 20,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "RecurrentGemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
        "Rwkv": {"attention_hidden_size": 32},
        "MiniMax": {
            **_FOUR,
            **_HEADS,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
        "HrmText": {"num_key_value_heads": 4},
    },
}
_LABELS = {"num_labels": 3}
_SEQ2SEQ = {
    **TEXT,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
_SPECIAL = {"image_token_id": _IMAGE, "video_token_id": _VIDEO, "vision_start_token_id": _START}
_SPECIAL_QWEN = {**_SPECIAL, "vision_end_token_id": _END}
_CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
_PROPHET = {
    "vocab_size": 97,
    "hidden_size": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VISION_HEADS = {**VISION, "head_dim": 8}
_XLNET = {"vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0, **_LABELS}
_QWEN3 = {
    **QWEN_VISION,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_DEBERTA = {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": ["p2c", "c2p"]}
_SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "patch_size": 2,
    "image_size": 32,
    **_LABELS,
}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
_TOWERS = {"projection_dim": 16, "text_config": {**TEXT, "projection_size": 32}, "vision_config": VISION}


# What needs inputs of its own.
_OTHERS = [
    Architecture(
        "Speech and sound",
        "WhisperForConditionalGeneration",
        {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        lambda config: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _ids(10)},
        _SEQ2SEQ,
    ),
    Architecture(
        "Speech and sound",
        "MoonshineForConditionalGeneration",
        {
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
        lambda config: {"input_values": torch.randn(2, 4000), "decoder_input_ids": _ids(10)},
        {k: v for k, v in TEXT.items() if not k.startswith("num_")},
    ),
    Architecture(
        "Speech and sound",
        "Wav2Vec2BertForCTC",
        {
            "feature_projection_input_dim": 16,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "vocab_size": 97,
        },
        lambda config: {"input_features": torch.randn(2, 20, 16)},
    ),
    Architecture(
        "Speech and sound",
        "ParakeetForCTC",
        {
            "vocab_size": 97,
            "pad_token_id": 0,
            "encoder_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "num_mel_bins": 16,
                "subsampling_conv_channels": 8,
            },
        },
        lambda config: {"input_features": torch.randn(2, 40, 16)},
    ),
    Architecture(
        "Speech and sound",
        "ASTForAudioClassification",
        {
            **VISION,
            **_LABELS,
            "patch_size": 8,
            "max_length": 32,
            "num_mel_bins": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        lambda config: {"input_values": torch.randn(2, 32, 16)},
    ),
    Architecture(
        "Speech and sound",
        "SpeechT5ForSpeechToText",
        {
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "mask_time_prob": 0.0,
            "hidden_size": 32,
            **{k: v for k, v in _SEQ2SEQ.items() if k.startswith(("encoder", "decoder", "vocab", "pad"))},
        },
        lambda config: {"input_values": torch.randn(2, 800), "decoder_input_ids": _ids(10)},
    ),
    Architecture(
        "Speech and sound",
        "Speech2TextForConditionalGeneration",
        {"input_feat_per_channel": 16, "conv_channels": 16},
        lambda config: {"input_features": torch.randn(2, 40, 16), "decoder_input_ids": _ids(10)},
        _SEQ2SEQ,
    ),
    Architecture(
        "Speech and sound",
        "VitsModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "vocab_size": 97,
            "flow_size": 16,
            "spectrogram_bins": 17,
            "prior_encoder_num_flows": 2,
            "prior_encoder_num_wavenet_layers": 2,
            "posterior_encoder_num_wavenet_layers": 2,
            "upsample_initial_channel": 32,
            "upsample_rates": [4, 4],
            "upsample_kernel_sizes": [8, 8],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "depth_separable_channels": 2,
            "duration_predictor_filter_channels": 16,
        },
        tokens,
    ),
    Architecture(
        "Speech and sound",
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "audio_config": {
                "num_mel_bins": 16,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "max_source_positions": 20,
            },
            "audio_token_index": _SOUND,
            "audio_token_id": _SOUND,
        },
        text_with(
            10,
            _SOUND,
            input_features=lambda ids: torch.randn(1, 16, 40),
            feature_attention_mask=lambda ids: torch.ones(1, 40).long(),
            attention_mask=torch.ones_like,
        ),
    ),
    Architecture(
        "Speech and sound",
        "VoxtralForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "audio_config": {
                "num_mel_bins": 16,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "max_source_positions": 20,
            },
            "audio_token_id": _SOUND,
        },
        text_with(5, _SOUND, input_features=lambda ids: torch.randn(1, 16, 40)),
    ),
    Architecture(
        "Speech and sound",
        "MusicgenForCausalLM",
        {**TEXT, "ffn_dim": 48, "num_codebooks": 2, "hidden_size": 32},
        lambda config: {"input_ids": _ids(rows=4)},
    ),
    Architecture(
        "Speech and sound",
        "MimiModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "num_filters": 4,
            "upsampling_ratios": [4, 2],
            "codebook_size": 32,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "num_quantizers": 4,
            "num_semantic_quantizers": 1,
            "upsample_groups": 32,
            "sampling_rate": 800,
            "frame_rate": 50,
        },
        lambda config: {"input_values": torch.randn(1, 1, 320)},
    ),
    Architecture(
        "Speech and sound",
        "EncodecModel",
        {
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_size": 32,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
        },
        lambda config: {"input_values": torch.randn(1, 1, 320)},
    ),
    Architecture(
        "Vision-language models",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **_rope(1, 1, 2)},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "in_channels": 3,
            },
            **_SPECIAL_QWEN,
        },
        patches,
    ),
    Architecture(
        "Vision-language models",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **_rope(1, 1, 2)},
            "vision_config": {
                **QWEN_VISION,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_SPECIAL_QWEN,
        },
        patches,
    ),
    Architecture(
        "Vision-language models",
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**TEXT, **_HEADS, **_rope(2, 1, 1)}, "vision_config": _QWEN3, **_SPECIAL_QWEN},
        patches,
    ),
    Architecture(
        "Vision-language models",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**TEXT, **EXPERTS, **_HEADS, **_rope(2, 1, 1)},
            "vision_config": _QWEN3,
            **_SPECIAL_QWEN,
        },
        patches,
    ),
    Architecture(
        "Vision-language models",
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                **_DELTA,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                },
            },
            "vision_config": {k: v for k, v in _QWEN3.items() if k != "deepstack_visual_indexes"},
            **_SPECIAL_QWEN,
        },
        patches,
    ),
    Architecture(
        "Vision-language models",
        "Glm4vForConditionalGeneration",
        {
            "text_config": {**TEXT, **_HEADS, **_rope(1, 1, 2)},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 4,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "image_size": 16,
                "in_channels": 3,
            },
            "image_token_id": _IMAGE,
            "video_token_id": _VIDEO,
            "image_start_token_id": _START,
            "image_end_token_id": _END,
            "video_start_token_id": 91,
            "video_end_token_id": 90,
        },
        patches,
    ),
    Architecture(
        "Vision-language models",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": [20, 12],
                "mlp_layer_types": ["dense", "sparse"],
                **_rope(1, 1, 2),
            },
            "vision_config": {**QWEN_VISION, "temporal_merge_size": 2},
            **_SPECIAL,
        },
        text_with(
            4,
            pixel_values=lambda ids: torch.randn(16, 48),
            image_grid_thw=lambda ids: torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=is_image,
            moe_mm_token_type_ids=is_image,
        ),
    ),
    Architecture(
        "Vision-language models",
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": VISION,
            "image_token_id": _IMAGE,
            "scale_factor": 2,
        },
        text_with(4, pixel_values=picture(1, 1)),
    ),
    Architecture(
        "Vision-language models",
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": VISION,
            "image_token_id": _IMAGE,
            "scale_factor": 2,
        },
        text_with(4, pixel_values=picture(1, 1)),
    ),
    Architecture(
        "Vision-language models",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, **_HEADS},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "boi_token_index": _VIDEO,
            "eoi_token_index": _START,
        },
        text_with(4, pixel_values=picture(1), token_type_ids=is_image),
    ),
    Architecture(
        "Vision-language models",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**TEXT, **_HEADS, "model_type": "gemma"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "projection_dim": 32,
        },
        text_with(16, pixel_values=picture(1), token_type_ids=lambda ids: 1 - is_image(ids)),
    ),
    Architecture(
        "Vision-language models",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "image_seq_length": 16,
        },
        text_with(16, pixel_values=picture(1)),
    ),
    Architecture(
        "Vision-language models",
        "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "video_token_index": _VIDEO,
            "image_grid_pinpoints": [[32, 32]],
        },
        text_with(36, pixel_values=picture(1, 2), image_sizes=lambda ids: torch.tensor([[32, 32]])),
    ),
    Architecture(
        "Vision-language models",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**TEXT, **_HEADS, "model_type": "mistral"},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "spatial_merge_size": 2,
        },
        text_with(4, pixel_values=picture(1), image_sizes=lambda ids: torch.tensor([[32, 32]])),
    ),
    Architecture(
        "Vision-language models",
        "InternVLForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": _IMAGE,
        },
        text_with(4, pixel_values=picture(1)),
    ),
    Architecture(
        "Vision-language models",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**TEXT, **_CAUSAL["Language models"]["Gemma4"]},
            "vision_config": {
                **_VISION_HEADS,
                "num_key_value_heads": 4,
                "pooling_kernel_size": 2,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "image_token_id": _IMAGE,
            "video_token_id": _VIDEO,
            "audio_token_id": _SOUND,
        },
        text_with(
            4,
            pixel_values=lambda ids: torch.rand(1, 16, 48),
            image_position_ids=lambda ids: torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
            mm_token_type_ids=is_image,
        ),
    ),
    Architecture(
        "Vision-language models",
        "MllamaForConditionalGeneration",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1]},
            "vision_config": {
                **VISION,
                "attention_heads": 4,
                "num_global_layers": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": _IMAGE,
        },
        text_with(
            1,
            pixel_values=picture(1, 1, 1),
            aspect_ratio_ids=lambda ids: torch.ones(1, 1).long(),
            aspect_ratio_mask=lambda ids: torch.ones(1, 1, 1).long(),
            cross_attention_mask=lambda ids: torch.ones(*ids.shape, 1, 1).long(),
        ),
    ),
    Architecture(
        "Vision-language models",
        "Phi4MultimodalForCausalLM",
        {
            **TEXT,
            "vision_config": {
                **VISION,
                "image_size": 56,
                "patch_size": 14,
                "crop_size": 56,
                "image_token_id": _VIDEO,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 1,
                "num_attention_heads": 4,
                "input_size": 80,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
                "depthwise_separable_out_channel": 32,
                "audio_token_id": _IMAGE,
                "bias_max_distance": 16,
            },
        },
        tokens,
    ),
    Architecture(
        "Vision-language models",
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "patch_size": 4,
                "num_patches": 16,
            },
            "image_token_id": _IMAGE,
            "projector_hidden_size": 32,
        },
        text_with(
            4,
            pixel_values=lambda ids: torch.randn(1, 16, 48),
            spatial_shapes=lambda ids: torch.tensor([[4, 4]]),
            pixel_attention_mask=lambda ids: torch.ones(1, 16).long(),
        ),
    ),
    Architecture(
        "Vision-language models",
        "Blip2ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            "vision_config": VISION,
            "qformer_config": {**TEXT, "encoder_hidden_size": 32},
            "num_query_tokens": 4,
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
        },
        text_with(4, pixel_values=picture(1)),
    ),
]


def _of(
    chapter: str, inputs: Inputs, base: dict[str, Any], table: dict[str, dict[str, Any]]
) -> dict[str, Architecture]:
    return {cls: Architecture(chapter, cls, sizes, inputs, base) for cls, sizes in table.items()}


def _all() -> dict[str, Architecture]:
    by_class = {
        f"{prefix}ForCausalLM": Architecture(chapter, f"{prefix}ForCausalLM", sizes, tokens, TEXT)
        for chapter, models in _CAUSAL.items()
        for prefix, sizes in models.items()
    }
    by_class |= _of("Language models", tokens, TEXT, {"GPT2LMHeadModel": {"n_inner": 48}})
    by_class |= _of(
        "Encoder-decoder",
        tokens_to_tokens,
        _SEQ2SEQ,
        {
            "T5ForConditionalGeneration": {},
            "MT5ForConditionalGeneration": {},
            "UMT5ForConditionalGeneration": {},
            "BartForConditionalGeneration": {"forced_eos_token_id": 2},
            "MBartForConditionalGeneration": {},
            "PegasusForConditionalGeneration": {},
            "M2M100ForConditionalGeneration": {},
            "BlenderbotForConditionalGeneration": {},
            "MarianMTModel": {"forced_eos_token_id": 2},
            "LEDForConditionalGeneration": {"attention_window": 4, "max_encoder_position_embeddings": 64},
            "LongT5ForConditionalGeneration": {},
            "SwitchTransformersForConditionalGeneration": {
                "num_experts": 4,
                "num_decoder_layers": 2,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
            },
            "T5GemmaForConditionalGeneration": {
                "encoder": {**TEXT, **_HEADS, "query_pre_attn_scalar": 8},
                "decoder": {**TEXT, **_HEADS, "query_pre_attn_scalar": 8, "cross_attention_hidden_size": 32},
            },
        },
    )
    by_class |= _of(
        "Encoders",
        tokens,
        {**TEXT, **_LABELS},
        {
            "BertForSequenceClassification": {},
            "BertForMaskedLM": {},
            "RobertaForSequenceClassification": {},
            "XLMRobertaForTokenClassification": {},
            "ModernBertForSequenceClassification": {"cls_token_id": 1, "sep_token_id": 2},
            "DebertaForSequenceClassification": _DEBERTA,
            "DebertaV2ForSequenceClassification": {
                **_DEBERTA,
                "position_buckets": 8,
                "share_att_key": False,
                "norm_rel_ebd": "layer_norm",
                "conv_kernel_size": 3,
            },
            "ElectraForPreTraining": {"embedding_size": 16},
            "DistilBertForQuestionAnswering": {
                "num_labels": 2,
                "dim": 32,
                "hidden_dim": 48,
                "n_layers": 2,
                "n_heads": 4,
            },
            "AlbertForSequenceClassification": {"embedding_size": 16},
            "MPNetForSequenceClassification": {},
            "EsmForMaskedLM": {"mask_token_id": 3, "position_embedding_type": "rotary"},
            "BigBirdForMaskedLM": {"attention_type": "original_full"},
            "LongformerForMaskedLM": {"attention_window": 4},
            "FNetForMaskedLM": {},
            "EuroBertForMaskedLM": {},
            "NomicBertForMaskedLM": {},
            "LlamaForSequenceClassification": {},
        },
    )
    by_class |= _of(
        "Vision",
        image,
        {**VISION, **_LABELS},
        {
            "ViTForImageClassification": {},
            "DeiTForImageClassification": {},
            "BeitForImageClassification": {"use_relative_position_bias": True},
            "Dinov2ForImageClassification": {},
            "Dinov2WithRegistersForImageClassification": {},
            "DINOv3ViTModel": {},
            "ViTMAEForPreTraining": {
                "decoder_hidden_size": 16,
                "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 24,
            },
            "ConvNextForImageClassification": _STAGES,
            "ConvNextV2ForImageClassification": _STAGES,
            "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]},
            "SegformerForSemanticSegmentation": {
                "depths": [1] * 4,
                "hidden_sizes": [8, 16, 16, 32],
                "num_attention_heads": [1, 2, 2, 4],
                "sr_ratios": [4, 2, 1, 1],
                "decoder_hidden_size": 16,
            },
            "PvtV2ForImageClassification": {
                "depths": [1] * 4,
                "hidden_sizes": [8, 16, 16, 32],
                "num_attention_heads": [1, 2, 2, 4],
            },
            "YolosForObjectDetection": {"num_detection_tokens": 4, "image_size": [32, 32]},
        },
    )
    by_class |= _of("Encoder-decoder", tokens_to_tokens, {}, {"ProphetNetForConditionalGeneration": _PROPHET})
    by_class |= _of("Encoders", tokens, {}, {"XLNetForSequenceClassification": _XLNET})
    swin = ("SwinForImageClassification", "Swinv2ForImageClassification")
    by_class |= _of("Vision", image, {}, dict.fromkeys(swin, _SWIN))
    by_class |= _of(
        "Vision and text",
        image_and_tokens,
        {},
        {"CLIPModel": _TOWERS, "SiglipModel": _TOWERS, "AltCLIPModel": _TOWERS},
    )
    by_class |= _of(
        "Speech and sound",
        wave,
        {**VISION, **_CONVOLUTIONS, "vocab_size": 97, "pad_token_id": 0},
        {
            "Wav2Vec2ForCTC": {},
            "HubertForCTC": {},
            "WavLMForCTC": {},
            "UniSpeechSatForCTC": {},
            "Wav2Vec2ConformerForCTC": {},
            "Data2VecAudioForCTC": {},
            "SEWForCTC": {"squeeze_factor": 2},
        },
    )
    return by_class | {architecture.cls: architecture for architecture in _OTHERS}


ARCHITECTURES: dict[str, Architecture] = _all()
CHAPTERS = [*dict.fromkeys(architecture.chapter for architecture in ARCHITECTURES.values())]


def _llama4() -> None:
    sizes = _CAUSAL["Mixtures of experts"]["Llama4"]
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    architecture = Architecture(
        "Vision-language models",
        "Llama4ForConditionalGeneration",
        {
            "text_config": {**TEXT, **sizes},
            "vision_config": {**vision, "intermediate_size": 128},
            "image_token_index": _IMAGE,
        },
        text_with(4, pixel_values=picture(1)),
    )
    model = architecture.model()
    model(**architecture.inputs(model.config))


def _default(name: str) -> Callable[[], None]:
    def build() -> None:
        cls = getattr(transformers, name)
        with torch.device("meta"):
            cls(cls.config_class())

    return build


# What can't be built or run with the installed versions: by class, a function that raises the error.
FAILING: dict[str, Callable[[], None]] = {
    "Llama4ForConditionalGeneration": _llama4,
    **{
        name: _default(name)
        for name in (
            "ConditionalDetrForObjectDetection",
            "DabDetrForObjectDetection",
            "DbrxForCausalLM",
            "DeformableDetrForObjectDetection",
            "DetrForObjectDetection",
            "EdgeTamModel",
            "FastVlmForConditionalGeneration",
            "Gemma3nForConditionalGeneration",
            "HiggsAudioV2TokenizerModel",
            "LayoutLMv2Model",
            "OmDetTurboForObjectDetection",
            "PerceptionLMForConditionalGeneration",
            "TableTransformerForObjectDetection",
        )
    },
}


def loss_of(output: Any) -> Tensor:
    """The distance of all outputs of a model from random numbers."""
    values = [value for value in tensors_of(output) if value.is_floating_point() and value.requires_grad]
    # What is masked is as far away as can be.
    losses = [(value - torch.randn_like(value))[value.detach().abs() < 1e4].square().mean() for value in values]
    return torch.stack(losses).sum()


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]
