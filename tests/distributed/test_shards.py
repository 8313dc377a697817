"""The shards of every engine: located, named, counted, and with overrides. One group of ranks runs all engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.engines import ZERO, Engine, gathered, gloo_adds, make
from lp_dist import LpAdamW, attach, measure_histogram, measure_sparsity, param_groups
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.shards import locate_shards

DECAYED = {"0.weight", "2.weight", "3.weight", "4.weight"}
OVERRIDES = {
    "0.weight": {"p": 0.0, "weight_decay": 0.2},
    "[23].weight": {"weight_decay": 0.4},
    "3.weight": {"cutoff": 0.5, "l2": 0.1},
}
STEPS = 4


def model_of() -> nn.Sequential:
    """Uneven sizes, a frozen parameter, a last layer of one row, so that FSDP2 leaves a rank without its elements."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False), nn.Linear(5, 3), nn.Linear(3, 1)
    )
    model[3].bias.requires_grad_(False)
    return model


def optimizer_of(model: nn.Module) -> LpAdamW:
    return LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0)


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
            loss = engine(batch(step, rank).to(dtype_of(kind))).float().square().mean()
            # Adam does not notice a gradient that is twice as large, but for its eps, which is compared here.
            engine.step(loss / world_size if kind == "fsdp2" and gloo_adds() else loss)
        results[kind] = examine(engine, attached, engine.optimizer if alone else engine.handle.optimizer)
        if hasattr(engine.handle, "destroy"):
            engine.handle.destroy()
    return results


def examine(engine: Engine, attached, optimizer) -> dict:
    """What this rank knows of an engine's shards; the test checks it."""
    unsharded = gathered(engine)
    names = [shard.name for shard in attached.shards]
    shards = {
        shard.name: (shard.start, shard.local.values.float().flatten().clone(), shard.shape, set(shard.state))
        for shard in attached.shards
    }
    param_slices = [
        (segment, shard.tensor.numel())
        for shard in attached.shards
        for segment in attached.optimizer.parameter_map.of(shard.tensor)
    ]
    before = unsharded["0.weight"].clone()
    counts, masters = (measure_sparsity(engine.handle, which, names=names).counts for which in (None, optimizer))
    histogram = measure_histogram(engine.handle, names=names)
    # A value written through the view changes the master, as locating it again shows.
    first = attached.shards[0]
    if first.length:
        first.local.values.view(-1)[0] = 0.25
    again = next(shard for shard in locate_shards(engine.handle, optimizer) if shard.name == first.name)
    return {
        "names": names,
        "decayed": set(attached.decayed),
        "steps": steps_taken(attached.optimizer),
        "shards": shards,
        "before": before,
        "param_slices": param_slices,
        "unsharded": {name: tensor.float() for name, tensor in unsharded.items()},
        "counts": counts,
        "masters": masters,
        "histogram": histogram,
        "written": not first.length or again.local.values.view(-1)[0].item() == 0.25,
        "overridden": attached.optimizer.parameter_map.values("3.weight"),
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
            for name, tensor in result["unsharded"].items():
                if (
                    "bf16" in kind
                ):  # other gradients; that these are right is test_matrix.py's. The overrides show all the same.
                    if name == "3.weight":
                        assert (tensor - wanted[name]).norm() < 0.5 * (tensor - plain[name]).norm(), where
                    continue
                torch.testing.assert_close(
                    tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{where}: {name}: {m}"
                )
                assert torch.equal(tensor == 0, wanted[name] == 0), where
            for name, (start, values, shape, states) in result["shards"].items():
                inside = result["unsharded"][name].flatten()[start : start + values.numel()]
                torch.testing.assert_close(
                    values.to(dtype_of(kind)).float(), inside, rtol=0, atol=0, msg=lambda m: f"{where}: {name}: {m}"
                )
                assert shape == wanted[name].shape and states == {"exp_avg", "exp_avg_sq"}, where
            for param_slice, numel in result["param_slices"]:
                assert (
                    param_slice.offset + param_slice.length <= numel
                    and param_slice.start + param_slice.length <= param_slice.shape.numel()
                ), where
        for name in trainable:
            counted, full = results[0]["counts"][name], results[0]["unsharded"][name]
            assert counted == (int((full == 0).sum()), full.numel()), (kind, name)
            covered = sorted((r["shards"][name][0], r["shards"][name][1].numel()) for r in results)
            if kind == "ddp" or kind.startswith("zero0"):
                assert covered == [(0, full.numel())] * world_size, (kind, name)
            else:  # disjoint, and complete: nothing twice, nothing left out, no padding
                nonempty = [(start, length) for start, length in covered if length]
                ends = [0] + [start + length for start, length in nonempty]
                assert [start for start, _ in nonempty] + [full.numel()] == ends, (kind, name, covered)
        histogram = results[0]["histogram"]
        for name in trainable:
            check_histogram(histogram, name, results[0]["counts"][name])
    sizes = {kind: [r["shards"]["4.weight"][1].numel() for r in (rank[kind] for rank in ranks)] for kind in ranks[0]}
    assert (
        0 in sizes["fsdp2"] and 0 in sizes["zero2"]
    )  # ranks without elements of a parameter are among what was tested


def check_histogram(histogram, name: str, counts: tuple[int, int]) -> None:
    zeros, elements = counts
    assert histogram.zeros[name] == zeros
    assert sum(histogram.counts[name]) + zeros == elements


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embed(x))))


def tied(rank: int, world_size: int) -> dict:
    results = {}
    for kind in ("ddp", "zero1", "zero2", "zero3"):
        engine = make(kind, Tied(), lambda model: LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0))
        attached = attach(engine.handle, engine.optimizer if kind == "ddp" else None)
        for _ in range(2):
            engine.step(engine(torch.arange(7)).square().mean())
        names = [shard.name for shard in attached.shards]
        results[kind] = (
            names,
            sorted(attached.decayed),
            measure_sparsity(engine.handle, names=names).elements,
            gathered(engine)["embed.weight"],
        )
    return results


def test_a_tied_parameter_comes_once(run_ranks):
    first, second = run_ranks(tied, 2)
    for kind, (names, decayed, elements, weight) in first.items():
        assert (
            names == ["embed.weight", "body.weight", "body.bias"] and decayed == ["body.weight"] and elements == 65
        ), kind
        torch.testing.assert_close(weight, first["ddp"][3], rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, second[kind][3]), kind
