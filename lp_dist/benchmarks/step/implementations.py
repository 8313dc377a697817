"""What `lp-dist bench step` times: tensors as a training run has them, and each implementation of a step on them."""

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

from lp_dist.optim.decay import SNAP, precondition_, saliency
from lp_dist.optim.kernels import dispatch
from lp_dist.optim.optimizers import LpAdamW

PEER, COPY = "torch AdamW fused", "copy"
EXPONENTS = (-1, 0, 0.5, 0.8, 1, 1.2, 1.5, 2)
SHAPES = ("flat", "many", "collapsing")
_LAMBDA, _BETAS, _EPS, _STEP = 0.1, (0.9, 0.999), 1e-8, 1000

Call = Callable[[], Any]


class Missing(Exception):
    """An implementation cannot run here; the message says why."""


@dataclass
class Tensors:
    """Weights, gradients and moments, in the same memory for all implementations.

    With these gradients all implementations come to the same moments.

    Args:
        weights: float32, any shape.
        grads: of the weights, float32.
        exp_avgs: Adam's first moments, float32.
        exp_avg_sqs: Adam's second moments, float32.
        lr: by default a step so small that it leaves the weights as they are.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    lr: float = 1e-12

    @classmethod
    def random(cls, shapes: list[tuple[int, ...]], device: torch.device) -> Tensors:
        """Tensors as late in a training run: weights from 1e-3 to 0.1, gradients of about 1e-3, moments to match.

        Args:
            shapes: of the weights.
            device: where they lie.
        Returns:
            The tensors, drawn by torch's generator.
        """
        grads = [torch.empty(shape, device=device).normal_(0, 1e-3) for shape in shapes]
        weights = [torch.empty_like(g).uniform_(1e-3, 1e-1).copysign_(g) for g in grads]
        return cls(weights, grads, [g.clone() for g in grads], [g * g for g in grads])

    @classmethod
    def collapsing(cls, n: int, device: torch.device) -> Tensors:
        """Tensors as while many weights become zero: weights down to 1e-14, denormal moments, and half of the
        gradients zero.

        Args:
            n: number of weights, in one flat tensor.
            device: where they lie.
        Returns:
            The tensors, drawn by torch's generator, with a learning rate of 1e-5.
        """
        w, g, m, v = (_log_uniform(n, *range_, device) for range_ in ((-14, 0), (-30, -3), (-45, -8), (-45, -8)))
        for t in (w, g, m):
            t.copysign_(torch.empty_like(t).uniform_(-1, 1))
        g.masked_fill_(torch.rand(n, device=device) < 0.5, 0)
        return cls([w], [g], [m], [v], lr=1e-5)

    @property
    def weight_count(self) -> int:
        """Number of weights in all tensors."""
        return sum(w.numel() for w in self.weights)

    def params(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """New parameters on the same memory.

        Args:
            dtype: of the gradients; other dtypes than float32 are copies.
        Returns:
            A parameter for each weight, with its gradient.
        Raises:
            Missing: this torch allows gradients of the weights' dtype alone.
        """
        params = [nn.Parameter(w) for w in self.weights]
        for param, grad in zip(params, self.grads):
            if dtype is not grad.dtype:
                if not hasattr(param, "grad_dtype"):
                    raise Missing(f"torch {torch.__version__} has no grad_dtype")
                param.grad_dtype = dtype
            param.grad = grad.to(dtype)
        return params

    def saliency(self, p: float, gamma: float) -> Tensor:
        """The saliency of up to a million weights of the first tensor.

        Args:
            p: exponent of the norm.
            gamma: γ, the exponent of √v̂+ε.
        Returns:
            x of `lp_dist.optim.decay`, float32, flat.
        """
        w, v = (tensors[0].flatten()[:1_000_000] for tensors in (self.weights, self.exp_avg_sqs))
        x = saliency([w], p)
        if gamma:
            precondition_(x, [(v / (1 - _BETAS[1] ** _STEP)).sqrt() + _EPS], gamma)
        return x[0]


def _log_uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    """10^low to 10^high, denormals among them; chunk by chunk, since it goes through double precision."""
    t = torch.empty(n, device=device)
    for chunk in t.split(1 << 22):
        chunk.copy_(torch.pow(10.0, torch.empty(len(chunk), dtype=torch.float64, device=device).uniform_(low, high)))
    return t


def transformer(n: int) -> list[tuple[int, ...]]:
    """Shapes of the 200 tensors of a Llama with 22 layers: 7 matrices and 2 norms each, embedding and final norm.

    Args:
        n: number of weights, kept to within 5 %.
    Returns:
        The shapes, the embedding first.
    """
    # 22 layers of about 12·h², and an embedding of 16·h².
    h = max(4, round((n / 280) ** 0.5 / 4) * 4)
    f = 8 * h // 3
    layers = [
        shape for _ in range(22) for shape in ((h, h), (h, h), (h, h), (h, h), (f, h), (f, h), (h, f), (h,), (h,))
    ]
    rest = n - sum(torch.Size(shape).numel() for shape in layers) - h
    return [(max(1, round(rest / h)), h), *layers, (h,)]


# -- implementations: each gives a call that takes one step -------------------


def _with_state(optimizer: torch.optim.Optimizer, tensors: Tensors, count: Callable[[Tensor], Any]) -> Call:
    for param, m, v in zip(optimizer.param_groups[0]["params"], tensors.exp_avgs, tensors.exp_avg_sqs):
        optimizer.state[param] = {"step": count(param), "exp_avg": m, "exp_avg_sq": v}
    return optimizer.step


def _torch(tensors: Tensors, weight_decay: float = _LAMBDA, **settings: Any) -> Call:
    optimizer = torch.optim.AdamW(tensors.params(), lr=tensors.lr, weight_decay=weight_decay, **settings)
    return _with_state(
        optimizer, tensors, lambda p: torch.tensor(float(_STEP), device=p.device if settings.get("fused") else "cpu")
    )


def _deepspeed(tensors: Tensors) -> Call:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(tensors.params(), lr=tensors.lr, weight_decay=_LAMBDA)
    except Exception as error:
        # It is not installed, or its op cannot be built.
        raise Missing(f"{error}"[:300]) from error
    return _with_state(optimizer, tensors, lambda p: _STEP)


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
    # As a tensor, so that no step compiles anew.
    corrections = torch.tensor([1 - beta ** (_STEP + 1) for beta in _BETAS], device=w.device)

    def adamw_with_decay(w: Tensor, g: Tensor, m: Tensor, v: Tensor, corrections: Tensor) -> None:
        a = w.abs()
        x = a * a.sqrt() if p == 0.5 else a ** (2 - p)
        m.lerp_(g, 1 - _BETAS[0])
        v.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        u = w - lr / corrections[0] * m / ((v / corrections[1]).sqrt() + _EPS)
        u = u / (1 + lr * _LAMBDA / x)
        w.copy_(torch.where(u.abs() <= SNAP, 0, u))

    call = torch.compile(adamw_with_decay, dynamic=False, fullgraph=True)
    try:
        # From a cache, the compilation of a second run would take no time.
        with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(w, g, m, v, corrections)
    except Exception as error:
        raise Missing(f"torch.compile failed: {error}"[:300]) from error
    return lambda: call(w, g, m, v, corrections)


@cache
def start_compiler() -> None:
    """Does what torch.compile does once in a process, so that no step's compile time has it."""
    # A compiler that fails is reported by the implementations.
    with suppress(Exception):
        torch.compile(lambda t: t + 1)(torch.ones(8))


