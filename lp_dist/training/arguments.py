"""Arguments of `lp-dist finetune`: Hugging Face's TrainingArguments and ours, from the command line or one YAML."""

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

from lp_dist.errors import UsageError
from lp_dist.optim.hyperparameters import check_hyperparameters
from lp_dist.optim.nm import CHOICES
from lp_dist.report.schema import FILE
from lp_dist.structured.naming import KINDS
from lp_dist.targets.schedule import DecayWindow, window_steps
from lp_dist.targets.target import CURVES, SparsityTarget
from lp_dist.training.distillation import check_part


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


@dataclass
class DataArguments:
    """What to train it on."""

    dataset: str = field(metadata={"help": "Hub id, or a local .txt, .md, .jsonl, .json, .csv or .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; else a part of the data is held out."}
    )
    eval_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents that is held out for evaluation."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens of a training example."})
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Evaluate on at most that many blocks."})


@dataclass
class DecayArguments:
    """How to decay: name a --sparsity, or a λ by --weight_decay; without either the fine-tune is dense."""

    sparsity: float | None = field(
        default=None, metadata={"help": "Share of zeros to end with, below 1; λ is found by itself. 0: none."}
    )
    pattern: str | None = field(
        default=None,
        metadata={
            "help": (
                "Instead of a --sparsity: at most 2 (4) weights of each 4 (8) inputs of a linear layer are not zero at"
                " the end."
            ),
            "choices": list(CHOICES),
        },
    )
    sparsity_of: str = field(
        default="decayed",
        metadata={"help": "Of the weights that decay, or of all parameters.", "choices": ["decayed", "all"]},
    )
    scope: str = field(
        default="global",
        metadata={
            "help": "One threshold for all tensors, or every tensor reaches the sparsity.",
            "choices": ["layer", "global"],
        },
    )
    curve: str = field(
        default="cubic", metadata={"help": "How the zeros grow over the window.", "choices": sorted(CURVES)}
    )
    cap: float = field(
        default=1.0,
        metadata={"help": "Weights with x above so many times the planned threshold feel no decay; inf: all feel it."},
    )
    memory: float | None = field(
        default=None,
        metadata={
            "help": (
                "Windows in which weights that are zero would be forgotten by the optimizer, in which they go on "
                "learning and may come back. 0: they fade in the model itself. 8 with adamw and a cap of 1, else 0."
            )
        },
    )
    grace: float = field(
        default=0.1,
        metadata={
            "help": "Weights that fade can come back until the last fifth of the window, in which they die; 0: none."
        },
    )
    every: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two looks at the weights; else a 20th of the window, 20 at most."},
    )

    groups: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Whole groups that are to die, and are cut out by `lp-dist export --shrink`: channels (feed-forward),"
                " heads, kv_groups; one or several. With a --sparsity as well they die in the first half of the"
                " window, and zeros come among what is left in the second."
            )
        },
    )
    group_sparsity: float | None = field(
        default=None, metadata={"help": "Share of each kind of --groups to end without."}
    )
    group_of: str = field(
        default="groups",
        metadata={
            "help": "Take --group_sparsity of the groups, or of all parameters of the model.",
            "choices": ["groups", "all"],
        },
    )
    budget: int | None = field(
        default=None, metadata={"help": "Parameters of the model to be left at most, instead of a --group_sparsity."}
    )
    group_scope: str = field(
        default="layer",
        metadata={
            "help": "Every layer loses as many of its --groups, or one threshold for all.",
            "choices": ["layer", "global"],
        },
    )
    group_interval: int = field(default=1, metadata={"help": "Optimizer steps between two decays of --groups."})

    base: str = field(
        default="adamw", metadata={"help": "Base optimizer: adamw, sgd or lion.", "choices": ["adamw", "sgd", "lion"]}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of --base sgd."})
    p: float = field(default=0.5, metadata={"help": "Exponent of the norm, in [-4, 4]; exact zeros need p < 1 or so."})
    l2: float = field(default=0.0, metadata={"help": "λ2 of the elastic net."})
    precondition: float | None = field(
        default=None,
        metadata={
            "help": "γ: weights on which the loss is sensitive decay less. 1 for a --sparsity with adamw, else 0."
        },
    )
    cutoff: float = field(
        default=float("inf"), metadata={"help": "Weights with |w|^(2-p)·(√v̂+ε)^γ above it feel no decay."}
    )
    decay_start: float | None = field(
        default=None,
        metadata={
            "help": "Where the decay begins: fraction of the run if <= 1, else a step. 0 for a λ, 0.1 for a sparsity."
        },
    )
    decay_end: float | None = field(
        default=None,
        metadata={"help": "Where it ends and the zeros are frozen, likewise. 1 for a λ, 0.7 for a sparsity."},
    )
    decay_embeddings: bool = field(default=False, metadata={"help": "Decay embeddings and the output head as well."})
    overrides: str | None = field(
        default=None,
        metadata={
            "help": (
                'Values of single parameters, by pattern on their names, as JSON: {"*.layers.0.*": {"weight_decay":'
                " 0}}."
            )
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": (
                "A dense model with the same tokenizer, best of all one of the same fine-tune, whose predictions are"
                " learnt besides the text."
            )
        },
    )
    distill: float = field(default=0.5, metadata={"help": "The part of the loss that the --teacher gives."})
    compare_with: str | None = field(
        default=None, metadata={"help": "output_dir of an earlier run to show beside this one."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start anew although output_dir holds a run."})

    def window(self) -> DecayWindow:
        """The decay window with this run's values; raises ValueError where they are bad."""
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
        """What is asked for: of groups, of single weights, or both, one after the other; raises ValueError where it is
        bad.
        """
        for key in (
            ("sparsity_of", "scope", "curve", "cap", "memory", "grace", "every")
            if self.sparsity is None and self.pattern is None
            else ()
        ):
            if getattr(self, key) != self.__dataclass_fields__[key].default and (
                key not in ("curve", "cap", "grace", "every") or not self.groups
            ):
                raise UsageError(
                    f"--{key} {getattr(self, key)} belongs to a --sparsity, and none is given; name one, or leave"
                    " it out"
                )
        for key in (
            ("group_sparsity", "budget", "group_of", "group_scope", "group_interval") if not self.groups else ()
        ):
            if getattr(self, key) != self.__dataclass_fields__[key].default:
                raise UsageError(
                    f"--{key} {getattr(self, key)} belongs to --groups, and none are named; add --groups channels, or"
                    " leave it out"
                )
        if self.groups:
            self._check_groups()
        first, last = (
            default if given is None else given for given, default in ((self.decay_start, 0.1), (self.decay_end, 0.7))
        )
        middle = (first + last) / 2 if (first <= 1) == (last <= 1) else None
        weights = self.sparsity or (
            self.sparsity is None and self.pattern is not None
        )  # a sparsity of 0 is a dense run by the same recipe
        if self.groups and weights and middle is None:
            raise UsageError(
                f"--decay_start {first:g} and --decay_end {last:g} are a fraction and a step; write both as fractions"
                " or both as steps, so that they have a middle at which groups have died"
            )
        common = {
            "cap": None if self.cap == float("inf") else self.cap,
            "grace": self.grace,
            "curve": self.curve,
            "every": self.every,
            "p": self.p,
            "precondition": self.precondition,
        }
        targets = []
        if self.groups:
            share = {
                "of": "all" if self.group_of == "all" else "decayed",
                "budget": self.budget,
                "scope": self.group_scope,
                "interval": self.group_interval,
            }
            targets.append(
                SparsityTarget(
                    self.group_sparsity,
                    start=first,
                    end=middle if weights else last,
                    groups=tuple(self.groups),
                    **share,
                    **common,
                )
            )
        if weights:
            targets.append(
                SparsityTarget(
                    self.sparsity,
                    start=middle if self.groups else first,
                    end=last,
                    scope=self.scope,
                    memory=self.memory,
                    of=self.sparsity_of,
                    pattern=self.pattern,
                    **common,
                )
            )
        return targets

    def _check_groups(self) -> None:
        """Raises UsageError for --groups and what belongs to them, by the names of the options."""
        odd = next((kind for kind in self.groups if kind not in KINDS), None)
        if odd is not None:
            raise UsageError(
                f"--groups {odd} is none of {', '.join(KINDS)}; name one, or several with spaces between them"
            )
        if (self.group_sparsity is None) == (self.budget is None):
            raise UsageError(
                "--groups need one of --group_sparsity, the share of each kind that is to die, and --budget, the"
                " parameters of the model to be left"
            )
        if self.group_sparsity is not None and not 0.0 < self.group_sparsity < 1.0:
            raise UsageError(f"--group_sparsity {self.group_sparsity:g} must be between 0 and 1, such as 0.3 for 30 %")
        for key in ("budget", "group_interval"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UsageError(f"--{key} {getattr(self, key)} must be at least 1")
        if self.pattern is not None:
            raise UsageError(
                f"--pattern {self.pattern} and --groups: where dead groups are cut out, what stays would move to other"
                " blocks, and be in no pattern any more. Cut the groups out first (lp-dist export --shrink), and"
                " train the smaller model to the pattern"
            )

    def own_values(self) -> dict[str, dict[str, Any]]:
        """`overrides` as `lp_dist.attach` takes it; raises UsageError where it is no JSON of that form."""
        try:
            values = json.loads(self.overrides or "{}")
        except json.JSONDecodeError as error:
            raise UsageError(
                f'--overrides is no JSON ({error}); write it as \'{{"*.layers.0.*": {{"weight_decay": 0}}}}\''
            ) from None
        if not isinstance(values, dict) or not all(isinstance(own, dict) for own in values.values()):
            raise UsageError(
                f'--overrides {self.overrides} must map patterns to values, as {{"*.layers.0.*": {{"weight_decay":'
                " 0}} does"
            )
        for own in values.values():
            check_hyperparameters(**own)
        return values


ARGUMENT_CLASSES = (ModelArguments, DataArguments, DecayArguments, TrainingArguments)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, DecayArguments, TrainingArguments]:
    """`[recipe.yaml] [--key value ...]`; what stands on the command line wins over the recipe.

    Raises UsageError on an unknown key and where values are bad or contradict each other, before anything is loaded.
    """
    if argv and argv[0].startswith(
        "--local_rank="
    ):  # DeepSpeed's launcher puts it first; it is in the environment as well
        argv = argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = _from_yaml(Path(argv[0])) + argv[1:]
    if not torch.accelerator.is_available() and "--use_cpu" not in argv:
        argv = [*argv, "--use_cpu", "true"]
    parser = HfArgumentParser(
        ARGUMENT_CLASSES, prog="lp-dist finetune", usage="lp-dist finetune [recipe.yaml] [--key value ...]"
    )
    try:
        model, data, decays, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        _check(data, decays, training)
    except ValueError as error:  # of Transformers, or of the room that knows the limit
        raise UsageError(str(error)) from None
    return model, data, decays, training


def _from_yaml(path: Path) -> list[str]:
    """A recipe as command-line words, so that there is one way to parse a value."""
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"can't read the recipe {path}: {error.strerror}") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"the recipe {path} must be one mapping of keys to values")
    words: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        words.append(f"--{key}")
        if key == "pattern" and isinstance(value, int):
            value = f"{value // 60}:{value % 60}"  # YAML takes a bare 2:4 for minutes and seconds
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
    check_part(decays.distill)
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
    own, targets = decays.own_values(), decays.targets()
    if targets:
        asked = (
            f"--pattern {decays.pattern}"
            if decays.pattern
            else f"--sparsity {decays.sparsity:g}"
            if decays.sparsity
            else f"--groups {' '.join(decays.groups)}"
        )
        if training.weight_decay > 0 or any(values.get("weight_decay", 0) > 0 for values in own.values()):
            raise UsageError(
                f"{asked} finds λ by itself, so --weight_decay and overrides of it must be 0; leave one of them out"
            )
        if decays.cutoff != float("inf"):
            raise UsageError(f"{asked} finds the cutoff by itself; leave --cutoff out, and see --cap")
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
    output = Path(training.output_dir)
    if not (training.resume_from_checkpoint or decays.overwrite) and (
        list(output.glob("checkpoint-*")) or (output / FILE).exists()
    ):
        raise UsageError(
            f"{output} holds a run already; go on with it by --resume_from_checkpoint true, start anew by --overwrite"
            " true, or choose another --output_dir"
        )


