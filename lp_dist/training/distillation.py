"""Distillation: a dense model is asked what comes next, and the model that becomes sparse is to say the same (Hinton
et al., arXiv 1503.02531).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lp_dist.errors import UsageError


def divergence(logits: Tensor, theirs: Tensor) -> Tensor:
    """KL(theirs ‖ ours) of each token in nats, from logits [..., vocabulary] of any dtype; in fp32, [...]."""
    return F.kl_div(
        logits.float().log_softmax(-1), theirs.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def distilled_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, theirs: Tensor, part: float
) -> Tensor:
    """`(1 − part)` times the cross-entropy and `part` times the divergence from what the teacher says, for Trainer's
    `compute_loss_func`.

    Args:
        outputs: of a causal language model, with logits [rows, tokens, vocabulary]. labels: [rows, tokens], not
            shifted; -100 does not count.
        num_items_in_batch: tokens that the sums are divided by, over all micro-batches and ranks; None: those that
            count here.
        theirs: the teacher's logits, shaped like the model's.
    """
    logits = outputs.logits
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].to(logits.device)  # what comes next
    counts = labels != -100
    tokens = counts.sum() if num_items_in_batch is None else num_items_in_batch
    tokens = tokens.to(logits.device) if isinstance(tokens, Tensor) else tokens
    entropy = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
    return ((1.0 - part) * entropy + part * (divergence(logits, theirs) * counts).sum()) / tokens


def check_part(part: float) -> None:
    """Raises ValueError for what is no part of a loss."""
    if not 0.0 < part <= 1.0:
        raise ValueError(
            f"distill={part!r} must be above 0 and at most 1, the part of the loss that a teacher gives; leave the"
            " teacher out for none"
        )


def check_teacher(model: nn.Module, teacher: nn.Module, part: float) -> None:
    """Raises ValueError where the one can't be taught by the other."""
    check_part(part)
    if teacher is model:
        raise ValueError("the teacher is the model itself, and would change with it; load it a second time")
    for one in (model, teacher):
        if getattr(one, "loss_type", None) != "ForCausalLM":
            raise ValueError(
                f"{type(one).__name__} is no causal language model of transformers, and distillation is for those;"
                " leave the teacher out"
            )
    check_vocabularies(model.config, teacher.config)


def check_vocabularies(config: Any, theirs: Any) -> None:
    """Raises UsageError if the two models don't speak of the same tokens."""
    sizes = [one.get_text_config().vocab_size for one in (config, theirs)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the teacher knows {sizes[1]:,} tokens and the model {sizes[0]:,}; both must have the same tokenizer:"
            " take the dense model that this one is made from, or a fine-tune of it"
        )


def sharded_alike(teacher: nn.Module, accelerator: Any) -> nn.Module:
    """The teacher without gradients and in evaluation mode, where the engine has the model that trains: sharded over
    the ranks by ZeRO-3 and FSDP2, else whole on each of them. Collective; after the model itself was prepared."""
    teacher.requires_grad_(False).eval()
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is not None:
        return _of_deepspeed(teacher, plugin.deepspeed_config, accelerator.device)
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        teacher = fsdp2_prepare_model(accelerator, teacher)
        teacher.set_reshard_after_forward(True)  # no backward pass comes for which some would better stay whole
        return teacher
    return teacher.to(accelerator.device)


def _of_deepspeed(teacher: nn.Module, config: dict[str, Any], device: Any) -> nn.Module:
    half = next((key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled") is True), None)
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return teacher.to(device=device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[half])
    import deepspeed

    kept = {key: value for key, value in zero.items() if key != "offload_optimizer" and value != "auto"}
    engine, *_ = deepspeed.initialize(
        model=teacher,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": kept,
            **({half: {"enabled": True}} if half else {}),
        },
    )
    engine.eval()  # an engine's returns nothing
    return engine
