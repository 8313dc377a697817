"""The fused step on a GPU. Where there is none, it runs on the CPU in Triton's interpreter, and is compiled for GPUs
that are not there.
"""

import math

import pytest
import torch

from helpers import reference
from helpers.gpu import BASES, DEVICE, EXPONENTS, GAMMAS, assert_right, copy, row, run, values
from helpers.optimizers import step_row

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities, in the interpreter
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
TENSOR = {"dtype": torch.float64, "device": DEVICE}


def test_it_is_rehearsed_before_it_is_used(gpu, monkeypatch):
    gpu.rehearse(torch.device(DEVICE))
    made = gpu.plan_rows
    monkeypatch.setattr(gpu, "plan_rows", lambda *args, **more: made(*args, **more) * 1.001)
    gpu.tables.clear()
    with pytest.raises(AssertionError, match="not close"):
        gpu.rehearse(torch.device(DEVICE))


# --- the mathematics
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", (*GAMMAS, 8.0))
@pytest.mark.parametrize("p", EXPONENTS)
def test_the_factor_over_all_floats(gpu, monkeypatch, p, gamma):
    monkeypatch.setattr(gpu, "SNAP", 0.0)
    # With β₁ = β₂ = 0 Adam's direction is the gradient's sign, and its metric the gradient's magnitude: u = w + 1
    generator = torch.Generator().manual_seed(0)
    bits = torch.linspace(1, 0x7F7FFFFF, 1800, dtype=torch.float64).to(torch.int32)  # all magnitudes, denormals too
    w = torch.cat([bits, torch.arange(1, 2**23, 2**16 + 1, dtype=torch.int32)]).view(torch.float32)
    d = 10 ** (torch.rand(len(w), generator=generator) * 12 - 9)
    batches = []
    for strength in (1e-9, 1e-3, 30.0):
        a = values(lr=1.0, weight_decay=strength, p=p, precondition=gamma, betas=(0.0, 0.0), eps=0.0)
        batches.append(
            (
                a,
                [
                    (
                        w.to(DEVICE, copy=True),
                        -d.to(DEVICE),
                        *(torch.zeros(len(w), device=DEVICE) for _ in range(2)),
                        1.0,
                    )
                ],
            )
        )
    gpu.step("adamw", [(a, [step_row(row) for row in rows]) for a, rows in batches])
    assert len(gpu.tables) == 1
    for a, [(got, *_)] in batches:
        pull = (math.log(a["weight_decay"]) + (p - 2) * w.double().log() - gamma * d.double().log()).exp()
        want = (w + 1).double() / (1 + pull)
        got, ordinary = (
            got.cpu().double(),
            (want > 1e-30) & (pull < 1e38),
        )  # beyond, single precision has nothing left to be right in
        assert ordinary.sum() > 500
        assert ((got / want - 1).abs()[ordinary] <= 1e-6 + 2.0**-23).all(), float(
            (got / want - 1).abs()[ordinary].max()
        )
        assert (got <= (w + 1).double() / 1e38 + 2e-30)[~ordinary].all()


MODES = {
    "plain": {"cutoff": math.inf, "l2": 0.3},
    "capped": {"cutoff": 1e-3},
    "regrowing": {"cutoff": 1e-2, "regrowth_below": 1e-4},
    "frozen": {"cutoff": 0.0, "l2": 0.3},
    "off": {"weight_decay": 0.0},
}
LATENT = {"cutoff": 1e-2, "regrowth_below": 1e-4, "latent": True}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_adamw_against_float64(gpu, p, gamma):
    for mode in [
        *(MODES.values() if gamma in (0.0, 0.37) else (MODES[mode] for mode in ("plain", "capped", "regrowing"))),
        LATENT,
        {**LATENT, "lr": 0.0},
    ]:
        a = values(p=p, precondition=gamma, **mode)
        after = copy(before := row("adamw", 700))
        run(gpu, "adamw", a, after)
        assert_right("adamw", a, before, after)


