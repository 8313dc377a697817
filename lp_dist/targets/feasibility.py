"""Whether a `SparsityTarget` can be reached in a run: what can't be is said before it begins."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.shards import Shard
from lp_dist.targets.lr_lookahead import rates_ahead
from lp_dist.targets.target import PatternTarget, SparsityTarget, WeightTarget, check_p

SHORTEST_WINDOW = 8  # optimizer steps: the collapse of a weight takes some, whatever λ is
# Steps between two updates that a target takes by itself. With more, weights that move far are found too late.
LONGEST_INTERVAL = 20
# Part of the window with regrowth, but a collapse before its end: what is near zero needs no more.
REGROWTH_PART = 0.8


class Window(NamedTuple):
    """The optimizer steps in which weights become zero.

    Args:
        start: the first step, from 0.
        end: the step after the last one.
        total: steps of the run.
    """

    start: int
    end: int
    total: int


def regrowth_end(window: Window, slow: bool) -> int:
    """The step up to which weights that are near zero may grow again.

    Args:
        window: of the target.
        slow: whether p is above 0.5; the nearer it is to 1, the longer a collapse takes.
    """
    length = window.end - window.start
    return min(window.start + round(REGROWTH_PART * length), window.end - SHORTEST_WINDOW * (2 if slow else 1))


def update_interval(target: SparsityTarget, window: Window) -> int:
    """Optimizer steps between two updates of λ and the cutoff."""
    return target.update_every or min(LONGEST_INTERVAL, max(1, round((window.end - window.start) / 20)))


def can_keep_latent_weights(optimizer: Any) -> bool:
    """Whether an optimizer can keep latent weights."""
    return isinstance(optimizer, LpAdamW) and not any(group["lag"] for group in optimizer.param_groups)


def check_reachable(
    target: WeightTarget | PatternTarget,
    optimizer: Optimizer,
    shards: list[Shard],
    forms: dict[str, dict[str, Any]],
    window: Window,
    total_parameters: int,
    lr_scheduler: Any,
) -> None:
    """Raises UsageError, with what to change, for a target of single weights that can't be reached.

    Args:
        target: what to reach.
        optimizer: the inner optimizer.
        shards: of the parameters that decay.
        forms: their p, precondition and the like, by name.
        window: of the target.
        total_parameters: elements of all parameters of the model.
        lr_scheduler: gives the learning rates ahead; may be None.
    """
    if not shards:
        raise UsageError(
            "a sparsity is requested, but no parameter decays: all are frozen, all zeros, left out by an override, or"
            " of modules that are not linear, convolution or attention layers. Unfreeze some, or name them (names=)"
        )
    if any(shard.is_on_disk for shard in shards):
        raise UsageError(
            "a target can't be followed under NVMe offload, since the weights lie on the disk between steps; offload"
            " to the CPU instead, or give a weight_decay (λ) and no target"
        )
    for name, form in forms.items():
        try:
            check_p(form["p"])
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    if target.scope == "global" and len({(form["p"], form.get("precondition", 0.0)) for form in forms.values()}) > 1:
        raise UsageError(
            "scope='global' has one threshold for all weights, so p and precondition must not differ between them; use"
            " scope='layer'"
        )
    _check_latent_windows(target, optimizer)
    elements = sum(shard.shape.numel() for shard in shards)
    assert target.sparsity is not None
    if target.relative_to == "all" and target.sparsity * total_parameters >= elements:
        raise UsageError(
            f"sparsity={target.sparsity:g} of all {total_parameters:,} parameters can't be reached: only"
            f" {elements:,} ({elements / total_parameters:.1%}) decay. Ask for less than"
            f" {elements / total_parameters:.3f}, let more decay (names=), or use relative_to='decayed'"
        )
    first = max(1, window.start) if any(form.get("precondition") for form in forms.values()) else window.start
    check_window_length(target, optimizer, {shard.group for shard in shards}, window, first, lr_scheduler)


def _check_latent_windows(target: WeightTarget | PatternTarget, optimizer: Optimizer) -> None:
    if target.latent_windows and not can_keep_latent_weights(optimizer):
        raise UsageError(
            f"latent_windows={target.latent_windows:g} needs LpAdamW without lag, in whose first moments the latent"
            f" weights lie, and the optimizer is {type(optimizer).__name__}"
            f"{' with lag' if isinstance(optimizer, LpAdamW) else ''}; use LpAdamW, or latent_windows=0"
        )
    if target.latent_windows and target.cap != 1.0:
        raise UsageError(
            f"latent_windows={target.latent_windows:g} keeps weights latent below the planned threshold, and so needs"
            f" cap=1, not {target.cap}; set cap=1, or latent_windows=0"
        )


def check_window_length(
    target: SparsityTarget,
    optimizer: Optimizer,
    param_groups: set[int],
    window: Window,
    first: int,
    lr_scheduler: Any,
) -> None:
    """Raises UsageError for a window in which nothing can become zero.

    Args:
        target: what to reach.
        optimizer: the inner optimizer.
        param_groups: indices of the param groups that decay.
        window: of the target.
        first: the first step at which something can.
        lr_scheduler: gives the learning rates ahead; may be None.
    """
    start, end, total = window
    if end - start < SHORTEST_WINDOW:
        short = (
            f"the window from step {start} to {end} of {total} has {end - start} steps, and the collapse of a weight"
            f" takes {SHORTEST_WINDOW}"
        )
        longer = (
            f"train for at least {math.ceil(SHORTEST_WINDOW / (target.end - target.start)) + 1} steps, or "
            if max(target.start, target.end) <= 1
            else ""
        )
        raise UsageError(f"{short}; {longer}lower start, or raise end")
    taken = steps_taken(optimizer)
    ahead = rates_ahead(lr_scheduler, optimizer, end - 1 - taken)[first - taken :] if taken <= first else []
    if ahead and not any(rate[i] > 0 for rate in ahead for i in param_groups):
        raise UsageError(
            f"the learning rate is 0 in the whole window from step {first} to {end}, so nothing can decay; move the"
            " window"
        )
