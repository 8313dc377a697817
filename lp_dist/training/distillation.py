"""Distillation: the sparse model learns the predictions of a dense teacher (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lp_dist.errors import UsageError


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ model) of each token.

    Args:
        logits: of the model, [..., vocabulary], any floating-point dtype.
        teacher_logits: likewise.
    Returns:
        Nats in fp32, [...].
    """
    return F.kl_div(
        logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def distilled_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    teacher_logits: Tensor,
    distill: float,
) -> Tensor:
    """`(1 − distill)` times the cross-entropy plus `distill` times the divergence from the teacher, per token.

    It is a `compute_loss_func` of Trainer.

    Args:
        outputs: of a causal language model, with logits [rows, tokens, vocabulary].
        labels: [rows, tokens], not shifted. A label of -100 does not count.
        num_items_in_batch: tokens that the sums are divided by, over all micro-batches and ranks; None: those that
            count here.
        teacher_logits: shaped like the model's.
        distill: weight of the divergence.
    Returns:
        A scalar in nats.
    """
    logits = outputs.logits
    # The label of a token is the next one.
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].to(logits.device)
    counts = labels != -100
    tokens = counts.sum() if num_items_in_batch is None else num_items_in_batch
    tokens = tokens.to(logits.device) if isinstance(tokens, Tensor) else tokens
    entropy = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
    return ((1.0 - distill) * entropy + distill * (divergence(logits, teacher_logits) * counts).sum()) / tokens


def check_distill(distill: float) -> None:
    """Raises ValueError for a weight of the distillation loss that is out of its range."""
    if not 0.0 < distill <= 1.0:
        raise ValueError(
            f"distill={distill!r} must be above 0 and at most 1, the weight of the distillation loss; leave the"
            " teacher out for none"
        )


def check_teacher(model: nn.Module, teacher: nn.Module, distill: float) -> None:
    """Raises ValueError if the model can't learn from the teacher, or `distill` is out of its range."""
    check_distill(distill)
    if teacher is model:
        raise ValueError("the teacher is the model itself, and would change with it; load it a second time")
    for module in (model, teacher):
        if getattr(module, "loss_type", None) != "ForCausalLM":
            raise ValueError(
                f"{type(module).__name__} is no causal language model of transformers, and distillation is for those;"
                " leave the teacher out"
            )
    check_vocabularies(model.config, teacher.config)


def check_vocabularies(config: Any, teacher_config: Any) -> None:
    """Raises UsageError if the configurations of model and teacher have vocabularies of different sizes."""
    sizes = [each.get_text_config().vocab_size for each in (config, teacher_config)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the teacher knows {sizes[1]:,} tokens and the model {sizes[0]:,}; both must have the same tokenizer:"
            " take the dense model that it is fine-tuned from, or a fine-tune of that"
        )


def sharded_alike(teacher: nn.Module, accelerator: Any) -> nn.Module:
    """Puts the teacher where the engine has the model that trains, without gradients and in evaluation mode.

    It is sharded over the ranks by ZeRO-3 and FSDP2, and replicated on each of them otherwise. Collective. Call it
    after Accelerate has prepared the model.

    Args:
        teacher: changed in place.
        accelerator: of Trainer.
    Returns:
        The module to call.
    """
    teacher.requires_grad_(False).eval()
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is not None:
        return _of_deepspeed(teacher, plugin.deepspeed_config, accelerator.device)
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        teacher = fsdp2_prepare_model(accelerator, teacher)
        # There is no backward pass, for which the last layers would better stay gathered.
        teacher.set_reshard_after_forward(True)
        return teacher
    return teacher.to(accelerator.device)


def _of_deepspeed(teacher: nn.Module, config: dict[str, Any], device: Any) -> nn.Module:
    half = next((key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled") is True), None)
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return teacher.to(device=device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[half])
    import deepspeed

    zero_config = {key: value for key, value in zero.items() if key != "offload_optimizer" and value != "auto"}
    engine, *_ = deepspeed.initialize(
        model=teacher,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero_config,
            **({half: {"enabled": True}} if half else {}),
        },
    )
    # eval() of an engine returns None.
    engine.eval()
    return engine
