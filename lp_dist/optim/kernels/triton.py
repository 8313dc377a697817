"""The fused step on a GPU: what `triton_kernel` needs, and one launch of it for all rows of a kind.

A kernel is compiled for a kind of row: its base, its dtypes, and its form (how αλ/x is computed). What rows of a kind
may differ in comes from two small tables on the device, of addresses and of numbers, each sent when something in it
has changed. Where the learning rate or the steps lie on the device, the numbers are computed there, and the host reads
nothing: a CUDA graph can hold that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lp_dist.optim.acting import once
from lp_dist.optim.batching import StepRow
from lp_dist.optim.decay import SNAP, lp_decay
from lp_dist.optim.kernels.dispatch import Unavailable, ValuedRows
from lp_dist.optim.kernels.triton_kernel import ANY, FROZEN, LARGEST, NONE, OTHER_GAMMA, lp_step
from lp_dist.optim.nm import parse_pattern

_SIZE, _WARPS = 1024, 4  # 8 elements a thread: two vectors of 16 bytes of each fp32 tensor are under way at a time
_LEAST_PULL = 1e-12
_ALIGNED = 8  # elements that make at least 16 bytes of any dtype here: what a vector load needs
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# What the numbers are made of
_GIVEN = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "momentum",
    "sign",
    "weight_decay",
    "p",
    "l2",
    "gamma",
    "cutoff",
    "regrowth_below",
    "latent",
    "step",
)
_PLAIN = frozenset({float, int, bool, type(None)})
_ON_THE_HOST = (
    "betas",
    "eps",
    "momentum",
    "nesterov",
    "maximize",
    "weight_decay",
    "p",
    "l2",
    "precondition",
    "cutoff",
    "regrowth_below",
    "latent",
)


def prepare() -> None:
    """Raises Unavailable where Triton can't compile for the GPU, or the kernel comes to other weights there than the
    equation does.
    """
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise Unavailable(
            f"triton needs compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}"
        )
    try:
        rehearse(torch.device("cuda"))
    except Exception as error:
        raise Unavailable(f"a small step by triton failed: {error}") from error


def rehearse(device: torch.device) -> None:
    """Two preconditioned steps with a general p on `device`, without and with latent weights, against `decay.py` in
    double precision. Raises AssertionError.
    """
    values: dict[str, Any] = dict(
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        p=0.8,
        l2=0.1,
        precondition=0.6,
        cutoff=math.inf,
        maximize=False,
    )
    before, g = torch.linspace(-1, 1, 3001, dtype=torch.float64), torch.linspace(1, 2, 3001, dtype=torch.float64).sin()
    was_latent = torch.arange(3001) % 3 == 0
    denom = g.abs() + values["eps"]  # in a first step Adam's direction is that without momentum
    for latent, cutoff in ((False, math.inf), (True, 0.3)):
        values |= {"latent": latent, "cutoff": cutoff}
        w, m = (
            (before.masked_fill(was_latent, 0.0), before.masked_fill(~was_latent, 0.0))
            if latent
            else (before, torch.zeros_like(before))
        )
        weights, grads, *states = (t.float().to(device) for t in (w, g, m, torch.zeros_like(w)))
        step("adamw", [(values, [StepRow(weights, grads, tuple(states), 1.0)])])
        exact = lp_decay(
            before - values["lr"] * g / denom,
            before,
            denom=denom,
            **{key: values[key] for key in ("lr", "weight_decay", "p", "l2", "precondition", "cutoff")},
        )
        x = exact.abs() ** (2 - values["p"]) * denom ** values["precondition"]
        above = x > cutoff if latent else x >= 0
        exp_avg = torch.where(above, torch.where(was_latent & latent, 0.0, 0.1 * g), exact)
        not_rounding = (x / cutoff - 1).abs() > 1e-4  # elsewhere rounding decides which side of the cutoff it is
        for got, want in ((weights, torch.where(above, exact, 0.0)), (states[0], exp_avg)):
            torch.testing.assert_close(got.cpu().double()[not_rounding], want[not_rounding], rtol=1e-5, atol=1e-7)


class _Table:
    """A small table on the device, sent anew only when what it is made of has changed."""

    content: list | None = None
    tensor: Tensor | None = None
    pinned_spare: Tensor | None = None  # pinned, for the capture of a graph, when none can be made

    def of(self, content: list, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `make` makes of `content`. A graph that is captured sends it each time it runs, so what it reads is
        kept for good.
        """
        capturing = is_capturing(device)
        tensor, pinned = self.tensor, None
        if content != self.content:
            pinned = make()
            if capturing and self.pinned_spare is not None and self.pinned_spare.shape == pinned.shape:
                pinned, self.pinned_spare = self.pinned_spare.copy_(pinned), None
            elif device.type == "cuda":  # else it is Triton's interpreter
                pinned = pinned.pin_memory()
            tensor = pinned.to(device, non_blocking=True)
        if capturing:  # nothing new is in the table yet
            captured_tables.append((tensor, pinned))
        elif pinned is not None:
            self.content, self.tensor = content, tensor
            self.pinned_spare = torch.empty_like(pinned, pin_memory=device.type == "cuda")
        assert tensor is not None
        return tensor


