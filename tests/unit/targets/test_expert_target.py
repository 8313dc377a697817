"""Targets for experts and their channels: how many are pruned, of which layer, and that a router keeps as many as it
chooses; and what is told of them when they are attached.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

from helpers.families import model_of
from lp_dist import LpAdamW, SparsityTarget, attach
from lp_dist.attachment.attachment import Attachment
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.structured.resolve import resolve_groups

TOKENS = torch.arange(24).view(2, 12) % 61


def attached_to(model: nn.Module, steps: int = 20, **target: Any) -> Attachment:
    optimizer = LpAdamW(model.parameters(), lr=3e-3)
    return attach(model, optimizer, target=SparsityTarget(**target), total_steps=steps)


def trained(model: nn.Module, attachment: Attachment, steps: int = 20) -> None:
    for number in range(steps):
        model.zero_grad()
        tokens = (TOKENS * (number + 1)) % 61
        model(tokens, labels=tokens).loss.backward()
        attachment.optimizer.step()
        attachment.after_step()
    attachment.finish()


def dead_experts(model: nn.Module) -> list[int]:
    """How many experts of each layer are all zeros, gate, up and down."""
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, param in model.named_parameters():
        if ".experts." in name:
            stacks.setdefault(name.rpartition(".")[0], []).append((param == 0).flatten(1).all(1))
    return [int(torch.stack(zero).all(0).sum()) for zero in stacks.values()]


@pytest.mark.parametrize("family, dead", [("mixtral", 4), ("gpt_oss", 2), ("llama4_text", 2), ("deepseek_v3", 4)])
def test_every_layer_loses_as_many_experts(family, dead):
    model = model_of(family)
    attachment = attached_to(model, sparsity=0.5, groups="experts")
    trained(model, attachment)
    assert dead_experts(model) == [dead, dead]
    for groups in resolve_groups(model, "experts"):
        down = model.get_parameter(next(member.name for member in groups.members if member.reads))
        first = groups.members[0].start
        gone = (down[first : first + groups.count] == 0).flatten(1).all(1)
        assert int(gone.sum()) == groups.count // 2, "equally many of each group that is routed together"
    routers = [p for name, p in model.named_parameters() if "gate.weight" in name or "router.weight" in name]
    assert routers and all(router.any(1).all() for router in routers), "rows of a router do not decay"


@pytest.mark.parametrize("family, per_expert", [("mixtral", 24), ("gpt_oss", 24), ("llama4_text", 24)])
def test_every_expert_loses_as_many_channels_of_its_own(family, per_expert):
    model = model_of(family)
    trained(model, attached_to(model, sparsity=0.5, groups="expert_channels"))
    masks = []
    for groups in resolve_groups(model, "expert_channels"):
        (member,) = [member for member in groups.members if member.reads]
        down = model.get_parameter(member.name)[member.expert]
        masks.append((down == 0).all(2 - member.dim))
        assert int(masks[-1].sum()) == per_expert
    assert len({tuple(mask.tolist()) for mask in masks}) > 2


def test_one_threshold_for_all_layers_leaves_each_router_what_it_chooses():
    """The experts of layer 0 are the weaker ones: all of them would go."""
    model = model_of("mixtral", num_local_experts=4)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "layers.0.mlp.experts" in name:
                param.mul_(0.01)
    attachment = attached_to(model, sparsity=0.5, groups="experts", scope="global", precondition=0.0)
    strongest = model.model.layers[0].mlp.experts.down_proj.detach().flatten(1).norm(dim=1).argsort()[-2:]
    trained(model, attachment)
    assert dead_experts(model) == [2, 2]
    rest = model.model.layers[0].mlp.experts.down_proj.detach().flatten(1).norm(dim=1)
    assert rest[strongest].all(), "what must stay does not decay with the rest"


@pytest.mark.parametrize("freeze", [True, False])
def test_experts_stay_zero_after_the_window_with_their_momentum(freeze):
    model = model_of("gpt_oss")
    attachment = attached_to(model, sparsity=0.5, groups="experts", end=0.5, freeze=freeze)
    trained(model, attachment)
    biases = [layer.mlp.experts.down_proj_bias for layer in model.model.layers]
    # Nothing but the decay holds the last biases at zero: tokens are still sent to the dead experts.
    assert (dead_experts(model) == [2, 2]) == freeze
    if freeze:
        for bias in biases:
            momentum = attachment.optimizer.state[bias]["exp_avg"]
            assert not momentum[(bias == 0).all(1)].any()


def test_a_run_goes_on_from_its_state():
    def run(stop: int | None) -> tuple[dict[str, torch.Tensor], str]:
        torch.manual_seed(0)
        model = model_of("mixtral")
        attachment = attached_to(model, sparsity=0.5, groups=["experts"])
        for number in range(20):
            if number == stop:
                weights, optimizer, state = (
                    {name: value.clone() for name, value in model.state_dict().items()},
                    json.loads(json.dumps({})) or attachment.optimizer.state_dict(),
                    json.loads(json.dumps(attachment.state_dict())),
                )
                model = model_of("mixtral")
                model.load_state_dict(weights)
                attachment = attached_to(model, sparsity=0.5, groups=["experts"])
                attachment.optimizer.load_state_dict(optimizer)
                attachment.load_state_dict(state)
            tokens = (TOKENS * (number + 1)) % 61
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            attachment.optimizer.step()
            attachment.after_step()
        return model.state_dict(), json.dumps(attachment.state_dict())

    (wanted, wanted_state), (got, got_state) = run(None), run(9)
    assert wanted_state == got_state
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


# -- what is told -------------------------------------------------------------


def test_a_sparsity_that_leaves_a_router_too_few_is_refused_at_once():
    with pytest.raises(UsageError, match="must stay, since the router chooses as many for a token; ask for 0.75 at"):
        attached_to(model_of("mixtral"), sparsity=0.9, groups="experts")


def test_groups_that_can_not_be_cut_out_are_told_when_they_are_attached(caplog):
    with caplog.at_level(logging.WARNING, "lp_dist"):
        attached_to(model_of("gpt2"), sparsity=0.5, groups="heads")
    assert "lp-dist export --shrink will not remove these groups" in caplog.text
    assert "4 of 8 attention heads are dead and stay: all layers have one number" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lp_dist"):
        attached_to(model_of("mixtral"), sparsity=0.5, groups="experts")
    assert "will not remove" not in caplog.text


def test_a_budget_counts_what_can_be_cut_out_alone(caplog):
    """GPT-2's heads stay in the model as zeros."""
    model = model_of("gpt2")
    parameters = sum(param.numel() for param in model.parameters())
    with pytest.raises(
        UsageError, match="can remove none of these groups.*4? ?of 8 attention heads are dead and stay"
    ):
        attached_to(model, budget=parameters - 5000, groups="heads")
    with caplog.at_level(logging.WARNING, "lp_dist"):
        attachment = attached_to(model, budget=parameters - 5000, groups=["heads", "channels"])
    assert "2 of 4 sets of groups are left out of the budget" in caplog.text
    trained(model, attachment)
    removed = sum(
        groups.elements * int((model.get_parameter(groups.members[-1].name) == 0).all(1).sum())
        for groups in resolve_groups(model, "channels")
    )
    assert removed >= 5000


def test_shared_experts_whose_width_follows_are_cut_with_the_others(tmp_path):
    """Widths of experts are multiples of 8, so that more is pruned than the budget needs."""
    model = model_of("deepseek_v3")
    parameters = sum(param.numel() for param in model.parameters())
    with pytest.raises(UsageError, match="can remove none of these groups.*channels of experts are dead and stay"):
        attached_to(model, budget=parameters - 9000, groups="expert_channels")
    trained(model, attached_to(model, budget=parameters - 9000, groups=["expert_channels", "channels"]))
    model.save_pretrained(tmp_path / "masked")
    export(tmp_path / "masked", tmp_path / "out", shrink=True, verify=True)
    small = type(model).from_pretrained(tmp_path / "out")
    assert small.config.moe_intermediate_size == 16
    assert sum(param.numel() for param in small.parameters()) <= parameters - 9000


def test_a_budget_below_what_removal_can_reach_is_refused():
    model = model_of("mixtral")
    parameters = sum(param.numel() for param in model.parameters())
    with pytest.raises(UsageError, match="can't be reached"):
        attached_to(model, budget=parameters // 8, groups="expert_channels")
