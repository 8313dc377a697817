"""N:M steps: against the oracle in every implementation, on any cut of a parameter, and what has no blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import reference
from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay
from lp_dist.optim import batching, nm
from lp_dist.optim.batching import StepRow
from lp_dist.optim.kernels import dispatch
from lp_dist.optim.nm import PATTERNS, SplitBlocks
from lp_dist.optim.parameter_map import ParamSlice

ORACLES = {LpAdamW: reference.adamw_step, LpSGD: reference.sgd_step, LpLion: reference.lion_step}
CASES = {
    "adamw": (LpAdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "adamw gamma": (LpAdamW, {"lr": 0.02, "weight_decay": 0.1, "precondition": 1.0, "betas": (0.8, 0.9)}),
    "adamw gamma 1.5, p = -1, cutoff": (
        LpAdamW,
        {"lr": 0.02, "weight_decay": 0.01, "p": -1.0, "precondition": 1.5, "cutoff": 0.3, "l2": 0.2},
    ),
    "adamw other gamma, cutoff, regrowth": (
        LpAdamW,
        {
            "lr": 0.02,
            "weight_decay": 0.1,
            "p": 0.8,
            "precondition": 0.37,
            "cutoff": 0.3,
            "regrowth_below": 0.02,
            "maximize": True,
        },
    ),
    "sgd": (LpSGD, {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9, "p": 0.0}),
    "lion": (LpLion, {"lr": 0.01, "weight_decay": 0.2, "p": 1.0, "cutoff": 0.6, "regrowth_below": 0.05}),
}
all_cases = pytest.mark.parametrize(("cls", "values"), CASES.values(), ids=CASES)
both = pytest.mark.parametrize("pattern", PATTERNS)
ROWS, INPUTS = 5, 64  # more than one block of 256 of the fused step


def weights_of(dtype: torch.dtype = torch.float32) -> Tensor:
    """With zeros, of which some are kept, and with blocks of equal weights, of which the earlier are."""
    w = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    w[1, :16] = 0.25
    w[2, 1:40:3] = 0.0
    w[3, 1:16] = 0.0
    return w.to(dtype)


def inputs_last(*params: nn.Parameter) -> dict[str, Any]:
    """A param group of matrices [outputs, inputs]."""
    return {"params": list(params), "input_dim": 1}


def gradient(step: int, shape: tuple[int, ...] = (ROWS, INPUTS), equal: bool = True) -> Tensor:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)
    if equal:
        g[1, :16] = 0.1  # so equal weights are ranked by their places alone, in the first step at least
    return g


@all_cases
@both
@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
def test_equals_the_oracle(cls, values, pattern, implementation):
    dtype = torch.float32 if implementation == "fused" else torch.float64
    param = nn.Parameter(weights_of(dtype))
    optimizer = cls([inputs_last(param)], pattern=pattern, implementation=implementation, **values)
    weights, state = param.detach().double().flatten().tolist(), None
    for step in range(1 if dtype is torch.float32 else 8):  # in single precision a later one may find another order
        param.grad = gradient(step).to(dtype)
        weights, state = ORACLES[cls](
            weights, param.grad.double().flatten().tolist(), state, pattern=PATTERNS[pattern], **values
        )
        optimizer.step()
    tolerance = {"rtol": 2e-6, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 2e-13}
    torch.testing.assert_close(
        param.detach().double().flatten(), torch.tensor(weights, dtype=torch.float64), **tolerance
    )


# Shapes with their dimension of inputs.
LAYOUTS = {
    "inputs, outputs": ((32, 13), 0),
    "inputs, one output": ((64, 1), 0),
    "experts, inputs, outputs": ((3, 16, 9), 1),
    "experts, outputs, inputs": ((3, 9, 16), 2),
    "convolution": ((5, 16, 3, 2), 1),
    "convolution of one place": ((5, 16, 1, 1), 1),
    "transposed convolution": ((16, 5, 3), 0),
}
all_layouts = pytest.mark.parametrize(("shape", "inputs"), LAYOUTS.values(), ids=LAYOUTS)


def by_inputs(tensor: Tensor, inputs: int) -> list[float]:
    """All numbers, the inputs of each output and place one after the other."""
    return tensor.detach().double().movedim(inputs, -1).flatten().tolist()


def random_weights(shape: tuple[int, ...]) -> Tensor:
    """Some are zero, and many are equal."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).round() / 8


@all_layouts
@all_cases
@both
@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
def test_blocks_lie_along_the_inputs_of_any_layout(shape, inputs, cls, values, pattern, implementation, monkeypatch):
    monkeypatch.setitem(batching.COPIED_SIZE, "cpu", 64)  # in several copies
    dtype = torch.float32 if implementation == "fused" else torch.float64
    param = nn.Parameter(random_weights(shape).to(dtype))
    group = {"params": [param], "input_dim": inputs}
    optimizer = cls([group], pattern=pattern, implementation=implementation, **values)
    weights, state = by_inputs(param, inputs), None
    for step in range(1 if dtype is torch.float32 else 4):
        param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 + step)).to(dtype)
        weights, state = ORACLES[cls](
            weights, by_inputs(param.grad, inputs), state, pattern=PATTERNS[pattern], **values
        )
        optimizer.step()
    tolerance = {"rtol": 2e-6, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 2e-13}
    torch.testing.assert_close(by_inputs(param, inputs), weights, **tolerance)
    key = next(iter(optimizer.state[param].keys() - {"step"}))
    assert optimizer.state[param][key].any(), "the state is written back"


