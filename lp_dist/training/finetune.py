"""The training program of `lp-dist finetune` and of `python -m lp_dist.finetune`, which runs under any launcher.

The same program runs in one process, under torchrun (DDP), `deepspeed` (ZeRO 1 to 3) and `accelerate launch` (all of
these, and FSDP2).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from lp_dist._version import __version__
from lp_dist.checkpoints.hf_names import check_saved_names, skeleton_of
from lp_dist.checkpoints.resuming import check_run
from lp_dist.data.gguf import dequantised
from lp_dist.data.text import load_text, pack
from lp_dist.errors import UsageError, in_one_line, printable, with_flags
from lp_dist.export.model_task import other_than_causal
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD
from lp_dist.report import console, environment, schema
from lp_dist.report.numbers import percent
from lp_dist.report.saved_zeros import count_saved
from lp_dist.sharding.collectives import reduction_device
from lp_dist.sharding.deepspeed import check_deepspeed_config, check_in_shares, join_deepspeed
from lp_dist.sharding.engines import unwrap
from lp_dist.sharding.shards import full_shape
from lp_dist.sparsity.measure import Histogram, Sparsity, measure_histogram, measure_sparsity
from lp_dist.sparsity.selection import decayed_names, param_groups
from lp_dist.targets.controller import Controller
from lp_dist.targets.target import SparsityTarget
from lp_dist.training import arguments
from lp_dist.training.callback import LpCallback
from lp_dist.training.distillation import check_vocabularies
from lp_dist.training.planning import PlanLines, refuse_adapter
from lp_dist.training.trainer import LpTrainer

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Fine-tunes to a sparsity, saves and reports. Bad input ends the program with a line that says what to do.

    Args:
        argv: the words after the name of the program; None: those of this process.
    """
    decay_args = None
    try:
        model_args, data_args, decay_args, args = arguments.parse(sys.argv[1:] if argv is None else argv)
        run(model_args, data_args, decay_args, args)
        if torch.distributed.is_initialized():
            # Leave together. A rank that ends right after a collective can abort ("terminate called without an active
            # exception"): gloo's thread still holds the tensors and needs the lock of an interpreter that is shutting
            # down (pytorch #190489).
            torch.distributed.barrier()
    except UsageError as error:
        message = str(error)
        in_flags = with_flags(message, arguments.FLAGS) if decay_args is None else decay_args.in_flags(message)
        sys.exit(f"lp-dist: error: {printable(in_flags)}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of a run, as `arguments.parse` returns them."""

    model: arguments.ModelArguments
    data: arguments.DataArguments
    decay: arguments.DecayArguments
    training: TrainingArguments


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run trains, on what, and how the model was before.

    Args:
        model: with the weights that it starts from.
        skeleton: the same model without weights, on the meta device.
        tokenizer: of the model.
        train_blocks: packed text to train on.
        eval_blocks: packed text to evaluate on.
        teacher: None without distillation.
        targets: groups first; empty for a given λ and for a dense run.
        names: of the parameters that may decay, the same on every rank.
        parameters: elements of the whole model.
        sparsity: of all parameters.
        histogram: of |w| of all parameters.
    """

    model: torch.nn.Module
    skeleton: torch.nn.Module
    tokenizer: Any
    train_blocks: datasets.Dataset
    eval_blocks: datasets.Dataset
    teacher: torch.nn.Module | None
    targets: list[SparsityTarget]
    names: set[str]
    parameters: int
    sparsity: Sparsity
    histogram: Histogram


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that has trained and saved its model.

    Args:
        trainer: after its training.
        metrics: of the last evaluation.
        sparsity: of the counted parameters.
        histogram: of |w| of the counted parameters.
    """

    trainer: LpTrainer
    metrics: dict[str, float]
    sparsity: Sparsity
    histogram: Histogram

    @property
    def callback(self) -> LpCallback:
        """The one that has run the decay."""
        callbacks = self.trainer.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, LpCallback))


