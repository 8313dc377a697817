"""The Lp decay: the one place where the equation is written. torch only, pure functions.

Outmezguine and Levi, "Decoupled Weight Decay for Any p Norm", arXiv 2404.10824. The regularised loss is
`L(w) + (λ/p)·Σ|w|^p`; with learning rate α and the base optimizer's step `u = w_old − α·a`, one step is

    w_new = u / (1 + α·λ2 + α·λ/x)        x = |w_old|^(2−p)        (1/x is the paper's auxiliary s = |w|^(p−2))

x is called the saliency here: the larger it is, the less a weight decays. The weight in x is the one from BEFORE the
gradient step. Three forms of lp_dist change x and cost no state:

- preconditioned: `x = |w_old|^(2−p)·(√v̂+ε)^γ`;
- capped: a weight with `x > cutoff` feels no Lp term;
- with regrowth: x is taken as at least `regrowth_below`. Then zero does not absorb, as in iteratively reweighted least
  squares, whose ε it is, and a weight that is near zero grows again if its gradient asks for it.

λ is `weight_decay` and carries the 1/p: a code whose factor is `1/(1 + p·α·λ'·|w|^(p−2))` has `λ = p·λ'`.
p = 2 is AdamW's decay to first order; p = 0 is the log penalty; p < 0 continues the same formula.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lp_dist.optim.hyperparameters import check_hyperparameters

# A decayed weight below this is set to exact zero: it is lost to any loss in fp32, and denormals are slow.
SNAP = 1e-13


def saliency(weights: list[Tensor], p: float) -> list[Tensor]:
    """x = |w|^(2−p) of each tensor: how little a weight decays.

    Args:
        weights: any shape, floating point.
        p: exponent of the norm.
    Returns:
        New tensors: fp32 for 16-bit weights (|w|^6 leaves their range), else in the weights' dtype. For p < 2, x = 0
        exactly where w = 0, so that zero absorbs.
    """
    x = list(torch._foreach_abs([w.float() if w.dtype.itemsize < 4 else w for w in weights]))
    exponent = 2.0 - p
    if exponent == 1.5:  # the default p; twice as fast as pow, and no less exact
        torch._foreach_mul_(x, torch._foreach_sqrt(x))
    elif exponent != 1.0:
        torch._foreach_pow_(x, exponent)
    return x


def precondition_(x: list[Tensor], denom: list[Tensor], gamma: float) -> None:
    """x ← x·denom^γ, in place, with denom = √v̂+ε: weights to which the loss is sensitive decay less."""
    denom = [d.to(t.dtype) for d, t in zip(denom, x)]
    if gamma != 1.0:
        denom = list(torch._foreach_pow(denom, gamma))
        for d in denom:  # out of range, it would make 0·inf of a zero weight
            d.clamp_(torch.finfo(d.dtype).tiny, torch.finfo(d.dtype).max)
    torch._foreach_mul_(x, denom)


def lag_(x: list[Tensor], s: list[Tensor], lag: float) -> None:
    """x ← 1/s with s ← lag·s + (1−lag)/x, in place in both: the paper's auxiliary s at a rate of its own.

    Where s is 0, which it is at first, it starts as 1/x. A weight that is zero makes s infinite for good, so zero
    still absorbs.
    """
    for t, state in zip(x, s):
        t.reciprocal_()
        now = torch.where(state == 0, t, state * lag + t * (1.0 - lag))
        state.copy_(now)
        torch.reciprocal(state, out=t)


def is_active(lr: float, weight_decay: float) -> bool:
    """Whether the Lp term acts at all."""
    return lr * weight_decay > 0.0


def decay_(
    weights: list[Tensor],
    x: list[Tensor] | None,
    *,
    lr: float,
    weight_decay: float,
    p: float,
    l2: float = 0.0,
    cutoff: float = math.inf,
    regrowth_below: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """weights ← weights / (1 + αλ2 + αλ/x), in place.

    With αλ = 0 and l2 = 0 nothing is touched. αλ/x is inf where x = 0, so the weight becomes zero, and 0 where x =
    inf: one form is right for every p, p ≥ 2 included, and 0/0 can't occur. A cutoff of 0 freezes zeros, whatever
    `regrowth_below` is.

    Args:
        weights: u, the base optimizer's step; any shape, floating point.
        x: from `saliency`, preconditioned or not, of the weights before that step; it is used up. None where the Lp
            term is not active.
        lr: α.
        weight_decay: λ.
        p: exponent of the norm.
        l2: λ2.
        cutoff: weights with x above it feel no Lp term.
        regrowth_below: x is taken as at least this.
        skip: a one-element tensor, 1.0 where the base optimizer left out its step, 0.0 elsewhere (AMP's found_inf).
    """
    active = is_active(lr, weight_decay)
    if not active and lr * l2 == 0.0:
        return
    limits = torch.finfo(torch.float64 if all(w.dtype == torch.float64 for w in weights) else torch.float32)
    base = min(1.0 + lr * l2, limits.max)
    if active:
        assert x is not None
        strength = min(max(lr * weight_decay, limits.tiny), limits.max)  # 0·inf would be nan
        if cutoff < math.inf:
            for t in x:
                t.masked_fill_(t > cutoff, math.inf)  # the penalty is flat here: no pull
        if regrowth_below > 0.0 and cutoff > 0.0:
            for t in x:
                t.clamp_(min=regrowth_below)
        torch._foreach_reciprocal_(x)  # s = 1/x
        torch._foreach_mul_(x, strength)  # α·λ·s
        torch._foreach_add_(x, base)  # 1 + α·λ2 + α·λ·s
    else:
        x = [torch.full((), base, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device) for w in weights]
    if skip is not None:
        x = [torch.where(skip > 0, torch.ones_like(t), t) for t in x]
    torch._foreach_div_(weights, x)  # w_new = u / (…)
    if active and p < 2.0:
        for w in weights:
            if skip is None:
                torch.hardshrink(w, SNAP, out=w)  # |w| ≤ SNAP → 0; a nan stays one
            else:
                w.copy_(torch.where(skip > 0, w, torch.hardshrink(w, SNAP)))


def lp_decay(
    u: Tensor,
    w_old: Tensor,
    *,
    lr: float,
    weight_decay: float,
    p: float = 0.5,
    l2: float = 0.0,
    cutoff: float = math.inf,
    regrowth_below: float = 0.0,
    precondition: float = 0.0,
    denom: Tensor | None = None,
) -> Tensor:
    """One decay of the stepped weight `u`, as a pure function of tensors.

    Args:
        u: the weight after the base optimizer's step, any shape, floating point.
        w_old: the weight before it, same shape.
        lr: α, the learning rate of this step.
        weight_decay: λ, in the convention of this module's head.
        p: exponent of the norm, in [−4, 4].
        l2: λ2, an L2 term beside the Lp one (elastic net).
        cutoff: weights with x above it feel no Lp term.
        regrowth_below: x is taken as at least this where it is not above the cutoff; 0: as it is, and zero absorbs.
        precondition: γ ≥ 0, exponent on `denom` in x.
        denom: √v̂+ε of Adam, same shape; needed when γ > 0.
    Returns:
        A new tensor of u's dtype.
    Raises:
        ValueError: a hyperparameter is out of its range, or γ > 0 without `denom`.
    """
    check_hyperparameters(
        lr=lr,
        weight_decay=weight_decay,
        p=p,
        l2=l2,
        cutoff=cutoff,
        regrowth_below=regrowth_below,
        precondition=precondition,
    )
    if precondition and denom is None:
        raise ValueError(f"precondition={precondition} needs denom (√v̂+ε of Adam); pass it, or set precondition=0")
    out = u.clone()
    x = None
    if is_active(lr, weight_decay):
        x = saliency([w_old], p)
        if precondition and denom is not None:
            precondition_(x, [denom], precondition)
    decay_([out], x, lr=lr, weight_decay=weight_decay, p=p, l2=l2, cutoff=cutoff, regrowth_below=regrowth_below)
    return out
