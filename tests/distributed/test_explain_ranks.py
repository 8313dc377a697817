"""A plan of a sharded model is that of the model before it: nothing is gathered, and a rank alone may ask for it."""

from __future__ import annotations

import torch
from torch import nn

from helpers.engines import make
from lp_dist import LpAdamW, SparsityTarget, attach, explain, param_groups


def model_of() -> nn.Sequential:
    """Uneven sizes, and a last layer of one row, of which FSDP2 leaves a rank without elements."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False), nn.Linear(5, 1))


TARGET = SparsityTarget(0.5)


def on_a_rank(rank: int, world_size: int) -> dict[str, tuple]:
    results = {}
    for kind in ("fsdp2", "zero3"):
        engine = make(kind, model_of(), lambda model: LpAdamW(param_groups(model), lr=1e-2, p=0.5))
        if rank == 0:
            explanation = explain(engine.handle, TARGET, total_steps=40)
            results[kind] = (
                explanation.kinds,
                explanation.targets,
                [(choice.name, choice.shape, choice.decays) for choice in explanation.choices],
                explanation.notes,
            )
        optimizer = None if kind == "zero3" else engine.optimizer
        attached = attach(engine.handle, optimizer, target=TARGET, total_steps=40)
        results[f"{kind} attached"] = (attached.decayed_singly,)
        if hasattr(engine.handle, "destroy"):
            engine.handle.destroy()
    return results


def test_what_is_said_of_shards_is_said_of_the_model(run_ranks):
    first, _ = run_ranks(on_a_rank, 2)
    plain = explain(model_of(), TARGET, total_steps=40)
    for kind in ("fsdp2", "zero3"):
        kinds, targets, parameters, notes = first[kind]
        assert kinds == plain.kinds and targets == plain.targets
        assert parameters == [(choice.name, choice.shape, choice.decays) for choice in plain.choices]
        assert {name for name, _, decays in parameters if decays} == first[f"{kind} attached"][0]
        assert "all zeros" in notes[-1] and "all zeros" not in plain.notes[-1]