def run(
    model_args: arguments.ModelArguments,
    data_args: arguments.DataArguments,
    decay_args: arguments.DecayArguments,
    args: TrainingArguments,
) -> dict[str, Any]:
    """One run: prepares, trains, saves and reports.

    Returns:
        Its report, which is also written to `output_dir`; empty on other ranks than 0.
    Raises:
        UsageError: bad input; the message names arguments of the library, or flags.
    """
    settings = Settings(model_args, data_args, decay_args, args)
    _set_up_logging(args)
    # Before values are filled in that nobody has given.
    configuration = arguments.chosen(model_args, data_args, decay_args, args)
    reference = schema.read(decay_args.compare_with) if decay_args.compare_with else None
    set_seed(args.seed)
    checkpoint = _checkpoint_to_resume(args, model_args.trust_pickles)
    prepared = _prepare(settings)
    trained = _train(settings, prepared, checkpoint)
    _warn_of_missed_targets(trained)
    return _report(settings, prepared, trained, configuration, reference)


def _checkpoint_to_resume(args: TrainingArguments, trust_pickles: bool) -> str | None:
    """The checkpoint that --resume_from_checkpoint names, or the last one of the run, once it is known to run no code
    unless it is trusted; None: start a new run.
    """
    requested = args.resume_from_checkpoint
    if not requested:
        return None
    checkpoint = requested if requested not in ("true", "True", True) else _last_checkpoint(args.output_dir)
    if checkpoint is None:
        raise UsageError(
            f"--resume_from_checkpoint true, but {args.output_dir} holds no checkpoint; name one, or leave it out"
        )
    # Trainer and the engine unpickle it by themselves.
    check_in_shares(lambda share: check_run(checkpoint, trust_pickles=trust_pickles, share=share))
    state = Path(checkpoint) / "trainer_state.json"
    if not state.is_file():
        raise UsageError(f"{checkpoint} has no trainer_state.json, so it is no checkpoint of a run; name another one")
    with in_one_line(f"{state} is not Trainer's: reading it ended with", "copy it anew, or resume from another one"):
        TrainerState.load_from_json(str(state))
    return checkpoint


def _prepare(settings: Settings) -> Prepared:
    """Reads model, teacher and data, and measures the model as it is before the run."""
    args, decay_args = settings.training, settings.decay
    targets = decay_args.targets()
    if args.weight_decay > 0 and decay_args.p > 1:
        logger.warning(
            "p = %g leaves small weights rather than exact zeros; use p < 1 (0.5, or 0) for zeros", decay_args.p
        )
    path, tokenizer, train_blocks, eval_blocks = read_inputs(settings.model, settings.data, args)
    teacher_path, revision = None, None
    if decay_args.teacher == arguments.SELF:
        teacher_path, revision = path, settings.model.revision
    elif decay_args.teacher is not None:
        teacher_path = _check_teacher(decay_args.teacher, settings.model, path, tokenizer, args)
    if args.deepspeed_plugin is not None:
        join_deepspeed()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        revision=settings.model.revision,
        dtype=getattr(torch, settings.model.dtype),
        trust_remote_code=settings.model.trust_remote_code,
    )
    teacher = None
    if teacher_path is not None:
        # It needs no master weights.
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else settings.model.dtype
        teacher = AutoModelForCausalLM.from_pretrained(
            teacher_path,
            revision=revision,
            dtype=getattr(torch, dtype),
            trust_remote_code=settings.model.trust_remote_code,
        )
    names = _from_rank_0(decayed_names(model, include_embeddings=decay_args.decay_embeddings))
    # The run ends by counting them in its files.
    skeleton = skeleton_of(model)
    check_saved_names(skeleton, names)
    # All of them, since what the target leaves out, and the overrides add, is known when the optimizer is attached.
    parameters = {name: full_shape(param).numel() for name, param in model.named_parameters()}
    return Prepared(
        model=model,
        skeleton=skeleton,
        tokenizer=tokenizer,
        train_blocks=train_blocks,
        eval_blocks=eval_blocks,
        teacher=teacher,
        targets=targets,
        names=names,
        sparsity=measure_sparsity(model, names=parameters),
        histogram=measure_histogram(model, names=parameters),
        parameters=sum(parameters.values()),
    )


