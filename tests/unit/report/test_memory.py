"""The footprint on paper against what is measured: bytes that torch's profiler sees allocated, and every collective
that is called.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn

from helpers.memory_runs import state_bytes
from helpers.paths import ROOT
from lp_dist import LpAdamW, LpLion, LpSGD
from lp_dist.benchmarks.recording import Allocated
from lp_dist.report.memory import footprint, table

PAGE = ROOT / "docs" / "footprint.md"
SLICE = 1 << 16  # elements that the step takes at a time on a CPU
SCALARS = 4096  # bytes that a step takes for single numbers


def peak_of_a_step(make, sizes: tuple[int, ...]) -> int:
    params = [nn.Parameter(torch.randn(n)) for n in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = make(params)
    optimizer.step()
    with Allocated() as allocated:
        optimizer.step()
    return allocated.peak["start"]


# fp32 copies of a slice in the foreach step: x and √v̂+ε, a power of that; x and √x; x and the direction. The fused
# one has none: test_cpu_kernel.py.
FORMS = {
    "LpAdamW": (2, partial(LpAdamW, weight_decay=0.1, precondition=0.0, implementation="foreach")),
    "LpAdamW preconditioned": (
        3,
        partial(LpAdamW, weight_decay=0.1, precondition=0.5, cutoff=1.0, implementation="foreach"),
    ),
    "LpLion": (2, partial(LpLion, weight_decay=0.1, implementation="foreach")),
    "LpSGD": (2, partial(LpSGD, weight_decay=0.1, momentum=0.9, nesterov=True, implementation="foreach")),
}


@pytest.mark.parametrize("form", FORMS)
def test_temporaries_of_a_step_are_a_constant(form):
    copies, make = FORMS[form]
    peaks = [peak_of_a_step(make, sizes) for sizes in ((1 << 20,), (1 << 22,), (SLICE - 1, SLICE))]
    bound = footprint(1 << 22, 1, 0, optimizer=form.split()[0], accelerator=False, fused=False).device.temporaries
    assert copies * 4 * SLICE <= peaks[0] == peaks[1] <= copies * 4 * SLICE + SCALARS
    assert peaks[2] <= bound + SCALARS
    if form != "LpAdamW":  # the others have as many as the bound allows
        assert peaks[2] >= bound - SCALARS


def test_a_step_of_fewer_elements_than_two_slices_takes_what_it_has():
    assert footprint(1000, 1, 0, fused=False).device.temporaries == 3 * 4 * 1000
    assert footprint(10**9, 1, 0, fused=False).device.temporaries == 3 * 4 * 2 * (1 << 24)
    assert footprint(10**9, 2, 2, offload=True, fused=False).host.temporaries == 3 * 4 * 2 * SLICE


def test_torchs_adamw_has_the_same_state_and_its_foreach_step_takes_more():
    param = nn.Parameter(torch.randn(SLICE))
    param.grad = torch.ones_like(param)
    for name, make, options in (
        ("AdamW", torch.optim.AdamW, {}),
        ("LpAdamW", LpAdamW, {}),
        ("LpLion", LpLion, {}),
        ("LpSGD", LpSGD, {}),
        ("LpSGD", LpSGD, {"momentum": 0.9}),
    ):
        optimizer = make([param], lr=1e-3, **options)
        optimizer.step()
        on_paper = footprint(SLICE, 1, 0, optimizer=name, momentum=bool(options))
        assert state_bytes(optimizer) == on_paper.device.optimizer_state, name
    assert peak_of_a_step(lambda params: torch.optim.AdamW(params, fused=True), (1 << 20,)) <= SCALARS
    assert peak_of_a_step(lambda params: torch.optim.AdamW(params, foreach=True), (1 << 20,)) >= 4 << 20


@pytest.mark.parametrize("stage, gradients, gigabytes", [(1, 15e9, 31.4), (2, 15e9 / 64, 16.6), (3, 15e9 / 64, 1.9)])
def test_the_papers_own_example(stage, gradients, gigabytes):
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs, mixed precision, gradients without an engine's
    copies.
    """
    device = footprint(7_500_000_000, 64, stage).device
    assert round((device.model + device.masters + device.optimizer_state + gradients) / 1e9, 1) == gigabytes
    assert device.gradients >= gradients


@pytest.mark.parametrize("stage, on_device", [(1, 4), (2, 2), (3, 2 / 8), ("fsdp2", 0)])
def test_offload_leaves_on_the_device_what_forward_and_backward_need(stage, on_device):
    on_paper = footprint(8 * 10**6, 8, stage, offload=True)
    assert on_paper.device.total == on_device * 8 * 10**6
    assert on_paper.host.masters == 4 * 10**6 and on_paper.host.optimizer_state == 8 * 10**6


def test_what_adds_to_what():
    lp_adamw, adamw = (footprint(10**9, 8, 3, optimizer=name, counted=7, bins=10) for name in ("LpAdamW", "AdamW"))
    assert lp_adamw.sent_per_step == adamw.sent_per_step
    assert lp_adamw.device == adamw.device
    foreach = footprint(10**9, 8, 3, fused=False)
    assert foreach.device.total - adamw.device.total == foreach.device.temporaries > 0
    assert lp_adamw.sent_per_count == 2 * 7 * 8 * 11  # 84 numbers in 8 chunks of 11
    alone = footprint(10**9, 1, 0, counted=7)
    assert alone.sent_per_step == alone.sent_per_count == 0
    assert footprint(9, 8, 3).device.masters == 4 * 2  # the rank with the larger part
    assert footprint(10**10, 1, 3).device.gradients == 2 * 10**10 + 6 * 10**9  # copies of a sub-group at a time


@pytest.mark.parametrize(
    "change, words",
    [
        ({"parameters": 0}, "parameters=0 must be a whole number >= 1; count"),
        ({"parameters": 8.03e9}, "parameters=8030000000.0"),
        ({"ranks": 0}, "ranks=0"),
        ({"stage": 4}, r"stage=4 must be one of \(0, 1, 2, 3, 'fsdp2'\); use 0"),
        ({"stage": True}, "stage=True"),
        ({"dtype": "fp16"}, "fp16 needs what bf16 does"),
        ({"optimizer": "Muon"}, "as many states"),
        ({"counted": -1}, "counted=-1"),
        ({"bins": 0.5}, "bins=0.5"),
        ({"momentum": True}, "LpSGD's, not LpAdamW's"),
        ({"stage": 0, "offload": True}, "use stage 1, 2, 3"),
    ],
)
def test_bad_input_says_the_value_the_limit_and_the_way_out(change, words):
    values = {"parameters": 10, "ranks": 2, "stage": 2, **change}
    with pytest.raises(ValueError, match=words):
        footprint(**values)


def test_the_page_has_the_table_that_the_module_prints():
    match = re.search(
        r"<!-- table: python -m lp_dist.footprint -->\n(.*?)\n<!-- end of table -->", PAGE.read_text(), re.DOTALL
    )
    assert match and match[1] == table(), f"run python -m lp_dist.footprint and put what it prints into {PAGE.name}"