@pytest.mark.parametrize("maximize", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", BASES)
def test_every_base_against_float64(gpu, base, mode, maximize):
    for p in (0.5, 0.8)[: 1 if mode in ("frozen", "off") else 2]:
        a = values(base, p=p, maximize=maximize, **MODES[mode])
        after = copy(before := row(base, 700))
        run(gpu, base, a, after)
        assert_right(base, a, before, after)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("adamw", {"precondition": 1.0}),
        ("adamw", {"p": 0.8, "precondition": 0.37, "cutoff": 1e-3, "regrowth_below": 1e-5}),
        ("adamw", {"p": -1.0, "precondition": 1.5}),
        ("lion", {"p": 0.0, "cutoff": 1e-2, "regrowth_below": 1e-4}),
        ("momentum", {"p": 1.2}),
        ("sgd", {}),
    ],
    ids=str,
)
def test_patterns_against_float64(gpu, base, more, pattern):
    for offset in (0, 3, 8):  # wherever vectors start, blocks begin with the row
        a = values(base, pattern=pattern, **more)
        before = row(base, 2056 + offset)
        for t in before[:-1]:
            t[100:140] = t[100]  # of equal weights the earlier are kept
        after = copy(before)
        run(gpu, base, a, (*(t[offset:] for t in after[:-1]), after[-1]))
        assert_right(
            base, a, (*(t[offset:] for t in before[:-1]), before[-1]), (*(t[offset:] for t in after[:-1]), after[-1])
        )
        assert all(map(torch.equal, (t[:offset] for t in after[:-1]), (t[:offset] for t in before[:-1])))


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("adamw", {"precondition": 1.0}),
        ("adamw", {"p": 0.8, "precondition": 0.37, "regrowth_below": 1.0}),
        ("sgd", {"p": 0.0}),
    ],
    ids=str,
)
def test_saliencies_that_blocks_are_ranked_by_and_entries_that_are_kept(gpu, base, more):
    """For blocks that lie on several ranks: the saliencies that ranks exchange, and then each entry alone, to the very
    bits of the unsplit block's step.
    """
    a = values(base, pattern="4:8", **more)
    stepped, ranked = copy(before := row(base, 80)), copy(before)
    run(gpu, base, a, stepped)
    run(gpu, base, {**a, "ranked": True}, ranked)
    by_entry, kept = copy(before), torch.zeros(80, dtype=torch.bool)
    kept.view(10, 8).scatter_(1, ranked[0].cpu().view(10, 8).sort(stable=True).indices[:, :4], True)
    entries = [(*(t[i : i + 1] for t in by_entry[:-1]), by_entry[-1]) for i in range(80)]
    for pattern, where in (("1:1", kept), (None, ~kept)):
        run(gpu, base, {**a, "pattern": pattern}, *(entries[i] for i in where.nonzero()[:, 0].tolist()))
    assert all(map(torch.equal, by_entry[:-1], stepped[:-1]))


@pytest.mark.parametrize("base", BASES)
def test_steps_in_a_row_against_the_oracle(gpu, base):
    a = values(base, cutoff=0.5, l2=0.1)
    now = row(base, 40)
    weights, state = now[0].tolist(), None
    for t in now[2:-1]:
        t.zero_()
    stepped = {"adamw": reference.adamw_step, "lion": reference.lion_step}.get(base, reference.sgd_step)
    for step in range(1, 5):
        grads = row(base, 40, seed=step)[1]
        now = (now[0], grads, *now[2:-1], float(step))
        run(gpu, base, a, now)
        weights, state = stepped(weights, grads.tolist(), state, **a)
    assert torch.allclose(now[0].cpu().double(), torch.tensor(weights, dtype=torch.float64), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("gamma", (0.0, 0.37, 0.5, 1.0, 2.0))
@pytest.mark.parametrize("p", EXPONENTS)
def test_special_weights(gpu, p, gamma):
    special = [0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e30, -math.inf, math.nan]
    a = values(lr=0.5, weight_decay=0.5, p=p, precondition=gamma, betas=(0.0, 0.0), eps=0.0)
    w = torch.tensor(special, device=DEVICE)
    run(gpu, "adamw", a, (w, torch.full_like(w, -0.25), torch.zeros_like(w), torch.zeros_like(w), 1.0))
    got = w.tolist()
    for old, new in zip(special[:6], got):
        factor = reference.lp_factor(old, lr=0.5, weight_decay=0.5, p=p, precondition=gamma, denom=0.25)
        want = (old + 0.5) * factor
        assert new == pytest.approx(
            want if abs(want) > 1e-13 or p >= 2 else 0.0, rel=2e-6, abs=max(1e-37, abs(old) * 1e-38)
        )
    if p <= 2:
        assert got[6] == -math.inf
    assert math.isnan(got[7])


@pytest.mark.parametrize("a", [{}, {"p": 0.8}, {"p": 2.0}, {"cutoff": 0.0}, {"weight_decay": 0.0}, LATENT], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_a_nan_gradient_shows(gpu, base, a):
    if a is LATENT and base != "adamw":
        return
    now = row(base, 6)
    now[0][:] = torch.tensor([0.0, 1e-20, 0.1, 1.0, -3.0, 0.0])
    now[1][:-1] = math.nan
    run(gpu, base, values(base, **a), now)
    assert now[0].isnan().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 2.0))
def test_a_gradient_whose_square_overflows_stops_the_weight(gpu, gamma):
    w = torch.tensor([0.0, 1e-30, 0.5], device=DEVICE)
    run(
        gpu,
        "adamw",
        values(p=-1.0, precondition=gamma),
        (w, torch.full_like(w, 1e25), torch.zeros_like(w), torch.zeros_like(w), 1.0),
    )
    assert not w.isnan().any() and w[0] == 0
    assert gamma == 0 or w[2] == 0.5
