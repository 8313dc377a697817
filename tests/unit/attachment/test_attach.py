"""attach: decay by name, overrides, hyperparameters held against loaders, and the refusals. The shards are
test_shards.py's.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay, attach, param_groups
from lp_dist.attachment.plan import verify
from lp_dist.optim.hooks import handle_of
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.shards import locate_shards

# -- what decays is decided by name -------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.module = nn.Linear(4, 4)  # a child called `module`, as DDP's: no wrapper
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return self.lm_head(self.norm(self.module(self.embed(x))))


def test_trap_4_groups_that_include_embeddings_and_head_decay_by_our_rules(caplog):
    """Trainer's decay group leaves out biases and norms alone."""
    torch.manual_seed(0)
    model = Tiny()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = LpAdamW(
        [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        lr=0.1,
        weight_decay=10.0,
    )
    with caplog.at_level(logging.WARNING):
        attached = attach(model, optimizer)
    assert attached.decayed == {"module.weight"}
    assert "no decay for 2 parameters that their param group would decay, such as embed.weight" in caplog.text
    for _ in range(10):
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    assert (model.module.weight == 0).all() and (model.embed.weight != 0).all() and (model.lm_head.weight != 0).all()


def test_names_that_are_given_decay_instead():
    model = Tiny()
    optimizer = LpAdamW(model.parameters(), lr=0.1, weight_decay=10.0)
    assert attach(model, optimizer, names=["embed.weight"]).decayed == {"embed.weight"}
    with pytest.raises(ValueError, match="1 names are not parameters of the model, such as 'nothing'"):
        attach(model, optimizer, names=["nothing"])


def test_a_pattern_reaches_what_decays_and_a_full_name_reaches_anything():
    model = Tiny()
    optimizer = LpAdamW(param_groups(model, 1.0), lr=0.1, precondition=0.0)
    attached = attach(model, optimizer, overrides={"*": {"weight_decay": 2.0}, "embed.weight": {"weight_decay": 3.0}})
    assert attached.decayed == {"module.weight", "embed.weight"}
    assert optimizer.parameter_map.values("norm.weight") == {"weight_decay": 0.0}
    assert optimizer.parameter_map.values("module.weight") == {"weight_decay": 2.0}
    attached = attach(model, optimizer, overrides={"module.*": {"weight_decay": 0.0}})
    assert attached.decayed == frozenset()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"layers.0.*": {"weight_decay": 0.0}},
            r"'layers.0.\*' matches no parameter.*look like 'embed.weight'.*try '\*layers.0.\*'",
        ),
        ({"norm.*": {"weight_decay": 1.0}}, r"'norm.\*' matches no parameter that can take it"),
        ({"module.weight": {"lr": 1.0}}, "'lr' can't differ within a shard"),
        ({"module.weight": {"p": 7.0}}, "p=7.0 must be"),
    ],
)
def test_bad_overrides_raise_and_change_nothing(overrides, message):
    model = Tiny()
    optimizer = LpAdamW(param_groups(model, 1.0), lr=0.1, precondition=0.0)
    attach(model, optimizer, overrides={"module.weight": {"p": 0.0}})
    with pytest.raises(ValueError, match=message):
        attach(model, optimizer, overrides=overrides)
    assert optimizer.parameter_map.values("module.weight") == {"p": 0.0}


@pytest.mark.parametrize(
    "make_it",
    [lambda groups: LpSGD(groups, lr=0.1), lambda groups: LpLion(groups, lr=0.1), lambda groups: _hooked(groups)],
)
def test_precondition_is_refused_where_there_are_no_second_moments(make_it):
    model = Tiny()
    with pytest.raises(ValueError, match="precondition=0.5 needs Adam's second moments"):
        attach(model, make_it(param_groups(model, 1.0)), overrides={"module.weight": {"precondition": 0.5}})


def _hooked(groups) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    add_lp_decay(optimizer)
    return optimizer


