"""What a report holds, and what it must not."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import torch

from helpers import reports as cases
from lp_dist.report import console, environment, numbers, page, schema
from lp_dist.sparsity.measure import Histogram
from lp_dist.training import arguments


def test_a_histogram_is_trimmed_and_keeps_every_weight():
    edges = (1.0, 2.0, 4.0, 8.0, 16.0)
    before = Histogram(edges, {"a": [0, 3, 0, 0], "b": [0, 1, 0, 0]}, {"a": 0, "b": 1})
    after = Histogram(edges, {"a": [0, 0, 1, 0], "b": [0, 1, 1, 0]}, {"a": 2, "b": 0})
    assert schema.histograms(before, after) == {
        "edges": [2.0, 4.0, 8.0],
        "before": [4, 0],
        "after": [1, 2],
        "zeros_before": 1,
        "zeros_after": 2,
    }
    nothing = Histogram((1.0, 2.0), {"a": [0]}, {"a": 4})
    assert schema.histograms(nothing, nothing) == {
        "edges": [1.0],
        "before": [],
        "after": [],
        "zeros_before": 4,
        "zeros_after": 4,
    }


def test_what_another_run_shows_of_a_report_is_enough_to_draw_it(monkeypatch):
    log = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "grad_norm": 1.0}, *cases.full()["log"][-2:]]
    compared = schema.to_compare(cases.bare() | {"log": log})
    assert compared == json.loads(json.dumps(compared))
    assert (
        compared["log"] == [{"step": 1, "loss": 2.0}, {"step": 16, "eval_perplexity": 12.0}]
        and schema.name_of(compared) == "compared run"
    )
    monkeypatch.setattr("lp_dist.report.figures.DRAWINGS", ())
    assert "compared run 12.00" in page.build(cases.full() | {"reference": compared})


@pytest.mark.parametrize(
    "value, shown", [(None, "not measured"), (1234.567, "1,234.57"), ("nan", "nan"), ("inf", "inf"), (2e7, "2e+07")]
)
def test_a_perplexity_is_for_people(value, shown, capsys):
    assert numbers.perplexity(value) == shown
    console.show(
        cases.full() | {"perplexity_before": value, "perplexity_after": value, "reference": None}
    )  # ends no run with an error
    assert shown in capsys.readouterr().out


def test_the_environment_is_of_the_device_that_trains_and_names_no_host():
    import platform

    machine = environment.environment(torch.device("cpu"), 3)
    assert (machine["device"], machine["ranks"], machine["threads"], machine["processor"]) == (
        "CPU",
        3,
        torch.get_num_threads(),
        environment.processor(),
    )
    assert platform.node() not in json.dumps({**machine, "processor": ""})


@pytest.fixture
def parsed(tmp_path):
    def parse(*words: str) -> tuple:
        return arguments.parse(
            ["--model", "m", "--dataset", "d", "--output_dir", str(tmp_path), "--use_cpu", "true", *words]
        )

    return parse


def test_the_configuration_is_what_is_not_the_default(parsed, tmp_path):
    configuration = arguments.chosen(
        *parsed(
            "--sparsity",
            "0.5",
            "--latent_windows",
            "0",
            "--p",
            "0.5",
            "--seed",
            "0",
            "--lr_scheduler_type",
            "cosine",
            "--logging_steps",
            "3",
            "--lr_scheduler_kwargs",
            '{"num_cycles": 2}',
            "--bf16",
            "true",
            "--report_to",
            "none",
        )
    )
    derived = {"dataloader_pin_memory": False}  # by Transformers, on a CPU
    assert configuration == {
        "model": "m",
        "dataset": "d",
        "sparsity": 0.5,
        "latent_windows": 0.0,
        "output_dir": str(tmp_path),
        "lr_scheduler_type": "cosine",
        "seed": 0,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "logging_steps": 3,
        "bf16": True,
        "use_cpu": True,
        **derived,
    }
    assert configuration == json.loads(json.dumps(configuration))


def test_a_secret_is_in_no_report(parsed, monkeypatch):
    words = ["--hub_token", "hf_secret", "--include_num_input_tokens_seen", "true"]
    *_, training = given = parsed(*words)
    assert (
        "hf_secret" not in json.dumps(arguments.chosen(*given))
        and arguments.chosen(*given)["include_num_input_tokens_seen"] == "all"
    )
    for spelt in (words, ["--hub-token=hf_secret"], ["--hub_tok", "hf_secret"]):
        monkeypatch.setattr(sys, "argv", ["lp-dist", "finetune", *spelt, "--overrides", '{"*": {"p": 0}}'])
        line = arguments.command_line(training)
        assert (
            "hf_secret" not in line
            and shlex.split(line)[:2] == ["lp-dist", "finetune"]
            and shlex.split(line)[-1] == '{"*": {"p": 0}}'
        )
        assert len(shlex.split(line)) == 4 + len(spelt)


def test_tables_and_lines_are_printed_as_they_are(capsys):
    console.print_table("Title", ("name", "share"), [("a", "1.00 %"), ("bb", "40.00 %")], width=150)
    console.say("[bold] is no markup, and a long line is not cut: " + 200 * "x")
    title, *table, line = capsys.readouterr().out.splitlines()
    assert title.strip() == "Title" and line.startswith("[bold] is") and line.endswith(200 * "x")
    assert [cell.strip("│ ") for cell in table[3:5]] == ["a    │  1.00 %", "bb   │ 40.00 %"]


def test_a_percentage_is_printed_in_one_way():
    assert [numbers.percent(0.4), numbers.percent(1 / 3, 1), numbers.percent(0.005, 0)] == ["40.00 %", "33.3 %", "0 %"]
