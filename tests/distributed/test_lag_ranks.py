"""The non-adiabatic variant on shards."""

from __future__ import annotations

import torch
from torch import nn

from helpers.engines import gathered, make
from lp_dist import LpAdamW, attach, param_groups


def on_a_rank(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    weights = {}
    for kind in ("plain", "zero2", "zero3", "fsdp2"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
        engine = make(kind, model, lambda model: LpAdamW(param_groups(model, 0.5), lr=1e-2, lag=0.5, precondition=0.0))
        attach(engine.handle, engine.optimizer)
        for step in range(12):
            engine.step(engine(torch.randn(3, 7, generator=torch.Generator().manual_seed(step))).square().mean())
        weights[kind] = gathered(engine)
    return weights


def test_sharded_it_is_one_process(run_ranks):
    """Equal batches on both ranks, so that their average is exact: (a + a) / 2."""
    for weights_by_kind in run_ranks(on_a_rank, 2):
        wanted = weights_by_kind.pop("plain")
        assert 0.05 < float((wanted["0.weight"] == 0).float().mean()) < 0.95
        for kind, weights in weights_by_kind.items():
            for name, weight in wanted.items():
                assert torch.equal(weights[name], weight), f"{kind}: {name}"
