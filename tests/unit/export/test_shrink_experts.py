"""`export --shrink` of experts and their channels, from files of any form: what is dead is gone, and the rest is the
checkpoint's model whose router can't choose what was removed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from helpers.families import GROUPED, MIXTURES, kill, model_of
from helpers.model_directories import FORMS, written
from lp_dist.cli import app
from lp_dist.errors import DiffersError, UsageError
from lp_dist.export import shrink
from lp_dist.export.writer import export
from lp_dist.structured.resolve import resolve_groups

TOKENS = torch.arange(24).view(2, 12) % 61
# By family: the entries of config.json with the number of experts, and with their width.
ENTRIES = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_local_experts", "moe_intermediate_size"),
    "gpt_oss": ("num_local_experts", "intermediate_size"),
    "llama4_text": ("num_local_experts", None),
    "minimax_m2": ("num_local_experts", "intermediate_size"),
    "deepseek_v3": ("n_routed_experts", None),
    "nemotron_h": ("n_routed_experts", "moe_intermediate_size"),
}


class WithoutExperts(TorchFunctionMode):
    """The routers' logits of some experts are -inf; written without lp_dist."""

    def __init__(self, dead_of: dict[int, list[int]]) -> None:
        super().__init__()
        self.dead_of, self.met = dead_of, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self.dead_of:
            self.met.add(args[1].data_ptr())
            output = output.clone()
            output[..., self.dead_of[args[1].data_ptr()]] = -torch.inf
        return output