tables: dict[tuple, tuple[_Table, _Table]] = {}  # addresses and numbers of the last rows of each kind
captured_tables: list[Any] = []  # (on the device, pinned) that captured graphs read


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the current stream of `device`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def step(base: str, valued_rows: ValuedRows) -> None:
    """See `dispatch.step`. Here a step count may be a one-element tensor on the device, as torch's `capturable`
    optimizers have it. ValueError: a value other than the learning rate is one. RuntimeError: a graph that is being
    captured would repeat one step count forever.
    """
    kinds: dict[tuple, list[tuple]] = {}
    for values, rows in valued_rows:
        lr, nesterov = values["lr"], bool(values.get("nesterov"))
        form, numbers = once(values, "triton", partial(_form_and_numbers, base))
        # By what rows with the same values can still differ in. They may be many, so this is quick.
        alike: dict[tuple, list[tuple]] = {}
        for row in rows:
            weights, grads, states, count, _ = row
            if row.numel:
                count_device = type(count) is Tensor and count.device
                key = weights.device, weights.dtype, grads.dtype, bool(states), count_device
                alike.setdefault(key, []).append((lr, numbers, row))
        for (device, weight, gradient, has_state, step_at), members in alike.items():
            there = isinstance(lr, Tensor) and lr.device == device, base == "adamw" and step_at == device
            kinds.setdefault((base, device, weight, gradient, *form, has_state, nesterov, *there), []).extend(members)
    for kind, members in kinds.items():
        # Tensors on a CPU are for Triton's interpreter.
        with torch.cuda.device(kind[1]) if kind[1].type == "cuda" else nullcontext():
            _launch(kind, members)


def _form_and_numbers(
    base: str, values: Mapping[str, Any]
) -> tuple[tuple[int, int, bool, int, int], tuple[float, ...]]:
    """`_form`, and of _GIVEN what values have but for the learning rate."""
    numbers = (
        *values.get("betas", (0, 0)),
        values.get("eps", 0),
        values.get("momentum", 0),
        -1 if values["maximize"] else 1,
        values["weight_decay"],
        values["p"],
        values["l2"],
        values.get("precondition", 0),
        values["cutoff"],
        values.get("regrowth_below", 0),
        values.get("latent", False),
    )
    return _form(base, values), tuple(map(float, numbers))


