"""The Lp decay of whole groups of weights, around the step of any optimizer, on the shards that it steps.

All weights of a group are divided by one number. The norm of the group takes the place of a single weight's
magnitude:

    w_new = u / (1 + α·λ/x)        x = ‖w_old ⊙ (√v̂+ε)^(γ/(2−p))‖_2^(2−p)        over the weights of the group

This is the step of `lp_dist.optim.decay` for the penalty (λ/p)·Σ_g‖w_g‖^p. For groups of one weight it is the same
step (γ = 0 is the plain form). x is the saliency of the group.

The norms are those from before the step. A group may lie on several ranks: each rank adds up the squares of what it
has, and one all-reduce of a vector with a number for each group gives the norms. The all-reduce starts when a step
ends and is waited for in the next step, so that forward and backward hide it. Squares are added in double precision.
The sums then do not depend on the sharding, except for one in some millions after rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.optim.decay import SNAP
from lp_dist.optim.hooks import handle_of
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.collectives import reduction_device
from lp_dist.sharding.shards import LocalShard, Shard
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.placement import MatrixShard, matrix_shards

# State tensors that would move a group away from zero.
_MOMENTA = ("exp_avg", "momentum_buffer")


@dataclass(frozen=True)
class DecaySettings:
    """The decay of a set of groups. By default nothing decays.

    Args:
        weight_decay: λ.
        cutoff: groups whose saliency is above it do not decay.
        regrowth_below: groups whose saliency is below it decay no faster than at it.
    """

    weight_decay: float = 0.0
    cutoff: float = math.inf
    regrowth_below: float = 0.0


class _KeptZero(NamedTuple):
    """A block of a parameter in which some rows (dim 0) or columns (dim 1) are written to zero in each step.

    Args:
        shard: of the parameter.
        start: the block's first element in the shard.
        shape: (matrices, rows, columns).
        dim: of each matrix, whose indices are written.
        indices: which ones; int64, (count, 2): the matrix, and the index in it.
    """

    shard: Shard
    start: int
    shape: torch.Size
    dim: int
    indices: Tensor

    def write(self, values: Tensor) -> None:
        """Writes the zeros. values: of the shard, or of one of its states."""
        block = values.reshape(-1)[self.start : self.start + self.shape.numel()].view(self.shape)
        if self.dim == 0:
            block.flatten(0, 1).index_fill_(0, self.indices[:, 0] * self.shape[1] + self.indices[:, 1], 0.0)
        elif len(block) == 1:
            block[0].index_fill_(1, self.indices[:, 1], 0.0)
        else:
            block.transpose(1, 2)[self.indices[:, 0], self.indices[:, 1]] = 0.0


# Groups whose factors are computed at a time, at least: the temporaries are of so many numbers, whatever the model.
CHUNK = 1 << 18


class GroupDecayHook:
    """Decays groups in every step of an optimizer, until `remove`. Every rank has one, of the same groups.

    Args:
        optimizer: the inner optimizer.
        sets: the groups.
        shards: of all parameters that it steps.
        p: exponent of the penalty, below 2.
        precondition: γ of the saliency; above 0 the optimizer needs second moments.
        interval: optimizer steps between two decays. Each decay is for the learning rates of all steps since the last
            one, with the norms from before the last of them. This is cheaper by that factor and less exact, since
            gradients move the groups freely in between.
    Raises:
        UsageError: a group has weights that this optimizer does not step, or that lie on this rank in a way that is
            not supported.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sets: list[WeightGroups],
        shards: list[Shard],
        *,
        p: float = 0.5,
        precondition: float = 0.0,
        interval: int = 1,
    ) -> None:
        self.optimizer, self.sets, self.p, self.precondition, self.interval = (
            optimizer,
            sets,
            p,
            precondition,
            interval,
        )
        self.settings = [DecaySettings() for _ in sets]
        self.matrices = matrix_shards(sets, shards)
        device = self.matrices[0].shard.tensor.device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.counts = torch.tensor([groups.count for groups in sets])
        self.sizes = self.per_group([float(groups.elements) for groups in sets], device)
        self._counts_here = self.counts.to(device)
        self._chunks = _chunks([groups.count for groups in sets])
        self._kept_zero: dict[int, list[_KeptZero]] = {}  # by the tensor that the optimizer steps
        # Groups without the weights that read them have gradients at zero, and so have the last biases of experts. The
        # momentum that would grow from these looks like a latent weight to a target of single weights, so it is set
        # to zero as well.
        self._zeroed_states = (
            _MOMENTA
            if any(groups.followers or not any(member.reads for member in groups.members) for groups in sets)
            else ()
        )
        self._squares: Tensor | None = None
        self._reduction: Any = None
        self._up_to_date = False  # whether the squares are those of the weights as they are
        self._in_step = False  # whether a step has begun
        self._stepped: set[int] = set()  # tensors that were stepped since it began
        self._cached_settings: tuple[list[DecaySettings], list[Tensor]] | None = None
        self._decays = False  # whether this step decays
        self._snap = (
            SNAP
            * min((group["eps"] for group in optimizer.param_groups if precondition), default=1.0)
            ** (precondition / (2.0 - p))
        ) ** 2
        self.cached_factors: dict[tuple[int, torch.device], Tensor] = {}  # of this step, by param group and device
        self.steps = 0  # since the last decay
        self.rates: dict[int, Any] = {}  # learning rates summed over these steps, by param group
        self._summed_groups: set[int] = set()  # param groups whose learning rate of this step is in the sum
        # Above 0 where AMP's GradScaler lets a fused optimizer skip this step by itself. The host never reads it.
        self._skipped: Tensor | None = None
        self._param_group_of = {id(matrix.shard.tensor): matrix.shard.group for matrix in self.matrices}
        # A copy, since ZeRO-1 and 2 leave the optimizer only one of its param groups while it steps.
        self._param_groups = list(optimizer.param_groups)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(lambda _: self.forget()),
        ]
        handle = handle_of(optimizer)
        if handle is not None:
            # Its own hook may step parameters.
            handle.begin_later()

    def remove(self) -> None:
        """Ends the decay."""
        for handle in self._handles:
            handle.remove()

    @property
    def active(self) -> bool:
        """Whether any group decays."""
        return any(settings.weight_decay > 0.0 for settings in self.settings)

    # -- norms ----------------------------------------------------------------

    def measure(self) -> None:
        """Starts to add up the squares of the current weights, unless that was done. Collective; `squares` waits."""
        if self._up_to_date:
            return
        self.forget()
        self._squares = self._local_squares(lambda shard: shard.local, self.precondition)
        self._up_to_date = True
        if torch.distributed.is_initialized():
            self._squares = self._squares.to(reduction_device())
            self._reduction = torch.distributed.all_reduce(self._squares, async_op=True)

    @property
    def squares(self) -> Tensor:
        """‖w ⊙ (√v̂+ε)^(γ/(2−p))‖² of each group at the last `measure`, the sets one after the other.

        Returns:
            (number of groups,) fp64; fp32 on MPS.
        """
        assert self._squares is not None
        if self._reduction is not None:
            self._reduction.wait()
            self._squares, self._reduction = self._squares.to(self.sizes.device), None
        return self._squares[:-1]

    def forget(self) -> None:
        """Call it after the weights were changed from outside: the squares are then measured again."""
        if self._reduction is not None:
            self._reduction.wait()
        self._reduction, self._up_to_date = None, False

    def squares_of_copies(self) -> Tensor:
        """‖w‖² of each group in the model's own copy, which a save of the model writes; measured now. Collective.

        Returns:
            As `squares`.
        """
        sums = self._local_squares(lambda shard: shard.copy, 0.0)
        if torch.distributed.is_initialized():
            sums = sums.to(reduction_device())
            torch.distributed.all_reduce(sums)
        return sums.to(self.sizes.device)[:-1]

    def _local_squares(self, local_of: Callable[[Shard], LocalShard], precondition: float) -> Tensor:
        """This rank's share of the squares, with a last element for weights of no group."""
        sums: dict[torch.device, Tensor] = {}
        for matrix in self.matrices:
            shard, local = matrix.shard, local_of(matrix.shard)
            counted, first = local.counted.reshape(-1), local.counted_start
            device = counted.device
            if device not in sums:
                sums[device] = torch.zeros(len(self.sizes) + 1, dtype=self.dtype, device=device)
            for block in matrix.blocks(counted, first):
                values = block.values
                if precondition:
                    values = values * self.preconditioner(shard, first - local.start + block.start, values)
                squares = torch.square(values.to(self.dtype))
                for dim, numbers in block.numbers.items():
                    # Of an offloaded master they are on the host, and those of its copy are asked for elsewhere.
                    of_lines = squares.sum(2 - dim)
                    sums[device].index_add_(0, numbers.flatten().to(device), of_lines.flatten())
        first_sum, *other_sums = sums.values()
        return sum((other.to(first_sum.device) for other in other_sums), first_sum)

    def preconditioner(self, shard: Shard, start: int, values: Tensor) -> Tensor | float:
        """(√v̂+ε)^(γ/(2−p)) of a tile of the local shard, which begins at its element `start`."""
        group, state = self._param_groups[shard.group], shard.state
        exponent, eps = self.precondition / (2.0 - self.p), group["eps"]
        if not state:
            # Without a gradient so far, v̂ is 0.
            return eps**exponent
        bias = (1 - float(group["betas"][1]) ** float(shard.state_of(shard.tensor)["step"])) ** 0.5
        second = state["exp_avg_sq"].reshape(-1)[start : start + values.numel()].view_as(values)
        # Not pow_, whose last bit on a CPU depends on where in a vector an element lies, so on the sharding; log and
        # exp have one code for all, and are faster.
        return (
            (second.to(torch.promote_types(second.dtype, torch.float32)).sqrt() / bias)
            .add_(eps)
            .log_()
            .mul_(exponent)
            .exp_()
        )

    # -- around a step --------------------------------------------------------

    def after_step(self) -> None:
        """May be called after an engine's step: starts to measure for the next step, so that forward and backward hide
        the all-reduce.
        """
        self._end()
        if self._acts() and self.steps + 1 >= self.interval:
            self.measure()

    def _acts(self) -> bool:
        # Before the first step there are no second moments, so every saliency would be near zero.
        return self.active and not (self.precondition and not steps_taken(self.optimizer))

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Takes the norms in the first call of a step; an engine may step its tensors in several calls."""
        rates = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
        if not self._in_step or rates.keys() & self._stepped:
            self._begin()
        self._skipped = getattr(optimizer, "found_inf", None)
        for tensor, rate in rates.items() if self.steps else ():
            group = self._param_group_of.get(tensor)
            if group is not None and group not in self._summed_groups:
                self._summed_groups.add(group)
                self.rates[group] = self.rates.get(group, 0.0) + (
                    rate if self._skipped is None else torch.where(self._skipped > 0, 0.0, rate)
                )

    def _end(self) -> None:
        if self._decays:
            self.rates = self._skipped_rates()
            self._decays, self.steps = False, 0

    def _skipped_rates(self) -> dict[int, Any]:
        """The summed learning rates that are still to be decayed for after a decay: all of them where the optimizer
        skipped that step.
        """
        return (
            {}
            if self._skipped is None
            else {group: torch.where(self._skipped > 0, rate, 0.0) for group, rate in self.rates.items()}
        )

    def _begin(self) -> None:
        if len(self.optimizer.param_groups) == len(self._param_groups):
            # Loading a state makes new param groups.
            self._param_groups = list(self.optimizer.param_groups)
        self._end()
        self._in_step, self._stepped, self.cached_factors, self._summed_groups = True, set(), {}, set()
        if self._acts():
            self.steps += 1
            self._decays = self.steps >= self.interval
        if self._decays:
            self.measure()

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        stepped = {
            id(tensor) for group in optimizer.param_groups for tensor in group["params"] if tensor.grad is not None
        }
        self._stepped |= stepped
        if not stepped:
            return
        self._up_to_date = False
        if self._decays:
            for matrix in self.matrices:
                if id(matrix.shard.tensor) in stepped:
                    self._scale(matrix, self.factor(matrix.shard, self._skipped))
        for kept in (kept for tensor in stepped for kept in self._kept_zero.get(tensor, ())):
            state = kept.shard.state if self._zeroed_states else {}
            for values in (kept.shard.local.values, *(state[name] for name in self._zeroed_states if name in state)):
                kept.write(values)

    def factor(self, shard: Shard, skipped: Tensor | None) -> Tensor:
        """What the weights of each group are multiplied by, with a last element 1 for weights of no group.

        Returns:
            (number of groups + 1,) on the shard's device.
        """
        key = shard.group, shard.tensor.device
        if key not in self.cached_factors:
            rate, squares = self.rates[shard.group], self.squares
            if isinstance(rate, Tensor):
                rate = rate.to(squares.device)
            factors = squares.new_ones(len(squares) + 1)
            for chunk in self._chunks:
                factors[chunk.groups] = self._factor(chunk, rate, squares[chunk.groups])
            if skipped is not None:
                factors.masked_fill_(skipped.to(factors.device) > 0, 1.0)
            self.cached_factors[key] = factors.to(shard.tensor.device)
        return self.cached_factors[key]

    def _factor(self, chunk: _Chunk, rate: float | Tensor, squares: Tensor) -> Tensor:
        """`factor` of some of the groups, whose squares these are."""
        settings, counts = self._settings_per_set(), self._counts_here[chunk.sets]
        weight_decay, cutoff, regrowth_below = (
            column[chunk.sets].repeat_interleave(counts, output_size=len(squares)) for column in settings
        )
        x = squares.pow((2.0 - self.p) / 2.0)
        factor = 1.0 / (1.0 + rate * weight_decay / torch.maximum(x, regrowth_below))
        decays = (x <= cutoff) & (weight_decay > 0.0)
        return torch.where(decays, torch.where(squares <= self.sizes[chunk.groups] * self._snap, 0.0, factor), 1.0)

    def _settings_per_set(self) -> list[Tensor]:
        """λ, cutoff and `regrowth_below` of each set; made anew when one of them has changed."""
        if self._cached_settings is None or self._cached_settings[0] != self.settings:
            columns = zip(*map(astuple, self.settings))
            tensors = [torch.tensor(column, dtype=self.dtype, device=self.sizes.device) for column in columns]
            self._cached_settings = list(self.settings), tensors
        return self._cached_settings[1]

    def _scale(self, matrix: MatrixShard, factors: Tensor, names: tuple[str, ...] = ()) -> None:
        """Multiplies the weights, and the states of these names, by the factors of their groups, in place."""
        local, state = matrix.shard.local, matrix.shard.state if names else {}
        for values in (local.values, *(state[name] for name in names if name in state)):
            for block in matrix.blocks(values.reshape(-1), local.start):
                for numbers in block.numbers.values():
                    block.values.mul_(factors[numbers].to(values.dtype))

    def state_dict(self) -> dict[str, Any]:
        """The state between two decays, in plain JSON types."""
        # A step that decayed may be over without a call of `after_step`.
        rates = self._skipped_rates() if self._decays else self.rates
        return {
            "steps": 0 if self._decays else self.steps,
            "rates": {str(i): float(rate) for i, rate in rates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`. Call it after the weights were loaded."""
        self.steps, self.rates = state["steps"], {int(i): rate for i, rate in state["rates"].items()}
        self._decays, self._in_step = False, False
        self.forget()

    # -- pruning --------------------------------------------------------------

    @torch.no_grad()
    def prune(self, dead: Tensor, name: str | None = None) -> None:
        """Sets groups to zero, weights and momentum.

        Args:
            dead: (number of groups,) bool, which ones.
            name: of a parameter, whose weights alone are meant; None: of all.
        """
        factors = torch.cat([(~dead).to(self.dtype), torch.ones(1, dtype=self.dtype, device=dead.device)])
        for matrix in (matrix for matrix in self.matrices if name in (None, matrix.shard.name)):
            self._scale(matrix, factors.to(matrix.shard.tensor.device), _MOMENTA)
        self.forget()

    def keep_zero(self, dead: Tensor | None) -> None:
        """Keeps groups at zero from now on, at the cost of writing their zeros in each step.

        Args:
            dead: (number of groups,) bool, which ones; None: no group.
        """
        self._kept_zero = {}
        if dead is None:
            return
        for matrix in self.matrices:
            shard = matrix.shard
            is_dead = torch.cat([dead, dead.new_zeros(1)]).to(shard.tensor.device)
            values = shard.local.values.reshape(-1)
            for block in matrix.blocks(values, shard.start, max_elements=None):
                for dim, numbers in block.numbers.items():
                    indices = torch.nonzero(is_dead[numbers.squeeze(2 - dim)])
                    if len(indices):
                        self._kept_zero.setdefault(id(shard.tensor), []).append(
                            _KeptZero(shard, block.start, block.values.shape, dim, indices)
                        )

    def per_group(self, values: list[float], device: torch.device | None = None) -> Tensor:
        """A value of each set as one of each group.

        Returns:
            (number of groups,), in the dtype of `squares`.
        """
        return torch.tensor(values, dtype=self.dtype).repeat_interleave(self.counts).to(device or self.sizes.device)


class _Chunk(NamedTuple):
    """Neighbouring sets, and their groups among those of all sets."""

    sets: slice
    groups: slice


def _chunks(counts: list[int]) -> list[_Chunk]:
    """All sets, of which these are the numbers of groups, in chunks of `CHUNK` groups or more."""
    chunks: list[_Chunk] = []
    first_set = first = last = 0
    for i, count in enumerate(counts, 1):
        last += count
        if last - first >= CHUNK or i == len(counts):
            chunks.append(_Chunk(slice(first_set, i), slice(first, last)))
            first_set, first = i, last
    return chunks
