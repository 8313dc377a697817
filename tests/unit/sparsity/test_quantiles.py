"""Order statistics from histograms, against sorted arrays: one process, and ranks that are threads here and meet at
every sum.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.quantiles import SMALLEST, cut, few, meeting, number, ordered, part, shard_of, vector
from lp_dist import LpAdamW, attach
from lp_dist.sharding.shards import Shard, shards
from lp_dist.sparsity import census as census_module
from lp_dist.sparsity import quantiles
from lp_dist.sparsity.census import Census, census
from lp_dist.sparsity.quantiles import Part, share_below, smallest, stride_of, zero_below

# -- order statistics ---------------------------------------------------------


@given(st.data())
@few
def test_the_threshold_is_an_order_statistic_of_each_scope(data):
    """After three passes exactly; after two not below it, and above it by less than a part in 8,192 (for denormals:
    2¹⁰ of the least).
    """
    scopes = {name: data.draw(vector) for name in "abc"[: data.draw(st.integers(1, 3))]}
    parts = []
    for name, values in scopes.items():
        flat = torch.tensor(values, dtype=torch.float32)
        parts += [part(name, flat[i:j]) for i, j in cut(flat, data.draw(st.lists(st.floats(0, 1), max_size=3)))]
    ranks = {name: data.draw(st.integers(0, len(values))) for name, values in scopes.items()}
    exact, close = (smallest(data.draw(st.permutations(parts)), ranks, passes=passes) for passes in (3, 2))
    for name, rank in ranks.items():
        wanted = float(ordered(scopes[name])[rank - 1]) if rank else 0.0
        assert exact[name] == wanted, f"rank {rank} of {name}: {exact[name]} is not the exact one, {wanted}"
        if rank:
            assert wanted <= close[name] <= wanted + max(wanted / 8192, 1023 * SMALLEST), (
                f"rank {rank} of {name}: {close[name]} for {wanted}"
            )
        else:
            assert close[name] == 0.0, "nothing is to die, and yet there is a threshold"


def test_two_passes_are_coarser_than_three():
    """Else the third one would have no work to do, and the test above no bound to keep."""
    parts = [part("a", torch.linspace(0.5, 0.5001, 1000))]
    assert smallest(parts, {"a": 500}, passes=2)["a"] > smallest(parts, {"a": 500}, passes=3)["a"]


@given(st.data(), st.sampled_from((-4.0, -1.0, 0.0, 0.5, 0.8, 1.0)), st.sampled_from((0.5, 1.0)))
@few
def test_x_is_that_of_the_decay_with_adams_second_moments(data, p, gamma):
    """An oracle in float64, so that x itself is compared too; the order statistic is of fp32."""
    weights = torch.tensor(data.draw(st.lists(st.floats(0.0625, 4.0, width=32), min_size=1, max_size=30)))
    second = torch.tensor(
        data.draw(st.lists(st.floats(0.0, 4.0, width=32), min_size=len(weights), max_size=len(weights)))
    )
    step, beta2, eps = 3.0, 0.9, 1e-3
    one = part("a", weights, p, second, precondition=gamma, betas=(0.5, beta2), eps=eps, step=step)
    denom = (second.double() / (1 - beta2**step)).sqrt() + eps
    wanted = (weights.double().abs() ** (2 - p) * denom**gamma).sort().values
    rank = data.draw(st.integers(1, len(weights)))
    assert smallest([one], {"a": rank}, passes=3)["a"] == pytest.approx(float(wanted[rank - 1]), rel=1e-5)


def test_large_parts_are_taken_in_slices_with_their_second_moments():
    """More elements than one slice has, and a second part that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    weights, second = torch.randn(150_001, generator=generator), torch.rand(150_001, generator=generator)
    strided = torch.randn(70, 300, generator=generator).t()
    parts = [
        part("a", weights, 1.0, second, precondition=1.0, betas=(0.9, 0.99), eps=1e-8, step=1.0),
        part("b", strided),
        part("b", strided[:7]),
    ]
    x = weights.numpy().__abs__() * (np.sqrt(second.numpy()) / np.float32((1 - 0.99) ** 0.5) + np.float32(1e-8))
    found = smallest(parts, {"a": 100_000, "b": 12_345}, passes=3)
    assert found["a"] == pytest.approx(float(np.sort(x)[99_999]), rel=1e-6)
    assert found["b"] == ordered(np.concatenate([strided.numpy().ravel(), strided[:7].numpy().ravel()]))[12_344]


@given(st.data(), st.integers(1, 4))
@few
def test_ranks_find_together_what_one_process_finds(data, ranks):
    """Each holds a piece, perhaps an empty one."""
    flat = torch.tensor(data.draw(vector), dtype=torch.float32)
    pieces = cut(flat, data.draw(st.lists(st.floats(0, 1), min_size=ranks - 1, max_size=ranks - 1)))
    rank, passes = data.draw(st.integers(0, len(flat))), data.draw(st.sampled_from((2, 3)))
    with meeting(ranks) as run:
        together = run([lambda i=i, j=j: smallest([part("a", flat[i:j])], {"a": rank}, passes) for i, j in pieces])
    alone = smallest([part("a", flat)], {"a": rank}, passes)
    assert together == [alone] * ranks, f"{together} on {ranks} ranks, {alone} on one"


