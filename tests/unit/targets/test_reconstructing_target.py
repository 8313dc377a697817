"""A target that moves survivors when weights are removed: one process, all kinds of targets."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import Tensor, nn

import helpers.targets
import lp_dist
from helpers.targets import END, FINAL_PRUNING, START, TOTAL, TargetRun, decaying, model_of, same
from lp_dist import LpAdamW, SparsityTarget, groups_of
from lp_dist.reconstruction import budget
from lp_dist.reconstruction.inputs import InputSample
from lp_dist.reconstruction.solver import damping_for, move_survivors

LAYERS = ("0.weight", "2.weight", "4.weight")


def batch_of(step: int) -> Tensor:
    """More rows than inputs, and these go together."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(256, 64, generator=generator)
    return x + x.roll(1, 1) + 0.5 * x.roll(2, 1)


def backward(model: nn.Module, step: int) -> None:
    x = batch_of(step)
    model.zero_grad()
    (model(x) - x[:, :8].sin()).square().mean().backward()


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    monkeypatch.setattr(helpers.targets, "backward", backward)


def sets_of(model: nn.Module) -> list:
    return groups_of(model, outputs="0", inputs="2", kind="first")


def target_of(kind: str) -> SparsityTarget:
    if kind == "groups":
        return SparsityTarget(0.5, groups=sets_of(model_of()), reconstruct=True, update_every=2)
    if kind == "2:4":
        return SparsityTarget(pattern="2:4", reconstruct=True, update_every=2)
    return SparsityTarget(0.8, reconstruct=True, update_every=2)


