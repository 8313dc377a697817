"""The Lp decay of whole groups of weights (`structure.py`), around the step of any optimizer, on the shards that it
steps.

A group's weights are all divided by one number, and its norm takes the place of a single weight's magnitude:

    w_new = u / (1 + α·λ/x)        x = ‖w_old ⊙ (√v̂+ε)^(γ/(2−p))‖_2^(2−p)        over the weights of the group

which is the step of `decay.py` for the penalty (λ/p)·Σ_g‖w_g‖^p, and for groups of one weight the same (γ = 0 is the
plain form). The norms are those from before the step. A group may lie on several ranks: each adds up the squares of
what it has, and one reduction of a vector of as many numbers as there are groups makes the norms of it. It begins when
a step ends, and is waited for when the next one does, so that it hides behind forward and backward. Squares are added
in double precision, so that the sums do not depend on how the weights are shared out, to one in some millions after
rounding.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.optim.decay import SNAP
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.collectives import reduction_device
from lp_dist.sharding.shards import Shard
from lp_dist.structured.groups import Groups
from lp_dist.structured.placement import Place, blocks, places_of

_MOMENTA = ("exp_avg", "momentum_buffer")  # of a group that has died they would move it


@dataclass(frozen=True)
class Force:
    """What acts on a set of groups, in the terms of `decay.py`; nothing does at first. floor: x is taken as at least
    this.
    """

    weight_decay: float = 0.0
    cutoff: float = math.inf
    floor: float = 0.0


class Grouped:
    """Decays groups in every step of an optimizer, from the moment it is made until `remove`. Every rank has one of
    the same groups.

    Args:
        optimizer: the live one. sets: the groups. shards: of all parameters that it steps. p, precondition: of the
            form above.
        interval: optimizer steps between two decays. Each is then for the learning rates of all the steps since the
            last one, and the norms are those before the last of them: cheaper by that factor, and less exact, since in
            between what is to die is pulled back freely.
    Raises:
        UsageError: a group has weights that this optimizer does not step, or that lie on this rank in a way that is
            not known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sets: list[Groups],
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
        self.forces = [Force() for _ in sets]
        self.places = places_of(sets, shards)
        device = self.places[0].shard.tensor.device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.counts = torch.tensor([groups.count for groups in sets])
        self.sizes = self.each([float(groups.elements) for groups in sets], device)
        self._held: dict[int, list[tuple[Shard, int, int, int, int, Tensor]]] = {}
        # Where nothing that reads it is in a group, its weights have gradients at zero, by which a momentum would grow
        # that a target of single weights takes for what it hides.
        self._moving = _MOMENTA if any(not any(member.reads for member in groups.members) for groups in sets) else ()
        self._squares: Tensor | None = None
        self._reduction: Any = None
        self._fresh = False  # whether the squares are those of the weights as they are
        self._open = False  # whether there was a step
        self._stepped: set[int] = set()  # tensors that it has stepped
        self._made: tuple[list[Force], list[Tensor]] | None = None
        self._decays = False  # whether it decays in this step
        self._snap = (
            SNAP
            * min((group["eps"] for group in optimizer.param_groups if precondition), default=1.0)
            ** (precondition / (2.0 - p))
        ) ** 2
        self._factors: dict[tuple[int, torch.device], Tensor] = {}
        self.steps = 0  # since the last decay
        self.rates: dict[int, Any] = {}  # learning rates summed over them, by param group
        self._counted: set[int] = set()  # param groups whose rate of this step is in there
        # > 0 where AMP's GradScaler has a fused base leave out this step by itself; never looked at by the host
        self._skipped: Tensor | None = None
        self._group_of = {id(place.shard.tensor): place.shard.group for place in self.places}
        self._groups = list(optimizer.param_groups)  # ZeRO-1 and 2 leave the optimizer one of them while it steps
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(lambda _: self.forget()),
        ]
        if hasattr(optimizer, "lp_decay"):
            optimizer.lp_decay.begin_later()  # it may step parameters in its own hook

    def remove(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()

    @property
    def active(self) -> bool:
        """Whether any group decays."""
        return any(force.weight_decay > 0.0 for force in self.forces)

    # -- norms ----------------------------------------------------------------

    def measure(self) -> None:
        """Begins to add up the squares of the weights as they are now, unless that was done. Collective; `squares`
        waits for it.
        """
        if self._fresh:
            return
        self.forget()
        self._squares, self._fresh = self._local_squares(), True
        if torch.distributed.is_initialized():
            self._squares = self._squares.to(reduction_device())
            self._reduction = torch.distributed.all_reduce(self._squares, async_op=True)

    @property
    def squares(self) -> Tensor:
        """Of each group ‖w ⊙ (√v̂+ε)^(γ/(2−p))‖² when it was measured last, in fp64, the sets one after the other."""
        assert self._squares is not None
        if self._reduction is not None:
            self._reduction.wait()
            self._squares, self._reduction = self._squares.to(self.sizes.device), None
        return self._squares[:-1]

    def forget(self) -> None:
        """The weights were changed: they are measured anew before they are needed."""
        if self._reduction is not None:
            self._reduction.wait()
        self._reduction, self._fresh = None, False

    def _local_squares(self) -> Tensor:
        sums = {
            place.shard.tensor.device: torch.zeros(
                len(self.sizes) + 1, dtype=self.dtype, device=place.shard.tensor.device
            )
            for place in self.places
        }
        for place in self.places:
            piece, shard = place.shard.piece, place.shard
            values, first = piece.share.reshape(-1), piece.first
            for at, block, rows, columns in blocks(values, first, place.width):
                if self.precondition:
                    block = block * self._sensitivity(shard, first - piece.start + at, block)
                squares = torch.square(block.to(self.dtype))
                for dim, number in place.of.items():
                    sums[values.device].index_add_(0, number[(rows, columns)[dim]], squares.sum(1 - dim))
        first_sum, *others = sums.values()
        return sum((other.to(first_sum.device) for other in others), first_sum)

    def _sensitivity(self, shard: Shard, start: int, block: Tensor) -> Tensor | float:
        """(√v̂+ε)^(γ/(2−p)) of a block of its piece, which begins at the element `start` of it."""
        group, state = self._groups[shard.group], shard.state
        exponent, eps = self.precondition / (2.0 - self.p), group["eps"]
        if not state:  # without a gradient so far the loss is not sensitive to it
            return eps**exponent
        bias = (1 - float(group["betas"][1]) ** float(shard.state_of(shard.tensor)["step"])) ** 0.5
        second = state["exp_avg_sq"].reshape(-1)[start : start + block.numel()].view_as(block)
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
        """May be called when an engine's step is over: what the next one needs is measured now, and reduced behind
        forward and backward.
        """
        self._end()
        if self._acts() and self.steps + 1 >= self.interval:
            self.measure()

    def _acts(self) -> bool:
        # Before the first step there are no second moments, and everything would seem to be without effect.
        return self.active and not (self.precondition and not steps_taken(self.optimizer))

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """An engine may step its tensors in several calls. The first of them takes the norms for all."""
        rates = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
        if not self._open or rates.keys() & self._stepped:
            self._begin()
        self._skipped = getattr(optimizer, "found_inf", None)
        for tensor, rate in rates.items() if self.steps else ():
            group = self._group_of.get(tensor)
            if group is not None and group not in self._counted:
                self._counted.add(group)
                self.rates[group] = self.rates.get(group, 0.0) + (
                    rate if self._skipped is None else torch.where(self._skipped > 0, 0.0, rate)
                )

    def _end(self) -> None:
        if self._decays:
            self.rates = self._owed()
            self._decays, self.steps = False, 0

    def _owed(self) -> dict[int, Any]:
        """The learning rates for which nothing has decayed when the step of a decay is over: those of all, where that
        step was left out.
        """
        return (
            {}
            if self._skipped is None
            else {group: torch.where(self._skipped > 0, rate, 0.0) for group, rate in self.rates.items()}
        )

    def _begin(self) -> None:
        if len(self.optimizer.param_groups) == len(self._groups):
            self._groups = list(self.optimizer.param_groups)  # loading a state makes new ones
        self._end()
        self._open, self._stepped, self._factors, self._counted = True, set(), {}, set()
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
        self._fresh = False
        if self._decays:
            for place in self.places:
                if id(place.shard.tensor) in stepped:
                    self._scale(place, self._factor(place.shard, self._skipped))
        for shard, at, rows, columns, dim, which in (
            held for tensor in stepped for held in self._held.get(tensor, ())
        ):
            state = shard.state if self._moving else {}
            for values in (shard.piece.values, *(state[name] for name in self._moving if name in state)):
                values.reshape(-1)[at : at + rows * columns].view(rows, columns).index_fill_(dim, which, 0.0)

    def _factor(self, shard: Shard, skipped: Tensor | None) -> Tensor:
        """What the weights of each group are multiplied by, and 1 for those of none, on the shard's device."""
        key = shard.group, shard.tensor.device
        if key not in self._factors:
            strength, squares = self.rates[shard.group], self.squares
            if isinstance(strength, Tensor):
                strength = strength.to(squares.device)
            weight_decay, cutoff, floor = self._values()
            x = squares.pow((2.0 - self.p) / 2.0)
            factor = 1.0 / (1.0 + strength * weight_decay / torch.maximum(x, floor))
            decays = (x <= cutoff) & (weight_decay > 0.0)
            factor = torch.where(decays, torch.where(squares <= self.sizes * self._snap, 0.0, factor), 1.0)
            if skipped is not None:
                factor = torch.where(skipped.to(factor.device) > 0, 1.0, factor)
            self._factors[key] = torch.cat([factor, factor.new_ones(1)]).to(shard.tensor.device)
        return self._factors[key]

    def _values(self) -> list[Tensor]:
        """λ, cutoff and floor of each group; made anew when one of them has changed."""
        if self._made is None or self._made[0] != self.forces:
            self._made = list(self.forces), [self.each(list(values)) for values in zip(*map(astuple, self.forces))]
        return self._made[1]

    def _scale(self, place: Place, factors: Tensor, names: tuple[str, ...] = ()) -> None:
        """Multiplies the weights, and the state of these names, by the factors of their groups, in place (all lie row
        by row).
        """
        piece, state = place.shard.piece, place.shard.state if names else {}
        for values in (piece.values, *(state[name] for name in names if name in state)):
            for _, block, rows, columns in blocks(values.reshape(-1), piece.start, place.width):
                for dim, number in place.of.items():
                    some = factors[number[(rows, columns)[dim]]].to(block.dtype)
                    block.mul_(some[:, None] if dim == 0 else some)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types: where it stands between two decays."""
        rates = self._owed() if self._decays else self.rates  # of a step that is over, and whose end nobody has told
        return {
            "steps": 0 if self._decays else self.steps,
            "rates": {str(i): float(rate) for i, rate in rates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was; the weights are those that were loaded."""
        self.steps, self.rates = state["steps"], {int(i): rate for i, rate in state["rates"].items()}
        self._decays, self._open = False, False
        self.forget()

    # -- death ----------------------------------------------------------------

    @torch.no_grad()
    def kill(self, dead: Tensor) -> None:
        """Sets the groups for which `dead` (bool, one of each group) is true to zero, weights and momentum."""
        factors = torch.cat([(~dead).to(self.dtype), torch.ones(1, dtype=self.dtype, device=dead.device)])
        for place in self.places:
            self._scale(place, factors.to(place.shard.tensor.device), _MOMENTA)
        self.forget()

    def hold(self, dead: Tensor | None) -> None:
        """Keeps these groups at zero from now on, at the cost of writing their zeros in each step; None: no group."""
        self._held = {}
        for place in self.places if dead is not None else ():
            some = torch.cat([dead, dead.new_zeros(1)]).to(place.shard.tensor.device)
            for at, block, rows, columns in blocks(
                place.shard.piece.values.reshape(-1), place.shard.start, place.width, most=None
            ):
                for dim, number in place.of.items():
                    which = torch.nonzero(some[number[(rows, columns)[dim]]])[:, 0]
                    if len(which):
                        self._held.setdefault(id(place.shard.tensor), []).append(
                            (place.shard, at, *block.shape, dim, which)
                        )

    def each(self, values: list[float], device: torch.device | None = None) -> Tensor:
        """A value of each set as one of each group."""
        return torch.tensor(values, dtype=self.dtype).repeat_interleave(self.counts).to(device or self.sizes.device)