def _form(base: str, values: Mapping[str, Any]) -> tuple[int, int, bool, int, int]:
    """POWER, GAMMA, LATENT, KEPT and OF. The learning rate is not looked at: should it be 0, the numbers say so."""
    for key in _ON_THE_HOST:
        value = values.get(key)
        if type(value) in _PLAIN:  # every tensor of the model may have values of its own, so this is quick
            continue
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor) and part.device.type != "cpu":
                raise ValueError(
                    f"{key} is a tensor on {part.device}, and the host would have to wait for it; pass a number. Only"
                    " lr may lie there"
                )
    halves, gamma = 2 * (2 - float(values["p"])), 2 * float(values.get("precondition", 0)) * (base == "adamw")
    if not (values["weight_decay"] > 0 and values["cutoff"] > 0):  # frozen at p >= 2 nothing is: SNAPPED is −1
        return (FROZEN if values["weight_decay"] > 0 else NONE).value, 0, False, 0, 0
    n, m = parse_pattern(values["pattern"]) if values.get("pattern") else (0, 0)
    form = (
        (int(halves), int(gamma))
        if halves in range(8) and gamma in range(5)
        else (ANY.value, OTHER_GAMMA.value if gamma else 0)
    )
    return *form, bool(values.get("latent")), -1 if values.get("ranked") else n, m


