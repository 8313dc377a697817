"""For Hugging Face's Trainer: a callback that attaches the optimizer and runs the decay window; evaluations with
sparsity, and a teacher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from lp_dist.errors import UsageError
from lp_dist.sparsity.measure import Sparsity, measure_histogram, measure_sparsity
from lp_dist.sparsity.selection import decayed_names
from lp_dist.training.callback import LpCallback
from lp_dist.training.distillation import check_teacher, distilled_loss, sharded_alike
from lp_dist.training.monitoring import show_on_bar, tensorboards, write_histograms

logger = logging.getLogger(__name__)


class _Taught(TrainerCallback, ExportableState):
    """Keeps in Trainer's checkpoints which part of the loss a teacher has."""

    part = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"part": self.part}}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # Trainer wants it there when it saves


class LpTrainer(Trainer):
    """Trainer whose logs also report a target's progress, and its evaluations perplexity and sparsity, to every
    `report_to` logger; and which can be taught by a dense model while it becomes sparse.

    A callback comes after the loggers and could not add to what they see, nor does it know the bar, hence a subclass;
    use it or not, as you like. (With Trainer itself `LpCallback` adds the progress to the log lines alone.)

    Args:
        counted: names of the parameters that count; None: those that `lp_dist.param_groups` would decay in the model
            as it is handed over.
        teacher: a causal language model with the same tokenizer, loaded as the model was: the dense one, best after
            the same fine-tune. It is sharded as the model is (ZeRO-3, FSDP2) or whole on every rank, takes a forward
            pass a batch, and is in no checkpoint.
        distill: the part of the training loss that is the divergence from what the teacher says; the rest is the
            cross-entropy with the text. Evaluations know the text alone.
    Raises:
        ValueError: the teacher speaks of other tokens, is the model itself, or one of them is no causal language
            model. When training goes on from a checkpoint: it was taught otherwise.
    """

    def __init__(
        self,
        *args: Any,
        counted: Iterable[str] | None = None,
        teacher: nn.Module | None = None,
        distill: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._counted = set(counted) if counted is not None else decayed_names(self.model)
        self._teacher, self._distill, self._prepared = teacher, distill, None
        self._taught = _Taught()
        self._taught.part = distill if teacher is not None else 0.0
        self.add_callback(self._taught)
        if teacher is not None:
            check_teacher(self.model, teacher, distill)
            if self.compute_loss_func is not None or self.label_smoother is not None:
                raise ValueError(
                    "a teacher was given as well as a loss of your own (compute_loss_func, label_smoothing_factor);"
                    " leave one of them out"
                )

    def _load_callback_state(self) -> None:
        """Trainer calls it when it has read a checkpoint's state."""
        saved = self.state.stateful_callbacks.get(_Taught.__name__, self._taught.state())["attributes"]["part"]
        if saved != self._taught.part:
            before, now = (
                f"a teacher in {part:g} of its loss" if part else "no teacher" for part in (saved, self._taught.part)
            )
            raise UsageError(
                f"the checkpoint of step {self.state.global_step} had {before}, and now there is {now}; go on with the"
                " same teacher= and distill=, or start anew from its weights with another output_dir"
            )
        super()._load_callback_state()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; in training with a teacher's part in it."""
        if self._teacher is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self._prepared is None:  # not before the engine has made its own of the model
            self._prepared = sharded_alike(self._teacher, self.accelerator)
        with torch.no_grad(), self.accelerator.autocast():
            theirs = self._prepared(
                **{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False
            ).logits
        self.compute_loss_func = partial(distilled_loss, theirs=theirs, part=self._distill)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = (
                None  # an evaluation has no teacher, and Trainer divides by micro-batches as it does without one
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LpCallback):
                    logs.update(callback.progress(self.model))
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))  # beyond 700 a float is infinite
            logs["eval_sparsity"] = self.measure_sparsity().total
        super().log(logs, *args, **kwargs)
        show_on_bar(self.callback_handler.callbacks, logs)
        if (
            "eval_loss" in logs and "tensorboard" in self.args.report_to
        ):  # which is the same on all ranks, as the reduction must be
            histogram = measure_histogram(self.model, names=self._counted)
            for writer in tensorboards(self.callback_handler.callbacks):
                write_histograms(writer, histogram, self.state.global_step)

    def measure_sparsity(self) -> Sparsity:
        """Of the weights that decay, over all ranks."""
        return measure_sparsity(self.model, names=self._counted)
