"""The fused step on a GPU, in Triton: one launch for all rows of a kind, one pass over memory. The mathematics is `step.cpp`'s.

A kernel is compiled for a kind of row: its base, its dtypes, and its form (how αλ/x is computed). What rows of a kind may differ in comes from
two small tables on the device, of addresses and of numbers, each sent when something in it has changed; a program finds its row by bisection.
Where the learning rate or the steps lie on the device, the numbers are computed there, and the host reads nothing: a CUDA graph can hold that.

Divisions are cheap beside the memory that is walked: the base's step is rounded as torch's fused one in every form. No denormal is flushed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lp_dist.decay import SNAP, lp_decay
from lp_dist.kernels import Unavailable, Work

_SIZE, _WARPS = 1024, 4     # 8 elements a thread: two vectors of 16 bytes of each fp32 tensor are under way at a time
_ALIGNED = 8                # elements that make at least 16 bytes of any dtype here: what a vector load needs
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

# Of a row's addresses: its first block, its elements [HEAD, END) from the addresses on, whether these are multiples of 16 bytes, the addresses.
FIRST, HEAD, END, ALIGNED, W, G, M, V, ADDRESSES = map(tl.constexpr, range(9))
# Of its numbers, the Plan of step.cpp:
(SIGN, LERP1, LERP2, BETA2, BC2, EPS, STEP, MOMENTUM, K, L_HI, L_LO, C, C_HI, C_LO, Y, Y_HI, Y_LO, FLOOR, AT_ZERO, BASE, SNAPPED,
 NUMBERS) = map(tl.constexpr, range(22))
# Forms: POWER is 2·(2−p) where that is whole and at most 7, or one of these; GAMMA is 2γ where that is whole and at most 4, or ODD.
NONE, FROZEN, ANY, ODD = map(tl.constexpr, (-1, -2, -3, -4))
# What the numbers are made of
_GIVEN = ("lr", "beta1", "beta2", "eps", "momentum", "sign", "weight_decay", "p", "l2", "gamma", "cutoff", "step")
_ON_THE_HOST = ("betas", "eps", "momentum", "nesterov", "maximize", "weight_decay", "p", "l2", "precondition", "cutoff")


def prepare() -> None:
    """Raises Unavailable where Triton can't compile for the GPU, or the kernel comes to other weights there than the equation does."""
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise Unavailable(f"triton needs compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}")
    try:
        _rehearse(torch.device("cuda"))
    except Exception as error:
        raise Unavailable(f"a small step by triton failed: {error}") from error


def _rehearse(device: torch.device) -> None:
    """One preconditioned step with a general p on `device`, against `decay.py` in double precision. Raises AssertionError."""
    values = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, p=0.8, l2=0.1, precondition=0.6, cutoff=math.inf, maximize=False)
    w, g = torch.linspace(-1, 1, 3001), torch.linspace(1, 2, 3001).sin()
    row = [t.to(device, copy=True) for t in (w, g, torch.zeros_like(w), torch.zeros_like(w))]
    step("adamw", [(values, [(*row, 1.0)])])
    w, g = w.double(), g.double()
    exact = lp_decay(w - values["lr"] * g / (g.abs() + values["eps"]), w, denom=g.abs() + values["eps"],
                     **{key: values[key] for key in ("lr", "weight_decay", "p", "l2", "precondition")})
    torch.testing.assert_close(row[0].cpu().double(), exact, rtol=1e-5, atol=1e-7)


