"""Recipes and configs that someone sent: whatever is in them, they end in arguments or in one line, and let no code
run.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.damage import altered, damaged, is_taken
from lp_dist.errors import UsageError
from lp_dist.training import arguments

RECIPE = {
    "model": "m",
    "dataset": "d",
    "output_dir": "o",
    "sparsity": 0.5,
    "groups": ["channels"],
    "group_sparsity": 0.3,
    "learning_rate": 1e-3,
    "max_steps": 100,
    "bf16": False,
    "overrides": {"*.0.*": {"p": 0.0}},
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where a run would write, if it began."""
    monkeypatch.chdir(tmp_path)


def recipe_of(content: Any, directory: Path) -> list[str]:
    file = directory / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return [str(file)]


def parsed(argv: list[str]) -> Any:
    try:
        return arguments.parse(argv)
    except SystemExit as error:  # of argparse, which has printed a line of its own
        if error.code == 2:
            raise UsageError("a value of another type; correct it") from None


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "must be one mapping of keys to values"),
        (b"- model", "must be one mapping of keys to values"),
        (b"model: [", "is no YAML"),
        (b"\x87\xff", "is no YAML"),
        (b"model: !!python/object/apply:os.mkdir ['it ran']", "is no YAML .*could not determine a constructor"),
        (b"model: !!timestamp a", "is no YAML"),
        (b"[" * 1500, "is no YAML"),
        (b"? [a]\n: 1", "is no YAML"),
        (b"1: 2", "has the key 1, which is no argument"),
        (b"'a b': 2", "has the key 'a b', which is no argument"),
        (b"'model=x --overwrite': 2", "which is no argument"),
        (b"model: --overwrite", "has model: '--overwrite', which would be another argument"),
        (b"groups: [channels, --trust_remote_code]", "which would be another argument"),
        (b"max_steps: 0x" + b"f" * 5000, "holds what is no argument: reading it ended with ValueError"),
        (b"overrides: {a: !!binary aaaa}", "holds what is no argument: reading it ended with TypeError"),
        (b"a: &a [" + b"x," * 9 + b"]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
        ), "comes to more than 10,000 values, by aliases perhaps"),
        (b"a: &a [*a]", "comes to more than 10,000 values"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_recipe_that_is_none_ends_in_one_line(content, words, tmp_path):
    with pytest.raises(UsageError, match=words) as caught:
        parsed(recipe_of(content, tmp_path))
    assert "\n" not in str(caught.value) and not (tmp_path / "it ran").exists()


def test_a_directory_that_no_file_system_can_have_ends_in_one_line():
    argv = ["--model", "m", "--dataset", "d", "--sparsity", "0.5", "--output_dir", "1" * 400]
    with pytest.raises(UsageError, match=r"--output_dir 1{100} can't be read \(File name too long\); name another"):
        arguments.parse(argv)


@pytest.mark.parametrize("key", ["trust_remote_code", "trust-remote-code", "trust_pickles", "trust_p", "t"])
def test_a_recipe_is_a_file_and_lets_no_file_run_code(key, tmp_path):
    with pytest.raises(UsageError, match=rf"has {key}: True, which lets files run code.*on the command line"):
        parsed(recipe_of({**RECIPE, key: True}, tmp_path))
    for value in ("yes", 1, [True], None):
        with pytest.raises(UsageError, match="which lets files run code"):
            parsed(recipe_of({**RECIPE, key: value}, tmp_path))


def test_the_command_line_does(tmp_path):
    recipe = recipe_of({**RECIPE, "trust_remote_code": False}, tmp_path)
    assert not parsed(recipe)[0].trust_remote_code and not parsed(recipe)[0].trust_pickles
    assert parsed([*recipe, "--trust_pickles", "true"])[0].trust_pickles
    assert parsed([*recipe, "--trust-pickles"])[0].trust_pickles


@pytest.mark.parametrize("flag", ["deepspeed", "fsdp_config", "accelerator_config"])
@pytest.mark.parametrize(
    "content, words", [("[]", "holds a list and no object of JSON"), ('{"a": ', "is no JSON"), ("", "is no JSON")]
)
def test_a_config_that_is_none_is_named(flag, content, words, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=rf"config.json {words}"):
        parsed([*recipe_of(RECIPE, tmp_path), f"--{flag}", str(tmp_path / "config.json")])
    with pytest.raises(UsageError, match=rf"config.json {words}"):
        parsed([*recipe_of(RECIPE, tmp_path), f"--{flag.replace('_', '-')}={tmp_path / 'config.json'}"])


@pytest.mark.parametrize(
    "config", [{"zero_optimization": [1]}, {"zero_optimization": 3}, {"fp16": 7, "zero_optimization": {"stage": "a"}}]
)
def test_a_deepspeed_config_of_wrong_types_ends_in_one_line(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    is_taken(lambda: parsed([*recipe_of(RECIPE, tmp_path), "--deepspeed", str(tmp_path / "config.json")]))


def fuzzed(directory: Path, rounds: int, seed: int) -> int:
    """How many of the altered recipes are taken."""
    chance, taken = random.Random(seed), 0
    for _ in range(rounds):
        content: Any = altered(RECIPE, chance)
        if chance.random() < 0.5:
            content = damaged(yaml.safe_dump(content).encode(), chance)
        argv = recipe_of(content, directory)
        taken += is_taken(lambda: parsed(argv))
    return taken


def test_what_is_altered_anywhere_is_taken_or_refused(tmp_path, capsys):
    taken = fuzzed(tmp_path, 100, 0)
    assert 2 <= taken <= 60
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], "nothing is written"


@pytest.mark.long
def test_altered_in_many_more_ways(tmp_path, capsys):
    fuzzed(tmp_path, 2000, int(os.environ.get("LP_DIST_SEED", random.randrange(10_000))))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], "nothing is written"
