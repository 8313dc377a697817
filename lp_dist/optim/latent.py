"""Latent weights: what is planned to die is zero in the model at once, and goes on learning where its momentum would
be.

A weight that fades loses what it was, so one that would have been needed later has to grow again from nothing.
Proximal and straight-through methods (ProxQuant, arXiv 1810.00861, is both) keep a dense copy of the weights and show
the model the pruned ones. Here there is no copy: a weight that is zero needs no momentum, so its latent value lies in
Adam's first moment. The latent takes Adam's step without momentum, from the gradient at zero, and the decay of
`decay.py`, which under a cap reaches hidden weights alone; once its x is above the cutoff it is the weight again, with
a momentum of 0. Whether a weight is seen is asked after the step, and not before it as the decay asks: what the model
is shown next is then above the threshold, which on a small character model at 90 % is worth 0.014 nats. The fused
steps write the same in their own words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_dist.optim import decay


class Hidden:
    """Of one step: which weights were hidden before it, and `latents`, the weights with what is latent in the place of
    zeros.
    """

    def __init__(self, weights: list[Tensor], memory: list[Tensor]) -> None:
        self.were = [w == 0 for w in weights]
        self.latents = [torch.where(hidden, m, w) for hidden, m, w in zip(self.were, memory, weights)]

    def decay_(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        memory: list[Tensor],
        denom: list[Tensor],
        x: list[Tensor],
        gamma: float,
        values: dict[str, Any],
    ) -> None:
        """The decay of all, in place, after the base's step; then what is not above the cutoff goes into `memory`, and
        its weight becomes zero.

        weights, memory: after Adam's step, which was wrong where a weight was hidden. denom: √v̂+ε. x: of `latents`;
        it is consumed. gamma: γ.
        """
        for w, g, d, hidden, latent in zip(weights, grads, denom, self.were, self.latents):
            w.copy_(torch.where(hidden, latent - values["lr"] * g / d, w))
        decay.decay_(weights, x, **values)
        x = decay.resistance(weights, values["p"])
        if gamma:
            decay.precondition_(x, denom, gamma)
        hide = [t <= values["cutoff"] for t in x]
        for w, m, under, hidden in zip(weights, memory, hide, self.were):
            m.copy_(torch.where(under, w, m.masked_fill(hidden, 0.0)))
            w.copy_(torch.where(under, w * 0.0 + 0.0, w))  # a nan shows


def seen(weights: Tensor, memory: Tensor | None) -> Tensor:
    """The weights with what is latent in the place of zeros; as they are without a memory."""
    return weights if memory is None else torch.where(weights == 0, memory, weights)
