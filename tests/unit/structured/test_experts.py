"""Experts and their channels: which weights they are, in every layout, found by what a module does and never by its
name; and how few a router needs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.families import GROUPED, MIXTURES, kill, model_of, slot_of, slots
from helpers.mixtures import Desk, Shelf, Study
from lp_dist.errors import UsageError
from lp_dist.modules.model import read_model
from lp_dist.structured.budget import GroupBudget, required_costs
from lp_dist.structured.experts import expert_layout
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.mixtures import mixtures
from lp_dist.structured.resolve import resolve_groups

TOKENS = torch.arange(24).view(2, 12) % 61


def first_of_layers(model: nn.Module, kind: str) -> list[WeightGroups]:
    """The first set of each layer."""
    sets: dict[str, WeightGroups] = {}
    for groups in resolve_groups(model, kind):
        sets.setdefault(groups.name, groups)
    return [*sets.values()]


@pytest.mark.parametrize("kind", ["experts", "expert_channels"])
@pytest.mark.parametrize("family", MIXTURES)
def test_noise_in_a_group_does_nothing_once_what_reads_it_is_zero(family, kind):
    count, width = MIXTURES[family][1]
    # Every expert is chosen.
    chosen = {"num_experts_per_tok": count} | ({"topk_group": 2} if family == "deepseek_v3" else {})
    model = model_of(family, **chosen).double()
    # Products of many experts at once have no double precision.
    model.config._experts_implementation = "eager"
    resolved = first_of_layers(model, kind)
    routed = 2 if family == "deepseek_v3" else 1
    assert [groups.count for groups in resolved] == [count // routed if kind == "experts" else width] * 2
    params = dict(model.named_parameters())
    of_experts = sum(params[name].numel() for name in params if name.startswith(resolved[0].name + "."))
    if kind == "experts":
        assert resolved[0].elements * count == of_experts
    for groups in resolved:
        group = groups.count - 1
        writers, readers = slots(model, groups, group, False), slots(model, groups, group, True)
        assert sum(slot.numel() for slot in (*writers, *readers)) == groups.elements
        with torch.no_grad():
            plain = model(TOKENS).logits
            for slot in writers:
                kept = slot.clone()
                slot.add_(torch.randn(slot.shape))
                assert (model(TOKENS).logits - plain).abs().max() > 1e-6
                slot.copy_(kept)
            kill(model, groups, [group])
            before = model(TOKENS).logits
            for slot in writers:
                slot.add_(torch.randn(slot.shape))
            torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-12)
            for slot in writers:
                slot.zero_()
        # With its weights zero as well nothing brings it back.
        model.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        for member in groups.members:
            slot = slot_of(params[member.name].grad, member, group)
            # Biases that are read have gradients: they are held at zero by the decay.
            assert slot is None or member.name.endswith("down_proj_bias") or not slot.any(), member


def stacked(count: int = 4, width: int = 10, inner: int = 6) -> nn.Module:
    blocks = [Study(Shelf(count, width, inner), count, width) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def with_numbers(model: nn.Module, **numbers: object) -> nn.Module:
    """Attributes of its blocks."""
    for block in model["layers"]:
        for name, number in numbers.items():
            setattr(block, name, number)
    return model


def listed(count: int = 3) -> nn.Module:
    desks = nn.ModuleList(Desk(10) for _ in range(count))
    return nn.ModuleDict({"embed": nn.Embedding(7, 10), "layers": nn.ModuleList([Study(desks, count, 10, top_k=1)])})


def test_a_module_that_nobody_knows_is_recognised_by_what_its_code_does():
    model = stacked()
    mixture = mixtures(model)[0]
    assert (mixture.name, mixture.count) == ("layers.0.experts", 4)
    assert mixture.router.followers == (("layers.0.chooser", 0), ("layers.0.offset", 0))
    channels = resolve_groups(model, "expert_channels")
    assert [groups.label for groups in channels[:2]] == [
        "layers.0.experts[0] expert_channels",
        "layers.0.experts[1] expert_channels",
    ]
    assert {(m.name.split(".")[-1], m.dim, m.start, m.stop, m.width, m.reads) for m in channels[1].members} == {
        ("alpha", 2, 0, 12, 2, False),
        ("beta", 1, 0, 12, 2, False),
        ("omega", 1, 0, 6, 1, True),
    }, "psi is of no channel"
    (experts, _) = resolve_groups(model, "experts")
    assert (experts.count, experts.least, experts.elements) == (4, 2, 10 * 12 + 12 + 6 * 10 + 10)


class Counted(nn.Module):
    """Experts that are told how many tokens each has, as DeepSpeed's; the product of all at once is not for fp64."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.inward, self.outward = (
            nn.Parameter(torch.randn(count, inner, width)),
            nn.Parameter(torch.randn(count, width, inner)),
        )
        self.use_grouped_mm = True

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.use_grouped_mm:
            raise RuntimeError("Expected mat_a to be Float32")
        return torch.cat(
            [
                torch.relu(tokens @ inward.T) @ outward.T
                for tokens, inward, outward in zip(x.split(counts.tolist()), self.inward, self.outward)
            ]
        )


