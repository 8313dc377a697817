"""The learning rates ahead are those that really come, and asking for them changes nothing."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import accelerate.state
import pytest
import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from deepspeed.runtime import lr_schedules as ds
from torch.optim import lr_scheduler as lr
from transformers import get_scheduler

from helpers.targets import TargetRun, decaying, model_of, same
from lp_dist import LpAdamW, attach
from lp_dist.targets.lr_lookahead import rates_ahead

TOTAL = 30


def hf(kind: str, **kwargs):
    return lambda o: get_scheduler(
        kind, o, num_warmup_steps=5, num_training_steps=TOTAL, scheduler_specific_kwargs=kwargs
    )


HF = {
    f"transformers {kind}": hf(kind, **kwargs)
    for kind, kwargs in {
        "linear": {},
        "cosine": {},
        "cosine_with_restarts": {"num_cycles": 2},
        "polynomial": {"lr_end": 1e-3, "power": 2.0},
        "constant": {},
        "constant_with_warmup": {},
        "inverse_sqrt": {},
        "cosine_with_min_lr": {"min_lr": 1e-3},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
        "warmup_stable_decay": {"num_decay_steps": 10},
    }.items()
}
TORCH = {
    "LambdaLR": lambda o: lr.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1.0 / (1 + step)]),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda step: 1.0 - step / 100),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, TOTAL, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, [0.5, 0.7], total_steps=TOTAL + 1),
    "CyclicLR": lambda o: lr.CyclicLR(o, [1e-3, 2e-3], [0.1, 0.2], step_size_up=7, cycle_momentum=False),
    "CyclicLR with momentum": lambda o: lr.CyclicLR(o, 1e-3, 0.1, step_size_up=5, mode="exp_range", gamma=0.99),
    "StepLR": lambda o: lr.StepLR(o, 4, 0.5),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [3, 14, 15], 0.3),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: lr.LinearLR(o, 0.1, 1.0, 17),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.3, 9),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, TOTAL, 1.5),
    "SequentialLR": lambda o: lr.SequentialLR(
        o, [lr.LinearLR(o, 0.1, 1.0, 8), lr.CosineAnnealingLR(o, 20), lr.ExponentialLR(o, 0.8)], [8, 20]
    ),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.StepLR(o, 5, 0.5), lr.ExponentialLR(o, 0.95)], optimizer=o),
    "ChainedScheduler of a SequentialLR": lambda o: lr.ChainedScheduler(
        [lr.SequentialLR(o, [lr.ConstantLR(o, 0.5, 100), lr.ExponentialLR(o, 0.9)], [9]), lr.StepLR(o, 6, 0.5)]
    ),
}
DEEPSPEED = {
    "WarmupLR": lambda o: ds.WarmupLR(o, 0.0, [0.1, 0.3], warmup_num_steps=10),
    "WarmupLR, linear": lambda o: ds.WarmupLR(o, 0.01, 0.1, warmup_num_steps=10, warmup_type="linear"),
    "WarmupDecayLR": lambda o: ds.WarmupDecayLR(o, TOTAL, 0.0, [0.1, 0.3], warmup_num_steps=10),
    "WarmupCosineLR": lambda o: ds.WarmupCosineLR(o, TOTAL, warmup_num_steps=8),
    "OneCycle": lambda o: ds.OneCycle(o, 0.01, 0.2, decay_lr_rate=0.1, cycle_first_step_size=9, decay_step_size=2),
    "OneCycle without momentum": lambda o: ds.OneCycle(
        o, 0.01, 0.2, cycle_first_step_size=6, cycle_second_step_size=11, cycle_momentum=False
    ),
    "LRRangeTest": lambda o: ds.LRRangeTest(o, 0.01, lr_range_test_step_size=5),
}
SCHEDULERS = {**TORCH, **HF, **{f"DeepSpeed {name}": make for name, make in DEEPSPEED.items()}}


def made(tensor: bool = False, cls: type = LpAdamW) -> torch.optim.Optimizer:
    """Two groups with rates of their own, which have taken no step."""
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": torch.tensor(rate) if tensor else rate}
        for rate in (0.1, 0.3)
    ]
    return cls(groups, lr=0.1, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))


def rates_of(optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def stepped(optimizer, scheduler, steps: int) -> list[list[float]]:
    """The rates of the next steps, by taking them."""
    rates = []
    for _ in range(steps):
        rates.append(rates_of(optimizer))
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()
    return rates


def warnings_in(caplog) -> list[str]:
    """What lp_dist said; DeepSpeed's schedules say much themselves."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("lp_dist")]


