"""Learning rates of the steps to come, from the scheduler itself, without touching it."""

from __future__ import annotations

import copy
import functools
import logging
import types
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lp_dist.sharding.engines import inner_scheduler, scheduler_steps

logger = logging.getLogger(__name__)


class LearningRates:
    """The learning rates of the steps to come, in a loop that may step its scheduler at each step or once an epoch.

    Args:
        lr_scheduler: torch's, DeepSpeed's, Accelerate's wrapper of one, or None.
        optimizer: the inner one.
        is_stepped_each_step: whether the scheduler is known to be stepped at each optimizer step.
    """

    def __init__(self, lr_scheduler: Any, optimizer: Optimizer, is_stepped_each_step: bool = False) -> None:
        self._lr_scheduler, self._optimizer = lr_scheduler, optimizer
        self.is_stepped_each_step = is_stepped_each_step
        self._seen_steps = self._since_move = 0
        self._interval = 0.0  # steps between the last two moves of the scheduler; 0: it was never seen to move
        self._last: tuple[int, int] | None = None  # the run's step and the scheduler's at the last look

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "seen_steps": self._seen_steps,
            "since_move": self._since_move,
            "interval": self._interval,
            "last": self._last and list(self._last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was; the scheduler may be loaded before or after."""
        self._seen_steps, self._since_move = state["seen_steps"], state["since_move"]
        self._interval = state["interval"]
        self._last = tuple(state["last"]) if state["last"] is not None else None

    def note(self, t: int) -> None:
        """Looks how far the scheduler has come at step t of the run."""
        epoch = getattr(inner_scheduler(self._lr_scheduler), "last_epoch", None)
        if not isinstance(epoch, int):
            return
        if self._last is not None:
            steps, moves = t - self._last[0], epoch - self._last[1]
            if steps == 0:
                return
            if steps > 0 and 0 <= moves <= steps * scheduler_steps(self._lr_scheduler):  # else a state was loaded
                self._seen_steps, self._since_move = self._seen_steps + steps, self._since_move + steps
                if moves:
                    self._interval = self._since_move * scheduler_steps(self._lr_scheduler) / moves
                    self._since_move = 0
        self._last = t, epoch

    @property
    def interval(self) -> int:
        """Optimizer steps between two steps of the scheduler, as far as it was seen; 0: it was never stepped."""
        is_one = self.is_stepped_each_step or self._seen_steps < ENOUGH_STEPS
        return 1 if is_one else round(self._interval)

    @property
    def is_sure(self) -> bool:
        """Whether it is known how often the scheduler is stepped."""
        return self.is_stepped_each_step or self._lr_scheduler is None or self._seen_steps >= ENOUGH_STEPS

    def ahead(self, steps: int) -> list[list[float]]:
        """Of each param group for the next `steps` optimizer steps, the present ones first; see `rates_ahead`."""
        interval = self.interval
        if interval == 1 or steps < 1:
            return rates_ahead(self._lr_scheduler, self._optimizer, steps)
        if interval == 0:
            return rates_ahead(None, self._optimizer, steps)
        rates = rates_ahead(self._lr_scheduler, self._optimizer, -(-steps // interval))
        return [rate for rate in rates for _ in range(interval)][:steps]


# A scheduler that has not moved after so many steps is one that is stepped once an epoch.
ENOUGH_STEPS = 4


def rates_ahead(lr_scheduler: Any, optimizer: Optimizer, steps: int) -> list[list[float]]:
    """Learning rates of each param group for the next `steps` optimizer steps, the present ones first.

    A copy of the scheduler is stepped on a stand-in for the optimizer, so neither changes. Without a scheduler, or
    with one that needs a metric (ReduceLROnPlateau) or can't be copied, the present rates are taken to stay, and the
    log says so.

    Args:
        lr_scheduler: torch's, DeepSpeed's, Accelerate's wrapper of one, or None.
        optimizer: the inner one.
        steps: 0 or more.
    Returns:
        `steps` lists with one rate per group.
    """
    rates = [[float(group["lr"]) for group in optimizer.param_groups]] * min(1, steps)
    if lr_scheduler is not None and steps > 1:
        try:
            rates += _stepped(lr_scheduler, optimizer, steps - 1)
        except Exception as error:  # whatever a scheduler of the user's raises when it is copied or stepped by itself
            logger.warning(
                "the learning rates ahead are not known, as %s can't be evaluated ahead (%s): λ is found as if they"
                " stayed what they are, and corrected at every update",
                type(inner_scheduler(lr_scheduler)).__name__,
                error,
            )
    return rates + [rates[-1]] * (steps - len(rates)) if rates else []


def _stepped(lr_scheduler: Any, optimizer: Optimizer, steps: int) -> list[list[float]]:
    inner, calls = inner_scheduler(lr_scheduler), scheduler_steps(lr_scheduler)
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "lr": float(group["lr"]),
            "params": [torch.zeros(1)],
        }
        for group in optimizer.param_groups
    ]
    stand_in = torch.optim.SGD(groups)
    memo: dict[int, Any] = {id(optimizer): stand_in, id(inner.optimizer): stand_in}
    # What a rule of the user's belongs to, a whole model perhaps, is not copied with it.
    memo |= {id(each): each for each in _held(inner)}
    rates: list[list[float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler that is stepped before its optimizer
        clone = copy.deepcopy(inner, memo)
        for _ in range(steps):
            over = False
            try:
                for _ in range(calls):
                    clone.step()
            except ValueError:
                over = hasattr(clone, "total_steps")  # OneCycleLR at its end: the rate stays
                if not over:
                    raise
            rates.append([float(group["lr"]) for group in stand_in.param_groups])
            if over:
                break
    return rates


def _held(scheduler: Any) -> list[Any]:
    """What a scheduler, those inside of it, and the functions of a user's by which they find their rates hold on to,
    and a look ahead does not need of its own: models, and what a method belongs to.
    """
    held: list[Any] = [value for value in vars(scheduler).values() if isinstance(value, nn.Module)]
    rules = [*getattr(scheduler, "lr_lambdas", ()), getattr(scheduler, "_scale_fn_ref", None)]
    while rules:
        rule = rules.pop()
        if isinstance(rule, functools.partial):
            rules.append(rule.func)
            held += [value for value in (*rule.args, *rule.keywords.values()) if isinstance(value, nn.Module)]
        elif isinstance(rule, types.MethodType):
            held.append(rule.__self__)
        else:
            held += [value for value in getattr(rule, "__dict__", {}).values() if isinstance(value, nn.Module)]
    return held + [each for inside in getattr(scheduler, "_schedulers", ()) for each in _held(inside)]
