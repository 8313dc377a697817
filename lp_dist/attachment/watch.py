"""Holds what `attach` planned against what is there while the run goes on.

Engines that are made after `attach` put other tensors into the optimizer, or into the model: the map of `attach` then
knows none of what steps, and nothing would decay without a word. Only identities, flags and one count are looked at,
which costs no communication and makes no accelerator wait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lp_dist.attachment.plan import Plan
from lp_dist.errors import UsageError
from lp_dist.optim.state import IN_WINDOW, STEP_COUNT, mark_window, refuse_unattended_window
from lp_dist.sharding.deepspeed import zero3_shape
from lp_dist.targets.controller import Controller
from lp_dist.targets.feasibility import update_interval
from lp_dist.targets.run_steps import RunSteps

logger = logging.getLogger(__name__)


@dataclass
class RunEnd:
    """Whether a run has come to its end, for a warning where nobody asks any more.

    Args:
        is_known: somebody was told, or nothing is unfinished.
        progress: where each target stood at the last look, in words.
    """

    is_known: bool = True
    progress: list[str] = field(default_factory=list)

    def warn(self) -> None:
        """Warns of a run that has ended inside of a window, without a word to `attach`; counts nothing."""
        if not self.is_known:
            logger.warning(
                "the run has ended inside of its window, and finish() of what attach returned was not called: %s."
                " Unless it is resumed, what was saved is not what was asked for: set total_steps to the optimizer"
                " steps that the run takes, call after_step() after each, and finish() at the end",
                "; ".join(self.progress),
            )


class Watch:
    """Checks before the first step, whenever a param group was added, and at each update of a target.

    Args:
        plan: that was applied.
        steps: of the run.
        controllers: of the targets; none without one.
    Attributes:
        end: whether the run has come to its end.
    """

    def __init__(self, plan: Plan, steps: RunSteps, controllers: Sequence[Controller]) -> None:
        self._steps, self._controllers = steps, controllers
        self.end = RunEnd()
        self._has_begun = not controllers
        self._needs_state = False  # another state was loaded into the optimizer than the target's
        self._noted_count = 0
        self._optimizer: Optimizer = plan.optimizer
        self._groups = plan.optimizer.param_groups
        self._model: nn.Module = plan.model
        self._params = dict(plan.model.named_parameters())
        self._is_whole = {name for name, param in self._params.items() if zero3_shape(param) is None}
        self._trainable = {name for name, param in self._params.items() if param.requires_grad}
        # Engines may hand the optimizer some of its tensors at a time, or none between steps.
        self._known = WeakIdKeyDictionary()
        for tensor in [*_stepped(plan.optimizer), *(shard.tensor for shard in plan.shards)]:
            self._known[tensor] = True
        self._groups_checked = 0
        self._attached_state = plan.attachable.attached
        self._attached_state.before_step = self._before_step
        self._load_hook = plan.optimizer.register_load_state_dict_post_hook(self._after_load)

    def remove(self) -> None:
        """Ends it, since another attachment takes its place."""
        self._attached_state.before_step = None
        self._attached_state.in_window = False
        self._load_hook.remove()
        for controller in self._controllers:
            controller.release()
        self.end.is_known = True

    # -- the course of the run ------------------------------------------------

    def begin(self) -> None:
        """Begins the run where it stands, unless a state was loaded, which says so. Collective.

        Raises:
            UsageError: a window lies behind, or can't be reached, or the optimizer's state is from the middle of one.
        """
        if not self._has_begun:
            for group in self._optimizer.param_groups:
                refuse_unattended_window(group)
            for controller in self._controllers:
                controller.begin(self._steps.taken)
            self.note()

    def note(self) -> None:
        """Notes where the targets stand: after a step, and after their state was loaded."""
        self._has_begun, self._needs_state = True, False
        self._noted_count = self._count()
        is_open = any(controller.is_in_window for controller in self._controllers)
        self._attached_state.in_window = is_open
        if self._controllers:  # else a mark is that of a state which was loaded
            mark_window(self._optimizer, is_open)
        unfinished = [controller for controller in self._controllers if controller.final_pruning is None]
        self.end.is_known = not (unfinished and self._steps.have_begun)
        self.end.progress = [controller.progress for controller in unfinished]

    def check_current(self) -> None:
        """Raises UsageError where a later `attach` has taken the optimizer over."""
        if self._attached_state.hooks.watch is not self:
            raise UsageError(
                "this was returned by an attach that a later one on the same optimizer has replaced: it decays nothing"
                " any more. Use what the last one returned. Several models in one optimizer can be attached together:"
                ' attach(nn.ModuleDict({"actor": actor, "critic": critic}), optimizer, ...), or make an optimizer for'
                " each. Of several callbacks leave one: it takes a target for weights and one for groups"
            )

    def _count(self) -> int:
        """Steps of one of the parameters, which makes no accelerator wait."""
        state: dict[str, Any] = next(iter(self._optimizer.state.values()), {})
        count = state.get("step", state.get(STEP_COUNT, 0))
        return 0 if isinstance(count, Tensor) and count.device.type != "cpu" else int(count)

    def _after_load(self, *_: object) -> None:
        marked = any(group.get(IN_WINDOW) for group in self._optimizer.param_groups)
        if self._controllers and (marked or self._steps.have_begun):
            self._needs_state = True
        self._steps.after_load()
        self._noted_count = self._count()
        self._groups = self._optimizer.param_groups  # loading makes them anew

    def _before_step(self) -> None:
        if not self._has_begun:
            # ZeRO 1 and 2 show an optimizer one of its groups at a time.
            stepped, self._optimizer.param_groups = self._optimizer.param_groups, self._groups
            try:
                self.begin()
            finally:
                self._optimizer.param_groups = stepped
        if self._needs_state:
            raise UsageError(
                "a state was loaded into the optimizer in the middle of the run, and not the target's own: load it"
                " too, by load_state_dict() of what attach returned, after the optimizer's"
            )
        missed = self._count() - self._noted_count
        if self._controllers and missed > 2 * max(
            update_interval(controller.target, controller.window, moves=False) for controller in self._controllers
        ):
            raise UsageError(
                f"after_step() of what attach returned was not called after the last {missed} steps, up to step"
                f" {self._steps.taken} of the run, so that the target would not be reached: call it after each"
                " optimizer step, on every rank"
            )
        if len(self._optimizer.param_groups) != self._groups_checked:
            self.check()
            self._groups_checked = len(self._optimizer.param_groups)

    # -- what steps ------------------------------------------------------------

    def check(self) -> None:
        """Compares the model's and the optimizer's tensors with those of the plan.

        Raises:
            UsageError: they are others, some were added, or what was frozen trains now.
        """
        self._check_model()
        unknown = [tensor for tensor in _stepped(self._optimizer) if tensor not in self._known]
        if not unknown:
            return
        names = {id(param): name for name, param in self._model.named_parameters()}
        added = [names[id(tensor)] for tensor in unknown if id(tensor) in names]
        if added:
            raise UsageError(
                f"{len(added)} parameters were added to the optimizer after attach, such as {added[0]}: no target"
                " counts them, and what may not decay would. Add them before, or call attach again"
            )
        raise UsageError(
            f"the optimizer steps {len(unknown)} other tensors than when attach was called, such as one of shape"
            f" {tuple(unknown[0].shape)}: an engine was made after it, and the weights would not decay. Call attach"
            " after deepspeed.initialize, accelerator.prepare or fully_shard, with what they return"
        )

    def _check_model(self) -> None:
        now = dict(self._model.named_parameters())
        replaced = [name for name, param in self._params.items() if name in now and now[name] is not param]
        # ZeRO-3 takes the values out of a parameter, and its optimizer holds no tensor between steps.
        replaced += [name for name in self._is_whole if name in now and zero3_shape(now[name]) is not None]
        if replaced:
            raise UsageError(
                f"{len(replaced)} parameters of the model are other tensors than when attach was called, such as"
                f" {min(replaced)}: it was sharded, converted or loaded anew after it, and the optimizer's weights are"
                " no longer the model's. Call attach after that, with an optimizer made of the new parameters, or with"
                " the engine"
            )
        unfrozen = [name for name, param in now.items() if param.requires_grad and name not in self._trainable]
        unfrozen = [name for name in unfrozen if not self._is_foreign(now[name])]
        if unfrozen:
            raise UsageError(
                f"{len(unfrozen)} parameters were frozen when attach was called and train now, such as"
                f" {unfrozen[0]}: no target counts them, and what may not decay would. Unfreeze them before attach,"
                " and freeze them after it for as long as they are not to train"
            )

    def _is_foreign(self, param: Tensor) -> bool:
        """Whether this optimizer has nothing to do with a parameter: one that it steps itself would be known to it."""
        return param not in self._known and all(param is not tensor for tensor in _stepped(self._optimizer))


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