def frozen(optimizer, scheduler) -> tuple:
    """All that could have been touched, as of now."""
    groups = [{**group, "params": [id(param) for param in group["params"]]} for group in optimizer.param_groups]
    return copy.deepcopy(groups), repr(scheduler.state_dict()), sorted(vars(scheduler)), optimizer.step


@pytest.mark.parametrize("before", [0, 1, 11])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_ahead_are_those_that_come(name, before, caplog):
    optimizer = made(cls=torch.optim.SGD if "with momentum" in name else LpAdamW)
    scheduler = SCHEDULERS[name](optimizer)
    stepped(optimizer, scheduler, before)
    was = frozen(optimizer, scheduler)
    ahead = rates_ahead(scheduler, optimizer, TOTAL - before)
    assert frozen(optimizer, scheduler) == was, "asking has changed the scheduler, or what it steps"
    assert warnings_in(caplog) == [], "they are known, so there is nothing to warn of"
    assert ahead == stepped(optimizer, scheduler, TOTAL - before)
    assert name == "transformers constant" or len({rates[0] for rates in ahead}) > 1 or before == 11, (
        "a schedule that never changes tests nothing"
    )


def torch_takes_tensors_elsewhere() -> bool:
    """Whether torch's SequentialLR takes a learning rate that is a tensor to other values than one that is a number,
    and so to none that anybody means: torch 2.7 does.
    """
    ended = []
    for tensor in (False, True):
        optimizer = made(tensor=tensor)
        stepped(optimizer, SCHEDULERS["SequentialLR"](optimizer), 12)
        ended.append(rates_of(optimizer))
    return ended[1] != pytest.approx(ended[0], rel=1e-5)


@pytest.mark.parametrize("name", ["transformers cosine", "LinearLR", "ExponentialLR", "OneCycleLR", "SequentialLR"])
def test_a_tensor_as_learning_rate_stays_the_same_tensor(name):
    if name == "SequentialLR" and torch_takes_tensors_elsewhere():
        pytest.skip(f"torch {torch.__version__} itself takes a tensor to other rates than a number")
    optimizer = made(tensor=True)
    scheduler = SCHEDULERS[name](optimizer)
    stepped(optimizer, scheduler, 3)
    tensors, values = [group["lr"] for group in optimizer.param_groups], rates_of(optimizer)
    ahead = rates_ahead(scheduler, optimizer, 12)
    assert (
        all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors))
        and rates_of(optimizer) == values
    )
    for rate, stepped_rate in zip(ahead, stepped(optimizer, scheduler, 12), strict=True):
        assert rate == pytest.approx(stepped_rate, rel=1e-5, abs=1e-7), "but for fp32's rounding in the tensor"


@pytest.mark.parametrize("name", ["transformers cosine", "SequentialLR", "ChainedScheduler of a SequentialLR"])
def test_a_scheduler_of_a_wrapper_steps_what_it_wraps(name):
    """As one that was made after accelerator.prepare: its optimizer is Accelerate's, and ours is inside."""
    optimizer = made()
    wrapper = Accelerator(cpu=True).prepare(optimizer)
    scheduler = SCHEDULERS[name](wrapper)
    assert scheduler.optimizer is wrapper is not optimizer

    def refused(memo):
        raise RuntimeError("an engine's optimizer holds the masters, and would be copied with them")

    wrapper.__deepcopy__ = refused
    ahead = rates_ahead(scheduler, optimizer, 12)
    assert ahead == stepped(wrapper, scheduler, 12) and len({rates[0] for rates in ahead}) > 1


def test_how_many_rates_there_are():
    optimizer = made()
    scheduler = lr.ExponentialLR(optimizer, 0.5)
    for wanted in (0, 1, 2, 5):
        for schedule in (scheduler, None):
            ahead = rates_ahead(schedule, optimizer, wanted)
            assert len(ahead) == wanted and ahead[:1] == [[0.1, 0.3]][:wanted], (
                f"{wanted} rates, the present one first"
            )
    assert rates_ahead(scheduler, optimizer, 3) == [[0.1, 0.3], [0.05, 0.15], [0.025, 0.075]]