def run_of(kind: str, **more) -> TargetRun:
    return TargetRun(target_of(kind), lr=1e-3, **more)


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What goes into each linear layer."""
    inputs = {}
    with torch.no_grad():
        for number, layer in enumerate(model):
            inputs[f"{number}.weight"], x = x, layer(x)
    return inputs


KINDS = ["weights", "2:4", "groups"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_met_and_zeros_stay(kind):
    run = run_of(kind).to(END)
    dead = {name: weight == 0 for name, weight in run.weights().items() if name in LAYERS}
    run.to(TOTAL)
    run.attached.finish()
    weights = run.weights()
    assert all(torch.equal(weights[name] == 0, dead[name]) for name in LAYERS)
    zeros, elements = sum(int(d.sum()) for d in dead.values()), sum(d.numel() for d in dead.values())
    if kind == "groups":
        assert int(dead["2.weight"].all(0).sum()) == int(dead["0.weight"].all(1).sum()) == 80
        assert run.attached.logs["lp/groups_measured"] == 0.5
    elif kind == "2:4":
        assert all(int(dead[name].view(-1, 4).sum(1).min()) >= 2 for name in LAYERS)
    else:
        assert zeros == round(0.8 * elements) and run.attached.logs["lp/measured"] == zeros / elements


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_removed_at_an_update_is_taken_over_by_the_survivors_of_its_layer(kind):
    """Against the solver, fed with what the layers were given since the update before; and the mask against the run
    that was followed up to there.
    """
    update = START + 5 * 2  # every second step from START on
    run = run_of(kind).to(update - 2)
    controller = run.attached.controllers[0]
    parts = []
    for step in (update - 2, update - 1):
        assert controller.reconstruction.sample.is_open
        parts.append(inputs_of(run.model, batch_of(step)))
        run.step()
        if step == update - 1:
            before = run.weights()
        run.attached.after_step()
    after = run.weights()
    layers = ("2.weight",) if kind == "groups" else LAYERS
    for name in layers:
        removed = (before[name] != 0) & (after[name] == 0)
        assert removed.any(), name
        x = torch.cat([part[name] for part in parts])
        wanted = move_survivors(
            before[name],
            before[name].masked_fill(after[name] == 0, 0.0),
            x.T @ x,
            damping=damping_for(*x.shape),
        )
        torch.testing.assert_close(after[name], wanted, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        stay = x @ before[name].masked_fill(after[name] == 0, 0.0).T
        dense, moved = x @ before[name].T, x @ after[name].T
        assert (dense - moved).square().sum() < 0.9 * (dense - stay).square().sum(), name
    assert controller.reconstruction.moved == 5  # the first update has nothing to remove
    if kind == "groups":  # what feeds a dead group goes with it
        dead = (after["2.weight"] == 0).all(0)
        assert dead.any() and not after["0.weight"][dead].any() and not after["0.bias"][dead].any()


def test_between_updates_zeros_stay_and_survivors_train_freely():
    run = run_of("weights").to(START + 9)
    plain = model_of()
    plain.load_state_dict(run.model.state_dict())
    optimizer = LpAdamW(plain.parameters(), lr=run.scheduler.get_last_lr()[0], weight_decay=0.0)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(run.optimizer.state_dict()["state"])})
    zeros = {name: run.weights()[name] == 0 for name in LAYERS}
    backward(plain, run.taken)
    optimizer.step()
    run.step()
    for name in LAYERS:
        assert zeros[name].any() and torch.equal(run.weights()[name] == 0, zeros[name])
        free = plain.get_parameter(name)[~zeros[name]]
        assert torch.equal(run.weights()[name][~zeros[name]], free), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [START + 1, START + 9, FINAL_PRUNING - 1, FINAL_PRUNING])
def test_a_run_goes_on_bit_for_bit(kind, stop):
    """As the run that was saved there, and went on: from a save on inputs are taken anew."""
    complete = run_of(kind).to(stop)
    complete.attached.state_dict()
    complete.to(TOTAL)
    first = run_of(kind).to(stop)
    state = json.loads(json.dumps(first.attached.state_dict()))
    second = run_of(kind)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.attached.load_state_dict(state)
    sample = second.attached.controllers[0].reconstruction.sample
    assert sample.steps == 0 and sample.rows("2.weight") == 0
    second.taken = stop
    second.to(TOTAL)
    assert same(second.weights(), complete.weights())
    assert second.attached.state_dict() == complete.attached.state_dict()
    assert complete.attached.controllers[0].reconstruction.moved > 10


def test_micro_batches_are_all_taken():
    run = run_of("weights").to(START)
    run.model(batch_of(70))
    run.model(batch_of(71))
    assert run.attached.weight_controller.reconstruction.sample.rows("0.weight") == 512


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(("tokens", "steps"), [(100, 1), (256, 1), (257, 2), (700, 3), (5000, 4)])
def test_inputs_are_taken_in_as_many_steps_as_it_takes_to_see_enough(tokens, steps, monkeypatch):
    """Of 256 tokens each, and at most since the update before; and before the first one in all of them."""
    monkeypatch.setattr(budget, "TOKENS", tokens)
    target = SparsityTarget(0.8, reconstruct=True, update_every=4)
    run = TargetRun(target, lr=1e-3)
    open_in = []
    while run.taken < END - 1:
        open_in.append(hooks_of(run.model) > 0)
        run.to(run.taken + 1)
    to_update = [min(u for u in (*range(START, END - 1, 4), END - 1) if u > t) - t for t in range(END - 1)]
    assert open_in == [left <= (4 if t < START else steps) for t, left in enumerate(to_update)]
    assert hooks_of(run.model) == 0 and run.attached.weight_controller.reconstruction.moved == 9


def test_the_products_of_shared_inputs_are_computed_once(monkeypatch):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x))

    computed = []
    products = InputSample.products
    monkeypatch.setattr(
        InputSample, "products", lambda self, name, *more: computed.append(name) or products(self, name, *more)
    )
    TargetRun(SparsityTarget(0.5, reconstruct=True, update_every=2), model=Shared(), lr=1e-3).to(START + 2)
    assert computed == ["a.weight"], "c is the head, which stays dense"


def test_hooks_go_with_the_attachment():
    run = run_of("weights").to(START + 1)
    assert hooks_of(run.model) == 2 + len(LAYERS)
    run.target = None
    run.attach()
    assert hooks_of(run.model) == 0


def test_without_inputs_weights_decay_and_that_is_said_once(caplog):
    """A loop that calls the layers, and never the model itself."""
    caplog.set_level(logging.INFO)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model_of()

        def __call__(self, x: Tensor) -> Tensor:
            return self.layers(x)

    run = TargetRun(SparsityTarget(0.8, reconstruct=True, update_every=2), model=Apart(), lr=1e-3).to(TOTAL)
    plain = TargetRun(decaying(0.8, update_every=2), model=Apart(), lr=1e-3).to(TOTAL)
    assert run.attached.weight_controller.reconstruction is None
    assert same(run.weights(), plain.weights())
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([m for m in messages if "no inputs of 3 layers were seen" in m]) == 1


def test_the_log_says_how_often_they_were_moved(caplog):
    caplog.set_level(logging.INFO)
    run = run_of("weights").to(TOTAL)
    times = run.attached.weight_controller.reconstruction.moved
    assert (
        any(f"survivors were moved {times} times" in record.getMessage() for record in caplog.records) and times == 18
    )


@pytest.mark.parametrize("total", [60, 6000])
def test_there_are_five_updates_whatever_the_length_of_the_run(total):
    """Each of them costs as much. One more may be due at once where the window's length is no multiple of five."""
    controller = TargetRun(SparsityTarget(0.5, reconstruct=True), total=total).attached.weight_controller
    length = controller.window.end - controller.window.start
    assert controller.update_every == round(length / 5) and 5 <= length / controller.update_every <= 5.5


