"""The callback for Hugging Face's Trainer: it attaches the optimizer and runs the decay window."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lp_dist.attachment.attach import Attachment, attach_as_requested
from lp_dist.attachment.plan import Request
from lp_dist.errors import UsageError, in_one_line
from lp_dist.optim.hyperparameters import Phase, phase_of
from lp_dist.optim.state import steps_taken
from lp_dist.sharding.engines import inner_optimizer, optimizer_of, unwrap, wrapper_of
from lp_dist.sparsity.measure import measure_sparsity
from lp_dist.structured.resolve import KINDS
from lp_dist.targets.schedule import DecayWindow
from lp_dist.targets.target import CURVES, GroupDecay, SparsityTarget
from lp_dist.training.argument_defaults import take_arguments

logger = logging.getLogger(__name__)


class LpCallback(TrainerCallback, ExportableState):
    """Attaches the optimizer when the training begins, and runs the decay.

    `Trainer(..., callbacks=[LpCallback(target=SparsityTarget(0.5))])`, or `LpCallback(DecayWindow(...))` with a given
    λ. The decay advances with the optimizer steps that were really taken. An fp16 overflow, which Trainer counts as a
    step, does not advance it.

    Args:
        window: when the decay acts and with which values. It is evaluated at every step, so that a resumed run goes
            on as it would have. None, and no target: the decay always acts, with the values of the param groups.
        target: the sparsity of weights, or of channels and heads. λ is found, so weight_decay must be 0 in the param
            groups. Its state is kept in Trainer's checkpoints. A SparsityTarget or a mapping of its arguments; or two
            of these, the one with `groups` first.
        groups: λ for channels or heads, instead of a target for them.
        names: parameters that may decay, as of `lp_dist.attach`.
        overrides: values of single parameters, as of `lp_dist.attach`.
    Raises:
        ValueError: both a window and a target are given, or both a target and `groups`. When the training begins:
            nothing decays, the window holds no step of this run, or the target can't be reached.
        RuntimeError: when the training begins: the optimizer that really steps is not one of lp_dist, or ranks have
            different hyperparameters. When Trainer logs: the gradients have become nan, and no loss scaling of fp16
            skips such a step.
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
        targets = [target] if isinstance(target, (SparsityTarget, dict)) else target or ()
        self.target = [_to_target(each) for each in targets]
        if groups is not None and self.target:
            raise ValueError(
                "a target and a λ for groups were given: groups that the λ prunes would count for the target; leave"
                " one of them out"
            )
        self.groups = GroupDecay(**groups) if isinstance(groups, dict) else groups
        self.names = None if names is None else sorted(names)
        self.overrides = overrides
        self._attached: Attachment | None = None
        self._ended: weakref.ref[Attachment] | None = None  # the optimizer keeps it alive, and nothing else
        self._progress: dict[str, Any] = {}

    @property
    def attached(self) -> Attachment | None:
        """What `attach` returned for this training; after its end for as long as the optimizer lives. None before."""
        return self._attached if self._ended is None else self._ended()

    def state(self) -> dict[str, Any]:
        """For Trainer's checkpoints: the arguments of this callback, and the state of the target."""
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
        arguments = {
            "window": window,
            "target": [target.described() for target in self.target] or None,
            "groups": self.groups and self.groups.described(),
            "names": self.names,
            "overrides": self.overrides,
        }
        return {
            "args": arguments,
            "attributes": {},
            "progress": self._attached.state_dict() if self._attached is not None else self._progress,
        }

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._ended = None
        inner = inner_optimizer(optimizer_of(model, optimizer))
        take_arguments(inner, lr_scheduler, args)
        if state.global_step and not steps_taken(inner):
            self._without_optimizer_state(state)
        request = Request(
            names=self.names,
            overrides=self.overrides or {},
            target=self.target or None,
            groups=self.groups,
            total_steps=state.max_steps if self.target else None,
            lr_scheduler=lr_scheduler,
            scheduled=self.window.scheduled() if self.window is not None else {},
            first_step=state.global_step,
            is_stepped_each_step=True,
        )
        self._attached = attach_as_requested(model, optimizer, request)
        _check_saved(model, optimizer, self._attached.decayed, args)
        self._optimizer = self._attached.optimizer
        self._resume(state)
        if self.target:
            _check_best(args, state, self._attached)
        decayed = [shard for shard in self._attached.shards if shard.name in self._attached.decayed]
        self._decayed = sorted({shard.group for shard in decayed})
        if self.window is None:
            return
        if not self._decayed:
            raise ValueError(
                "every param group has weight_decay=0, so there is nothing for the decay window to do; set a"
                " weight_decay (λ)"
            )
        for i in self._decayed:
            if phase_of(self._optimizer.param_groups[i]) is not Phase.DECAY:
                raise UsageError(
                    f"param group {i} has phase={self._optimizer.param_groups[i]['phase']!r}, and the decay window"
                    " switches the phases by itself; leave one of them out"
                )
        start, end = self.window.steps(state.max_steps)
        logger.info(
            "Lp decay acts from optimizer step %d to %d of %d; afterwards zeros are frozen",
            start,
            end,
            state.max_steps,
        )

    def _without_optimizer_state(self, state) -> None:
        if self.target:
            raise UsageError(
                f"the checkpoint of step {state.global_step} has no optimizer state, so the target can't be resumed"
                " from it; train with save_only_model=False, or start anew from its weights with another output_dir"
            )
        logger.warning(
            "resuming at step %d without optimizer state: the checkpoint had none, so the moments start at zero",
            state.global_step,
        )

    def _resume(self, state) -> None:
        """Goes on where the checkpoint was, or begins."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[-1] if isinstance(saved, list) else saved
        progress = (saved or {}).get("progress")
        # Trainer expects it there when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if progress and state.global_step:
            with in_one_line(
                f"the state of the target in the checkpoint of step {state.global_step} is damaged: reading it ended"
                " with",
                "copy the checkpoint anew, or resume from another one",
            ):
                self._attached.load_state_dict(progress)
        self._attached.begin()

    def on_step_begin(self, args, state, control, **kwargs):
        self._attached.watch.check_current()
        if self.target and not self._attached.is_finished:
            # The best model is one of those that are as sparse as asked. A resumed state may have another.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if self.window is not None:
            values = self.window.at(self._attached.steps.taken, state.max_steps)
            for i in self._decayed:
                self._optimizer.param_groups[i].update(values)

    def on_step_end(self, args, state, control, **kwargs):
        self._attached.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps or self._attached.is_finished:
            self._attached.finish()  # counts what came back, where Trainer has loaded the best model
        else:  # stopped early, by a callback or Ctrl-C: it may be resumed
            self._attached.warn_if_unfinished()
        # Nothing of the model is kept: a search trains another one next.
        self._progress, self._ended = self._attached.state_dict(), weakref.ref(self._attached)
        self._attached = self._optimizer = None

    def progress(self, model: nn.Module) -> dict[str, float]:
        """The entries for a log line: of the target's last update. Without a target of single weights zeros are
        counted now, which is collective.
        """
        attached = self.attached
        if attached is None or not attached.decayed:
            return {}
        logs = dict(attached.logs)
        if attached.weight_controller is None:
            logs["lp/measured"] = measure_sparsity(model, names=attached.counted).total
        return logs

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs):
        # Trainer's own log lines come after this callback. Loggers came before it.
        if "loss" in (logs or {}) and "lp/measured" not in logs:
            logs.update(self.progress(model))
        bad = [key for key in ("loss", "grad_norm") if math.isnan((logs or {}).get(key, 0.0))]
        if bad and not _skips_steps(args, optimizer):
            raise RuntimeError(
                f"{bad[0]} is nan at step {state.global_step}: the weights are spoiled. Resume from the last"
                " checkpoint with a lower learning rate or max_grad_norm; with DeepSpeed in bf16,"
                ' "check_grad_overflow": true in its bf16 section skips such steps'
            )


def _skips_steps(args: Any, optimizer: Any) -> bool:
    """Whether a step whose gradients have overflown is skipped: by the loss scaling of fp16, whoever asked for it."""
    return (
        args.fp16
        or os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp16"
        or bool(getattr(wrapper_of(optimizer), "dynamic_loss_scale", False))
    )


def _to_target(target: SparsityTarget | dict[str, Any]) -> SparsityTarget:
    """A target from a mapping of its arguments, as a checkpoint has them; a SparsityTarget is returned as it is."""
    if not isinstance(target, dict):
        return target
    if target.get("curve") not in (None, *CURVES):
        raise UsageError(
            f"a target with a curve of your own ({target['curve']}) can't be made again from a checkpoint; train with "
            "restore_callback_states_from_checkpoint=False, which the target does not need"
        )
    groups = target.get("groups") or ()
    unknown = (
        [] if isinstance(groups, str) else [kind for kind in groups if isinstance(kind, str) and kind not in KINDS]
    )
    if unknown:
        raise UsageError(
            f"a target with groups of your own ({unknown[0]}) can't be made again from a checkpoint; train with "
            "restore_callback_states_from_checkpoint=False, which the target does not need"
        )
    return SparsityTarget(**target)


def _check_saved(model: nn.Module, optimizer: Any, decayed: Iterable[str], args: Any) -> None:
    """Raises UsageError if base weights decay that Trainer's checkpoints would not hold: of a model with adapters it
    saves the adapters alone.
    """
    if (
        hasattr(unwrap(model), "peft_config")
        and decayed
        and wrapper_of(optimizer) is None
        and (args.save_strategy != "no" or args.resume_from_checkpoint)
    ):
        raise UsageError(
            f"base weights of a model with adapters decay ({min(decayed)}), and Trainer saves the adapters alone: its"
            " checkpoints (save_strategy) would not hold the trained base. Set save_strategy='no' and save the model"
            " at the end by lp_dist.merge_adapter(trainer.model), or train under DeepSpeed, whose checkpoints hold"
            " all that is trained"
        )


def _check_best(args: Any, state: Any, attached: Attachment) -> None:
    """Raises UsageError where no evaluation can find a best model that is as sparse as asked."""
    end = max(controller.window.end for controller in attached.controllers)
    if not args.load_best_model_at_end or args.eval_strategy != "steps" or not args.eval_steps:
        return
    interval = args.eval_steps if args.eval_steps >= 1 else math.ceil(state.max_steps * args.eval_steps)
    last = state.max_steps // interval * interval
    if last < end - 1:
        raise UsageError(
            f"load_best_model_at_end=True takes the best of the evaluations, and the last one, at step {last} of"
            f" {state.max_steps}, lies before the end of the target's window at {end}: the best model would not have"
            f" the zeros. Set eval_steps to at most {max(1, state.max_steps - end + 1)}, end the window earlier"
            " (SparsityTarget(end=)), or leave load_best_model_at_end out"
        )
