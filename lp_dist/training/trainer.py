"""A Trainer whose evaluations report perplexity and sparsity, and which can distil from a dense teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from lp_dist.checkpoints.resuming import check_run
from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed import check_in_shares
from lp_dist.sparsity.measure import Sparsity, measure_histogram, measure_sparsity
from lp_dist.sparsity.selection import decayed_names
from lp_dist.training.callback import LpCallback
from lp_dist.training.distillation import check_teacher, distilled_loss, sharded_alike
from lp_dist.training.monitoring import show_on_bar, tensorboards, write_histograms


class DistillationState(TrainerCallback, ExportableState):
    """Keeps the weight of the distillation loss in Trainer's checkpoints; 0: there is no teacher."""

    distill = 0.0

    def state(self) -> dict[str, Any]:
        """For Trainer's checkpoints."""
        return {"args": {}, "attributes": {"distill": self.distill}}

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer expects it there when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


class LpTrainer(Trainer):
    """Trainer that reports the progress of a target, perplexity and sparsity, and can distil from a dense teacher.

    Every `report_to` logger gets the progress with the loss, and perplexity and sparsity with evaluations. It is a
    subclass because callbacks come after the loggers and do not know the progress bar. It is optional: with Trainer
    itself `LpCallback` adds the progress to the log lines alone.

    Args:
        counted: names of the parameters whose zeros are counted; None: those of the target; without one, those
            that decay or may decay.
        teacher: a causal language model with the same tokenizer, loaded as the model was: the dense model, ideally
            after the same fine-tune. It is sharded as the model is (ZeRO-3, FSDP2), or replicated on every rank. It
            takes a forward pass for each batch, and is in no checkpoint.
        distill: weight of the divergence from the teacher in the training loss. The cross-entropy has the rest.
            Evaluations have the cross-entropy alone.
        trust_pickles: resume from a checkpoint whose files name classes that are not known, and run their code.
    Raises:
        ValueError: the teacher has another vocabulary, is the model itself, or one of them is no causal language
            model. When training resumes from a checkpoint: it had no teacher, or another `distill`.
    """

    def __init__(
        self,
        *args: Any,
        counted: Iterable[str] | None = None,
        teacher: nn.Module | None = None,
        distill: float = 0.5,
        trust_pickles: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._trust_pickles = trust_pickles
        self._requested_names = None if counted is None else frozenset(counted)
        self._decayed_names: frozenset[str] | None = None
        self._teacher, self._distill, self._prepared_teacher = teacher, distill, None
        self._distillation = DistillationState()
        self._distillation.distill = distill if teacher is not None else 0.0
        self.add_callback(self._distillation)
        if teacher is not None:
            check_teacher(self.model, teacher, distill)
            if self.compute_loss_func is not None or self.label_smoother is not None:
                raise ValueError(
                    "a teacher was given as well as a loss of your own (compute_loss_func, label_smoothing_factor);"
                    " leave one of them out"
                )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which resumes only from a checkpoint whose files hold nothing but tensors and plain values.

        Raises:
            UsageError: a file of the checkpoint is damaged, or names a class that is not known.
        """
        # True takes the last one of output_dir, and Trainer has words for it where there is none.
        checkpoint = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
        checkpoint = checkpoint or (resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None)
        if checkpoint is not None and not self._trust_pickles:
            check_in_shares(lambda share: check_run(checkpoint, share=share))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_callback_state(self) -> None:
        """Trainer calls it when it has read the state of a checkpoint."""
        state = self.state.stateful_callbacks.get(DistillationState.__name__, self._distillation.state())
        distill = self._distillation.distill
        saved = state["attributes"].get("distill")
        if not isinstance(saved, (int, float)):
            raise UsageError(
                f"trainer_state.json of the checkpoint has distill={saved!r}, which must be a number: it is damaged;"
                " copy the checkpoint anew, or resume from another one"
            )
        if saved != distill:
            before, now = (
                f"a teacher with distill={weight:g}" if weight else "no teacher" for weight in (saved, distill)
            )
            raise UsageError(
                f"the checkpoint of step {self.state.global_step} had {before}, and now there is {now}; resume with"
                " the same teacher and the same distill, or start from its weights with another output_dir"
            )
        super()._load_callback_state()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's loss; in training with the divergence from the teacher."""
        if self._teacher is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # The engine must have prepared the model first.
        if self._prepared_teacher is None:
            self._prepared_teacher = sharded_alike(self._teacher, self.accelerator)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self._prepared_teacher(
                **{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False
            ).logits
        self.compute_loss_func = partial(distilled_loss, teacher_logits=teacher_logits, distill=self._distill)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            # Evaluations have no teacher. Trainer also divides by micro-batches as it does without a teacher.
            self.compute_loss_func = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the progress of a target to losses, and perplexity and sparsity to evaluations. Collective."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LpCallback):
                    logs.update(callback.progress(self.model))
        # Of an evaluation, which has its name in front of all that it measures, and always a runtime.
        prefixes = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
        evaluated = [prefix for prefix in prefixes if prefix != "train" and f"{prefix}_loss" in logs]
        for prefix in evaluated:
            # Beyond 700 a float is infinite.
            logs[f"{prefix}_perplexity"] = math.exp(min(logs[f"{prefix}_loss"], 700.0))
            logs[f"{prefix}_sparsity"] = self.measure_sparsity().total
        super().log(logs, *args, **kwargs)
        show_on_bar(self.callback_handler.callbacks, logs)
        # The same on all ranks, as a histogram is collective.
        if evaluated and "tensorboard" in self.args.report_to:
            histogram = measure_histogram(self.model, names=self.counted)
            for writer in tensorboards(self.callback_handler.callbacks):
                write_histograms(writer, histogram, self.state.global_step)

    @property
    def counted(self) -> frozenset[str]:
        """Names of the parameters of which a sparsity is a share. The same ones as a target's, once the callback has
        attached the optimizer.
        """
        if self._requested_names is not None:
            return self._requested_names
        attached = (
            callback.attached
            for callback in self.callback_handler.callbacks
            if isinstance(callback, LpCallback) and callback.attached is not None
        )
        names = next((attachment.counted for attachment in attached), None)
        if names is not None:
            return names
        if self._decayed_names is None:  # nothing decays, or not yet
            self._decayed_names = frozenset(decayed_names(self.model))
        return self._decayed_names

    def measure_sparsity(self) -> Sparsity:
        """The sparsity of the counted parameters, over all ranks. Collective."""
        return measure_sparsity(self.model, names=self.counted)