def _lp_dist(
    tensors: Tensors,
    implementation: str = "fused",
    weight_decay: float | None = _LAMBDA,
    dtype: torch.dtype = torch.float32,
    capped: bool = False,
    **settings: Any,
) -> Call:
    """LpAdamW. weight_decay: None is the λ with which half of the weights shrink to a half or less in a step."""
    reason = dispatch.unavailable(tensors.weights[0].device) if implementation == "fused" else None
    if reason is not None:
        raise Missing(reason)
    settings.setdefault("precondition", 0.0)
    median = float(tensors.saliency(settings.get("p", 0.5), settings["precondition"]).median())
    if capped:
        settings["cutoff"] = median
    if weight_decay is None:
        weight_decay = median / tensors.lr
    optimizer = LpAdamW(
        tensors.params(dtype), lr=tensors.lr, weight_decay=weight_decay, implementation=implementation, **settings
    )
    return _with_state(optimizer, tensors, lambda p: torch.tensor(float(_STEP)))


def _copy(tensors: Tensors) -> Call:
    """Reads and writes as many bytes as a step with fp32 gradients: 14 a weight read, and as many written."""
    buffers = [torch.empty_like(w) for w in tensors.weights]
    pairs = [pair for source in (tensors.weights, tensors.grads, tensors.exp_avgs) for pair in zip(buffers, source)]
    halves = [
        (to.flatten()[: to.numel() // 2], v.flatten()[: v.numel() // 2]) for to, v in zip(buffers, tensors.exp_avg_sqs)
    ]

    def call() -> None:
        for to, source in (*pairs, *halves):
            to.copy_(source)

    return call


def implementations_for(
    kind: str, device: torch.device, compiled: bool = True
) -> dict[str, Callable[[Tensors], Call]]:
    """The implementations that are compared on tensors of one of SHAPES.

    Args:
        kind: of SHAPES.
        device: where the tensors lie.
        compiled: whether torch.compile takes part.
    Returns:
        By name, functions that prepare an implementation for tensors and return its step. They raise Missing where it
        cannot run.
    """
    if kind == "collapsing":
        lp_dist = partial(_lp_dist, weight_decay=None)
        return {
            COPY: _copy,
            PEER: partial(_torch, fused=True),
            "LpAdamW p = 0.8": partial(lp_dist, p=0.8),
            "LpAdamW p = -1, γ = 1": partial(lp_dist, p=-1, precondition=1.0),
            "LpAdamW foreach p = 0.8": partial(lp_dist, implementation="foreach", p=0.8),
        }
    by_name = {COPY: _copy, PEER: partial(_torch, fused=True), "torch AdamW foreach": partial(_torch, foreach=True)}
    if device.type == "cpu":
        by_name["DeepSpeedCPUAdam"] = _deepspeed
    by_name["eager: AdamW foreach, then plain torch, p = 0.8"] = partial(_eager, p=0.8)
    if kind == "flat" and compiled:
        by_name |= {f"torch.compile'd, p = {p}": partial(_compiled, p=p) for p in (0.5, 0.8)}
    by_name["LpAdamW foreach p = 0.8"] = partial(_lp_dist, implementation="foreach", p=0.8)
    by_name |= {f"LpAdamW p = {p}": partial(_lp_dist, p=p) for p in EXPONENTS}
    by_name |= {
        f"LpAdamW p = {p}, γ = {gamma:g}": partial(_lp_dist, p=p, precondition=gamma)
        for p in (0.5, 0.8)
        for gamma in (0.5, 1.0)
    }
    by_name |= {
        f"LpAdamW p = {p}, γ = 0.5, capped": partial(_lp_dist, p=p, precondition=0.5, capped=True) for p in (0.5, 0.8)
    }
    return by_name | {
        "LpAdamW p = 0.5, γ = 0.37": partial(_lp_dist, precondition=0.37),
        "LpAdamW frozen": partial(_lp_dist, cutoff=0.0),
        "LpAdamW dense": partial(_lp_dist, weight_decay=0.0),
        "LpAdamW p = 0.8, bf16 gradients": partial(_lp_dist, p=0.8, dtype=torch.bfloat16),
    }
