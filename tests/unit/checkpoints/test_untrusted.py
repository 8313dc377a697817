"""Checkpoints that someone sent: no code of theirs runs, no name leads out of the directory, and what is damaged ends
in one line, whatever is damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import FORMS, WEIGHTS, model_states, tagged, zero2
from helpers.commands import lp_dist_here
from helpers.damage import Touching, files_of, fuzz
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.report.inspection import inspect

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(params=FORMS)
def checkpoint(request, tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    FORMS[request.param](directory)
    return directory


def all_read(directory: Path, **more: Any) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in open_checkpoint(directory, **more).entries.items()}


def test_every_form_gives_the_weights(checkpoint):
    weights = all_read(checkpoint)
    assert weights.keys() == WEIGHTS.keys() and all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


# --- code in pickles ---


CARRIERS = ("alone", "beside the weights", "in place of a weight")


def with_code(directory: Path, file: Path, carrier: str, marker: Path) -> None:
    """Puts an object that makes `marker` when it is unpickled into a file of the checkpoint."""
    code: Any = Touching(marker)
    if file.name == ".metadata":
        index = pickle.loads((directory / file).read_bytes())
        if carrier == "beside the weights":
            index.planner_data, code = code, index
        elif carrier == "in place of a weight":
            index.state_dict_metadata["a.weight"], code = code, index
        (directory / file).write_bytes(pickle.dumps(code))
        return
    content = torch.load(directory / file, weights_only=True)
    if carrier == "beside the weights":
        content = {**content, "more": code}
    elif carrier == "in place of a weight":
        content = {**content, next(iter(content)): code}
    else:
        content = code
    torch.save(content, directory / file)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_no_code_of_a_checkpoint_runs_unless_it_is_trusted(checkpoint, carrier, tmp_path):
    pickles = [file for file in files_of(checkpoint) if file.suffix in (".pt", ".bin") or file.name == ".metadata"]
    for file in pickles:
        sent, marker = tmp_path / "sent", tmp_path / "it ran"
        shutil.copytree(checkpoint, sent)
        with_code(sent, file, carrier, marker)
        with pytest.raises(UsageError, match=r"names posix.mkdir, whose code would run .*--trust-pickles"):
            open_checkpoint(sent)
        assert not marker.exists()
        with contextlib.suppress(UsageError):  # what came of the code is no checkpoint
            open_checkpoint(sent, trust_pickles=True)
        assert marker.exists(), f"{file} of {files_of(checkpoint)}"
        marker.rmdir()
        shutil.rmtree(sent)


def test_code_in_the_data_of_a_distributed_checkpoint_does_not_run(tmp_path):
    FORMS["distributed"](tmp_path)
    marker = tmp_path / "it ran"
    (data,) = tmp_path.glob("*.distcp")
    size = data.stat().st_size
    torch.save(Touching(marker), data)
    data.write_bytes(data.read_bytes().ljust(size, b"\0"))
    with pytest.raises(UsageError, match="is damaged: reading it ended with"):
        all_read(tmp_path)
    assert not marker.exists()


def test_the_commands_say_so_in_one_line(tmp_path, monkeypatch):
    zero2(tmp_path)
    marker = tmp_path / "it ran"
    with_code(tmp_path, Path("step3/mp_rank_00_model_states.pt"), "beside the weights", marker)
    for words in (("inspect", str(tmp_path)), ("export", str(tmp_path), str(tmp_path / "out"))):
        message = lp_dist_here(monkeypatch, *words)
        assert message.startswith("lp-dist: error: ") and "names posix.mkdir" in message and "\n" not in message
        assert not marker.exists() and not (tmp_path / "out").exists()
        lp_dist_here(monkeypatch, *words, "--trust-pickles")
        assert marker.exists()
        marker.rmdir()


def test_what_engines_and_scripts_write_besides_weights_is_passed_over(tmp_path):
    """Loss scalers, random states of numpy, enums: no class of theirs is made."""
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    zero2(tmp_path)
    file = tagged(tmp_path) / "mp_rank_00_model_states.pt"
    scaler = DynamicLossScaler(2**16, 2.0, 1000, 1, 1, False, torch.float16)
    extras = [scaler, np.random.RandomState(3).get_state(), ZeroStageEnum(2), fragment_address(3, 4), np.float64(0.5)]
    torch.save({**torch.load(file), "more": extras}, file)
    assert all_read(tmp_path).keys() == WEIGHTS.keys()


# --- names that lead out ---


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "x/../../secret", "", "a\0b"])
def test_names_that_lead_out_of_the_directory_are_refused(name, tmp_path):
    (tmp_path / "secret").mkdir()
    save_file(WEIGHTS, tmp_path / "secret" / "model.safetensors")
    where = {}
    for form in ("sharded", "zero2", "universal", "distributed"):
        where[form] = tmp_path / form
        where[form].mkdir()
        FORMS[form](where[form])
    index = {"weight_map": {"a.weight": name}}
    (where["sharded"] / "model.safetensors.index.json").write_text(json.dumps(index))
    (where["zero2"] / "latest").write_text(name)
    shapes = [{name: torch.Size([5, 7])}]
    torch.save(model_states(param_shapes=shapes), where["universal"] / "step3" / "mp_rank_00_model_states.pt")
    metadata = pickle.loads((where["distributed"] / ".metadata").read_bytes())
    for storage in metadata.storage_data.values():
        storage.relative_path = name
    (where["distributed"] / ".metadata").write_bytes(pickle.dumps(metadata))
    for directory in where.values():
        with pytest.raises(UsageError, match="which is no file within the checkpoint"):
            open_checkpoint(directory)


# --- sizes that are not there ---


def huge_safetensors(directory: Path) -> None:
    header = {"a.weight": {"dtype": "F32", "shape": [2**40, 7], "data_offsets": [0, 140]}}
    octets = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(octets)) + octets + bytes(140))


def huge_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + bytes(140))


def huge_pickle(directory: Path) -> None:
    torch.save({"a.weight": torch.zeros(1).expand(2**40)}, directory / "pytorch_model.bin")


def huge_distributed(directory: Path) -> None:
    FORMS["distributed"](directory)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.state_dict_metadata["a.weight"].size = torch.Size([2**40, 7])
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def huge_bitmask(directory: Path) -> None:
    shapes = {"b.weight": [2**30, 2**20]}
    tensors = {"b.weight.bitmask": torch.zeros(3, dtype=torch.uint8), "b.weight.values": torch.zeros(0)}
    save_file(tensors, directory / "bitmask.safetensors", {"lp_dist.bitmask": json.dumps(shapes)})


def huge_zero(directory: Path) -> None:
    zero2(directory)
    shapes = [{"a.weight": torch.Size([2**40, 7])}]
    torch.save(model_states(param_shapes=shapes), directory / "step3" / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize(
    "make", [huge_safetensors, huge_header, huge_pickle, huge_distributed, huge_bitmask, huge_zero]
)
def test_sizes_are_checked_against_the_files_before_anything_is_allocated(make, tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError):
        open_checkpoint(tmp_path)


# --- configurations ---

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "holds a list and no object of JSON"),
        ("null", "holds a NoneType and no object of JSON"),
        ('{"architectures": ["Ll', "is no JSON"),
        (b"\x87\xff", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ({**CONFIG, "architectures": 3}, None),
        ({**CONFIG, "quantization_config": 7}, "is damaged"),
        ({**CONFIG, "hidden_size": 2**45}, None),
        ({**CONFIG, "hidden_size": "a"}, None),
        ({**CONFIG, "model_type": "nosuch"}, None),
        ({**CONFIG, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}, None),
    ],
)
def test_a_configuration_of_any_content_runs_nothing_and_ends_in_one_line_or_in_the_count(content, words, tmp_path):
    directory, marker = tmp_path / "checkpoint", tmp_path / "it ran"
    directory.mkdir()
    FORMS["safetensors"](directory)
    content = json.dumps(content) if isinstance(content, dict) else content
    (directory / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    (directory / "code.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    for call in (lambda: inspect(directory), lambda: export(directory, tmp_path / "out", overwrite=True)):
        with pytest.raises(UsageError, match=words) if words else contextlib.suppress(UsageError):
            call()
        assert not marker.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", "out"}, "written inside OUT alone"


# --- fuzzing ---


def test_what_is_damaged_is_read_or_refused_and_nothing_else(checkpoint, tmp_path):
    refused, _ = fuzz(checkpoint, tmp_path / "scratch", 60, 0, all_read)
    assert refused >= 20


@pytest.mark.long
def test_damaged_in_many_more_ways(checkpoint, tmp_path):
    seed = int(os.environ.get("LP_DIST_SEED", random.randrange(10_000)))
    refused, _ = fuzz(checkpoint, tmp_path / "scratch", 500, seed, all_read)
    assert refused >= 200, f"seed {seed}"


def test_an_index_that_asks_for_objects_of_elsewhere_is_refused_in_one_line(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02K\x00Q.")  # a persistent id: torch's words for it are of two lines
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UsageError, match="is not complete .*; copy the checkpoint anew") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()


def test_a_name_that_a_terminal_would_obey_is_refused(tmp_path):
    save_file({"a\x1b[2J.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"holds a tensor called 'a\\x1b\[2J.weight', as no model does") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
