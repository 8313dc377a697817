"""What `lp-dist bench step` steps, and who: tensors as a training run has them, and a call that takes one step for
each contender.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.optim.decay import SNAP, precondition_, resistance
from lp_dist.optim.kernels import dispatch
from lp_dist.optim.optimizers import LpAdamW

PEER, COPY = "torch AdamW fused", "copy"
EXPONENTS = (-1, 0, 0.5, 0.8, 1, 1.2, 1.5, 2)
SHAPES = ("flat", "many", "collapsing")
_LAMBDA, _BETAS, _EPS, _STEP = 0.1, (0.9, 0.999), 1e-8, 1000

Call = Callable[[], Any]


class Missing(Exception):
    """A contender can't run here; its message says why."""


@dataclass
class Tensors:
    """Weights, gradients and moments, the same memory for all contenders: with these gradients they all make the same
    of the moments.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    lr: float = 1e-12  # so small a step leaves the weights as they are

    @classmethod
    def made(cls, shapes: list[tuple[int, ...]], device: torch.device) -> Tensors:
        """As late in a training run: weights from 1e-3 to 0.1, gradients of about 1e-3, moments to match."""
        grads = [torch.empty(shape, device=device).normal_(0, 1e-3) for shape in shapes]
        weights = [torch.empty_like(g).uniform_(1e-3, 1e-1).copysign_(g) for g in grads]
        return cls(weights, grads, [g.clone() for g in grads], [g * g for g in grads])

    @classmethod
    def collapsing(cls, n: int, device: torch.device) -> Tensors:
        """As in the middle of a collapse: weights down to 1e-14, denormals in the moments, and many gradients that are
        zero.
        """
        w, g, m, v = (_log_uniform(n, *range_, device) for range_ in ((-14, 0), (-30, -3), (-45, -8), (-45, -8)))
        for t in (w, g, m):
            t.copysign_(torch.empty_like(t).uniform_(-1, 1))
        g.masked_fill_(torch.rand(n, device=device) < 0.5, 0)
        return cls([w], [g], [m], [v], lr=1e-5)

    @property
    def weight_count(self) -> int:
        return sum(w.numel() for w in self.weights)

    def params(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """New parameters on the same memory, with the gradients in `dtype`."""
        params = [nn.Parameter(w) for w in self.weights]
        for param, grad in zip(params, self.grads):
            if dtype is not grad.dtype:
                if not hasattr(param, "grad_dtype"):
                    raise Missing(f"torch {torch.__version__} has no grad_dtype")
                param.grad_dtype = dtype
            param.grad = grad.to(dtype)
        return params

    def resistance(self, p: float, gamma: float) -> Tensor:
        """x of `decay.py` for some of the weights."""
        w, v = (tensors[0].flatten()[:1_000_000] for tensors in (self.weights, self.exp_avg_sqs))
        x = resistance([w], p)
        if gamma:
            precondition_(x, [(v / (1 - _BETAS[1] ** _STEP)).sqrt() + _EPS], gamma)
        return x[0]


def _log_uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    """10^low to 10^high, denormals among them; in pieces, since it goes through double precision."""
    t = torch.empty(n, device=device)
    for piece in t.split(1 << 22):
        piece.copy_(torch.pow(10.0, torch.empty(len(piece), dtype=torch.float64, device=device).uniform_(low, high)))
    return t


def transformer(n: int) -> list[tuple[int, ...]]:
    """Shapes of the 200 tensors of a Llama of 22 layers with about n weights: 7 matrices and 2 norms each, embedding
    and final norm.
    """
    h = max(4, round((n / 280) ** 0.5 / 4) * 4)  # 22 layers of 12·h² or so, and an embedding of 16·h²
    f = 8 * h // 3
    layers = [
        shape for _ in range(22) for shape in ((h, h), (h, h), (h, h), (h, h), (f, h), (f, h), (h, f), (h,), (h,))
    ]
    rest = n - sum(torch.Size(shape).numel() for shape in layers) - h
    return [(max(1, round(rest / h)), h), *layers, (h,)]


# -- contenders: each gives a call that takes one step ------------------------


def _begun(optimizer: torch.optim.Optimizer, tensors: Tensors, count: Callable[[Tensor], Any]) -> Call:
    for param, m, v in zip(optimizer.param_groups[0]["params"], tensors.exp_avgs, tensors.exp_avg_sqs):
        optimizer.state[param] = {"step": count(param), "exp_avg": m, "exp_avg_sq": v}
    return optimizer.step


def _torch(tensors: Tensors, weight_decay: float = _LAMBDA, **settings: Any) -> Call:
    optimizer = torch.optim.AdamW(tensors.params(), lr=tensors.lr, weight_decay=weight_decay, **settings)
    return _begun(
        optimizer, tensors, lambda p: torch.tensor(float(_STEP), device=p.device if settings.get("fused") else "cpu")
    )


def _deepspeed(tensors: Tensors) -> Call:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(tensors.params(), lr=tensors.lr, weight_decay=_LAMBDA)
    except Exception as error:  # not installed, or its op can't be built
        raise Missing(f"{error}"[:300]) from error
    return _begun(optimizer, tensors, lambda p: _STEP)


def _eager(tensors: Tensors, p: float) -> Call:
    adam, strength = _torch(tensors, weight_decay=0.0, foreach=True), tensors.lr * _LAMBDA

    def call() -> None:
        divisors = [1 + strength * w.abs() ** (p - 2) for w in tensors.weights]
        adam()
        for w, divisor in zip(tensors.weights, divisors):
            w /= divisor

    return call


def _compiled(tensors: Tensors, p: float) -> Call:
    (w,), (g,), (m,), (v,), lr = tensors.weights, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.lr
    corrections = torch.tensor(
        [1 - beta ** (_STEP + 1) for beta in _BETAS], device=w.device
    )  # a tensor: no step compiles anew

    def whole(w: Tensor, g: Tensor, m: Tensor, v: Tensor, corrections: Tensor) -> None:
        a = w.abs()
        x = a * a.sqrt() if p == 0.5 else a ** (2 - p)
        m.lerp_(g, 1 - _BETAS[0])
        v.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        u = w - lr / corrections[0] * m / ((v / corrections[1]).sqrt() + _EPS)
        u = u / (1 + lr * _LAMBDA / x)
        w.copy_(torch.where(u.abs() <= SNAP, 0, u))

    call = torch.compile(whole, dynamic=False, fullgraph=True)
    try:
        with (
            torch._inductor.config.patch(force_disable_caches=True),
            warnings.catch_warnings(),
        ):  # cached, a second run would take no time
            warnings.simplefilter("ignore")
            call(w, g, m, v, corrections)
    except Exception as error:
        raise Missing(f"torch.compile failed: {error}"[:300]) from error
    return lambda: call(w, g, m, v, corrections)


@cache
def start_compiler() -> None:
    """What torch.compile does once in a process is no part of the time that a step takes to compile."""
    with suppress(Exception):  # the contenders say it
        torch.compile(lambda t: t + 1)(torch.ones(8))


def _ours(
    tensors: Tensors,
    implementation: str = "fused",
    weight_decay: float | None = _LAMBDA,
    dtype: torch.dtype = torch.float32,
    capped: bool = False,
    **settings: Any,
) -> Call:
    """weight_decay None: the one by which half of the weights shrink to a half or less in a step."""
    why = dispatch.unavailable(tensors.weights[0].device) if implementation == "fused" else None
    if why is not None:
        raise Missing(why)
    settings.setdefault("precondition", 0.0)
    middle = float(tensors.resistance(settings.get("p", 0.5), settings["precondition"]).median())
    if capped:
        settings["cutoff"] = middle
    if weight_decay is None:
        weight_decay = middle / tensors.lr
    optimizer = LpAdamW(
        tensors.params(dtype), lr=tensors.lr, weight_decay=weight_decay, implementation=implementation, **settings
    )
    return _begun(optimizer, tensors, lambda p: torch.tensor(float(_STEP)))


def _copy(tensors: Tensors) -> Call:
    """Reads and writes as many bytes as a step with fp32 gradients: 14 a weight read, and as many written."""
    scratch = [torch.empty_like(w) for w in tensors.weights]
    pairs = [pair for source in (tensors.weights, tensors.grads, tensors.exp_avgs) for pair in zip(scratch, source)]
    halves = [
        (to.flatten()[: to.numel() // 2], v.flatten()[: v.numel() // 2]) for to, v in zip(scratch, tensors.exp_avg_sqs)
    ]

    def call() -> None:
        for to, source in (*pairs, *halves):
            to.copy_(source)

    return call


def contenders(kind: str, device: torch.device, compiled: bool = True) -> dict[str, Callable[[Tensors], Call]]:
    """By name, for tensors of one of SHAPES."""
    if kind == "collapsing":
        own = partial(_ours, weight_decay=None)
        return {
            COPY: _copy,
            PEER: partial(_torch, fused=True),
            "LpAdamW p = 0.8": partial(own, p=0.8),
            "LpAdamW p = -1, γ = 1": partial(own, p=-1, precondition=1.0),
            "LpAdamW foreach p = 0.8": partial(own, implementation="foreach", p=0.8),
        }
    found = {COPY: _copy, PEER: partial(_torch, fused=True), "torch AdamW foreach": partial(_torch, foreach=True)}
    if device.type == "cpu":
        found["DeepSpeedCPUAdam"] = _deepspeed
    found["eager: AdamW foreach, then plain torch, p = 0.8"] = partial(_eager, p=0.8)
    if kind == "flat" and compiled:
        found |= {f"torch.compile'd, p = {p}": partial(_compiled, p=p) for p in (0.5, 0.8)}
    found["LpAdamW foreach p = 0.8"] = partial(_ours, implementation="foreach", p=0.8)
    found |= {f"LpAdamW p = {p}": partial(_ours, p=p) for p in EXPONENTS}
    found |= {
        f"LpAdamW p = {p}, γ = {gamma:g}": partial(_ours, p=p, precondition=gamma)
        for p in (0.5, 0.8)
        for gamma in (0.5, 1.0)
    }
    found |= {
        f"LpAdamW p = {p}, γ = 0.5, capped": partial(_ours, p=p, precondition=0.5, capped=True) for p in (0.5, 0.8)
    }
    return found | {
        "LpAdamW p = 0.5, γ = 0.37": partial(_ours, precondition=0.37),
        "LpAdamW frozen": partial(_ours, cutoff=0.0),
        "LpAdamW dense": partial(_ours, weight_decay=0.0),
        "LpAdamW p = 0.8, bf16 gradients": partial(_ours, p=0.8, dtype=torch.bfloat16),
    }
