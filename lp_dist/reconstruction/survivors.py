"""Removes weights of linear layers and moves the survivors, on the shards of an optimizer.

A row of a layer's weight is solved by itself, from the products XᵀX of the layer's inputs over the tokens of all
ranks. So a rank solves the rows that lie on it as wholes. Rows that are divided over ranks are joined by a reduction,
and each of them is solved by one rank; so are all rows of a layer that lies on a few of the ranks (as under ZeRO-1 and
2), or on several as copies (DDP), since the others would wait.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lp_dist.optim.region import Region
from lp_dist.reconstruction.budget import Budget
from lp_dist.reconstruction.inputs import InputSample
from lp_dist.reconstruction.movement import Projections
from lp_dist.reconstruction.solver import damping_for, move_survivors
from lp_dist.sharding.collectives import (
    all_gather_numbers,
    all_reduce_max,
    all_reduce_sum,
    rank_and_world_size,
    reduction_device,
)
from lp_dist.sharding.deepspeed_slices import is_linear, is_local_expert, is_transposed
from lp_dist.sharding.shards import Shard

logger = logging.getLogger(__name__)

# A layer is solved by all ranks together where one of them would have more than this many times its part to solve.
UNEVEN = 1.5


class MovableLayer(NamedTuple):
    """A linear layer whose survivors can move.

    Args:
        name: of its weight.
        module: the layer.
        transposed: whether the weight is (inputs, outputs), as in GPT-2's Conv1D.
    """

    name: str
    module: nn.Module
    transposed: bool


def movable_layers(model: nn.Module, shards: Iterable[Shard]) -> tuple[dict[str, MovableLayer], dict[str, str]]:
    """Which weights are of layers whose survivors can move.

    Args:
        model: unwrapped.
        shards: of the weights.
    Returns:
        {name of the weight: layer}; {name of another one: why it can't, in words}.
    """
    uses = modules_by_weight(model)
    layers: dict[str, MovableLayer] = {}
    reasons: dict[str, str] = {}
    for shard in shards:
        users = uses.get(id(shard.param), [])
        reason = why_not_linear(users, shard.shape) or _why_not_here(shard, users[0])
        if reason:
            reasons[shard.param_name] = reason
        else:
            layers[shard.name] = MovableLayer(shard.name, users[0], is_transposed(users[0]))
    return layers, reasons


def _why_not_here(shard: Shard, module: nn.Module) -> str:
    """Why the weight of a linear layer lies so on this rank that its rows can't be solved, in words; "" where they
    can.
    """
    if is_local_expert(shard.param):
        return "is of different experts on different ranks"
    if shard.is_on_disk:
        return "is kept on the disk by NVMe offload"
    if not shard.local.values.is_contiguous():
        return "does not lie in memory row by row"
    if shard.region is not None and (is_transposed(module) or shard.region.sizes[1:] != shard.shape[1:]):
        return "is divided along its inputs by tensor parallelism"
    return ""


def modules_by_weight(model: nn.Module) -> dict[int, list[nn.Module]]:
    """{id of a tensor: the modules whose `weight` it is}."""
    uses: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            uses.setdefault(id(weight), []).append(module)
    return uses


def is_most(moving: int, weights: int) -> bool:
    """Whether survivors of enough weights can move, so that it is done where nobody asks for it: the others have
    fewer updates then, and lose by that.
    """
    return moving > 0 and 2 * moving >= weights


def why_not_linear(users: Sequence[nn.Module], shape: Sequence[int]) -> str:
    """Why a weight is not that of one linear layer, in words; "" where it is.

    Args:
        users: the modules whose weight it is.
        shape: of the weight.
    """
    if not users or not (is_linear(users[0]) or is_transposed(users[0])) or len(shape) != 2:
        return "is of no linear layer"
    return "is shared by several modules" if len(users) > 1 else ""


class _Inputs(NamedTuple):
    """Of a layer's inputs.

    Args:
        gram: XᵀX, (inputs, inputs) fp32.
        damping: as of `move_survivors`.
    """

    gram: Tensor
    damping: float

    def solved(self, before: Tensor, after: Tensor) -> Tensor:
        """`move_survivors` of rows in any dtype on any device; returned like `after`."""
        return move_survivors(before.to(self.gram), after.to(self.gram), self.gram, damping=self.damping).to(after)


class _Weights(NamedTuple):
    """Weights of a layer on this rank, or some of them, in one shape.

    Args:
        before: copies from before some were removed.
        after: the weights, zero where they are removed.
    """

    before: Tensor
    after: Tensor

    def map(self, view: Callable[[Tensor], Tensor]) -> _Weights:
        """The same views of both."""
        return _Weights(view(self.before), view(self.after))


@dataclass(frozen=True)
class _JointRows:
    """Rows of a layer that are joined, and of which each rank solves a part.

    Args:
        rows: their numbers in the parameter, rising; int64.
        columns: elements of a row.
    """

    rows: Tensor
    columns: int


class Reconstruction:
    """Moves survivors of a model's linear layers. Collective: every rank has one, of the same layers.

    Args:
        model: unwrapped.
        shards: of the weights that may be removed.
        memory: GiB that it may take on this rank; None: as much as `TOKENS` of `budget` need.
        requested: whether a user requested it, and is to be warned of what it does not reach.
    Attributes:
        layers: {name of the weight: layer} of those whose survivors move.
        reasons: {name of another weight: why its survivors stay}.
        sample: of the layers' inputs.
        moved: how often survivors were moved.
        sampled_steps: in how many steps before an update inputs are taken; None: not known before the first update.
    Raises:
        UsageError: as of `Budget.of`.
    """

    def __init__(
        self, model: nn.Module, shards: Sequence[Shard], memory: float | None = None, requested: bool = True
    ) -> None:
        self._level = logging.WARNING if requested else logging.INFO
        self.layers, self.reasons = movable_layers(model, shards)
        if not _is_same_everywhere(sorted(self.layers)):
            names = sorted({*self.layers, *self.reasons})
            self.layers, self.reasons = {}, dict.fromkeys(names, "is of a layer that not every rank has")
        _, world_size = rank_and_world_size()
        shapes = {shard.name: shard.shape for shard in shards}
        sizes = {name: shapes[name][:: -1 if layer.transposed else 1] for name, layer in self.layers.items()}
        self._budget = Budget.of(sizes, world_size, memory)
        self.layers = {name: layer for name, layer in self.layers.items() if name not in self._budget.reasons}
        self.reasons |= self._budget.reasons
        self._shards = {shard.name: shard for shard in shards if shard.name in self.layers}
        # In one order on every rank.
        self._order = {name: number for number, name in enumerate(self.layers)}
        self._joint = self._find_joint()
        self.sample = InputSample(
            model, {name: layer.module for name, layer in self.layers.items()}, self._budget.rows
        )
        self.moved = 0
        self.sampled_steps: int | None = None
        self._said: set[str] = set()

    def prepare_step(self, to_update: int | None, interval: int) -> None:
        """Takes the inputs of the next step, or takes none.

        They are taken in as many steps before an update as it takes to see the rows that are kept: in one, where a
        step has that many tokens.

        Args:
            to_update: steps until the next update; None: there is none.
            interval: between two updates.
        """
        if to_update is None or to_update > (self.sampled_steps or interval):
            self.sample.close()
        elif not self.sample.is_open:
            self.sample.open()

    def _agree_on_inputs(self) -> None:
        """Forgets on every rank what was taken before the last save on any, since a run that is resumed from there has
        none of it. (Many loops take the state on rank 0 alone.) Collective.
        """
        if self.sample.is_open:
            self.sample.forget_before(int(all_reduce_max(torch.tensor([self.sample.saved_at], dtype=torch.int64))))

    def has_inputs(self) -> bool:
        """Whether inputs of any layer were seen, on any rank, so that weights can be removed now. Collective."""
        self._agree_on_inputs()
        seen = self.sample.is_open and any(self.sample.rows(name) for name in self.layers)
        return bool(self.layers) and bool(all_reduce_max(torch.tensor([int(seen)], dtype=torch.int64)))

    def lacks_inputs(self) -> bool:
        """Whether inputs were to be taken and none were seen, of any layer and on any rank; it is told. Collective."""
        if not self.layers or not self.sample.is_open or self.has_inputs():
            return False
        self._tell_unseen([*self.layers])
        return True

    def project(self) -> Projections:
        """Projections of the weights whose survivors move, as they are now. Collective."""
        return Projections.of([self._shards[name] for name in self._order])

    def tell_reasons(self) -> None:
        """Logs whose survivors stay where they are."""
        if not self.reasons:
            return
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        described = (
            f"{names[0]} {reason}" + (f", as {len(names) - 1} more" if len(names) > 1 else "")
            for reason, names in by_reason.items()
        )
        logger.log(self._level, "survivors stay where they are, and weights decay, where %s", "; ".join(described))

    def remove(
        self,
        names: Iterable[str],
        remove: Callable[[str], None],
    ) -> list[str]:
        """Removes weights layer by layer, and moves the survivors. Collective.

        Args:
            names: of the weights to remove from; the same on every rank. Others than `layers` are passed over.
            remove: removes weights of the parameter of this name from its shard on this rank, by setting them to zero.
        Returns:
            The names of those from which was removed: not layers of which no inputs were seen, and none where
            the sample is not open.
        """
        if not self.layers or not self.sample.is_open:  # the window may begin with the first step here
            return []
        self._agree_on_inputs()
        names = {*names}
        wanted = [name for name in self._order if name in names]
        rows = all_reduce_sum(torch.tensor([self.sample.rows(name) for name in self.layers], dtype=torch.int64)).cpu()
        seen = [name for name in wanted if rows[self._order[name]]]
        self._tell_unseen([name for name in wanted if name not in seen])
        by_source: dict[int, list[str]] = {}
        sources = self._sources()
        for name in seen:
            by_source.setdefault(sources[self._order[name]], []).append(name)
        share = self._share_of_ranks()
        for of_source in self._progress(by_source.values()):
            inputs = self._inputs_of(of_source[0], int(rows[self._order[of_source[0]]]), share)
            for name in of_source:
                self._move(name, inputs, remove)
        self.moved += bool(seen)
        self._begin_anew(share)
        return seen

    def remove_nothing(self) -> None:
        """What `remove` does where an update has nothing to remove. Collective."""
        if self.layers and self.sample.is_open:
            self._agree_on_inputs()
            self._begin_anew(self._share_of_ranks())

    def _share_of_ranks(self) -> float:
        """The share of the ranks whose tokens are not those of another rank, as those of tensor parallelism are. What
        ranks with the same tokens say of the inputs they say together. Collective.
        """
        checksums = all_gather_numbers(torch.tensor([self.sample.checksum()])).flatten()
        return len(checksums.unique()) / len(checksums)

    def _begin_anew(self, share: float) -> None:
        """Forgets the inputs of this update, and notes of how many steps they are to be for the next one.

        Args:
            share: as of `_share_of_ranks`.
        """
        a_step = share * int(all_reduce_sum(torch.tensor([round(self.sample.rows_a_step)])))
        rows_kept = self._budget.rows * rank_and_world_size()[1]
        self.sampled_steps = max(1, -(-rows_kept // max(1, round(a_step))))
        self.sample.clear()

    @staticmethod
    def _progress(layers: Collection[list[str]]) -> Iterable[list[str]]:
        """The same, with a progress bar on rank 0 from the third second on."""
        from tqdm.auto import tqdm  # not needed to import lp_dist

        rank, _ = rank_and_world_size()
        return tqdm(layers, desc="Moving survivors", unit="layer", delay=2, leave=False, disable=rank != 0)

    def _tell_unseen(self, names: list[str]) -> None:
        """Says once which layers no input was seen of."""
        unseen = [name for name in names if name not in self._said]
        if unseen:
            self._said.update(unseen)
            logger.log(
                self._level,
                "no inputs of %d layers were seen before an update, such as of %s: their survivors stay"
                " where they are, and weights decay instead. Experts that no token reached are none to worry about;"
                " else the loop has to call the model itself, in training mode, and hooks must reach its layers",
                len(unseen),
                unseen[0],
            )

    def _inputs(self, name: str) -> int:
        return self._shards[name].shape[0 if self.layers[name].transposed else 1]

    def _sources(self) -> list[int]:
        """For each layer the number of the first one that has the same inputs, on every rank."""
        first: dict[tuple[int, ...], int] = {}
        numbers = []
        for number, name in enumerate(self.layers):
            parts = self.sample.parts(name)
            numbers.append(first.setdefault(parts, number) if parts else -1)
        # A rank on which a layer had no input says nothing of it, and ranks that differ let it stand by itself.
        most = all_reduce_max(torch.tensor(numbers, dtype=torch.int64)).tolist()
        return [number if source < 0 else source for number, source in enumerate(most)]

    def _inputs_of(self, name: str, tokens: int, share: float) -> _Inputs:
        """Of a layer, over all ranks.

        Args:
            name: of the layer.
            tokens: rows of its input.
            share: of the ranks whose tokens are not those of another rank.
        """
        distributed = torch.distributed.is_initialized()
        device = reduction_device() if distributed else self._shards[name].param.device
        gram = self.sample.products(name, self._inputs(name), device)
        if distributed:
            torch.distributed.all_reduce(gram)
        return _Inputs(gram, damping_for(share * tokens, len(gram)))

    # -- one layer ------------------------------------------------------------

    def _move(self, name: str, inputs: _Inputs, remove: Callable[[str], None]) -> None:
        """Removes weights of one layer, and moves the survivors of its rows."""
        shard, transposed, joint = self._shards[name], self.layers[name].transposed, self._joint.get(name)
        before = shard.local.values.reshape(-1).clone()
        remove(name)
        after = shard.local.values.view(-1) if shard.length else before
        weights = _Weights(before, after)
        if transposed and joint is None:
            self._solve(weights.map(lambda values: values.view(shard.shape).t()), inputs)
        elif not transposed and (joint is None or len(joint.rows) < shard.shape[0]):
            columns = shard.shape[1]
            first, last = _complete_rows(shard, columns)
            if last > first:
                inside = slice(first * columns - shard.start, last * columns - shard.start)
                self._solve(weights.map(lambda values: values[inside].view(-1, columns)), inputs)
        if joint is not None:
            self._move_jointly(shard, joint, weights, inputs, transposed)

    def _move_jointly(
        self, shard: Shard, joint: _JointRows, weights: _Weights, inputs: _Inputs, transposed: bool
    ) -> None:
        """Joins rows that several ranks have parts or copies of, or that only some have, has each solved by one rank,
        and writes this rank's parts back. Collective.
        """
        rank, world_size = rank_and_world_size()
        overlaps = list(_overlaps(shard, joint))
        columns, counts = joint.columns, shard.replica == 0
        # The rows that are solved are the columns of a transposed weight, of which each chunk has a part only.
        at_a_time = len(joint.rows) if transposed else self._rows_at_a_time(columns)
        for first in range(0, len(joint.rows), at_a_time):
            end = min(first + at_a_time, len(joint.rows))
            parts = list(_clipped(overlaps, first * columns, end * columns))
            joined = torch.zeros(2, end - first, columns, device=inputs.gram.device)
            for values, rows in zip((weights.before, weights.after), joined.view(2, -1)):
                for at, position, count in parts if counts else ():
                    rows[at : at + count] = values[position : position + count].to(rows)
            torch.distributed.all_reduce(joined)
            old, new = (rows.t() if transposed else rows for rows in joined)
            solved = torch.zeros_like(new)
            for chunk in torch.arange(rank, len(new), world_size).split(self._rows_at_a_time(new.shape[1])):
                chunk = chunk.to(new.device)
                solved[chunk] = inputs.solved(old[chunk], new[chunk])
            solved = (solved.t() if transposed else solved).contiguous()
            torch.distributed.all_reduce(solved)
            for at, position, count in parts:
                weights.after[position : position + count].copy_(solved.view(-1)[at : at + count])

    def _solve(self, weights: _Weights, inputs: _Inputs) -> None:
        """Moves the survivors of rows."""
        at_a_time = self._rows_at_a_time(weights.before.shape[1])
        for first in range(0, len(weights.before), at_a_time):
            rows = weights.map(lambda values, first=first: values[first : first + at_a_time])
            rows.after.copy_(inputs.solved(rows.before, rows.after))

    def _rows_at_a_time(self, columns: int) -> int:
        return max(1, self._budget.chunk // columns)

    def _find_joint(self) -> dict[str, _JointRows]:
        """The rows of each layer that are joined. Collective: three numbers for each layer, and two of every rank for
        each whose rows are divided, as flat shards do.
        """
        _, world_size = rank_and_world_size()
        if not self.layers or world_size == 1:
            return {}
        edges, numbers = {}, []
        for name, layer in self.layers.items():
            shard = self._shards[name]
            first, last = _complete_rows(shard, shard.shape[1])
            edges[name] = [-1, -1] if layer.transposed else _edge_rows(shard)
            is_divided = max(edges[name]) >= 0
            is_part = layer.transposed and shard.length != shard.shape.numel()
            numbers.append([last - first, int(is_divided), int(is_part)])
        most = all_reduce_max(torch.tensor(numbers, dtype=torch.int64)).tolist()
        joint, divided = {}, []
        for name, (complete, is_divided, is_part) in zip(self.layers, most):
            rows, columns = self._shards[name].shape
            if is_part or complete > UNEVEN * -(-rows // world_size):
                joint[name] = _JointRows(torch.arange(rows), columns)
            elif is_divided:
                divided.append(name)
        if divided:
            gathered = all_gather_numbers(torch.tensor([row for name in divided for row in edges[name]]))
            for name, of_ranks in zip(divided, gathered.view(-1, len(divided), 2).unbind(1)):
                rows = of_ranks.unique()
                joint[name] = _JointRows(rows[rows >= 0], self._shards[name].shape[1])
        return {name: joint[name] for name in self.layers if name in joint}


def _complete_rows(shard: Shard, columns: int) -> tuple[int, int]:
    """The first row of its region that the shard has as a whole, and the first behind these."""
    first, last = -(-shard.start // columns), (shard.start + shard.length) // columns
    return first, max(first, last)


def _edge_rows(shard: Shard) -> list[int]:
    """The numbers in the parameter of the rows of which the shard has a part at its start and its end; -1: none."""
    columns, end = shard.shape[1], shard.start + shard.length
    rows = [shard.start // columns if shard.length and shard.start % columns else -1]
    rows.append(end // columns if shard.length and end % columns else -1)
    region: Region = shard.grid
    return [row if row < 0 else region.position(row * columns) // columns for row in rows]


def _overlaps(shard: Shard, joint: _JointRows) -> Iterable[tuple[int, int, int]]:
    """What the shard has of the rows: (first element in these rows, first element in the shard, count), rising."""
    columns = joint.columns
    if shard.region is None and len(joint.rows) == shard.shape[0]:  # all of them, in their order
        if shard.length:
            yield shard.start, 0, shard.length
        return
    here = {int(row): number for number, row in enumerate(shard.grid.indices(0))}
    for at, row in enumerate(joint.rows.tolist()):
        if row not in here:
            continue
        first = max(shard.start, here[row] * columns)
        last = min(shard.start + shard.length, (here[row] + 1) * columns)
        if last > first:
            yield at * columns + first - here[row] * columns, first - shard.start, last - first


def _clipped(overlaps: Iterable[tuple[int, int, int]], first: int, end: int) -> Iterable[tuple[int, int, int]]:
    """Of overlaps what lies between two elements of the rows, counted from the first of them."""
    for at, position, count in overlaps:
        low, high = max(at, first), min(at + count, end)
        if high > low:
            yield low - first, position + low - at, high - low


def _is_same_everywhere(names: list[str]) -> bool:
    """Whether all ranks have the same names. Collective."""
    digest = int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:7], "big")
    most, negated = all_reduce_max(torch.tensor([digest, -digest], dtype=torch.int64)).tolist()
    return bool(most == -negated)
