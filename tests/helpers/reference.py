"""The oracle: Lp decay and its three base optimizers, one weight at a time, in Python floats (float64).

Written from the equations of arXiv 2404.10824 (Outmezguine and Levi, "Decoupled Weight Decay for Any p Norm") alone,
in their case-by-case form. It imports nothing from lp_dist and nothing from torch, and it is slow on purpose: the
tests trust it because every line can be read beside the equation.

Weights, gradients and state are plain lists of floats. Each `*_step` returns (new weights, new state) and changes
neither argument; the state of the first step is None.
"""

import math

SNAP = 1e-13  # a decayed weight below this becomes an exact zero


def lp_factor(w_old, *, lr, weight_decay, p, l2=0.0, cutoff=math.inf, regrowth_below=0.0, precondition=0.0, denom=1.0):
    """The number in [0, 1] that the stepped weight is multiplied by; w_old is the weight from before the step."""
    shrink = 1.0 + lr * l2
    strength = lr * weight_decay
    if strength == 0.0:
        return 1.0 / shrink
    # x = |w|^(2-p) * (sqrt(v) + eps)^gamma
    x = _power(abs(w_old), 2.0 - p) * _power(denom, precondition)
    if x > cutoff:  # the penalty is flat up here
        return 1.0 / shrink
    if regrowth_below > 0.0 and x < regrowth_below and cutoff > 0.0:
        return 1.0 / (shrink + strength / regrowth_below)
    if p < 2:
        if x > 1e300:  # strength / x is nil, and x * shrink might overflow
            return 1.0 / shrink
        return x / (x * shrink + strength)
    # p >= 2: 1 / x is the harmless side of the fraction
    pull = _power(abs(w_old), p - 2.0) * _power(denom, -precondition)
    return 1.0 / (1.0 + strength * pull + lr * l2)


def lp_weight(u, w_old, *, lr, weight_decay, p, **variants):
    """The decayed weight, from u = the weight after the base step and w_old = the weight before it."""
    w_new = u * lp_factor(w_old, lr=lr, weight_decay=weight_decay, p=p, **variants)
    if p < 2 and lr * weight_decay > 0.0 and abs(w_new) < SNAP:
        return 0.0
    return w_new


def cutoffs(weights, pattern, cutoff, *, p, precondition=0.0, denoms=None):
    """The cutoff of each weight: below every x for the n largest x of each block of m, of equal ones the earlier.
    pattern: (n, m) or None.
    """
    limits = [cutoff] * len(weights)
    if pattern and cutoff > 0.0:
        n, m = pattern
        xs = [
            _power(abs(w), 2.0 - p) * _power(d, precondition)
            for w, d in zip(weights, denoms or [1.0] * len(weights), strict=True)
        ]
        for start in range(0, len(xs), m):
            for i in sorted(range(start, start + m), key=lambda i: (-xs[i], i))[:n]:
                limits[i] = -1.0
    return limits


def adamw_step(
    weights,
    grads,
    state=None,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    p=0.5,
    l2=0.0,
    precondition=0.0,
    cutoff=math.inf,
    regrowth_below=0.0,
    latent=False,
    pattern=None,
    maximize=False,
):
    """Adam (Kingma and Ba, arXiv 1412.6980), then the Lp decay. State: step, exp_avg, exp_avg_sq.

    latent: a weight whose x is not above the cutoff after the step is 0, and exp_avg has its latent value, which steps
    without momentum.
    """
    beta1, beta2 = betas
    state = state or {"step": 0, "exp_avg": [0.0] * len(weights), "exp_avg_sq": [0.0] * len(weights)}
    t = state["step"] + 1
    new_weights, new_m, new_v = [], [], []
    denoms = [
        math.sqrt((beta2 * v + (1.0 - beta2) * g * g) / (1.0 - beta2**t)) + eps
        for v, g in zip(state["exp_avg_sq"], grads, strict=True)
    ]
    limits = cutoffs(weights, pattern, cutoff, p=p, precondition=precondition, denoms=denoms)
    for w, g, m, v, cutoff in zip(
        weights, _signed(grads, maximize), state["exp_avg"], state["exp_avg_sq"], limits, strict=True
    ):
        acts = latent and weight_decay > 0.0 and cutoff > 0.0
        is_latent, old = acts and w == 0.0, w
        if is_latent:
            old = m
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        m_hat = m / (1.0 - beta1**t)
        v_hat = v / (1.0 - beta2**t)
        denom = math.sqrt(v_hat) + eps
        u = old - lr * (g if is_latent else m_hat) / denom
        w_new = lp_weight(
            u,
            old,
            lr=lr,
            weight_decay=weight_decay,
            p=p,
            l2=l2,
            cutoff=cutoff,
            regrowth_below=regrowth_below,
            precondition=precondition,
            denom=denom,
        )
        if acts and _power(abs(w_new), 2.0 - p) * _power(denom, precondition) <= cutoff:
            w_new, m = 0.0, w_new
        elif is_latent:
            m = 0.0
        new_weights.append(w_new)
        new_m.append(m)
        new_v.append(v)
    return new_weights, {"step": t, "exp_avg": new_m, "exp_avg_sq": new_v}


