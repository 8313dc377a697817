"""`lp-dist plan`: what a run would do to a model, from its configuration and the arguments of `lp-dist finetune`."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, TrainerCallback, TrainingArguments

from lp_dist.checkpoints.hf_names import build_on_meta, class_of_config
from lp_dist.errors import UsageError, in_one_line, printable, with_flags
from lp_dist.export.model_task import class_of, other_than_causal
from lp_dist.report.console import say
from lp_dist.report.explanation import Explanation, explain
from lp_dist.targets.target import SparsityTarget
from lp_dist.training import arguments


def main(argv: list[str]) -> None:
    """Prints the plan. Bad input ends the program with a line that says what to do.

    Args:
        argv: the words after the name of the program: MODEL or recipe.yaml, then flags.
    """
    decay_args = None
    try:
        model_args, _, decay_args, args, plan_args = arguments.parse_plan(argv)
        explanation = plan(model_args, decay_args, args, plan_args)
    except UsageError as error:
        message = str(error)
        in_flags = with_flags(message, arguments.FLAGS) if decay_args is None else decay_args.in_flags(message)
        sys.exit(f"lp-dist: error: {printable(in_flags)}")
    print(json.dumps(explanation.as_json()) if plan_args.json else explanation)


def plan(
    model_args: arguments.ModelArguments,
    decay_args: arguments.DecayArguments,
    args: TrainingArguments,
    plan_args: arguments.PlanArguments,
) -> Explanation:
    """What a run with these arguments would do to the model.

    Raises:
        UsageError: the model's configuration can't be read, or what is requested can't be reached.
    """
    model, notes = _model(model_args)
    explanation = explain(
        model,
        decay_args.targets() or None,
        overrides=decay_args.parsed_overrides(),
        include_embeddings=decay_args.decay_embeddings,
        weight_decay=args.weight_decay,
        window=decay_args.window(),
        total_steps=args.max_steps if args.max_steps > 0 else None,
        gpus=plan_args.gpus,
        **memory_arguments(decay_args, args),
        strategy=strategy_of(args),
    )
    if args.max_steps <= 0 and (explanation.targets or explanation.window):
        notes.append("How many steps the run has is known from its data; --max_steps says it here.")
    if decay_args.teacher is not None:
        notes.append("The teacher's weights come on top of the memory.")
    if model_args.dtype != "float32":
        notes.append("The memory is that of fp32 master weights, as --dtype float32 keeps them.")
    explanation.notes.extend(notes)
    return explanation


class PlanLines(TrainerCallback):
    """Prints the short form of the plan when the training begins, on rank 0.

    Args:
        model: on any device; nothing of it is read but shapes.
        targets: of the run.
        names: of the parameters that may decay.
        all_zero: those that are all zeros.
        decay_args: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[SparsityTarget],
        names: set[str],
        all_zero: set[str],
        decay_args: arguments.DecayArguments,
    ) -> None:
        self._model, self._targets, self._names, self._all_zero = model, targets, names, all_zero
        self._decay_args = decay_args

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # What can't be reached is said by `attach`, on every rank.
        with suppress(UsageError):
            explanation = explain(
                self._model,
                self._targets or None,
                names=self._names,
                overrides=self._decay_args.parsed_overrides(),
                weight_decay=args.weight_decay,
                window=self._decay_args.window(),
                total_steps=state.max_steps,
                gpus=[args.world_size],
                **memory_arguments(self._decay_args, args),
                strategy=strategy_of(args) or "DDP",
                groups=False,
                all_zero=self._all_zero,
            )
            for line in explanation.short():
                say(line)
            say("In full: lp-dist plan, with the same recipe and flags")


def memory_arguments(decay_args: arguments.DecayArguments, args: TrainingArguments) -> dict[str, Any]:
    """The arguments of `explain` that the memory depends on."""
    return {
        "optimizer": {"adamw": "LpAdamW", "sgd": "LpSGD", "lion": "LpLion"}[decay_args.base],
        "momentum": decay_args.base == "sgd" and decay_args.momentum > 0,
        "dtype": "bf16" if args.bf16 or args.fp16 else "fp32",
    }


def strategy_of(args: TrainingArguments) -> str | None:
    """What shards the training state, in the words of `lp_dist.report.memory.ENGINES`; None where the arguments don't
    say it.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None:
        stage = config.config.get("zero_optimization", {}).get("stage", 0)
        return f"ZeRO-{stage}{', offload' * config.is_offload()}" if stage else None
    if args.fsdp_plugin_args:
        return f"FSDP2{', offload' * bool(args.fsdp_plugin_args.get('cpu_offload'))}"
    return None


def _model(model_args: arguments.ModelArguments) -> tuple[nn.Module, list[str]]:
    """The model without its weights, and what else is to be known of it."""
    name = model_args.model
    refuse_adapter(name)
    where: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if name.endswith(".gguf"):
        where = {"pretrained_model_name_or_path": Path(name).parent, "gguf_file": Path(name).name}
    with in_one_line(
        f"--model {name} can't be read: its config.json ended with",
        "name a hub id, a .gguf file, or a directory that save_pretrained wrote",
    ):
        settings = AutoConfig.from_pretrained(
            **where, revision=model_args.revision, trust_remote_code=model_args.trust_remote_code
        )
    source = f"the configuration of {name}"
    other = other_than_causal(settings)
    cls = None
    if not (model_args.trust_remote_code and hasattr(settings, "auto_map")):
        bare = "MODEL_MAPPING" if not settings.architectures else ""
        mapping = "MODEL_FOR_CAUSAL_LM_MAPPING" if other is None else bare
        cls = class_of(mapping, settings) if mapping else None
    model = build_on_meta(cls or class_of_config(settings, source, model_args.trust_remote_code), settings, source)
    if other is None:
        return model, []
    return model, [
        f"{type(model).__name__} is no causal language model, so lp-dist finetune does not train it; train it by"
        " Trainer with lp_dist.LpCallback."
    ]


def refuse_adapter(path: str | Path) -> None:
    """Raises UsageError for the directory of an adapter, which would be loaded with its base, or not at all."""
    if (Path(path) / "adapter_config.json").is_file():
        raise UsageError(
            f"--model {path} holds an adapter, whose weights are beside those of the model: merge it first, by lp-dist"
            f" merge BASE {path} OUT, and name --model OUT"
        )
