"""One rank of many, simulated by torch's fake process group: its shards, `attach`, steps and updates of a target.

The fake group communicates nothing. What a gather returns is this rank's value for each rank. Sums of integers are
this rank's, times what the model has for each element here. So sums of elements, and with them the strides of samples,
are those of the real model. Zeros in sums of floats, the squares of groups that lie on other ranks, are filled up. No
parameter is all zeros, and all have had a gradient, though perhaps on other ranks.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lp_dist.attachment import apply
from lp_dist.attachment.attach import attach
from lp_dist.attachment.attachment import Attachment
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.recording import Allocated, Collectives
from lp_dist.benchmarks.scale.models import MODELS, shard
from lp_dist.optim import batching
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.sharding import shards
from lp_dist.sparsity.selection import param_groups
from lp_dist.targets import group_controller, weight_controller
from lp_dist.targets.target import SparsityTarget

# Elements to which a local tensor is cut: its first rows, one at least where it is a matrix.
CUT = 4096
# Optimizer steps before the window, between two updates, and of the run. What an update does does not depend on them.
_START, _UPDATE_EVERY, _TOTAL = 3, 5, 1000
# Updates whose time is taken.
_TIMED_UPDATES = 3

SHARDINGS = ("FSDP2", "FSDP2 × TP")
# Of a run, in order.
PHASES = ("attach", "first update", "step", "update", "final pruning")


@dataclass(frozen=True)
class Configuration:
    """What is measured.

    Args:
        model: of MODELS.
        ranks: how many are simulated.
        rank: the simulated one.
        sharding: of SHARDINGS.
        target: "weights", or a kind of groups.
        is_cut: whether local tensors are cut to `CUT` elements, for times without a CPU's arithmetic. Else they have
            their size, for memory.
        layers: of the model; None: its usual number.
        experts: of a layer; None: its usual number.
    """

    model: str
    ranks: int
    rank: int
    sharding: str
    target: str
    is_cut: bool
    layers: int | None = None
    experts: int | None = None


@dataclass
class OtherRanks:
    """What the ranks have that do not exist.

    Args:
        factor: what sums of integers are multiplied by.
    """

    factor: int = 1


@contextmanager
def fake_ranks(rank: int, ranks: int) -> Iterator[OtherRanks]:
    """A process group in which this process is one of many ranks, and the others do not exist.

    Args:
        rank: this process's.
        ranks: all of them.
    """
    others = OtherRanks(ranks)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    all_reduce = torch.distributed.all_reduce

    def filled(tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
        pending = all_reduce(tensor, op, *args, **kwargs)
        if op == torch.distributed.ReduceOp.SUM:
            if tensor.is_floating_point():
                is_elsewhere = tensor == 0
                tensor[is_elsewhere] = torch.rand(int(is_elsewhere.sum()), dtype=tensor.dtype) + 0.5
            else:
                tensor *= others.factor
        return pending

    def without_gradient(*args: Any) -> dict[str, Any]:
        shards.without_gradient(*args)
        return {}

    def all_zero_names(located: list[shards.Shard]) -> list[str]:
        shards.all_zero_names(located)
        return []

    try:
        with (
            mock.patch.object(apply, "all_zero_names", all_zero_names),
            mock.patch.object(torch.distributed, "all_reduce", filled),
            mock.patch.object(group_controller, "without_gradient", without_gradient),
            mock.patch.object(weight_controller, "without_gradient", without_gradient),
        ):
            yield others
    finally:
        torch.distributed.destroy_process_group()


def materialise(model: nn.Module, cut: int | None) -> None:
    """Gives a sharded model of the meta device this rank's shards, with random values, and their gradients.

    Args:
        model: its parameters are DTensors. They are replaced.
        cut: the most elements of a local tensor: the first rows of the shard, one at least, and of a stack of matrices
            the first elements. The tensors' shapes, placements and meshes stay those of the model. None: all.
    """
    from torch.distributed.tensor import DTensor

    def of_local(param: Any, local: Tensor) -> Any:
        return DTensor.from_local(
            local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            shape = _cut_shape(param.to_local().shape, cut)
            values = nn.Parameter(of_local(param, torch.randn(shape).mul_(0.02)))
            values.grad = of_local(param, torch.randn(shape).mul_(1e-3))
            setattr(module, name, values)


def _cut_shape(shape: torch.Size, cut: int | None) -> torch.Size:
    if cut is None or shape.numel() <= cut:
        return shape
    if len(shape) <= 2:
        return torch.Size([max(1, cut // max(1, shape[1:].numel())), *shape[1:]])
    lengths: list[int] = []
    for length in reversed(shape):
        lengths.insert(0, min(length, max(1, cut)))
        cut //= lengths[0]
    return torch.Size(lengths)


class _Run:
    """A model on this rank with an optimizer, and what is measured of it."""

    def __init__(self, configuration: Configuration, others: OtherRanks | None) -> None:
        of_groups = configuration.target != "weights"
        shape = MODELS[configuration.model]
        self.model = shape.build(configuration.layers, configuration.experts)
        self.parameters = sum(param.numel() for param in self.model.parameters())
        shard(self.model, configuration.ranks, configuration.sharding == SHARDINGS[1])
        torch.manual_seed(configuration.rank)
        materialise(self.model, CUT if configuration.is_cut else None)
        if others is not None:
            others.factor = round(self.parameters / self.local_numel)
        self.optimizer = LpAdamW(param_groups(self.model, 0.0), lr=1e-4)
        window: dict[str, Any] = {"start": _START, "update_every": _UPDATE_EVERY}
        groups: dict[str, Any] = {"groups": configuration.target} if of_groups else {}
        self.target = SparsityTarget(0.5, **window, **groups, reconstruct=False)

    @property
    def local_numel(self) -> int:
        """Elements of this rank."""
        return sum(batching.local_values(param).numel() for param in self.model.parameters())

    @property
    def numbers(self) -> dict[str, int]:
        """Of the model and of this rank, for a row."""
        return {"parameters": self.parameters, "elements": self.local_numel}

    def attach(self) -> Attachment:
        return attach(self.model, self.optimizer, target=self.target, total_steps=_TOTAL)

    def steps_to_update(self, attached: Attachment) -> None:
        """Takes the steps before the next update, and that of the update without what follows it."""
        while True:
            self.optimizer.step()
            if attached.steps.taken >= min(controller.next_update for controller in attached.controllers):
                return
            attached.after_step()


def measure(configuration: Configuration) -> ResultRow:
    """Measures one configuration, in this process, which has no process group.

    Args:
        configuration: what to measure.
    Returns:
        The configuration, and of a cut one what `times_and_collectives` returns, else what `memory` does.
    """
    logging.getLogger("lp_dist").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with fake_ranks(configuration.rank, configuration.ranks) as others:
        measured = (times_and_collectives if configuration.is_cut else memory)(configuration, others)
        return {**asdict(configuration), **measured}


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds of this process's CPU time, which other processes of the machine do not change."""
    start = time.process_time()
    call()
    return time.process_time() - start


