"""Regions of a parameter: what a rank has under tensor parallelism, held against tensors of positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_dist.optim.parameter_map import ParamSection
from lp_dist.optim.region import Region

quick = settings(max_examples=60, deadline=None)


@st.composite
def regions(draw) -> Region:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    chosen = [draw(st.sets(st.integers(0, size - 1), min_size=draw(st.integers(0, 1)))) for size in shape]
    return Region.of_indices(torch.Size(shape), [torch.tensor(sorted(c), dtype=torch.int64) for c in chosen])


def positions_of(region: Region) -> torch.Tensor:
    """Each element's position in the parameter, in the shape of the rank's tensor."""
    positions = torch.arange(region.shape.numel()).view(region.shape)
    for dim in range(len(region.shape)):
        positions = positions.index_select(dim, region.indices(dim))
    return positions


@given(regions())
@quick
def test_elements_are_where_they_lie_in_the_parameter(region):
    positions = positions_of(region)
    assert region.sizes == positions.shape and region.is_full == (positions.shape == region.shape)
    flat = positions.flatten()
    assert torch.equal(region.positions(torch.arange(len(flat))), flat)
    assert [region.position(i) for i in range(len(flat))] == flat.tolist()
    everywhere = torch.arange(region.shape.numel())
    assert torch.equal(region.local(everywhere), torch.arange(len(flat))), "those that are not here are left out"


@given(regions(), st.data())
@quick
def test_the_checksum_is_the_sum_of_positions(region, data):
    flat = positions_of(region).flatten()
    start = data.draw(st.integers(0, len(flat)))
    length = data.draw(st.integers(0, len(flat) - start))
    assert region.checksum(start, length) == int(flat[start : start + length].sum()) % Region.MODULUS


@given(regions())
@quick
def test_what_is_one_range_of_the_parameter_is_known(region):
    flat = positions_of(region).flatten()
    is_range = not len(flat) or torch.equal(flat, torch.arange(flat[0], flat[0] + len(flat)))
    expected = (int(flat[0]) if len(flat) else 0) if is_range else None
    assert region.contiguous_start() == expected


@given(regions(), st.data())
@quick
def test_sections_are_what_lies_between_two_rows(region, data):
    start = data.draw(st.integers(0, region.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, region.shape[0]))
    width = region.shape.numel() // region.shape[0]
    flat = positions_of(region).flatten()
    first = data.draw(st.integers(0, len(flat)))
    length = data.draw(st.integers(0, len(flat) - first))
    section = ParamSection("w", start, stop, region.shape)
    overlap = section.overlap(first, length, region)
    inside = [p - start * width for p in flat[first : first + length].tolist() if start * width <= p < stop * width]
    assert overlap.region == region.section(start, stop)
    here = positions_of(overlap.region).flatten()[overlap.start : overlap.start + overlap.last - overlap.first]
    assert here.tolist() == inside
    taken = flat[first : first + length][overlap.first : overlap.last] - start * width
    assert taken.tolist() == inside


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(2, 4), st.data())
@quick
def test_a_grid_of_blocks_is_one_where_blocks_are_complete(outer, blocks, inner, m, data):
    shape = torch.Size([outer, blocks * m, inner])
    bounds = sorted(data.draw(st.lists(st.integers(0, blocks * m), min_size=2, max_size=2)))
    run = range(*bounds)
    region = Region(shape, ((range(outer),), (run,), (range(inner),)))
    divided = region.divided(1, m)
    if run and any(bound % m for bound in bounds):
        assert divided is None
    elif run:
        assert positions_of(divided).tolist() == (
            torch.arange(outer * blocks * inner).view(outer, blocks, inner)[:, run.start // m : run.stop // m].tolist()
        )


def test_a_region_says_what_it_is():
    region = Region(torch.Size([6, 4]), ((range(2), range(3, 5)), (range(4),)))
    assert str(region) == "[0:2 and 3:5, 0:4] of [6, 4]"
    assert Region.full(torch.Size([])).sizes == torch.Size([]) and Region.full(torch.Size([])).checksum(0, 1) == 0


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_all_of_a_parameter_is_one_range(shape):
    region = Region.full(torch.Size(shape))
    assert region.is_full and region.contiguous_start() == 0