def _train(settings: Settings, prepared: Prepared, checkpoint: str | None) -> Trained:
    """Trains from the start or from a checkpoint, evaluates, measures and saves the model. Collective."""
    args, decay_args = settings.training, settings.decay
    # The perplexity before the run. A resumed run has it in its log.
    args.eval_on_start = checkpoint is None
    # The logits of the held-out text would fill the memory.
    args.prediction_loss_only = True
    overrides = decay_args.parsed_overrides()
    decays = args.weight_decay > 0 or any(values.get("weight_decay", 0) > 0 for values in overrides.values())
    callback = LpCallback(
        decay_args.window() if decays else None, target=prepared.targets, names=prepared.names, overrides=overrides
    )
    counts = prepared.sparsity.counts
    all_zero = {name for name, (zeros, elements) in counts.items() if zeros == elements}
    lines = PlanLines(prepared.skeleton, prepared.targets, prepared.names, all_zero, decay_args)
    trainer = LpTrainer(
        model=prepared.model,
        args=args,
        train_dataset=prepared.train_blocks,
        eval_dataset=prepared.eval_blocks,
        processing_class=prepared.tokenizer,
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=optimizer_and_arguments(prepared.model, prepared.names, decay_args, args),
        callbacks=[lines, callback],
        teacher=prepared.teacher,
        distill=decay_args.distill,
        trust_pickles=True,  # they were checked before the model was loaded
    )
    _check_engine(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    sparsity = trainer.measure_sparsity()
    histogram = measure_histogram(trainer.model, names=trainer.counted)
    if trainer.is_fsdp_enabled:
        # A sharded state dict is no checkpoint for from_pretrained.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    return Trained(trainer, metrics, sparsity, histogram)


def _warn_of_missed_targets(trained: Trained) -> None:
    """Warns of targets whose window had not ended when the run ended."""
    attached = trained.callback.attached
    weights, groups = attached.weight_controller, attached.group_controller
    if weights is not None and weights.final_pruning is None:
        logger.warning(
            "the run ended before the target's window did: the sparsity is %s, not %s",
            percent(trained.sparsity.total),
            percent(weights.sparsity),
        )
    if groups is not None and groups.final_pruning is None:
        logger.warning("the run ended before the window of the groups did: they have not reached their target")


def _last_checkpoint(output_dir: str) -> str | None:
    """The last complete checkpoint: Trainer writes trainer_state.json after all other files."""
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        # The file is missing, or incomplete.
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        logger.warning("%s is incomplete; going back to the checkpoint before it", path.name)
    return None


def read_inputs(
    model_args: arguments.ModelArguments, data_args: arguments.DataArguments, args: TrainingArguments
) -> tuple[str | Path, Any, datasets.Dataset, datasets.Dataset]:
    """Where the model is, its tokenizer, and the packed blocks to train and to evaluate on.

    The first process of a node reads them. The others take them from its cache.
    """
    with args.main_process_first(desc="reading the model and the data"):
        path = dequantised(model_args.model) if model_args.model.endswith(".gguf") else model_args.model
        refuse_adapter(path)
        with in_one_line(
            f"--model {model_args.model} can't be read: its config.json ended with",
            "name a hub id, a .gguf file, or a directory that save_pretrained wrote",
        ):
            config = AutoConfig.from_pretrained(
                path, revision=model_args.revision, trust_remote_code=model_args.trust_remote_code
            )
        _refuse_other_tasks("--model", model_args.model, config)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and data_args.block_size > context:
            raise UsageError(
                f"block_size={data_args.block_size} is beyond the model's context of {context} tokens; lower it"
            )
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=model_args.revision, trust_remote_code=model_args.trust_remote_code
        )
        texts = load_text(
            data_args.dataset,
            data_args.dataset_config,
            data_args.dataset_split,
            data_args.text_column,
            data_args.eval_split,
            data_args.eval_fraction,
            args.seed,
        )
        plain = data_args.dataset.endswith((".txt", ".md"))
        train_blocks, eval_blocks = (
            pack(texts[split], tokenizer, data_args.block_size, separate=not plain) for split in ("train", "eval")
        )
    if data_args.max_eval_blocks is not None:
        eval_blocks = eval_blocks.select(range(min(len(eval_blocks), data_args.max_eval_blocks)))
    return path, tokenizer, train_blocks, eval_blocks


def _refuse_other_tasks(flag: str, name: str, config: Any) -> None:
    """Raises UsageError for a model that is no causal language model, whose head would be made anew, at random."""
    other = other_than_causal(config)
    if other is not None:
        raise UsageError(
            f"{flag} {name} is {other}, and this program trains causal language models; train it by Trainer with"
            " lp_dist.LpCallback, or name the language model that it has within, saved by itself"
        )


