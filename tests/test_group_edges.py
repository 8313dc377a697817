"""Targets and decay of groups where they meet something else: checkpoints between two calls, what hides weights, other
layouts, a second target.
"""

from __future__ import annotations

import copy
import json

import pytest
import reference
import torch
from target_cases import Run
from test_group_target import TOTAL, target_of
from test_grouped import FORM, flat, indices, model_of, step
from test_grouped import sets_of as pairs_of
from torch import nn

from lp_dist import GroupDecay, LpAdamW, LpSGD, SparsityTarget, add_lp_decay, attach
from lp_dist.attachment import attach as attach_module
from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed import in_checkpoints
from lp_dist.structured.budget import required_costs
from lp_dist.structured.groups import Groups, Member
from lp_dist.structured.naming import groups_of, structure
from lp_dist.targets.group_controller import group_budget


def saved(*what) -> list:
    return [*copy.deepcopy([one.state_dict() for one in what[:-1]]), json.loads(json.dumps(what[-1].state_dict()))]


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("taken", [3, 4, 6])
def test_a_decay_without_after_step_goes_on_from_where_it_was_saved(interval, taken):
    """`after_step` is needed with a target alone, and an engine may save a state before it is called."""

    def made():
        model = model_of()
        optimizer = LpAdamW(model.parameters(), lr=0.02)
        return model, optimizer, attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=interval))

    runs = [made(), made()]
    for number in range(taken):
        step(*runs[0][:2], number)
    for one, state in zip(runs[1], saved(*runs[0])):
        one.load_state_dict(state)
    for number in range(taken, 9):
        for run in runs:
            step(*run[:2], number)
    assert flat(runs[0][0]) == flat(runs[1][0])


def test_going_back_to_between_two_decays_forgets_what_came_after():
    model, states, wanted = model_of(), None, None
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    attached = attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3, interval=3))
    for stop in (5, 6):  # in the second turn from right after a decay
        for number in range(stop):
            step(model, optimizer, number)
            if number == 4 and states is None:
                states = saved(model, optimizer, attached)
        for one, state in zip((model, optimizer, attached), copy.deepcopy(states)):
            one.load_state_dict(state)
        for number in range(5, 9):
            step(model, optimizer, number)
        wanted = wanted or flat(model)
    assert flat(model) == wanted


def test_an_interval_that_was_lowered_since_goes_on():
    model = model_of()
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
    model = model_of(torch.float32)
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
    model = model_of()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    with pytest.raises(
        UsageError,
        match=(
            r"pairs have weights in 0.weight, which does not lie in memory row by row .* make it so by .contiguous\(\)"
        ),
    ):
        attach(model, LpSGD(model.parameters(), lr=0.1), groups=GroupDecay(pairs_of(model), 0.1))


class Two:
    """Channels without biases first, then single zeros."""

    def __init__(self, outputs: str = "0", inputs: str | tuple = "2", share: float = 0.8, **values) -> None:
        torch.manual_seed(0)
        self.model, self.taken = (
            nn.Sequential(nn.Linear(16, 40, bias=False), nn.Tanh(), nn.Linear(40, 4, bias=False)),
            0,
        )
        self.optimizer = LpAdamW(self.model.parameters(), lr=5e-3)
        self.asked = [
            SparsityTarget(0.25, groups=groups_of(self.model, outputs=outputs, inputs=inputs), end=0.3),
            SparsityTarget(share, start=0.3, end=0.9, **values),
        ]
        self.attached = attach(self.model, self.optimizer, target=self.asked, total_steps=100)

    def to(self, steps: int) -> Two:
        while self.taken < steps:
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(self.taken))
            self.model.zero_grad()
            (self.model(x) - x[:, :4].sin()).square().mean().backward()
            self.optimizer.step()
            self.attached.after_step()
            self.taken += 1
        return self


@pytest.mark.parametrize("attached_last", [False, True])
@pytest.mark.parametrize("p, taken", [(0.0, 25), (0.0, 95), (None, 70), (None, 95)])
def test_two_targets_go_on_where_they_were(p, taken, attached_last):
    """At 70 channels that live are hidden as wholes, and must not be taken for dead; at 95 the groups of the optimizer
    are frozen, and say no p.
    """
    run = Two(p=p).to(taken)
    states = saved(run.model, run.optimizer, run.attached)
    again = Two(p=p)
    again.model.load_state_dict(states[0])
    again.optimizer.load_state_dict(states[1])
    if attached_last:  # as Trainer has it
        again.attached = attach(again.model, again.optimizer, target=again.asked, total_steps=100)
    again.attached.load_state_dict(states[2])
    again.taken = taken
    run.to(100)
    again.to(100)
    assert flat(run.model) == flat(again.model) and run.attached.state_dict() == again.attached.state_dict()
    assert int(run.attached.groups.dead.sum()) == 10


@pytest.mark.parametrize("steps", [96, 100])
def test_rows_that_have_gradients_stay_dead_when_hidden_weights_come_back(steps):
    """Nothing that reads them is in the group, so at zero they learn on, where the other target's hidden weights
    are.
    """
    run = Two(inputs=(), share=0.3).to(60)
    gone = (run.model[0].weight == 0).all(1)
    assert int(gone.sum()) >= 10
    dead = run.attached.groups.dead
    run.to(steps)
    run.attached.finish()
    assert not run.model[0].weight[dead].any()
    assert sum(int((param == 0).sum()) for param in run.model.parameters()) == round(0.3 * 800)