@triton.jit(do_not_specialize=["count"])
def _step(rows, plans, count, OPTIMIZER: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, POWER: tl.constexpr, GAMMA: tl.constexpr,
          HAS_STATE: tl.constexpr, NESTEROV: tl.constexpr, SIZE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    low, high = block * 0, block * 0 + count - 1
    while low < high:   # the last row whose first block isn't beyond this one
        middle = (low + high + 1) // 2
        beyond = tl.load(rows + middle * ADDRESSES + FIRST) > block
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle - 1, high)
    row, plan = rows + low * ADDRESSES, plans + low * NUMBERS
    start = (block - tl.load(row + FIRST)) * SIZE   # int64: a tensor may have more than 2^31 elements
    whole = (tl.load(row + ALIGNED) != 0) & (start >= tl.load(row + HEAD)) & (start + SIZE <= tl.load(row + END))
    if whole:           # with a mask, or at an address of which nothing is known, there is no vector load
        _block(row, plan, start, OPTIMIZER, WEIGHT, GRADIENT, POWER, GAMMA, HAS_STATE, NESTEROV, SIZE, True)
    else:
        _block(row, plan, start, OPTIMIZER, WEIGHT, GRADIENT, POWER, GAMMA, HAS_STATE, NESTEROV, SIZE, False)


