"""A SparsityTarget with a pattern: every block ends in it, by decay, along its plan; and what can't have one is
left out.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.layouts import DIMS, LEFT_OUT, WIDTH, Beside, Straight, in_blocks, layers_of
from helpers.targets import END, FINAL_PRUNING, MATRICES, START, TOTAL, TargetRun, decaying, model_of
from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay, attach, param_groups
from lp_dist.errors import UsageError
from lp_dist.optim.nm import PATTERNS


def alive(weight: torch.Tensor, m: int) -> torch.Tensor:
    """Non-zero weights of each block."""
    return (weight.detach().reshape(-1, m) != 0).sum(1)


@pytest.mark.parametrize(
    ("pattern", "make", "lr", "form"),
    [
        ("2:4", LpAdamW, 3e-3, {}),
        ("4:8", LpAdamW, 3e-3, {"scope": "layer", "p": 0.0, "precondition": 0.5}),
        ("2:4", LpAdamW, 3e-3, {"cap": None}),
        ("2:4", LpAdamW, 3e-3, {"regrowth": 0.0, "latent_windows": 0.0, "sparsity": 0.5}),
        ("4:8", LpLion, 3e-4, {"p": 0.0}),
        ("2:4", lambda params, lr: LpSGD(params, lr=lr, momentum=0.9), 0.05, {"scope": "layer"}),
    ],
)
def test_every_block_ends_in_the_pattern_by_decay_along_the_plan(pattern, make, lr, form):
    n, m = PATTERNS[pattern]
    run = TargetRun(decaying(**{"pattern": pattern, **form}), make=make, lr=lr).to(TOTAL)
    params = dict(run.model.named_parameters())
    for name in MATRICES:
        assert (alive(params[name], m) == n).all(), name
    assert all((param != 0).all() for name, param in params.items() if name not in MATRICES)
    control = run.attached.weight_controller
    assert (
        control.target.sparsity == (m - n) / m == control.final_pruning["after"]
        and control.final_pruning["pruned_at_end"] < 0.01
    ), control.final_pruning
    last = 0.0
    for step, logs in run.history[:-1]:
        assert logs["lp/plan"] == pytest.approx(0.5 * (1 - (1 - (step - START) / (FINAL_PRUNING - START)) ** 3))
        if step > control.regrowth_end:  # what is near zero becomes zero
            continue
        assert last - 0.01 <= logs["lp/near_zero"] <= logs["lp/plan"] + 0.01, (step, logs)
        assert logs["lp/near_zero"] >= 0.5 * control.planned_share(max(step - 10, START)) - 0.01, (step, logs)
        last = logs["lp/near_zero"]
    assert last > 0.45


def test_survivors_feel_no_decay_and_train_on_while_zeros_stay():
    run = TargetRun(decaying(pattern="2:4")).to(END)
    dead, there = {name: run.weights()[name] == 0 for name in MATRICES}, run.weights()
    run.to(TOTAL)
    for name, zeros in dead.items():
        now = run.weights()[name]
        assert (now == 0).equal(zeros) and (now != there[name])[~zeros].float().mean() > 0.99
    # As many weights survive as without blocks, and they are no smaller: none of them was pulled down
    plain = TargetRun(decaying(0.5, latent_windows=0)).to(TOTAL)
    size = [sum(float(weights[name].abs().sum()) for name in MATRICES) for weights in (run.weights(), plain.weights())]
    assert 0.85 < size[0] / size[1] < 1.05, size


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lambda_and_cutoff_are_those_of_the_formula(pattern):
    """By hand: the quantile of x over the weights that are not the largest of their block, at the plan's share of all
    weights.
    """
    n, m = PATTERNS[pattern]
    run, horizon = (
        TargetRun(decaying(pattern=pattern, scope="layer", p=0.0, update_every=4, curve="linear")).to(14),
        4,
    )
    share = 0.5 * (14 + horizon - START) / (FINAL_PRUNING - START)
    rates, values_by_name = 0.0, {name: run.optimizer.parameter_map.values(name) for name in MATRICES}
    xs = {}
    for name, param in run.model.named_parameters():
        if name in MATRICES:
            denom = (run.optimizer.state[param]["exp_avg_sq"].double() / (1 - 0.999**run.taken)).sqrt() + 1e-8
            blocks = (param.detach().double() ** 2 * denom).view(-1, m)
            xs[name] = float(
                blocks.sort().values[:, : m - n].flatten().sort().values[round(share * param.numel()) - 1]
            )
    for _ in range(horizon):
        rates += run.optimizer.param_groups[0]["lr"]
        run.step()
    for name, values in values_by_name.items():
        assert values["cutoff"] == pytest.approx(xs[name], rel=3e-4) and values["weight_decay"] == pytest.approx(
            xs[name] / (2 * rates), rel=3e-4
        )
        assert values["regrowth_below"] == pytest.approx(0.1 * xs[name], rel=3e-4)


def test_an_update_samples_complete_blocks_evenly_over_the_columns(monkeypatch):
    monkeypatch.setattr("lp_dist.sparsity.quantiles.SAMPLE_SIZE", 2000)
    run = TargetRun(decaying(pattern="2:4")).to(START)
    blocks = run.model[0].weight.detach().view(-1, 4)
    sample = run.attached.weight_controller.scored_slices(all_local=False, elements={"all": sum(MATRICES.values())})[0]
    ((_, _, x),) = sample.saliency()
    places = [(blocks == block).all(1).nonzero().item() for block in sample.weights.view(-1, 4)]
    assert 200 < len(places) < 400 and len({place % 16 for place in places}) == 16
    assert (x.view(-1, 4) == math.inf).sum(1).tolist() == [2] * len(places)


@given(
    values=st.lists(
        st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0.0, 0.5, -0.5, 1e-30])), min_size=48, max_size=48
    ),
    pattern=st.sampled_from(list(PATTERNS)),
    slope=st.floats(0.01, 2.0),
    regrowth=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=25, deadline=None)
def test_any_weights_end_in_the_pattern(values, pattern, slope, regrowth):
    n, m = PATTERNS[pattern]
    weight = torch.tensor(values).view(6, 8)
    if not weight.any():
        return
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    model[0].weight.data.copy_(weight)
    run = TargetRun(decaying(pattern=pattern, regrowth=regrowth), model=model, total=14, attached=False)
    run.step = lambda: stepped(run, slope)
    run.attach()
    run.to(14)
    assert (alive(model[0].weight, m) <= n).all() and model[0].weight.isfinite().all()


def stepped(run: TargetRun, slope: float) -> None:
    generator = torch.Generator().manual_seed(run.taken)
    run.model[0].weight.grad = slope * torch.randn(6, 8, generator=generator)
    run.optimizer.step()
    run.scheduler.step()
    run.taken += 1


def test_zeros_that_were_there_count_where_they_are_not_kept():
    """Half of the weights are zero, and no block is 2:4: that is no sparsity of this kind yet. What is in the pattern
    already stays in it.
    """
    model = model_of()
    with torch.no_grad():
        model[0].weight[:80] = 0.0
        model[2].weight.view(-1, 4)[:, 1:3] = 0.0
    run = TargetRun(decaying(pattern="2:4", scope="layer", regrowth=0.0), model=model).to(START)
    assert run.attached.weight_controller.before == {"0.weight": 0.25, "2.weight": 0.5, "4.weight": 0.0}
    run.to(TOTAL)
    assert (alive(model[2].weight, 4) == 2).all() and all((alive(model[i].weight, 4) <= 2).all() for i in (0, 4))


# -- what can't be ------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["sparsity=None", "or a pattern"]),
        ({"pattern": "1:4"}, ["pattern='1:4'", "2:4, 4:8"]),
        ({"pattern": "2:4", "sparsity": 0.6}, ["sparsity=0.6 contradicts pattern='2:4', which is 0.5"]),
        ({"pattern": "2:4", "latent_windows": 8}, ["latent_windows=8", "set latent_windows=0"]),
        ({"pattern": "2:4", "relative_to": "all"}, ["relative_to='all'", "use relative_to='decayed'"]),
    ],
)
def test_bad_values_are_refused_by_the_target_itself(values, words):
    with pytest.raises(ValueError) as caught:
        decaying(**values)
    assert all(word in str(caught.value) for word in words), caught.value


def step_all(model: nn.Module, optimizer: Any, steps: int, attached: Any = None) -> None:
    for step in range(steps):
        rows = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        (model(rows) - rows[:, :1].sin()).square().mean().backward()
        optimizer.step()
        if attached is not None:
            attached.after_step()


def check_blocks_of(model: nn.Module, n: int, m: int) -> None:
    """Each block of every layout has N weights that are not zero, and what has no blocks has none that is zero."""
    params = dict(model.named_parameters())
    for name, dim in DIMS.items():
        assert (in_blocks(params[name].detach(), dim, m) != 0).sum(1).eq(n).all(), name
    assert all((param != 0).all() for name, param in params.items() if name not in DIMS)


@pytest.mark.parametrize(("pattern", "scope"), [("2:4", "global"), ("4:8", "layer")])
def test_blocks_lie_along_the_inputs_in_every_layout(pattern, scope, caplog):
    """And what can have none is left out, with one warning that lists all; the plan says of what the share is one."""
    model = layers_of()
    with caplog.at_level("INFO"):
        optimizer = LpAdamW(model.parameters(), lr=3e-3)
        target = decaying(pattern=pattern, scope=scope, update_every=2)
        attached = attach(model, optimizer, target=target, total_steps=30)
        step_all(model, optimizer, 30, attached)
    n, m = PATTERNS[pattern]
    check_blocks_of(model, n, m)
    assert {shard.name for shard in attached.weight_controller.shards} == DIMS.keys()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (warning,) = [message for message in warnings if "pattern" in message]
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    left_out, blocks = sum(sizes[name] for name in LEFT_OUT), sum(sizes[name] for name in DIMS)
    assert f"2 of 9 parameters ({left_out:,} of {left_out + blocks:,} weights" in warning
    assert all(f"{name}: {reason} {m}" in warning for name, reason in LEFT_OUT.items()), warning
    (plan,) = [message for message in caplog.messages if message.startswith("target: prune")]
    share = 50 * blocks / (blocks + left_out)
    assert f"50.00 % of {blocks:,} weights ({share:.2f} % of {blocks + left_out:,}, of which {left_out:,}" in plan, (
        plan
    )
    assert attached.weight_controller.final_pruning["after"] == 0.5


@pytest.mark.parametrize("attached", [True, False])
def test_a_pattern_by_hand_lies_along_the_inputs_too(attached, caplog):
    model = layers_of()
    optimizer = LpAdamW(param_groups(model, 1e6, pattern="2:4"), lr=1e-4)
    step_all(model, optimizer, 4, attach(model, optimizer) if attached else None)
    check_blocks_of(model, 2, 4)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([message for message in warnings if "pattern='2:4' is not for 2 of 9 parameters" in message]) == 1


def test_param_groups_of_attach_need_not_say_where_the_inputs_are():
    model = layers_of()
    names = [*DIMS]
    decaying = [model.get_parameter(name) for name in names]
    optimizer = LpAdamW(decaying, lr=1e-4, weight_decay=1e6, pattern="2:4")
    step_all(model, optimizer, 4, attach(model, optimizer))
    check_blocks_of(model, 2, 4)


def test_without_a_model_it_is_refused_and_not_guessed():
    model = layers_of()
    optimizer = LpAdamW(model.parameters(), lr=1e-4, weight_decay=1.0, pattern="2:4")
    with pytest.raises(
        ValueError, match=r"shape \(24, 13\) can't have pattern='2:4': it is not known .*lp_dist.attach"
    ):
        step_all(model, optimizer, 1)


def test_the_input_dimension_may_be_named_where_no_code_says_it():
    class Opaque(nn.Module):
        """Its code can't be read: the name of a function is found when it runs."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.width = nn.Parameter(torch.randn(8, 6) / 4), 8

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return getattr(torch, "".join(("mat", "mul")))(rows, self.table)

    model = Beside([Straight(8, 4), Opaque()])
    attach_to = {"target": decaying(pattern="2:4"), "total_steps": 20}
    names = ["0.weight", "1.table"]
    for overrides, shards in (({}, 1), ({"1.table": {"input_dim": 0}}, 2)):
        optimizer = LpAdamW(model.parameters(), lr=3e-3)
        attached = attach(model, optimizer, names=names, overrides=overrides, **attach_to)
        assert len(attached.weight_controller.shards) == shards
    step_all(model, optimizer, 20, attached)
    assert (in_blocks(model[1].table.detach(), 0, 4) != 0).sum(1).eq(2).all()