def test_experts_that_are_given_counts_of_tokens_are_run_without_their_grouped_product():
    experts = Counted(3, 10, 6)
    layout = expert_layout(experts, {name: tuple(param.shape) for name, param in experts.named_parameters()})
    assert layout.channels == 6 and experts.use_grouped_mm
    assert {name: (weight.reads, weight.dim) for name, weight in layout.weights.items()} == {
        "inward": (False, 1),
        "outward": (True, 2),
    }


def test_layouts_of_large_experts_are_found_on_small_ones():
    """The numbers of a module that are sizes are scaled with its weights."""
    model = stacked(3, 384, 512)
    (first, *_) = resolve_groups(model, "expert_channels")
    assert first.count == 512
    assert {(member.dim, member.stop, member.width) for member in first.members} == {
        (2, 1024, 2),
        (1, 1024, 2),
        (1, 512, 1),
    }
    on_meta = stacked(3, 384, 512).to("meta")
    assert resolve_groups(on_meta, "expert_channels")[0].members == first.members


def test_a_list_of_equal_modules_beside_a_router_is_of_experts():
    model = listed()
    (experts,) = resolve_groups(model, "experts")
    assert (experts.count, experts.least, experts.elements) == (3, 1, 2 * 12 * 10 + 12 + 10)
    for group in range(3):
        params = dict(model.named_parameters())
        owned = {m.name for m in experts.members if slot_of(params[m.name], m, group) is not None}
        assert owned == {
            f"layers.0.experts.{group}.{name}" for name in ("up.weight", "up.bias", "down.weight", "down.bias")
        }
        assert sum(slot.numel() for slot in slots(model, experts, group, True)) == 130, "down and its bias"
    assert [groups.label for groups in resolve_groups(model, "expert_channels")] == [
        f"layers.0.experts[{i}] expert_channels" for i in range(3)
    ]
    with pytest.raises(UsageError, match="channels of experts are a kind of their own, expert_channels"):
        resolve_groups(model, "channels")


class Tied(Shelf):
    """Its channels are not apart: they are normalised together."""

    def forward(self, rows: Tensor, which: Tensor, how_much: Tensor) -> Tensor:
        made = (rows @ self.alpha[0] + self.beta[0])[:, ::2]
        return (made - made.mean(1, keepdim=True)) @ self.omega[0] * how_much.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "model, says",
    [
        (
            with_numbers(stacked(), top_k=None),
            r"it is not known how many experts its router \(layers.0.chooser\) chooses",
        ),
        (with_numbers(stacked(), n_group=3), "its router chooses among 3 groups, and 4 experts are no multiple of it"),
        (
            nn.ModuleDict({"layers": nn.ModuleList([Study(Tied(4, 10, 6), 4, 10)])}),
            "layers.0.experts: it is not known which weights of alpha make a channel",
        ),
        (nn.ModuleDict({"layers": nn.ModuleList([Shelf(4, 10, 6)])}), "no matrix beside it has 4 outputs"),
    ],
)
def test_what_is_not_known_is_refused_with_the_reason(model, says):
    with pytest.raises(UsageError, match=says):
        resolve_groups(model, "experts")


