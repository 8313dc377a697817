"""`lp-dist bench survivors`: its rows are those of an independent solution, and its page has them."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from lp_dist.benchmarks import survivors as bench
from lp_dist.cli import app
from lp_dist.errors import UsageError
from lp_dist.reconstruction.solver import DAMPING


def test_a_row_is_what_is_left_of_the_loss_on_other_inputs():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(12) + 0.5 * torch.randn(12, 12, generator=generator)
    inputs, held_out = (torch.randn(n, 12, generator=generator) @ mixing for n in (40, 500))
    weight = torch.randn(5, 12, generator=generator)
    row = bench._row("layer", weight, inputs, held_out, 0.5)
    score = weight.abs() * inputs.square().sum(0).sqrt()
    keeps = score > score.flatten().sort().values[29]
    damping = DAMPING + 12 / 40
    gram = (inputs.T @ inputs).double()
    gram += damping * gram.diagonal().diag()
    moved = torch.zeros(5, 12, dtype=torch.float64)
    for new, old, kept in zip(moved, weight.double(), keeps):
        # By the normal equations of the outputs themselves, damped about where the survivors were.
        move = torch.linalg.solve(gram[kept][:, kept], (inputs.T @ inputs).double()[kept][:, ~kept] @ old[~kept])
        new[kept] = old[kept] + move
    loss = [float((held_out @ (after - weight).T).square().sum()) for after in (moved.float(), weight * keeps)]
    assert row["damping"] == pytest.approx(damping) and row["left"] == pytest.approx(loss[0] / loss[1], rel=1e-3)
    assert row["left"] < 0.9 and row["left by damping"]["10"] > row["left"] and row["tokens"] == 40


def test_the_command_writes_a_row_for_each_layer_and_number_of_tokens(tiny_model, topics, tmp_path):
    arguments = ["--model", str(tiny_model), "--text", str(topics), "--tokens", "512,64", "--layers", "3"]
    result = CliRunner().invoke(app, ["bench", "survivors", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0 and result.output.strip().endswith("survivors.md")
    header, *rows = map(json.loads, (tmp_path / "survivors.jsonl").read_text().splitlines())
    assert [row["tokens"] for row in rows] == [64, 512] * 3 and len({row["layer"] for row in rows}) == 3
    assert all(row["left"] > 0 for row in rows) and "--tokens 64,512 --layers 3" in header["command"]
    page = (tmp_path / "survivors.md").read_text()
    for row in rows:
        assert f"| {row['layer']} | {row['tokens']} | {row['damping']:.2f} | **{row['left']:.3f}** |" in page


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("sparsity", 100.0, "--sparsity 100"), ("tokens", "many", "--tokens many"), ("tokens", "0", "from 1 on")],
)
def test_what_it_cannot_do_is_told(tmp_path, option, value, says):
    arguments = {"sparsity": 50.0, "tokens": "64", "layers": 1, option: value}
    with pytest.raises(UsageError, match=says):
        bench.survivors(model="none", text="none", out=str(tmp_path), **arguments)
    assert not list(tmp_path.iterdir())
