"""Whether a `SparsityTarget` can be reached in a run: what can't be is told before it begins."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.shards import Shard
from lp_dist.targets.lr_lookahead import rates_ahead
from lp_dist.targets.target import SparsityTarget, check_p

SHORTEST = 8  # steps of a window: a collapse takes some, whatever λ is
LONGEST = (
    20  # steps between two looks that a target takes by itself: with more, weights that move far are found too late
)
GRACE_ENDS = 0.8  # of the window, but a collapse before its end: what has faded needs no more


def grace_until(start: int, end: int, slow: bool) -> int:
    """The step up to which what fades may come back. slow: p is above 0.5; the nearer it is to 1, the longer a
    collapse takes.
    """
    return min(start + round(GRACE_ENDS * (end - start)), end - SHORTEST * (2 if slow else 1))


def every_of(target: SparsityTarget, start: int, end: int) -> int:
    """Optimizer steps between two looks."""
    return target.every or min(LONGEST, max(1, round((end - start) / 20)))


def remembers(live: Any) -> bool:
    """Whether an optimizer can keep latent weights."""
    return isinstance(live, LpAdamW) and not any(group["lag"] for group in live.param_groups)


def refuse_what_cannot_be(
    target: SparsityTarget,
    live: Optimizer,
    shards: list[Shard],
    forms: dict[str, dict[str, Any]],
    window: tuple[int, int, int],
    everything: int,
    lr_scheduler: Any,
) -> None:
    """Raises UsageError that says what to change.

    Args:
        live: the optimizer that steps. shards: of the parameters that decay. forms: their p, precondition and the
            like, by name.
        window: its first step, the one after its last, and the steps of the run. everything: elements of all
            parameters of the model.
    """
    start, _end, _total = window
    if not shards:
        raise UsageError(
            "a sparsity is asked for, but no parameter decays: all are frozen, all zeros, left out by an override, or"
            " of modules that are not linear, convolution or attention layers. Unfreeze some, or name them (names=)"
        )
    if any(shard.is_on_disk for shard in shards):
        raise UsageError(
            "a target can't be followed under NVMe offload, since the weights to be looked at lie on the disk; offload"
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
    if target.memory and not remembers(live):
        raise UsageError(
            f"memory={target.memory:g} needs LpAdamW without lag, in whose first moments the latent weights lie, and"
            f" the optimizer is {type(live).__name__}{' with lag' if isinstance(live, LpAdamW) else ''}; use LpAdamW,"
            " or memory=0"
        )
    if target.memory and target.cap != 1.0:
        raise UsageError(
            f"memory={target.memory:g} hides what is below the planned threshold, and so needs cap=1, not"
            f" {target.cap}; set cap=1, or memory=0"
        )
    elements = sum(shard.shape.numel() for shard in shards)
    if target.of == "all" and target.sparsity * everything >= elements:
        raise UsageError(
            f"sparsity={target.sparsity:g} of all {everything:,} parameters can't be reached: only {elements:,}"
            f" ({elements / everything:.1%}) decay. Ask for less than {elements / everything:.3f}, let more decay"
            " (names=), or use of='decayed'"
        )
    first = max(1, start) if any(form.get("precondition") for form in forms.values()) else start
    refuse_window(target, live, {shard.group for shard in shards}, window, first, lr_scheduler)


def refuse_window(
    target: SparsityTarget,
    live: Optimizer,
    groups: set[int],
    window: tuple[int, int, int],
    first: int,
    lr_scheduler: Any,
) -> None:
    """Raises UsageError for a window in which nothing can die. groups: numbers of the param groups. window: as of
    `refuse_what_cannot_be`. first: the first step at which something can."""
    start, end, total = window
    if end - start < SHORTEST:
        short = (
            f"the window from step {start} to {end} of {total} has {end - start} steps, and a collapse takes"
            f" {SHORTEST}"
        )
        longer = (
            f"train for at least {math.ceil(SHORTEST / (target.end - target.start)) + 1} steps, or "
            if max(target.start, target.end) <= 1
            else ""
        )
        raise UsageError(f"{short}; {longer}lower start, or raise end")
    taken = steps_taken(live)
    ahead = rates_ahead(lr_scheduler, live, end - 1 - taken)[first - taken :] if taken <= first else []
    if ahead and not any(rate[i] > 0 for rate in ahead for i in groups):
        raise UsageError(
            f"the learning rate is 0 in the whole window from step {first} to {end}, so nothing can decay; move the"
            " window"
        )
