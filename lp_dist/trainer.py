"""For Hugging Face's Trainer: a callback that runs the decay window, and a self-check that the live optimizer is ours."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from transformers import Trainer, TrainerCallback

from lp_dist.groups import decayed_names
from lp_dist.optim import LpOptimizer
from lp_dist.schedule import DecayWindow
from lp_dist.shards import live_optimizer
from lp_dist.sparsity import Sparsity, measure_sparsity

logger = logging.getLogger(__name__)


class LpCallback(TrainerCallback):
    """`Trainer(..., callbacks=[LpCallback(DecayWindow(...))])`: warm-up, decay, recovery; checks the optimizer at train begin.

    Args:
        window: when the decay acts and with which values; it is asked anew at every step, so a resumed run goes on as it would
            have. None: always, with the groups' own values.
    Raises (at train begin):
        RuntimeError: the optimizer that really steps is not ours.
        ValueError: no group decays, the window holds no step of this run, or it would replace a group's cutoff.
    """

    def __init__(self, window: DecayWindow | None = None) -> None:
        self.window = window

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self._live = live = verify(optimizer)
        if self.window is None:
            return
        if not _decayed(live):
            raise ValueError("every param group has weight_decay=0, so there is nothing for the decay window to do; set a weight_decay (λ)")
        capped = [group["cutoff"] for group in _decayed(live) if group["cutoff"] != math.inf]
        if capped and state.global_step == 0 and "cutoff" not in (self.window.values or {}):
            raise ValueError(f"a param group has cutoff={capped[0]:g}, which the decay window would replace; give it to the window instead: "
                             f'DecayWindow(..., values={{"cutoff": {capped[0]:g}}})')
        start, end = self.window.steps(state.max_steps)
        logger.info("Lp decay acts from optimizer step %d to %d of %d; afterwards zeros are frozen", start, end, state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.window is not None:
            values = self.window.at(state.global_step, state.max_steps)
            for group in _decayed(self._live):
                group.update(values)


def _decayed(optimizer: Any) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group["weight_decay"] > 0]


def verify(optimizer: Any) -> Any:
    """The optimizer that really steps; raises RuntimeError if it has not the Lp decay.

    Accelerate replaces an optimizer that is passed in by DeepSpeedCPUAdam when `offload_optimizer` is set, and says nothing.
    """
    live = live_optimizer(optimizer)
    if not isinstance(live, LpOptimizer) and not hasattr(live, "lp_decay"):
        raise RuntimeError(
            f"the optimizer that steps is {type(live).__module__}.{type(live).__name__}, not one of lp_dist: there would be no Lp decay. "
            'With DeepSpeed and offload_optimizer, set "zero_force_ds_cpu_optimizer": false at the top level of its config and '
            "remove its \"optimizer\" section; else pass optimizer_cls_and_kwargs=(LpAdamW, {...}) to Trainer")
    return live


class LpTrainer(Trainer):
    """Trainer whose evaluations also report perplexity and sparsity, to the progress bar and to every `report_to` logger.

    A callback comes after the loggers and could not add to what they see, hence a subclass; use it or not, as you like.

    Args:
        counted: names of the parameters that count; None: those that `lp_dist.param_groups` would decay in the model as it is
            handed over.
    """

    def __init__(self, *args: Any, counted: Iterable[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted = set(counted) if counted is not None else decayed_names(self.model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))  # beyond 700 a float is infinite
            logs["eval_sparsity"] = self.measure_sparsity().total
        super().log(logs, *args, **kwargs)

    def measure_sparsity(self) -> Sparsity:
        """Of the weights that decay, over all ranks."""
        return measure_sparsity(self.model, self._counted)