def test_values_of_one_parameter_can_be_set_later():
    model = Tiny()
    attached = attach(model, _hooked(param_groups(model, 1.0)))
    attached.set("module.weight", cutoff=0.1)
    assert handle_of(attached.optimizer).parameter_map.values("module.weight") == {"cutoff": 0.1}
    with pytest.raises(ValueError, match="'modul.weight' is not a trainable parameter"):
        attached.set("modul.weight", cutoff=0.1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"precondition": 0.5}, "precondition=0.5 needs Adam's second moments"),
        ({"pattern": "2:4"}, "pattern='2:4' is for LpAdamW"),
        ({"latent": True}, "latent=True keeps latent weights"),
        ({"lr": 0.5}, "'lr' can't differ within a shard"),
        ({"p": 9.0}, r"p=9.0 must be a number in \[-4, 4\]"),
    ],
)
def test_values_that_the_optimizer_can_not_have_can_not_be_set_later_either(values, message):
    model = Tiny()
    attached = attach(model, _hooked(param_groups(model, 1.0)))
    with pytest.raises(ValueError, match=message):
        attached.set("module.weight", **values)
    assert handle_of(attached.optimizer).parameter_map.values("module.weight") == {}


def test_what_starts_at_zero_is_refused_at_the_start_and_not_once_it_became_zero():
    model = Tiny()
    nn.init.zeros_(model.module.weight)
    optimizer = LpAdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    with pytest.raises(
        ValueError, match=r"1 parameters are to decay, but are all zeros, such as 'module.weight'.*weight_decay=0"
    ):
        attach(model, optimizer)
    attach(model, optimizer, overrides={"module.weight": {"weight_decay": 0.0}})
    nn.init.ones_(model.module.weight)
    attach(model, optimizer)
    model(torch.arange(6)).sum().backward()
    optimizer.step()
    nn.init.zeros_(model.module.weight)
    attach(model, optimizer)  # it became zero on the way


# -- hyperparameters are held against loaders ---------------------------------


def test_what_the_script_asked_for_holds_after_loading(caplog):
    model = Tiny()
    old = LpAdamW(param_groups(model, 1.0), lr=0.1, p=0.0, betas=(0.8, 0.9))
    new = LpAdamW(param_groups(model, 2.0), lr=0.3, p=0.5)
    attach(model, new)
    with caplog.at_level(logging.WARNING):
        new.load_state_dict(old.state_dict())
    first, second = new.param_groups
    assert (first["weight_decay"], first["p"], first["betas"], second["weight_decay"]) == (2.0, 0.5, (0.9, 0.999), 0.0)
    assert first["lr"] == 0.1  # the learning rate is the schedule's
    assert (
        "param group 0 has weight_decay=1.0, from a checkpoint perhaps; going on with weight_decay=2.0" in caplog.text
    )
    other = LpAdamW(param_groups(model, 2.0), lr=0.3, p=0.5)
    other.load_state_dict(old.state_dict())
    attach(model, other)  # after loading, as Trainer does it
    assert other.param_groups[0]["weight_decay"] == 2.0


