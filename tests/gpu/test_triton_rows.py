"""The fused step on a GPU, what it is given: rows, runs, dtypes, tables of addresses and numbers, graphs."""

import math
import subprocess
import sys

import pytest
import torch

from helpers.gpu import BASES, COMPILE, DEVICE, assert_right, copy, row, run, values
from helpers.optimizers import step_row

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities, in the interpreter
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
TENSOR = {"dtype": torch.float64, "device": DEVICE}


# --- rows
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", (0.5, 0.8))
def test_rows_with_values_of_their_own_share_a_launch(gpu, launches, p):
    batches, alone = [], []
    for i in range(23):
        a = values(
            weight_decay=0.1 * (i + 1),
            cutoff=(math.inf, 1e-2, 1e-4)[i % 3],
            p=p + 0.13 * (i % 4) * (p == 0.8),
            l2=0.1 * (i % 2),
            maximize=i % 5 == 0,
            lr=0.01 * (1 + i % 2),
        )
        before = row("adamw", (1, 7, 129, 0, 1025, 2051)[i % 6], seed=i, step=float(i + 1))
        batches.append((a, [copy(before)]))
        alone.append((a, before))
    gpu.step("adamw", [(a, [step_row(row) for row in rows]) for a, rows in batches])
    assert launches.count == 1
    for (a, before), (_, [after]) in zip(alone, batches):
        single = copy(before)
        run(gpu, "adamw", a, single)
        assert all(map(torch.equal, single[:-1], after[:-1]))
        if before[0].numel() > 100:
            assert_right("adamw", a, before, after)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_spans_are_stepped_by_address_and_nothing_beside_them(gpu, launches, base, grad_dtype):
    before, kernel = row(base, 3000, grad=grad_dtype), base if base in ("adamw", "lion") else "sgd"
    after, spans = copy(before), [(0, 7), (7, 1500), (1603, 1397)]
    gpu.step(kernel, [(values(base), [step_row(after)._replace(span=span) for span in spans])])
    assert launches.count == 1
    for first, length in spans:
        alone = (*(t[first : first + length].clone() for t in before[:-1]), before[-1])
        run(gpu, base, values(base), alone)
        assert all(torch.equal(t[first : first + length], single) for t, single in zip(after[:-1], alone[:-1]))
    assert all(torch.equal(t[1507:1603], old[1507:1603]) for t, old in zip(after[:-1], before[:-1]))


@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (3, 3, 3, 3), (5, 2, 5, 5), (8, 16, 24, 0), (1, 9, 1, 17)], ids=str)
@pytest.mark.parametrize("n", (1, 5, 1023, 1024, 1031, 2100))
def test_runs_that_start_anywhere(gpu, n, offsets):
    before = row("adamw", n)
    shards = [torch.full((n + 40,), 7.0, device=DEVICE) for _ in range(4)]
    views = [shard[offset : offset + n].copy_(t) for shard, offset, t in zip(shards, offsets, before)]
    run(gpu, "adamw", values(), (*views, before[-1]))
    expected = copy(before)
    run(gpu, "adamw", values(), expected)
    for shard, view, want, offset in zip(shards, views, expected, offsets):
        assert torch.equal(view, want)
        assert (shard[:offset] == 7).all() and (shard[offset + n :] == 7).all()


def test_only_where_all_tensors_start_at_a_vector_is_it_said_so(gpu):
    places = [
        (1, 20, 4096 + 4 * i, 8192 + 2 * j, 4096 + 4 * i)
        for i, j in ((0, 0), (8, 24), (3, 3), (3, 11), (3, 4), (0, 4))
    ]
    first, head, end, aligned, *starts = gpu.address_rows(places, [4, 2, 4]).unbind(1)
    assert aligned.tolist() == [1, 1, 1, 1, 0, 0]
    assert head.tolist() == [0, 0, 3, 3, 0, 0] and (end - head == 20).all() and first.tolist() == list(range(6))
    for start, size, at in zip(starts, (4, 2, 4), zip(*(place[2:] for place in places))):
        assert (start % 16 == 0)[aligned == 1].all()
        assert (start + head * size).tolist() == list(at)


