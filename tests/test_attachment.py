"""attach: names on shards in every engine, decay by name, overrides, and the refusals. One group of ranks runs all engines."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from engines_under_test import ZERO, Engine, gathered, make
from lp_dist import LpAdamW, LpLion, LpSGD, add_lp_decay, attach, measure_histogram, measure_sparsity, param_groups
from lp_dist.attachment import steps_taken, verify
from lp_dist.shards import shards

DECAYED = {"0.weight", "2.weight", "3.weight", "4.weight"}
OVERRIDES = {"0.weight": {"p": 0.0, "weight_decay": 0.2}, "[23].weight": {"weight_decay": 0.4}, "3.weight": {"cutoff": 0.5, "l2": 0.1}}
STEPS = 4


def model_of() -> nn.Sequential:
    """Odd sizes; a frozen parameter; a last layer of one row, so that FSDP2 leaves one rank without elements of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False), nn.Linear(5, 3), nn.Linear(3, 1))
    model[3].bias.requires_grad_(False)
    return model


def optimizer_of(model: nn.Module) -> LpAdamW:
    return LpAdamW(param_groups(model, 0.1), lr=1e-2)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(100 * step + rank))


ENGINES = ["ddp", "fsdp2", "zero0", *ZERO, "bf16_optimizer", "zero0 bf16"]


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in kind else torch.float32


def on_a_rank(rank: int, world_size: int) -> dict:
    results = {}
    for kind in ENGINES:
        if kind == "zero3 hpz" and world_size % 2:
            continue  # DeepSpeed: "3 is not divisible by 2"
        more = {"bf16": {"enabled": True}} if kind == "zero0 bf16" else {}
        engine = make(kind, model_of(), optimizer_of, **more)
        alone = kind in ("ddp", "fsdp2")
        attached = attach(engine.handle, engine.optimizer if alone else None, overrides=OVERRIDES)
        for step in range(STEPS):
            engine.step(engine(batch(step, rank).to(dtype_of(kind))).float().square().mean())
        results[kind] = examine(engine, attached, engine.optimizer if alone else engine.handle.optimizer)
        if hasattr(engine.handle, "destroy"):
            engine.handle.destroy()
    return results


def examine(engine: Engine, attached, optimizer) -> dict:
    """What can be said of an engine's shards on this rank, for the assertions in the test proper."""
    whole = gathered(engine)
    names = [shard.name for shard in attached.shards]
    live = attached.optimizer
    pieces = {shard.name: (shard.start, shard.piece.values.float().flatten().clone(), shard.shape, set(shard.state)) for shard in attached.shards}
    segments = [(segment, shard.tensor.numel()) for shard in attached.shards for segment in live.segments.of(shard.tensor)]
    before = whole["0.weight"].clone()
    counts, masters = (measure_sparsity(engine.handle, which, names=names).counts for which in (None, optimizer))
    histogram = measure_histogram(engine.handle, names=names)
    # Written through the view, the master really changes: a second look finds it.
    first = attached.shards[0]
    if first.length:
        first.piece.values.view(-1)[0] = 0.25
    again = next(shard for shard in shards(engine.handle, optimizer) if shard.name == first.name)
    return {
        "names": names, "decayed": set(attached.decayed), "steps": steps_taken(live), "pieces": pieces, "before": before,
        "segments": segments, "whole": {name: tensor.float() for name, tensor in whole.items()},
        "counts": counts, "masters": masters, "histogram": histogram,
        "written": not first.length or again.piece.values.view(-1)[0].item() == 0.25,
        "overridden": live.segments.values("3.weight"),
    }


