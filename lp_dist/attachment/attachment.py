"""Attachment: what `attach` returns, by which a training loop says that a step was taken, and saves where a target
stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lp_dist.attachment.plan import attachable_of
from lp_dist.attachment.watch import Watch
from lp_dist.errors import UsageError
from lp_dist.optim.parameter_map import check_keys
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.shards import Shard
from lp_dist.structured.group_decay import GroupDecayHook
from lp_dist.targets.controller import Controller
from lp_dist.targets.group_controller import GroupController
from lp_dist.targets.run_steps import RunSteps
from lp_dist.targets.weight_controller import WeightController


@dataclass(frozen=True)
class Attachment:
    """What `attach` returns.

    Args:
        optimizer: the inner optimizer, which steps.
        shards: where each trainable parameter lies on this rank.
        steps: counts the optimizer steps of the run.
        candidates: names of the parameters that may decay.
        in_groups: names of the matrices that hold weight groups.
        watch: compares what steps with what was planned.
        weight_controller: brings single weights to their target, if there is one.
        group_decay: decays weight groups, if there are some.
        group_controller: brings these to their target, if there is one.
    """

    optimizer: Optimizer
    shards: list[Shard]
    steps: RunSteps
    candidates: frozenset[str]
    in_groups: frozenset[str]
    watch: Watch
    weight_controller: WeightController | None = None
    group_decay: GroupDecayHook | None = None
    group_controller: GroupController | None = None

    @property
    def controllers(self) -> list[Controller]:
        """Of the targets: that of the groups first."""
        return [c for c in (self.group_controller, self.weight_controller) if c is not None]

    @property
    def is_finished(self) -> bool:
        """Whether all targets have had their final pruning; also without any."""
        return all(controller.final_pruning is not None for controller in self.controllers)

    @property
    def by_hand(self) -> frozenset[str]:
        """Names of the parameters that decay now by a λ of the param groups or the overrides."""
        parameter_map = attachable_of(self.optimizer).attached.parameter_map
        groups = self.optimizer.param_groups
        values = {shard.name: {**groups[shard.group], **parameter_map.values(shard.name)} for shard in self.shards}
        return frozenset(name for name, value in values.items() if value["weight_decay"] > 0)

    @property
    def decayed_singly(self) -> frozenset[str]:
        """Names of the parameters whose single weights decay."""
        # Not kept, since a checkpoint says which of the candidates were left out when its run began.
        if self.weight_controller is not None:
            return frozenset(shard.param_name for shard in self.weight_controller.shards)
        return self.by_hand

    @property
    def decayed(self) -> frozenset[str]:
        """Names of the parameters that decay, singly or in groups."""
        return self.decayed_singly | self.in_groups

    @property
    def counted(self) -> frozenset[str]:
        """Names of the parameters of which a sparsity is a share: those of a target of single weights; without one,
        those that decay or may decay.
        """
        if self.weight_controller is not None:
            return self.decayed_singly
        return self.by_hand | self.candidates

    def after_step(self) -> None:
        """With a target, call it after each optimizer step (and the scheduler's), on every rank. It goes by the steps
        really taken.

        Raises:
            UsageError: a later `attach` has taken the optimizer over, or what steps is no longer what was planned.
        """
        self.watch.check_current()
        for controller in self.controllers:
            if controller.is_due:
                self.watch.check()
            controller.after_step()
        self.watch.note()
        if self.group_decay is not None:
            self.group_decay.after_step()

    def finish(self) -> None:
        """With a target, call it after the last step: the zeros are counted, and if the run has ended inside of the
        window, as it may where fp16 has skipped steps, what is missing is pruned now.
        """
        self.begin()
        self.watch.check()
        for controller in self.controllers:
            controller.finish()
        self.watch.note()
        if self.group_decay is not None:
            self.group_decay.forget()  # waits for a reduction that has begun

    def warn_if_unfinished(self) -> None:
        """Says so where a run ends before the window of its target does. Call it on every rank where a run is stopped
        early and `finish` is not to prune what is missing, since it may be resumed.
        """
        self.begin()
        for controller in self.controllers:
            controller.warn_if_unfinished()
        self.watch.end.is_known = True

    def begin(self) -> None:
        """Begins the run where no state of a target was loaded. The first step does so by itself; call it where what
        can't be reached is to be known before. Collective.

        Raises:
            UsageError: the window of a target lies behind, or it can't be reached.
        """
        self.watch.check_current()
        self.watch.begin()

    @property
    def logs(self) -> dict[str, float]:
        """Target, plan, measured share of zeros, λ, dead channels, as of the last update; empty without a target."""
        return {key: value for controller in self.controllers for key, value in controller.logs.items()}

    def state_dict(self) -> dict[str, Any]:
        """The targets' own state, plain JSON types; to be saved with the optimizer's. A DeepSpeed engine saves and
        loads it by itself. One rank may call it for all.
        """
        self.watch.check_current()
        state: dict[str, Any] = {"step": self.steps.taken}
        if self.controllers:
            state["rates"] = self.controllers[0].run.rates.state_dict()  # one for both
        if self.weight_controller is not None:
            state["weights"] = self.weight_controller.state_dict()
        if self.group_decay is not None:
            state["groups"] = (self.group_controller or self.group_decay).state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was, after the optimizer's own state was loaded.

        Raises:
            UsageError: it is of another target or run.
        """
        self.watch.check_current()
        # Of a version that did not save it the optimizer's.
        self.steps.resume(state.get("step", steps_taken(self.optimizer)))
        if self.controllers and "rates" in state:
            self.controllers[0].run.rates.load_state_dict(state["rates"])
        for key, holder, has_target in (
            ("weights", self.weight_controller, True),
            ("groups", self.group_controller or self.group_decay, self.group_controller is not None),
        ):
            saved = state.get(key)
            if holder is not None and saved:
                holder.load_state_dict(saved)
            elif saved:
                raise UsageError(
                    f"the checkpoint was trained for {saved.get('target', 'groups with a λ')}, and now there is no"
                    f" target of {key}; give the same one"
                )
            elif holder is not None and has_target:
                raise UsageError(
                    f"the checkpoint was trained without this target of {key}; leave it out, or start anew from the"
                    " saved model without its optimizer state"
                )
        self.watch.note()

    def set(self, name: str, **values: Any) -> None:
        """Overrides hyperparameters (those of `lp_dist.optim.parameter_map.KEYS`) of one parameter; None gives one
        back to its group.

        Takes effect at the next step, costs no communication, and must be called alike on every rank. A target sets λ,
        cutoff, regrowth_below, latent and phase of its parameters by itself.

        Raises:
            ValueError: no trainable parameter has that name, or a value is bad or one that the optimizer can't have.
        """
        self.watch.check_current()
        shard = next((shard for shard in self.shards if shard.name == name), None)
        if shard is None:
            raise ValueError(
                f"{name!r} is not a trainable parameter of this optimizer; names are those of model.named_parameters()"
            )
        if self.optimizer.param_groups[shard.group].get("capturable"):
            raise ValueError(
                f"capturable=True: a CUDA graph may repeat a step with the values of its capture, so {name!r} can't"
                " get others later; give them to attach(overrides=), before the capture"
            )
        attachable = attachable_of(self.optimizer)
        check_keys(values)
        parameter_map = attachable.attached.parameter_map
        merged = {**parameter_map.values(name), **values}
        overrides = {key: value for key, value in merged.items() if value is not None}
        attachable.check({**self.optimizer.param_groups[shard.group], **overrides})
        parameter_map.set(name, **values)
