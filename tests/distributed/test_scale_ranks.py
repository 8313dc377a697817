"""The collectives of simulated ranks are those of real ones."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.engines import quiet
from lp_dist.benchmarks.scale.simulation import SHARDINGS, Configuration, fake_ranks, times_and_collectives

RANKS = 4
CELLS = [("tiny", "weights"), ("tiny-mixture", "experts"), ("tiny", "channels"), ("tiny-mixture", "weights")]


def collectives(rank: int, world_size: int, cells: list[tuple[str, str]]) -> list[dict[str, Any]]:
    quiet()
    configurations = [
        Configuration(model, world_size, rank, SHARDINGS[0], target, is_cut=False, layers=2) for model, target in cells
    ]
    return [times_and_collectives(configuration)["collectives"] for configuration in configurations]


@pytest.mark.parametrize(
    "cells", [pytest.param(CELLS[:1], id="weights"), pytest.param(CELLS[1:], id="groups", marks=pytest.mark.long)]
)
def test_simulated_ranks_call_what_real_ranks_call(cells, run_ranks):
    real = run_ranks(collectives, RANKS, cells)
    for rank in (0, RANKS - 1):
        with fake_ranks(rank, RANKS):
            simulated = collectives(rank, RANKS, cells)
        assert simulated == real[rank]
    assert all(of_cell["update"]["allreduce_"][1] > 0 for of_cell in real[0])