def test_tensors_are_walked_as_they_lie(gpu):
    before = row("adamw", 24 * 5)
    flat, transposed = copy(before), (*(t.clone().view(24, 5).t() for t in before[:-1]), before[-1])
    run(gpu, "adamw", values(), flat)
    run(gpu, "adamw", values(), transposed)
    assert all(torch.equal(t.t().reshape(-1), want) for t, want in zip(transposed[:-1], flat))


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_16_bits(gpu, base, grad):
    for offset in (0, 3):
        before = row(base, 1300, grad=grad)
        after, wide = copy(before), copy((before[0], before[1].float(), *before[2:]))
        run(gpu, base, values(base), (*(t[offset:] for t in after[:-1]), 3.0))
        run(gpu, base, values(base), (*(t[offset:] for t in wide[:-1]), 3.0))
        assert torch.equal(after[0], wide[0])  # 16-bit gradients are taken at their value
        # Bits below a bf16's are rounded once, at the end; the interpreter cuts them off
        before = row(base, 1300, dtype=torch.bfloat16, grad=grad)
        after = copy(before)
        run(gpu, base, values(base), (*(t[offset:] for t in after[:-1]), 3.0))
        assert_right(
            base,
            values(base),
            (*(t[offset:] for t in before[:-1]), 3.0),
            (*(t[offset:] for t in after[:-1]), 3.0),
            bound=2.0**-7 if DEVICE == "cpu" else 2.0**-8,
        )


# --- what is sent, and what is never read back
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "a", [{"cutoff": 1e-3}, {"p": 0.8, "l2": 0.1}, {"p": 2.0}, {"cutoff": 0.0}, {"weight_decay": 0.0}], ids=str
)
@pytest.mark.parametrize("there", ["lr", "step", "both"])
def test_numbers_on_the_device_are_as_good(gpu, base, a, there):
    rows = [row(base, 300, seed=i, step=i + 1.0) for i in range(3)]
    host, device = [copy(r) for r in rows], [copy(r) for r in rows]
    run(gpu, base, values(base, **a), *host)
    lr = torch.tensor(values()["lr"], **TENSOR) if there != "step" else values()["lr"]
    if there != "lr":
        device = [(*r[:-1], torch.tensor([r[-1]], device=DEVICE)) for r in device]
    run(gpu, base, values(base, lr=lr, **a), *device)
    for on_device, on_host in zip(device, host):
        close = torch.equal if DEVICE == "cpu" else lambda x, y: torch.allclose(x, y, rtol=1e-6, atol=1e-9)
        assert all(map(close, on_device[:-1], on_host[:-1]))
    assert rows[0][0].tolist() != host[0][0].tolist()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0, **TENSOR)], ids=["host", "device"])
@pytest.mark.parametrize(
    "a",
    [
        {},
        {"p": 0.8, "precondition": 0.37},
        {"precondition": 1.0, "cutoff": 0.1},
        {"p": 2.0},
        {"p": 3.0},
        {"p": -1.5},
        {"cutoff": 0.0},
    ],
    ids=str,
)
def test_at_lr_0_a_weight_stays_whatever_it_is(gpu, a, lr):
    w = torch.tensor([0.0, 1e-45, 1e-38, -1e-20, 1e-13, 0.3, -1e30], device=DEVICE)
    now = (w.clone(), torch.full_like(w, 0.1), torch.zeros_like(w), torch.zeros_like(w), 1.0)
    run(gpu, "adamw", values(**a, lr=lr), now)
    assert torch.equal(now[0], w) and (now[2] > 0).all()


def test_addresses_are_sent_when_they_have_changed(gpu, monkeypatch):
    sent, addresses = [], gpu.address_rows
    monkeypatch.setattr(gpu, "address_rows", lambda *args: sent.append(args) or addresses(*args))
    rows = [row("adamw", 10 + i, step=1.0) for i in range(4)]
    for step in range(3):
        run(gpu, "adamw", values(lr=0.1 / (step + 1)), *((*r[:-1], step + 1.0) for r in rows))
    assert len(sent) == 1
    again = [(r[0], r[1].clone(), *r[2:-1], 4.0) for r in rows]  # the gradients are others now
    for _ in range(2):
        run(gpu, "adamw", values(), *again)
    assert len(sent) == 2 and len(gpu.tables) == 1
    expected = copy(again[3])
    run(gpu, "adamw", values(), again[3])
    assert len(sent) == 3 and len(gpu.tables) == 1  # of each kind the last ones alone are kept
    run(gpu, "adamw", values(p=1.0), expected)
    assert len(gpu.tables) == 2


