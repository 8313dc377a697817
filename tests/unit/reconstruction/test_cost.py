"""What moving survivors costs on paper, against what it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lp_dist
from helpers.targets import START, TargetRun, model_of
from lp_dist import SparsityTarget
from lp_dist.reconstruction import budget
from lp_dist.reconstruction.cost import linear_shapes, reconstruction_cost

LAYERS = ["0.weight", "2.weight", "4.weight"]


def test_shapes_are_outputs_and_inputs_of_layers_that_can_move():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": Conv1D(5, 7), "c": nn.Conv1d(2, 2, 3), "d": nn.Embedding(9, 6)})
    model["e"] = nn.Linear(6, 9)
    model["e"].weight = model["d"].weight  # tied
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    assert linear_shapes(model, names) == [(3, 6), (5, 7)]
    assert linear_shapes(model, ["b.weight"]) == [(5, 7)]


def test_operations_and_bytes_are_those_of_an_update(monkeypatch):
    """The run's batches have fewer tokens than are kept at most."""
    monkeypatch.setattr(budget, "TOKENS", 32)
    run = TargetRun(SparsityTarget(0.5, reconstruct=True, update_every=2)).to(START + 1)
    run.step()
    sample = run.attached.weight_controller.reconstruction.sample
    kept = sum(part.numel() * part.element_size() for name in LAYERS for _, part in sample._parts[name])
    # torch counts no addmm that is in place.
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run.attached.after_step()
    cost = reconstruction_cost(linear_shapes(model_of(), LAYERS), 1, bytes_of_inputs=4)
    assert (cost.layers, cost.sample, cost.reduced) == (3, kept, 0)
    assert counter.get_total_flops() == pytest.approx(cost.flops)


def test_ranks_share_the_rows_and_the_tokens():
    alone, shared = (reconstruction_cost([(4096, 4096), (4096, 14336)], ranks) for ranks in (1, 8))
    assert alone.sample == 8 * shared.sample == 8192 * (4096 + 14336) * 2
    assert shared.reduced == 4 * (4096**2 + 14336**2) and alone.reduced == 0
    assert alone.flops == pytest.approx(8 * shared.flops)
    assert shared.solving == alone.solving > 4 * (14336**2 + 4096 * 14336)  # a layer may lie on one of them


def test_a_plan_says_what_an_update_costs():
    model = model_of()
    explanation = lp_dist.explain(model, SparsityTarget(0.5, reconstruct=True), gpus=[1, 8], dtype="fp32")
    (alone, shared) = explanation.updates
    assert (alone.subject, alone.gpus, shared.gpus) == ("weights", 1, 8)
    assert alone.cost == reconstruction_cost([(160, 64), (64, 160), (8, 64)], 1, 4)
    assert "Survivors move at each update" in str(explanation) and len(explanation.as_json()["updates"]) == 2
    assert lp_dist.explain(model, SparsityTarget(0.5), gpus=[1, 8], dtype="fp32").updates == explanation.updates
    without = lp_dist.explain(model, SparsityTarget(0.5, reconstruct=False))
    assert without.updates == [] and "Survivors move" not in str(without)


def test_of_groups_only_the_readers_move():
    from helpers.families import model_of as family

    model = family("llama")
    target = SparsityTarget(0.3, groups="channels", reconstruct=True)
    (update,) = lp_dist.explain(model, target, gpus=[1]).updates
    down = [tuple(layer.mlp.down_proj.weight.shape) for layer in model.model.layers]
    assert update.subject == "groups" and update.cost == reconstruction_cost(down, 1)
    assert torch.is_tensor(model.model.layers[0].mlp.down_proj.weight)