def chosen(*classes: Any) -> dict[str, Any]:
    """What a run was asked for: the values of these dataclasses that are not their defaults, in JSON's types, without
    secrets.
    """
    found: dict[str, Any] = {}
    for one in classes:
        hidden = _secrets(one)
        for item in dataclasses.fields(one):
            value, default = (
                getattr(one, item.name),
                (item.default if item.default_factory is dataclasses.MISSING else item.default_factory()),
            )
            value = value.value if isinstance(value, Enum) else value
            # Transformers writes "nothing" in several ways, and puts objects of its own where nothing was given.
            given = (
                isinstance(value, (bool, int, float, str, list, dict))
                and value not in ("", [], {})
                and (value is not False or default)
            )
            if given and value != default and item.name not in hidden:
                found[item.name] = value
    return found


def _secrets(one: Any) -> dict[str, str]:
    return {
        item.name: value
        for item in dataclasses.fields(one)
        if item.name.endswith("token") and isinstance(value := getattr(one, item.name), str)
    }


def command_line(training: TrainingArguments) -> str:
    """The command that started this process, to be pasted into a shell; secrets in it are starred out."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program: list[Any] = (
        ["python", "-m", module.name] if module and module.name.startswith("lp_dist") else ["lp-dist", "finetune"]
    )
    words = sys.argv[2:] if sys.argv[1:2] == ["finetune"] else sys.argv[1:]
    for secret in filter(None, _secrets(training).values()):
        words = [word.replace(secret, "***") for word in words]
    return shlex.join([*program, *words])
