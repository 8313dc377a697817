"""Shared by the tests: small models that are saved in each of the forms that transformers has, and an independent view
of their files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lp_dist.checkpoints.hf_names import NameMap

TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
QWEN_VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    patch_size=4,
    spatial_merge_size=2,
    in_channels=3,
)
EXPERTS = dict(num_experts=4, moe_intermediate_size=20, num_experts_per_tok=2)
DEEPSEEK = dict(
    num_hidden_layers=3,
    num_key_value_heads=4,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    n_shared_experts=1,
    first_k_dense_replace=1,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
JAMBA = dict(
    num_hidden_layers=4,
    num_experts=4,
    num_experts_per_tok=2,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_dt_rank=4,
)


def _rope(*sections: int) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type="default", mrope_section=list(sections), rope_theta=1e4))


# The prefix of the classes of model and configuration, what follows it in the model's, and the sizes.
_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", TEXT),
    "llama, tied": ("Llama", {**TEXT, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {**TEXT, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {**TEXT, **EXPERTS, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3", {**TEXT, **DEEPSEEK}),
    "glm4_moe": ("Glm4Moe", {**TEXT, **DEEPSEEK, "n_group": 1, "head_dim": 8}),
    "jamba": ("Jamba", {**TEXT, **JAMBA}),
    "gpt_oss": ("GptOss", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "granitemoe": ("GraniteMoe", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": ("MiniMaxM2", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "olmoe": ("Olmoe", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {**TEXT, "num_local_experts": 4}),
    "gpt_neox": ("GPTNeoX", {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}),
    # Gates, queries, keys and values are one tensor in its files.
    "hrm_text": ("HrmText", {**TEXT, "num_key_value_heads": 4}),
}
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForMaskedLM", {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}),
    "vit": ("ViT", "ForImageClassification", VISION),
    "beit": ("Beit", "ForImageClassification", {**VISION, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2", "ForImageClassification", VISION),
    "dinov3_vit": ("DINOv3ViT", "Model", VISION),
    "swin": (
        "Swin",
        "ForImageClassification",
        dict(embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, patch_size=2, image_size=32),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        "ForConditionalGeneration",
        dict(
            text_config={**TEXT, **_rope(1, 1, 2)},
            vision_config={**QWEN_VISION, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        ),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        "ForConditionalGeneration",
        dict(
            text_config={**TEXT, **EXPERTS, "head_dim": 8, **_rope(2, 1, 1)},
            vision_config={
                **QWEN_VISION,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        ),
    ),
    "gemma3": (
        "Gemma3",
        "ForConditionalGeneration",
        dict(text_config={**TEXT, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4),
    ),
    # Experts of text and of images lie in one list in its files, and in two parameters in memory.
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoe",
        "ForConditionalGeneration",
        dict(
            text_config={
                **TEXT,
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": [20, 12],
                "mlp_layer_types": ["dense", "sparse"],
                **_rope(1, 1, 2),
            },
            vision_config={**QWEN_VISION, "temporal_merge_size": 2},
        ),
    ),
}
# By name of the model type.
SAVED_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (prefix, "ForCausalLM", sizes) for name, (prefix, sizes) in _CAUSAL.items()},
    **_OTHERS,
}


def saved_model(name: str) -> Any:
    """A model of SAVED_MODELS, in which no two weights are alike, and a quarter is zero."""
    prefix, suffix, sizes = SAVED_MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**sizes))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
            param[torch.rand(param.shape) < 0.25 * torch.rand(()) + 0.1] = 0.0
    return model


def files_of(directory: Path) -> dict[str, Tensor]:
    """All tensors in a directory's safetensors files, by safetensors alone."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def zeros_of(model: nn.Module, names: Callable[[str], bool]) -> dict[str, tuple[int, int]]:
    """{name: zeros and elements} of the parameters that `names` takes."""
    return {name: (int((param == 0).sum()), param.numel()) for name, param in model.named_parameters() if names(name)}


def unequal_params(model: Any, names: NameMap, files: dict[str, Tensor]) -> list[str]:
    """The parameters and buffers that a map of names reads otherwise from files than they are in memory."""
    state = model.state_dict()
    return [
        name
        for conversion in names.conversions
        for name, tensor in conversion.to_memory({name: files[name] for name in conversion.hf_shapes}).items()
        if not torch.equal(tensor, state[name])
    ]