class Odd(nn.Module):
    """A convolution, a layer that is used under two names, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 8, 3, padding=1)
        self.first = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.again.weight = self.first.weight
        self.last = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x[:, None]).tanh().mean(1)
        return self.last(self.again(self.first(x).tanh()).tanh())


def test_what_can_not_move_is_named_and_decays(caplog):
    names = ODD
    run = TargetRun(
        SparsityTarget(0.5, reconstruct=True, update_every=2, scope="layer"), model=Odd(), lr=1e-3, names=names
    ).to(TOTAL)
    run.attached.finish()
    messages = [record.getMessage() for record in caplog.records if "survivors stay where they are" in record.message]
    assert len(messages) == 1
    assert "mix.weight is of no linear layer" in messages[0]
    assert "first.weight is shared by several modules" in messages[0] and "last.weight" not in messages[0]
    weights = run.weights()
    assert [int((weights[name] == 0).sum()) for name in names] == [12, 2048, 256]


ODD = ["mix.weight", "first.weight", "last.weight"]


def test_where_survivors_can_not_move_weights_are_latent_and_a_run_goes_on_bit_for_bit():
    target = SparsityTarget(0.5, reconstruct=True, update_every=2, scope="layer")
    complete = TargetRun(target, model=Odd(), lr=1e-3, names=ODD)
    start = copy.deepcopy(complete.model.state_dict())
    complete.to(START + 9).attached.state_dict()
    values = complete.optimizer.parameter_map.values
    assert [values(name).get("latent", False) for name in ODD] == [True, True, False]
    assert [values(name)["phase"] for name in ODD] == ["decay", "decay", "frozen"]
    complete.to(TOTAL)
    first = TargetRun(target, model=Odd(), lr=1e-3, names=ODD)
    first.model.load_state_dict(start)
    first.to(START + 9)
    second = TargetRun(target, model=Odd(), lr=1e-3, names=ODD)
    state = json.loads(json.dumps(first.attached.state_dict()))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.attached.load_state_dict(state)
    second.taken = START + 9
    second.to(TOTAL)
    assert same(second.weights(), complete.weights())


def test_what_is_near_zero_is_counted_where_weights_decay_beside_layers_whose_survivors_move():
    """The last layer is one of these, and has no weights that are near zero and not zero."""
    target = SparsityTarget(0.5, reconstruct=True, update_every=2, latent_windows=0.0)
    run = TargetRun(target, model=Odd(), lr=1e-3, names=ODD).to(START + 15)
    logs = run.attached.logs
    assert logs["lp/near_zero"] > logs["lp/measured"] + 0.05


@pytest.mark.parametrize(("names", "moves"), [(ODD, False), (ODD[:1], False), (ODD[2:], True), (ODD[::2], True)])
def test_by_default_they_move_where_they_can_in_most_weights(names, moves):
    """first.weight has 4,096 that can't, mix.weight 24, and last.weight 512 that can."""
    run = TargetRun(SparsityTarget(0.5), model=Odd(), lr=1e-3, names=names)
    controller = run.attached.weight_controller
    assert (controller.reconstruction is not None) == moves
    described = lp_dist.explain(Odd(), SparsityTarget(0.5), names=names, total_steps=TOTAL, groups=False, gpus=[1])
    assert described.targets[0].window.update_every == controller.update_every == (7 if moves else 2)
    assert bool(described.updates) == moves


def test_a_gpt2_layer_moves_along_its_inputs():
    """Its weight is (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(48, 64), nn.Tanh(), Conv1D(8, 48))

    def as_linear(conv: nn.Sequential) -> nn.Sequential:
        layers = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
        with torch.no_grad():
            for number in (0, 2):
                layers[number].weight.copy_(conv[number].weight.t())
                layers[number].bias.copy_(conv[number].bias)
        return layers

    target = SparsityTarget(0.6, reconstruct=True, update_every=2)
    names = ["0.weight", "2.weight"]
    runs = [TargetRun(target, model=made, lr=1e-3, names=names) for made in (model(), as_linear(model()))]
    # Behind the second update, since the first has nothing to remove.
    conv, linear = (run.to(START + 3).weights() for run in runs)
    for name in names:
        assert torch.equal(conv[name].t() == 0, linear[name] == 0) and (linear[name] == 0).any()
        torch.testing.assert_close(conv[name].t(), linear[name], rtol=1e-3, atol=1e-4)
    assert [run.attached.weight_controller.reconstruction.moved for run in runs] == [1, 1]


def test_bf16_weights_move_by_fp32_sums():
    model = model_of().bfloat16()

    def in_bf16(model: nn.Module, step: int) -> None:
        x = batch_of(step).bfloat16()
        model.zero_grad()
        (model(x) - x[:, :8].sin()).float().square().mean().backward()

    helpers.targets.backward = in_bf16
    run = TargetRun(SparsityTarget(0.8, reconstruct=True, update_every=2), model=model, lr=1e-3, make=LpAdamW).to(
        TOTAL
    )
    assert run.attached.logs["lp/measured"] == pytest.approx(0.8, abs=2e-3)
    assert run.attached.weight_controller.reconstruction.moved == 18
