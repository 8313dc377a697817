"""What can't be exported ends with one line that says what it is and what to do, and the command prints what was
gained.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import changed, rewritten

from lp_dist import cli
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.writer import export


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def sharded(model: Path) -> None:
    export(model, model.parent / "sharded", shard_size="40KB")
    shutil.rmtree(model)
    (model.parent / "sharded").rename(model)


def without_a_shard(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00006.safetensors").unlink()


def without_index(model: Path) -> None:
    without_a_shard(model)
    (model / "model.safetensors.index.json").unlink()


def with_an_index_of_more(model: Path) -> None:
    sharded(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.more"] = "model-00001-of-00006.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(name: str, to: int) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:to])


def pickled(name: str, **options: Any) -> Callable[[Path], Any]:
    def write(model: Path) -> None:
        torch.save(load_file(model / "model.safetensors"), model / name, **options)
        (model / "model.safetensors").unlink()

    return write


def adapter(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")


def in_8_bits(model: Path) -> None:
    save_file({"w": torch.zeros(3).to(torch.float8_e4m3fn)}, model / "model.safetensors")


@pytest.mark.parametrize(
    "change, parts",
    [
        (shutil.rmtree, ["there is no ", "hf download"]),
        (lambda model: (shutil.rmtree(model), model.write_text("")), ["is no directory"]),
        (lambda model: (model / "model.safetensors").unlink(), ["holds no weights"]),
        (lambda model: changed(model, quantization_config={"quant_method": "gptq"}), ["(gptq)", "dequantize()"]),
        (lambda model: changed(model, quantization_config={"load_in_8bit": True}), ["quantized", "dequantize()"]),
        (lambda model: changed(model, sparsity_config={"format": "sparse-bitmask"}), ["(sparse-bitmask)"]),
        (lambda model: changed(model, compression_config={"format": "pack-quantized"}), ["(pack-quantized)"]),
        (in_8_bits, ["dtype F8_E4M3", "dequantise"]),
        (adapter, ["an adapter and no model", "lp-dist merge"]),
        (without_a_shard, ["model-00002-of-00006.safetensors, which is not there (1 of 6 files are missing)", "anew"]),
        (without_index, ["not all 6 files of its set", "anew"]),
        (with_an_index_of_more, ["none of the 6 files", "holds model.more", "anew"]),
        (cut("model.safetensors", -1), ["no complete safetensors file", "anew"]),
        (cut("model.safetensors", 5), ["no complete safetensors file", "anew"]),
        (cut("model.safetensors", 0), ["no complete safetensors file", "anew"]),
        (cut("config.json", 20), ["config.json is no JSON", "anew"]),
        (
            pickled("pytorch_model.bin", _use_new_zipfile_serialization=False),
            ["no complete file of torch.save", "anew"],
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_source_that_is_no_model_or_not_complete(change, parts, model, tmp_path):
    change(model)
    with pytest.raises(UsageError) as caught:
        export(model, tmp_path / "out")
    assert all(part in str(caught.value) for part in parts) and str(model) in str(caught.value), caught.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_that_another_program_zipped_anew_is_refused_since_its_tensors_are_not_where_torch_has_them(
    compression, model, tmp_path
):
    pickled("whole.bin")(model)
    with (
        zipfile.ZipFile(model / "whole.bin") as whole,
        zipfile.ZipFile(model / "pytorch_model.bin", "w", compression) as anew,
    ):
        for name in whole.namelist():
            anew.writestr(name, whole.read(name))
    with pytest.raises(UsageError, match="does not tell where .*pytorch_model.bin has its tensors"):
        export(model, tmp_path / "out")


def test_from_pretraineds_order_holds_where_a_directory_has_weights_of_several_kinds(model, tmp_path):
    torch.save({"w": torch.ones(1)}, model / "pytorch_model.bin")
    assert "w" not in open_checkpoint(model).entries
    shutil.copytree(model, tmp_path / "other")
    (model / "model.safetensors").unlink()
    save_file({"v": torch.ones(1)}, model / "adapter_model.safetensors")
    assert [*open_checkpoint(model).entries] == ["w"]
    (tmp_path / "other" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "pytorch_model.bin"}}')
    assert "w" not in open_checkpoint(tmp_path / "other").entries


@pytest.mark.parametrize(
    "more, parts",
    [
        ({"dtype": "int8"}, ["--dtype int8", "bfloat16"]),
        ({"shard_size": "big"}, ["--shard-size big", "500MB"]),
        ({"shard_size": "-1GB"}, ["--shard-size -1GB"]),
        ({"masters": True}, ["no checkpoint of an engine", "--masters"]),
        ({"config": "nobody/nothing"}, ["--config nobody/nothing", "hub"]),
        ({"config": "."}, ["--config . has no config.json"]),
    ],
)
def test_bad_arguments(more, parts, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        export(model, tmp_path / "out", **more)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_accelerates_pickled_weights_of_fsdp_are_taken_as_an_engines(model, tmp_path):
    pickled("pytorch_model_fsdp.bin")(model)
    assert open_checkpoint(model).live and export(model, tmp_path / "out", verified=True).verified["logits"]


def run_cli(monkeypatch: Any, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["lp-dist", "export", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_the_command_prints_sizes_zeros_and_where_it_is(model, tmp_path, capsys, monkeypatch):
    rewritten(model, lambda tensors: [t.view(-1)[::2].zero_() for name, t in tensors.items() if "norm" not in name])
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out[1]"
    assert run_cli(monkeypatch, str(model), str(out), "--dtype", "bfloat16", "--shard_size", "1MB", "--verify") == 0
    told = capsys.readouterr().out
    numel = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    zeros = (numel - 5 * 48) // 2
    assert (
        "From safetensors" in told
        and f"{zeros:,} of {numel:,} weights are exactly zero ({zeros / numel:.2%}), in 20 tensors, 1 file." in told
    )
    before, after = (line.split() for line in told.splitlines() if "before" in line or "after" in line)
    assert before[-4:-2] == [f"{4 * numel / 1000:.1f}", "kB"] and after[3:5] == [
        f"{(out / 'model.safetensors').stat().st_size / 1000:.1f}",
        "kB",
    ]
    assert (
        "20 tensors are the checkpoint's bit for bit, and so are " in told
        and f"Saved to {out}; loads with from_pretrained." in told
    )
    assert "small for" not in told
    assert run_cli(monkeypatch, str(out), str(tmp_path / "compact"), "--compact", "--shard-size", "20KB") == 0
    told = capsys.readouterr().out
    size = sum(file.stat().st_size for file in (tmp_path / "compact").glob("compact-*"))
    assert (
        "compact form" in told
        and f"{size / (2 * numel):.1%}" in told
        and f"lp-dist export {tmp_path / 'compact'} OUT gives" in told
    )
    assert 0.5 < size / (2 * numel) < 0.65


def test_the_command_says_in_one_line_what_is_wrong(model, tmp_path, capsys, monkeypatch):
    assert run_cli(monkeypatch, str(tmp_path / "nowhere"), str(tmp_path / "out")).startswith(
        "lp-dist: error: there is no "
    )
    rewritten(model, lambda tensors: tensors["model.norm.weight"].copy_(torch.tensor([1e-9] + [1.0] * 47)))
    assert run_cli(monkeypatch, str(model), str(tmp_path / "out"), "--dtype", "float16") == 0
    assert "1 of these were too small for the new dtype" in capsys.readouterr().out
    assert "--overwrite" in run_cli(monkeypatch, str(model), str(tmp_path / "out"))
    monkeypatch.setattr(
        "lp_dist.export.writer._copy_along",
        lambda *_: (
            shutil.copyfile(model / "config.json", tmp_path / "out.partial" / "config.json")
            and changed(tmp_path / "out.partial", intermediate_size=95)
        ),
    )
    code = run_cli(monkeypatch, str(model), str(tmp_path / "out"), "--verify", "--overwrite")
    assert (
        code.startswith("lp-dist: error: ")
        and "mismatched keys" in code
        and "\n" not in code
        and (tmp_path / "out.partial").exists()
    )
