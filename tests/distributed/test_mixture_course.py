"""A mixture goes all the way by the program: planned, trained under ZeRO-3 to fewer experts and to a sparsity,
reported, inspected, shrunk, verified, and loaded by plain transformers. Every figure is one that is counted here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.commands import lp_dist_here
from helpers.mixture_directories import TO_HALF, check_figures, mixture_directory
from helpers.paths import ROOT
from lp_dist.report import schema
from lp_dist.structured.resolve import resolve_groups

pytestmark = pytest.mark.long

FAMILIES = ("mixtral", "qwen3_moe")
GROUPS = ["--groups", "experts", "--group_sparsity", "0.5", "--max_steps", "30"]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("mixtures")
    return {name: mixture_directory(directory / name, name, tiny_model) for name in FAMILIES}


@pytest.fixture(scope="module")
def runs(models, topics, run_program) -> dict[str, Path]:
    directory = models["mixtral"].parent
    config = json.loads((ROOT / "configs" / "ds_zero3.json").read_text())
    # Buffers for a large model take longer than the steps of a tiny one.
    config["zero_optimization"] |= {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    (directory / "zero3.json").write_text(json.dumps(config))
    out = {name: directory / f"{name}-run" for name in FAMILIES}
    run_program(
        [
            [
                *("--model", str(models[name]), "--dataset", str(topics), *TO_HALF, *GROUPS),
                *("--deepspeed", str(directory / "zero3.json"), "--output_dir", str(out[name])),
            ]
            for name in FAMILIES
        ]
    )
    return out


def planned(model: Path, monkeypatch, capsys) -> dict[str, Any]:
    capsys.readouterr()
    assert not lp_dist_here(monkeypatch, "plan", str(model), *TO_HALF, *GROUPS, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixture_goes_all_the_way(name, models, runs, tmp_path, monkeypatch, capsys):
    plan, saved = planned(models[name], monkeypatch, capsys), schema.read(runs[name])
    check_figures(runs[name])
    assert saved["engine"] == "DeepSpeed ZeRO-3" and saved["world_size"] == 2
    assert saved["decayed_weights"] == plan["decayed_weights"] and saved["zeros"] == saved["decayed_weights"] // 2
    assert saved["groups"]["kinds"] == {"experts": [4, 8]}
    # Where half of the experts are dead, so they are in the files, two of each layer.
    model = AutoModelForCausalLM.from_pretrained(runs[name])
    for groups in resolve_groups(model, "experts"):
        dead = [(model.get_parameter(member.name) == 0).flatten(1).all(1) for member in groups.members]
        assert all(of_param.equal(dead[0]) for of_param in dead) and int(dead[0].sum()) == 2
    assert not lp_dist_here(monkeypatch, "inspect", str(runs[name]))
    assert f"{saved['zeros']:,} of {saved['decayed_weights']:,} weights" in " ".join(capsys.readouterr().out.split())
    out = tmp_path / "small"
    assert not lp_dist_here(monkeypatch, "export", str(runs[name]), str(out), "--shrink", "--verify")
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of 8 experts are dead, 4 are removed: 4 → 2 in each of 2 layers." in said
    assert "where the checkpoint's routers can't choose the removed experts" in said
    small, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert {getattr(small.config, key, 2) for key in ("num_local_experts", "num_experts")} == {2}
    assert small(torch.arange(12)[None]).logits.isfinite().all()
    assert f"of {small.num_parameters():,} weights are exactly zero" in said
