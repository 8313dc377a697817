"""Attachment: what `attach` gives, by which a training loop tells that a step was taken, and saves where a target
stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpOptimizer
from lp_dist.sharding.shards import Shard
from lp_dist.structured.group_decay import Grouped
from lp_dist.targets.group_controller import GroupControl
from lp_dist.targets.weight_controller import Control


@dataclass(frozen=True)
class Attachment:
    """What `attach` found: the optimizer that steps, where each parameter lies on this rank, the names of those that
    decay, and what brings them to a target, if there is one; the same of whole groups."""

    optimizer: Optimizer
    shards: list[Shard]
    decayed: frozenset[str]
    control: Control | None = None
    grouped: Grouped | None = None
    groups: GroupControl | None = None

    def after_step(self) -> None:
        """With a target, call it after each optimizer step (and the scheduler's), on every rank. It goes by the steps
        really taken.
        """
        for control in self._controls():
            control.after_step()
        if self.grouped is not None:
            self.grouped.after_step()

    def finish(self) -> None:
        """With a target, call it after the last step: if fp16 has skipped steps of the window, what is missing dies
        now.
        """
        for control in self._controls():
            control.finish()
        if self.grouped is not None:
            self.grouped.forget()  # waits for what is under way

    @property
    def logs(self) -> dict[str, float]:
        """Target, plan, measured share of zeros, λ, dead channels, as of the last look at the weights; empty without a
        target.
        """
        return {key: value for control in self._controls() for key, value in control.logs.items()}

    def _controls(self) -> list[GroupControl | Control]:
        return [control for control in (self.groups, self.control) if control is not None]

    def state_dict(self) -> dict[str, Any]:
        """The targets' own state, plain JSON types; to be saved with the optimizer's. A DeepSpeed engine saves and
        loads it by itself.
        """
        state = {} if self.control is None else self.control.state_dict()
        if self.grouped is not None:
            state["groups"] = (self.groups or self.grouped).state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was, after the optimizer's own state was loaded; raises UsageError if it is of another
        target or run.
        """
        state = dict(state)
        groups = state.pop("groups", None)
        for mine, theirs, what in ((self.control, state, "target"), (self.groups or self.grouped, groups, "groups")):
            if mine is not None and theirs:
                mine.load_state_dict(theirs)
            elif theirs:
                raise UsageError(
                    f"the checkpoint was trained for {theirs.get('target', 'groups with a λ')}, and now there is no"
                    f" {what}; give the same one"
                )
            elif mine is not None and mine is not self.grouped:
                raise UsageError(
                    f"the checkpoint was trained without this target ({what}); leave it out, or start anew from the"
                    " saved model without its optimizer state"
                )

    def set(self, name: str, **values: Any) -> None:
        """Values (weight_decay, p, l2, precondition, cutoff, floor, pattern) of one parameter instead of its group's;
        None gives one back.

        Takes effect at the next step, costs no communication, and must be called alike on every rank.
        """
        if all(shard.name != name for shard in self.shards):
            raise ValueError(
                f"{name!r} is not a trainable parameter of this optimizer; names are those of model.named_parameters()"
            )
        book_of(self.optimizer).segments.set(name, **values)


def book_of(live: Any) -> Any:
    """Where the segments and the asked-for values are kept: our optimizer, or the handle of `add_lp_decay`."""
    return live if isinstance(live, LpOptimizer) else live.lp_decay