def in_one_process(world_size: int) -> dict[str, torch.Tensor]:
    model = model_of()
    optimizer = optimizer_of(model)
    attach(model, optimizer, overrides=OVERRIDES)
    for step in range(STEPS):
        loss = sum(model(batch(step, rank)).square().mean() for rank in range(world_size)) / world_size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def without_overrides() -> dict[str, torch.Tensor]:
    model = model_of()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        (sum(model(batch(step, rank)).square().mean() for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_engine_has_its_shards_named(run_ranks, world_size):
    ranks = run_ranks(on_a_rank, world_size)
    wanted, plain = in_one_process(world_size), without_overrides()
    assert not torch.equal(wanted["3.weight"], plain["3.weight"])
    trainable = [name for name, param in model_of().named_parameters() if param.requires_grad]
    for kind in ranks[0]:
        results = [result[kind] for result in ranks]
        for rank, result in enumerate(results):
            where = f"{kind}, rank {rank} of {world_size}"
            assert result["names"] == trainable and result["decayed"] == DECAYED, where
            assert result["steps"] == STEPS and result["written"], where
            assert result["overridden"] == {"cutoff": 0.5, "l2": 0.1, "weight_decay": 0.4}, where
            assert result["counts"] == results[0]["counts"] == result["masters"], where
            for name, tensor in result["whole"].items():
                if "bf16" in kind:  # other gradients; that these are right is test_matrix.py's. The overrides show all the same.
                    if name == "3.weight":
                        assert (tensor - wanted[name]).norm() < 0.5 * (tensor - plain[name]).norm(), where
                    continue
                torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{where}: {name}: {m}")
                assert torch.equal(tensor == 0, wanted[name] == 0), where
            for name, (start, values, shape, states) in result["pieces"].items():
                inside = result["whole"][name].flatten()[start:start + values.numel()]
                torch.testing.assert_close(values.to(dtype_of(kind)).float(), inside, rtol=0, atol=0, msg=lambda m: f"{where}: {name}: {m}")
                assert shape == wanted[name].shape and states == {"exp_avg", "exp_avg_sq"}, where
            for segment, numel in result["segments"]:
                assert segment.offset + segment.length <= numel and segment.start + segment.length <= segment.shape.numel(), where
        for name in trainable:
            counted, full = results[0]["counts"][name], results[0]["whole"][name]
            assert counted == (int((full == 0).sum()), full.numel()), (kind, name)
            covered = sorted((r["pieces"][name][0], r["pieces"][name][1].numel()) for r in results)
            if kind == "ddp" or kind.startswith("zero0"):
                assert covered == [(0, full.numel())] * world_size, (kind, name)
            else:  # disjoint, and together the whole: nothing twice, nothing left out, no padding
                nonempty = [piece for piece in covered if piece[1]]
                ends = [0] + [start + length for start, length in nonempty]
                assert [start for start, _ in nonempty] + [full.numel()] == ends, (kind, name, covered)
        histogram = results[0]["histogram"]
        for name in trainable:
            check_histogram(histogram, name, results[0]["counts"][name])
    sizes = {kind: [r["pieces"]["4.weight"][1].numel() for r in (rank[kind] for rank in ranks)] for kind in ranks[0]}
    assert 0 in sizes["fsdp2"] and 0 in sizes["zero2"]  # ranks without elements of a parameter are among what was tested


def check_histogram(histogram, name: str, counts: tuple[int, int]) -> None:
    zeros, elements = counts
    assert histogram.zeros[name] == zeros
    assert sum(histogram.counts[name]) + zeros == elements


def test_histogram_bins_hold_what_they_say():
    model = nn.Sequential(nn.Linear(300, 200, bias=False))
    with torch.no_grad():
        weight = model[0].weight
        weight.mul_(torch.logspace(-8, 2, weight.numel()).view_as(weight))
        weight.view(-1)[:5] = torch.tensor([0.0, 1e-30, 1e30, 0.75, -0.75])
    histogram = measure_histogram(model)
    edges = torch.tensor(histogram.edges, dtype=torch.float64)
    assert len(edges) == 241 and (edges.diff() > 0).all()
    inner = torch.histogram(model[0].weight.detach().abs().double().flatten(), edges)[0].long().tolist()
    counts = histogram.counts["0.weight"]
    assert histogram.zeros["0.weight"] == int((model[0].weight == 0).sum()) >= 1
    assert counts[1:-1] == inner[1:-1]
    assert (counts[0], counts[-1]) == (inner[0] + 1, inner[-1] + 1)  # 1e-30 and 1e30, beyond the edges
    bin_of = next(i for i, edge in enumerate(histogram.edges) if edge == 0.75)
    assert counts[bin_of] >= 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embed(x))))


def tied(rank: int, world_size: int) -> dict:
    found = {}
    for kind in ("ddp", "zero1", "zero2", "zero3"):
        engine = make(kind, Tied(), lambda model: LpAdamW(param_groups(model, 0.1), lr=1e-2))
        attached = attach(engine.handle, engine.optimizer if kind == "ddp" else None)
        for _ in range(2):
            engine.step(engine(torch.arange(7)).square().mean())
        names = [shard.name for shard in attached.shards]
        found[kind] = (names, sorted(attached.decayed), measure_sparsity(engine.handle, names=names).elements,
                       gathered(engine)["embed.weight"])
    return found


