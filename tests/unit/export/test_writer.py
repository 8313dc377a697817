"""The export of a model's directory: its files, shards, dtypes and what goes along, what is refused, and that it is
written completely or not at all.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import lp_dist_here
from helpers.model_directories import changed, rewritten
from helpers.snapshots import as_bytes
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.report import schema

ALONG = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tool.jinja",
    "modeling_own.py",
    "preprocessor_config.json",
    "LICENSE",
}
NOT_ALONG = {
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "zero_to_fp32.py",
    "events.out.tfevents.1",
}


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def source(tiny_model, tmp_path) -> Path:
    """A finished run's directory, with all that such a one can hold, and with zeros in a matrix."""
    source = tmp_path / "run"
    shutil.copytree(tiny_model, source)
    rewritten(source, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][::2].zero_())
    (source / "additional_chat_templates").mkdir()
    (source / "tokenizer_before").mkdir()
    for name in (ALONG | NOT_ALONG) - {path.name for path in source.iterdir()}:
        (source / ("additional_chat_templates" if name == "tool.jinja" else "") / name).write_text("{}")
    changed(
        source,
        sparsity_config={"format": "dense"},
        own_config={"dtype": "float32"},
        auto_map={"AutoModelForCausalLM": "modeling_own.Own"},
    )
    (source / schema.FILE).write_text('{"zeros": 2304}')
    shutil.copytree(source, source / "checkpoint-6", ignore=shutil.ignore_patterns("checkpoint-6", schema.FILE))
    return source


def test_the_tensors_and_what_belongs_to_the_model_come_along_and_nothing_else(source, tmp_path):
    done = export(source, tmp_path / "out")
    assert {Path(name).name for name in files(done.out)} == ALONG | {"model.safetensors", schema.FILE}
    assert (done.out / "additional_chat_templates" / "tool.jinja").exists()
    written, wanted = load_file(done.out / "model.safetensors"), load_file(source / "model.safetensors")
    assert written.keys() == wanted.keys() and not [
        name for name in wanted if as_bytes(written[name]) != as_bytes(wanted[name])
    ]
    assert (
        done.counts["model.layers.0.mlp.up_proj.weight"] == (48 * 48, 96 * 48)
        and sum(zeros for zeros, _ in done.counts.values()) == 48 * 48
    )
    config, before = (json.loads((place / "config.json").read_text()) for place in (done.out, source))
    assert config == {key: value for key, value in before.items() if key != "sparsity_config"} and config[
        "architectures"
    ] == ["LlamaForCausalLM"]
    AutoTokenizer.from_pretrained(done.out)


def test_the_report_is_of_the_final_model_alone_and_code_of_a_model_that_has_its_own(source, tmp_path):
    changed(source / "checkpoint-6", auto_map=None)
    written = files(export(source / "checkpoint-6", tmp_path / "out").out)
    assert {Path(name).name for name in written} == ALONG - {"modeling_own.py"} | {"model.safetensors"}
    shutil.copytree(source, tmp_path / "weights", ignore=lambda *_: ALONG | {schema.FILE})
    assert schema.FILE not in files(export(tmp_path / "weights", tmp_path / "other", config=str(source)).out), (
        "it is of another model"
    )
    assert (tmp_path / "other" / "tokenizer.json").exists()


