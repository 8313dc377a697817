"""Counting zeros and magnitudes, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.models import SMALL_MATRICES, small_model
from lp_dist import measure_histogram, measure_sparsity
from lp_dist.optim import batching
from lp_dist.sparsity.measure import Sparsity, kind_of


@pytest.mark.parametrize("most", [1, 7, 1000])
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(0),
        torch.tensor(0.0),
        torch.randn(6, 5).relu(),
        torch.randn(5, 6).relu().t(),
        torch.randn(21).bfloat16().relu(),
    ],
    ids=lambda values: str(tuple(values.shape)),
)
def test_zeros_are_counted_over_all_tiles(values, most, monkeypatch):
    monkeypatch.setitem(batching.TILE_SIZE, "cpu", most)
    count = batching.count_zeros(values)
    assert int(count) == int((values == 0).sum()) and count.dtype == torch.int64 and count.ndim == 0


def test_counts_are_those_of_the_weights():
    model = small_model()
    params = dict(model.named_parameters())
    result = measure_sparsity(model)
    assert set(result.counts) == SMALL_MATRICES
    for name, (zeros, elements) in result.counts.items():
        assert (zeros, elements) == (int((params[name] == 0).sum()), params[name].numel())
    assert result.elements == 35 + 15 + 3
    assert result.total == result.zeros / result.elements
    assert 0 < result.zeros < result.elements


def test_a_tensor_that_became_zero_still_counts():
    model = small_model()
    with torch.no_grad():
        model[2].weight.zero_()
    assert measure_sparsity(model).counts["2.weight"] == (15, 15)


def test_names_choose_what_counts_and_unknown_ones_raise():
    model = small_model()
    assert set(measure_sparsity(model, names=["1.weight"]).counts) == {"1.weight"}
    with pytest.raises(ValueError, match="'9.weight'.*named_parameters"):
        measure_sparsity(model, names=["0.weight", "9.weight"])


def test_kinds_of_layers():
    assert kind_of("model.layers.3.mlp.up_proj.weight") == "up_proj"
    assert kind_of("0.weight") == "weight"
    assert kind_of("model.layers.0.experts.gate_up_proj") == "gate_up_proj"
    counts = Sparsity({"a.0.q.weight": (1, 4), "a.1.q.weight": (2, 4), "a.0.v.weight": (3, 3)})
    assert counts.by_kind() == {"q": (3, 8), "v": (3, 3)}
    assert Sparsity({}).total == 0.0


def test_histogram_bins_hold_what_they_say():
    model = nn.Sequential(nn.Linear(300, 200, bias=False))
    with torch.no_grad():
        weight = model[0].weight
        weight.mul_(torch.logspace(-8, 2, weight.numel()).view_as(weight))
        weight.view(-1)[:5] = torch.tensor([0.0, 1e-30, 1e30, 0.75, -0.75])
    histogram = measure_histogram(model)
    edges = torch.tensor(histogram.edges, dtype=torch.float64)
    assert len(edges) == 241 and (edges.diff() > 0).all()
    inner = torch.histogram(model[0].weight.detach().abs().double().flatten(), edges)[0].long().tolist()
    counts = histogram.counts["0.weight"]
    assert histogram.zeros["0.weight"] == int((model[0].weight == 0).sum()) >= 1
    assert counts[1:-1] == inner[1:-1]
    assert (counts[0], counts[-1]) == (inner[0] + 1, inner[-1] + 1)  # 1e-30 and 1e30, beyond the edges
    bin_of = next(i for i, edge in enumerate(histogram.edges) if edge == 0.75)
    assert counts[bin_of] >= 2