@pytest.mark.parametrize("family", MIXTURES)
def test_what_the_code_says_of_a_parameter_is_what_running_it_shows(family):
    """`lp_dist.modules` reads the code; here it is run."""
    model = model_of(family)
    products = read_model(model).products
    (first, *_) = resolve_groups(model, "expert_channels")
    matrices = [member for member in first.members if not member.name.endswith("bias")]
    assert len({member.name for member in matrices}) == 2
    for member in matrices:
        product = products[member.name]
        assert product.experts == 0
        assert member.dim == (product.inputs if member.reads else product.outputs), member


class Bench(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.planks = nn.Parameter(torch.randn(*shape))


def test_experts_in_several_modules_are_refused():
    block = nn.ModuleDict({"first": Bench(4, 12, 10), "last": Bench(4, 10, 12), "chooser": nn.Linear(10, 4)})
    with pytest.raises(UsageError, match="layers.0: its experts lie in parameters of several modules"):
        resolve_groups(nn.ModuleDict({"layers": nn.ModuleList([block])}), "experts")


def test_layers_beside_a_head_with_as_many_outputs_are_no_experts():
    """Two layers, and a classifier of two classes."""
    model = nn.ModuleDict({"layers": nn.ModuleList(Desk(10) for _ in range(2)), "score": nn.Linear(10, 2)})
    model.top_k = 1
    assert not mixtures(model)
    assert not mixtures(nn.ModuleDict({"stages": nn.ModuleList([model])})["stages"][0])


def test_two_routers_are_refused():
    model = stacked()
    model["layers"][0].second = nn.Linear(10, 4)
    model["layers"][1].second = nn.Linear(10, 4)
    with pytest.raises(UsageError, match="2 matrices beside it have as many outputs as it has experts"):
        resolve_groups(model, "experts")


# -- how many may go ----------------------------------------------------------


def sets_of(least: int, count: int = 8) -> list[WeightGroups]:
    return [WeightGroups(f"layers.{i}.experts", "experts", count, 10, (), least=least) for i in range(2)]


@pytest.mark.parametrize(
    "scope, sparsity, says",
    [
        ("layer", 0.8, "leaves 2 of them, and 4 must stay, since the router chooses as many for a token; ask for 0.5"),
        ("global", 0.8, "0.8 of the 16 experts leaves 3 of them, and 8 must stay"),
    ],
)
def test_fewer_experts_than_a_router_chooses_are_refused_before_the_run(scope, sparsity, says):
    with pytest.raises(UsageError, match=says):
        required_costs(GroupBudget(sparsity, None, "decayed", scope), sets_of(4), 1000)
    assert required_costs(GroupBudget(0.5, None, "decayed", scope), sets_of(4), 1000)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_that_needs_more_of_them_is_refused(scope):
    with pytest.raises(
        UsageError, match="can't be reached: 160 parameters are in these groups, of which 80 must stay"
    ):
        required_costs(GroupBudget(None, 900, "decayed", scope), sets_of(4), 1000)
    assert required_costs(GroupBudget(None, 920, "decayed", scope), sets_of(4), 1000)


def test_experts_that_are_routed_by_groups_are_sets_of_their_own():
    model = model_of("deepseek_v3")
    resolved = resolve_groups(model, "experts")
    assert [groups.label for groups in resolved[:2]] == [
        "model.layers.0.mlp.experts[0:4] experts",
        "model.layers.0.mlp.experts[4:8] experts",
    ]
    assert [(groups.count, groups.least) for groups in resolved] == [(4, 2)] * 4
    assert {(member.name.split(".")[-1], member.start, member.stop) for member in resolved[1].followers} == {
        ("weight", 4, 8),
        ("e_score_correction_bias", 4, 8),
    }


def test_shared_experts_are_in_no_group_of_experts():
    model = model_of("deepseek_v3")
    names = {
        member.name for groups in resolve_groups(model, ["experts", "expert_channels"]) for member in groups.members
    }
    assert names and not any("shared" in name for name in names)


def test_a_dense_model_has_none():
    with pytest.raises(UsageError, match="no experts are recognised in LlamaForCausalLM. Looked for"):
        resolve_groups(model_of("llama", **GROUPED), "experts")
