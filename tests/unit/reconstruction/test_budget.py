"""Moving survivors within a bound on its memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import lp_dist
from helpers.targets import END, START, TargetRun, model_of
from lp_dist import SparsityTarget
from lp_dist.errors import UsageError
from lp_dist.reconstruction import budget, survivors
from lp_dist.reconstruction.budget import CHUNK, GIB, LEAST_CHUNK, LEAST_ROWS, TOKENS, Budget, bytes_to_solve
from lp_dist.reconstruction.solver import move_survivors

TINY = 0.8 / 1024  # GiB
LLAMA_8B = {f"{i}.{name}": shape for i in range(32) for name, shape in [
    ("q", (4096, 4096)), ("k", (1024, 4096)), ("v", (1024, 4096)), ("o", (4096, 4096)),
    ("gate", (14336, 4096)), ("up", (14336, 4096)), ("down", (4096, 14336)),
]}  # fmt: skip


def needed(budget: Budget, layers: dict[str, tuple[int, int]]) -> float:
    fitting = [shape for name, shape in layers.items() if name not in budget.reasons]
    rows = 4 * budget.rows * sum(inputs for _, inputs in fitting)
    return (rows + max(bytes_to_solve(*shape, budget.chunk) for shape in fitting)) / GIB


def test_without_a_bound_the_tokens_are_shared_by_the_ranks_and_all_fits():
    assert Budget.of(LLAMA_8B, 8, None) == Budget(TOKENS // 8, CHUNK, {})


@pytest.mark.parametrize("memory", [2.5, 4.0, 8.0, 40.0])
def test_what_is_planned_fits_and_a_wide_bound_changes_nothing(memory):
    planned = Budget.of(LLAMA_8B, 8, memory)
    assert needed(planned, LLAMA_8B) <= memory and LEAST_ROWS <= planned.rows <= TOKENS // 8
    assert LEAST_CHUNK <= planned.chunk <= CHUNK
    if memory == 40.0:
        assert planned == Budget.of(LLAMA_8B, 8, None)
    if memory == 2.5:  # XᵀX of 14,336 inputs takes 0.77 GiB, the weights from before 0.22
        assert planned.rows < TOKENS // 8 and planned.chunk < CHUNK


def test_layers_that_do_not_fit_are_named_and_the_others_share_the_bound():
    layers = {"wide": (64, 8192), "narrow": (64, 1024)}
    planned = Budget.of(layers, 1, 0.25)
    assert set(planned.reasons) == {"wide"} and "needs 0.26 GiB" in planned.reasons["wide"]
    assert "reconstruct_memory=0.25" in planned.reasons["wide"] and needed(planned, layers) <= 0.25


def test_too_little_for_any_inputs_is_refused_with_what_is_enough():
    with pytest.raises(UsageError, match=r"reconstruct_memory=1\.6 GiB is too little.*set [\d.]+ or more") as error:
        Budget.of(LLAMA_8B | {f"more {i}": (8, 4096) for i in range(100)}, 1, 1.6)
    enough = float(str(error.value).partition("set ")[2].split()[0])
    assert Budget.of(LLAMA_8B | {f"more {i}": (8, 4096) for i in range(100)}, 1, enough).rows >= LEAST_ROWS


def test_where_ranks_are_many_no_more_rows_are_required_than_each_would_keep():
    """128 of 8,192 on each of 64 ranks. The bound has room for these, and not for 256."""
    assert Budget.of(LLAMA_8B, 64, 2.0).rows == Budget.of(LLAMA_8B, 64, None).rows == 128


def test_a_run_goes_on_with_another_bound():
    first = TargetRun(SparsityTarget(0.5, reconstruct=True)).to(START + 2)
    second = TargetRun(SparsityTarget(0.5, reconstruct=True, reconstruct_memory=1.0))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.attached.load_state_dict(first.attached.state_dict())
    assert second.attached.weight_controller.last_step == START + 2


def test_no_more_weights_are_solved_at_a_time_than_a_bound_allows(monkeypatch):
    monkeypatch.setattr(budget, "LEAST_CHUNK", 1000)
    solved = []

    def noted(before: Tensor, *more: Any, **options: Any) -> Tensor:
        solved.append(before.numel())
        return move_survivors(before, *more, **options)

    monkeypatch.setattr(survivors, "move_survivors", noted)
    target = SparsityTarget(0.5, reconstruct=True, reconstruct_memory=TINY, update_every=2)
    run = TargetRun(target).to(START + 2)
    reconstruction = run.attached.weight_controller.reconstruction
    assert max(solved) <= reconstruction._budget.chunk < 64 * 160 and reconstruction.reasons == {}
    assert sum(solved) == sum(run.weights()[name].numel() for name in reconstruction.layers)


def test_a_target_within_a_bound_moves_what_fits_and_lets_the_rest_decay(caplog):
    """2.weight has 160 inputs, the others 64: half of it is too little for that."""
    memory = TINY
    run = TargetRun(SparsityTarget(0.5, reconstruct=True, reconstruct_memory=memory)).to(START)
    reconstruction = run.attached.weight_controller.reconstruction
    assert set(reconstruction.layers) == {"0.weight", "4.weight"} and set(reconstruction.reasons) == {"2.weight"}
    assert reconstruction.sample.tokens < TOKENS
    run.to(END)
    weights = run.weights()
    zeros = [torch.cat([(weights[f"{n}.weight"] == 0).flatten() for n in numbers]) for numbers in ((0, 2, 4), (2,))]
    assert int(zeros[0].sum()) == round(0.5 * len(zeros[0])) and zeros[1].any()
    assert "2.weight needs" in caplog.text


@pytest.fixture(autouse=True)
def logs(caplog):
    caplog.set_level(logging.INFO)


def test_explain_says_what_fits():
    target = SparsityTarget(0.5, reconstruct=True, reconstruct_memory=TINY)
    (update,) = lp_dist.explain(model_of(), target, gpus=[1], dtype="fp32").updates
    assert update.cost.layers == 2 and update.cost.sample + update.cost.solving <= TINY * GIB


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(memory):
    with pytest.raises(ValueError, match="reconstruct_memory=.* must be above 0"):
        SparsityTarget(0.5, reconstruct=True, reconstruct_memory=memory)


def test_a_bound_on_nothing_is_refused():
    with pytest.raises(ValueError, match="reconstruct_memory=2 bounds what reconstruct needs"):
        SparsityTarget(0.5, reconstruct=False, reconstruct_memory=2.0)
