"""Reports that someone sent: whatever is in them, they are drawn or end in one line. What is shown of them is text."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from helpers import reports as cases
from helpers.commands import lp_dist_here
from helpers.damage import altered, damaged, is_taken
from lp_dist.errors import UsageError
from lp_dist.report import console, page, schema


@pytest.mark.parametrize("make", [cases.full, cases.dense, cases.by_lambda, cases.bare, cases.stopped])
def test_reports_of_every_kind_are_taken(make, tmp_path):
    schema.write(tmp_path, make())
    assert schema.read(tmp_path) == json.loads(json.dumps(make()))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"zeros": "48"}, "has '48' for zeros, which no report has"),
        ({"zeros": None}, "has None for zeros"),
        ({"zeros": True}, "has True for zeros"),
        ({"steps": -1}, "has -1 for steps"),
        ({"kinds": {"q_proj": [3, 0]}}, "for kinds"),
        ({"kinds": {"q_proj": [3, 2]}}, "for kinds"),
        ({"tensors": {"a": [1, 2, 3]}}, "for tensors"),
        ({"log": [{"step": 3, "loss": "a"}]}, "for log"),
        ({"log": [{"step": "3"}]}, "for log"),
        ({"reference": {"log": []}}, "for reference"),
        ({"histograms": {**cases.full()["histograms"], "edges": [1.0]}}, "for histograms"),
        ({"target": {"sparsity": 0.3, "final_pruning": 3}}, "for target"),
        ({"window": [1]}, "has [1] for window"),
    ],
    ids=str,
)
def test_an_entry_of_another_type_is_named(change, words, tmp_path):
    schema.write(tmp_path, cases.full() | change)
    with pytest.raises(UsageError) as caught:
        schema.read(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", sorted(cases.full().keys() - {"seed", "learning_rate", "version"}))
def test_an_entry_that_is_missing_is_named(entry, tmp_path):
    """Also where it may be null, since a comparison and a page read it."""
    schema.write(tmp_path, {key: value for key, value in cases.full().items() if key != entry})
    with pytest.raises(UsageError, match=f"has nothing for {entry}, which no report has"):
        schema.read(tmp_path)


def fuzzed(directory: Path, rounds: int, seed: int) -> int:
    chance, taken = random.Random(seed), 0
    for _ in range(rounds):
        content = json.dumps(altered(cases.full(), chance)).encode()
        (directory / schema.FILE).write_bytes(damaged(content, chance) if chance.random() < 0.2 else content)
        taken += is_taken(lambda: schema.to_compare(schema.read(directory)))
        is_taken(lambda: page.draw_again(directory))
    return taken


def test_what_is_altered_anywhere_is_taken_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lp_dist.report.figures.DRAWINGS", ())  # which take a second
    taken = fuzzed(tmp_path, 150, 0)
    assert 20 <= taken <= 120
    assert {path.name for path in tmp_path.iterdir()} == {schema.FILE, page.FILE}


def test_so_are_its_figures(tmp_path):
    fuzzed(tmp_path, 4, 1)


@pytest.mark.long
def test_altered_in_many_more_ways(tmp_path):
    fuzzed(tmp_path, 150, int(os.environ.get("LP_DIST_SEED", random.randrange(10_000))))


def test_the_command_says_so_in_one_line(tmp_path, monkeypatch):
    for content in ("[" * 100_000, '{"version": 3}', b"\x87\xff"):
        (tmp_path / schema.FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
        message = lp_dist_here(monkeypatch, "report", str(tmp_path))
        assert message.startswith("lp-dist: error: ") and "\n" not in message
    schema.write(tmp_path, cases.full() | {"steps": 10**400})
    message = lp_dist_here(monkeypatch, "report", str(tmp_path))
    assert "is damaged: drawing it ended with OverflowError" in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == [schema.FILE]


def test_names_are_shown_as_text(tmp_path, capsys):
    name = "[/b]<script>alert(1)</script>$x^$"
    report = cases.full() | {"model": name, "kinds": {name: [1, 2]}, "tensors": {f"a.0.{name}.weight": [1, 2]}}
    report["reference"] = report["reference"] | {"output_dir": name}
    console.show(report)
    assert "[/b]<script>" in capsys.readouterr().out
    html = page.build(report)
    assert "<script>" not in html and "&lt;script&gt;" in html