def _check_teacher(
    name: str, model_args: arguments.ModelArguments, path: str | Path, tokenizer: Any, args: TrainingArguments
) -> str | Path:
    """Where the teacher is. Raises UsageError, before it is loaded, if its tokenizer is another than the model's."""
    trust = {"trust_remote_code": model_args.trust_remote_code}
    with args.main_process_first(desc="reading the teacher"):
        teacher_path = dequantised(name) if name.endswith(".gguf") else name
        refuse_adapter(teacher_path)
        config = AutoConfig.from_pretrained(teacher_path, **trust)
        _refuse_other_tasks("--teacher", name, config)
        check_vocabularies(AutoConfig.from_pretrained(path, revision=model_args.revision, **trust), config)
        if AutoTokenizer.from_pretrained(teacher_path, **trust).get_vocab() != tokenizer.get_vocab():
            raise UsageError(
                f"--teacher {name} has another tokenizer than {model_args.model}; take the dense model that it is"
                " fine-tuned from, or a fine-tune of that"
            )
    return teacher_path


def _from_rank_0(names: set[str]) -> set[str]:
    """The names of rank 0, on every rank. Collective.

    With FSDP's RAM-efficient loading the other ranks hold no values by which all-zero tensors could be recognised.
    """
    objects = [sorted(names)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(objects, device=reduction_device())
    return set(objects[0])


def optimizer_and_arguments(
    model: torch.nn.Module, names: set[str], decay_args: arguments.DecayArguments, args: TrainingArguments
) -> tuple[type, dict[str, Any]]:
    """The optimizer as a class and its arguments, param groups included, which Trainer takes under every engine.

    With FSDP it refuses `optimizers=(opt, None)`. Without "params" the decay group of Trainer holds embeddings and
    head.
    """
    common = {
        "params": param_groups(model, args.weight_decay, names=names),
        "lr": args.learning_rate,
        "p": decay_args.p,
        "l2": decay_args.l2,
        "cutoff": decay_args.cutoff,
    }
    betas = (args.adam_beta1, args.adam_beta2)
    return {
        "adamw": (
            LpAdamW,
            {**common, "betas": betas, "eps": args.adam_epsilon, "precondition": decay_args.precondition or 0.0},
        ),
        "sgd": (LpSGD, {**common, "momentum": decay_args.momentum}),
        "lion": (LpLion, {**common, "betas": betas}),
    }[decay_args.base]


def _report(
    settings: Settings,
    prepared: Prepared,
    trained: Trained,
    configuration: dict[str, Any],
    reference: dict[str, Any] | None,
) -> dict[str, Any]:
    """Writes the report and its page, and prints it, on rank 0. Collective where groups were pruned.

    Args:
        configuration: the values that are not their defaults.
        reference: the report of the run that this one is compared with.
    Returns:
        The report; empty on other ranks.
    """
    args, trainer = settings.training, trained.trainer
    target, groups = _target_entries(trained)
    if not trainer.is_world_process_zero():
        return {}
    sparsity = _count_saved_zeros(args.output_dir, prepared.skeleton, trained.sparsity)
    log = trainer.state.log_history
    start = [entry for entry in log if "eval_perplexity" in entry and entry["step"] == 0]
    report = {
        "version": schema.VERSION,
        "output_dir": args.output_dir,
        "command": arguments.command_line(args),
        "model": settings.model.model,
        "dataset": settings.data.dataset,
        "configuration": configuration,
        "decay": dataclasses.asdict(settings.decay),
        "sparsity_before": prepared.sparsity.only(trained.trainer.counted).total,
        "parameters": prepared.parameters,
        "histograms": schema.histograms(prepared.histogram.only(trained.trainer.counted), trained.histogram),
        "window": _window(trained),
        "target": target,
        "groups": groups,
        "reference": reference and schema.to_compare(reference),
        "perplexity_before": start[0]["eval_perplexity"] if start else None,
        "perplexity_after": trained.metrics["eval_perplexity"],
        "sparsity": sparsity.total,
        "sparsity_of_all": sparsity.zeros / prepared.parameters,
        "zeros": sparsity.zeros,
        "decayed_weights": sparsity.elements,
        "kinds": schema.kinds_table(sparsity),
        "tensors": {
            name: sparsity.counts[name]
            for name, _ in unwrap(trainer.model).named_parameters()
            if name in sparsity.counts
        },
        "steps": trainer.state.global_step,
        "seconds": next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None),
        "engine": _engine(trainer),
        "world_size": args.world_size,
        "environment": environment.environment(args.device, args.world_size),
        "weight_decay": args.weight_decay,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "versions": {"lp_dist": __version__, **environment.versions()},
        "log": log,
        "next": _next(sparsity, args, groups),
    }
    schema.write(args.output_dir, report)
    console.show(report, draw_page(args.output_dir))
    return report