def test_what_a_graph_reads_is_kept_and_not_taken_for_sent(gpu, monkeypatch):
    now = row("adamw", 10, step=torch.ones(1, device=DEVICE))
    if DEVICE == "cuda":
        pytest.skip("a real capture is below")
    run(gpu, "adamw", values(), now)
    ((addresses, numbers),) = gpu.tables.values()
    kept = addresses.tensor, numbers.tensor
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "is_capturing", lambda device: True)
        run(gpu, "adamw", values(), now)
        assert [id(tensor) for tensor, _ in gpu.captured_tables] == list(map(id, kept))  # they were there before
        other = row("adamw", 10, seed=1, step=torch.ones(1, device=DEVICE))
        pinned_spare = addresses.pinned_spare
        run(gpu, "adamw", values(), other)
        assert gpu.captured_tables[2][1] is pinned_spare and addresses.pinned_spare is None
        assert addresses.tensor is kept[0]
        with pytest.raises(RuntimeError, match="capturable"):
            run(gpu, "adamw", values(), row("adamw", 10))
    before = copy(other)
    run(gpu, "adamw", values(), other)
    assert addresses.tensor is not kept[0]
    assert_right("adamw", values(), before, other)


@pytest.mark.parametrize("key", ["weight_decay", "p", "precondition", "cutoff", "betas", "l2"])
def test_a_tensor_that_would_have_to_be_read_back_is_refused(gpu, key):
    tensor = torch.tensor(0.5, device="meta" if DEVICE == "cpu" else DEVICE)
    with pytest.raises(ValueError, match=key):
        run(gpu, "adamw", values(**{key: (0.9, tensor) if key == "betas" else tensor}), row("adamw", 4))
    tensor = torch.tensor(0.5)
    run(
        gpu, "adamw", values(**{key: (0.9, tensor) if key == "betas" else tensor}), row("adamw", 4)
    )  # on the CPU it can be


# --- compiled
# -----------------------------------------------------------------------------


@pytest.mark.long
def test_it_compiles_to_vector_loads_for_gpus_that_are_not_here(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_gpu
def test_the_host_never_waits(gpu):
    rows = [row("adamw", 5000, seed=i, step=torch.ones((), device=DEVICE)) for i in range(20)]
    for lr in (0.01, torch.tensor(0.01, device=DEVICE)):
        for i in range(3):
            torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first compiles
            try:
                run(gpu, "adamw", values(lr=lr), *rows)
                run(gpu, "adamw", values(lr=float(i + 1) / 100), *((*r[:-1], i + 1.0) for r in rows))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_captured_step_is_the_eager_one(gpu):
    lr, steps = torch.tensor(0.01, device=DEVICE), [torch.ones((), device=DEVICE) for _ in range(5)]
    rows = [row("adamw", 3000 + i, seed=i, step=step) for i, step in enumerate(steps)]
    eager = [(*copy(r)[:-1], r[-1].clone()) for r in rows]
    start = [copy(r) for r in rows]
    run(gpu, "adamw", values(lr=lr), *rows)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    fresh = [(r[0], r[1].clone(), *r[2:]) for r in rows]  # addresses that only the graph sends
    with torch.cuda.graph(graph):
        for step in steps:
            step += 1
        run(gpu, "adamw", values(lr=lr), *fresh)
    for now, old in zip(rows, start):
        for t, kept in zip(now[:-1], old[:-1]):
            t.copy_(kept)
    run(gpu, "adamw", values(p=1.0), row("adamw", 100))  # takes memory that a graph must not lose
    gpu.tables.clear()
    for i in range(3):
        lr.fill_(0.01 * (i + 1))
        graph.replay()
        for r in eager:
            r[-1].add_(1)
        run(gpu, "adamw", values(lr=lr), *eager)
    for now, want in zip(rows, eager):
        assert all(map(torch.equal, now[:-1], want[:-1]))


@needs_gpu
@pytest.mark.parametrize("a", [{}, {"p": 0.8, "precondition": 0.37}, {"cutoff": 0.0}], ids=str)
def test_memory_does_not_grow_with_the_tensors(gpu, a):
    now = row("adamw", 1 << 24)
    for step in (1.0, 2.0):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(gpu, "adamw", values(**a), (*now[:-1], step))
        assert torch.cuda.max_memory_allocated() - before <= 1 << 16


@needs_gpu
def test_a_tensor_of_more_than_2_to_the_31_elements(gpu):
    n = 2**31 + 5001
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 11 GB")
    w, g = torch.ones(n, dtype=torch.bfloat16, device=DEVICE), torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    run(gpu, "sgd", values("sgd", lr=0.5, weight_decay=0.0), (w, g, 1.0))
    assert bool((w == 0.5).all())