@triton.jit
def _block(row, plan, start, OPTIMIZER: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, POWER: tl.constexpr, GAMMA: tl.constexpr,
           HAS_STATE: tl.constexpr, NESTEROV: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    at = tl.arange(0, SIZE)
    inside = None if WHOLE else (start + at >= tl.load(row + HEAD)) & (start + at < tl.load(row + END))
    w, step = _load(row + W, WEIGHT, start, at, inside), tl.load(plan + STEP)
    g = tl.load(plan + SIGN) * _load(row + G, GRADIENT, start, at, inside)
    m = _load(row + M, WEIGHT, start, at, inside) if HAS_STATE else g
    if OPTIMIZER == "adamw":
        v = _load(row + V, WEIGHT, start, at, inside)
        m = tl.fma(tl.load(plan + LERP1), g - m, m)
        v = tl.fma(tl.load(plan + LERP2) * g, g, tl.load(plan + BETA2) * v)
        d = tl.div_rn(tl.sqrt_rn(v), tl.load(plan + BC2)) + tl.load(plan + EPS)
        u = w + tl.div_rn(step * m, d)
        _store(row + V, v, WEIGHT, start, at, inside)
    elif OPTIMIZER == "lion":
        c = tl.fma(tl.load(plan + LERP1), g - m, m)
        m = tl.fma(tl.load(plan + LERP2), g - m, m)
        u = w + tl.where(c > 0, step, tl.where(c < 0, -step, 0.0)) + 0.0 * m    # a nan shows: it has no sign
    else:
        m = tl.fma(tl.load(plan + MOMENTUM), m, g) if HAS_STATE else m
        u = tl.fma(step, tl.fma(tl.load(plan + MOMENTUM), m, g) if NESTEROV else m, w)
    if HAS_STATE:
        _store(row + M, m, WEIGHT, start, at, inside)

    divisor = tl.load(plan + BASE)
    if POWER >= 0 or POWER == ANY:
        divisor += _pull(tl.abs(w), d if OPTIMIZER == "adamw" else w, plan, POWER, GAMMA)
    u = tl.div_rn(u, divisor)
    if POWER != NONE:
        snapped = tl.load(plan + SNAPPED)       # −1, the magnitude of nothing, where nothing decays after all
        if POWER == FROZEN:
            u = tl.where(tl.abs(w) == tl.minimum(snapped, 0.0), u * 0.0, u)     # a nan stays one
        u = tl.where(tl.abs(u) <= snapped, 0.0, u)
    _store(row + W, u, WEIGHT, start, at, inside)


@triton.jit
def _pointers(address, TYPE: tl.constexpr, start, at, inside):
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    return (tl.multiple_of(pointer, 16) if inside is None else pointer) + start + at


@triton.jit
def _load(address, TYPE: tl.constexpr, start, at, inside):
    return tl.load(_pointers(address, TYPE, start, at, inside), mask=inside).to(tl.float32)


@triton.jit
def _store(address, values, TYPE: tl.constexpr, start, at, inside):
    tl.store(_pointers(address, TYPE, start, at, inside), values.to(TYPE), mask=inside)


@triton.jit
def _pull(a, d, plan, POWER: tl.constexpr, GAMMA: tl.constexpr):
    """αλ/x of weights of magnitude `a`; 0 beyond the cutoff."""
    if POWER == ANY:
        pull = _power_any(a, d, plan, GAMMA)
    else:               # nothing needs to be approximated: products of q = k/|w|, k = (αλ)^(1/(2−p))
        k = tl.load(plan + K)
        if POWER == 0:
            pull = tl.where(a >= 0, k, a)       # a nan shows
        elif POWER == 1:                        # here k is αλ: its square would leave the range
            pull = tl.div_rn(k, tl.sqrt_rn(a))
        else:
            q = tl.div_rn(k, a)
            pull = q * tl.sqrt_rn(q) if POWER % 2 == 1 else q
            for _ in tl.static_range(POWER // 2 - 1):
                pull *= q
        if GAMMA > 0:
            r = tl.div_rn(1.0, d)
            pull = tl.minimum(pull, LARGEST)    # inf·0 would be nan
            for _ in tl.static_range(GAMMA // 2):
                pull *= r
            pull = pull * tl.sqrt_rn(r) if GAMMA % 2 == 1 else pull
    pull = tl.where(pull < tl.load(plan + FLOOR), 0.0, pull)
    if POWER != 0:      # |w|^0 is 1 of a zero too
        pull = tl.where(a == tl.minimum(tl.load(plan + AT_ZERO), 0.0), tl.load(plan + AT_ZERO), pull)
    return pull


@triton.jit
def _power_any(a, d, plan, GAMMA: tl.constexpr):
    """αλ·|w|^(p−2)·D^(−γ) as a power of two. Its exponent is E + R, E in exact whole 1/512ths and R small, since it goes to hundreds."""
    E, Z = _log2(a)
    R, high = tl.load(plan + L_LO), tl.load(plan + L_HI)
    if GAMMA != 0:
        E2, Z2 = _log2(d)
        R = tl.fma(-tl.load(plan + Y_LO), E2, tl.fma(-tl.load(plan + Y), Z2, R))
        high = tl.fma(-tl.load(plan + Y_HI), E2, high)
    R = tl.fma(-tl.load(plan + C_LO), E, tl.fma(-tl.load(plan + C), Z, R))
    E = tl.fma(-tl.load(plan + C_HI), E, high)
    shifted = E + R + 12582912.0    # 1.5·2^23: now the last bits are n of E + R = n + r, n whole and |r| <= 1/2
    n = tl.minimum(tl.maximum(shifted.to(tl.int32, bitcast=True) - 0x4B400000, -126), 127)
    r = (E - (shifted - 12582912.0)) + R
    r2 = r * r                      # 2^r, relative error < 1e-7 before rounding
    p01, p23 = tl.fma(r, 0.6931470036506653, 1.0), tl.fma(r, 0.05550733581185341, 0.24022242426872253)
    p45 = tl.fma(r, 0.001326472731307149, 0.009671512991189957)
    return (tl.fma(tl.fma(p45, r2, p23), r2, p01).to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _log2(x):
    """log2 of magnitudes as E + log2(1 + Z), E whole and 1 + Z in [√½, √2). Of 0 something finite."""
    bits = x.to(tl.int32, bitcast=True)
    raised = bits.to(tl.float32).to(tl.int32, bitcast=True) - 149 * 8388608     # a denormal is a whole number of 2^-149
    bits = tl.where(bits < 8388608, raised, bits)
    off = bits - 0x3F3504F3
    z = (bits - ((off >> 23) << 23)).to(tl.float32, bitcast=True) - 1.0
    z2 = z * z      # |error| < 5e-8 before rounding (minimax of degree 8)
    q01, q23 = tl.fma(z, -0.7213571667671204, 1.4426947832107544), tl.fma(z, -0.36008721590042114, 0.48093944787979126)
    q45, q67 = tl.fma(z, -0.2500690519809723, 0.28670743107795715), tl.fma(z, -0.14574451744556427, 0.23689046502113342)
    return (off >> 23).to(tl.float32), z * tl.fma(tl.fma(q67, z2, q45), z2 * z2, tl.fma(q23, z2, q01))


class _Table:
    """A small table on the device, sent anew only when what it is made of has changed."""

    content: list | None = None
    tensor: Tensor | None = None
    spare: Tensor | None = None     # pinned, for the capture of a graph, when none can be made

    def of(self, content: list, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `make` makes of `content`. A graph that is captured sends it each time it runs, so what it reads is kept for good."""
        capturing = _is_capturing(device)
        tensor, pinned = self.tensor, None
        if content != self.content:
            pinned = make()
            if capturing and self.spare is not None and self.spare.shape == pinned.shape:
                pinned, self.spare = self.spare.copy_(pinned), None
            elif device.type == "cuda":     # else it is Triton's interpreter
                pinned = pinned.pin_memory()
            tensor = pinned.to(device, non_blocking=True)
        if capturing:   # nothing new is in the table yet
            _captured.append((tensor, pinned))
        elif pinned is not None:
            self.content, self.tensor = content, tensor
            self.spare = torch.empty_like(pinned, pin_memory=device.type == "cuda")
        return tensor


_tables: dict[tuple, tuple[_Table, _Table]] = {}    # addresses and numbers of the last rows of each kind
_captured: list[Any] = []


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def step(base: str, work: Work) -> None:
    """See `lp_dist.kernels.step`. Here a step count may be a one-element tensor on the device, as torch's `capturable` optimizers have it.
    ValueError: a value other than the learning rate is one. RuntimeError: a graph that is being captured would repeat one step count forever.
    """
    kinds: dict[tuple, list[tuple]] = {}
    for values, rows in work:
        form, lr = _form(base, values), values["lr"]
        own = tuple(map(float, (
            *values.get("betas", (0, 0)), values.get("eps", 0), values.get("momentum", 0), -1 if values["maximize"] else 1,
            values["weight_decay"], values["p"], values["l2"], values.get("precondition", 0), values["cutoff"])))
        for row in rows:
            weights, grads, *states, t = row
            if weights.numel():
                there = [isinstance(value, Tensor) and value.device == weights.device for value in (lr, t if base == "adamw" else 0)]
                kind = (base, weights.device, weights.dtype, grads.dtype, *form, bool(states), bool(values.get("nesterov")), *there)
                kinds.setdefault(kind, []).append((lr, own, row))
    for kind, members in kinds.items():
        with torch.cuda.device(kind[1]) if kind[1].type == "cuda" else nullcontext():   # a CPU's are for Triton's interpreter
            _launch(kind, members)


def _form(base: str, values: Mapping[str, Any]) -> tuple[int, int]:
    """POWER and GAMMA. The learning rate is not looked at: should it be 0, the numbers say so."""
    for key in _ON_THE_HOST:
        value = values.get(key)
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor) and part.device.type != "cpu":
                raise ValueError(f"{key} is a tensor on {part.device}, and the host would have to wait for it; pass a number. Only lr may lie there")
    halves, gamma = 2 * (2 - float(values["p"])), 2 * float(values.get("precondition", 0)) * (base == "adamw")
    if not (values["weight_decay"] > 0 and values["cutoff"] > 0):   # frozen at p >= 2 nothing is: SNAPPED is −1
        return (FROZEN if values["weight_decay"] > 0 and values["cutoff"] == 0 else NONE).value, 0
    return (int(halves), int(gamma)) if halves in range(8) and gamma in range(5) else (ANY.value, ODD.value if gamma else 0)


def _launch(kind: tuple, members: list[tuple]) -> None:
    base, device, weight, gradient, power, gamma, has_state, nesterov, lr_there, step_there = kind
    if base == "adamw" and not step_there and _is_capturing(device):
        raise RuntimeError("a CUDA graph would repeat this step's count forever; make the step counts tensors on the device (capturable)")
    addresses, numbers = _tables.setdefault(kind, (_Table(), _Table()))
    blocks = [(row[0].numel() + _ALIGNED - 1 + _SIZE - 1) // _SIZE for *_, row in members]  # wherever a row starts
    places = [(n, row[0].numel(), *(t.data_ptr() for t in row[:-1])) for n, (*_, row) in zip(blocks, members)]
    given = [(0.0 if lr_there else float(lr), *own, 0.0 if step_there or base != "adamw" else float(row[-1])) for lr, own, row in members]
    rows = addresses.of(places, lambda: _addresses(places, [t.element_size() for t in members[0][-1][:-1]]), device)
    if lr_there or step_there:
        plans = _plans(base, numbers.of(given, lambda: torch.tensor(given, dtype=torch.float64), device),
                       lr=torch.stack([lr.reshape(()) for lr, *_ in members]) if lr_there else None,
                       step=torch.stack([row[-1].reshape(()) for *_, row in members]) if step_there else None)
    else:
        plans = numbers.of(given, lambda: _plans(base, torch.tensor(given, dtype=torch.float64)), device)
    _step[(sum(blocks),)](
        rows, plans, len(members), base, _TYPES[weight], _TYPES[gradient], power, gamma, has_state, nesterov, _SIZE,
        num_warps=_WARPS, enable_fp_fusion=False)


def _addresses(places: list[tuple[int, ...]], sizes: list[int]) -> Tensor:
    """FIRST, HEAD, ... of each place: numbers of blocks and of elements, and addresses of tensors with elements of `sizes` bytes."""
    table, first = [], 0
    for blocks, numel, *addresses in places:
        # A run in a shard may start anywhere. If all its tensors do so alike, the walk starts before them, where vectors do.
        heads = {address // size % _ALIGNED for address, size in zip(addresses, sizes)}
        head = min(heads) if len(heads) == 1 else 0
        starts = [address - head * size for address, size in zip(addresses, sizes)] + [0] * (4 - len(sizes))
        table.append([first, head, head + numel, len(heads) == 1, *starts])
        first += blocks
    return torch.tensor(table, dtype=torch.int64)


def _plans(base: str, given: Tensor, lr: Tensor | None = None, step: Tensor | None = None) -> Tensor:
    """`plan_of` of step.cpp for many rows, on the host or on the device. `lr`, `step`: instead of those among `given` (rows × _GIVEN)."""
    a = dict(zip(_GIVEN, given.unbind(1)))
    lr = a["lr"] if lr is None else lr.double()
    step = a["step"] if step is None else step.double()
    strength, exponent, zeros = lr * a["weight_decay"], 2 - a["p"], torch.zeros_like(lr)
    active = (strength > 0) & (a["cutoff"] >= 0)    # else αλ/x is to be 0 in every form: no number reaches an infinite floor
    kept = strength.clamp(torch.finfo(torch.float32).tiny, LARGEST.value)
    # x = high + low, with high a multiple of 2^-9, so that its products with whole numbers are exact
    (l_hi, l_lo), (c_hi, c_lo), (y_hi, y_lo) = ((high := (x * 512).round() / 512, x - high) for x in (kept.log2(), exponent, a["gamma"]))
    at_zero = zeros.masked_fill(exponent > 0, math.inf).masked_fill(exponent == 0, -1)      # −1: as of any other weight
    return torch.stack([    # in the order of the columns
        a["sign"], 1 - a["beta1"], 1 - a["beta2"], a["beta2"], (1 - a["beta2"] ** step).sqrt(), a["eps"],
        -lr / (1 - a["beta1"] ** step) if base == "adamw" else -lr, a["momentum"],
        (kept ** (1 / exponent.clamp(min=1))).masked_fill(~active, 0), l_hi, l_lo, exponent, c_hi, c_lo, a["gamma"], y_hi, y_lo,
        (kept / a["cutoff"]).masked_fill(~active, math.inf), at_zero, (1 + lr * a["l2"]).clamp(1, LARGEST.value),
        (zeros - 1).masked_fill(active & (exponent > 0), SNAP)], dim=1).float()
