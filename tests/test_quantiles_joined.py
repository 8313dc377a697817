"""What a look takes together: small parts are joined, and a device is read once for all tensors."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantile_cases import few, number, part, shard_of

from lp_dist.sparsity import census as census_module
from lp_dist.sparsity import quantiles
from lp_dist.sparsity.census import census
from lp_dist.sparsity.quantiles import Part, share_below, smallest


@given(st.data())
@few
def test_parts_that_are_joined_are_as_parts_alone(data):
    """Of several scopes, some with x of another form, some empty; slices so small that a batch ends amid them."""

    def drawn(i: int) -> Part:
        weights = torch.tensor(data.draw(st.lists(number, max_size=12)), dtype=torch.float32)
        scope = data.draw(st.sampled_from("abc"))
        if data.draw(st.booleans()):
            return part(scope, weights)
        return part(
            scope,
            weights,
            p=0.0,
            second=torch.rand(len(weights)),
            precondition=1.0,
            betas=(0.9, 0.99),
            eps=1e-8,
            step=float(i % 2 + 1),
        )

    parts = [drawn(i) for i in range(data.draw(st.integers(1, 9)))]
    numel = {p.scope: sum(q.weights.numel() for q in parts if q.scope == p.scope) for p in parts if p.weights.numel()}
    parts = [p for p in parts if p.scope in numel]
    ranks = {scope: data.draw(st.integers(0, n)) for scope, n in numel.items()}
    with mock.patch.dict(quantiles.slices._SLICE, cpu=data.draw(st.sampled_from([1, 10, 1 << 16]))):
        assert smallest(parts, ranks, 2, elements=numel) == smallest(parts, ranks, 2)
        thresholds = {scope: data.draw(number.map(abs)) for scope in numel}
        below = {
            scope: sum(int((x <= thresholds[scope]).sum()) for p in parts if p.scope == scope for *_, x in p.x())
            for scope in numel
        }
    assert share_below(parts, thresholds) == {scope: below[scope] / max(1, n) for scope, n in numel.items()}


@pytest.mark.parametrize("scopes", [1, 200])
def test_a_look_at_many_tensors_takes_few_calls(scopes, monkeypatch):
    """On an accelerator each is a wait for the device, which took longer than the steps between two looks."""
    calls, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *args, **more: calls.append(1) or bincount(*args, **more))
    parts = [part(str(i % scopes), torch.randn(100)) for i in range(200)]
    numel = dict.fromkeys((str(i) for i in range(scopes)), 100 * 200 // scopes)
    smallest(parts, {scope: n // 2 for scope, n in numel.items()}, 2, elements=numel)
    assert len(calls) == 2, "one for each pass"
    share_below(parts, dict.fromkeys(numel, 0.5))
    assert len(calls) == 4


def test_a_census_reads_the_device_once_for_all_tensors(monkeypatch):
    shapes = [(8, 3), (5, 4), (), (6, 2)] * 10
    all_ = [
        shard_of(torch.randn(torch.Size(shape).numel()).relu(), shape, 0, torch.Size(shape).numel())
        for shape in shapes
    ]
    read, on_host = [], census_module._on_host
    monkeypatch.setattr(census_module, "_on_host", lambda *args: read.append(1) or on_host(*args))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a wait for each tensor"))
    found = census(all_)
    assert len(read) == 2 and found.counts == [(int((s.tensor == 0).sum()), s.tensor.numel()) for s in all_]