def test_a_tied_parameter_comes_once(run_ranks):
    first, second = run_ranks(tied, 2)
    for kind, (names, decayed, elements, weight) in first.items():
        assert names == ["embed.weight", "body.weight", "body.bias"] and decayed == ["body.weight"] and elements == 65, kind
        torch.testing.assert_close(weight, first["ddp"][3], rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, second[kind][3]), kind


# -- what decays is decided by name -----------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.module = nn.Linear(4, 4)   # a child called `module`, as DDP's: no wrapper
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return self.lm_head(self.norm(self.module(self.embed(x))))


def test_trap_4_groups_that_include_embeddings_and_head_decay_by_our_rules(caplog):
    """Trainer's decay group leaves out biases and norms alone."""
    torch.manual_seed(0)
    model = Tiny()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = LpAdamW([{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}],
                        lr=0.1, weight_decay=10.0)
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
    optimizer = LpAdamW(param_groups(model, 1.0), lr=0.1)
    attached = attach(model, optimizer, overrides={"*": {"weight_decay": 2.0}, "embed.weight": {"weight_decay": 3.0}})
    assert attached.decayed == {"module.weight", "embed.weight"}
    assert optimizer.segments.values("norm.weight") == {}
    assert optimizer.segments.values("module.weight") == {"weight_decay": 2.0}
    attached = attach(model, optimizer, overrides={"module.*": {"weight_decay": 0.0}})
    assert attached.decayed == frozenset()


@pytest.mark.parametrize(("overrides", "message"), [
    ({"layers.0.*": {"weight_decay": 0.0}}, r"'layers.0.\*' matches no parameter.*look like 'embed.weight'.*try '\*layers.0.\*'"),
    ({"norm.*": {"weight_decay": 1.0}}, r"'norm.\*' matches no parameter that can take it"),
    ({"module.weight": {"lr": 1.0}}, "'lr' can't differ within a shard"),
    ({"module.weight": {"p": 7.0}}, "p=7.0 must be"),
])
def test_bad_overrides_raise_and_change_nothing(overrides, message):
    model = Tiny()
    optimizer = LpAdamW(param_groups(model, 1.0), lr=0.1)
    attach(model, optimizer, overrides={"module.weight": {"p": 0.0}})
    with pytest.raises(ValueError, match=message):
        attach(model, optimizer, overrides=overrides)
    assert optimizer.segments.values("module.weight") == {"p": 0.0}


@pytest.mark.parametrize("make_it", [
    lambda groups: LpSGD(groups, lr=0.1), lambda groups: LpLion(groups, lr=0.1), lambda groups: _hooked(groups)])
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
    assert attached.optimizer.lp_decay.segments.values("module.weight") == {"cutoff": 0.1}
    with pytest.raises(ValueError, match="'modul.weight' is not a trainable parameter"):
        attached.set("modul.weight", cutoff=0.1)


def test_what_starts_at_zero_is_refused_at_the_start_and_not_after_it_died():
    model = Tiny()
    nn.init.zeros_(model.module.weight)
    optimizer = LpAdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    with pytest.raises(ValueError, match=r"1 parameters are to decay, but are all zeros, such as 'module.weight'.*weight_decay=0"):
        attach(model, optimizer)
    attach(model, optimizer, overrides={"module.weight": {"weight_decay": 0.0}})
    nn.init.ones_(model.module.weight)
    attach(model, optimizer)
    model(torch.arange(6)).sum().backward()
    optimizer.step()
    nn.init.zeros_(model.module.weight)
    attach(model, optimizer)  # it died on the way


# -- hyperparameters are held against loaders -------------------------------------------------------------------------


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
    assert "param group 0 has weight_decay=1.0, from a checkpoint perhaps; going on with weight_decay=2.0" in caplog.text
    other = LpAdamW(param_groups(model, 2.0), lr=0.3, p=0.5)
    other.load_state_dict(old.state_dict())
    attach(model, other)  # after loading, as Trainer does it
    assert other.param_groups[0]["weight_decay"] == 2.0