def test_what_groups_leave_is_known_before_they_die():
    with pytest.raises(
        UsageError,
        match="when the groups have died 25.0% of all that decays is zero, and the target of single weights is 20.0%",
    ):
        Two(share=0.2)
    with pytest.raises(
        UsageError, match=r"when the groups have died 25.0% of 0.weight is zero, .* or use scope='global' for it"
    ):
        Two(share=0.25, scope="layer")
    Two(share=0.26, scope="layer")
    with pytest.raises(UsageError, match="pattern='2:4' and groups are given: .* Cut the groups out first"):
        Two(share=None, pattern="2:4")


def test_a_kind_that_is_named_twice_is_refused():
    with pytest.raises(UsageError, match="0.weight pairs is named twice in groups"):
        structure(model_of(), pairs_of(model_of()) * 2)


@pytest.mark.parametrize("p, gamma", [(0.5, 1.0), (0.5, 3.0), (1.0, 2.0)])
def test_a_lambda_of_nothing_kills_nothing(p, gamma):
    """What is taken for zero is so by the weights, not by weights times something small."""
    model = model_of(torch.float32)
    optimizer = LpAdamW(model.parameters(), lr=1e-5)
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 1e-30, p=p, precondition=gamma))
    for number in range(3):
        for param in model.parameters():
            param.grad = 1e-8 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    assert all(param.all() for param in model.parameters())


def test_weights_that_are_loaded_alone_begin_anew():
    """DeepSpeed gives the client state whatever is loaded."""

    class Engine:
        def load_checkpoint(
            self,
            load_dir,
            tag=None,
            load_module_strict=True,
            load_optimizer_states=True,
            load_lr_scheduler_states=True,
            load_module_only=False,
        ):
            return load_dir, {"lp_dist": "state"}

        def save_checkpoint(self, save_dir, tag=None, client_state=None):
            return True

    engine, seen = Engine(), []
    Engine.__module__ = "deepspeed.runtime.engine"
    Engine.__name__ = "DeepSpeedEngine"
    in_checkpoints(engine, dict, seen.append)
    engine.load_checkpoint("x")
    engine.load_checkpoint("x", load_module_only=True)
    engine.load_checkpoint("x", None, True, False)
    assert seen == ["state", None, None]


def test_ranks_compare_what_does_not_differ_between_processes(monkeypatch):
    told = []
    monkeypatch.setattr(attach_module, "assert_same_on_all_ranks", told.append)
    Run(target_of(curve=lambda u: u), total=TOTAL)
    assert told and "0x" not in str(told) and "0.weight wide" in str(told)


def test_taking_the_decay_off_takes_that_of_groups_off_too():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    add_lp_decay(optimizer, p=0.5)
    attach(model, optimizer, groups=GroupDecay(pairs_of(model), 0.3))
    optimizer.lp_decay.remove()
    twin = copy.deepcopy(model)
    step(model, optimizer, 0)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.02), 0)
    assert flat(model) == flat(twin)


def parts(kind: str, count: int, elements: int, layers: int) -> list[Groups]:
    return [Groups(f"{i}", kind, count, elements, (Member(f"{i}.{kind}", 0, 0, count),)) for i in range(layers)]


@pytest.mark.parametrize("wanted", [0.02, 0.05, 0.2, 0.5, 0.8, 0.97])
def test_a_budget_is_met_by_the_finest_groups(wanted):
    """As SmolLM2: the same share of each kind, as near as three large groups allow, and in all no more than a channel
    of each layer too much.
    """
    sets = parts("kv_groups", 3, 368_640, 30) + parts("channels", 1536, 1728, 30)
    there, everything = 30 * (3 * 368_640 + 1536 * 1728), 134_515_008
    target = SparsityTarget(None, budget=everything - round(wanted * there), groups=["kv_groups", "channels"])
    if wanted > 0.9:
        with pytest.raises(UsageError, match="must stay; ask for a budget of [0-9,]+ at least"):
            required_costs(group_budget(target), sets, everything)
        return
    needs = required_costs(group_budget(target), sets, everything)
    assert round(wanted * there) <= sum(needs.values()) <= round(wanted * there) + 30 * 1728
    assert {needs["0 kv_groups"]} == {round(3 * wanted) * 368_640.0} and len(set(needs.values())) <= 2
    assert len({needs[f"{i} channels"] for i in range(30)}) == 1


def test_a_kind_that_a_budget_leaves_whole_stays_whole():
    """A tenth of two large groups is none of them."""
    model = model_of(torch.float32)
    large, small = groups_of(model, outputs="0", width=3, kind="large"), groups_of(model, outputs="2", kind="small")
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    attached = attach(
        model, optimizer, target=SparsityTarget(None, budget=446 - 30, groups=large + small), total_steps=20
    )
    assert attached.groups.needs == {"0.weight large": 0.0, "2.weight small": 35.0}
    for number in range(20):
        step(model, optimizer, number)
        attached.after_step()
    assert attached.groups.kinds() == {"large": [0, 2], "small": [5, 8]}


def test_where_several_layers_have_one_threshold_some_of_a_kind_must_stay():
    model = model_of()
    with pytest.raises(UsageError, match="sparsity=0.9 of the 3 pairs is all of them; ask for less"):
        attach(
            model,
            LpAdamW(model.parameters(), lr=0.1),
            target=SparsityTarget(0.9, groups=pairs_of(model), scope="global"),
            total_steps=50,
        )
