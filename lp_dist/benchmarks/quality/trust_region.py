"""How far one update of the masks may change a model: a bound on the divergence of its outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lp_dist.training.distillation import divergence

# After so many halvings nothing is pruned until the next update.
HALVINGS = 10


def accepted_step(step: float, divergence_after: Callable[[float], float], bound: float) -> float:
    """The largest of step, step/2, step/4, ... after which the model has not changed by more than the bound.

    Args:
        step: above 0, in any unit.
        divergence_after: gives the divergence of the model after a step from the one before, in nats a token.
        bound: the largest divergence that is accepted.
    Returns:
        The step; 0 if that of the last halving (HALVINGS) is not accepted either.
    """
    for _ in range(HALVINGS + 1):
        # A divergence that is no number is not accepted.
        if divergence_after(step) <= bound:
            return step
        step /= 2
    return 0.0


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The outputs of a model, without dropout, one sequence at a time.

    Args:
        model: a causal language model of Transformers in training mode.
        inputs: token ids, int64 [rows, block].
    Returns:
        For each sequence the logits, [block, vocabulary].
    """
    device = next(model.parameters()).device
    model.eval()
    outputs = [model(input_ids=row[None].to(device)).logits[0] for row in inputs]
    model.train()
    return outputs


def mean_divergence(model: nn.Module, inputs: Tensor, logits_before: list[Tensor]) -> float:
    """KL(model before ‖ model now), on average over tokens.

    Args:
        model: a causal language model of Transformers in training mode.
        inputs: token ids, int64 [rows, block].
        logits_before: what `logits` gave for them.
    Returns:
        Nats a token.
    """
    per_row = [divergence(now, before).mean() for now, before in zip(logits(model, inputs), logits_before)]
    return float(torch.stack(per_row).mean())
