"""What the tests of the GPU's fused step share: its module, rows, and an oracle in float64 that is written from the
equations alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from helpers.optimizers import step_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPONENTS = (-4.0, -1.0, -0.3, 0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 4.0)
GAMMAS = (0.0, 0.37, 0.5, 1.0, 1.5, 2.0)
STATES = {"adamw": 2, "lion": 1, "sgd": 0, "momentum": 1, "nesterov": 1}
BASES = tuple(STATES)
SNAP = 1e-13


def values(base: str = "adamw", **changed: Any) -> dict[str, Any]:
    """A group of hyperparameters. "momentum" and "nesterov" are SGD with it."""
    base_values = {
        "adamw": {"betas": (0.9, 0.99), "eps": 1e-6, "precondition": 0.0},
        "lion": {"betas": (0.9, 0.99)},
        "sgd": {"momentum": 0.0},
        "momentum": {"momentum": 0.9, "nesterov": False},
        "nesterov": {"momentum": 0.9, "nesterov": True},
    }[base]
    return {
        "lr": 0.02,
        "weight_decay": 0.1,
        "p": 0.5,
        "l2": 0.0,
        "cutoff": math.inf,
        "regrowth_below": 0.0,
        "maximize": False,
        **base_values,
        **changed,
    }


def row(
    base: str,
    n: int,
    seed: int = 0,
    step: Any = 3.0,
    dtype: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
) -> tuple:
    """Weights over many magnitudes with zeros among them, gradients, a state that fits them."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(n, generator=generator)

    w = draw() * 10 ** (torch.rand(n, generator=generator) * 6 - 5)
    w[::97] = 0
    g, m = draw() * 0.1, draw() * 0.1
    states = (m, m * m + draw() ** 2 * 1e-3)[: STATES[base]]
    return (w.to(DEVICE, dtype), g.to(DEVICE, grad or dtype), *(t.to(DEVICE, dtype) for t in states), step)


def copy(of: tuple) -> tuple:
    return (*(t.clone() for t in of[:-1]), of[-1])


def run(gpu, base: str, a: dict[str, Any], *rows: tuple) -> None:
    gpu.step(base if base in ("adamw", "lion") else "sgd", [(a, [step_row(row) for row in rows])])