def test_what_is_multiplied_in_both_ways_has_no_inputs(caplog):
    class Mirror(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.glass, self.width = nn.Parameter(torch.randn(8, 8) / 4), 8

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return (rows @ self.glass).tanh() @ self.glass.T

    model = Beside([Straight(8, 4), Mirror()])
    attach(model, LpAdamW(model.parameters(), lr=3e-3), target=decaying(pattern="2:4"), total_steps=20)
    assert "1.glass: its inputs are different dimensions in different places of the code (Mirror)" in caplog.text


@pytest.mark.parametrize("by_hand", [False, True])
def test_where_nothing_can_have_it_the_run_is_refused_with_all_reasons(by_hand):
    model = nn.Sequential(nn.Linear(62, 6), nn.Linear(6, 6))
    make = (lambda params, lr: LpAdamW(params, lr=lr, weight_decay=0.1, pattern="2:4")) if by_hand else LpAdamW
    words = r"no parameter that decays can have pattern='2:4': 0.weight: its .* 62, .*; 1.weight: its .* inputs, 6,"
    with pytest.raises(UsageError, match=words):
        TargetRun(None if by_hand else decaying(pattern="2:4"), make=make, model=model)


def test_tables_have_no_inputs(caplog):
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    optimizer = LpAdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer, names=["0.weight", "1.weight"], target=decaying(pattern="2:4"), total_steps=TOTAL)
    assert "0.weight: it is a table whose rows are looked up" in caplog.text


def test_other_optimizers_have_none():
    def hooked(params, lr):
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        add_lp_decay(optimizer)
        return optimizer

    with pytest.raises(ValueError, match="pattern='2:4' is for LpAdamW, LpSGD and LpLion"):
        TargetRun(decaying(pattern="2:4"), make=hooked)


def test_a_transposed_matrix_is_refused():
    model = model_of()
    model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    with pytest.raises(ValueError, match="2.weight can't have pattern='2:4': it does not lie in memory row by row"):
        TargetRun(decaying(pattern="2:4"), model=model)


def test_the_target_is_described_for_checkpoints():
    described = decaying(pattern="4:8").described()
    assert described["pattern"] == "4:8" and described["sparsity"] == 0.5 and not math.isnan(described["sparsity"])