def test_groups_that_an_engine_refilled_are_known_by_position():
    """Accelerate puts FSDP2's sharded parameters into the groups of an optimizer that was made before."""
    before, after = Tiny(), Tiny()
    optimizer = LpAdamW(param_groups(before, 1.0), lr=0.1, precondition=0.0)
    sharded = dict(after.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [
            sharded[name] for name, param in before.named_parameters() if any(param is p for p in group["params"])
        ]
    optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["weight_decay"] = 0.0, 1.0  # a loader's doing
    assert attach(after, optimizer).decayed == {"module.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.0, 0.0]


def test_the_state_of_another_base_is_refused():
    model = Tiny()
    adam, lion = LpAdamW(param_groups(model, 1.0), lr=0.1, precondition=0.0), LpLion(param_groups(model, 1.0), lr=0.1)
    model(torch.arange(6)).sum().backward()
    adam.step()
    with pytest.raises(ValueError, match="of another optimizer than LpLion: it has exp_avg_sq in its state"):
        lion.load_state_dict(adam.state_dict())
    lion = LpLion(param_groups(model, 1.0), lr=0.1)
    lion.step()
    with pytest.raises(ValueError, match="of another optimizer than LpAdamW: it has no exp_avg_sq in its state"):
        LpAdamW(param_groups(model, 1.0), lr=0.1, precondition=0.0).load_state_dict(lion.state_dict())


@pytest.mark.parametrize("lr, warned", [(0.1, False), (0.2, True)])
def test_a_learning_rate_that_the_resumed_schedule_does_not_take_is_told(lr, warned, caplog):
    def made(rate):
        model = Tiny()
        optimizer = LpAdamW(param_groups(model, 1.0), lr=rate, precondition=0.0)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)

    model, optimizer, schedule = made(0.1)
    model(torch.arange(6)).sum().backward()
    optimizer.step(), schedule.step()
    saved = optimizer.state_dict(), schedule.state_dict()
    model, optimizer, schedule = made(lr)
    attach(model, optimizer, lr_scheduler=schedule)
    assert "schedule" not in caplog.text  # nothing was resumed yet
    optimizer.load_state_dict(saved[0]), schedule.load_state_dict(saved[1])
    attach(model, optimizer, lr_scheduler=schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.09)
    assert ("from a rate of 0.1; the rate of 0.2" in caplog.text) == warned


def test_an_optimizer_that_counts_no_steps_is_counted_for_and_through_a_checkpoint():
    model = Tiny().bfloat16()
    optimizer = _hooked_sgd(model)
    model(torch.arange(6)).sum().backward()
    for _step in range(300):  # more than bf16 can count
        optimizer.step()
    assert steps_taken(optimizer) == 300
    other = _hooked_sgd(model)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert steps_taken(other) == 301
    adam = _hooked(param_groups(model, 1.0))
    adam.step()
    assert steps_taken(adam) == 1 and all("lp_decay_step" not in state for state in adam.state.values())


def _hooked_sgd(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(param_groups(model, 1.0), lr=1e-6)
    add_lp_decay(optimizer)
    return optimizer


def test_a_cycled_momentum_is_the_schedulers():
    model = Tiny()
    optimizer = LpSGD(param_groups(model, 1.0), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    cycled = optimizer.param_groups[0]["momentum"]
    assert cycled != 0.9
    attach(model, optimizer)
    assert optimizer.param_groups[0]["momentum"] == cycled


# -- is it of lp_dist? --------------------------------------------------------


def test_trap_1_another_optimizer_is_refused():
    model = Tiny()
    with pytest.raises(
        RuntimeError, match=r"torch.optim.adamw.AdamW, not one of lp_dist.*zero_force_ds_cpu_optimizer\": false"
    ):
        attach(model, torch.optim.AdamW(model.parameters()))


def test_an_optimizer_must_be_given_unless_an_engine_has_it():
    for function in (attach, locate_shards):
        with pytest.raises(ValueError, match="pass the optimizer as well"):
            function(Tiny())


class _Wrapper:
    """Stands for one of DeepSpeed's optimizers that step by themselves; recognised by module and name."""

    __module__ = "deepspeed.runtime.somewhere"

    def __init__(self, optimizer, **attributes):
        self.optimizer = optimizer
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("SuperOffloadOptimizer_Stage3", {}, "SuperOffloadOptimizer_Stage3 steps some of the weights.*super_offload"),
        ("ZenFlowZeroOptimizerSequential", {}, "ZenFlowZeroOptimizerSequential steps some.*zenflow"),
        (
            "DeepSpeedZeroOptimizer_Stage3",
            {"backup_optimizer": object()},
            r"ratio < 1 steps some.*offload_optimizer.ratio to 1.0",
        ),
        ("DeepSpeedZeroOptimizer_Stage3", {"zenflow": True}, "zenflow steps some"),
    ],
)
def test_trap_3_engines_that_step_sub_groups_by_another_optimizer_are_refused(name, attributes, message):
    optimizer = LpAdamW(Tiny().parameters(), weight_decay=1.0)
    with pytest.raises(RuntimeError, match=message):
        verify(type(name, (_Wrapper,), {"__module__": "deepspeed.runtime.x"})(optimizer, **attributes))
