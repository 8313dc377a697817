"""Quantiles from histograms, against sorted arrays: in one process, and on ranks that are threads."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.quantiles import SMALLEST, cut, meeting, number, ordered, quick, scored_slice, shard_of, vector
from lp_dist import LpAdamW, attach
from lp_dist.sharding.shards import Shard, locate_shards
from lp_dist.sparsity import census as census_module
from lp_dist.sparsity import quantiles
from lp_dist.sparsity.census import Census, census
from lp_dist.sparsity.quantiles import (
    ScoredSlice,
    fraction_at_or_below,
    sample_stride,
    thresholds_at,
    zero_at_or_below,
)

# -- order statistics ---------------------------------------------------------


@given(st.data())
@quick
def test_the_threshold_is_an_order_statistic_of_each_scope(data):
    """Exact after three passes. After two not below it, and above it by less than 1/8,192 (2¹⁰ of the smallest
    denormal).
    """
    scopes = {name: data.draw(vector) for name in "abc"[: data.draw(st.integers(1, 3))]}
    slices = []
    for name, values in scopes.items():
        flat = torch.tensor(values, dtype=torch.float32)
        ranges = cut(flat, data.draw(st.lists(st.floats(0, 1), max_size=3)))
        slices += [scored_slice(name, flat[i:j]) for i, j in ranges]
    ranks = {name: data.draw(st.integers(0, len(values))) for name, values in scopes.items()}
    exact, coarse = (thresholds_at(data.draw(st.permutations(slices)), ranks, passes=passes) for passes in (3, 2))
    for name, rank in ranks.items():
        wanted = float(ordered(scopes[name])[rank - 1]) if rank else 0.0
        assert exact[name] == wanted, f"rank {rank} of {name}: {exact[name]} is not the exact one, {wanted}"
        if rank:
            assert wanted <= coarse[name] <= wanted + max(wanted / 8192, 1023 * SMALLEST), (
                f"rank {rank} of {name}: {coarse[name]} for {wanted}"
            )
        else:
            assert coarse[name] == 0.0, "no weight is to be pruned, and yet there is a threshold"


def test_two_passes_are_coarser_than_three():
    """Otherwise the third pass would be useless, and the bound in the test above too."""
    slices = [scored_slice("a", torch.linspace(0.5, 0.5001, 1000))]
    assert thresholds_at(slices, {"a": 500}, passes=2)["a"] > thresholds_at(slices, {"a": 500}, passes=3)["a"]


@given(st.data(), st.sampled_from((-4.0, -1.0, 0.0, 0.5, 0.8, 1.0)), st.sampled_from((0.5, 1.0)))
@quick
def test_saliency_is_that_of_the_decay_with_adams_second_moments(data, p, gamma):
    """The reference is in fp64, so the saliency is compared too; the threshold is in fp32."""
    weights = torch.tensor(data.draw(st.lists(st.floats(0.0625, 4.0, width=32), min_size=1, max_size=30)))
    second = torch.tensor(
        data.draw(st.lists(st.floats(0.0, 4.0, width=32), min_size=len(weights), max_size=len(weights)))
    )
    step, beta2, eps = 3.0, 0.9, 1e-3
    scored = scored_slice("a", weights, p, second, precondition=gamma, betas=(0.5, beta2), eps=eps, step=step)
    denom = (second.double() / (1 - beta2**step)).sqrt() + eps
    wanted = (weights.double().abs() ** (2 - p) * denom**gamma).sort().values
    rank = data.draw(st.integers(1, len(weights)))
    assert thresholds_at([scored], {"a": rank}, passes=3)["a"] == pytest.approx(float(wanted[rank - 1]), rel=1e-5)


def test_large_slices_are_scored_in_tiles_with_their_second_moments():
    """More elements than a tile has, and a second slice that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    weights, second = torch.randn(150_001, generator=generator), torch.rand(150_001, generator=generator)
    strided = torch.randn(70, 300, generator=generator).t()
    slices = [
        scored_slice("a", weights, 1.0, second, precondition=1.0, betas=(0.9, 0.99), eps=1e-8, step=1.0),
        scored_slice("b", strided),
        scored_slice("b", strided[:7]),
    ]
    x = weights.numpy().__abs__() * (np.sqrt(second.numpy()) / np.float32((1 - 0.99) ** 0.5) + np.float32(1e-8))
    thresholds = thresholds_at(slices, {"a": 100_000, "b": 12_345}, passes=3)
    assert thresholds["a"] == pytest.approx(float(np.sort(x)[99_999]), rel=1e-6)
    assert thresholds["b"] == ordered(np.concatenate([strided.numpy().ravel(), strided[:7].numpy().ravel()]))[12_344]


