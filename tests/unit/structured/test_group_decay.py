"""The decay of whole groups in one process: the equation, whatever steps; what becomes zero stays dead; and what is
requested of it in vain.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import reference
from helpers.groups import flat, paired_model, pairs_of, saved, step
from lp_dist import GroupDecay, LpAdamW, LpLion, LpSGD, add_lp_decay, attach
from lp_dist.errors import UsageError
from lp_dist.optim.hooks import handle_of
from lp_dist.sharding.shards import locate_shards
from lp_dist.structured import group_decay, placement
from lp_dist.structured.group_decay import DecaySettings, GroupDecayHook
from lp_dist.structured.placement import tiles
from lp_dist.structured.resolve import groups_of, resolve_groups

FORM = {"weight_decay": 0.3, "p": 0.5}


def indices(model: nn.Module) -> list[list[int]]:
    """The elements of the three pairs in the parameters, taken flat and one after the other; written without
    lp_dist.
    """
    first = [[64 * row + column for row in (2 * i, 2 * i + 1) for column in range(64)] for i in range(3)]
    bias = [[6 * 64 + 2 * i, 6 * 64 + 2 * i + 1] for i in range(3)]
    last = [[6 * 64 + 6 + 6 * row + column for row in range(8) for column in (2 * i, 2 * i + 1)] for i in range(3)]
    return [a + b + c for a, b, c in zip(first, bias, last)]


def hooked(params, lr):
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=0.01)
    add_lp_decay(optimizer, p=0.5)
    return optimizer


BASES = {
    "LpAdamW": lambda params, lr: LpAdamW(params, lr=lr, weight_decay=0.01),
    "LpSGD": lambda params, lr: LpSGD(params, lr=lr, momentum=0.9),
    "LpLion": lambda params, lr: LpLion(params, lr=lr, l2=0.1),
    "reference": lambda params, lr: LpAdamW(params, lr=lr, implementation="reference"),
    "torch's AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "SGD with hooks": hooked,
}


@pytest.mark.parametrize("base", BASES)
def test_after_the_bases_step_a_group_is_divided_by_the_equations_number(base):
    """Its step is that of a twin without groups, taken from the same weights and state."""
    model = paired_model()
    optimizer = BASES[base](model.parameters(), lr=0.02)
    if handle_of(optimizer) is None and "Lp" not in type(optimizer).__name__:
        hook = GroupDecayHook(optimizer, pairs_of(model), locate_shards(model, optimizer), p=FORM["p"])
        hook.settings = [DecaySettings(FORM["weight_decay"])]
    else:
        hook = attach(
            model,
            optimizer,
            names=["0.weight", "0.bias", "2.weight", "2.bias"],
            groups=GroupDecay(pairs_of(model), **FORM),
        ).group_decay
    for number in range(4):
        twin = copy.deepcopy(model)
        other = BASES[base](twin.parameters(), lr=0.02)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = flat(model)
        step(model, optimizer, number)
        step(twin, other, number)
        wanted = flat(twin)
        for group, factor in zip(
            indices(model), reference.group_factors(indices(model), before, lr=0.02, **FORM), strict=True
        ):
            assert 0.9 < factor < 1.0
            for i in group:
                wanted[i] *= factor
        assert flat(model) == pytest.approx(wanted, rel=1e-12, abs=1e-15), number
    hook.remove()
    twin = copy.deepcopy(model)
    other = BASES[base](twin.parameters(), lr=0.02)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 9)
    step(twin, other, 9)
    assert flat(model) == flat(twin)


@pytest.mark.parametrize(
    "form",
    [
        {"p": -1.0, "precondition": 1.5},
        {"p": 0.5, "precondition": 1.0, "cutoff": 0.05},
        {"p": 1.0},
        {"p": 0.0, "regrowth_below": 30.0},
    ],
)
def test_the_forms_of_the_norm(form):
    """Preconditioned by the second moments from before the step, capped, and with regrowth; λ such that it shows."""
    model = paired_model()
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    group_decay = GroupDecay(
        pairs_of(model), weight_decay=0.05, **{key: value for key, value in form.items() if key != "regrowth_below"}
    )
    hook = attach(model, optimizer, groups=group_decay).group_decay
    hook.settings = [DecaySettings(0.05, group_decay.cutoff, form.get("regrowth_below", 0.0))]
    seen = set()
    for number in range(5):
        twin = copy.deepcopy(model)
        other = LpAdamW(twin.parameters(), lr=0.02)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = flat(model)
        denoms = (
            flat(model, lambda param: (optimizer.state[param]["exp_avg_sq"] / (1 - 0.999**number)).sqrt() + 1e-8)
            if number
            else None
        )
        step(model, optimizer, number)
        step(twin, other, number)
        wanted = flat(twin)
        if number or not form.get(
            "precondition"
        ):  # before the first step nothing is known of how sensitive the loss is
            values = {"p": 0.5, "precondition": 0.0, **form}
            factors = reference.group_factors(
                indices(model), before, lr=0.02, weight_decay=0.05, denoms=denoms, **values
            )
            seen |= {factor < 1.0 for factor in factors}
            for group, factor in zip(indices(model), factors):
                for i in group:
                    wanted[i] *= factor
        assert flat(model) == pytest.approx(wanted, rel=1e-12, abs=1e-15), number
    assert seen == {True} if form.get("cutoff") is None else {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_how_sensitive_the_loss_is_to_a_weight_does_not_depend_on_where_a_shard_begins(dtype):
    """To the bit, since norms of other shards must be the same; torch's power of single precision does not do that on
    a CPU.
    """
    model = paired_model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    step(model, optimizer, 0)
    hook = GroupDecayHook(optimizer, pairs_of(model), locate_shards(model, optimizer), precondition=1.0)
    shard = next(matrix.shard for matrix in hook.matrices if matrix.shard.name == "0.weight")
    second = shard.state["exp_avg_sq"].copy_(torch.rand(384, generator=torch.Generator().manual_seed(1)).mul_(1e-6))
    unsharded = hook.preconditioner(shard, 0, second)
    wanted = ((second.double() / (1 - 0.999)).sqrt() + 1e-8) ** (2 / 3)
    torch.testing.assert_close(unsharded.double(), wanted, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0.0)
    for start, length in itertools.product(range(70), (1, 2, 3, 5, 8, 13, 31, 64, 127, 301)):
        assert hook.preconditioner(shard, start, second[:length]).equal(unsharded[start : start + length]), (
            start,
            length,
        )


def test_a_group_of_one_weight_decays_as_a_weight_does():
    model = nn.Sequential(nn.Linear(1, 64, bias=False)).double()
    twin = copy.deepcopy(model)
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    attach(model, optimizer, groups=GroupDecay(groups_of(model, outputs="0"), 0.05, p=0.3, cutoff=0.5))
    other = LpAdamW(twin.parameters(), lr=0.02, weight_decay=0.05, p=0.3, cutoff=0.5)
    for number in range(30):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(number)).double()
        for network, stepper in ((model, optimizer), (twin, other)):
            network.zero_grad()
            (network(x) - x.sin()).square().mean().backward()
            stepper.step()
    assert 0 < (model[0].weight == 0).sum() < 64
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-9, atol=1e-12)


def test_what_is_lost_to_single_precision_becomes_zero():
    model = paired_model(torch.float32)
    optimizer = LpSGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for values in (model[0].weight[2:4], model[0].bias[2:4], model[2].weight[:, 2:4]):
            values.fill_(0.9e-13)
        model[0].weight[4:6] = 1.1e-13
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 1e-30))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert not model[0].weight[2:4].any() and not model[2].weight[:, 2:4].any() and model[0].weight[4:6].all()


def test_every_so_many_steps_it_decays_for_the_learning_rates_of_all():
    model = paired_model()
    optimizer = LpSGD(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 9)
    attached = attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=3))
    rates = []
    for number in range(6):
        twin = copy.deepcopy(model)
        other = LpSGD(twin.parameters(), lr=optimizer.param_groups[0]["lr"])
        before = flat(model)
        rates.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer, number)
        step(twin, other, number)
        attached.after_step()
        scheduler.step()
        wanted = flat(twin)
        if number % 3 == 2:
            factors = reference.group_factors(indices(model), before, lr=sum(rates[-3:]), weight_decay=0.3, p=0.5)
            for group, factor in zip(indices(model), factors):
                for i in group:
                    wanted[i] *= factor
        assert flat(model) == pytest.approx(wanted, rel=1e-12), number
    assert attached.state_dict() == {"step": 6, "groups": {"steps": 0, "rates": {}}}


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 40),
    length=st.integers(0, 60),
    width=st.integers(1, 13),
    most=st.sampled_from([1, 7, 30, None]),
)
def test_rectangles_cover_a_range_of_a_matrix_once(start, length, width, most):
    values = torch.arange(start, start + length)
    seen = []
    for at, block, rows, columns in tiles(values, start, width, max_elements=most):
        assert (
            block.shape == (rows.stop - rows.start, columns.stop - columns.start)
            and block.data_ptr() == values[at:].data_ptr()
        )
        assert (
            block == torch.arange(rows.start, rows.stop)[:, None] * width + torch.arange(columns.start, columns.stop)
        ).all()
        assert columns == slice(0, width) or len(block) == 1
        assert most is None or len(block) == 1 or block.numel() <= most
        seen += block.flatten().tolist()
    assert seen == values.tolist()
    assert most is not None or len(list(tiles(values, start, width, max_elements=None))) <= 3


def test_a_long_row_is_divided_unless_any_size_is_asked_for(monkeypatch):
    """A whole expert is a row, of which squares in double precision would take hundreds of megabytes."""
    monkeypatch.setattr(placement, "LONGEST_TILE", 10)
    values = torch.arange(5, 5 + 60)
    rectangles = [*tiles(values, 5, 24)]
    assert torch.cat([tile.values.flatten() for tile in rectangles]).equal(values)
    assert max(tile.values.numel() for tile in rectangles) == 10
    for tile in rectangles:
        assert int(tile.values[0, 0]) == tile.rows.start * 24 + tile.columns.start and len(tile.values) == 1
    assert max(tile.values.numel() for tile in tiles(values, 5, 24, max_elements=None)) > 10


def test_the_factors_of_all_sets_are_the_same_in_any_chunks(monkeypatch):
    results = []
    for chunk in (1 << 18, 7, 1):
        monkeypatch.setattr(group_decay, "CHUNK", chunk)
        model = nn.Sequential(*(paired_model() for _ in range(4)))
        optimizer = LpAdamW(model.parameters(), lr=0.02)
        sets = [groups_of(model, outputs=f"{i}.0", inputs=f"{i}.2", width=2, kind=f"pairs {i}")[0] for i in range(4)]
        hook = GroupDecayHook(optimizer, sets, locate_shards(model, optimizer), p=0.5)
        hook.settings = [DecaySettings(0.3, math.inf if i % 2 else 40.0, 0.1 * i) for i in range(4)]
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        before = flat(model)
        optimizer.step()
        results.append(flat(model))
        hook.remove()
        assert results[-1] == results[0] != before


def test_the_squares_are_the_same_however_the_weights_are_cut():
    """In double precision the order in which squares are added is below what single precision sees."""
    values = torch.randn(64 * 37, generator=torch.Generator().manual_seed(0))

    def squares(cuts: list[int]) -> torch.Tensor:
        sums = torch.zeros(64, dtype=torch.float64)
        for start, stop in zip([0, *cuts], [*cuts, len(values)]):
            for _, block, rows, _ in tiles(values[start:stop], start, 37, max_elements=100):
                sums[rows] += block.double().square().sum(1)
        return sums.sqrt().float()

    assert all(
        squares(cuts).equal(squares([])) for cuts in ([1], [36, 38, 900], [500, 501, 1999], list(range(0, 2368, 11)))
    )


def test_what_is_held_at_zero_stays_there_and_costs_nothing_else(monkeypatch):
    model = paired_model(torch.float32)
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    hook = attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.0)).group_decay
    step(model, optimizer, 0)
    dead = torch.tensor([False, True, False])
    hook.prune(dead)
    for name in ("exp_avg", "weight"):
        for param in (model[0].weight, model[0].bias):
            values = param if name == "weight" else optimizer.state[param]["exp_avg"]
            assert not values[2:4].any() and values[:2].all() and values[4:].all()
    hook.keep_zero(dead)
    twin = copy.deepcopy(model)
    other = LpAdamW(twin.parameters(), lr=0.02)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 1)
    step(twin, other, 1)
    assert model[2].weight[:, 2:4].any() == False and twin[0].weight[2:4].any() == False  # noqa: E712
    torch.testing.assert_close(flat(model), flat(twin), rtol=0, atol=0)
    model[0].bias.data[2] = 1.0  # from elsewhere: the next step puts it back
    step(model, optimizer, 2)
    assert not model[0].bias[2:4].any() and model[0].bias[:2].all()
    hook.keep_zero(None)
    model[0].bias.data[2] = 1.0
    step(model, optimizer, 3)
    assert model[0].bias[2]


def test_a_step_that_is_left_out_decays_nothing():
    """AMP's GradScaler tells the optimizer so, whose fused step then does nothing."""
    model = paired_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    add_lp_decay(optimizer)
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3))
    before = flat(model)
    optimizer.found_inf = torch.ones(1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert flat(model) == before
    optimizer.found_inf = torch.zeros(1)
    optimizer.step()
    assert flat(model) != before


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(weight_decay=-1.0), "weight_decay=-1.0 must be a finite number"),
        (dict(weight_decay=0.1, p=2.0), "p=2 makes no groups zero"),
        (dict(weight_decay=0.1, interval=0), "interval=0 must be a whole number"),
        (dict(weight_decay=0.1, cutoff=math.nan), "cutoff=nan"),
    ],
)
def test_values_out_of_range_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        GroupDecay("channels", **values)


