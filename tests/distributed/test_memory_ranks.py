"""The footprint on paper against what is measured on two ranks: bytes that torch's profiler sees allocated, and every
collective that is called.
"""

from __future__ import annotations

import pytest

from helpers.memory_runs import CELLS, LARGEST, LAYERS, PARAMETERS, RANKS, on_a_rank
from lp_dist.report.memory import BINS, footprint


@pytest.mark.long
def test_memory_and_communication_of_every_engine(run_ranks):
    results = run_ranks(on_a_rank, RANKS)
    # Beside what is named, an engine has buckets, gradients on their way, and under offload two buffers of the largest
    # tensor.
    slack = 9 * 4 * LARGEST
    assert slack < PARAMETERS, "a copy of a rank's part in 16 bits could go unnoticed in the slack"
    for cell in CELLS:
        stage, dtype, offload = cell
        on_paper = footprint(
            PARAMETERS,
            RANKS,
            stage,
            dtype=dtype,
            offload=offload,
            accelerator=False,
            counted=results[0][cell]["counted"],
        )
        places = (on_paper.device, on_paper.host)
        model = on_paper.device.model if stage in (1, 2, 3) else 0
        beside = (
            sum(place.total - place.masters - place.optimizer_state - place.temporaries for place in places) - model
        )
        for got in (result[cell] for result in results):
            said = f"{cell}: {got}, {on_paper}"
            # Flat shards are padded to two elements per group and rank, ZeRO-3's parts to one per tensor.
            assert 0 <= got["model"] - model <= 4 * 4, said
            assert 0 <= got["masters"] - sum(place.masters for place in places) <= 4 * 4, said
            assert 0 <= got["optimizer_state"] - sum(place.optimizer_state for place in places) <= 2 * 4 * 4, said
            assert got["beside"] - beside <= slack, said
            assert 0 <= got["sent"] - on_paper.sent_per_step <= 64, said  # norms and overflow flags
            assert got["sent_to_count"] == on_paper.sent_per_count and got["calls_to_count"] == 1, said
            with_bins = footprint(
                PARAMETERS, RANKS, stage, dtype=dtype, offload=offload, counted=got["counted"], bins=BINS
            ).sent_per_count
            assert got["sent_to_count"] + got["sent_to_bin"] == with_bins, said
            assert got["counted"] == LAYERS and got["calls_of_inner_step"] == 0, said
        # Not all ranks reach the most: under ZeRO-1 the first does. The second group, of biases, has its copies later.
        assert max(result[cell]["beside"] for result in results) - beside >= -2 * 4 * LARGEST, (
            f"{cell}: {[r[cell] for r in results]}, {on_paper}"
        )
    for result in results:
        lp_adamw = result[2, "bf16", False]
        assert result["AdamW"] == {key: lp_adamw[key] for key in result["AdamW"]}
