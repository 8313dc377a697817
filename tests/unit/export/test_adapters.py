"""Adapters that someone sent: whatever is in their files, they are merged or end in one line, run no code, and take no
memory that their files do not have.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.damage import Touching, fuzz
from helpers.lora import KINDS, llama
from lp_dist.errors import UsageError
from lp_dist.export.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    llama(0.4).save_pretrained(directory)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    import peft

    directory = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(llama(0.4), KINDS["LoRA"])
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.fill_(0.5)
    model.save_pretrained(directory)
    return directory


def sent(adapter: Path, directory: Path, **changes) -> Path:
    shutil.copytree(adapter, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return directory


def as_pickle(directory: Path, **more) -> None:
    file = directory / "adapter_model.safetensors"
    torch.save({**load_file(file), **more}, directory / "adapter_model.bin")
    file.unlink()


def test_a_pickled_adapter_gives_the_same_model(base, adapter, tmp_path):
    merge(base, adapter, tmp_path / "safe")
    as_pickle(sent(adapter, tmp_path / "pickled"))
    merge(base, tmp_path / "pickled", tmp_path / "out")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("safe", "out")]
    assert weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][n], weights[1][n]) for n in weights[0]
    )


def test_code_in_a_pickled_adapter_does_not_run(base, adapter, tmp_path):
    as_pickle(sent(adapter, tmp_path / "sent"), more=Touching(tmp_path / "it ran"))
    with pytest.raises(UsageError, match="names posix.mkdir, whose code would run"):
        merge(base, tmp_path / "sent", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sent"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": "8"}, "is not there, or not one of"),
        ({"r": -1}, "is not there, or not one of"),
        ({"peft_type": "../../x"}, "is not there, or not one of"),
        ({"target_modules": 3}, "is not there, or not one of"),
        ({"target_modules": "("}, "is not there, or not one of"),
        ({"r": 2**40}, "is not there, or not one of"),
        ({"r": 2**22}, "is not there, or not one of"),
        ({"alora_invocation_tokens": [1]}, "can't be merged: merging it ended with NotImplementedError"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "is of an adapter for Megatron"),
    ],
    ids=str,
)
def test_a_config_of_any_content_ends_in_one_line(base, adapter, changes, words, tmp_path):
    sent(adapter, tmp_path / "sent", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=words) as caught:
        merge(base, tmp_path / "sent", tmp_path / "out")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} KiB: what the config gives as sizes was not to be made"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sent"]


def test_an_adapter_that_lacks_weights_is_refused(base, adapter, tmp_path):
    file = sent(adapter, tmp_path / "sent") / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(UsageError, match="has no weights for .*lora_A.*, which its adapter_config.json adds"):
        merge(base, tmp_path / "sent", tmp_path / "out")


def test_a_tokenizer_whose_template_leads_out_writes_nothing_there(base, adapter, tmp_path):
    """It is copied, and not saved anew, which would write a file for each template."""
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    templates = [{"name": name, "template": "x"} for name in ("default", "../../../climbed")]
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps({**config, "chat_template": templates}))
    merge(tmp_path / "base", adapter, tmp_path / "a" / "out")
    assert (tmp_path / "a" / "out" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.rglob("*climbed*")) and not list(tmp_path.parent.rglob("*climbed*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def fuzzed(base: Path, adapter: Path, tmp_path: Path, rounds: int, seed: int) -> tuple[int, int]:
    return fuzz(
        adapter,
        tmp_path / "scratch",
        rounds,
        seed,
        lambda directory: merge(base, directory, tmp_path / "out", overwrite=True),
        of=lambda file: file.name.startswith("adapter_"),
    )


def test_what_is_damaged_is_merged_or_refused_and_nothing_else(base, adapter, tmp_path):
    refused, _ = fuzzed(base, adapter, tmp_path, 20, 0)
    assert refused >= 5 and {path.name for path in tmp_path.iterdir()} <= {"scratch", "out"}


@pytest.mark.long
def test_damaged_in_many_more_ways(base, adapter, tmp_path):
    seed = int(os.environ.get("LP_DIST_SEED", random.randrange(10_000)))
    refused, _ = fuzzed(base, adapter, tmp_path, 200, seed)
    assert refused >= 50 and {path.name for path in tmp_path.iterdir()} <= {"scratch", "out"}, f"seed {seed}"
