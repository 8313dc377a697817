"""Checkpoints of every engine on 2 and 3 ranks: what is exported is bit for bit the fp32 master weights that the ranks
had.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.engines import convert
from helpers.export_runs import CELLS, FROZEN, SPARSE, UNEVEN, llama, save
from helpers.snapshots import as_bytes
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.writer import export

EMBEDDING = "model.embed_tokens.weight"
ZERO = [cell for cell in CELLS if cell not in ("zero0", "zero0 bf16", "fsdp2")]
_results: dict[int, tuple[Path, dict[str, dict[str, Tensor]]]] = {}


def saved(world: int, run_ranks: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Where the checkpoints are, and the masters of each cell; run once."""
    if world not in _results:
        directory = tmp_path_factory.mktemp("export_ranks")
        ranks = run_ranks(save, world, directory, tuple(CELLS) if world == 2 else UNEVEN)
        llama().config.save_pretrained(
            directory
        )  # above the checkpoints, as a script writes it that runs an engine by itself
        _results[world] = directory, ranks[0]
    return _results[world]


@pytest.fixture
def two(run_ranks, tmp_path_factory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    return saved(2, run_ranks, tmp_path_factory)


@pytest.fixture
def three(run_ranks, tmp_path_factory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    return saved(3, run_ranks, tmp_path_factory)


def wrong(written: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    both = written.keys() & wanted.keys()
    return sorted(written.keys() ^ wanted.keys()) + [
        name for name in both if as_bytes(written[name]) != as_bytes(wanted[name])
    ]


@pytest.mark.parametrize("world, ranks", [(2, "two"), (3, "three")], ids=["2 ranks", "3 ranks"])
def test_what_is_exported_is_the_masters_bit_for_bit(world, ranks, request, tmp_path):
    directory, masters = request.getfixturevalue(ranks)
    for cell, wanted in masters.items():
        done = export(directory / cell / ("saved" if cell == "fsdp2" else ""), tmp_path / cell, verify=True)
        assert not wrong(load_file(done.out / "model.safetensors"), wanted), cell
        assert done.counts[SPARSE][0] == int((wanted[SPARSE] == 0).sum()) > 100, cell
        assert done.verification == {
            "tensors": len(wanted),
            "zeros": sum(zeros for zeros, _ in done.counts.values()),
            "logits": 15 * 97,
            "outputs": ["logits"],
            "inputs": ["tokens"],
            "unread": [],
            "reason": "",
        }
        assert json.loads((done.out / "config.json").read_text())["dtype"] == (
            "bfloat16" if cell == "zero0 bf16" else "float32"
        )
        if cell in ZERO:
            assert f"{world} ranks" in done.form and all(
                t.dtype == torch.float32 for name, t in wanted.items() if name != FROZEN
            )
            assert cell == "compiled" or any(as_bytes(t) != as_bytes(t.bfloat16().float()) for t in wanted.values()), (
                "the model's own weights"
            )


def test_fsdp2s_weights_alone_and_in_accelerates_layout(two, tmp_path):
    directory, masters = two
    for name in ("bare", "accelerate", "accelerate/pytorch_model_fsdp_0"):
        export(directory / name, tmp_path / name)
        assert not wrong(load_file(tmp_path / name / "model.safetensors"), masters["fsdp2"]), name


def test_universal_checkpoints(two, tmp_path):
    directory, masters = two
    for cell in ("zero2", "zero3"):
        convert(directory / cell)
        export(directory / cell / "universal", tmp_path / cell, verify=True)
        assert not wrong(load_file(tmp_path / cell / "model.safetensors"), masters[cell]), cell
        (directory / cell / "universal" / "zero" / SPARSE / "fp32.pt").unlink()
        with pytest.raises(UsageError, match=f"no .*{SPARSE}/fp32.pt.* not complete; convert it anew"):
            open_checkpoint(directory / cell / "universal")


def test_a_universal_checkpoint_whose_parameters_deepspeed_mixed_up_is_refused(two, tmp_path):
    convert(two[0] / "zero2 round robin")
    with pytest.raises(UsageError, match="round_robin_gradients; export the checkpoint that it was converted from"):
        export(
            two[0] / "zero2 round robin" / "universal", tmp_path / "out"
        )  # once it is not: has DeepSpeed mended it?


def test_deepspeeds_own_conversion_gives_the_same(three):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    directory, masters = three
    converted = get_fp32_state_dict_from_zero_checkpoint(
        directory / "zero2"
    )  # with the head, which it can't write as safetensors
    assert not wrong({name: converted[name] for name in masters["zero2"]}, masters["zero2"]) and torch.equal(
        converted["lm_head.weight"], converted[EMBEDDING]
    )


def test_a_frozen_parameter_that_was_not_saved_is_missed(two, tmp_path):
    for cell in ("zero2", "zero3"):
        with pytest.raises(UsageError, match=f"has no {FROZEN}, .*frozen"):
            export(two[0] / f"{cell} without frozen", tmp_path / "out")


def test_a_head_that_the_script_tied_is_written_from_the_masters_where_the_config_does_not_tie_it(two, tmp_path):
    llama(tie_word_embeddings=False).config.save_pretrained(tmp_path)
    written = load_file(export(two[0] / "zero2", tmp_path / "out", config=str(tmp_path)).out / "model.safetensors")
    assert as_bytes(written["lm_head.weight"]) == as_bytes(two[1]["zero2"][EMBEDDING])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_a_script_saved_beside_the_model_is_left_out(tmp_path):
    model, state = (
        {"_checkpoint_wrapped_module.a.weight": torch.ones(2, 3)},
        {"state": {"a.weight": {"exp_avg": torch.ones(2, 3)}}},
    )
    for name in ("optimizer", "optim", "optimizer_state_dict"):
        dcp.save({**model, name: state}, checkpoint_id=tmp_path / name, no_dist=True)
        assert [*open_checkpoint(tmp_path / name).entries] == ["a.weight"]
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "alone", no_dist=True)
    with pytest.raises(UsageError, match="no weights of a model, only 1 tensors of an optimizer"):
        open_checkpoint(tmp_path / "alone")


def copied(source: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    return shutil.copytree(source, out)


def test_files_cut_short_or_gone_are_an_error_at_once(two, tmp_path):
    directory, _ = two
    seen = 0
    for cell, place in (
        ("zero2", "saved"),
        ("zero3", "saved"),
        ("zero0", "saved"),
        ("bare", ""),
        ("accelerate", "pytorch_model_fsdp_0"),
    ):
        files = sorted(
            path.relative_to(directory / cell) for path in (directory / cell / place).iterdir() if path.is_file()
        )
        for file in files:
            content = (directory / cell / file).read_bytes()
            for shortened in (None, b"", content[:100], content[:-1]):
                broken = copied(directory / cell, tmp_path / "broken")
                (broken / file).unlink() if shortened is None else (broken / file).write_bytes(shortened)
                with pytest.raises(UsageError) as caught:
                    open_checkpoint(broken)
                assert any(word in str(caught.value) for word in ("anew", "holds no weights")), caught.value
                seen += 1
    assert seen == 4 * (3 + 4 + 1 + 3 + 3)
    (copied(directory / "zero2", tmp_path / "broken") / "latest").write_text("global_step9")
    with pytest.raises(UsageError, match="latest names 'global_step9', which is not there"):
        open_checkpoint(tmp_path / "broken")
    for file in copied(directory / "zero2", tmp_path / "broken").glob("saved/*optim_states.pt"):
        file.unlink()
    with pytest.raises(UsageError, match="was saved under ZeRO, but its .*_optim_states.pt"):
        open_checkpoint(tmp_path / "broken")


def test_a_trainers_checkpoint_has_the_models_own_weights_and_the_engines(two, tmp_path):
    directory, masters = two
    run = tmp_path / "run"
    for cell in ("zero2", "zero3"):
        step = run / f"checkpoint-{10 if cell == 'zero3' else 9}"
        shutil.copytree(directory / cell, step)
        shutil.copyfile(directory / "config.json", step / "config.json")
        model_weights = {name: tensor.bfloat16() for name, tensor in masters[cell].items()}
        save_file(model_weights, step / "model.safetensors")
        done = export(step, tmp_path / cell)
        assert done.form == "safetensors" and not wrong(load_file(done.out / "model.safetensors"), model_weights)
        done = export(step, tmp_path / f"{cell} masters", masters=True)
        assert done.form.startswith("DeepSpeed ZeRO") and not wrong(
            load_file(done.out / "model.safetensors"), masters[cell]
        )
    # What ZeRO-3 leaves without stage3_gather_16bit_weights_on_model_save: no such file, names alone, or small tensors
    # that it does not shard.
    empty = {name: torch.empty(0) for name in model_weights}
    for kept in (None, empty, {**empty, "model.norm.weight": model_weights["model.norm.weight"]}):
        (step / "model.safetensors").unlink(missing_ok=True)
        if kept is not None:
            save_file(kept, step / "model.safetensors")
        assert not wrong(
            load_file(export(step, tmp_path / "zero3", overwrite=True).out / "model.safetensors"), masters["zero3"]
        )
    for masters_wanted in (False, True):
        with pytest.raises(
            UsageError, match=r"run holds no .*checkpoints of a run, of which .*/checkpoint-10 is the last"
        ):
            open_checkpoint(run, masters=masters_wanted)
    shutil.rmtree(step / "saved")
    (step / "latest").unlink()
    with pytest.raises(UsageError, match="with empty tensors"):
        open_checkpoint(step)


def ranks_of(directory: Path, flats: list[Tensor], shapes: list[dict[str, Any]], **more: Any) -> Path:
    """Files as ZeRO-3's ranks write them, of more ranks than a test can start."""
    directory.mkdir()
    for rank, flat in enumerate(flats):
        state = {"zero_stage": 3, "partition_count": len(flats), "fp32_flat_groups": [flat], **more}
        torch.save({"optimizer_state_dict": state}, directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save(
            {"module": {}, "buffer_names": [], "param_shapes": shapes},
            directory / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )
    return directory


def test_rank_10_comes_after_rank_9_and_padding_is_cut(tmp_path):
    values = torch.arange(1.0, 36.0)  # 4 elements a rank, and nothing but padding on the last 2 of 11
    flats = [
        torch.cat([shard, torch.full((4 - len(shard) + 1,), -1.0)])
        for shard in torch.nn.functional.pad(values, (0, 9), value=-1.0).split(4)
    ]
    place = ranks_of(tmp_path / "ranks", flats, [{"w": torch.Size([5, 7])}])
    assert torch.equal(open_checkpoint(place).entries["w"].read(), values.view(5, 7))


@pytest.mark.parametrize(
    "shape, more, message",
    [
        ((5, 9), {}, "only 35 of the 45 elements of w .*NVMe offload"),
        ((5, 7), {"ds_zero_partition_groups": [{"partition_count": 2}]}, "MiCS"),
    ],
)
def test_weights_that_are_elsewhere_are_refused(shape, more, message, tmp_path):
    place = ranks_of(tmp_path / "ranks", list(torch.arange(35.0).split(5)), [{"w": torch.Size(shape)}], **more)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(place)


@pytest.mark.parametrize(
    "name", ["mp_rank_01_model_states.pt", "layer_00-model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_other_parallelism_is_refused_but_for_universal_checkpoints(name, tmp_path):
    for file in ("mp_rank_00_model_states.pt", name):
        torch.save({"module": {}, "buffer_names": [], "param_shapes": [{"w": torch.Size([2, 3])}]}, tmp_path / file)
    with pytest.raises(UsageError, match="parallelism, .*ds_to_universal"):
        open_checkpoint(tmp_path)
    (tmp_path / "zero" / "w").mkdir(parents=True)
    torch.save(
        {"param": torch.arange(12.0).view(4, 3)}, tmp_path / "zero" / "w" / "fp32.pt"
    )  # merged; each rank had half of it
    assert torch.equal(open_checkpoint(tmp_path).entries["w"].read(), torch.arange(12.0).view(4, 3))


def test_a_checkpoint_of_another_scripts_classes_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(
        sys.modules, "their_script", SimpleNamespace(Settings=type("Settings", (), {"__module__": "their_script"}))
    )
    torch.save(
        {"module": {}, "buffer_names": [], "args": sys.modules["their_script"].Settings()},
        tmp_path / "mp_rank_00_model_states.pt",
    )
    monkeypatch.delitem(sys.modules, "their_script")
    with pytest.raises(UsageError, match=r"names their_script.Settings, whose code would run .*--trust-pickles"):
        open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="objects of DeepSpeed or of the training script .*their_script"):
        open_checkpoint(tmp_path, trust_pickles=True)
