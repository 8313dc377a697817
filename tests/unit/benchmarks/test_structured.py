"""`lp-dist bench structured` on a tiny model: each method leaves what it should, rows are resumed, and the page has
what was gained.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from helpers.families import model_of
from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.quality import runs
from lp_dist.benchmarks.quality.methods import Spec
from lp_dist.benchmarks.structured.command import structured
from lp_dist.benchmarks.structured.methods import STRUCTURED, OneCut
from lp_dist.errors import UsageError

METHODS = "dense:lr=0.001 groups:end=0.5 gcut:c=0.67 cut cut:criterion=taylor pathprox lp"


def bench(tiny_model, topics, out, methods: str, **values) -> list[dict]:
    text = topics.parent / "plain.txt"
    text.write_text("\n".join(json.loads(line)["text"] for line in topics.open()))
    arguments = {
        "model": str(tiny_model),
        "shares": "50",
        "seeds": "0",
        "groups": "channels",
        "steps": 24,
        "block": 64,
        "tokens": 4,
    } | values
    page = structured(text=str(text), methods=methods, out=str(out), **arguments)
    assert page == out / "structured.md"
    return json_lines.read(out / "structured.jsonl")


def test_every_method_is_a_row_and_is_run_once(tiny_model, topics, tmp_path, monkeypatch):
    monkeypatch.setenv("LP_DIST_CACHE", str(tmp_path / "cache"))
    rows = {row["method"]: row for row in bench(tiny_model, topics, tmp_path, METHODS)}
    assert list(rows) == METHODS.split()
    before = rows["dense:lr=0.001"]["parameters"]
    for method, row in rows.items():
        assert row["parameters"] == before and row["loss"] < 7.0 and row["seconds"] > 0.0
        cut = method not in ("dense:lr=0.001", "lp")
        assert ("loss cut" in row) == cut
        if cut:  # 48 of 96 channels of two layers, of three rows of 48 numbers each
            assert row["parameters cut"] == before - 2 * 48 * 3 * 48
            assert row["bytes"] - row["bytes cut"] == pytest.approx(4 * 2 * 48 * 3 * 48, abs=200) and row[
                "loss cut"
            ] == pytest.approx(row["loss"], abs=1e-4)
            assert row["tokens a second"] > 0 and row["tokens a second cut"] > 0
    assert rows["lp"]["zeros"] == pytest.approx(2 * 48 * 3 * 48, rel=1e-3), "as many parameters as the channels have"
    assert rows["dense:lr=0.001"]["zeros"] == 0
    page = (tmp_path / "structured.md").read_text()
    assert (
        page.count("\n| 50% | ") == 6
        and "| lp_dist, end = 0.5 |" in page
        and "| dense fine-tune, learning rate 0.001 |" in page
        and "×" in page
    )
    monkeypatch.setattr(runs, "train", None)
    assert len(bench(tiny_model, topics, tmp_path, "dense:lr=0.001", shares="50 30")) == 7, "a dense run has no share"
    (tmp_path / "structured.jsonl").write_text(
        "".join(
            json.dumps({**row, **({"machine": "another", "threads": 2} if i else {})}) + "\n"
            for i, row in enumerate(rows.values())
        )
    )
    assert len(bench(tiny_model, topics, tmp_path, METHODS)) == 7, "none is made again"
    assert f"{rows['lp']['machine']} ({rows['lp']['threads']} thread" in (tmp_path / "structured.md").read_text()
    assert " and another (2 threads)\n" in (tmp_path / "structured.md").read_text()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"methods": "gmp"}, "--methods gmp: this bench has dense, lp, groups, masked, cut, gcut, pathprox"),
        ({"methods": "cut", "shares": "0"}, "--shares 0: these are percents"),
        ({"methods": "cut", "shares": "x"}, "these must be numbers"),
    ],
)
def test_what_it_cannot_do_is_told(tiny_model, topics, tmp_path, arguments, says):
    with pytest.raises(UsageError, match=says):
        bench(tiny_model, topics, tmp_path, **arguments)
    with pytest.raises(UsageError, match="--model and --text are needed"):
        bench(tiny_model, topics, tmp_path, methods="cut", model="")


def test_taylors_criterion_is_the_sum_of_what_each_weight_does_to_the_loss():
    """Known from finite differences: |w·∂L/∂w| of each weight of a channel, here of one channel with few weights."""
    model = model_of("llama").double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.arange(24).view(2, 12) % 61
    run = runs.TrainingRun(model, optimizer, None, [], 0.5, 10, lambda: inputs)
    method = OneCut(run, criterion="taylor")
    super(OneCut, method).start()
    scores = method.taylor_scores()
    assert scores.shape == (96,) and all(param.grad is None for param in model.parameters())

    def loss() -> float:
        with torch.no_grad():
            return sum(
                float(F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:])) for row in inputs.split(1)
            )

    mlp, expected = model.model.layers[1].mlp, 0.0
    for view in (mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]):
        for i in range(len(view)):
            with torch.no_grad():
                old = float(view[i])
                view[i] = old * 1.01
                up = loss()
                view[i] = old * 0.99
                down = loss()
                view[i] = old
            expected += abs(up - down) / 0.02
    assert float(scores[48 + 5]) == pytest.approx(expected, rel=0.03), "norms are computed in single precision"


def test_a_line_of_it_reads_as_any_other():
    assert set(STRUCTURED) == {"groups", "masked", "cut", "gcut", "pathprox"}
    assert Spec.read("groups:p=0,cap=none").settings["cap"] is None and Spec.read("gcut:c=0.67").line == "gcut:c=0.67"