def oracle(base: str, a: dict[str, Any], of: tuple) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The new weights and state of a row, and the magnitude beside which an error of a weight is small; nan where x is
    at the cutoff.
    """
    w, g, *states = (t.detach().cpu().double() for t in of[:-1])
    t, lr, beta1, beta2 = float(of[-1]), float(a["lr"]), *a.get("betas", (0.0, 0.0))
    g = -g if a["maximize"] else g
    denom = torch.ones_like(w)
    if base == "adamw":
        m = beta1 * states[0] + (1 - beta1) * g
        v = beta2 * states[1] + (1 - beta2) * g * g
        denom = torch.sqrt(v / (1 - beta2**t)) + a["eps"]
        magnitude = lr * (beta1 * states[0].abs() + (1 - beta1) * g.abs()) / (1 - beta1**t) / denom
        move, states = lr * m / (1 - beta1**t) / denom, [m, v]
    elif base == "lion":
        move, states = lr * torch.sign(beta1 * states[0] + (1 - beta1) * g), [beta2 * states[0] + (1 - beta2) * g]
        magnitude = move.abs()
    elif base == "sgd":
        move = lr * g
        magnitude = move.abs()
    else:
        buffer = a["momentum"] * states[0] + g
        magnitude = lr * (a["momentum"] * states[0].abs() + g.abs()) * (1 + a["momentum"])
        move, states = lr * (g + a["momentum"] * buffer if base == "nesterov" else buffer), [buffer]
    is_latent = (w == 0) & a.get("latent", False)
    if a.get("latent"):  # where w = 0 the latent weight is in exp_avg, and steps without momentum
        w = torch.where(is_latent, of[2].cpu().double(), w)
        move, magnitude = (
            torch.where(is_latent, lr * g / denom, move),
            torch.where(is_latent, lr * g.abs() / denom, magnitude),
        )
    x = w.abs() ** (2 - a["p"]) * denom ** a.get("precondition", 0.0)
    if a.get("pattern"):  # of each block the n largest x, of equal ones the earlier
        n, m = map(int, a["pattern"].split(":"))
        places = x.view(-1, m).sort(descending=True, stable=True).indices[:, :n]
        x = x.view(-1, m).scatter(1, places, math.inf).view(-1)
    pull = torch.where(
        x > a["cutoff"], 0.0, lr * a["weight_decay"] / x.clamp(min=a["regrowth_below"] if a["cutoff"] > 0 else 0.0)
    )
    divisor = 1 + lr * a["l2"] + (pull if a["weight_decay"] > 0 and lr > 0 else 0.0)
    new = (w - move) / divisor
    if lr * a["weight_decay"] > 0 and a["cutoff"] >= 0 and a["p"] < 2:
        new = torch.where(new.abs() <= SNAP, 0.0, new)
    scale = (w.abs() + magnitude) / divisor  # the parts of a move may cancel each other
    if a.get("latent"):
        x_new = new.abs() ** (2 - a["p"]) * denom ** a.get("precondition", 0.0)
        under = x_new <= a["cutoff"]
        scale = torch.where(
            (x_new / a["cutoff"] - 1).abs() < 1e-4, math.nan, scale
        )  # of a sum that cancels, x is less sure
        states[0] = torch.where(under, new, torch.where(is_latent, 0.0, states[0]))
        new = torch.where(under, 0.0, new)
    return [new, *states], torch.where((x / a["cutoff"] - 1).abs() < 1e-5, math.nan, scale)


def assert_right(base: str, a: dict[str, Any], before: tuple, after: tuple, bound: float = 2e-6) -> None:
    """`after` is what the oracle makes of `before`, within `bound` of what each value is made of."""
    (new, *states), scale = oracle(base, a, before)
    sure = ~scale.isnan()
    assert sure.float().mean() > 0.9
    got, _, *got_states = (t.detach().cpu().double() for t in after[:-1])
    error = ((got - new).abs() / scale.clamp(min=1e-12))[sure]
    assert error.max() <= bound, (float(error.max()), before[0][sure.to(DEVICE)][error.argmax()])
    if scale.nan_to_num(1).min() > 0:
        assert torch.equal((got == 0)[sure], (new == 0)[sure])
    for got_state, state in zip(got_states, states, strict=True):
        assert ((got_state - state).abs() <= bound * (state.abs() + 0.1)).all()


class Launches:
    """Stands in for the kernel, and counts."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


# For a process without the interpreter: each base and dtype, each way to compute αλ/x
COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from lp_dist.optim.kernels import triton as gpu

signature = dict(rows="*i64", plans="*fp32", count="i32")
names = ("OPTIMIZER", "WEIGHT", "GRADIENT", "POWER", "GAMMA", "LATENT", "KEPT", "OF", "HAS_STATE", "NESTEROV",
         "SIZE")
for values in [("adamw", tl.float32, tl.bfloat16, 3, 0, False, 0, 0, True, False, 1024),
               ("adamw", tl.float32, tl.bfloat16, 3, 2, True, 0, 0, True, False, 1024),
               ("adamw", tl.bfloat16, tl.bfloat16, -3, -4, False, 0, 0, True, False, 1024),
               ("adamw", tl.float32, tl.bfloat16, 3, 2, False, 4, 8, True, False, 1024),
               ("sgd", tl.float32, tl.float16, -1, 0, False, 0, 0, False, False, 1024),
               ("lion", tl.float32, tl.float32, -2, 0, False, 0, 0, True, False, 1024)]:
    signatures = {**signature, **dict.fromkeys(names, "constexpr")}
    source = triton.compiler.ASTSource(gpu.lp_step, signatures, dict(zip(names, values)))
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)):
        asm = triton.compile(source, target=target, options=dict(num_warps=gpu._WARPS, enable_fp_fusion=False)).asm
        assert len(asm["cubin" if target.backend == "cuda" else "hsaco"]) > 1000
        if target.backend == "cuda":
            ptx = asm["ptx"]
            tensors = {"adamw": 4, "sgd": 2, "lion": 3}[values[0]]
            assert ptx.count("ld.global.v4.b32") >= tensors and ptx.count("st.global.v4.b32") >= tensors - 1, values
            assert ".ftz" not in ptx and "div.full" not in ptx and "sqrt.approx" not in ptx
"""