def test_what_groups_need_and_is_not_there_is_told():
    model = paired_model()
    with pytest.raises(UsageError, match="needs Adam's second moments .* the optimizer is LpSGD"):
        attach(model, LpSGD(model.parameters(), lr=0.1), groups=GroupDecay(pairs_of(model), 0.1, precondition=1.0))
    with pytest.raises(UsageError, match="pairs have weights in 2.weight, which this optimizer does not step"):
        attach(model, LpSGD(model[0].parameters(), lr=0.1), groups=GroupDecay(pairs_of(model), 0.1))
    with pytest.raises(UsageError, match="no feed-forward channels are recognised in Sequential"):
        attach(model, LpSGD(model.parameters(), lr=0.1), groups=GroupDecay("channels", 0.1))


def test_attaching_again_takes_the_first_decay_off():
    model = paired_model()
    optimizer = LpSGD(model.parameters(), lr=0.02)
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3))
    attach(model, optimizer)
    twin = copy.deepcopy(model)
    other = LpSGD(twin.parameters(), lr=0.02)
    step(model, optimizer, 0)
    step(twin, other, 0)
    assert flat(model) == flat(twin)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("taken", [3, 4, 6])
def test_a_decay_without_after_step_goes_on_from_where_it_was_saved(interval, taken):
    """`after_step` is needed with a target alone, and an engine may save a state before it is called."""

    def made():
        model = paired_model()
        optimizer = LpAdamW(model.parameters(), lr=0.02)
        return model, optimizer, attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=interval))

    runs = [made(), made()]
    for number in range(taken):
        step(*runs[0][:2], number)
    for stateful, state in zip(runs[1], saved(*runs[0])):
        stateful.load_state_dict(state)
    for number in range(taken, 9):
        for run in runs:
            step(*run[:2], number)
    assert flat(runs[0][0]) == flat(runs[1][0])


