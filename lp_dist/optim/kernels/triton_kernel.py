"""The kernel of the fused step on a GPU, in Triton: one pass over memory. The mathematics is `step.cpp`'s; `triton.py`
launches it.

A program finds its row by bisection of a table of addresses. Divisions are cheap beside the memory that is walked: the
base's step is rounded as torch's fused one in every form. No denormal is flushed.
"""

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

# Of a row's addresses: its first block, its elements [HEAD, END) from the addresses on, whether these are multiples of
# 16 bytes, the addresses.
FIRST, HEAD, END, ALIGNED, W, G, M, V, ADDRESSES = map(tl.constexpr, range(9))
# Of its numbers, the Plan of step.cpp:
(
    SIGN,
    LERP1,
    LERP2,
    BETA2,
    BC2,
    EPS,
    STEP,
    PLAIN,
    MOMENTUM,
    K,
    L_HI,
    L_LO,
    C,
    C_HI,
    C_LO,
    Y,
    Y_HI,
    Y_LO,
    LEAST,
    MOST,
    AT_ZERO,
    BASE,
    SNAPPED,
    NUMBERS,
) = map(tl.constexpr, range(24))
# Forms: POWER is 2·(2−p) where that is whole and at most 7, or one of these; GAMMA is 2γ where that is whole and at
# most 4, or OTHER_GAMMA. KEPT of each OF weights have no pull, and if it is negative what they are ranked by goes into
# W instead of a step; OF = 0: there are no blocks.
NONE, FROZEN, ANY, OTHER_GAMMA = map(tl.constexpr, (-1, -2, -3, -4))
_PLUS = tl.standard._sum_combine  # tl.sum's own: Triton's interpreter knows it, and is quick


@triton.jit(do_not_specialize=["count"])
def lp_step(
    rows,
    plans,
    count,
    OPTIMIZER: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,
    GAMMA: tl.constexpr,
    LATENT: tl.constexpr,
    KEPT: tl.constexpr,
    OF: tl.constexpr,
    HAS_STATE: tl.constexpr,
    NESTEROV: tl.constexpr,
    SIZE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    low, high = block * 0, block * 0 + count - 1
    while low < high:  # the last row whose first block isn't beyond this one
        middle = (low + high + 1) // 2
        beyond = tl.load(rows + middle * ADDRESSES + FIRST) > block
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle - 1, high)
    row, plan = rows + low * ADDRESSES, plans + low * NUMBERS
    start = (block - tl.load(row + FIRST)) * SIZE  # int64: a tensor may have more than 2^31 elements
    is_aligned = (tl.load(row + ALIGNED) != 0) & (start >= tl.load(row + HEAD)) & (start + SIZE <= tl.load(row + END))
    if is_aligned:  # with a mask, or at an address of which nothing is known, there is no vector load
        _block(
            row,
            plan,
            start,
            OPTIMIZER,
            WEIGHT,
            GRADIENT,
            POWER,
            GAMMA,
            LATENT,
            KEPT,
            OF,
            HAS_STATE,
            NESTEROV,
            SIZE,
            True,
        )
    else:
        _block(
            row,
            plan,
            start,
            OPTIMIZER,
            WEIGHT,
            GRADIENT,
            POWER,
            GAMMA,
            LATENT,
            KEPT,
            OF,
            HAS_STATE,
            NESTEROV,
            SIZE,
            False,
        )