def test_groups_that_an_engine_refilled_are_known_by_position():
    """Accelerate puts FSDP2's sharded parameters into the groups of an optimizer that was made before."""
    before, after = Tiny(), Tiny()
    optimizer = LpAdamW(param_groups(before, 1.0), lr=0.1)
    sharded = dict(after.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[name] for name, param in before.named_parameters() if any(param is p for p in group["params"])]
    optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["weight_decay"] = 0.0, 1.0  # a loader's doing
    assert attach(after, optimizer).decayed == {"module.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.0, 0.0]


def test_a_cycled_momentum_is_the_schedulers():
    model = Tiny()
    optimizer = LpSGD(param_groups(model, 1.0), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    cycled = optimizer.param_groups[0]["momentum"]
    assert cycled != 0.9
    attach(model, optimizer)
    assert optimizer.param_groups[0]["momentum"] == cycled


# -- is it really ours? -----------------------------------------------------------------------------------------------


def test_trap_1_another_optimizer_is_refused():
    model = Tiny()
    with pytest.raises(RuntimeError, match=r"torch.optim.adamw.AdamW, not one of lp_dist.*zero_force_ds_cpu_optimizer\": false"):
        attach(model, torch.optim.AdamW(model.parameters()))


def test_an_optimizer_must_be_given_unless_an_engine_has_it():
    with pytest.raises(RuntimeError, match="not one of lp_dist"):
        attach(Tiny())
    with pytest.raises(ValueError, match="pass the optimizer as well"):
        shards(Tiny())


class _Wrapper:
    """Stands for one of DeepSpeed's optimizers that step by themselves; recognised by module and name."""

    __module__ = "deepspeed.runtime.somewhere"

    def __init__(self, optimizer, **attributes):
        self.optimizer = optimizer
        self.__dict__.update(attributes)


@pytest.mark.parametrize(("name", "attributes", "message"), [
    ("SuperOffloadOptimizer_Stage3", {}, "SuperOffloadOptimizer_Stage3 steps some of the weights.*super_offload"),
    ("ZenFlowZeroOptimizerSequential", {}, "ZenFlowZeroOptimizerSequential steps some.*zenflow"),
    ("DeepSpeedZeroOptimizer_Stage3", {"backup_optimizer": object()}, r"ratio < 1 steps some.*offload_optimizer.ratio to 1.0"),
    ("DeepSpeedZeroOptimizer_Stage3", {"zenflow": True}, "zenflow steps some"),
])
def test_trap_3_engines_that_step_sub_groups_by_another_optimizer_are_refused(name, attributes, message):
    ours = LpAdamW(Tiny().parameters(), weight_decay=1.0)
    with pytest.raises(RuntimeError, match=message):
        verify(type(name, (_Wrapper,), {"__module__": "deepspeed.runtime.x"})(ours, **attributes))


def test_an_untested_deepspeed_is_refused(monkeypatch):
    import importlib.metadata

    ours = LpAdamW(Tiny().parameters(), weight_decay=1.0)
    wrapper = type("DeepSpeedZeroOptimizer", (_Wrapper,), {"__module__": "deepspeed.runtime.x"})(ours)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.20.1")
    with pytest.raises(RuntimeError, match=r"knows the shards of deepspeed 0.19.x, and 0.20.1 is installed; install 'deepspeed==0.19"):
        shards(Tiny(), wrapper)


def disagreeing(rank: int, world_size: int) -> list[str]:
    """Ranks that differ in λ, in an override, in what a group holds: all of them must say so, and none hang."""
    errors = []
    for lam, overrides, names in ((0.1 + rank, {}, None), (0.1, {"0.weight": {"p": float(rank)}}, None),
                                  (0.1, {}, ["0.weight"] if rank else ["2.weight"]), (0.1, {"nothing": {"p": 0.0}} if rank else {}, None)):
        model = model_of()
        optimizer = LpAdamW(param_groups(model, lam, names=names), lr=1e-2)
        try:
            attach(model, optimizer, overrides=overrides)
            errors.append("")
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    return errors


def test_ranks_that_disagree_are_refused_on_every_rank(run_ranks):
    ranks = run_ranks(disagreeing, 2)
    assert ranks[0][:3] == ranks[1][:3]
    assert "'nothing' matches no parameter" in ranks[1][3] and ranks[0][3] == f"rank 1 could not attach its optimizer: {ranks[1][3]}"
    assert "weight_decay of group 0 is 0.1 on rank 0 and 1.1 on rank 1" in ranks[0][0]
    assert "p of 0.weight is 0.0 on rank 0 and 1.0 on rank 1" in ranks[0][1]
    assert "param group of 0.weight is 1 on rank 0 and 0 on rank 1" in ranks[0][2]