def sgd_step(
    weights,
    grads,
    state=None,
    *,
    lr,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    p=0.5,
    l2=0.0,
    cutoff=math.inf,
    regrowth_below=0.0,
    pattern=None,
    maximize=False,
):
    """SGD with (Nesterov) momentum, then the Lp decay. State: momentum_buffer, whose first value is the first
    gradient.
    """
    new_weights, new_buffer = [], []
    limits = cutoffs(weights, pattern, cutoff, p=p)
    for i, (w, g, cutoff) in enumerate(zip(weights, _signed(grads, maximize), limits, strict=True)):
        buffer = momentum * state["momentum_buffer"][i] + g if state else g
        direction = g + momentum * buffer if nesterov else buffer
        u = w - lr * direction
        new_weights.append(
            lp_weight(u, w, lr=lr, weight_decay=weight_decay, p=p, l2=l2, cutoff=cutoff, regrowth_below=regrowth_below)
        )
        new_buffer.append(buffer)
    return new_weights, {"momentum_buffer": new_buffer}


def lion_step(
    weights,
    grads,
    state=None,
    *,
    lr,
    betas=(0.9, 0.99),
    weight_decay=0.0,
    p=0.5,
    l2=0.0,
    cutoff=math.inf,
    regrowth_below=0.0,
    pattern=None,
    maximize=False,
):
    """Lion (Chen et al., arXiv 2302.06675), then the Lp decay. State: exp_avg."""
    beta1, beta2 = betas
    old_m = state["exp_avg"] if state else [0.0] * len(weights)
    new_weights, new_m = [], []
    for w, g, m, limit in zip(
        weights, _signed(grads, maximize), old_m, cutoffs(weights, pattern, cutoff, p=p), strict=True
    ):
        mix = beta1 * m + (1.0 - beta1) * g
        direction = (mix > 0) - (mix < 0)
        u = w - lr * direction
        new_weights.append(
            lp_weight(u, w, lr=lr, weight_decay=weight_decay, p=p, l2=l2, cutoff=limit, regrowth_below=regrowth_below)
        )
        new_m.append(beta2 * m + (1.0 - beta2) * g)
    return new_weights, {"exp_avg": new_m}


def _signed(grads, maximize):
    return [-g for g in grads] if maximize else list(grads)


def _power(base, exponent):
    """base ** exponent for base >= 0, with infinity where Python raises."""
    if base == 0.0 and exponent < 0.0:
        return math.inf
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def group_factors(
    groups, weights, *, lr, weight_decay, p, precondition=0.0, denoms=None, cutoff=math.inf, regrowth_below=0.0
):
    """For the penalty (λ/p)·Σ_g ‖w_g‖_2^p the number that every weight of a group is multiplied by after the base
    step.

    groups: lists of indices. weights, denoms (√v̂+ε): from before the step.
    """
    factors = []
    for group in groups:
        metric = (
            [1.0] * len(weights) if not precondition else [denom ** (precondition / (2.0 - p)) for denom in denoms]
        )
        norm = math.sqrt(math.fsum((weights[i] * metric[i]) ** 2 for i in group))
        x = _power(norm, 2.0 - p)
        if math.sqrt(math.fsum(weights[i] ** 2 for i in group)) <= SNAP * math.sqrt(len(group)) and not precondition:
            factors.append(0.0)
        elif x > cutoff:
            factors.append(1.0)
        else:
            x = max(x, regrowth_below)
            factors.append(x / (x + lr * weight_decay))
    return factors