@triton.jit
def _block(
    row,
    plan,
    start,
    OPTIMIZER: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,
    GAMMA: tl.constexpr,
    LATENT: tl.constexpr,
    KEPT: tl.constexpr,
    OF: tl.constexpr,
    HAS_STATE: tl.constexpr,
    NESTEROV: tl.constexpr,
    SIZE: tl.constexpr,
    UNMASKED: tl.constexpr,
):
    at = tl.arange(0, SIZE)
    inside = None if UNMASKED else (start + at >= tl.load(row + HEAD)) & (start + at < tl.load(row + END))
    w, step = _load(row + W, WEIGHT, start, at, inside), tl.load(plan + STEP)
    g = tl.load(plan + SIGN) * _load(row + G, GRADIENT, start, at, inside)
    m = _load(row + M, WEIGHT, start, at, inside) if HAS_STATE else g
    if OPTIMIZER == "adamw":
        v = _load(row + V, WEIGHT, start, at, inside)
        was_latent = w == 0
        w = tl.where(was_latent, m, w) if LATENT else w  # where w = 0 the latent weight is in m, and has no momentum
        m = tl.fma(tl.load(plan + LERP1), g - m, m)
        v = tl.fma(tl.load(plan + LERP2) * g, g, tl.load(plan + BETA2) * v)
        d = tl.div_rn(tl.sqrt_rn(v), tl.load(plan + BC2)) + tl.load(plan + EPS)
        move = tl.where(was_latent, tl.load(plan + PLAIN) * g, step * m) if LATENT else step * m
        u = w + tl.div_rn(move, d)
        _store(row + V, v, WEIGHT, start, at, inside)
    elif OPTIMIZER == "lion":
        c = tl.fma(tl.load(plan + LERP1), g - m, m)
        m = tl.fma(tl.load(plan + LERP2), g - m, m)
        u = w + tl.where(c > 0, step, tl.where(c < 0, -step, 0.0)) + 0.0 * m  # a nan shows: it has no sign
    else:
        m = tl.fma(tl.load(plan + MOMENTUM), m, g) if HAS_STATE else m
        u = tl.fma(step, tl.fma(tl.load(plan + MOMENTUM), m, g) if NESTEROV else m, w)
    if HAS_STATE and not LATENT:
        _store(row + M, m, WEIGHT, start, at, inside)

    divisor = tl.load(plan + BASE)
    if POWER >= 0 or POWER == ANY:
        pull = _pull(tl.abs(w), d if OPTIMIZER == "adamw" else w, plan, POWER, GAMMA)
        if OF > 0 and KEPT >= 0:
            pull = _keep_smallest(pull, KEPT, OF, SIZE)
        divisor += tl.minimum(pull, tl.load(plan + MOST))
    u = tl.div_rn(u, divisor)
    if POWER != NONE:
        snapped = tl.load(plan + SNAPPED)  # −1, the magnitude of nothing, where nothing decays after all
        if POWER == FROZEN:
            u = tl.where(tl.abs(w) == tl.minimum(snapped, 0.0), u * 0.0, u)  # a nan stays one
        u = tl.where(tl.abs(u) <= snapped, 0.0, u)
    if LATENT:  # what is not beyond the cap after the step is zero, and itself in m; a nan shows
        under = _pull(tl.abs(u), d, plan, POWER, GAMMA) > 0
        _store(row + M, tl.where(under, u, tl.where(was_latent, 0.0, m)), WEIGHT, start, at, inside)
        u = tl.where(under, u * 0.0 + 0.0, u)
    if KEPT < 0:
        u = pull
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
    """αλ/x of weights of magnitude `a`; 0 beyond the cutoff. MOST, its value at `regrowth_below`, is not looked at."""
    if POWER == ANY:
        pull = _power_any(a, d, plan, GAMMA)
    else:  # nothing needs to be approximated: products of q = k/|w|, k = (αλ)^(1/(2−p))
        k = tl.load(plan + K)
        if POWER == 0:
            pull = tl.where(a >= 0, k, a)  # a nan shows
        elif POWER == 1:  # here k is αλ: its square would leave the range
            pull = tl.div_rn(k, tl.sqrt_rn(a))
        else:
            q = tl.div_rn(k, a)
            pull = q * tl.sqrt_rn(q) if POWER % 2 == 1 else q
            for _ in tl.static_range(POWER // 2 - 1):
                pull *= q
        if GAMMA > 0:
            r = tl.div_rn(1.0, d)
            pull = tl.minimum(pull, LARGEST)  # inf·0 would be nan
            for _ in tl.static_range(GAMMA // 2):
                pull *= r
            pull = pull * tl.sqrt_rn(r) if GAMMA % 2 == 1 else pull
    pull = tl.where(pull < tl.load(plan + LEAST), 0.0, pull)
    if POWER != 0:  # |w|^0 is 1 of a zero too
        pull = tl.where(a == tl.minimum(tl.load(plan + AT_ZERO), 0.0), tl.load(plan + AT_ZERO), pull)
    return pull


@triton.jit
def _keep_smallest(pull, KEPT: tl.constexpr, OF: tl.constexpr, SIZE: tl.constexpr):
    """0 for the KEPT smallest of each block of OF; of equal ones the earlier."""
    if OF == 1:
        return tl.full([SIZE], 0.0, tl.float32)
    blocks, place = tl.reshape(pull, [SIZE // OF, OF]), tl.arange(0, OF)
    entry, other = tl.expand_dims(blocks, 2), tl.expand_dims(blocks, 1)
    earlier = tl.expand_dims(tl.expand_dims(place, 0), 0) < tl.expand_dims(tl.expand_dims(place, 0), 2)
    ahead = tl.reduce(((other < entry) | ((other == entry) & earlier)).to(tl.int32), 2, _PLUS)
    return tl.reshape(tl.where(ahead < KEPT, 0.0, blocks), [SIZE])


@triton.jit
def _power_any(a, d, plan, GAMMA: tl.constexpr):
    """αλ·|w|^(p−2)·D^(−γ) as a power of two. Its exponent is E + R, E in exact whole 1/512ths and R small, since it
    goes to hundreds.
    """
    E, Z = _log2(a)
    R, high = tl.load(plan + L_LO), tl.load(plan + L_HI)
    if GAMMA != 0:
        E2, Z2 = _log2(d)
        R = tl.fma(-tl.load(plan + Y_LO), E2, tl.fma(-tl.load(plan + Y), Z2, R))
        high = tl.fma(-tl.load(plan + Y_HI), E2, high)
    R = tl.fma(-tl.load(plan + C_LO), E, tl.fma(-tl.load(plan + C), Z, R))
    E = tl.fma(-tl.load(plan + C_HI), E, high)
    shifted = E + R + 12582912.0  # 1.5·2^23: now the last bits are n of E + R = n + r, n whole and |r| <= 1/2
    n = tl.minimum(tl.maximum(shifted.to(tl.int32, bitcast=True) - 0x4B400000, -126), 127)
    r = (E - (shifted - 12582912.0)) + R
    r2 = r * r  # 2^r, relative error < 1e-7 before rounding
    p01, p23 = tl.fma(r, 0.6931470036506653, 1.0), tl.fma(r, 0.05550733581185341, 0.24022242426872253)
    p45 = tl.fma(r, 0.001326472731307149, 0.009671512991189957)
    return (tl.fma(tl.fma(p45, r2, p23), r2, p01).to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _log2(x):
    """log2 of magnitudes as E + log2(1 + Z), E whole and 1 + Z in [√½, √2). Of 0 something finite."""
    bits = x.to(tl.int32, bitcast=True)
    raised = bits.to(tl.float32).to(tl.int32, bitcast=True) - 149 * 8388608  # a denormal is a whole number of 2^-149
    bits = tl.where(bits < 8388608, raised, bits)
    off = bits - 0x3F3504F3
    z = (bits - ((off >> 23) << 23)).to(tl.float32, bitcast=True) - 1.0
    z2 = z * z  # |error| < 5e-8 before rounding (minimax of degree 8)
    q01, q23 = tl.fma(z, -0.7213571667671204, 1.4426947832107544), tl.fma(z, -0.36008721590042114, 0.48093944787979126)
    q45, q67 = (
        tl.fma(z, -0.2500690519809723, 0.28670743107795715),
        tl.fma(z, -0.14574451744556427, 0.23689046502113342),
    )
    return (off >> 23).to(tl.float32), z * tl.fma(tl.fma(q67, z2, q45), z2 * z2, tl.fma(q23, z2, q01))
