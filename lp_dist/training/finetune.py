"""The training program, one for every strategy: `lp-dist finetune`, or `python -m lp_dist.finetune` under any
launcher.

It runs alone, under torchrun (DDP), `deepspeed` (ZeRO 1 to 3) and `accelerate launch` (all of these, and FSDP2),
unchanged.
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
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from lp_dist._version import __version__
from lp_dist.data.gguf import dequantised
from lp_dist.data.text import load_text, pack
from lp_dist.errors import UsageError
from lp_dist.export.shrink import foreseen
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD
from lp_dist.report import console, environment, schema
from lp_dist.sharding.collectives import reduction_device
from lp_dist.sharding.deepspeed import check_deepspeed_config, join_deepspeed
from lp_dist.sharding.engines import unwrap
from lp_dist.sharding.shards import full_shape
from lp_dist.sparsity.measure import Sparsity, measure_histogram, measure_sparsity
from lp_dist.sparsity.selection import decayed_names, param_groups
from lp_dist.targets.target import SparsityTarget
from lp_dist.training import arguments
from lp_dist.training.callback import LpCallback
from lp_dist.training.distillation import check_vocabularies
from lp_dist.training.trainer import LpTrainer

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Fine-tunes, sparsifies, saves and reports. Bad input ends the program with one line that says what to do."""
    try:
        run(*arguments.parse(sys.argv[1:] if argv is None else argv))
        if torch.distributed.is_initialized():
            # Leave together. A rank that ends right after a collective can abort ("terminate called without an active
            # exception"): gloo's thread still holds the tensors and asks a dying interpreter for its lock (pytorch
            # #190489).
            torch.distributed.barrier()
    except UsageError as error:
        sys.exit(f"lp-dist: error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(
    model_args: arguments.ModelArguments,
    data_args: arguments.DataArguments,
    decay_args: arguments.DecayArguments,
    args: TrainingArguments,
) -> dict[str, Any]:
    """One run; returns its report, which is also written to `output_dir`."""
    _set_up_logging(args)
    asked = arguments.chosen(model_args, data_args, decay_args, args)
    reference = schema.read(decay_args.compare_with) if decay_args.compare_with else None
    set_seed(args.seed)
    resume = args.resume_from_checkpoint
    if resume in ("true", "True", True):
        resume = _last_checkpoint(args.output_dir)
        if resume is None:
            raise UsageError(
                f"--resume_from_checkpoint true, but {args.output_dir} holds no checkpoint; name one, or leave it out"
            )

    targets = decay_args.targets()
    if args.weight_decay > 0 and decay_args.p > 1:
        logger.warning(
            "p = %g leaves small weights rather than exact zeros; use p < 1 (0.5, or 0) for zeros", decay_args.p
        )
    path, tokenizer, train, held_out = _read(model_args, data_args, args)
    teaching = (
        None if decay_args.teacher is None else _check_teacher(decay_args.teacher, model_args, path, tokenizer, args)
    )
    if args.deepspeed_plugin is not None:
        join_deepspeed()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        revision=model_args.revision,
        dtype=getattr(torch, model_args.dtype),
        trust_remote_code=model_args.trust_remote_code,
    )
    if (
        args.process_index == 0 and not is_deepspeed_zero3_enabled()
    ):  # under ZeRO-3 no second model can be made to look at
        _tell_what_stays(model, targets)
    teacher = None
    if teaching is not None:  # it needs no master weights
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else model_args.dtype
        teacher = AutoModelForCausalLM.from_pretrained(
            teaching, dtype=getattr(torch, dtype), trust_remote_code=model_args.trust_remote_code
        )
    counted = _agreed(decayed_names(model, include_embeddings=decay_args.decay_embeddings))
    before, weights = measure_sparsity(model, names=counted).total, measure_histogram(model, names=counted)
    parameters = sum(full_shape(param).numel() for param in model.parameters())

    args.eval_on_start = resume is None  # the perplexity "before"; a resumed run has it in its log
    args.prediction_loss_only = True  # the logits of the held-out text would fill the memory
    overrides = decay_args.own_values()
    decays = args.weight_decay > 0 or any(values.get("weight_decay", 0) > 0 for values in overrides.values())
    trainer = LpTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=_optimizer(model, counted, decay_args, args),
        callbacks=[
            LpCallback(decay_args.window() if decays else None, target=targets, names=counted, overrides=overrides)
        ],
        counted=counted,
        teacher=teacher,
        distill=decay_args.distill,
    )
    _check_engine(trainer)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    sparsity = trainer.measure_sparsity()
    histograms = schema.histograms(weights, measure_histogram(trainer.model, names=counted))
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type(
            "FULL_STATE_DICT"
        )  # a sharded one is no checkpoint for users
    trainer.save_model()
    callback = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LpCallback))
    reached = callback.attached.control
    if reached is not None and reached.closed is None:
        logger.warning(
            "the run ended before the target's window did: the sparsity is %.2f%%, not %.2f%%",
            100 * sparsity.total,
            100 * reached.sparsity,
        )
    whole = callback.attached.groups
    if whole is not None and whole.closed is None:
        logger.warning("the run ended before the window of the groups did: they are not what was asked for")
    window = (
        (reached.start, reached.end)
        if reached is not None
        else (
            (whole.start, whole.end)
            if whole is not None
            else callback.window and callback.window.steps(trainer.state.max_steps)
        )
    )
    known = {
        "model": model_args.model,
        "dataset": data_args.dataset,
        "configuration": asked,
        "decay": dataclasses.asdict(decay_args),
        "sparsity_before": before,
        "parameters": parameters,
        "histograms": histograms,
        "window": window,
        "target": reached and {"sparsity": reached.sparsity, "closed": reached.closed},
        "groups": whole and {"sparsity": whole.sparsity, "closed": whole.closed, "kinds": whole.kinds()},
        "reference": reference and schema.to_compare(reference),
    }
    return _finish(trainer, args, known, metrics, sparsity)


