"""Runs to a target that SIGKILL ends anywhere, also within a save, under every engine and for every kind of target:
started again they come to the bits of the run that nothing has ended.
"""

from __future__ import annotations

import os
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from helpers.killed_runs import (
    ENGINES,
    SAVE_EVERY,
    STEPS,
    TARGETS,
    Death,
    killed_on_a_rank,
    marker_of,
    run_on_a_rank,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SEED = int(os.environ.get("LP_DIST_SEED", random.randrange(1000)))  # a failure tells it
MOMENTS = ("before", "step", "save")


def ranks_of(engine: str) -> int:
    return 1 if engine == "one process" else 2


def drawn(seed: int, count: int = 20) -> list[Death]:
    """Every engine with every kind of target once, and others; every third dies in a save."""
    chance = random.Random(seed)
    cells = list(product(ENGINES, TARGETS))
    chance.shuffle(cells)
    cells += [chance.choice(cells) for _ in range(count - len(cells))]
    deaths = []
    for i, (engine, target) in enumerate(cells):
        moment = MOMENTS[i % len(MOMENTS)]
        ranks = (0,) if ranks_of(engine) == 1 else chance.choice([(0,), (1,), (0, 1)])
        step = chance.randrange(1, STEPS)
        if moment == "save":
            step = chance.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
        # Rank 0 alone writes two files under every engine.
        write = chance.choice([1, 2]) if ranks == (0,) else 1
        deaths.append(Death(engine, target, moment, step, ranks, write, chance.choice([0.0, 0.5, chance.random()])))
    return deaths


def test_the_draw_has_every_cell_and_every_moment():
    deaths = drawn(SEED)
    assert len(deaths) == 20 and {(death.engine, death.target) for death in deaths} == set(product(ENGINES, TARGETS))
    assert all(sum(death.moment == moment for death in deaths) >= 6 for moment in MOMENTS)
    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.long
def test_killed_runs_come_to_the_bits_of_the_uninterrupted_ones(run_ranks, tmp_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")

    def ranks(fn: Any, world_size: int, *args: Any) -> list[Any]:
        for left in tmp_path.iterdir():  # where the next ranks could meet the old ones
            left.unlink()
        return run_ranks(fn, world_size, *args)

    deaths = {f"{i} {death.name}": death for i, death in enumerate(drawn(SEED))}
    places: dict[str, Path] = {name: directory / name for name in deaths}
    for name, death in deaths.items():
        places[name].mkdir()
        with pytest.raises(AssertionError) as caught:
            ranks(killed_on_a_rank, ranks_of(death.engine), places[name], death)
        killed = [rank for rank in death.ranks if marker_of(places[name], rank).exists()]
        assert killed, f"seed {SEED}, {death}: it was not killed there: {caught.value}"
        latest = places[name] / "latest"
        saved = int(latest.read_text()) if latest.exists() else 0
        assert saved == (death.step - (death.moment == "save")) // SAVE_EVERY * SAVE_EVERY, f"seed {SEED}, {death}"
    for world_size in (1, 2):
        cells = {
            f"{engine}, {target}": (engine, target, directory / f"uninterrupted {engine}, {target}")
            for engine, target in product(ENGINES, TARGETS)
            if ranks_of(engine) == world_size
        }
        resumed = {
            name: (death.engine, death.target, places[name])
            for name, death in deaths.items()
            if ranks_of(death.engine) == world_size
        }
        for _, _, place in cells.values():
            place.mkdir()
        results = ranks(run_on_a_rank, world_size, cells | resumed)
        for name, (engine, target, _) in resumed.items():
            for rank, digests in enumerate(results):
                wanted = digests[f"{engine}, {target}"]
                differs = [
                    key for key in wanted.keys() | digests[name].keys() if wanted.get(key) != digests[name].get(key)
                ]
                assert len(wanted) > 40 and not differs, f"seed {SEED}, rank {rank}, {deaths[name]}: {sorted(differs)}"
