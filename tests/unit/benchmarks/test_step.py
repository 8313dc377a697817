"""`lp-dist bench step`: every implementation takes the same step, and every row is there and can be read back.

No test checks a time.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json

import pytest
import torch

from helpers.commands import lp_dist
from lp_dist import cli
from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.step import command, implementations, training_step
from lp_dist.benchmarks.step.implementations import (
    COPY,
    PEER,
    SHAPES,
    Missing,
    Tensors,
    implementations_for,
    transformer,
)
from lp_dist.benchmarks.step.training_step import Shape
from lp_dist.errors import UsageError

pytestmark = pytest.mark.long  # DeepSpeedCPUAdam is compiled to compare with

CPU = torch.device("cpu")
SAME_STEP = {  # implementations that must come to the same weights
    "AdamW": [PEER, "torch AdamW foreach", "DeepSpeedCPUAdam"],
    "p = 0.5": ["torch.compile'd, p = 0.5", "LpAdamW p = 0.5"],
    "p = 0.8": [
        "eager: AdamW foreach, then plain torch, p = 0.8",
        "torch.compile'd, p = 0.8",
        "LpAdamW foreach p = 0.8",
        "LpAdamW p = 0.8",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def cpu_adam(tmp_path_factory, cpu_op):
    """DeepSpeedCPUAdam compiled as one file and without optimization, where only these tests find it: what it
    computes, in a third of the two minutes.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder, directory = CPUAdamBuilder(), tmp_path_factory.mktemp("cpu_adam")
    (directory / "all.cpp").write_text(
        "".join(f'#include "{builder.deepspeed_src_path(source)}"\n' for source in builder.sources())
    )
    flags = [flag for flag in builder.cxx_args() if flag not in ("-O3", "-g")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(directory))
        patch.setattr(CPUAdamBuilder, "sources", lambda self: [str(directory / "all.cpp")])
        patch.setattr(CPUAdamBuilder, "cxx_args", lambda self: [*flags, "-O0"])
        builder.load(verbose=False)  # and keeps it for this process


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smallest size: its directory, and its rows without the one of the run."""
    directory = tmp_path_factory.mktemp("step")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command.step(sizes="1e4", repeats=2, out=str(directory), training_steps=False, compiled=False)
    (directory / "shown").write_text(printed.getvalue())
    return directory, json_lines.read(directory / "step.jsonl")[1:]


@pytest.mark.parametrize("names", SAME_STEP.values(), ids=SAME_STEP)
def test_implementations_take_the_same_step(names, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what would be compiled
    results = []
    for name in names:
        torch.manual_seed(0)
        tensors = Tensors.random([(3000,)], CPU)
        tensors.lr = 1e-3
        before = tensors.weights[0].clone()
        with torch.no_grad():
            call = implementations_for("flat", CPU)[name](tensors)
            if "compile" not in name:  # which has been called already
                call()
        assert not torch.equal(before, tensors.weights[0])
        results.append([tensors.weights[0], tensors.exp_avgs[0], tensors.exp_avg_sqs[0]])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-5, atol=1e-7)


def test_the_weights_stay_as_they_are_under_every_implementation(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    tensors = Tensors.random([(3000,)], CPU)
    before = tensors.weights[0].clone()
    with torch.no_grad():
        for make in implementations_for("flat", CPU).values():
            make(tensors)()
    torch.testing.assert_close(tensors.weights[0], before, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["LpAdamW p = 0.8", "LpAdamW p = -1, γ = 1", "LpAdamW foreach p = 0.8"])
def test_half_of_the_weights_collapse_in_a_step_and_are_put_back(name):
    torch.manual_seed(0)
    tensors = Tensors.collapsing(20_000, CPU)
    denormal = (tensors.exp_avg_sqs[0] > 0) & (tensors.exp_avg_sqs[0] < torch.finfo(torch.float32).tiny)
    assert 0.1 < denormal.float().mean() < 0.3 and 0.4 < (tensors.grads[0] == 0).float().mean() < 0.6
    kept, restore = [t.clone() for t in (tensors.weights[0], tensors.exp_avg_sqs[0])], command.restorer(tensors)
    call = implementations_for("collapsing", CPU)[name](tensors)
    call()
    first = tensors.weights[0].clone()
    smaller = (first.abs() < kept[0].abs() / 2).float().mean()
    assert 0.4 < smaller < 0.6
    restore()
    assert torch.equal(tensors.weights[0], kept[0]) and torch.equal(tensors.exp_avg_sqs[0], kept[1])


@pytest.mark.parametrize("n", [10_000, 10**6, 2 * 10**7, 2 * 10**8])
def test_the_transformer_has_200_tensors_and_the_wanted_number_of_weights(n):
    shapes = transformer(n)
    assert len(shapes) == 200 and sum(len(shape) == 1 for shape in shapes) == 45
    assert abs(sum(torch.Size(shape).numel() for shape in shapes) - n) <= 0.05 * n
    assert shapes[0][0] > 1 or n == 10_000  # an embedding


def test_every_row_is_there_with_ratios_of_the_medians(run):
    _directory, rows = run
    for kind in SHAPES:
        by_name = {row["implementation"]: row for row in rows if row["shape"] == kind}
        assert list(by_name) == sorted(by_name, key=lambda name: "skipped" in by_name[name]) and set(by_name) == set(
            implementations_for(kind, CPU, compiled=False)
        )
        for name, row in by_name.items():
            assert "skipped" not in row, row
            assert (
                row["ratio"] == row["ms"] / by_name[PEER]["ms"]
                and row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
            )
            assert row["bytes a weight"] == (26 if "bf16" in name else 28)
            assert row["GB/s"] == pytest.approx(row["bytes a weight"] * row["weights"] / row["ms"] / 1e6)
            assert row["of copy"] == pytest.approx(row["GB/s"] / by_name[COPY]["GB/s"])
    assert {(row["shape"], row["tensors"]) for row in rows} == {("flat", 1), ("many", 200), ("collapsing", 1)}


def test_the_page_has_every_row_of_the_last_run_alone(run, tmp_path):
    directory, rows = run
    page, shown = (directory / "step.md").read_text(), (directory / "shown").read_text()
    assert all(f"│ {row['implementation']} " in shown for row in rows) and shown.count("collapsing") == 1
    assert all(f"\n| {row['implementation']} | " in page for row in rows) and page.count("× torch fused") == len(
        SHAPES
    )
    (tmp_path / "step.jsonl").write_text((directory / "step.jsonl").read_text())
    command.step(sizes="", repeats=1, out=str(tmp_path), training_steps=False)
    runs = [row for row in json_lines.read(tmp_path / "step.jsonl") if "benchmark" in row]
    assert (
        [row["run"] for row in runs] == [1, 2]
        and runs[0]["threads"] == torch.get_num_threads()
        and "torch" in runs[0]["versions"]
    )
    assert (
        runs[0]["command"] == "lp-dist bench step --sizes 1e4 --repeats 2 --seed 0 --no-compiled --no-training-steps"
    )
    assert PEER not in (tmp_path / "step.md").read_text()


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "available_bytes", lambda device: 10**6)
    page = command.step(sizes="1e6", repeats=1, out=str(tmp_path), training_steps=False)
    assert [row.get("skipped") for row in json_lines.read(tmp_path / "step.jsonl")[1:]] == [
        "0.0 GB of memory needed and 0.0 GB free"
    ] * 3
    assert page.read_text().count("skipped: ") == 3


def test_an_implementation_that_cannot_run_is_a_row_that_says_why(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(implementations.dispatch, "unavailable", lambda device: "no fused step")
    monkeypatch.setattr(command, "start_compiler", lambda: None)
    rows = list(command.time_group(10_000, "flat", CPU, 1, 0, compiled=True))
    skipped = {row["implementation"]: row["skipped"] for row in rows if "skipped" in row}
    assert (
        skipped["torch.compile'd, p = 0.5"] == "torch.compile failed: no compiler here"
        and skipped["LpAdamW p = 0.5"] == "no fused step"
    )
    assert {PEER, "torch AdamW foreach", "LpAdamW foreach p = 0.8"} <= {row["implementation"] for row in rows} - set(
        skipped
    )
    with pytest.raises(Missing, match="no fused step"):
        implementations_for("many", CPU)["LpAdamW dense"](Tensors.random([(10,)], CPU))


def test_training_steps_of_one_process_reach_the_target_and_a_failed_engine_says_why(tmp_path, monkeypatch):
    real = training_step.launch

    def launched(engine, *more):
        if engine == "ZeRO-2":
            raise RuntimeError("it broke\nhere")
        return real(engine, *more)

    monkeypatch.setattr(training_step, "launch", launched)
    page = command.step(
        sizes="",
        repeats=1,
        out=str(tmp_path),
        shape=Shape(layers=1, hidden_size=32, tokens=8, rounds=1),
        engines="one process; ZeRO-2",
    ).read_text()
    run, row, failed = json_lines.read(tmp_path / "step.jsonl")
    assert run["command"].endswith("--layers 1 --hidden-size 32 --tokens 8 --rounds 1 --engines 'one process; ZeRO-2'")
    assert (row["engine"], row["ranks"], row["rounds"], row["zeros"]) == (
        "one process",
        1,
        1,
        pytest.approx(0.5, abs=0.01),
    )
    assert row["ratio"] == row["lp_dist"]["tokens/s"] / row["peer"]["tokens/s"], "of one round, that is the median"
    assert row["peer"]["name"] == PEER
    assert "`SparsityTarget` that acts" in page
    assert (
        failed["skipped"] == "it broke\nhere"
        and "| ZeRO-2 | skipped: here |" in page
        and "| one process, 1 × " in page
    )


def test_training_steps_with_groups(tmp_path):
    shape = Shape(layers=1, hidden_size=32, tokens=8, rounds=1, groups="channels", interval=2)
    page = command.step(sizes="", repeats=1, out=str(tmp_path), shape=shape, engines="one process").read_text()
    run, row = json_lines.read(tmp_path / "step.jsonl")
    assert (
        "--groups channels --interval 2 --engines" in run["command"]
        and "`SparsityTarget` of channels (a decay every 2 steps) that acts" in page
    )
    assert row["zeros"] == pytest.approx(0.5 * 3 * 85 / (4 * 32 + 3 * 85), abs=0.005), (
        "half of the channels, and single weights not"
    )
    with pytest.raises(UsageError, match="'neurons' is none of channels, "):
        command.step(sizes="", out=str(tmp_path), shape=Shape(groups="neurons"))
    with pytest.raises(UsageError, match="--interval 2 is of groups"):
        command.step(sizes="", out=str(tmp_path), shape=Shape(interval=2))


def test_the_command_runs_and_what_is_no_size_is_refused(tmp_path):
    done = lp_dist("bench", "step", "--sizes", "", "--no-training-steps", "--out", str(tmp_path))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(tmp_path / "step.md")
    assert json.loads((tmp_path / "step.jsonl").read_text())["benchmark"] == "step"
    for sizes in ("many", "100"):
        with pytest.raises(UsageError, match=f"--sizes {sizes}: "):
            command.step(sizes=sizes, out=str(tmp_path))
    assert inspect.signature(cli.step).parameters["engines"].default == "; ".join(training_step.ENGINES)
    with pytest.raises(UsageError, match="no 'ZeRO-9'; there are one process; ZeRO-2; "):
        command.step(sizes="", out=str(tmp_path), engines="one process; ZeRO-9")