# -- what dies ----------------------------------------------------------------


@given(st.data(), st.integers(1, 4))
@few
def test_the_share_below_is_that_over_all_ranks(data, ranks):
    wholes = {scope: torch.tensor(data.draw(vector)) for scope in ("a", "b")}
    thresholds = {scope: abs(data.draw(st.sampled_from(whole.tolist()))) for scope, whole in wholes.items()}
    places = {
        scope: cut(whole, data.draw(st.lists(st.floats(0, 1), min_size=ranks - 1, max_size=ranks - 1)))
        for scope, whole in wholes.items()
    }
    with meeting(ranks) as run:
        found = run(
            [
                lambda rank=rank: share_below(
                    [part(scope, whole[slice(*places[scope][rank])]) for scope, whole in wholes.items()], thresholds
                )
                for rank in range(ranks)
            ]
        )
    expected = {scope: float((whole.abs() <= thresholds[scope]).float().mean()) for scope, whole in wholes.items()}
    assert all(each == pytest.approx(expected) for each in found)


@given(st.data())
@few
def test_exactly_what_is_at_or_below_the_threshold_becomes_zero(data):
    scopes = {name: data.draw(vector) for name in "ab"}
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in scopes.items()}
    parts = [
        part(name, tensors[name][i:j])
        for name in scopes
        for i, j in cut(tensors[name], data.draw(st.lists(st.floats(0, 1), max_size=2)))
    ]
    thresholds = {
        name: data.draw(st.sampled_from([0.0, *(abs(float(np.float32(value))) for value in values)]))
        for name, values in scopes.items()
    }
    zero_below(parts, thresholds)
    for name, values in scopes.items():
        old = np.asarray(values, dtype=np.float32)
        wanted = np.where(np.abs(old) <= thresholds[name], np.float32(0), old)
        assert np.array_equal(tensors[name].numpy(), wanted), (
            f"threshold {thresholds[name]} of {name} made {wanted} of {old}"
        )


def test_a_threshold_of_zero_kills_nothing():
    """Not even where x, here |w|³, is too small for fp32."""
    weights = torch.tensor([1e-20, 0.0, 1.0])
    zero_below([part("a", weights, p=-1.0)], {"a": 0.0})
    assert weights.tolist() == torch.tensor([1e-20, 0.0, 1.0]).tolist()


def test_what_is_no_number_stays_and_a_strided_part_is_refused():
    spoiled = torch.tensor([math.nan, math.inf, 0.1])
    zero_below([part("a", spoiled)], {"a": 0.5})
    assert spoiled[0].isnan() and spoiled[1:].tolist() == [math.inf, 0.0]
    with pytest.raises(RuntimeError, match="part of a on this rank is not contiguous"):
        zero_below([part("a", torch.ones(4, 3).t())], {"a": 0.5})


# -- what a part is made of ---------------------------------------------------


