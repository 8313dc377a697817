"""The `lp-dist` command: the same program as `python -m lp_dist.finetune`."""

from __future__ import annotations

import json
import subprocess
import sys

from helpers.commands import lp_dist, lp_dist_here


def test_without_a_command_it_says_what_there_is():
    shown = lp_dist()
    assert (
        "finetune" in shown.stdout + shown.stderr and "[recipe.yaml] [--key value ...]" in shown.stdout + shown.stderr
    )


def test_finetune_takes_its_own_help_and_refuses_what_it_does_not_know(monkeypatch, capsys):
    assert lp_dist_here(monkeypatch, "finetune", "--help") in (0, None)
    assert "--precondition" in capsys.readouterr().out
    message = lp_dist_here(monkeypatch, "finetune", "--model", "m", "--dataset", "d", "--presicion", "1")
    assert message.startswith("lp-dist: error: ") and "--presicion" in message


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from lp_dist.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 1 and "'.[finetune]'" in shown.stderr and "Traceback" not in shown.stderr


def test_bench_counting_prints_one_row_of_json(monkeypatch, capsys):
    small = ("--layers", "1", "--hidden-size", "64", "--tokens", "8", "--repeats", "1")
    assert lp_dist_here(monkeypatch, "bench", "counting", *small) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["weights counted"] == 64 * 64 * 4 + 3 * 64 * 170 and set(row["seconds"]) == {
        "step",
        "count",
        "histogram",
    }
    assert row["share of 10 steps"] == row["seconds"]["count"] / (10 * row["seconds"]["step"]) > 0
    assert lp_dist_here(monkeypatch, "bench", "counting", "--repeats", "0") == 2
    assert "repeats" in capsys.readouterr().err