def test_weights_without_a_model_are_exported_too(tmp_path):
    (tmp_path / "run").mkdir()
    tensors = {
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "count": torch.tensor([1, 0]),
        "flags": torch.tensor([True, False]),
        "w": torch.tensor([[0.0, -0.0, 2.0]]),
        "double": torch.zeros(2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "run" / "weights.safetensors")
    done = export(tmp_path / "run", tmp_path / "out", dtype="bfloat16", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in wanted.items()}
    assert all(torch.equal(written[name], wanted[name]) for name in tensors) and written["w"].signbit()[0, 1]
    assert done.counts["w"] == (2, 3) and done.counts["none"] == (0, 0) and done.verification["logits"] is None


def test_shards_have_an_index_that_names_every_tensor(source, tmp_path):
    done = export(source, tmp_path / "out", shard_size="40KB", verify=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: list(load_file(tmp_path / "out" / name)) for name in done.files}
    assert len(done.files) > 5 and done.files[0] == f"model-00001-of-{len(done.files):05d}.safetensors"
    assert {name: file for file, names in held.items() for name in names} == index["weight_map"] and len(
        index["weight_map"]
    ) == len(done.counts)
    assert (
        index["metadata"]["total_size"]
        == done.bytes_dense
        == sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    )
    assert done.bytes_after == sum((tmp_path / "out" / name).stat().st_size for name in done.files)
    for name, names in held.items():  # none larger than requested, but by one tensor alone
        assert len(names) == 1 or sum(t.nbytes for t in load_file(tmp_path / "out" / name).values()) <= 40_000
    (tensor_name,) = held[index["weight_map"]["model.embed_tokens.weight"]]
    assert tensor_name == "model.embed_tokens.weight"
    again = export(tmp_path / "out", tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == done.counts.keys() == again.counts.keys()


def test_pickled_weights_sharded_or_not_with_shared_memory_views_and_names_of_torch_compile(source, tmp_path):
    wanted = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    embedding, matrix = wanted["model.embed_tokens.weight"], wanted["model.layers.0.mlp.up_proj.weight"]
    both = torch.cat([matrix.flatten(), embedding.flatten()])
    views = {
        **wanted,
        "lm_head.weight": embedding,
        "model.layers.0.mlp.up_proj.weight": both[: matrix.numel()].view(matrix.shape),
        "model.layers.0.self_attn.q_proj.weight": (
            wanted["model.layers.0.self_attn.q_proj.weight"].t().contiguous().t()
        ),
    }
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in views.items()}, source / "pytorch_model.bin")
    export(source, tmp_path / "out", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == wanted.keys() and not [
        name for name in wanted if as_bytes(written[name]) != as_bytes(wanted[name])
    ]
    changed(source, tie_word_embeddings=False)
    assert "lm_head.weight" in export(source, tmp_path / "untied").counts
    (source / "pytorch_model.bin").rename(source / "pytorch_model-00001-of-00001.bin")
    (source / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(wanted, "pytorch_model-00001-of-00001.bin")})
    )
    assert export(source, tmp_path / "sharded").counts.keys() == {*wanted, "lm_head.weight"}


