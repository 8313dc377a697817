"""Arguments of `lp-dist finetune`: Hugging Face's and lp_dist's, from the command line or a YAML file.

Errors of the library name arguments (`cap=0.5`). `DecayArguments.in_flags` gives them the names of the flags here.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from lp_dist.checkpoints.entries import read_json
from lp_dist.errors import UsageError, in_one_line, with_flags
from lp_dist.optim.hyperparameters import check_hyperparameters
from lp_dist.optim.nm import PATTERNS
from lp_dist.report.schema import FILE
from lp_dist.structured.resolve import KINDS
from lp_dist.targets.schedule import DecayWindow, window_steps
from lp_dist.targets.target import CURVES, SparsityTarget
from lp_dist.training.distillation import check_distill

# A --teacher: the model as it is before the run.
SELF = "self"


@dataclass
class ModelArguments:
    """What to train."""

    model: str = field(metadata={"help": "Hub id, local directory, or path to a .gguf file."})
    revision: str = field(default="main", metadata={"help": "Revision of the hub model."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": (
                "Dtype to load the weights in. Keep float32: it holds the master weights; use --bf16 for mixed"
                " precision."
            ),
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the model's repository run code of its own."}
    )
    trust_pickles: bool = field(
        default=False, metadata={"help": "Let the checkpoint that is resumed run the code that its files name."}
    )


@dataclass
class DataArguments:
    """What to train it on."""

    dataset: str = field(metadata={"help": "Hub id, or a local .txt, .md, .jsonl, .json, .csv or .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; else documents are held out of the training data."}
    )
    eval_fraction: float = field(
        default=0.05, metadata={"help": "Fraction of the documents that is held out for evaluation."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens of a training example."})
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Evaluate on this many blocks at most."})


@dataclass
class DecayArguments:
    """How to decay: give a --sparsity, or λ as --weight_decay. Without either the fine-tune is dense."""

    sparsity: float | None = field(
        default=None,
        metadata={"help": "Fraction of zeros at the end, below 1. λ is found from the weights. 0: a dense run."},
    )
    pattern: str | None = field(
        default=None,
        metadata={
            "help": (
                "N:M sparsity instead of a --sparsity: at the end at most 2 (4) of each 4 (8) weights along the inputs"
                " of a linear layer are not zero."
            ),
            "choices": list(PATTERNS),
        },
    )
    relative_to: str = field(
        default="decayed",
        metadata={
            "help": "What --sparsity is a fraction of: the weights that decay, or all parameters of the model.",
            "choices": ["decayed", "all"],
        },
    )
    scope: str = field(
        default="global",
        metadata={
            "help": "global: one threshold for all tensors. layer: every tensor reaches the sparsity.",
            "choices": ["layer", "global"],
        },
    )
    curve: str = field(
        default="cubic", metadata={"help": "How the sparsity rises over the decay window.", "choices": sorted(CURVES)}
    )
    cap: float = field(
        default=1.0,
        metadata={
            "help": "Weights with a saliency above this multiple of the threshold do not decay; inf: all decay."
        },
    )
    latent_windows: float | None = field(
        default=None,
        metadata={
            "help": (
                "Time constant of latent weights, in decay windows. Weights below the threshold are zero in the model,"
                " while the optimizer keeps training their values, and they may regrow. 0: no latent weights; they"
                " decay in the model itself. Default: 8 with adamw and a --cap of 1, else 0."
            )
        },
    )
    regrowth: float = field(
        default=0.1,
        metadata={
            "help": (
                "Weights below this fraction of the threshold decay no faster than at it, so that they can regrow"
                " until the last fifth of the window. 0: no regrowth."
            )
        },
    )
    update_every: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two updates of λ. Default: a 20th of the window, 20 at most;"
            " where survivors move a 5th."
        },
    )
    reconstruct: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether survivors move: at each update what is to go is removed at once, and the other weights of the"
                " layer take over, so that its outputs on the last steps' inputs change least. Default: they do unless"
                " weights have moved far before the window, as from scratch. false: what is to go decays."
            )
        },
    )
    reconstruct_memory: float | None = field(
        default=None,
        metadata={
            "help": "GiB that moving survivors may take on each rank. Default: what 8,192 tokens need; plan says it."
        },
    )

    groups: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Structured pruning of channels (feed-forward), heads, kv_groups, experts or expert_channels, one or"
                " several of them. `lp-dist export --shrink` then removes them from the model. With a --sparsity as"
                " well, groups are pruned in the first half of the window and single weights in the second."
            )
        },
    )
    group_sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of each kind of --groups to prune."}
    )
    group_relative_to: str = field(
        default="groups",
        metadata={
            "help": "What --group_sparsity is a fraction of: the groups of a kind, or all parameters of the model.",
            "choices": ["groups", "all"],
        },
    )
    budget: int | None = field(
        default=None, metadata={"help": "Parameters that the model may keep at most, instead of a --group_sparsity."}
    )
    group_scope: str = field(
        default="layer",
        metadata={
            "help": "layer: the same fraction of --groups in every layer. global: one threshold for all layers.",
            "choices": ["layer", "global"],
        },
    )
    group_interval: int = field(default=1, metadata={"help": "Optimizer steps between two decay steps of --groups."})

    base: str = field(
        default="adamw", metadata={"help": "Base optimizer: adamw, sgd or lion.", "choices": ["adamw", "sgd", "lion"]}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of --base sgd."})
    p: float = field(default=0.5, metadata={"help": "Exponent of the Lp norm, in [-4, 4]. Exact zeros need p < 1."})
    l2: float = field(default=0.0, metadata={"help": "λ2, the L2 term of the elastic net."})
    precondition: float | None = field(
        default=None,
        metadata={
            "help": "γ, the exponent of Adam's √v̂+ε in the saliency. Default: 1 for a --sparsity with adamw, else 0."
        },
    )
    cutoff: float = field(
        default=float("inf"), metadata={"help": "Weights with a saliency |w|^(2-p)·(√v̂+ε)^γ above it do not decay."}
    )
    decay_start: float | None = field(
        default=None,
        metadata={
            "help": (
                "Start of the decay window: a fraction of the run if <= 1, else a step. Default: 0 for a λ, 0.1 for a"
                " --sparsity."
            )
        },
    )
    decay_end: float | None = field(
        default=None,
        metadata={
            "help": (
                "End of the decay window, likewise; zeros are frozen after it. Default: 1 for a λ, 0.7 for a"
                " --sparsity."
            )
        },
    )
    decay_embeddings: bool = field(default=False, metadata={"help": "Decay embeddings and the output head as well."})
    overrides: str | None = field(
        default=None,
        metadata={
            "help": (
                'Values for single parameters, by patterns for their names, as JSON: {"*.layers.0.*": {"weight_decay":'
                " 0}}."
            )
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": (
                "Teacher for distillation: a dense model with the same tokenizer, ideally fine-tuned on the same data."
                " self: the model as it is before the run."
            )
        },
    )
    distill: float = field(
        default=0.5,
        metadata={"help": "Weight of the distillation loss, above 0 and at most 1. The cross-entropy has the rest."},
    )
    compare_with: str | None = field(
        default=None, metadata={"help": "output_dir of an earlier run that the report compares with."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start a new run although output_dir holds one."})

    def window(self) -> DecayWindow:
        """The decay window of a run with a given λ.

        Raises:
            ValueError: a value is out of its range.
        """
        values = {"p": self.p, "l2": self.l2, "cutoff": self.cutoff}
        if self.base == "adamw":
            values["precondition"] = self.precondition or 0.0
        elif self.precondition:
            raise UsageError(
                f"--precondition {self.precondition} needs Adam's second moments; use --base adamw, or leave it out"
            )
        check_hyperparameters(**values)
        return DecayWindow(
            0.0 if self.decay_start is None else self.decay_start,
            1.0 if self.decay_end is None else self.decay_end,
            values,
        )

    def targets(self) -> list[SparsityTarget]:
        """The targets of this run: of groups, of single weights, or of both, groups first.

        Raises:
            ValueError: a value is out of its range, or needs another argument. The message names flags.
        """
        self._check_companions()
        if self.groups:
            self._check_groups()
        start = 0.1 if self.decay_start is None else self.decay_start
        end = 0.7 if self.decay_end is None else self.decay_end
        common = {"curve": self.curve, "p": self.p, "precondition": self.precondition}
        common["cap"] = None if self.cap == float("inf") else self.cap
        # Single weights are pruned in the second half of the window if groups are pruned as well.
        middle = (start + end) / 2
        if self.groups and self._prunes_weights and (start <= 1) != (end <= 1):
            raise UsageError(
                f"--decay_start {start:g} and --decay_end {end:g} are a fraction and a step; write both as fractions"
                " or both as steps, so that groups can be pruned in the first half of the window"
            )
        targets = []
        try:
            if self.groups:
                targets.append(
                    SparsityTarget(
                        self.group_sparsity,
                        start=start,
                        end=middle if self._prunes_weights else end,
                        groups=tuple(self.groups),
                        budget=self.budget,
                        scope=self.group_scope,
                        interval=self.group_interval,
                        regrowth=self.regrowth,
                        update_every=self.update_every,
                        reconstruct=self.reconstruct,
                        reconstruct_memory=self.reconstruct_memory,
                        relative_to="all" if self.group_relative_to == "all" else "decayed",
                        **common,
                    )
                )
            if self._prunes_weights:
                targets.append(
                    SparsityTarget(
                        self.sparsity,
                        start=middle if self.groups else start,
                        end=end,
                        scope=self.scope,
                        pattern=self.pattern,
                        latent_windows=self.latent_windows,
                        regrowth=self.regrowth,
                        update_every=self.update_every,
                        reconstruct=self.reconstruct,
                        reconstruct_memory=self.reconstruct_memory,
                        relative_to=self.relative_to,
                        **common,
                    )
                )
        except ValueError as error:
            raise UsageError(self.in_flags(str(error))) from None
        return targets

    @property
    def _prunes_weights(self) -> bool:
        """Whether there is a target of single weights. A sparsity of 0 is a dense run by the same recipe."""
        return bool(self.sparsity) or (self.sparsity is None and self.pattern is not None)

    def in_flags(self, message: str) -> str:
        """An error message of the library with the flags of this command line in place of the arguments."""
        flags = {**FLAGS}
        if self.groups and not self._prunes_weights:
            flags |= {"sparsity": "--group_sparsity", "scope": "--group_scope", "relative_to": "--group_relative_to"}
        elif self.groups:
            # There are two targets. Which of them is meant cannot be told from the name.
            for argument in ("sparsity", "scope", "relative_to", "start", "end"):
                del flags[argument]
        return with_flags(message, flags).replace("--group_relative_to decayed", "--group_relative_to groups")

    def _check_companions(self) -> None:
        """Raises UsageError for an argument without the --sparsity or the --groups that it belongs to."""
        of_both = ("curve", "cap", "regrowth", "update_every", "reconstruct", "reconstruct_memory")
        of_weights = ("relative_to", "scope", "latent_windows", *of_both)
        of_groups = ("group_sparsity", "budget", "group_relative_to", "group_scope", "group_interval")
        changed = [
            name for name in of_weights + of_groups if getattr(self, name) != self.__dataclass_fields__[name].default
        ]
        for name in changed:
            if name in of_weights and self.sparsity is None and self.pattern is None:
                if name in of_both and self.groups:
                    continue
                raise UsageError(
                    f"--{name} {getattr(self, name)} belongs to a --sparsity, and none is given; name one, or leave"
                    " it out"
                )
            if name in of_groups and not self.groups:
                raise UsageError(
                    f"--{name} {getattr(self, name)} belongs to --groups, and none are named; add --groups channels,"
                    " or leave it out"
                )

    def _check_groups(self) -> None:
        """Raises UsageError for --groups and the arguments that belong to them."""
        unknown = next((kind for kind in self.groups if kind not in KINDS), None)
        if unknown is not None:
            raise UsageError(
                f"--groups {unknown} is none of {', '.join(KINDS)}; name one, or several with spaces between them"
            )
        if (self.group_sparsity is None) == (self.budget is None):
            raise UsageError(
                "--groups need one of --group_sparsity, the fraction of each kind to prune, and --budget, the"
                " parameters that the model may keep"
            )
        if self.group_sparsity is not None and not 0.0 < self.group_sparsity < 1.0:
            raise UsageError(f"--group_sparsity {self.group_sparsity:g} must be between 0 and 1, such as 0.3 for 30 %")
        for key in ("budget", "group_interval"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UsageError(f"--{key} {getattr(self, key)} must be at least 1")
        if self.pattern is not None:
            raise UsageError(
                f"--pattern {self.pattern} and --groups: once dead groups are removed, the other weights would be in"
                " other blocks, which break the pattern. Remove the groups first (lp-dist export --shrink), and train"
                " the smaller model to the pattern"
            )

    def parsed_overrides(self) -> dict[str, dict[str, Any]]:
        """`overrides` as `lp_dist.attach` takes it: {pattern: {hyperparameter: value}}.

        Raises:
            UsageError: it is no JSON of that form.
        """
        try:
            values = json.loads(self.overrides or "{}")
        except json.JSONDecodeError as error:
            raise UsageError(
                f'--overrides is no JSON ({error}); write it as \'{{"*.layers.0.*": {{"weight_decay": 0}}}}\''
            ) from None
        if not isinstance(values, dict) or not all(isinstance(group, dict) for group in values.values()):
            raise UsageError(
                f'--overrides {self.overrides} must map patterns to values, as {{"*.layers.0.*": {{"weight_decay":'
                " 0}} does"
            )
        for group in values.values():
            check_hyperparameters(**group)
        return values


@dataclass
class PlanArguments:
    """What `lp-dist plan` shows."""

    gpus: list[int] = field(
        default_factory=lambda: [1, 8, 64],
        metadata={"help": "Numbers of GPUs, one or several, to calculate the memory for."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON, with every tensor."})


def _optional(argument: str, arguments: type) -> Any:
    """A field of the same meaning that need not be given."""
    return field(default="", metadata=dict(arguments.__dataclass_fields__[argument].metadata))


@dataclass
class _OptionalModel(ModelArguments):
    model: str = _optional("model", ModelArguments)


@dataclass
class _OptionalData(DataArguments):
    dataset: str = _optional("dataset", DataArguments)


# Values that a recipe may come to. No recipe has a hundred.
_MAX_VALUES = 10_000
# Switches that let files run code: on the command line alone, since a recipe is a file as well.
_BY_HAND = ("trust_remote_code", "trust_pickles")
# Arguments of Transformers that may name a file of JSON; as flags, with underscores for every dash.
_JSON_FILES = ("__deepspeed", "__fsdp_config", "__accelerator_config")
ARGUMENT_CLASSES = (ModelArguments, DataArguments, DecayArguments, TrainingArguments)
_PLAN_CLASSES = (_OptionalModel, _OptionalData, DecayArguments, TrainingArguments, PlanArguments)
_NAMES = {item.name for arguments in ARGUMENT_CLASSES for item in dataclasses.fields(arguments)}
# The flag of each argument that an error of the library may name, for `with_flags`.
FLAGS = {item.name: f"--{item.name}" for arguments in ARGUMENT_CLASSES for item in dataclasses.fields(arguments)} | {
    "lr": "--learning_rate",
    "eps": "--adam_epsilon",
    "start": "--decay_start",
    "end": "--decay_end",
    "interval": "--group_interval",
}


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, DecayArguments, TrainingArguments]:
    """Parses `[recipe.yaml] [--key value ...]`. The command line wins over the recipe.

    Args:
        argv: the words after the name of the program.
    Raises:
        UsageError: a key is unknown, a value is out of its range, or values contradict each other. Nothing is loaded
            before that.
    """
    # DeepSpeed's launcher puts it first. It is in the environment as well.
    if argv and argv[0].startswith("--local_rank="):
        argv = argv[1:]
    model, data, decays, training = _parse(
        argv, ARGUMENT_CLASSES, "lp-dist finetune", "[recipe.yaml] [--key value ...]"
    )
    _check_output(training, decays)
    return model, data, decays, training


def parse_plan(
    argv: list[str],
) -> tuple[ModelArguments, DataArguments, DecayArguments, TrainingArguments, PlanArguments]:
    """Parses `MODEL|recipe.yaml [--key value ...]` for `lp-dist plan`: the arguments of `lp-dist finetune`, of which
    none but the model is needed, and `PlanArguments`.

    Args:
        argv: the words after the name of the program.
    Raises:
        UsageError: as of `parse`.
    """
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv = ["--model", *argv]
    model, data, decays, training, planning = _parse(
        argv, _PLAN_CLASSES, "lp-dist plan", "MODEL|recipe.yaml [--key value ...]"
    )
    if not model.model:
        raise UsageError("no model is named; give a hub id or a directory first: lp-dist plan MODEL --sparsity 0.5")
    if min(planning.gpus) < 1:
        raise UsageError(f"--gpus {min(planning.gpus)} must be at least 1")
    return model, data, decays, training, planning


def _parse(argv: list[str], classes: tuple[type, ...], program: str, usage: str) -> Any:
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = _from_yaml(Path(argv[0])) + argv[1:]
    _check_json_files(argv)
    if not torch.accelerator.is_available() and "--use_cpu" not in argv:
        argv = [*argv, "--use_cpu", "true"]
    parser = HfArgumentParser(classes, prog=program, usage=f"{program} {usage}")
    with in_one_line("reading the arguments, and the files that they name, ended with", "correct what is wrong there"):
        try:
            parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
            _check(*parsed[1:4])
        # Of Transformers, or of the module that knows the limit.
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UsageError(reason if ";" in reason else f"{reason}; see {program} -h") from None
    return parsed


def _check_json_files(argv: list[str]) -> None:
    """Raises UsageError, which names the file, for a config of an engine that is no object of JSON."""
    for word, value in zip(argv, [*argv[1:], ""]):
        flag, _, attached = word.replace("-", "_").partition("=")
        path = Path(word.partition("=")[2] if attached else value)
        if flag in _JSON_FILES and path.is_file():
            read_json(path)


def _from_yaml(path: Path) -> list[str]:
    """A recipe as words of a command line, so that values are parsed in one way only.

    Raises:
        UsageError: it is no mapping of keys to values, is larger than it looks, or gives a switch that lets code run.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"can't read the recipe {path}: {error.strerror}") from None
    except Exception as error:  # tags with a value that is none of theirs raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"the recipe {path} is no YAML ({reason}); write it as lines of `key: value`") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"the recipe {path} must be one mapping of keys to values; write it as lines of `key: value`")
    if _values_in(recipe, _MAX_VALUES) > _MAX_VALUES:
        raise UsageError(
            f"the recipe {path} comes to more than {_MAX_VALUES:,} values, by aliases perhaps; write out what is meant"
        )
    with in_one_line(f"the recipe {path} holds what is no argument: reading it ended with", "correct it"):
        return _words(path, recipe)


