"""Which dead groups a configuration lets go: by layer where it can say so, and of experts that are modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from helpers.architectures import ARCHITECTURES
from helpers.mixtures import Desk, Shelf, Study
from lp_dist.structured.removal import FUSED, foreseen_removals, plan_removals
from lp_dist.structured.resolve import recognised_groups
from lp_dist.structured.widths import Widths


class HouseConfig(PreTrainedConfig):
    model_type = "house"

    def __init__(self, hidden_size: int = 10, shelves: Any = (6, 6), desks: int = 0, **more: Any) -> None:
        super().__init__(**more)
        self.hidden_size, self.desks = hidden_size, desks
        self.shelves = list(shelves)
        self.num_hidden_layers = len(self.shelves)


class House(PreTrainedModel):
    """Experts in one tensor, as many as its configuration says of each layer; or modules, in all layers as many."""

    config_class = HouseConfig

    def __init__(self, config: HouseConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.layers = nn.ModuleList(
            Study(nn.ModuleList(Desk(size) for _ in range(config.desks)), config.desks, size, top_k=1)
            if config.desks
            else Study(Shelf(count, size, 7), count, size)
            for count in config.shelves
        )
        self.post_init()


def planned(config: HouseConfig, dead: dict[str, list[int]]) -> tuple[Widths, list[str]]:
    with torch.device("meta"):
        model = House(config)
    recognised, _ = recognised_groups(model)
    flags = {
        groups.label: torch.zeros(groups.count, dtype=torch.bool) for sets in recognised.values() for groups in sets
    }
    for label, indices in dead.items():
        flags[label][indices] = True
    widths = Widths(House, config, config.to_dict(), model)
    return widths, [str(removal) for removal in plan_removals(widths, recognised, flags)]


def test_each_layer_has_a_number_of_experts_of_its_own_where_the_config_has_a_list():
    widths, removals = planned(HouseConfig(), {"layers.0.experts experts": [0, 1, 2], "layers.1.experts experts": [5]})
    assert removals == ["4 of 12 experts are dead, 4 are removed: 6 → 3 to 5 in each of 2 layers"]
    assert widths.config["shelves"] == [3, 5]
    assert widths.shapes["layers.0.experts.alpha"] == (3, 10, 14) and widths.shapes["layers.1.offset"] == (5,)
    assert widths.kept["layers.1.chooser", 0].tolist() == [True] * 5 + [False]


def test_experts_that_are_modules_are_numbered_anew():
    config = HouseConfig(shelves=(1, 1), desks=4)
    labels = [f"layers.{i}.experts experts" for i in range(2)]
    widths, removals = planned(config, {labels[0]: [1, 2], labels[1]: [0, 3]})
    assert removals == ["4 of 8 experts are dead, 4 are removed: 4 → 2 in each of 2 layers"]
    assert widths.config["desks"] == 2
    assert [widths.renamed(f"layers.0.experts.{i}.up.weight") for i in range(4)] == [
        "layers.0.experts.0.up.weight",
        None,
        None,
        "layers.0.experts.1.up.weight",
    ]
    assert widths.renamed("layers.1.experts.2.down.bias") == "layers.1.experts.1.down.bias"
    assert {name for name, _ in widths.model().named_parameters()} == {
        widths.renamed(name) for name in widths.shapes if "offset" not in name
    }


def test_dead_channels_of_experts_that_are_modules_stay_where_no_entry_has_their_width():
    config = HouseConfig(shelves=(1,), desks=2)
    widths, removals = planned(config, {f"layers.0.experts[{i}] expert_channels": [0, 1, 2, 3] for i in range(2)})
    assert removals == [
        "8 of 24 channels of experts are dead and stay: no entry of config.json, changed alone, makes them fewer than"
        " 12"
    ]
    assert not widths.kept


def test_groups_whose_parameters_lie_together_in_the_files_are_foreseen_to_stay():
    """Of HrmText gate and up, and queries, keys and values, are each one tensor in the files."""
    model = ARCHITECTURES["HrmTextForCausalLM"].model()
    recognised, _ = recognised_groups(model)
    for kind in ("channels", "kv_groups"):
        counts = {groups.label: groups.count // 2 for groups in recognised[kind]}
        foreseen = foreseen_removals(type(model), model.config, counts)
        assert counts and foreseen.uncut == counts.keys() and {removal.why for removal in foreseen.removals} == {FUSED}
        assert foreseen.parameters == model.num_parameters()