def test_going_back_to_between_two_decays_forgets_what_came_after():
    model, states, wanted = paired_model(), None, None
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    attached = attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=3))
    for stop in (5, 6):  # in the second turn from right after a decay
        for number in range(stop):
            step(model, optimizer, number)
            if number == 4 and states is None:
                states = saved(model, optimizer, attached)
        for stateful, state in zip((model, optimizer, attached), copy.deepcopy(states)):
            stateful.load_state_dict(state)
        for number in range(5, 9):
            step(model, optimizer, number)
        wanted = wanted or flat(model)
    assert flat(model) == wanted


def test_an_interval_that_was_lowered_since_goes_on():
    model = paired_model()
    optimizer = LpSGD(model.parameters(), lr=0.02)
    attached = attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=5))
    for number in range(3):
        step(model, optimizer, number)
    state = attached.state_dict()
    assert state["groups"]["steps"] == 3
    attached = attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=2))
    attached.load_state_dict(state)
    twin = copy.deepcopy(model)
    step(model, optimizer, 3)
    step(twin, LpSGD(twin.parameters(), lr=0.02), 3)
    assert flat(model) != flat(twin)


@pytest.mark.parametrize("interval, left_out, owed", [(1, 2, 1), (3, 1, 2), (3, 2, 5)])
def test_what_a_left_out_step_should_have_decayed_the_next_one_does(interval, left_out, owed):
    """AMP's GradScaler tells a fused optimizer on the device, so that the host never knows. owed: learning rates in
    the decay that comes after it.
    """
    model = paired_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, fused=True)
    add_lp_decay(optimizer)
    attached = attach(model, optimizer, groups=GroupDecay(pairs_of(model), **FORM, interval=interval))
    last = next(number for number in range(left_out + 1, 9) if number % interval == interval - 1)
    for number in range(last + 1):
        optimizer.found_inf = torch.tensor(float(number == left_out))
        twin, before = copy.deepcopy(model), flat(model)
        step(model, optimizer, number)
        if number == left_out:
            assert flat(model) == before
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.02, fused=True), last)
    wanted = flat(twin)
    for group, factor in zip(
        indices(model), reference.group_factors(indices(model), before, lr=owed * 0.02, **FORM), strict=True
    ):
        for i in group:
            wanted[i] *= factor
    assert flat(model) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
    assert attached.state_dict()["groups"]["steps"] == 0


