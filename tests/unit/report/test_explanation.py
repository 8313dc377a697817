"""What a plan says of a run, against counts of its own: what decays as `param_groups` and `attach` have it, the zeros
that a run ends with, groups, windows, and what it refuses.
"""

from __future__ import annotations

import gc
import json
import math

import pytest
import torch
from torch import nn

import lp_dist
from helpers.families import model_of
from helpers.targets import backward
from helpers.targets import model_of as small_model
from lp_dist import DecayWindow, LpAdamW, SparsityTarget, attach, param_groups
from lp_dist.errors import UsageError
from lp_dist.report import explanation as reasons
from lp_dist.report.explanation import Explanation, explain
from lp_dist.report.memory import footprint
from lp_dist.sparsity.selection import Reason, decayed_names
from lp_dist.structured.resolve import groups_of


class Mixer(nn.Module):
    """Modules of all sorts, under names that no library has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.letters = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"grow": nn.Linear(8, 12), "fall": nn.Linear(12, 8)}) for _ in "ab")
        self.scale = nn.LayerNorm(8)
        self.still = nn.Linear(8, 8, bias=False)
        self.empty = nn.Linear(8, 8, bias=False)
        self.answer = nn.Linear(8, 11)
        self.still.weight.requires_grad_(False)
        nn.init.zeros_(self.empty.weight)

    def forward(self, letters):
        x = self.letters(letters)
        for block in self.blocks:
            x = x + block["fall"](block["grow"](x).relu())
        return self.answer(self.scale(x + self.still(x) + self.empty(x)))


GROW = {"blocks.0.grow.weight", "blocks.1.grow.weight"}
FALL = {"blocks.0.fall.weight", "blocks.1.fall.weight"}


def decaying(explanation: Explanation) -> set[str]:
    return {choice.name for choice in explanation.choices if choice.decays}


def reason_of(explanation: Explanation, name: str) -> str:
    return next(choice.reason for choice in explanation.choices if choice.name == name)


# -- what decays --------------------------------------------------------------


def test_it_decides_as_param_groups_does_and_counts_every_parameter_once():
    model = Mixer()
    explanation = explain(model)
    assert decaying(explanation) == decayed_names(model) == GROW | FALL
    assert explanation.decayed_weights == 4 * 8 * 12
    assert explanation.parameters == sum(param.numel() for param in model.parameters())
    assert [choice.name for choice in explanation.choices] == [name for name, _ in model.named_parameters()]
    assert reason_of(explanation, "letters.weight") == Reason.EMBEDDING.value
    assert reason_of(explanation, "answer.weight") == Reason.HEAD.value
    assert reason_of(explanation, "scale.weight") == Reason.VECTOR.value
    assert reason_of(explanation, "still.weight") == reasons.FROZEN
    assert reason_of(explanation, "empty.weight") == reasons.ALL_ZEROS


def test_kinds_of_layer_are_those_of_the_report():
    kinds = {(kind.kind, kind.decays): kind for kind in explain(Mixer()).kinds}
    grow = kinds["grow", True]
    assert (grow.tensors, grow.weights) == (2, 2 * 96) and grow.reason == Reason.MATRIX.value
    bias = kinds["grow", False]
    assert (bias.tensors, bias.weights, bias.reason) == (2, 24, Reason.VECTOR.value)


def test_embeddings_decay_where_they_are_included():
    model = Mixer()
    named = decaying(explain(model, include_embeddings=True))
    assert named == decayed_names(model, include_embeddings=True) == GROW | FALL | {"letters.weight", "answer.weight"}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"names": ["letters.weight", "blocks.0.grow.weight", "still.weight", "empty.weight"]},
        {"overrides": {"blocks.0.*": {"weight_decay": 0.0}}},
        {"names": sorted(GROW), "overrides": {"*.1.grow.weight": {"weight_decay": 0.0}, "*.0.*": {"p": 0.7}}},
    ],
)
def test_names_and_overrides_choose_as_they_do_for_attach(arguments):
    model = Mixer()
    target = SparsityTarget(0.5, scope="layer")
    explanation = explain(model, target, total_steps=50, groups=False, **arguments)
    attached = attach(model, LpAdamW(param_groups(model), lr=1e-2, p=0.5), target=target, total_steps=50, **arguments)
    assert decaying(explanation) == attached.decayed_singly != set()


def test_a_given_lambda_decays_what_attach_decays_by_it():
    overrides = {"answer.weight": {"weight_decay": 0.1}, "blocks.1.*": {"weight_decay": 0.0}}
    model = Mixer()
    explanation = explain(model, weight_decay=0.2, window=DecayWindow(0.25, 0.5), overrides=overrides, total_steps=40)
    attached = attach(model, LpAdamW(param_groups(model, 0.2), lr=1e-2), overrides=overrides)
    expected = {"blocks.0.grow.weight", "blocks.0.fall.weight", "answer.weight"}
    assert decaying(explanation) == attached.decayed_singly == expected
    assert reason_of(explanation, "answer.weight") == reasons.NAMED
    assert reason_of(explanation, "blocks.1.fall.weight") == reasons.OVERRIDDEN
    assert explanation.window and (explanation.window.first, explanation.window.last) == (10, 20)
    assert "λ = 0.2 acts steps 10–20 of 40" in str(explanation)


def test_of_what_has_no_values_here_it_says_that_they_are_not_known():
    known = explain(Mixer())
    with torch.device("meta"):
        model = Mixer()
    unknown = explain(model)
    assert decaying(unknown) == decaying(known) | {"empty.weight"}
    assert any("all zeros" in note for note in unknown.notes)
    assert not any("all zeros" in note for note in known.notes)
    # The caller may know them.
    assert decaying(explain(model, all_zero={"empty.weight", "letters.weight"})) == decaying(known)


# -- targets ------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        SparsityTarget(0.5),
        SparsityTarget(0.37, scope="layer"),
        SparsityTarget(0.4, relative_to="all"),
        SparsityTarget(pattern="2:4"),
    ],
    ids=["global", "layer", "of all", "2:4"],
)
def test_a_run_ends_with_the_zeros_that_were_said(target):
    model = small_model()
    explanation = explain(model, target, total_steps=20)
    (share,) = explanation.targets
    optimizer = LpAdamW(param_groups(model), lr=3e-3, p=0.5)
    attached = attach(model, optimizer, target=target, total_steps=20)
    for step in range(20):
        backward(model, step)
        optimizer.step()
        attached.after_step()
    zeros = sum(int((param == 0).sum()) for param in model.parameters())
    parameters = sum(param.numel() for param in model.parameters())
    assert share.zeros == zeros > 0
    assert share.of == explanation.decayed_weights
    assert share.share_of_all == zeros / parameters
    assert f"{zeros:,}" in str(share) and f"{100 * zeros / parameters:.2f} % of all parameters" in str(share)
    controller = attached.weight_controller
    assert controller is not None
    window = share.window
    assert (window.first, window.last, window.total) == tuple(controller.window)
    assert window.update_every == controller.update_every


def test_groups_are_pruned_as_many_as_were_said():
    model = model_of("mixtral")
    target = SparsityTarget(0.5, groups=("experts", "kv_groups"))
    explanation = explain(model, target, total_steps=20)
    (share,) = explanation.targets
    # 2 layers of 8 experts of three matrices 48 × 32, and of 2 heads of keys and values, 8 wide, which 4 queries read.
    assert share.groups == {"experts": [8, 16], "kv_groups": [2, 4]}
    assert share.zeros == 8 * 3 * 48 * 32 + 2 * (2 * 2 * 8 * 32 + 2 * 8 * 32)
    assert share.share_of_all == share.zeros / sum(param.numel() for param in model.parameters())
    assert not share.is_upper_bound
    attached = attach(model, LpAdamW(model.parameters(), lr=1e-3), target=target, total_steps=20)
    controller = attached.group_controller
    assert controller is not None and controller.window == (share.window.first, share.window.last, 20)


def test_weights_that_are_in_two_groups_make_the_zeros_an_upper_bound():
    target = SparsityTarget(0.5, groups=("experts", "expert_channels"))
    (share,) = explain(model_of("mixtral"), target, groups=False).targets
    assert share.is_upper_bound and "at most" in str(share)


def test_a_budget_is_what_is_left():
    model = model_of("llama")
    parameters = sum(param.numel() for param in model.parameters())
    budget = parameters - 10 * 96
    explanation = explain(model, SparsityTarget(budget=budget, groups="channels"))
    (share,) = explanation.targets
    assert share.groups == {"channels": [10, 96]} and share.zeros == 10 * 96


def test_a_pattern_leaves_out_what_has_no_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Conv2d(4, 4, 4), nn.Conv2d(3, 4, 2))
    target = SparsityTarget(pattern="2:4")
    explanation = explain(model, target)
    attached = attach(model, LpAdamW(model.parameters(), lr=1e-3), target=target, total_steps=30)
    assert decaying(explanation) == attached.decayed_singly == {"0.weight", "2.weight"}
    # Half of the weights: of 8 inputs of 6 outputs, and of 4 inputs of 4 outputs at 16 places.
    assert explanation.targets[0].zeros == 6 * 8 // 2 + 4 * 4 * 16 // 2
    for name, inputs in (("1.weight", 6), ("3.weight", 3)):
        assert reason_of(explanation, name) == f"no 2:4 blocks: its number of inputs, {inputs}, is no multiple of 4"
    with pytest.raises(UsageError, match="no parameter that decays can have pattern='2:4'.*0.weight"):
        explain(nn.Sequential(nn.Linear(6, 4)), target)


def test_updates_at_each_step_are_said_so():
    target = SparsityTarget(0.5, reconstruct=False)
    (share,) = explain(small_model(), target, total_steps=30, groups=False).targets
    assert str(share).endswith("steps 3–21 of 30, λ updated every step")


def test_updates_are_rarer_where_survivors_move_and_as_ever_where_none_can():
    linear, other = nn.Linear(20, 10), nn.Conv1d(8, 8, 3)
    for model, interval, count in ((linear, 120, 1), (other, 20, 0)):
        explanation = explain(model, SparsityTarget(0.5), total_steps=1000, groups=False, gpus=[1])
        assert explanation.targets[0].window.update_every == interval and len(explanation.updates) == count


def test_a_window_without_steps_is_a_part_of_the_run():
    text = str(explain(small_model(), SparsityTarget(0.5, start=0.2, end=0.6)))
    assert "from 20 % of the run to 60 % of the run" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"names": ["nothing"]}, "1 names are not parameters of the model, such as 'nothing'"),
        ({"overrides": {"*.nothing": {"p": 0.5}}}, r"the override '\*.nothing' matches no parameter"),
        ({"target": SparsityTarget(0.5), "weight_decay": 0.1}, "weight_decay=0.1 is given as well as a target"),
        (
            {"target": SparsityTarget(0.5), "overrides": {"*": {"weight_decay": 0.1}}},
            "weight_decay=0.1 is given as well as a target",
        ),
        ({"target": SparsityTarget(0.999, relative_to="all")}, "can't be reached: only"),
        ({"target": SparsityTarget(0.5), "total_steps": 9}, "the collapse of a weight takes 8"),
        ({"target": SparsityTarget(0.5), "names": []}, "no parameter decays"),
        ({"target": SparsityTarget(0.5, groups="experts")}, "no experts are recognised in Sequential"),
        ({"gpus": [0]}, "ranks=0 must be"),
    ],
)
def test_what_can_not_be_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(small_model(), **arguments)


def test_two_targets_that_get_into_each_others_way():
    model = model_of("llama")
    channels = SparsityTarget(0.6, groups="channels", start=0.1, end=0.5)
    with pytest.raises(UsageError, match="begins at step 30, and that of the groups ends at 50"):
        explain(model, [channels, SparsityTarget(0.7, start=0.3, end=0.8)], total_steps=100)
    # 29 of 48 channels, 96 weights each; of all that decays in a layer: these, and 3,072 weights of the attention.
    share = 29 * 96 / (48 * 96 + 3072)
    with pytest.raises(UsageError, match=f"when the groups are pruned {share:.1%} of all that decays is zero"):
        explain(model, [channels, SparsityTarget(0.3, start=0.5, end=0.8)], total_steps=100)
    (first, second) = explain(model, [channels, SparsityTarget(0.7, start=0.5, end=0.8)], total_steps=100).targets
    assert first.groups and second.subject == "weights"


# -- groups of weights --------------------------------------------------------


def test_groups_of_every_kind_with_what_shrink_cuts():
    kinds = {kind.kind: kind for kind in explain(model_of("mixtral")).groups}
    assert kinds["channels"].counts == [] and "expert_channels" in kinds["channels"].reason
    assert kinds["experts"].counts == [8, 8] and kinds["experts"].sizes == [3 * 48 * 32] * 2
    assert kinds["experts"].removals == ["8 → 4 in each of 2 layers"] and not kinds["experts"].reason
    assert kinds["expert_channels"].counts == [48] * 16 and kinds["expert_channels"].sizes == [3 * 32] * 16
    assert kinds["heads"].counts == [4, 4] and not kinds["heads"].removals
    assert "kv_groups prunes these groups" in kinds["heads"].reason
    assert kinds["kv_groups"].removals == ["2 → 1 in each of 2 layers"]


def test_with_a_target_shrink_cuts_what_that_prunes():
    target = SparsityTarget(0.25, groups="channels")
    kinds = {kind.kind: kind for kind in explain(model_of("llama"), target).groups}
    assert kinds["channels"].removals == ["48 → 36 in each of 2 layers"] and kinds["channels"].pruned == 24


def test_widths_in_one_entry_are_cut_together():
    """Shared experts of DeepSeek-V3 are as wide as the others."""
    kinds = {kind.kind: kind for kind in explain(model_of("deepseek_v3")).groups}
    assert "if channels are pruned as well, all are cut" in kinds["expert_channels"].reason
    assert "if expert_channels are pruned as well, all are cut" in kinds["channels"].reason


def test_a_router_that_chooses_all_lets_none_go():
    (kind,) = (kind for kind in explain(model_of("mixtral", num_local_experts=2)).groups if kind.kind == "experts")
    assert (kind.pruned, kind.removals, kind.reason) == (0, [], "no: routers choose as many as there are")


def test_groups_of_a_users_own_are_shown_with_the_others():
    model = small_model()
    sets = groups_of(model, outputs="0", inputs="2", kind="units")
    explanation = explain(model, SparsityTarget(0.25, groups=sets))
    units = next(kind for kind in explanation.groups if kind.kind == "units")
    assert units.counts == [160] and units.sizes == [64 + 1 + 64] and units.pruned == 40
    assert "it is not known how to remove them" in units.reason
    assert explanation.targets[0].zeros == 40 * 129


def test_no_reason_is_empty_and_no_warning_is_logged(caplog):
    gc.collect()  # a run of an earlier test may warn of its end when it goes
    caplog.clear()
    for family in ("llama", "olmo2", "falcon", "gpt2", "deepseek_v3", "nemotron_h", "llama4_text"):
        for kind in explain(model_of(family)).groups:
            assert kind.removals or kind.reason, (family, kind)
            assert not kind.reason.endswith((": ", ":", "; ")), (family, kind)
    assert not caplog.records


# -- memory, and what is printed ----------------------------------------------


def test_memory_is_that_of_the_footprint():
    model = small_model()
    parameters = sum(param.numel() for param in model.parameters())
    explanation = explain(model, gpus=[4, 16], optimizer="LpSGD", momentum=True, dtype="fp32", strategy="ZeRO-3")
    assert len(explanation.memory) == 16
    assert "Memory of the training state in fp32, KiB per GPU" in str(explanation)
    need = next(need for need in explanation.memory if (need.strategy, need.gpus) == ("ZeRO-3, offload", 16))
    expected = footprint(parameters, 16, 3, optimizer="LpSGD", momentum=True, dtype="fp32", offload=True)
    assert (need.device, need.host) == (expected.device.total, expected.host.total)
    here = footprint(parameters, 4, 3, optimizer="LpSGD", momentum=True, dtype="fp32").device.total
    assert f"Training state: {here / 1024:,.2f} KiB on each of 4 ranks by ZeRO-3" in "\n".join(explanation.short())


def test_what_is_printed_holds_the_numbers_and_one_line_is_no_longer_than_a_screen():
    model = model_of("mixtral")
    explanation = explain(model, SparsityTarget(0.5), total_steps=1000)
    text = str(explanation)
    assert "steps 100–700 of 1,000, λ updated every 20 steps" in text
    assert f"{explanation.decayed_weights:,} of {explanation.parameters:,} parameters decay" in text
    decayed: dict[str, list[int]] = {}
    for name, param in model.named_parameters():
        if name in decaying(explanation):
            decayed.setdefault(name.split(".")[-2 if name.endswith("weight") else -1], []).append(param.numel())
    rows = [line.split() for line in text.splitlines()]
    for kind, sizes in decayed.items():
        assert [kind, str(len(sizes)), f"{sum(sizes):,}"] in [row[:3] for row in rows]
    tables = [line for line in text.splitlines() if line.startswith(" ")]
    assert tables and max(map(len, tables)) <= reasons.WIDTH
    assert len(text.splitlines()) < 70


def test_json_holds_every_tensor():
    model = Mixer()
    values = json.loads(json.dumps(explain(model, SparsityTarget(0.5), total_steps=100).as_json()))
    assert {entry["name"]: entry["shape"] for entry in values["tensors"]} == {
        name: list(param.shape) for name, param in model.named_parameters()
    }
    assert sum(kind["weights"] for kind in values["kinds"]) == values["parameters"]
    decayed = sum(math.prod(entry["shape"]) for entry in values["tensors"] if entry["decays"])
    assert values["decayed_weights"] == decayed == values["targets"][0]["of"]


def test_it_is_a_public_name():
    assert lp_dist.explain is explain