def test_parts_of_a_live_optimizer_have_its_second_moments_and_a_share_of_each_replica():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7))
    optimizer = LpAdamW(model.parameters(), lr=1e-2, precondition=1.0)
    attach(model, optimizer)
    model(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    (shard,) = [shard for shard in shards(model, optimizer) if shard.name == "0.weight"]
    values = {**optimizer.param_groups[0], "p": 0.0}
    whole = Part.of("a", shard, values, whole=True)
    assert whole.step == 1.0 and whole.weights.data_ptr() == model[0].weight.data_ptr(), (
        "it must be a view, since zeros are written through it"
    )
    assert torch.equal(whole.second, optimizer.state[model[0].weight]["exp_avg_sq"].flatten())
    counted = [
        Part.of("a", Shard(**{**vars(shard), "replica": i, "replicas": 3}), values, whole=False) for i in range(3)
    ]
    assert torch.equal(torch.cat([one.weights for one in counted]), whole.weights), (
        "the shares of three replicas are the whole, each weight once"
    )
    assert torch.equal(torch.cat([one.second for one in counted]), whole.second)
    assert smallest(counted, {"a": 20}, passes=3) == smallest([whole], {"a": 20}, passes=3)
    assert Part.of("a", shard, {**values, "precondition": 0.0}, whole=True).second is None


# -- zeros and dead rows ------------------------------------------------------


@given(st.data(), st.integers(1, 4))
@few
def test_zeros_and_dead_rows_are_those_of_the_whole_parameter(data, ranks):
    """Pieces start and end inside of rows, some hold none; or each rank has all of it and counts its share."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    total = math.prod(shape)
    whole = torch.tensor(
        data.draw(st.lists(st.sampled_from((0.0, 0.0, 0.0, -0.0, 1e-40, -2.0)), min_size=total, max_size=total))
    )
    gap = data.draw(st.integers(0, 2))
    if data.draw(st.booleans()):
        pieces = cut(whole, data.draw(st.lists(st.floats(0, 1), min_size=ranks - 1, max_size=ranks - 1)))
        mine = [[shard_of(whole, shape, i, j, gap)] for i, j in pieces]
    else:
        mine = [[shard_of(whole, shape, 0, total, gap, replica=i, replicas=ranks)] for i in range(ranks)]
    other = torch.zeros(3, 2)  # a second parameter, all of it on rank 0
    mine = [[*shards_, shard_of(other.flatten(), (3, 2), 0, 0 if i else 6)] for i, shards_ in enumerate(mine)]
    dead = int((whole.view(shape[0], -1) == 0).all(1).sum())
    wanted = Census([(int((whole == 0).sum()), total), (6, 6)], dead + 3, shape[0] + 3)
    with meeting(ranks) as run:
        found = run([lambda one=one: census(one) for one in mine])
    assert found == [wanted] * ranks, (
        f"{found} are not the zeros, the dead and all rows of {whole.view(shape)}, {wanted}"
    )


def test_what_has_no_rows_is_counted_without_them():
    assert census([]) == Census([], 0, 0)
    assert census([shard_of(torch.zeros(1), (), 0, 1)]) == Census([(1, 1)], 0, 0), "a scalar has no rows"
    strips = Shard(
        "w", torch.zeros(4), torch.Size((2, 4)), None, torch.tensor([0.0, 1.0, 0.0, 0.0]), 0, 4, 0, lambda _: {}
    )
    assert census([strips]) == Census([(3, 4)], 0, 0), "where rows lie in several strips, none is known"


# -- samples ------------------------------------------------------------------


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.lists(st.floats(0, 1), max_size=3), st.integers(1, 3)
)
@few
def test_a_sample_is_of_the_same_weights_however_they_are_sharded(rows, width, stride, places, replicas):
    flat = torch.arange(1.0, rows * width + 1)
    taken = []
    for first, last in cut(flat, places):
        for replica in range(replicas):
            shard = shard_of(flat, (rows, width), first, last, 2, replica=replica, replicas=replicas)
            taken += Part.of("a", shard, {"p": 1.0}, stride=stride).weights.tolist()
    assert taken == flat[::stride].tolist()


def test_second_moments_are_those_of_the_sample():
    flat = torch.arange(60.0)
    shard = Shard(
        "w",
        flat,
        torch.Size((6, 10)),
        7,
        flat[7:47],
        0,
        40,
        0,
        lambda _: {"exp_avg_sq": flat[7:47] * 10, "step": torch.tensor(3.0)},
    )
    one = Part.of("a", shard, {"p": 1.0, "precondition": 1.0}, stride=9)
    assert one.weights.tolist() == [9, 18, 27, 36, 45] and one.second.tolist() == [90, 180, 270, 360, 450]


@given(st.integers(0, 10**12), st.integers(1, 5000), st.integers(1, 5000))
@few
def test_a_stride_takes_a_sample_that_is_large_enough_and_from_every_column(elements, rows, width):
    stride = stride_of(shard_of(torch.zeros(0), (rows, width), 0, 0), elements)
    assert stride == 1 or elements / stride >= quantiles._SAMPLE
    assert math.gcd(stride, width) == 1, f"every {stride}th weight of rows of {width} is never in some columns"
    assert stride > 0.5 * elements / quantiles._SAMPLE - 20, "it leaves out what it can"


def test_a_sample_finds_the_threshold_of_all_and_an_exact_rank_needs_no_sample():
    """Small columns, as an LLM's outlier channels are large ones: a stride that divides a row would see only some."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3000, 512, generator=generator) * torch.linspace(0.01, 1, 512).roll(100)
    shard, elements = shard_of(weights.flatten(), (3000, 512), 0, weights.numel()), weights.numel()
    sample = Part.of("a", shard, {"p": 1.0}, stride=stride_of(shard, elements))
    assert sample.weights.numel() < elements / 40
    for share in (0.1, 0.5, 0.95):
        found = smallest([sample], {"a": round(share * elements)}, 2, elements={"a": elements})["a"]
        assert float((weights.abs() <= found).float().mean()) == pytest.approx(
            share, abs=4 * 0.5 / quantiles._SAMPLE**0.5
        ), "within 4 deviations"
    whole = Part.of("a", shard, {"p": 1.0})
    assert smallest([whole], {"a": 12345}, 3, elements={"a": elements}) == smallest([whole], {"a": 12345}, 3)


@pytest.mark.parametrize("worst", [1e20, math.nan, math.inf])
def test_a_threshold_beyond_all_numbers_is_infinite_and_never_nan(worst):
    """x of 1e20 at p = −1 is 1e60."""
    parts = [Part("a", torch.tensor([worst, 1.0, 2.0]), None, {"p": -1.0}, 0.0)]
    assert [smallest(parts, {"a": 3}, passes)["a"] for passes in (2, 3)] == [math.inf] * 2
    assert smallest(parts, {"a": 2}, 3)["a"] == 8.0


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