@all_cases
def test_fused_and_foreach_keep_the_same_weights_for_many_steps(cls, values):
    ends = []
    for implementation in ("foreach", "fused"):
        param = nn.Parameter(weights_of())
        optimizer = cls([inputs_last(param)], pattern="2:4", implementation=implementation, **values)
        for step in range(30):
            param.grad = gradient(step, equal=False).float()
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)
    assert (ends[0] == 0).equal(ends[1] == 0)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_what_is_not_kept_becomes_zero_and_the_pattern_is_left(implementation):
    for pattern, (n, m) in PATTERNS.items():
        param = nn.Parameter(weights_of().masked_fill(weights_of() == 0, 0.01))
        optimizer = LpAdamW(
            [inputs_last(param)], lr=1e-3, weight_decay=1e7, pattern=pattern, implementation=implementation
        )
        largest_weights = param.detach().abs().view(-1, m).argsort(descending=True, stable=True)[:, :n].sort().values
        for step in range(3):
            param.grad = gradient(step).float() * 1e-3
            optimizer.step()
        alive = param.view(-1, m) != 0
        assert (alive.sum(1) == n).all() and alive.nonzero()[:, 1].view(-1, n).equal(largest_weights)


@pytest.mark.parametrize("phase", [{"phase": "off"}, {"phase": "frozen"}, {"weight_decay": 0.0}, {"lr": 0.0}], ids=str)
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_where_nothing_decays_it_changes_nothing(phase, implementation):
    ends = []
    for pattern in (None, "2:4"):
        param = nn.Parameter(weights_of())
        optimizer = LpAdamW(
            [inputs_last(param)], lr=0.01, weight_decay=0.1, pattern=pattern, implementation=implementation
        )
        optimizer.param_groups[0].update(phase)
        for step in range(3):
            param.grad = gradient(step).float()
            optimizer.step()
        ends.append(param.detach())
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("implementation", ["foreach", None])
def test_blocks_are_the_matrix_own_however_it_lies_in_memory(implementation):
    ends = []
    for lies in (lambda t: t.contiguous(), lambda t: t.t().contiguous().t()):
        param = nn.Parameter(lies(weights_of()))
        optimizer = LpAdamW(
            [inputs_last(param)], lr=0.01, weight_decay=0.2, pattern="2:4", implementation=implementation
        )
        for step in range(5):
            param.grad = lies(gradient(step).float())
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert (ends[0] == 0).equal(ends[1] == 0) and (ends[0] == 0).float().mean() > 0.04


# -- cut by shards ------------------------------------------------------------


class Ranks:
    """Stands in for the maximum over ranks: each call of one rank waits for the calls of the others, which are made
    first.
    """

    def __init__(self) -> None:
        self.tables: list[Tensor] = []

    def __call__(self, table: Tensor) -> Tensor:
        self.tables.append(table)
        return torch.stack(self.tables).amax(0)