def _last_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint that was written to its end: Trainer writes trainer_state.json after everything else."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        with suppress(OSError, ValueError):  # it is not there, or was itself cut short
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        logger.warning("%s was not written to its end; going back to the one before", path.name)
    return None


def _read(
    model_args: arguments.ModelArguments, data_args: arguments.DataArguments, args: TrainingArguments
) -> tuple[str | Path, Any, datasets.Dataset, datasets.Dataset]:
    """Where the model is, its tokenizer, and the packed blocks to train and to evaluate on; once a node, then from its
    cache.
    """
    with args.main_process_first(desc="reading the model and the data"):
        path = dequantised(model_args.model) if model_args.model.endswith(".gguf") else model_args.model
        context = getattr(
            AutoConfig.from_pretrained(
                path, revision=model_args.revision, trust_remote_code=model_args.trust_remote_code
            ),
            "max_position_embeddings",
            None,
        )
        if context is not None and data_args.block_size > context:
            raise UsageError(
                f"--block_size {data_args.block_size} is beyond the model's context of {context} tokens; lower it"
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
        train, held_out = (
            pack(texts[part], tokenizer, data_args.block_size, separate=not plain) for part in ("train", "eval")
        )
    if data_args.max_eval_blocks is not None:
        held_out = held_out.select(range(min(len(held_out), data_args.max_eval_blocks)))
    return path, tokenizer, train, held_out


def _check_teacher(
    name: str, model_args: arguments.ModelArguments, path: str | Path, tokenizer: Any, args: TrainingArguments
) -> str | Path:
    """Where the teacher is; one that was trained on other tokens is refused before it is loaded."""
    known = {"trust_remote_code": model_args.trust_remote_code}
    with args.main_process_first(desc="reading the teacher"):
        teaching = dequantised(name) if name.endswith(".gguf") else name
        check_vocabularies(
            AutoConfig.from_pretrained(path, revision=model_args.revision, **known),
            AutoConfig.from_pretrained(teaching, **known),
        )
        if AutoTokenizer.from_pretrained(teaching, **known).get_vocab() != tokenizer.get_vocab():
            raise UsageError(
                f"--teacher {name} has another tokenizer than {model_args.model}; take the dense model that it is made"
                " from, or a fine-tune of it"
            )
    return teaching


def _agreed(names: set[str]) -> set[str]:
    """Rank 0's choice on every rank. With FSDP's RAM-efficient loading the others hold no values to see all-zero
    tensors by.
    """
    choice = [sorted(names)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(choice, device=reduction_device())
    return set(choice[0])


def _optimizer(
    model: torch.nn.Module, names: set[str], decay_args: arguments.DecayArguments, args: TrainingArguments
) -> tuple[type, dict[str, Any]]:
    """Our optimizer in the one form that Trainer takes under every engine: a class and its arguments, our groups among
    them.

    (`optimizers=(opt, None)` is refused with FSDP; and without "params" Trainer's own decay group has embeddings and
    head in it.)
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


def _finish(
    trainer: LpTrainer, args: TrainingArguments, known: dict[str, Any], metrics: dict[str, float], sparsity: Sparsity
) -> dict[str, Any]:
    """On rank 0: counts the zeros in the files that were written, writes the report and its page, shows it."""
    if not trainer.is_world_process_zero():
        return {}
    saved = schema.count_saved(args.output_dir, sparsity.counts)
    if saved != sparsity:
        raise RuntimeError(
            f"the files in {args.output_dir} hold {saved.zeros} exact zeros, but the trained model had"
            f" {sparsity.zeros}; please report this with the launch command"
        )
    log = trainer.state.log_history
    start = [entry for entry in log if "eval_perplexity" in entry and entry["step"] == 0]
    summary = {
        "version": schema.VERSION,
        "output_dir": args.output_dir,
        "command": arguments.command_line(args),
        **known,
        "perplexity_before": start[0]["eval_perplexity"] if start else None,
        "perplexity_after": metrics["eval_perplexity"],
        "sparsity": sparsity.total,
        "sparsity_of_all": sparsity.zeros / known["parameters"],
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
        "next": _next(sparsity, args, known["groups"]),
    }
    schema.write(args.output_dir, summary)
    console.show(summary, _page(args.output_dir))
    return summary


def _page(directory: str) -> Path | None:
    """Draws the report that was written. A picture is no reason to end a run whose weights are saved with an error; it
    can be drawn again.
    """
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


def _tell_what_stays(model: torch.nn.Module, targets: list[SparsityTarget]) -> None:
    """Warns before the run where what dies can't be cut out of the model's file afterwards."""
    for target in targets:
        stays: list[str] = []
        with suppress(
            UsageError
        ):  # what can't be is said by `attach`, and a model that can't be made a second time can be trained
            stays = (
                [str(one) for one in foreseen(type(model), model.config, target) if not one.gone]
                if target.groups
                else []
            )
        if stays:
            logger.warning(
                "what dies will not be cut out by lp-dist export --shrink, so the model gets neither smaller nor"
                " faster by it: %s",
                "; ".join(stays),
            )


def _engine(trainer: LpTrainer) -> str:
    """What shards the model, in words."""
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        return (
            "DeepSpeed"
            f" ZeRO-{config.config.get('zero_optimization', {}).get('stage', 0)}{', offloaded' * config.is_offload()}"
        )
    return "FSDP2" if trainer.is_fsdp_enabled else "DDP" if trainer.args.world_size > 1 else "one process"


def _next(sparsity: Sparsity, args: TrainingArguments, groups: dict[str, Any] | None) -> str:
    """The command to try next: dead groups are cut out; a look at what the model writes, or more decay where hardly a
    weight died.
    """
    if groups is not None and groups["closed"]:
        return (
            f"lp-dist export {shlex.join([args.output_dir, args.output_dir.rstrip('/') + '-small'])} --shrink --verify"
            "    # cuts out what is dead, where its configuration can say so"
        )
    if args.weight_decay > 0 and sparsity.total < 0.01:
        return (
            f"{arguments.command_line(args)} --overwrite true --weight_decay {10 * args.weight_decay:g}    # hardly a"
            " weight died"
        )
    python = os.path.relpath(sys.executable)
    return (
        f'{sys.executable if python.startswith("..") else python} -c "from transformers import pipeline; '
        f"print(pipeline('text-generation', '{args.output_dir}')('The for statement')[0]['generated_text'])\""
    )


def _check_engine(trainer: LpTrainer) -> None:
    """Refuses a set-up that would train something else, or save nothing usable, before the first batch."""
    state = trainer.accelerator.state
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise UsageError(
            "FSDP was asked for, but Accelerate has no FSDP on this machine and would run"
            f" {state.distributed_type.value} instead without a word; use ZeRO-3 here (configs/accelerate_zero3.yaml),"
            " or GPUs"
        )
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise UsageError("FSDP version 1 flattens parameters in a way that is not supported; set fsdp_version: 2")
    if trainer.is_deepspeed_enabled:
        check_deepspeed_config(state.deepspeed_plugin.hf_ds_config.config)


def _set_up_logging(args: TrainingArguments) -> None:
    """Rank 0 tells what happens and shows the bars; the other ranks speak up only when something is wrong."""
    main_process = args.process_index == 0
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("lp_dist").setLevel(logging.INFO if main_process else logging.WARNING)
    if not main_process:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
