"""For Hugging Face's Trainer: a callback that attaches the optimizer and runs the decay window."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lp_dist.attachment.attach import Attachment, attach
from lp_dist.errors import UsageError
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.engines import unwrap, wrapper_of
from lp_dist.sparsity.measure import measure_sparsity
from lp_dist.structured.naming import KINDS
from lp_dist.targets.schedule import DecayWindow
from lp_dist.targets.target import CURVES, GroupDecay, SparsityTarget

logger = logging.getLogger(__name__)


class LpCallback(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[LpCallback(target=SparsityTarget(0.5))])`, or `LpCallback(DecayWindow(...))` with a λ
    of your own: attaches the optimizer at train begin, and runs the decay.

    Args:
        window: when the decay acts and with which values; it is asked anew at every step, so a resumed run goes on as
            it would have. None, and no target: always, with the groups' own values.
        target: the share of zeros to end with, of weights or of channels and heads; λ is found, so the groups'
            weight_decay must be 0. Its state is kept in Trainer's checkpoints. One of the two, as an object or as a
            mapping of its arguments; or two targets, the one with `groups` first.
        groups: a λ for whole channels or heads, instead of a target for them.
        names, overrides: which parameters may decay, and values of single ones, as of `lp_dist.attach`.
    The decay advances with the optimizer steps that were really taken: an fp16 overflow, which Trainer counts as a
    step, is none.

    Raises (at train begin):
        RuntimeError: the optimizer that really steps is not ours, or ranks disagree on hyperparameters.
        ValueError: nothing decays, the window holds no step of this run, it would replace a group's cutoff, or a
            target can't be reached.
    Raises (when Trainer logs):
        RuntimeError: the gradients have become nan; without fp16's loss scaling nothing skips such a step.
    """

    def __init__(
        self,
        window: DecayWindow | dict[str, Any] | None = None,
        *,
        target: SparsityTarget | dict[str, Any] | Sequence[SparsityTarget | dict[str, Any]] | None = None,
        groups: GroupDecay | dict[str, Any] | None = None,
        names: Iterable[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        if window is not None and target:
            raise ValueError(
                "a window and a target were given, but a target has a window of its own; set its start and end"
            )
        self.window = DecayWindow(**window) if isinstance(window, dict) else window
        self.target = [
            _made(one) for one in ([target] if isinstance(target, (SparsityTarget, dict)) else target or ())
        ]
        if groups is not None and self.target:
            raise ValueError(
                "a target and a λ for groups were given: what dies by the λ would count for the target; leave one of"
                " them out"
            )
        self.groups = GroupDecay(**groups) if isinstance(groups, dict) else groups
        self.names = None if names is None else sorted(names)
        self.overrides = overrides
        self.attached: Attachment | None = None

    def state(self) -> dict[str, Any]:
        """For Trainer's checkpoints: what this callback was made with, and where the target stands."""
        window = (
            None
            if self.window is None
            else {
                **asdict(self.window),
                "values": (
                    None
                    if self.window.values is None
                    else {
                        key: value if isinstance(value, (int, float)) else repr(value)
                        for key, value in self.window.values.items()
                    }
                ),
            }
        )
        made = {
            "window": window,
            "target": [one.described() for one in self.target] or None,
            "groups": self.groups and self.groups.described(),
            "names": self.names,
            "overrides": self.overrides,
        }
        return {
            "args": made,
            "attributes": {},
            "progress": self.attached.state_dict() if self.attached is not None else {},
        }

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        scheduled = self.window.scheduled() if self.window is not None else {}
        self.attached = attach(
            model,
            optimizer,
            names=self.names,
            overrides=self.overrides,
            target=self.target or None,
            groups=self.groups,
            total_steps=state.max_steps if self.target else None,
            lr_scheduler=lr_scheduler,
            scheduled=scheduled,
        )
        _check_saved(model, optimizer, self.attached.decayed, args)
        self._live = self.attached.optimizer
        # A checkpoint without optimizer state: its steps are known from Trainer alone.
        self._before = 0 if steps_taken(self._live) else state.global_step
        if self._before and not self.target:
            logger.warning(
                "going on at step %d without optimizer state: the checkpoint had none, so the moments start anew",
                self._before,
            )
        self._resume_target(state)
        decayed = [shard for shard in self.attached.shards if shard.name in self.attached.decayed]
        self._decayed = sorted({shard.group for shard in decayed})
        if self.window is None:
            return
        if not self._decayed:
            raise ValueError(
                "every param group has weight_decay=0, so there is nothing for the decay window to do; set a"
                " weight_decay (λ)"
            )
        capped = [
            self._live.param_groups[i]["cutoff"]
            for i in self._decayed
            if self._live.param_groups[i]["cutoff"] != math.inf
        ]
        if capped and "cutoff" not in (self.window.values or {}):
            raise ValueError(
                f"a param group has cutoff={capped[0]:g}, which the decay window would replace; give it to the window"
                " instead: "
                f'DecayWindow(..., values={{"cutoff": {capped[0]:g}}})'
            )
        start, end = self.window.steps(state.max_steps)
        logger.info(
            "Lp decay acts from optimizer step %d to %d of %d; afterwards zeros are frozen",
            start,
            end,
            state.max_steps,
        )

    def _resume_target(self, state) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[-1] if isinstance(saved, list) else saved
        progress = (saved or {}).get("progress")
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # Trainer wants it there when it saves
        if self._before and self.target:
            raise UsageError(
                f"the checkpoint of step {self._before} has no optimizer state, so the target's plan can't go on from"
                " it; train with save_only_model=False, or start anew from its weights with another output_dir"
            )
        if progress and state.global_step:
            self.attached.load_state_dict(progress)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.window is not None:
            values = self.window.at(self._before + steps_taken(self._live), state.max_steps)
            for i in self._decayed:
                self._live.param_groups[i].update(values)

    def on_step_end(self, args, state, control, **kwargs):
        self.attached.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # else it was stopped, and is to be resumed perhaps
            self.attached.finish()

    def progress(self, model: nn.Module) -> dict[str, float]:
        """For a log line: a target's last look; without one of single weights the zeros, which are counted now
        (collective).
        """
        if self.attached is None or not self.attached.decayed:
            return {}
        logs = dict(self.attached.logs)
        # Of all that may decay, as at the end of a run; where groups alone die that is more than what they are in.
        names = self.attached.decayed if self.names is None else self.names
        return (
            logs
            if self.attached.control is not None
            else {**logs, "lp/measured": measure_sparsity(model, names=names).total}
        )

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if (
            "loss" in (logs or {}) and "lp/measured" not in logs
        ):  # Trainer's own log lines come after this callback; loggers came before it
            logs.update(self.progress(model))
        bad = [key for key in ("loss", "grad_norm") if math.isnan((logs or {}).get(key, 0.0))]
        if bad and not args.fp16:
            raise RuntimeError(
                f"{bad[0]} is nan at step {state.global_step}: the weights are spoiled. Resume from the last"
                " checkpoint with a lower learning rate or max_grad_norm; with DeepSpeed in bf16,"
                ' "check_grad_overflow": true in its bf16 section skips such steps'
            )


def _made(target: SparsityTarget | dict[str, Any]) -> SparsityTarget:
    """A target from its arguments, as a checkpoint has them."""
    if not isinstance(target, dict):
        return target
    if target.get("curve") not in (None, *CURVES):
        raise UsageError(
            f"a target with a curve of your own ({target['curve']}) can't be made again from a checkpoint; train with "
            "restore_callback_states_from_checkpoint=False, which the target does not need"
        )
    odd = (
        [one for one in target.get("groups") or () if isinstance(one, str) and one not in KINDS]
        if not isinstance(target.get("groups"), str)
        else []
    )
    if odd:
        raise UsageError(
            f"a target with groups of your own ({odd[0]}) can't be made again from a checkpoint; train with "
            "restore_callback_states_from_checkpoint=False, which the target does not need"
        )
    return SparsityTarget(**target)


def _check_saved(model: nn.Module, optimizer: Any, decayed: Iterable[str], args: Any) -> None:
    """Of a model with adapters Trainer saves the adapters alone, so that a run which goes on from its checkpoint has
    another base than it had.
    """
    if (
        hasattr(unwrap(model), "peft_config")
        and decayed
        and wrapper_of(optimizer) is None
        and (args.save_strategy != "no" or args.resume_from_checkpoint)
    ):
        raise UsageError(
            f"base weights of a model with adapters decay ({min(decayed)}), and Trainer saves the adapters alone: its"
            " checkpoints (save_strategy) would not hold what was trained. Set save_strategy='no' and save the model"
            " at the end by lp_dist.merge_adapter(trainer.model), or train under DeepSpeed, whose checkpoints hold"
            " all that is trained"
        )