def test_a_tied_head_that_zero_3_made_trainer_write_twice_is_written_once(source, tmp_path):
    rewritten(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in export(source, tmp_path / "out", verify=True).counts


def test_names_of_torch_compile_are_taken_off(source, tmp_path):
    wanted = load_file(source / "model.safetensors")
    rewritten(
        source, lambda tensors: [tensors.update({f"_orig_mod.{name}": tensors.pop(name)}) for name in [*tensors]]
    )
    assert export(source, tmp_path / "out").counts.keys() == wanted.keys()


def test_a_narrower_dtype_is_of_the_config_too_and_underflows_are_told(source, tmp_path):
    rewritten(
        source, lambda tensors: tensors["model.norm.weight"].copy_(torch.tensor([1e-9] * 5 + [0.0] * 3 + [1.0] * 40))
    )
    exact = export(source, tmp_path / "bfloat16", dtype="bfloat16", verify=True)
    lossy = export(source, tmp_path / "float16", dtype="float16")
    assert (exact.underflows, exact.counts["model.norm.weight"]) == (0, (3, 48))
    assert (lossy.underflows, lossy.counts["model.norm.weight"]) == (5, (8, 48))
    for name, done in (("bfloat16", exact), ("float16", lossy)):
        assert AutoModelForCausalLM.from_pretrained(done.out).dtype == getattr(torch, name)
        config = json.loads((done.out / "config.json").read_text())
        assert config["dtype"] == config["own_config"]["dtype"] == name and config["architectures"] == [
            "LlamaForCausalLM"
        ]
        assert done.bytes_dense * 2 == done.bytes_before
    assert export(exact.out, tmp_path / "wider", dtype="float32").underflows == 0


@pytest.mark.parametrize(
    "value, dtype, words",
    [
        (7e4, "float16", ["model.norm.weight has a value of 70000, which float16 can't hold", "bfloat16"]),
        (float("nan"), None, ["model.norm.weight has values that are not finite", "export an earlier checkpoint"]),
        (float("inf"), "bfloat16", ["not finite"]),
    ],
)
def test_weights_that_would_be_spoiled_are_refused_and_out_stays_as_it_was(value, dtype, words, source, tmp_path):
    rewritten(source, lambda tensors: tensors["model.norm.weight"].fill_(value))
    for before in (None, "kept"):
        if before:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text(before)
        with pytest.raises(UsageError) as caught:
            export(source, tmp_path / "out", dtype=dtype, shard_size="1KB", overwrite=True)
        assert all(word in str(caught.value) for word in words), caught.value
        assert (tmp_path / "out").exists() == bool(before) and not (tmp_path / "out.partial").exists()
    assert files(tmp_path / "out") == {"config.json": b"kept"}


def test_an_earlier_export_is_replaced_on_request_and_nothing_else_is(source, tmp_path):
    (tmp_path / "out").mkdir()  # empty
    export(source, tmp_path / "out", shard_size="40KB")
    with pytest.raises(UsageError, match="out exists and is not empty; .*--overwrite"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", overwrite=True)
    assert {Path(name).name for name in files(tmp_path / "out")} == ALONG | {"model.safetensors", schema.FILE}
    (tmp_path / "out" / "important").mkdir()
    with pytest.raises(UsageError, match="no earlier output, since it has a directory important"):
        export(source, tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        export(source, tmp_path / "file", overwrite=True)


def test_out_may_be_where_one_stands_or_a_link(source, tmp_path, monkeypatch):
    for name in ("here", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(source, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    export(source, ".")
    assert (
        all((tmp_path / name / "model.safetensors").exists() for name in ("here", "disk"))
        and (tmp_path / "link").is_symlink()
    )


def test_what_it_is_made_from_is_never_replaced(source, tmp_path):
    run = tmp_path / "runs" / "out.partial"  # where an export to runs/out would write
    shutil.copytree(source / "checkpoint-6", run, ignore=shutil.ignore_patterns("tokenizer_before"))
    (run.parent / "out").symlink_to(run)
    before = files(run.parent)
    for out in (run, run.parent, run.parent / "out", tmp_path):
        with pytest.raises(UsageError, match="no earlier output|holds .*out.partial, which it is to be made from"):
            export(run, out, overwrite=True)
    (run.parent / "out").unlink()
    with pytest.raises(UsageError, match="holds .*out.partial, which it is to be made from"):
        export(run, run.parent / "out")
    with pytest.raises(UsageError, match="holds .*out.partial, which it is to be made from"):
        export(source / "checkpoint-6", run, config=str(run), overwrite=True)
    assert files(run.parent) == {name: data for name, data in before.items() if name.startswith("out.partial")}


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
    "change, words",
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
def test_a_source_that_is_no_model_or_not_complete(change, words, model, tmp_path):
    change(model)
    with pytest.raises(UsageError) as caught:
        export(model, tmp_path / "out")
    assert all(word in str(caught.value) for word in words) and str(model) in str(caught.value), caught.value
    assert not (tmp_path / "out").exists()


def zipped_anew(model: Path, compression: int) -> None:
    pickled("whole.bin")(model)
    with (
        zipfile.ZipFile(model / "whole.bin") as archive,
        zipfile.ZipFile(model / "pytorch_model.bin", "w", compression) as anew,
    ):
        for name in archive.namelist():
            anew.writestr(name, archive.read(name))


def test_a_file_that_another_program_zipped_anew_is_refused_where_torch_tells_other_offsets(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    zipped_anew(model, zipfile.ZIP_STORED)
    loaded = torch.load(model / "pytorch_model.bin", map_location="meta", weights_only=True)
    if getattr(next(iter(loaded.values())).untyped_storage(), "_checkpoint_offset", None) is not None:
        with pytest.raises(UsageError, match="does not tell where .*pytorch_model.bin has its tensors"):
            export(model, tmp_path / "out")
    else:  # torch 2.7 tells none, and reads such a file by itself
        export(model, tmp_path / "out")
        exported = load_file(tmp_path / "out" / "model.safetensors")
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weight) for name, weight in weights.items())


def test_a_file_that_another_program_compressed_is_refused(model, tmp_path):
    zipped_anew(model, zipfile.ZIP_DEFLATED)
    words = "pytorch_model.bin holds .* compressed, which torch.save does not do"
    with pytest.raises(UsageError, match=words):
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
    "more, words",
    [
        ({"dtype": "int8"}, ["--dtype int8", "bfloat16"]),
        ({"shard_size": "big"}, ["--shard-size big", "500MB"]),
        ({"shard_size": "-1GB"}, ["--shard-size -1GB"]),
        ({"masters": True}, ["no checkpoint of an engine", "--masters"]),
        ({"config": "nobody/nothing"}, ["--config nobody/nothing", "hub"]),
        ({"config": "."}, ["--config . has no config.json"]),
    ],
)
def test_bad_arguments(more, words, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        export(model, tmp_path / "out", **more)
    assert all(word in str(caught.value) for word in words), caught.value


def test_accelerates_pickled_weights_of_fsdp_are_taken_as_an_engines(model, tmp_path):
    pickled("pytorch_model_fsdp.bin")(model)
    assert open_checkpoint(model).runtime_names and export(model, tmp_path / "out", verify=True).verification["logits"]


def test_the_command_prints_sizes_zeros_and_where_it_is(model, tmp_path, capsys, monkeypatch):
    rewritten(model, lambda tensors: [t.view(-1)[::2].zero_() for name, t in tensors.items() if "norm" not in name])
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out[1]"
    assert (
        lp_dist_here(
            monkeypatch, "export", str(model), str(out), "--dtype", "bfloat16", "--shard_size", "1MB", "--verify"
        )
        == 0
    )
    printed = capsys.readouterr().out
    numel = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    zeros = (numel - 5 * 48) // 2
    assert (
        "From safetensors" in printed
        and f"{zeros:,} of {numel:,} weights are exactly zero ({100 * zeros / numel:.2f} %), in 20 tensors, 1 file."
        in printed
    )
    before, after = (line.split() for line in printed.splitlines() if "before" in line or "after" in line)
    assert before[-4:-2] == [f"{4 * numel / 1000:.1f}", "kB"] and after[3:5] == [
        f"{(out / 'model.safetensors').stat().st_size / 1000:.1f}",
        "kB",
    ]
    assert (
        "20 tensors are the checkpoint's bit for bit, and so are " in printed
        and f"Saved to {out}; loads with from_pretrained." in printed
    )
    assert "small for" not in printed
    assert (
        lp_dist_here(monkeypatch, "export", str(out), str(tmp_path / "bitmask"), "--bitmask", "--shard-size", "20KB")
        == 0
    )
    printed = capsys.readouterr().out
    size = sum(file.stat().st_size for file in (tmp_path / "bitmask").glob("bitmask-*"))
    assert (
        "bitmask form" in printed
        and f"{100 * size / (2 * numel):.1f} %" in printed
        and f"lp-dist export {tmp_path / 'bitmask'} OUT gives" in printed
    )
    assert 0.5 < size / (2 * numel) < 0.65


def test_the_command_says_in_one_line_what_is_wrong(model, tmp_path, capsys, monkeypatch):
    assert lp_dist_here(monkeypatch, "export", str(tmp_path / "nowhere"), str(tmp_path / "out")).startswith(
        "lp-dist: error: there is no "
    )
    rewritten(model, lambda tensors: tensors["model.norm.weight"].copy_(torch.tensor([1e-9] + [1.0] * 47)))
    assert lp_dist_here(monkeypatch, "export", str(model), str(tmp_path / "out"), "--dtype", "float16") == 0
    assert "1 of these were too small for the new dtype" in capsys.readouterr().out
    assert "--overwrite" in lp_dist_here(monkeypatch, "export", str(model), str(tmp_path / "out"))
    monkeypatch.setattr(
        "lp_dist.export.writer.copy_model_files",
        lambda *_: (
            shutil.copyfile(model / "config.json", tmp_path / "out.partial" / "config.json")
            and changed(tmp_path / "out.partial", intermediate_size=95)
        ),
    )
    code = lp_dist_here(monkeypatch, "export", str(model), str(tmp_path / "out"), "--verify", "--overwrite")
    assert (
        code.startswith("lp-dist: error: ")
        and "mismatched keys" in code
        and "\n" not in code
        and (tmp_path / "out.partial").exists()
    )