def _values_in(value: Any, limit: int) -> int:
    """How many values this comes to when it is written out, or more than `limit`. By aliases a few lines can be
    billions.
    """
    total, pending = 0, [value]
    while pending and total <= limit:
        value = pending.pop()
        total += 1
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            pending += value
    return total


def _words(path: Path, recipe: dict[Any, Any]) -> list[str]:
    words: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        # By the start of its name as well, which a command line takes for the argument.
        switch = next((switch for switch in _BY_HAND if switch.startswith(name)), None)
        if switch is not None and value is not False:
            raise UsageError(
                f"the recipe {path} has {key}: {value!r:.80}, which lets files run code, and a file can't allow that;"
                f" leave it out, and give --{switch} true on the command line if you trust them"
            )
        # Transformers has a --no_X for some.
        if name not in _NAMES and name.removeprefix("no_") not in _NAMES:
            raise UsageError(
                f"the recipe {path} has the key {key!r:.80}, which is no argument; see lp-dist finetune -h"
            )
        if any(str(item).startswith("--") for item in (value if isinstance(value, list) else [value])):
            raise UsageError(
                f"the recipe {path} has {key}: {value!r:.80}, which would be another argument; correct it"
            )
        if value is None:
            continue
        words.append(f"--{key}")
        if key == "pattern" and isinstance(value, int):
            # YAML reads a bare 2:4 as minutes and seconds.
            value = f"{value // 60}:{value % 60}"
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words.extend(map(str, value))
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