def test_what_does_not_lie_row_by_row_is_refused():
    model = paired_model()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    with pytest.raises(
        UsageError,
        match=(
            r"pairs have weights in 0.weight, which does not lie in memory row by row .* make it so by .contiguous\(\)"
        ),
    ):
        attach(model, LpSGD(model.parameters(), lr=0.1), groups=GroupDecay(pairs_of(model), 0.1))


def test_a_kind_that_is_named_twice_is_refused():
    with pytest.raises(UsageError, match="0.weight pairs is named twice in groups"):
        resolve_groups(paired_model(), pairs_of(paired_model()) * 2)


@pytest.mark.parametrize("p, gamma", [(0.5, 1.0), (0.5, 3.0), (1.0, 2.0)])
def test_a_lambda_of_zero_prunes_nothing(p, gamma):
    """What is taken for zero is so by the weights, not by weights times something small."""
    model = paired_model(torch.float32)
    optimizer = LpAdamW(model.parameters(), lr=1e-5)
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 1e-30, p=p, precondition=gamma))
    for number in range(3):
        for param in model.parameters():
            param.grad = 1e-8 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    assert all(param.all() for param in model.parameters())


def test_taking_the_decay_off_takes_that_of_groups_off_too():
    model = paired_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    handle = add_lp_decay(optimizer, p=0.5)
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3))
    handle.remove()
    twin = copy.deepcopy(model)
    step(model, optimizer, 0)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.02), 0)
    assert flat(model) == flat(twin)
