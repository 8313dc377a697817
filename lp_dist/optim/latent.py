"""Latent weights: weights below the cutoff are set to zero in the model, while the optimizer keeps their values.

Weights that decay lose what they were, so one that is needed later has to grow again from nothing. Proximal and
straight-through methods (ProxQuant, arXiv 1810.00861, is both) keep a dense copy of the weights and show the model the
pruned ones. Here there is no copy. A weight that is zero needs no momentum, so its latent value lies in Adam's first
moment, `exp_avg`. A latent value takes Adam's step without momentum, from the gradient at zero, and the decay of
`decay.py`. Once its saliency is above the cutoff it is the weight again, with a momentum of 0.

Whether a weight is latent is decided after the step, and not before it as the decay does. What the model computes with
next is then above the threshold, which on a small character model at 90 % is worth 0.014 nats. The kernels compute the
same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_dist.optim import decay


class LatentWeights:
    """The latent weights of one step, made before it.

    Args:
        weights: of the model, any shape; zero where they are latent.
        exp_avgs: Adam's first moments, like `weights`.
    Attributes:
        values: the weights, with the latent values in the place of zeros; new tensors.
    """

    def __init__(self, weights: list[Tensor], exp_avgs: list[Tensor]) -> None:
        self._were_latent = [w == 0 for w in weights]
        self.values = [torch.where(latent, m, w) for latent, m, w in zip(self._were_latent, exp_avgs, weights)]

    def decay_(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        denom: list[Tensor],
        x: list[Tensor],
        gamma: float,
        values: dict[str, Any],
    ) -> None:
        """Decays all weights, in place, after the base's step. Those whose saliency is not above the cutoff move to
        `exp_avgs`, and become zero.

        Args:
            weights: after Adam's step, which was wrong where a weight was latent.
            grads: like `weights`.
            exp_avgs: after Adam's step.
            denom: √v̂+ε.
            x: saliencies of `self.values`; used up.
            gamma: γ.
            values: lr, weight_decay, p, l2, cutoff and regrowth_below.
        """
        for w, g, d, latent, value in zip(weights, grads, denom, self._were_latent, self.values):
            w.copy_(torch.where(latent, value - values["lr"] * g / d, w))
        decay.decay_(weights, x, **values)
        x = decay.saliency(weights, values["p"])
        if gamma:
            decay.precondition_(x, denom, gamma)
        becomes_latent = [t <= values["cutoff"] for t in x]
        for w, m, below, was_latent in zip(weights, exp_avgs, becomes_latent, self._were_latent):
            m.copy_(torch.where(below, w, m.masked_fill(was_latent, 0.0)))
            w.copy_(torch.where(below, w * 0.0 + 0.0, w))  # a nan shows


def with_latents(weights: Tensor, latents: Tensor | None) -> Tensor:
    """The weights, with `latents` (like `weights`) in the place of zeros; the weights themselves where it is None."""
    return weights if latents is None else torch.where(weights == 0, latents, weights)