def test_beyond_its_end_a_schedule_stays_where_it_ended(caplog):
    """OneCycleLR raises there; a run that is asked for one step too far must not fall back on today's rates."""
    optimizer = made()
    scheduler = lr.OneCycleLR(optimizer, 0.5, total_steps=10)
    stepped(optimizer, scheduler, 4)
    ahead = rates_ahead(scheduler, optimizer, 20)
    known = [*stepped(optimizer, scheduler, 6), rates_of(optimizer)]
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        scheduler.step()
    assert ahead == known + [known[-1]] * 13
    assert warnings_in(caplog) == []


def test_without_a_scheduler_the_rates_stay(caplog):
    assert rates_ahead(None, made(), 4) == [[0.1, 0.3]] * 4
    assert warnings_in(caplog) == []


class Broken(lr.LambdaLR):
    """As a scheduler with a file or a lock in it."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda o: lr.ReduceLROnPlateau(o), ["ReduceLROnPlateau", "metrics"]),
        (lambda o: get_scheduler("reduce_lr_on_plateau", o), ["ReduceLROnPlateau", "metrics"]),
        (lambda o: Broken(o, lambda step: 1.0), ["Broken", "cannot pickle"]),
        (lambda o: AcceleratedScheduler(lr.ReduceLROnPlateau(o), o, step_with_optimizer=False), ["ReduceLROnPlateau"]),
    ],
)
def test_what_cannot_be_known_is_told_and_taken_to_stay(make, words, caplog):
    optimizer = made()
    scheduler = make(optimizer)
    assert rates_ahead(scheduler, optimizer, 5) == [[0.1, 0.3]] * 5
    (message,) = warnings_in(caplog)
    assert all(
        word in message for word in [*words, "learning rates ahead are not known", "corrected at every update"]
    ), message
    assert rates_of(optimizer) == [0.1, 0.3]


@pytest.mark.parametrize("more, calls", [({}, 2), ({"split_batches": True}, 1), ({"step_with_optimizer": False}, 1)])
@pytest.mark.parametrize("make", [SCHEDULERS["transformers linear"], TORCH["OneCycleLR"], TORCH["SequentialLR"]])
def test_accelerates_wrapper_steps_once_for_each_process(make, more, calls, monkeypatch):
    """Two of them, as its state would say; and its wrapper is stepped for real."""
    for module in (accelerate.state, accelerate.scheduler):
        monkeypatch.setattr(module, "AcceleratorState", lambda: SimpleNamespace(num_processes=2))
        monkeypatch.setattr(module, "GradientState", lambda: SimpleNamespace(sync_gradients=True))
    optimizer = made()
    optimizer.step_was_skipped = False  # as of Accelerate's wrapper
    inner = make(optimizer)
    scheduler = AcceleratedScheduler(inner, optimizer, **more)
    stepped(optimizer, scheduler, 3)
    was = inner.last_epoch
    ahead = rates_ahead(scheduler, optimizer, 10)
    assert was == 3 * calls == inner.last_epoch
    assert ahead == stepped(optimizer, scheduler, 10)
    alone = made()
    assert ahead == stepped(alone, make(alone), TOTAL)[3 * calls :: calls][:10], (
        "the schedule of one process, every so many"
    )


def test_one_cycle_at_its_end_is_no_surprise(caplog):
    """It refuses to be stepped further; the rate after its last step stays."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError):
        scheduler.step()
    assert rates_ahead(scheduler, optimizer, 3) == [[optimizer.param_groups[0]["lr"]]] * 3 and not caplog.text


# -- a scheduler that is stepped once an epoch --------------------------------

EPOCHS = {
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, T_max=10),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.8),
    "StepLR": lambda o: lr.StepLR(o, 3, 0.1),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, total_iters=10),
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda epoch: 1 - epoch / 10),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [4, 7], 0.1),
}