def _check(data: DataArguments, decays: DecayArguments, training: TrainingArguments) -> None:
    if training.optim != TrainingArguments.__dataclass_fields__["optim"].default:
        raise UsageError(
            f"--optim {training.optim.value} would take the place of the Lp optimizer; leave it out, and choose --base"
            " adamw, sgd or lion"
        )
    check_hyperparameters(
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        eps=training.adam_epsilon,
        betas=(training.adam_beta1, training.adam_beta2),
        momentum=decays.momentum,
    )
    check_distill(decays.distill)
    if decays.teacher is None and decays.distill != DecayArguments.__dataclass_fields__["distill"].default:
        raise UsageError(
            f"--distill {decays.distill:g} belongs to a --teacher, and none is given; name one, or leave it out"
        )
    if decays.teacher is not None and training.label_smoothing_factor:
        raise UsageError(
            f"--label_smoothing_factor {training.label_smoothing_factor:g} and a --teacher are two losses; leave one"
            " of them out"
        )
    decays.window()
    overrides, targets = decays.parsed_overrides(), decays.targets()
    if targets:
        requested = (
            f"--pattern {decays.pattern}"
            if decays.pattern
            else f"--sparsity {decays.sparsity:g}"
            if decays.sparsity
            else f"--groups {' '.join(decays.groups)}"
        )
        if training.weight_decay > 0 or any(values.get("weight_decay", 0) > 0 for values in overrides.values()):
            raise UsageError(
                f"{requested} finds λ by itself, so --weight_decay and overrides of it must be 0; leave one of them"
                " out"
            )
        if decays.cutoff != float("inf"):
            raise UsageError(f"{requested} finds the cutoff by itself; leave --cutoff out, and see --cap")
        if training.load_best_model_at_end:
            raise UsageError(
                "--load_best_model_at_end true would put back weights from before they were sparse; set it to false"
            )
    if training.max_steps > 0 and targets:
        for target in targets:
            window_steps(target.start, target.end, training.max_steps)
    elif training.max_steps > 0 and training.weight_decay > 0:
        decays.window().steps(training.max_steps)
    if data.block_size < 2:
        raise UsageError(f"--block_size {data.block_size} must be at least 2 tokens; 512 is the default")
    if training.load_best_model_at_end and training.weight_decay > 0:
        raise UsageError(
            "--load_best_model_at_end true would put back weights from before they were sparse; set it to false"
        )