def _launch(kind: tuple, members: list[tuple]) -> None:
    base, device, weight, gradient, power, gamma, latent, kept_count, of, has_state, nesterov, lr_there, step_there = (
        kind
    )
    if base == "adamw" and not step_there and is_capturing(device):
        raise RuntimeError(
            "a CUDA graph would repeat this step's count forever; make the step counts tensors on the device"
            " (capturable)"
        )
    addresses, numbers = tables.setdefault(kind, (_Table(), _Table()))
    blocks = [(row.numel + _ALIGNED - 1 + _SIZE - 1) // _SIZE for *_, row in members]  # wherever a row starts
    places = [(n, row.numel, *_addresses(row)) for n, (*_, row) in zip(blocks, members)]
    given = [
        (0.0 if lr_there else float(lr), *numbers, 0.0 if step_there or base != "adamw" else float(row.step))
        for lr, numbers, row in members
    ]
    rows = addresses.of(
        places, lambda: address_rows(places, [t.element_size() for t in members[0][-1].tensors], of > 0), device
    )
    if lr_there or step_there:
        plans = plan_rows(
            base,
            numbers.of(given, lambda: torch.tensor(given, dtype=torch.float64), device),
            lr=torch.stack([lr.reshape(()) for lr, *_ in members]) if lr_there else None,
            step=torch.stack([row.step.reshape(()) for *_, row in members]) if step_there else None,
        )
    else:
        plans = numbers.of(given, lambda: plan_rows(base, given), device)
    lp_step[(sum(blocks),)](
        rows,
        plans,
        len(members),
        base,
        _TYPES[weight],
        _TYPES[gradient],
        power,
        gamma,
        latent,
        kept_count,
        of,
        has_state,
        nesterov,
        _SIZE,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


def _addresses(row: StepRow) -> list[int]:
    """Where what is updated begins in each of the row's tensors."""
    if row.span is None:
        return [t.data_ptr() for t in row.tensors]
    return [t.data_ptr() + row.span[0] * t.element_size() for t in row.tensors]


def address_rows(places: list[tuple[int, ...]], sizes: list[int], in_blocks: bool = False) -> Tensor:
    """FIRST, HEAD, ... of each place: numbers of blocks and of elements, and addresses of tensors with elements of
    `sizes` bytes. in_blocks: of a pattern."""
    table, first = [], 0
    for blocks, numel, *addresses in places:
        # A run in a shard may start anywhere. If all its tensors do so alike, the walk starts before them, where
        # vectors do.
        heads = {address // size % _ALIGNED for address, size in zip(addresses, sizes)}
        if in_blocks and heads != {0}:  # the walk starts with a pattern's block
            heads = {0, 1}
        head = min(heads) if len(heads) == 1 else 0
        starts = [address - head * size for address, size in zip(addresses, sizes)] + [0] * (4 - len(sizes))
        table.append([first, head, head + numel, len(heads) == 1, *starts])
        first += blocks
    return torch.tensor(table, dtype=torch.int64)


class _Floats:
    """The functions of a plan for one row on the host: 40 calls of torch would take as long as a step of 50 million
    weights.
    """

    log2, sqrt, round = math.log2, math.sqrt, round

    @staticmethod
    def clamp(x: float, least: float, most: float) -> float:
        return min(max(x, least), most)

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y


class _Tensors:
    """The same for many rows on the device, where the learning rate or the steps are."""

    log2, sqrt, round, clamp, where = torch.log2, torch.sqrt, torch.round, torch.clamp, torch.where


def plan_rows(
    base: str, given: list[tuple[float, ...]] | Tensor, lr: Tensor | None = None, step: Tensor | None = None
) -> Tensor:
    """The numbers of rows, [rows, NUMBERS] in fp32, from the values of _GIVEN: of the host, or of a tensor [rows,
    _GIVEN] on the device, where `lr` and `step` are instead of those among them."""
    if not isinstance(given, Tensor):
        # Most rows have the same.
        made = {values: _plan(base, dict(zip(_GIVEN, values)), _Floats) for values in dict.fromkeys(given)}
        plans = torch.tensor(list(made.values()), dtype=torch.float64).float()
        places = dict(zip(made, range(len(made))))
        return (
            plans.expand(len(given), -1).contiguous()
            if len(made) == 1
            else plans[[places[values] for values in given]]
        )
    there = {key: value.double() for key, value in (("lr", lr), ("step", step)) if value is not None}
    return torch.stack(_plan(base, {**dict(zip(_GIVEN, given.unbind(1))), **there}, _Tensors), dim=1).float()


def _plan(base: str, a: dict[str, Any], f: Any) -> list[Any]:
    """`plan_of` of step.cpp, in double precision. f: `_Floats` or `_Tensors`, by what `a` holds."""
    lr, cutoff, regrowth_below = a["lr"], a["cutoff"], a["regrowth_below"]
    strength, exponent = lr * a["weight_decay"], 2 - a["p"]
    # Its pull tells whether a weight is latent, so where α = 0 there is one that changes no weight.
    least = f.where((a["latent"] > 0) & (a["weight_decay"] > 0) & (cutoff > 0), cutoff * _LEAST_PULL, 0.0)
    strength = f.where(strength > least, strength, least)
    # Where it is not, αλ/x is to be 0 in every form: no number reaches an infinite least pull.
    active = strength > 0
    bounded = f.clamp(strength, torch.finfo(torch.float32).tiny, LARGEST.value)
    # x = high + low, with high a multiple of 2^-9, so that its products with whole numbers are exact
    (l_hi, l_lo), (c_hi, c_lo), (y_hi, y_lo) = (
        (high := f.round(x * 512) / 512, x - high) for x in (f.log2(bounded), exponent, a["gamma"])
    )
    return [  # in the order of the columns
        a["sign"],
        1 - a["beta1"],
        1 - a["beta2"],
        a["beta2"],
        f.sqrt(1 - a["beta2"] ** a["step"]),
        a["eps"],
        -lr / (1 - a["beta1"] ** a["step"]) if base == "adamw" else -lr,
        -lr,
        a["momentum"],
        f.where(active, bounded ** (1 / f.clamp(exponent, 1.0, math.inf)), 0.0),
        l_hi,
        l_lo,
        exponent,
        c_hi,
        c_lo,
        a["gamma"],
        y_hi,
        y_lo,
        f.where(active & (cutoff > 0), bounded / f.where(cutoff > 0, cutoff, 1.0), math.inf),
        f.where(
            regrowth_below > 0,
            f.clamp(bounded / f.where(regrowth_below > 0, regrowth_below, 1.0), 0.0, LARGEST.value),
            math.inf,
        ),
        f.where(exponent > 0, math.inf, f.where(exponent == 0, -1.0, 0.0)),  # at zero; −1: as of any other weight
        f.clamp(1 + lr * a["l2"], 1.0, LARGEST.value),
        f.where(active & (exponent > 0), SNAP, -1.0),
    ]
