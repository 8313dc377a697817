"""`lp-dist bench scale`: the rows and the page of a tiny run, and what does not grow with the number of ranks.

No test checks a time.
"""

from __future__ import annotations

import math

import pytest

from helpers.commands import lp_dist_here
from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.scale import command
from lp_dist.benchmarks.scale.models import MODELS, shard
from lp_dist.benchmarks.scale.page import markdown
from lp_dist.benchmarks.scale.simulation import PHASES, SHARDINGS, Configuration, fake_ranks, materialise, measure
from lp_dist.errors import UsageError
from lp_dist.optim.batching import local_values

FSDP2, TENSOR_PARALLEL = SHARDINGS


# One of each kind, so that the run is short.
SOME = [
    Configuration("tiny", 8, 1, FSDP2, "channels", is_cut=True, layers=2),
    Configuration("tiny", 8, 0, TENSOR_PARALLEL, "weights", is_cut=True),
    Configuration("tiny-mixture", 8, 0, FSDP2, "experts", is_cut=True, experts=4),
    Configuration("tiny", 8, 0, FSDP2, "weights", is_cut=False),
]


@pytest.mark.parametrize(
    "configurations", [pytest.param(SOME, id="some"), pytest.param(None, id="all", marks=pytest.mark.long)]
)
def test_a_tiny_run_has_all_its_rows_and_tables(configurations, monkeypatch, tmp_path, capsys):
    models, planned = ["tiny", "tiny-mixture"], command.planned
    monkeypatch.setattr(command, "in_process", measure)  # a process for each takes seconds to begin
    monkeypatch.setattr(command, "planned", lambda *args: configurations or planned(*args))
    words = ("bench", "scale", "--models", " ".join(models), "--ranks", "8", "--out", str(tmp_path))
    code = lp_dist_here(monkeypatch, *words)
    header, *rows = json_lines.read(tmp_path / "scale.jsonl")
    assert not code and header["command"] == "lp-dist bench scale --models tiny,tiny-mixture --ranks 8"
    assert len(rows) == (len(configurations) if configurations else 12 + 14)
    assert not any("skipped" in row for row in rows)
    for row in rows:
        assert 0 < row["elements"] < row["parameters"]
        assert all(seconds > 0.0 for seconds in row["seconds"].values())
        if row["is_cut"]:
            assert all(row["collectives"][phase]["allreduce_"][0] for phase in ("attach", "update", "final pruning"))
        else:
            assert row["bytes"]["training state"] == 16 * row["elements"] and {*PHASES} == {*row["bytes"]["beyond"]}
            assert max(row["bytes"]["beyond"].values()) > 0
    page = (tmp_path / "scale.md").read_text()
    assert page == markdown(header, rows)
    assert "## Memory" in page and "| tiny Llama | FSDP2 × TP | weights | 8 |" in page
    if configurations is None:
        assert "| tiny Qwen3-MoE | FSDP2 | experts | 8 | 4 | 4 |" in page
        assert "Growth with layers and experts" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["weights", pytest.param("channels", marks=pytest.mark.long)])
def test_what_is_sent_does_not_grow_with_the_ranks(target):
    few, many = (measure(Configuration("tiny", ranks, 1, FSDP2, target, is_cut=True)) for ranks in (4, 64))
    assert few["collectives"] == many["collectives"]
    halved = measure(Configuration("tiny", 4, 1, FSDP2, target, is_cut=True, layers=2))
    of_update = [row["collectives"]["update"]["allreduce_"][1] for row in (few, halved)]
    assert of_update[0] > of_update[1], "it grows with the parameters, so it is seen"


def test_a_cut_leaves_shapes_and_the_first_rows():
    with fake_ranks(1, 4):
        model = MODELS["tiny"].build(layers=1)
        shard(model, 4, tensor_parallel=False)
        shapes = {name: param.shape for name, param in model.named_parameters()}
        materialise(model, 200)
        assert {name: param.shape for name, param in model.named_parameters()} == shapes
        layer = model.model.layers[0]
        local = [local_values(w).shape for w in (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)]
        assert local == [(3, 64), (1, 128)] and local_values(layer.mlp.up_proj.weight.grad).shape == (3, 64)


@pytest.mark.long
def test_an_error_is_a_row_and_stands_on_the_page():
    row = command.in_process(Configuration("tiny", 6, 0, TENSOR_PARALLEL, "weights", is_cut=True))
    header = {"command": "c", "machine": "m", "cores": 2, "versions": {"torch": "2"}, "date": "d"}
    page = markdown(header, [row])
    assert (
        row["skipped"] and f"| tiny Llama | FSDP2 × TP | weights | 6 | 0 | {row['skipped'].splitlines()[0]} |" in page
    )


def test_models_are_sharded_over_the_ranks_that_they_fit_on():
    assert {c.ranks for c in command.planned(["70B"], [64, 256, 512])} == {256, 512}
    mixture = command.planned(["235B"], [512, 1024])
    assert {c.rank for c in mixture if c.ranks == 1024} == {0, 512, 1023}
    assert {c.experts for c in mixture} == {None, 64} and {c.layers for c in mixture} == {None, 47}
    sizes = {name: sum(math.prod(p.shape) for p in MODELS[name].build().parameters()) for name in ("8B", "235B")}
    assert sizes == {"8B": 8_030_261_248, "235B": 235_093_634_560}


@pytest.mark.parametrize(
    ("models", "ranks", "message"),
    [
        ("9B", "64", "--models 9B: there is no .*9B.*; there are 8B, 70B, 235B"),
        ("8B", "many", "--ranks many: these must be numbers"),
        ("8B", "1", "--ranks 1: a number of ranks is at least 2"),
        ("8B 70B", "32", "none of the models fits on so few ranks; 8B needs 64, 70B needs 256"),
    ],
)
def test_options_that_cannot_be_read_are_refused(models, ranks, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        command.scale(models=models, ranks=ranks, out=str(tmp_path))
    assert not any(tmp_path.iterdir())
