"""Shared by the tests: runs of a tiny Llama in Hugging Face's Trainer, uninterrupted and interrupted."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from helpers.models import tiny_llama
from lp_dist import LpAdamW, param_groups

STEPS, START, END = 24, 2, 17  # the default window of such a run


def tiny() -> LlamaForCausalLM:
    return tiny_llama(intermediate_size=40)


def groups(model):
    return {"optimizer_cls_and_kwargs": (LpAdamW, {"params": param_groups(model, 0.0), "lr": 1e-2})}


def train(directory, callbacks, ways=groups, trainer=Trainer, resume=None, steps=STEPS, **arguments) -> Trainer:
    model = tiny()
    data = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(0, 32, (80, 12), generator=torch.Generator().manual_seed(0))
    ]
    args = TrainingArguments(
        directory,
        **{
            "max_steps": steps,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **arguments,
        },
    )
    instance = trainer(model=model, args=args, train_dataset=data, callbacks=callbacks, **ways(model))
    instance.train(resume_from_checkpoint=resume)
    return instance


def same(left: Trainer, right: Trainer) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(left.model.state_dict().values(), right.model.state_dict().values(), strict=True)
    )


class Interrupted(TrainerCallback):
    """Saves and stops after a step of an otherwise same run, whose schedule is that of the uninterrupted run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
