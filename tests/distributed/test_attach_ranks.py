"""attach on several ranks: what differs between them is refused on all, and so is an engine of unknown shards."""

from __future__ import annotations

import pytest
from torch import nn

from lp_dist import LpAdamW, SparsityTarget, attach, param_groups


def disagreeing(rank: int, world_size: int) -> list[str]:
    """Ranks that differ in λ, in an override, in what a group holds, in what decays: all of them must say so, and none
    hang.
    """
    errors = []
    one_or_other = ["0.weight"] if rank else ["2.weight"]
    for lam, names, arguments in (
        (0.1 + rank, None, {}),
        (0.1, None, {"overrides": {"0.weight": {"p": float(rank)}}}),
        (0.1, one_or_other, {}),
        (0.1, None, {"overrides": {"nothing": {"p": 0.0}} if rank else {}}),
        (0.1, None, {"names": one_or_other}),
        (0.0, None, {"names": one_or_other, "target": SparsityTarget(0.5), "total_steps": 100}),
    ):
        model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False))
        optimizer = LpAdamW(param_groups(model, lam, names=names), lr=1e-2, precondition=0.0)
        try:
            attach(model, optimizer, **arguments)
            errors.append("")
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    return errors


def test_ranks_that_disagree_are_refused_on_every_rank(run_ranks):
    ranks = run_ranks(disagreeing, 2)
    assert ranks[0][:3] == ranks[1][:3]
    assert (
        "'nothing' matches no parameter" in ranks[1][3]
        and ranks[0][3] == f"rank 1 could not attach its optimizer: {ranks[1][3]}"
    )
    assert "weight_decay of group 0 is 0.1 on rank 0 and 1.1 on rank 1" in ranks[0][0]
    assert "p of 0.weight is 0.0 on rank 0 and 1.0 on rank 1" in ranks[0][1]
    assert "param group of 0.weight is 1 on rank 0 and 0 on rank 1" in ranks[0][2]
    assert ranks[0][4:] == ranks[1][4:]
    assert "weight_decay of 0.weight is 0.0 on rank 0 and None on rank 1" in ranks[0][4]
    assert "decay of 0.weight is False on rank 0 and True on rank 1" in ranks[0][5]


def test_an_engine_that_does_not_know_where_its_parameters_lie_is_refused(run_ranks):
    run_ranks(with_round_robin, 1)


def with_round_robin(rank: int, world_size: int) -> None:
    from helpers.engines import ZERO, make

    ZERO["round robin"] = {"stage": 2, "round_robin_gradients": True}
    engine = make(
        "round robin", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), lambda model: LpAdamW(model.parameters())
    )
    with pytest.raises(RuntimeError, match="round_robin_gradients.*remove it from zero_optimization"):
        attach(engine.handle)