# γ = 1.5 is a pow, which torch rounds in a vector otherwise than in the rest after it; the fused step rounds every
# weight alike
@pytest.mark.parametrize(
    ("implementation", "cls", "values"),
    [
        *(
            (implementation, *CASES[case])
            for case in ("adamw gamma", "sgd", "lion")
            for implementation in ("foreach", "fused")
        ),
        *(
            ("fused", *CASES[case])
            for case in ("adamw gamma 1.5, p = -1, cutoff", "adamw other gamma, cutoff, regrowth")
        ),
    ],
)
@given(
    cuts=st.lists(st.integers(0, 320), min_size=0, max_size=4),
    pattern=st.sampled_from(list(PATTERNS)),
    layout=st.sampled_from([((5, 64), 1), ((64, 5), 0), ((2, 16, 10), 1), ((4, 8, 5, 2), 1)]),
)
@settings(max_examples=20, deadline=None)
def test_a_parameter_cut_anywhere_steps_as_uncut(implementation, cls, values, cuts, pattern, layout):
    """Bit for bit. Two parameters in flat shards that end anywhere, of a length below a block too."""
    shape, inputs = layout
    stride = math.prod(shape[inputs + 1 :])
    matrices = [nn.Parameter(w.reshape(shape)) for w in (weights_of(), weights_of().flip(0, 1).contiguous())]
    unsplit = cls(
        [{"params": matrices, "input_dim": inputs}], pattern=pattern, implementation=implementation, **values
    )
    lengths, edges = matrices[0].numel(), sorted({0, *cuts, 320})
    flats = []
    for begin, end in zip(edges, edges[1:]):
        flat = nn.Parameter(torch.cat([w.detach().flatten()[begin:end] for w in matrices]))
        flats.append(
            (
                flat,
                [
                    ParamSlice(name, i * (end - begin), end - begin, begin, matrices[i].shape, inputs)
                    for i, name in enumerate("ab")
                ],
            )
        )
    optimizers = []
    for flat, param_slices in flats:
        optimizers.append(cls([flat], pattern=pattern, implementation=implementation, **values))
        optimizers[-1].parameter_map.replace({flat: param_slices})
    starts = {name: [edge for edge in edges[1:-1] if edge % (8 * stride)] for name in "ab"}
    starts = {name: edges for name, edges in starts.items() if edges}
    for step in range(3):
        for i, w in enumerate(matrices):
            w.grad = gradient(step + 50 * i).float().reshape(shape)
        unsplit.step()
        # Every rank's table is needed by all: the first round only fills it, on copies
        tables = Ranks()
        for dry in (True, False):
            for (flat, param_slices), optimizer in zip(flats, optimizers):
                optimizer.parameter_map.split_blocks = SplitBlocks(
                    starts, {flat: ["a", "b"]}, tables, dict.fromkeys("ab", stride)
                )
                flat.grad = torch.cat(
                    [w.grad.flatten()[s.start : s.start + s.length] for w, s in zip(matrices, param_slices)]
                )
                before = flat.detach().clone(), {key: t.clone() for key, t in optimizer.state[flat].items()}
                optimizer.step()
                if dry:
                    flat.data.copy_(before[0])
                    if before[1]:
                        optimizer.state[flat].update(before[1])
                    else:
                        optimizer.state.pop(flat)
    for i, w in enumerate(matrices):
        slices = [flat.detach()[s[i].offset : s[i].offset + s[i].length] for flat, s in flats]
        assert w.detach().flatten().equal(torch.cat(slices)), (edges, pattern)
    assert lengths == 320


# -- what it is not for -------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "1:4"}, "pattern='1:4' must be one of 2:4, 4:8"),
        ({"pattern": 2}, "pattern=2 must be"),
        ({"pattern": "1:1"}, "pattern='1:1' must be"),
        ({"pattern": "2:4", "p": 2.0}, r"pattern='2:4' needs p < 2, not p=2.0"),
        ({"pattern": "2:4", "latent": True, "cutoff": 1.0}, "can't be together"),
        ({"pattern": "2:4", "input_dim": -1}, "input_dim=-1 must be the dimension of inputs"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        LpAdamW([{"params": [nn.Parameter(torch.ones(4, 8))], "weight_decay": 0.1, **values}])


@pytest.mark.parametrize(
    ("shape", "inputs", "message"),
    [
        (
            (8,),
            0,
            r"a parameter of shape \(8,\) can't have pattern='2:4': it has the shape \(8,\).*Leave it out",
        ),
        ((4, 6), 1, "its number of inputs, 6, is no multiple of 4"),
        ((6, 4), 0, "its number of inputs, 6, is no multiple of 4"),
        ((4, 4), 2, r"shape \(4, 4\), in which dimension 2 can't be the inputs"),
        (
            (4, 4),
            None,
            r"it is not known which dimension of its shape \(4, 4\) the inputs are.*param_groups.*input_dim=1",
        ),
    ],
)
def test_what_has_no_blocks_is_refused_where_it_decays(shape, inputs, message):
    param = nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    group = {"params": [param], "input_dim": inputs}
    with pytest.raises(ValueError, match=message):
        LpAdamW([dict(group)], lr=0.1, weight_decay=0.1, pattern="2:4").step()
    LpAdamW([dict(group)], lr=0.1, weight_decay=0.0, pattern="2:4").step()


def test_other_optimizers_have_none():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(4, 8))], lr=0.1)
    optimizer.param_groups[0]["pattern"] = "2:4"
    with pytest.raises(ValueError, match="pattern='2:4' is for LpAdamW, LpSGD and LpLion"):
        add_lp_decay(optimizer)


def test_ranks_and_pulls_are_those_of_the_step():
    """The numbers that other ranks get: αλ/x, of bf16 weights those of their fp32 values."""
    w, g = torch.tensor([0.5, -0.25, 0.0, 2.0]).bfloat16(), torch.tensor([1.0, 0.5, 1.0, 0.1]).bfloat16()
    values = {
        "lr": 0.1,
        "betas": (0.0, 0.0),
        "eps": 0.0,
        "maximize": False,
        "weight_decay": 0.2,
        "p": 0.0,
        "l2": 0.0,
        "precondition": 1.0,
        "cutoff": math.inf,
        "pattern": "2:4",
    }
    pull = dispatch.pull(
        "cpu", "adamw", values, StepRow(w, g, (torch.zeros(4).bfloat16(), torch.zeros(4).bfloat16()), 1.0)
    )
    torch.testing.assert_close(pull, 0.02 / (w.float() ** 2 * g.float().abs()))
    keys = nm.ranking_keys(pull, smallest=True)
    assert keys.argsort(descending=True).tolist() == [3, 0, 1, 2]