def _check_output(training: TrainingArguments, decays: DecayArguments) -> None:
    """Raises UsageError where a run is already."""
    output = Path(training.output_dir)
    try:
        is_taken = bool(list(output.glob("checkpoint-*"))) or (output / FILE).exists()
    except OSError as error:
        raise UsageError(
            f"--output_dir {str(output)[:100]} can't be read ({error.strerror}); name another directory"
        ) from None
    if is_taken and not (training.resume_from_checkpoint or decays.overwrite):
        raise UsageError(
            f"{output} holds a run already; resume it with --resume_from_checkpoint true, replace it with --overwrite"
            " true, or choose another --output_dir"
        )


def chosen(*dataclass_objects: Any) -> dict[str, Any]:
    """The values of argument dataclasses that are not their defaults, in JSON's types, without secrets."""
    values: dict[str, Any] = {}
    for arguments in dataclass_objects:
        secrets = _secrets(arguments)
        for item in dataclasses.fields(arguments):
            value = getattr(arguments, item.name)
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            value = value.value if isinstance(value, Enum) else value
            # Transformers has several values for "not given", and puts objects of its own there.
            given = (
                isinstance(value, (bool, int, float, str, list, dict))
                and value not in ("", [], {})
                and (value is not False or default)
            )
            if given and value != default and item.name not in secrets:
                values[item.name] = value
    return values


def _secrets(arguments: Any) -> dict[str, str]:
    """The tokens among the values of a dataclass."""
    return {
        item.name: value
        for item in dataclasses.fields(arguments)
        if item.name.endswith("token") and isinstance(value := getattr(arguments, item.name), str)
    }


def command_line(training: TrainingArguments) -> str:
    """The command that started this process, to be pasted into a shell. Secrets in it become ***."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program: list[Any] = (
        ["python", "-m", module.name] if module and module.name.startswith("lp_dist") else ["lp-dist", "finetune"]
    )
    words = sys.argv[2:] if sys.argv[1:2] == ["finetune"] else sys.argv[1:]
    for secret in filter(None, _secrets(training).values()):
        words = [word.replace(secret, "***") for word in words]
    return shlex.join([*program, *words])