@given(st.data(), st.integers(1, 4))
@quick
def test_ranks_find_together_what_one_process_finds(data, ranks):
    """Each rank holds a range, perhaps an empty one."""
    flat = torch.tensor(data.draw(vector), dtype=torch.float32)
    ranges = cut(flat, data.draw(st.lists(st.floats(0, 1), min_size=ranks - 1, max_size=ranks - 1)))
    rank, passes = data.draw(st.integers(0, len(flat))), data.draw(st.sampled_from((2, 3)))
    with meeting(ranks) as run:
        together = run(
            [lambda i=i, j=j: thresholds_at([scored_slice("a", flat[i:j])], {"a": rank}, passes) for i, j in ranges]
        )
    alone = thresholds_at([scored_slice("a", flat)], {"a": rank}, passes)
    assert together == [alone] * ranks, f"{together} on {ranks} ranks, {alone} on one"


# -- what becomes zero --------------------------------------------------------


@given(st.data(), st.integers(1, 4))
@quick
def test_the_fraction_below_is_that_over_all_ranks(data, ranks):
    flats = {scope: torch.tensor(data.draw(vector)) for scope in ("a", "b")}
    thresholds = {scope: abs(data.draw(st.sampled_from(flat.tolist()))) for scope, flat in flats.items()}
    ranges = {
        scope: cut(flat, data.draw(st.lists(st.floats(0, 1), min_size=ranks - 1, max_size=ranks - 1)))
        for scope, flat in flats.items()
    }
    with meeting(ranks) as run:
        fractions = run(
            [
                lambda rank=rank: fraction_at_or_below(
                    [scored_slice(scope, flat[slice(*ranges[scope][rank])]) for scope, flat in flats.items()],
                    thresholds,
                )
                for rank in range(ranks)
            ]
        )
    expected = {scope: float((flat.abs() <= thresholds[scope]).float().mean()) for scope, flat in flats.items()}
    assert all(of_rank == pytest.approx(expected) for of_rank in fractions)


@given(st.data())
@quick
def test_exactly_what_is_at_or_below_the_threshold_becomes_zero(data):
    scopes = {name: data.draw(vector) for name in "ab"}
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in scopes.items()}
    slices = [
        scored_slice(name, tensors[name][i:j])
        for name in scopes
        for i, j in cut(tensors[name], data.draw(st.lists(st.floats(0, 1), max_size=2)))
    ]
    thresholds = {
        name: data.draw(st.sampled_from([0.0, *(abs(float(np.float32(value))) for value in values)]))
        for name, values in scopes.items()
    }
    zero_at_or_below(slices, thresholds)
    for name, values in scopes.items():
        old = np.asarray(values, dtype=np.float32)
        wanted = np.where(np.abs(old) <= thresholds[name], np.float32(0), old)
        assert np.array_equal(tensors[name].numpy(), wanted), (
            f"threshold {thresholds[name]} of {name} made {wanted} of {old}"
        )


def test_a_threshold_of_zero_prunes_nothing():
    """Not even where the saliency, here |w|³, is too small for fp32."""
    weights = torch.tensor([1e-20, 0.0, 1.0])
    zero_at_or_below([scored_slice("a", weights, p=-1.0)], {"a": 0.0})
    assert weights.tolist() == torch.tensor([1e-20, 0.0, 1.0]).tolist()


def test_nan_stays_and_a_strided_slice_is_refused():
    weights = torch.tensor([math.nan, math.inf, 0.1])
    zero_at_or_below([scored_slice("a", weights)], {"a": 0.5})
    assert weights[0].isnan() and weights[1:].tolist() == [math.inf, 0.0]
    with pytest.raises(RuntimeError, match="part of a on this rank is not contiguous"):
        zero_at_or_below([scored_slice("a", torch.ones(4, 3).t())], {"a": 0.5})


# -- what a slice is made of --------------------------------------------------


