"""A target of weight groups in one process: exactly as many are pruned as were requested, whatever they are counted
in; it goes on where it was; zeros come after.
"""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from torch import nn

from helpers.groups import flat, paired_model, pairs_of, saved, step
from helpers.targets import TargetRun, model_of, same
from lp_dist import LpAdamW, LpLion, SparsityTarget, attach, measure_sparsity
from lp_dist.attachment import attach as attach_module
from lp_dist.errors import UsageError
from lp_dist.structured.budget import required_costs
from lp_dist.structured.group_decay import GroupDecayHook
from lp_dist.structured.groups import Member, WeightGroups
from lp_dist.structured.resolve import groups_of
from lp_dist.targets.group_controller import group_budget

TOTAL, PARAMETERS = 60, sum(param.numel() for param in model_of().parameters())


def sets_of(model: nn.Module) -> list:
    """160 channels between the first two layers, and 64 between the last two; the second layer has both."""
    return groups_of(model, outputs="0", inputs="2", kind="wide") + groups_of(
        model, outputs="2", inputs="4", kind="narrow"
    )


def target_of(sparsity: float | None = 0.3, **values: Any) -> SparsityTarget:
    return SparsityTarget(sparsity, **{"groups": sets_of(model_of()), **values})


def dead(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both kinds which channels are all zeros; a channel that is zero in part is an error."""
    first, second, last = model[0], model[2].weight, model[4].weight
    zeros = [
        torch.stack([(first.weight == 0).all(1), first.bias == 0, (second == 0).all(0)]),
        torch.stack([(second == 0).all(1), (last == 0).all(0)]),
    ]
    assert all(of_channels.all(0).equal(of_channels.any(0)) for of_channels in zeros)
    return zeros[0][0], zeros[1][0]


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({}, (48, 19)),
        ({"scope": "global"}, (48, 19)),
        ({"sparsity": 0.5, "cap": None, "p": 0.0}, (80, 32)),
        ({"precondition": 0.0, "regrowth": 0.0}, (48, 19)),
        ({"interval": 3, "update_every": 6}, (48, 19)),
        ({"curve": "linear", "start": 0, "end": 40}, (48, 19)),
    ],
)
def test_exactly_as_many_groups_are_pruned_as_were_requested(values, wanted):
    run = TargetRun(target_of(**values), total=TOTAL).to(TOTAL)
    assert tuple(int(which.sum()) for which in dead(run.model)) == wanted
    final_pruning = run.attached.group_controller.final_pruning
    assert final_pruning["after"] == sum(wanted) / 224
    assert final_pruning["before"] > 0.7 * final_pruning["after"] or "interval" in values, (
        "most of them are to become zero by decay"
    )
    assert run.attached.logs["lp/groups_measured"] == pytest.approx(sum(wanted) / 224)


def test_before_the_window_nothing_decays_and_after_it_nothing_changes_but_survivors():
    run = TargetRun(target_of(), total=TOTAL).to(6)
    twin = TargetRun(None, total=TOTAL).to(6)
    assert same(run.weights(), twin.weights())
    run.to(41)
    before, gone = run.weights(), dead(run.model)
    run.to(TOTAL)
    assert all(now.equal(then) for now, then in zip(dead(run.model), gone))
    assert all(not same({name: run.weights()[name]}, {name: before[name]}) for name in before)
    assert run.attached.group_decay.active is False


def apart() -> list:
    """The channels of the first layer, and the outputs of the last: no weight is in two of them."""
    return groups_of(model_of(), outputs="0", inputs="2", kind="wide") + groups_of(
        model_of(), outputs="4", kind="last"
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "arguments", [{"sparsity": 0.25, "relative_to": "all"}, {"sparsity": None, "budget": PARAMETERS - 2_700}]
)
def test_parameters_may_be_counted_and_not_channels(scope, arguments):
    """No more are left than that, and with one channel more (of each layer, where layers are alike) there would be too
    many.
    """
    run = TargetRun(target_of(**{**arguments, "scope": scope, "groups": apart()}), total=TOTAL).to(TOTAL)
    first, last = run.model[0], run.model[4]
    numbers = int((first.weight == 0).all(1).sum()), int((last.weight == 0).all(1).sum())
    zeros = sum(int((param == 0).sum()) for param in run.model.parameters())
    wanted = PARAMETERS - arguments["budget"] if "budget" in arguments else 0.25 * PARAMETERS
    assert zeros == numbers[0] * 129 + numbers[1] * 65 >= wanted
    if scope == "global":
        assert zeros - 129 < wanted
    else:
        assert all((number - 1) / all_ < wanted / (160 * 129 + 8 * 65) for number, all_ in zip(numbers, (160, 8)))


def test_the_weakest_are_pruned_first():
    """With nearly no gradients those are pruned whose mean square is smallest, of both kinds by one threshold; a small
    group is not weak for being small.
    """
    model = model_of()
    with torch.no_grad():
        for channel in (3, 70, 159):
            for values in (model[0].weight[channel], model[0].bias[channel], model[2].weight[:, channel]):
                values.fill_(0.01)
        for values in (model[4].weight[5], model[4].bias[5]):
            values.fill_(0.0122)
    for more, last in ((0, []), (65, [5])):
        target = target_of(
            None, groups=apart(), budget=PARAMETERS - 3 * 129 - more + 5, scope="global", precondition=0.0
        )
        for steps in (TOTAL, 1):  # by decay, and by the final pruning alone
            run = TargetRun(target, model=copy.deepcopy(model), lr=1e-5, total=TOTAL).to(steps)
            run.attached.finish()
            assert (run.model[0].weight == 0).all(1).nonzero()[:, 0].tolist() == [3, 70, 159]
            assert (run.model[4].weight == 0).all(1).nonzero()[:, 0].tolist() == last


def test_the_group_at_the_threshold_decays_however_its_squares_were_added_up(monkeypatch):
    """On other shards the sums differ in their last bits, of the norms and of what the threshold was made from."""
    run = TargetRun(target_of(regrowth=0.0), total=TOTAL).to(20)
    hook = run.attached.group_decay
    numbers = []
    for bits in (-1e-15, 0.0, 1e-15):
        hook.forget()
        run.attached.group_controller.update(20)
        squares = hook.squares * (1.0 + bits)
        hook.cached_factors, hook.rates = {}, {0: 1e-3}
        with monkeypatch.context() as patch:
            patch.setattr(GroupDecayHook, "squares", squares)
            numbers.append(int((hook.factor(hook.matrices[0].shard, None) < 1.0).sum()))
    assert numbers[0] == numbers[1] == numbers[2] > 0


@pytest.mark.parametrize("values", [{}, {"interval": 4, "update_every": 8}, {"groups": apart()}])
@pytest.mark.parametrize("taken", [3, 17, 41, 50])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(values, taken):
    """In the last case gradients of what is dead are not zero, so it must be held."""

    def made() -> TargetRun:
        return TargetRun(target_of(**values), total=TOTAL)

    run, file = made().to(taken), io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict()], file)
    state = json.loads(json.dumps(run.attached.state_dict(), allow_nan=False))
    again = made()
    file.seek(0)
    for stateful, loaded in zip((again.model, again.optimizer, again.scheduler), torch.load(file, weights_only=True)):
        stateful.load_state_dict(loaded)
    again.attached.load_state_dict(state)
    again.taken = taken
    run.to(TOTAL)
    again.to(TOTAL)
    assert same(run.weights(), again.weights()) and run.attached.state_dict() == again.attached.state_dict()
    assert (again.model[0].weight == 0).all(1).any()


def test_a_run_that_goes_back_to_an_older_checkpoint_takes_norms_anew():
    run = TargetRun(target_of(), total=TOTAL).to(17)
    saved = [
        copy.deepcopy(stateful.state_dict()) for stateful in (run.model, run.optimizer, run.scheduler, run.attached)
    ]
    wanted = run.to(23).weights()
    for stateful, state in zip((run.model, run.optimizer, run.scheduler, run.attached), saved):
        stateful.load_state_dict(copy.deepcopy(state))
    run.taken = 17
    assert same(run.to(23).weights(), wanted)


def test_the_state_of_another_target_is_refused():
    state = TargetRun(target_of(), total=TOTAL).to(10).attached.state_dict()
    for other, words in (
        (target_of(0.4), "another target of groups"),
        (target_of(groups=sets_of(model_of())[:1]), "another target of groups"),
        (SparsityTarget(0.4), "there is no target of groups|trained without this target"),
        (None, "there is no target of groups"),
    ):
        with pytest.raises(UsageError, match=words):
            TargetRun(other, total=TOTAL).attached.load_state_dict(copy.deepcopy(state))
    with pytest.raises(UsageError, match="trained without this target"):
        TargetRun([target_of(end=0.4), SparsityTarget(0.6, start=0.4)], total=TOTAL).attached.load_state_dict(state)
    with pytest.raises(UsageError, match="of version 0, and this lp_dist reads 5"):
        TargetRun(target_of(), total=TOTAL).attached.load_state_dict({"groups": {**state["groups"], "version": 0}})


def test_channels_are_pruned_first_and_zeros_come_among_what_is_left():
    run = TargetRun([target_of(end=0.4), SparsityTarget(0.7, start=0.4, end=0.8)], total=TOTAL).to(24)
    gone = dead(run.model)
    assert [int(which.sum()) for which in gone] == [48, 19]
    run.to(TOTAL)
    assert measure_sparsity(run.model).total == pytest.approx(0.7, abs=1e-4)
    first, second = run.model[0], run.model[2].weight
    assert all((first.weight[which] == 0).all() and (second[:, which] == 0).all() for which in gone[:1])
    assert not first.bias[~gone[0]].eq(0).any(), "biases of channels that are kept are no weights"
    assert {"lp/measured", "lp/groups_measured"} <= run.attached.logs.keys()
    with pytest.raises(
        UsageError, match="begins at step 6, and that of the groups ends at 24: groups are pruned first"
    ):
        TargetRun([target_of(end=0.4), SparsityTarget(0.7)], total=TOTAL)


def test_a_run_that_ends_early_is_pruned():
    run = TargetRun(target_of(), total=TOTAL).to(20)
    run.attached.finish()
    assert [int(which.sum()) for which in dead(run.model)] == [48, 19]


def test_other_bases_need_no_second_moments():
    run = TargetRun(target_of(), make=LpLion, lr=3e-4, total=TOTAL).to(TOTAL)
    assert run.attached.group_controller.hook.precondition == 0.0 and [
        int(which.sum()) for which in dead(run.model)
    ] == [
        48,
        19,
    ]
    with pytest.raises(UsageError, match="needs Adam's second moments"):
        TargetRun(target_of(precondition=1.0), make=LpLion, lr=3e-4, total=TOTAL)


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(sparsity=None), "groups need one of them"),
        (dict(budget=10), "groups need one of them"),
        (dict(latent_windows=1.0), "latent_windows=1.0 is of single weights"),
        (dict(interval=0), "interval=0 must be a whole number"),
        (dict(interval=2.5), "interval=2.5 must be a whole number"),
        (dict(sparsity=None, budget=0), "budget=0 must be a whole number from 1"),
        (dict(sparsity=None, budget="100M"), "budget='100M' must be a whole number"),
        (dict(groups=[]), r"groups=\[\] names none"),
        (dict(groups=None, budget=10, sparsity=None), "budget=10 is of groups, and none are named"),
        (dict(groups=None, interval=2), "interval=2 is of groups, and none are named"),
        (dict(sparsity=1.0), "sparsity=1.0 must be between 0 and 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        target_of(**values)


@pytest.mark.parametrize(
    "values, says",
    [
        (
            dict(sparsity=None, budget=PARAMETERS, groups=apart()),
            "budget=21,160 is no fewer parameters than the model has, which is 21,160",
        ),
        (
            dict(sparsity=0.995, relative_to="all", groups=apart()),
            "20,966|21,160 parameters are in these groups, of which 194 must stay; ask for less than 0.991 of all",
        ),
        (
            dict(sparsity=0.99, relative_to="all", groups=apart()[:1]),
            (
                r"sparsity=0.99 of all .* 20,640 parameters are in these groups, of which 129 must stay; .* less than"
                r" 0.969"
            ),
        ),
        (
            dict(sparsity=None, budget=100, groups=apart()[:1]),
            "budget=100 can't be reached: .* ask for a budget of 649 at least",
        ),
        (dict(sparsity=0.1, relative_to="all"), "2.weight are in two groups each"),
        (
            dict(sparsity=0.003),
            (r"sparsity=0.003 of the 160 0.weight wide is none of them; ask for more, or .* \(scope='global'\)"),
        ),
        (dict(sparsity=0.997), "sparsity=0.997 of the 160 0.weight wide is all of them; ask for less"),
        (dict(sparsity=0.997, scope="global"), "sparsity=0.997 of the 160 wide is all of them; ask for less$"),
        (dict(end=0.15), "has 3 steps, and the collapse of a weight takes 8"),
        (
            dict(interval=19),
            (
                "interval=19: the window of the groups, from step 6 to 42, holds no two decays, .* an interval of at"
                " most 18"
            ),
        ),
        (dict(p=1.5), "p=1.5 reaches no sparsity by itself"),
    ],
)
def test_what_cannot_be_reached_is_told_before_the_run(values, says):
    with pytest.raises(ValueError, match=says):
        TargetRun(target_of(**values), total=TOTAL)


def test_targets_of_one_kind_and_too_few_steps_are_refused():
    with pytest.raises(UsageError, match="2 targets are given, and two of them are for groups"):
        TargetRun([target_of(), target_of()], total=TOTAL)
    with pytest.raises(UsageError, match="two of them are for single weights"):
        TargetRun([SparsityTarget(0.5), SparsityTarget(0.6)], total=TOTAL)
    model = model_of()
    with pytest.raises(UsageError, match="total_steps=None: a target needs the number of optimizer steps"):
        attach(model, LpAdamW(model.parameters()), target=target_of())
    half = model_of()
    with torch.no_grad():
        for values in (half[0].weight[:80], half[0].bias[:80], half[2].weight[:, :80]):
            values.zero_()
    with pytest.raises(
        UsageError, match="80 of the 160 0.weight wide are zero already, and the target asks for 48; ask for more"
    ):
        TargetRun(target_of(), model=half, total=TOTAL)


@pytest.mark.parametrize(
    "model, targets",
    [
        ("half dead", lambda: target_of()),  # known when the run begins
        ("dense", lambda: [target_of(), SparsityTarget(0.9, start=0.1)]),  # of both targets together
        ("dense", lambda: target_of(interval=19)),
    ],
)
def test_a_refused_target_leaves_nothing_on_the_optimizer(model, targets):
    run = TargetRun(None, model=model_of(), attached=False)
    if model == "half dead":
        with torch.no_grad():
            for values in (run.model[0].weight[:80], run.model[0].bias[:80], run.model[2].weight[:, :80]):
                values.zero_()
    before = _hooks(run.optimizer)
    run.target = targets()
    with pytest.raises(UsageError):
        run.attach()
    assert _hooks(run.optimizer) == before
    assert run.optimizer.parameter_map.values("2.weight") == {}


def _hooks(optimizer) -> list[int]:
    return [len(hooks) for key, hooks in vars(optimizer).items() if "hooks" in key]


class Two:
    """Channels without biases first, then single zeros."""

    def __init__(self, outputs: str = "0", inputs: str | tuple = "2", share: float = 0.8, **values) -> None:
        torch.manual_seed(0)
        self.model, self.taken = (
            nn.Sequential(nn.Linear(16, 40, bias=False), nn.Tanh(), nn.Linear(40, 4, bias=False)),
            0,
        )
        self.optimizer = LpAdamW(self.model.parameters(), lr=5e-3)
        self.targets = [
            SparsityTarget(0.25, groups=groups_of(self.model, outputs=outputs, inputs=inputs), end=0.3),
            SparsityTarget(share, start=0.3, end=0.9, **values),
        ]
        self.attached = attach(self.model, self.optimizer, target=self.targets, total_steps=100)

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
    """At 70 all weights of some channels are latent, and these must not be taken for dead; at 95 the groups of the
    optimizer are frozen, and say no p.
    """
    run = Two(p=p).to(taken)
    states = saved(run.model, run.optimizer, run.attached)
    again = Two(p=p)
    again.model.load_state_dict(states[0])
    again.optimizer.load_state_dict(states[1])
    if attached_last:  # as Trainer has it
        again.attached = attach(again.model, again.optimizer, target=again.targets, total_steps=100)
    again.attached.load_state_dict(states[2])
    again.taken = taken
    run.to(100)
    again.to(100)
    assert flat(run.model) == flat(again.model) and run.attached.state_dict() == again.attached.state_dict()
    assert int(run.attached.group_controller.dead.sum()) == 10


@pytest.mark.parametrize("steps", [96, 100])
def test_rows_that_have_gradients_stay_dead_when_latent_weights_come_back(steps):
    """Nothing that reads them is in the group, so at zero they learn on, where the other target's latent weights
    are.
    """
    run = Two(inputs=(), share=0.3).to(60)
    gone = (run.model[0].weight == 0).all(1)
    assert int(gone.sum()) >= 10
    dead = run.attached.group_controller.dead
    run.to(steps)
    run.attached.finish()
    assert not run.model[0].weight[dead].any()
    assert sum(int((param == 0).sum()) for param in run.model.parameters()) == round(0.3 * 800)


def test_what_groups_leave_is_known_before_they_are_pruned():
    with pytest.raises(
        UsageError,
        match="when the groups are pruned 25.0% of all that decays is zero, and the target of single weights is 20.0%",
    ):
        Two(share=0.2)
    with pytest.raises(
        UsageError, match=r"when the groups are pruned 25.0% of 0.weight is zero, .* or use scope='global' for it"
    ):
        Two(share=0.25, scope="layer")
    Two(share=0.26, scope="layer")
    with pytest.raises(UsageError, match="pattern='2:4' and groups are given: .* Cut the groups out first"):
        Two(share=None, pattern="2:4")


def test_ranks_compare_what_does_not_differ_between_processes(monkeypatch):
    compared = []
    monkeypatch.setattr(attach_module, "assert_same_on_all_ranks", compared.append)
    TargetRun(target_of(curve=lambda u: u), total=TOTAL)
    assert compared and "0x" not in str(compared) and "0.weight wide" in str(compared)


def weight_groups(kind: str, count: int, elements: int, layers: int) -> list[WeightGroups]:
    return [WeightGroups(f"{i}", kind, count, elements, (Member(f"{i}.{kind}", 0, 0, count),)) for i in range(layers)]


@pytest.mark.parametrize("wanted", [0.02, 0.05, 0.2, 0.5, 0.8, 0.97])
def test_a_budget_is_met_by_the_finest_groups(wanted):
    """As SmolLM2: the same share of each kind, as near as three large groups allow, and in all no more than a channel
    of each layer too much.
    """
    sets = weight_groups("kv_groups", 3, 368_640, 30) + weight_groups("channels", 1536, 1728, 30)
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


def test_a_kind_that_a_budget_leaves_intact_stays_intact():
    """A tenth of two large groups is none of them."""
    model = paired_model(torch.float32)
    large, small = groups_of(model, outputs="0", width=3, kind="large"), groups_of(model, outputs="2", kind="small")
    optimizer = LpAdamW(model.parameters(), lr=0.02)
    attached = attach(
        model, optimizer, target=SparsityTarget(None, budget=446 - 30, groups=large + small), total_steps=20
    )
    assert attached.group_controller.required == {"0.weight large": 0.0, "2.weight small": 35.0}
    for number in range(20):
        step(model, optimizer, number)
        attached.after_step()
    assert attached.group_controller.kinds() == {"large": [0, 2], "small": [5, 8]}


def test_where_several_layers_have_one_threshold_some_of_a_kind_must_stay():
    model = paired_model()
    with pytest.raises(UsageError, match="sparsity=0.9 of the 3 pairs is all of them; ask for less"):
        attach(
            model,
            LpAdamW(model.parameters(), lr=0.1),
            target=SparsityTarget(0.9, groups=pairs_of(model), scope="global"),
            total_steps=50,
        )


def test_finish_counts_the_groups_that_are_zero_then(caplog):
    run = TargetRun(target_of(), total=TOTAL).to(TOTAL)
    run.attached.finish()
    assert run.attached.logs["lp/groups_measured"] == pytest.approx((48 + 19) / 224) and not caplog.text
    with torch.no_grad():
        run.model[0].weight.fill_(0.5)
    run.attached.finish()
    assert run.attached.logs["lp/groups_measured"] == pytest.approx(19 / 224)
    assert "% of the groups are zero now" in caplog.text and "other weights were loaded since" in caplog.text