def save(model: nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def loaded(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def kill_experts(model: nn.Module) -> list[list[int]]:
    """The first and the third of each group of four that are routed together, other ones in the next layer."""
    dead: dict[str, list[int]] = {}
    for groups in resolve_groups(model, "experts"):
        first = groups.members[0].start
        gone = [0, 2] if len(dead) == (groups.name in dead) else [1, 3]
        kill(model, groups, gone)
        dead.setdefault(groups.name, []).extend(first + i for i in gone)
    return [*dead.values()]


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_left_is_the_model_whose_router_can_not_choose_the_dead_experts(family, tmp_path):
    model = model_of(family)
    dead = kill_experts(model)
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    count, removed = MIXTURES[family][1][0], len(dead[0])
    assert [removal.removed for removal in done.shrink_plan.removals] == [2 * removed]
    assert config_of(tmp_path / "out")[ENTRIES[family][0]] == count - removed
    small = loaded(tmp_path / "out")
    stacks = [p for name, p in small.named_parameters() if ".experts." in name]
    assert stacks and {len(stack) for stack in stacks} == {count - removed}
    model = loaded(tmp_path / "masked")
    weights = [p for name, p in model.named_parameters() if re.search(r"(gate|router)\.weight$", name)]
    mode = WithoutExperts({weight.data_ptr(): gone for weight, gone in zip(weights, dead, strict=True)})
    with mode:
        wanted = logits(model)
    assert len(mode.met) == 2
    torch.testing.assert_close(logits(small), wanted, rtol=0, atol=2e-6)
    measured = done.verification
    assert measured["difference"] <= 1e-6 < measured["without_experts"], "equal to that model, and not to the other"


@pytest.mark.parametrize("family", [family for family in MIXTURES if ENTRIES[family][1]])
def test_every_expert_keeps_channels_of_its_own(family, tmp_path):
    model = model_of(family)
    for i, groups in enumerate(resolve_groups(model, "expert_channels")):
        kill(model, groups, [(i + 3 * j) % groups.count for j in range(8)])
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    width = MIXTURES[family][1][1]
    assert config_of(tmp_path / "out")[ENTRIES[family][1]] == width - 8
    experts = 2 * MIXTURES[family][1][0]
    assert [str(removal) for removal in done.shrink_plan.removals] == [
        f"{8 * experts} of {width * experts} channels of experts are dead, {8 * experts} are removed: {width} →"
        f" {width - 8} in each of {experts} experts"
    ]
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama4_text", "deepseek_v3"])
def test_shared_experts_of_the_same_width_go_along(family, tmp_path):
    """DeepSeek's two shared experts are one module of twice the width."""
    model = model_of(family)
    for groups in resolve_groups(model, ["channels", "expert_channels"]):
        kill(model, groups, range(8 * (groups.count // MIXTURES[family][1][1])))
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    assert all(removal.removed == sum(removal.dead) for removal in done.shrink_plan.removals)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(model), rtol=0, atol=2e-6)


def test_widths_of_experts_are_rounded_as_products_of_many_at_once_need_it(tmp_path):
    model = model_of("mixtral")
    for groups in resolve_groups(model, "expert_channels"):
        kill(model, groups, range(13))
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True)
    assert config_of(tmp_path / "out")["intermediate_size"] == 40
    assert str(done.shrink_plan.removals[0]).endswith("needs 35, rounded up to a multiple of 8")
    logits(loaded(tmp_path / "out"))


def test_as_many_stay_as_the_router_chooses_and_the_layer_with_most_decides(tmp_path):
    model = model_of("mixtral")
    first, second = resolve_groups(model, "experts")
    kill(model, first, range(8))
    kill(model, second, range(5))
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True)
    assert str(done.shrink_plan.removals[0]) == (
        "13 of 16 experts are dead, 10 are removed: 8 → 3 in each of 2 layers; all layers have one number,"
        " model.layers.1.mlp.experts needs 3"
    )
    kill(model, second, range(8))
    done = export(save(model, tmp_path / "more"), tmp_path / "fewest", shrink=True)
    assert config_of(tmp_path / "fewest")["num_local_experts"] == 2
    assert str(done.shrink_plan.removals[0]).endswith("needs 2, since its router chooses as many")
    logits(loaded(tmp_path / "fewest"))


def test_experts_and_their_channels_and_heads_go_together_from_every_form(tmp_path):
    """Files with the experts one by one, and engines' checkpoints, which have them as in memory."""
    model = model_of("mixtral")
    kill_experts(model)
    for groups in resolve_groups(model, "expert_channels"):
        kill(model, groups, range(16))
    for groups in resolve_groups(model, "kv_groups"):
        kill(model, groups, [1])
    model.config.architectures = [type(model).__name__]
    written(tmp_path / "forms", model)
    # As in memory is no form of a file of this model.
    model.save_pretrained(tmp_path / "forms" / "plain")
    results = {}
    for form in FORMS:
        export(tmp_path / "forms" / form, tmp_path / form, shrink=True, verify=True)
        results[form] = load_file(tmp_path / form / "model.safetensors")
        config = config_of(tmp_path / form)
        assert (config["num_local_experts"], config["intermediate_size"], config["num_key_value_heads"]) == (6, 32, 1)
    names = {name for name in results[FORMS[0]] if ".experts." in name}
    assert len(names) == 2 * 6 * 3 and {int(re.search(r"experts\.(\d+)", name)[1]) for name in names} == {*range(6)}
    for tensors in results.values():
        assert tensors.keys() == results[FORMS[0]].keys()
        assert all(torch.equal(tensors[name], results[FORMS[0]][name]) for name in tensors)


def test_experts_and_channels_go_together_from_files_that_are_as_in_memory(tmp_path):
    """What the removed experts had kept does not count for the width of the others."""
    model = model_of("gpt_oss")
    kill_experts(model)
    for i, groups in enumerate(resolve_groups(model, "expert_channels")):
        kill(model, groups, range(i, i + 8))
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    config = config_of(tmp_path / "out")
    assert (config["num_local_experts"], config["intermediate_size"]) == (2, 40)
    assert done.verification["difference"] <= 1e-6
    experts = loaded(tmp_path / "out").model.layers[0].mlp.experts
    before = model.model.layers[0].mlp.experts.down_proj
    for i, expert in enumerate((1, 3)):
        kept = [j for j in range(48) if not expert <= j < expert + 8]
        assert torch.equal(experts.down_proj[i], before[expert][kept])


def test_a_table_of_numbers_of_experts_is_numbered_anew(tmp_path):
    """DeepSeek-V4's first layers look up the experts of a token."""
    sizes = {
        **GROUPED,
        "head_dim": 8,
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }
    model = model_of("deepseek_v4", **sizes)
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid")}
    assert tables
    for table in tables.values():
        table.copy_(torch.stack([torch.arange(61) % 4, (torch.arange(61) + 1) % 4], dim=1))
    for groups in resolve_groups(model, "experts"):
        assert groups.tables == tuple(name for name in tables if name.startswith(groups.name.rpartition(".")[0]))
        kill(model, groups, [1])
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    assert done.verification["difference"] <= 1e-6
    small = dict(loaded(tmp_path / "out").named_buffers())
    for name, before in tables.items():
        for old, new in zip(before.tolist(), small[name].tolist()):
            assert len(set(new)) == 2 and set(new) <= {0, 1, 2}
            assert all({0: 0, 2: 1, 3: 2}[o] == n for o, n in zip(old, new) if o != 1)


# -- what is said -------------------------------------------------------------


def test_verify_tells_of_an_expert_that_was_not_zero(tmp_path, monkeypatch):
    model = save(model_of("mixtral"), tmp_path / "model")
    monkeypatch.setattr(
        shrink,
        "find_dead",
        lambda sets, *_: {
            groups.label: torch.arange(groups.count) < 2 * (groups.kind == "experts") for groups in sets
        },
    )
    with pytest.raises(DiffersError, match=r"experts.* has other weights than zeros in what was removed from"):
        export(model, tmp_path / "out", shrink=True, verify=True)


def test_the_command_says_that_outputs_change_and_by_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    model = model_of("mixtral")
    kill_experts(model)
    save(model, tmp_path / "masked")
    printed = (
        CliRunner().invoke(app, ["export", str(tmp_path / "masked"), str(tmp_path / "out"), "--shrink", "--verify"])
    ).stdout
    assert "4 of 16 experts are dead, 4 are removed: 8 → 6 in each of 2 layers" in printed
    assert re.search(
        r"where the checkpoint's routers can't choose the removed experts, 915 logits differ by \S+ at most, and"
        r" rounding explains up to \S+\. As it is, its routers still choose them, and its outputs differ by up to",
        printed,
    )


def test_a_reason_is_given_where_dead_heads_stay(tmp_path):
    """Gemma 3n's last layers read keys and values of others, so that heads of queries alone are known."""
    model = model_of(
        "gemma3n_text",
        **{
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "vocab_size_per_layer_input": 61,
            "hidden_size_per_layer_input": 12,
            "laurel_rank": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    )
    for groups in resolve_groups(model, "heads"):
        kill(model, groups, [0])
    with pytest.raises(UsageError, match=r"can remove nothing: 2 of 8 attention heads are dead and stay: it is not"):
        export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True)


def test_a_config_with_an_infinite_float_is_read_and_written_as_it_was(tmp_path):
    model = model_of("llama", rope_theta=1e4)
    model.config.some_limit = float("inf")
    for groups in resolve_groups(model, "channels"):
        kill(model, groups, [1, 2])
    save(model, tmp_path / "masked")
    assert config_of(tmp_path / "masked")["some_limit"] == {"__float__": "Infinity"}
    export(tmp_path / "masked", tmp_path / "out", shrink=True, verify=True)
    config = config_of(tmp_path / "out")
    assert (config["some_limit"], config["intermediate_size"]) == ({"__float__": "Infinity"}, 46)
    assert loaded(tmp_path / "out").config.some_limit == float("inf")