def _target_entries(trained: Trained) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The report's entries of the target of single weights, and of the target of groups. Collective."""
    attached = trained.callback.attached
    weights, groups = attached.weight_controller, attached.group_controller
    return (
        weights and _target_entry(weights),
        groups and {**_target_entry(groups), "kinds": groups.kinds()},
    )


def _target_entry(controller: Controller) -> dict[str, Any]:
    return {
        "sparsity": controller.sparsity,
        "final_pruning": controller.final_pruning,
        "left_dense": controller.left_dense,
    }


def _window(trained: Trained) -> tuple[int, int] | None:
    """The first optimizer step of the decay window, and the one after its last; None without one."""
    callback = trained.callback
    controller = callback.attached.weight_controller or callback.attached.group_controller
    if controller is not None:
        return controller.window.start, controller.window.end
    return callback.window and callback.window.steps(trained.trainer.state.max_steps)


def _count_saved_zeros(directory: str, skeleton: torch.nn.Module, sparsity: Sparsity) -> Sparsity:
    """Counts the zeros of the parameters in the saved files.

    Args:
        directory: of the files.
        skeleton: of the model.
        sparsity: of the trained model.
    Raises:
        RuntimeError: the files hold other zeros than the trained model had.
    """
    saved = count_saved(directory, sparsity.counts, model=skeleton)
    if saved != sparsity:
        raise RuntimeError(
            f"the files in {directory} hold {saved.zeros} exact zeros, but the trained model had {sparsity.zeros};"
            " please report this with the launch command"
        )
    return saved


def draw_page(directory: str) -> Path | None:
    """Draws the page of the report that was written. None: it failed, which is a warning and does not end the run."""
    try:
        from lp_dist.report import page

        return page.write(schema.read(directory), Path(directory) / page.FILE)[0]
    except Exception as error:
        logger.warning(
            "the run is saved, but the page of its report could not be drawn: %s: %s. `lp-dist report %s` draws it",
            type(error).__name__,
            error,
            shlex.quote(directory),
            exc_info=not isinstance(error, UsageError),
        )
        return None


def _engine(trainer: LpTrainer) -> str:
    """The engine that shards the model, in words."""
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        return (
            "DeepSpeed"
            f" ZeRO-{config.config.get('zero_optimization', {}).get('stage', 0)}{', offloaded' * config.is_offload()}"
        )
    return "FSDP2" if trainer.is_fsdp_enabled else "DDP" if trainer.args.world_size > 1 else "one process"


def _next(sparsity: Sparsity, args: TrainingArguments, groups: dict[str, Any] | None) -> str:
    """The command to try next: removing dead groups, more decay if there are hardly any zeros, or generating text."""
    if groups is not None and groups["final_pruning"]:
        return (
            f"lp-dist export {shlex.join([args.output_dir, args.output_dir.rstrip('/') + '-small'])} --shrink --verify"
            "    # removes the dead groups, where the model's configuration allows it"
        )
    if args.weight_decay > 0 and sparsity.total < 0.01:
        return (
            f"{arguments.command_line(args)} --overwrite true --weight_decay {10 * args.weight_decay:g}    # there"
            " are hardly any zeros"
        )
    python = os.path.relpath(sys.executable)
    return (
        f'{sys.executable if python.startswith("..") else python} -c "from transformers import pipeline; '
        f"print(pipeline('text-generation', '{args.output_dir}')('The for statement')[0]['generated_text'])\""
    )


def _check_engine(trainer: LpTrainer) -> None:
    """Raises UsageError, before the first batch, for an engine that would train or save something else."""
    state = trainer.accelerator.state
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise UsageError(
            "FSDP was requested, but Accelerate has no FSDP on this machine and would silently run"
            f" {state.distributed_type.value} instead; use ZeRO-3 here (configs/accelerate_zero3.yaml),"
            " or GPUs"
        )
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise UsageError("FSDP version 1 flattens parameters in a way that is not supported; set fsdp_version: 2")
    if trainer.is_deepspeed_enabled:
        check_deepspeed_config(state.deepspeed_plugin.hf_ds_config.config)


def _set_up_logging(args: TrainingArguments) -> None:
    """Rank 0 logs progress and shows progress bars. The other ranks log warnings alone."""
    main_process = args.process_index == 0
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("lp_dist").setLevel(logging.INFO if main_process else logging.WARNING)
    if not main_process:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
