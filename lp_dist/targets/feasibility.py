"""Whether a `SparsityTarget` can be reached in a run: what can't be is said before it begins."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.sharding.shards import Shard, is_dtensor
from lp_dist.targets.lr_lookahead import LearningRates
from lp_dist.targets.target import PatternTarget, SparsityTarget, WeightTarget, check_p

logger = logging.getLogger(__name__)

SHORTEST_WINDOW = 8  # optimizer steps: the collapse of a weight takes some, whatever λ is
# Steps between two updates that a target takes by itself. With more, weights that move far are found too late.
LONGEST_INTERVAL = 20
# A warning is due where the learning rate is 0 for more than this part of the window, at its end.
MOSTLY = 0.1
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


def update_interval(target: SparsityTarget, window: Window, moves: bool) -> int:
    """Optimizer steps between two updates of λ and the cutoff.

    Args:
        target: what to reach.
        window: in which steps.
        moves: whether survivors move. There are five updates then whatever the length of the run, since each of them
            costs as much, and ten were no better.
    """
    length = window.end - window.start
    by_itself = max(1, round(length / 5)) if moves else min(LONGEST_INTERVAL, max(1, round(length / 20)))
    return target.update_every or by_itself


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
    taken: int | None,
    rates: LearningRates,
) -> None:
    """Raises UsageError, with what to change, for a target of single weights that can't be reached.

    Args:
        target: what to reach.
        optimizer: the inner optimizer.
        shards: of the parameters that decay.
        forms: their p, precondition and the like, by name.
        window: of the target.
        total_parameters: elements of all parameters of the model.
        taken: steps of the run so far; None: not known yet, as a checkpoint may be loaded.
        rates: the learning rates ahead.
    """
    elements = sum(shard.shape.numel() for shard in shards)
    check_share(target, elements, total_parameters)
    if any(shard.is_on_disk for shard in shards):
        raise UsageError(
            "a target can't be followed under NVMe offload, since the weights lie on the disk between steps; offload"
            " to the CPU instead, or give a weight_decay (λ) and no target"
        )
    strided = [s.name for s in shards if not is_dtensor(s.tensor) and not s.tensor.is_contiguous()]
    if strided:
        raise UsageError(
            f"{len(strided)} parameters that are to decay to a target don't lie in memory row by row, such as"
            f" {strided[0]} (channels_last, or a transposed view): param.data = param.data.contiguous() for each,"
            " before the optimizer is made; inputs may stay channels_last. Or leave them out by an override,"
            " weight_decay 0"
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
    first = max(1, window.start) if any(form.get("precondition") for form in forms.values()) else window.start
    check_window_length(target, {shard.group for shard in shards}, window, first, taken, rates)


def check_share(target: WeightTarget | PatternTarget, elements: int, total_parameters: int) -> None:
    """Raises UsageError, with what to change, where the weights that decay are too few for the target.

    Args:
        target: what to reach.
        elements: weights that decay.
        total_parameters: elements of all parameters of the model.
    """
    if not elements:
        raise UsageError(
            "a sparsity is requested, but no parameter decays: all are frozen, all zeros, left out by an override, or"
            " no operands of matrix products (embeddings, heads, routers, norms, tables). Unfreeze some, or name them"
            " (names=)"
        )
    assert target.sparsity is not None
    if target.relative_to == "all" and target.sparsity * total_parameters >= elements:
        raise UsageError(
            f"sparsity={target.sparsity:g} of all {total_parameters:,} parameters can't be reached: only"
            f" {elements:,} ({elements / total_parameters:.1%}) decay. Ask for less than"
            f" {elements / total_parameters:.3f}, let more decay (names=), or use relative_to='decayed'"
        )


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


def check_steps(target: SparsityTarget, window: Window) -> None:
    """Raises UsageError for a window with too few steps.

    Args:
        target: what to reach.
        window: of the target.
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


def check_window_length(
    target: SparsityTarget,
    param_groups: set[int],
    window: Window,
    first: int,
    taken: int | None,
    rates: LearningRates,
) -> None:
    """Raises UsageError for a window in which nothing can become zero.

    Args:
        target: what to reach.
        param_groups: indices of the param groups that decay.
        window: of the target.
        first: the first step at which something can.
        taken: steps of the run so far; None: not known yet, and the learning rates ahead neither.
        rates: the learning rates ahead.
    """
    check_steps(target, window)
    _, end, total = window
    if taken is None or taken > first:
        return
    ahead = rates.ahead(total - taken)
    # A schedule that has ended before the window may be one that is stepped once an epoch.
    has_ended = any(_is_any(rate, param_groups) for rate in ahead[:1]) and not any(
        _is_any(rate, param_groups) for rate in ahead[first - taken :]
    )
    check_rates(param_groups, first, end, ahead[first - taken : end - 1 - taken], rates.is_sure or not has_ended)


def _is_any(rate: list[float], param_groups: set[int]) -> bool:
    return any(rate[i] > 0 for i in param_groups)


def check_rates(param_groups: set[int], first: int, end: int, rates: list[list[float]], is_sure: bool) -> None:
    """Looks for learning rates of 0 in a window, where nothing can decay.

    Args:
        param_groups: indices of the param groups that decay.
        first: the first step at which something can decay.
        end: of the window.
        rates: of each step from `first` on to the one before the final pruning, of each group.
        is_sure: whether the scheduler is stepped at each optimizer step.
    Raises:
        UsageError: there is none above 0, and that is sure.
    """
    acting = [i for i, rate in enumerate(rates) if _is_any(rate, param_groups)]
    if rates and not acting:
        if is_sure:
            raise UsageError(
                f"the learning rate is 0 in the whole window from step {first} to {end}, so nothing can decay; move"
                " the window"
            )
        logger.warning(
            "if the learning-rate scheduler is stepped at each optimizer step, the rate is 0 in the whole window from"
            " step %d to %d, and nothing can decay; move the window",
            first,
            end,
        )
    elif rates and len(rates) - 1 - acting[-1] > MOSTLY * len(rates):
        logger.warning(
            "the learning rate is 0 from step %d on, and the window ends at %d: nothing decays in between, and what is"
            " missing is pruned at once. End the window there (end=%d), or let the schedule last as long as the run",
            first + acting[-1] + 1,
            end,
            first + acting[-1] + 1,
        )
    else:
        still = [group for group in sorted(param_groups) if rates and not any(rate[group] > 0 for rate in rates)]
        if still:
            logger.warning(
                "the learning rate of param group %s is 0 in the whole window: its weights don't decay, and those"
                " below the threshold are pruned at once in the final step. If they are to stay as they are, freeze"
                " them (requires_grad_(False)), or leave them out by an override, weight_decay 0",
                ", ".join(map(str, still)),
            )