@pytest.mark.parametrize("first", [False, True], ids=["scheduler first", "after_step first"])
@pytest.mark.parametrize("name", EPOCHS)
def test_a_scheduler_that_is_stepped_once_an_epoch_is_known_by_what_it_does(name, first):
    run = TargetRun(decaying(0.5), scheduled=False, total=200, attached=False)
    run.scheduler = None
    scheduler = EPOCHS[name](run.optimizer)
    run.attached = attach(run.model, run.optimizer, target=run.target, total_steps=200, lr_scheduler=scheduler)
    rates, expected = run.attached.weight_controller.run.rates, []
    for step in range(200):
        run.step()
        if first:
            run.attached.after_step()
        if step % 20 == 19:
            scheduler.step()
        if not first:
            run.attached.after_step()
        if step == 99:
            assert rates.interval == 20
            ahead = [rate[0] for rate in rates.ahead(60)]
        if 99 <= step < 159:
            expected.append(run.optimizer.param_groups[0]["lr"])
    assert ahead == pytest.approx(expected)
    pruned = run.attached.weight_controller.final_pruning
    assert pruned["after"] == pytest.approx(0.5, abs=1e-4) and pruned["pruned_at_end"] < 0.05


@pytest.mark.parametrize("stop", [30, 59, 60, 75])
@pytest.mark.parametrize("order", ["scheduler first", "scheduler last"])
def test_a_run_with_such_a_scheduler_resumes_bit_for_bit(stop, order):
    def run_of():
        run = TargetRun(decaying(0.5), scheduled=False, total=200)
        scheduler = lr.ExponentialLR(run.optimizer, 0.95)
        run.attached = attach(run.model, run.optimizer, target=run.target, total_steps=200, lr_scheduler=scheduler)
        return run, scheduler

    def go_on(run, scheduler, until):
        while run.taken < until:
            run.to(run.taken + 1)
            if run.taken % 4 == 0:  # more often than λ is updated
                scheduler.step()

    expected, scheduler = run_of()
    go_on(expected, scheduler, 160)
    cut, scheduler = run_of()
    go_on(cut, scheduler, stop)
    states = copy.deepcopy([each.state_dict() for each in (cut.model, cut.optimizer, cut.attached, scheduler)])
    resumed, scheduler = run_of()
    resumed.model.load_state_dict(states[0])
    resumed.optimizer.load_state_dict(states[1])
    if order == "scheduler first":
        scheduler.load_state_dict(states[3])
    resumed.attached.load_state_dict(states[2])
    if order == "scheduler last":
        scheduler.load_state_dict(states[3])
    resumed.taken = stop
    go_on(resumed, scheduler, 160)
    assert same(resumed.weights(), expected.weights())
    assert resumed.attached.state_dict() == expected.attached.state_dict()


def test_a_scheduler_that_is_stepped_each_step_or_not_at_all_is_known_too():
    run = TargetRun(decaying(0.5))
    rates = run.to(10).attached.weight_controller.run.rates
    assert rates.interval == 1 and rates.is_sure
    still = TargetRun(decaying(0.5), scheduled=False)
    still.scheduler = lr.ExponentialLR(still.optimizer, 0.5)
    still.attach()
    still.scheduler = None
    rates = still.to(10).attached.weight_controller.run.rates
    assert rates.interval == 0 and rates.ahead(3) == [[3e-3]] * 3


class Job(torch.nn.Module):
    """Holds the model, and has the rule of its schedule, as a LightningModule does."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.warm = model, 10

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warm)

    def __deepcopy__(self, memo):
        raise AssertionError("a look ahead copies no model")


class Rule:
    """A rule that is an object, and holds a model."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, step: int) -> float:
        return self.job.rate(step)


def of_model(job: Job, step: int) -> float:
    return job.rate(step)


@pytest.mark.parametrize(
    "rule_of",
    [lambda job: job.rate, Rule, lambda job: partial(of_model, job), lambda job: lambda step: job.rate(step)],
    ids=["a method", "an object", "partial", "a closure"],
)
def test_a_rule_that_belongs_to_a_model_is_evaluated_without_a_copy_of_it(rule_of, caplog):
    job = Job(model_of())
    optimizer = LpAdamW(job.parameters(), lr=0.1)
    scheduler = lr.SequentialLR(
        optimizer, [lr.LambdaLR(optimizer, rule_of(job)), lr.ExponentialLR(optimizer, 0.5)], [10]
    )
    ahead = [rate[0] for rate in rates_ahead(scheduler, optimizer, 12)]
    assert ahead == pytest.approx([0.01 * (i + 1) for i in range(10)] + [0.1, 0.05]) and not caplog.text