def times_and_collectives(configuration: Configuration, others: OtherRanks | None = None) -> dict[str, Any]:
    """Times and collectives on this rank of the process group, which may be a real one.

    Args:
        configuration: its ranks are those of the process group.
        others: of `fake_ranks`; None for real ones.
    Returns:
        "parameters" of the model, "elements" of this rank, "seconds" of attach, step, preparation and update, and
        "collectives": {phase: {kind: [calls, bytes]}}.
    """
    run = _Run(configuration, others)
    gc.collect()
    seconds = {"attach": _seconds(run.attach)}
    collectives: dict[str, Any] = {}

    def record(name: str, call: Callable[[], Any]) -> Any:
        with Collectives() as recorded:
            result = call()
        collectives[name] = {kind: list(volume) for kind, volume in recorded.by_kind().items()}
        return result

    attached = record("attach", run.attach)
    run.steps_to_update(attached)
    record("first update", attached.after_step)
    updates, steps, preparations = [], [], []
    for _ in range(_TIMED_UPDATES):
        steps.append(_seconds(run.optimizer.step))
        preparations.append(_seconds(attached.after_step))
        run.steps_to_update(attached)
        updates.append(_seconds(attached.after_step))
    seconds |= {"step": median(steps), "preparation": median(preparations), "update": median(updates)}

    def step() -> None:
        run.optimizer.step()
        attached.after_step()

    record("step", step)
    run.steps_to_update(attached)
    record("update", attached.after_step)
    record("final pruning", attached.finish)
    return {**run.numbers, "seconds": seconds, "collectives": collectives}


def memory(configuration: Configuration, others: OtherRanks | None = None) -> dict[str, Any]:
    """Bytes at full size on this rank of the process group, with tiles as large as on an accelerator.

    Args:
        configuration: as of `times_and_collectives`.
        others: as there.
    Returns:
        "parameters" and "elements" as there; "bytes": of the "training state" (weights, gradients and two moments),
        and the most "beyond" it by phase; "seconds" of an update with a CPU's arithmetic.
    """
    run = _Run(configuration, others)
    gc.collect()
    tile_sizes = mock.patch.dict(batching.TILE_SIZE, {"cpu": batching.TILE_SIZE_ACCELERATOR})
    with tile_sizes, Allocated() as allocated:
        allocated.mark("attach")
        attached = run.attach()
        allocated.mark("first update")
        run.steps_to_update(attached)
        attached.after_step()
        allocated.mark("step")
        run.steps_to_update(attached)
        allocated.mark("update")
        seconds = _seconds(attached.after_step)
        allocated.mark("final pruning")
        attached.finish()
        allocated.mark("end")
    moments = 2 * 4 * run.local_numel
    # They are made in the first step, after `attach`.
    beyond = {name: max(0, peak - moments * (name != "attach")) for name, peak in allocated.peak.items()}
    return {
        **run.numbers,
        "bytes": {"training state": 2 * moments, "beyond": {name: beyond[name] for name in PHASES}},
        "seconds": {"update": seconds},
    }