def test_slices_have_the_optimizers_second_moments_and_replicas_count_each_weight_once():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7))
    optimizer = LpAdamW(model.parameters(), lr=1e-2, precondition=1.0)
    attach(model, optimizer)
    model(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    (shard,) = [shard for shard in locate_shards(model, optimizer) if shard.name == "0.weight"]
    values = {**optimizer.param_groups[0], "p": 0.0}
    complete = ScoredSlice.from_shard("a", shard, values, all_local=True)
    assert complete.step == 1.0 and complete.weights.data_ptr() == model[0].weight.data_ptr(), (
        "it must be a view, since zeros are written through it"
    )
    assert torch.equal(complete.exp_avg_sq, optimizer.state[model[0].weight]["exp_avg_sq"].flatten())
    counted = [
        ScoredSlice.from_shard("a", Shard(**{**vars(shard), "replica": i, "replicas": 3}), values, all_local=False)
        for i in range(3)
    ]
    assert torch.equal(torch.cat([scored.weights for scored in counted]), complete.weights), (
        "three replicas must count each weight once"
    )
    assert torch.equal(torch.cat([scored.exp_avg_sq for scored in counted]), complete.exp_avg_sq)
    assert thresholds_at(counted, {"a": 20}, passes=3) == thresholds_at([complete], {"a": 20}, passes=3)
    assert ScoredSlice.from_shard("a", shard, {**values, "precondition": 0.0}, all_local=True).exp_avg_sq is None


# -- zeros and dead rows ------------------------------------------------------


@given(st.data(), st.integers(1, 4))
@quick
def test_zeros_and_dead_rows_are_those_of_the_unsharded_parameter(data, ranks):
    """Shards start and end inside of rows, or are empty. Or each rank has a replica, and counts a part of it."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    total = math.prod(shape)
    flat = torch.tensor(
        data.draw(st.lists(st.sampled_from((0.0, 0.0, 0.0, -0.0, 1e-40, -2.0)), min_size=total, max_size=total))
    )
    gap = data.draw(st.integers(0, 2))
    if data.draw(st.booleans()):
        ranges = cut(flat, data.draw(st.lists(st.floats(0, 1), min_size=ranks - 1, max_size=ranks - 1)))
        shards = [[shard_of(flat, shape, i, j, gap)] for i, j in ranges]
    else:
        shards = [[shard_of(flat, shape, 0, total, gap, replica=i, replicas=ranks)] for i in range(ranks)]
    other = torch.zeros(3, 2)  # a second parameter, all of it on rank 0
    shards = [[*of_rank, shard_of(other.flatten(), (3, 2), 0, 0 if i else 6)] for i, of_rank in enumerate(shards)]
    dead = int((flat.view(shape[0], -1) == 0).all(1).sum())
    wanted = Census([(int((flat == 0).sum()), total), (6, 6)], dead + 3, shape[0] + 3)
    with meeting(ranks) as run:
        counted = run([lambda of_rank=of_rank: census(of_rank) for of_rank in shards])
    assert counted == [wanted] * ranks, (
        f"{counted} are not the zeros, the dead and all rows of {flat.view(shape)}, {wanted}"
    )


def test_rows_are_sent_where_several_ranks_have_something_of_them(monkeypatch):
    sent = []
    monkeypatch.setattr(census_module, "all_reduce_max", lambda flags: sent.append(len(flags)) or flags)
    flat = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    # Of 5 rows of 2 the first three, and another parameter of 7 rows.
    complete = [shard_of(flat, (5, 2), 0, 6), shard_of(torch.ones(7), (7, 1), 0, 7)]
    assert census(complete).dead_rows == 2 + 2 and not sent
    divided = [shard_of(flat, (5, 2), 0, 5), complete[1]]
    assert census(divided).dead_rows == 1 + 2 + 1 and sent == [5]


def test_what_has_no_rows_is_counted_without_them():
    assert census([]) == Census([], 0, 0)
    assert census([shard_of(torch.zeros(1), (), 0, 1)]) == Census([(1, 1)], 0, 0), "a scalar has no rows"


# -- samples ------------------------------------------------------------------


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.lists(st.floats(0, 1), max_size=3), st.integers(1, 3)
)
@quick
def test_a_sample_is_of_the_same_weights_however_they_are_sharded(rows, width, stride, fractions, replicas):
    flat = torch.arange(1.0, rows * width + 1)
    sampled = []
    for first, last in cut(flat, fractions):
        for replica in range(replicas):
            shard = shard_of(flat, (rows, width), first, last, 2, replica=replica, replicas=replicas)
            sampled += ScoredSlice.from_shard("a", shard, {"p": 1.0}, stride=stride).weights.tolist()
    assert sampled == flat[::stride].tolist()


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
    sample = ScoredSlice.from_shard("a", shard, {"p": 1.0, "precondition": 1.0}, stride=9)
    assert sample.weights.tolist() == [9, 18, 27, 36, 45] and sample.exp_avg_sq.tolist() == [90, 180, 270, 360, 450]


@given(st.integers(0, 10**12), st.integers(1, 5000))
@quick
def test_a_stride_takes_a_sample_that_is_large_enough_and_from_every_column(elements, width):
    stride = sample_stride(elements, width)
    assert stride == 1 or elements / stride >= quantiles.SAMPLE_SIZE
    assert math.gcd(stride, width) == 1, f"every {stride}th weight of rows of {width} is never in some columns"
    assert stride > 0.5 * elements / quantiles.SAMPLE_SIZE - 20, "it leaves out what it can"


def test_a_sample_finds_the_threshold_of_all_and_an_exact_rank_needs_no_sample():
    """The columns differ in size, as an LLM's outlier channels do: a stride that divides a row would miss columns."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3000, 512, generator=generator) * torch.linspace(0.01, 1, 512).roll(100)
    shard, elements = shard_of(weights.flatten(), (3000, 512), 0, weights.numel()), weights.numel()
    sample = ScoredSlice.from_shard("a", shard, {"p": 1.0}, stride=sample_stride(elements, 512))
    assert sample.weights.numel() < elements / 40
    for fraction in (0.1, 0.5, 0.95):
        threshold = thresholds_at([sample], {"a": round(fraction * elements)}, 2, elements={"a": elements})["a"]
        assert float((weights.abs() <= threshold).float().mean()) == pytest.approx(
            fraction, abs=4 * 0.5 / quantiles.SAMPLE_SIZE**0.5
        ), "within 4 deviations"
    complete = ScoredSlice.from_shard("a", shard, {"p": 1.0})
    assert thresholds_at([complete], {"a": 12345}, 3, elements={"a": elements}) == thresholds_at(
        [complete], {"a": 12345}, 3
    )


@pytest.mark.parametrize("worst", [1e20, math.nan, math.inf])
def test_a_threshold_beyond_all_numbers_is_infinite_and_never_nan(worst):
    """The saliency of 1e20 at p = −1 is 1e60."""
    slices = [ScoredSlice("a", torch.tensor([worst, 1.0, 2.0]), None, {"p": -1.0}, 0.0)]
    assert [thresholds_at(slices, {"a": 3}, passes)["a"] for passes in (2, 3)] == [math.inf] * 2
    assert thresholds_at(slices, {"a": 2}, 3)["a"] == 8.0


@given(st.data())
@quick
def test_joined_slices_count_as_single_ones(data):
    """Slices of several scopes, of several hyperparameters, or empty; a tile may be smaller than a slice."""

    def draw_slice(i: int) -> ScoredSlice:
        weights = torch.tensor(data.draw(st.lists(number, max_size=12)), dtype=torch.float32)
        scope = data.draw(st.sampled_from("abc"))
        if data.draw(st.booleans()):
            return scored_slice(scope, weights)
        return scored_slice(
            scope,
            weights,
            p=0.0,
            exp_avg_sq=torch.rand(len(weights)),
            precondition=1.0,
            betas=(0.9, 0.99),
            eps=1e-8,
            step=float(i % 2 + 1),
        )

    slices = [draw_slice(i) for i in range(data.draw(st.integers(1, 9)))]
    numel: dict[str, int] = {}
    for scored in slices:
        if scored.weights.numel():
            numel[scored.scope] = numel.get(scored.scope, 0) + scored.weights.numel()
    slices = [scored for scored in slices if scored.scope in numel]
    ranks = {scope: data.draw(st.integers(0, n)) for scope, n in numel.items()}
    with mock.patch.dict(quantiles.batching.TILE_SIZE, cpu=data.draw(st.sampled_from([1, 10, 1 << 16]))):
        assert thresholds_at(slices, ranks, 2, elements=numel) == thresholds_at(slices, ranks, 2)
        thresholds = {scope: data.draw(number.map(abs)) for scope in numel}
        below = {
            scope: sum(
                int((tile.saliency <= thresholds[scope]).sum())
                for scored in slices
                if scored.scope == scope
                for tile in scored.saliency()
            )
            for scope in numel
        }
    assert fraction_at_or_below(slices, thresholds) == {scope: below[scope] / max(1, n) for scope, n in numel.items()}


@pytest.mark.parametrize("scopes", [1, 200])
def test_an_update_from_many_tensors_takes_few_calls(scopes, monkeypatch):
    """On an accelerator each call waits for the device, which took longer than the steps between two updates."""
    calls, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *args, **more: calls.append(1) or bincount(*args, **more))
    slices = [scored_slice(str(i % scopes), torch.randn(100)) for i in range(200)]
    numel = dict.fromkeys((str(i) for i in range(scopes)), 100 * 200 // scopes)
    thresholds_at(slices, {scope: n // 2 for scope, n in numel.items()}, 2, elements=numel)
    assert len(calls) == 2, "one for each pass"
    fraction_at_or_below(slices, dict.fromkeys(numel, 0.5))
    assert len(calls) == 4


def test_a_census_reads_the_device_once_for_all_tensors(monkeypatch):
    shapes = [(8, 3), (5, 4), (), (6, 2)] * 10
    shards = [
        shard_of(torch.randn(torch.Size(shape).numel()).relu(), shape, 0, torch.Size(shape).numel())
        for shape in shapes
    ]
    read, on_host = [], census_module.concatenate_on_host
    monkeypatch.setattr(census_module, "concatenate_on_host", lambda *args: read.append(1) or on_host(*args))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a wait for each tensor"))
    counted = census(shards)
    assert len(read) == 2 and counted.counts == [
        (int((shard.tensor == 0).sum()), shard.tensor.numel()) for shard in shards
    ]
