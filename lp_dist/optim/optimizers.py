"""LpAdamW, LpSGD, LpLion: torch optimizers whose decoupled weight decay is the Lp one of `decay.py`.

Each is its direction and its state; what they share is in `base.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lp_dist.optim.base import LpOptimizer, refuse_arguments
from lp_dist.optim.hyperparameters import OpenFloat, OpenPair

_LR, _LION_LR, _BETAS, _EPS = OpenFloat(1e-3), OpenFloat(1e-4), OpenPair((0.9, 0.999)), OpenFloat(1e-8)


class LpAdamW(LpOptimizer):
    """AdamW with decoupled Lp decay (arXiv 2404.10824); with weight_decay = 0 bit for bit torch.optim.AdamW of the
    same implementation.

    Args:
        params: parameters or param groups; every argument below but `implementation` is a group key too.
        lr: α, a number or a one-element tensor. Where Trainer makes the optimizer and this, betas or eps is not named,
            `LpCallback` gives it the value of `TrainingArguments`.
        betas: decay rates of the moments.
        eps: ε, added to √v̂.
        weight_decay: λ. Our λ carries the 1/p (see `decay.py`). A fine-tune needs one two or three orders of magnitude
            above what training from scratch uses: a weight becomes zero once the learning rates summed since the start
            reach |w|^(2−p)·(√v̂+ε)^γ/((2−p)·λ).
        p: exponent of the norm, in [−4, 4]. Exact zeros need p < 1 or so; p = 2 is AdamW's decay to first order.
        l2: λ2, an L2 term beside it (elastic net).
        precondition: γ ≥ 0. Weights on which the loss is sensitive decay less: their saliency is
            x = |w|^(2−p)·(√v̂+ε)^γ. 0 is the paper's own form; a `SparsityTarget` takes 1.
        cutoff: weights with a saliency above it feel no Lp term.
        regrowth_below: a saliency below this is taken as this. Weights then shrink to near zero without being lost,
            and grow again if their gradient asks for it. 0: the saliency as it is, and zero absorbs.
        latent: weights whose saliency is not above the cutoff after a step are set to zero in the model, while
            `exp_avg` keeps their values (a zero needs no momentum). These go on learning, from the gradient at zero,
            and decaying. A weight returns once its saliency is above the cutoff.
        pattern: "2:4" or "4:8": in each block of 4 (8) consecutive inputs of an output the 2 (4) weights of largest
            saliency feel no Lp term in a step. None: no pattern. Which dimension the inputs are, `lp_dist.attach` and
            `lp_dist.param_groups` read from the model; else the param group must have it under the key "input_dim" (1
            for a matrix [outputs, inputs]).
        phase: "decay"; "off", nothing decays; "frozen", zeros stay zero and all other weights train without decay.
            Both concern parameters with weight_decay > 0.
        lag: in [0, 1): s = |w|^(p−2) lags behind the weights, s ← lag·s + (1−lag)·|w|^(p−2), the paper's auxiliary at
            a rate of its own. 0: it follows at once, and needs no state.
        maximize: step along the gradient, not against it.
        capturable: the count of steps is kept on the device, so that a step can be captured in a CUDA graph, with lr a
            tensor if it is to change.
        implementation: None chooses, for each tensor: "fused" where it can, which is one pass over memory, else
            "foreach", which takes many tensors at a time; "reference" is the clear loop. "fused" computes in fp32 and
            takes denormals for zero on a CPU.

    State of each parameter: `step` (fp32 scalar, on the CPU unless capturable), `exp_avg`, `exp_avg_sq` (like the
    parameter), with lag `s`, nothing else.

    Raises:
        ValueError: a hyperparameter is out of its range, or two contradict each other.
    """

    kernel, state_names = "adamw", ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = _LR,
        betas: tuple[float, float] = _BETAS,
        eps: float = _EPS,
        weight_decay: float = 0.0,
        *,
        p: float = 0.5,
        l2: float = 0.0,
        precondition: float = 0.0,
        cutoff: float = math.inf,
        regrowth_below: float = 0.0,
        latent: bool = False,
        pattern: str | None = None,
        phase: str = "decay",
        lag: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
        implementation: str | None = None,
        **others: Any,
    ) -> None:
        refuse_arguments(type(self), others)
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                p=p,
                l2=l2,
                precondition=precondition,
                cutoff=cutoff,
                regrowth_below=regrowth_below,
                latent=latent,
                pattern=pattern,
                phase=phase,
                lag=lag,
                maximize=maximize,
                capturable=capturable,
            ),
            implementation,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group.get("latent") and group.get("lag"):
            raise ValueError(
                f"latent=True and lag={group['lag']} can't be together: s would lag behind weights that come and go;"
                " set one of them to 0"
            )

    @staticmethod
    def _reference(group, lr, weights, grads, exp_avgs, exp_avg_sqs, steps):
        (w,), (g,), (m,), (v,), (t,) = weights, grads, exp_avgs, exp_avg_sqs, steps
        beta1, beta2 = map(float, group["betas"])
        m.lerp_(g, 1 - beta1)  # m = β1·m + (1−β1)·g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v = β2·v + (1−β2)·g²
        denom = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])  # √v̂ + ε
        w.addcdiv_(m, denom, value=-(lr / (1 - beta1**t)))  # u = w − α·m̂/(√v̂+ε)
        return [denom]

    @staticmethod
    def _foreach(group, lr, weights, grads, exp_avgs, exp_avg_sqs, steps):
        beta1, beta2 = map(float, group["betas"])
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denom = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denom, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(denom, group["eps"])
        torch._foreach_addcdiv_(weights, exp_avgs, denom, [-(lr / (1 - beta1**t)) for t in steps])
        return denom


class _Unconditioned(LpOptimizer):
    """A base without second moments: there is no √v̂ to precondition with."""

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group.get("precondition"):
            raise ValueError(
                f"precondition={group['precondition']} needs Adam's second moments, which {type(self).__name__} has"
                " not; use LpAdamW, or leave it out"
            )
        if group.get("latent"):
            raise ValueError(
                f"latent=True keeps latent weights where Adam has its first moments, which {type(self).__name__} has"
                " not or needs; use LpAdamW, or leave it out"
            )


class LpSGD(_Unconditioned):
    """SGD with momentum and decoupled Lp decay; with weight_decay = 0 bit for bit torch.optim.SGD of the same
    implementation.

    Args as LpAdamW's, and momentum ≥ 0; nesterov: look ahead along the momentum. State: `step`, and
    `momentum_buffer` if there is momentum.
    """

    kernel = "sgd"

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = _LR,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        p: float = 0.5,
        l2: float = 0.0,
        cutoff: float = math.inf,
        regrowth_below: float = 0.0,
        pattern: str | None = None,
        phase: str = "decay",
        lag: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
        implementation: str | None = None,
        **others: Any,
    ) -> None:
        refuse_arguments(type(self), others)
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                p=p,
                l2=l2,
                cutoff=cutoff,
                regrowth_below=regrowth_below,
                pattern=pattern,
                phase=phase,
                lag=lag,
                maximize=maximize,
                capturable=capturable,
            ),
            implementation,
        )

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (("momentum_buffer",) if group["momentum"] else ()) + super()._state_names(group)

    @staticmethod
    def _reference(group, lr, weights, grads, *rest):
        (w,), (g,) = weights, grads
        if group["momentum"]:
            (b,) = rest[0]
            b.mul_(group["momentum"]).add_(g)  # b = μ·b + g
            g = g.add(b, alpha=group["momentum"]) if group["nesterov"] else b
        w.add_(g, alpha=-lr)  # u = w − α·b

    @staticmethod
    def _foreach(group, lr, weights, grads, *rest):
        if group["momentum"]:
            torch._foreach_mul_(rest[0], group["momentum"])
            torch._foreach_add_(rest[0], grads)
            grads = torch._foreach_add(grads, rest[0], alpha=group["momentum"]) if group["nesterov"] else rest[0]
        torch._foreach_add_(weights, grads, alpha=-lr)


class LpLion(_Unconditioned):
    """Lion (Chen et al., arXiv 2302.06675) with decoupled Lp decay. Args as LpAdamW's. State: `step`, `exp_avg`.

    Lion's direction has magnitude 1, so lr is usually 3 to 10 times smaller than Adam's, and λ as much larger.
    """

    kernel, state_names = "lion", ("exp_avg",)

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = _LION_LR,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        p: float = 0.5,
        l2: float = 0.0,
        cutoff: float = math.inf,
        regrowth_below: float = 0.0,
        pattern: str | None = None,
        phase: str = "decay",
        lag: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
        implementation: str | None = None,
        **others: Any,
    ) -> None:
        refuse_arguments(type(self), others)
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                weight_decay=weight_decay,
                p=p,
                l2=l2,
                cutoff=cutoff,
                regrowth_below=regrowth_below,
                pattern=pattern,
                phase=phase,
                lag=lag,
                maximize=maximize,
                capturable=capturable,
            ),
            implementation,
        )

    @staticmethod
    def _reference(group, lr, weights, grads, exp_avgs, steps):
        (w,), (g,), (m,) = weights, grads, exp_avgs
        beta1, beta2 = map(float, group["betas"])
        w.add_(m.lerp(g, 1 - beta1).sign_(), alpha=-lr)  # u = w − α·sign(β1·m + (1−β1)·g)
        m.lerp_(g, 1 - beta2)  # m = β2·m + (1−β2)·g
        w.add_(m, alpha=0.0)  # sign(nan) is 0: a nan weight would stay as it is, unnoticed

    @staticmethod
    def _foreach(group, lr, weights, grads, exp_avgs, steps):
        beta1, beta2 = map(float, group["betas"])
        direction = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_add_(weights, direction, alpha=-lr)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)
        torch._foreach_add_(weights, exp_avgs, alpha=0.0)
