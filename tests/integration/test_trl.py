"""TRL's trainers and Seq2SeqTrainer, each with the line that the docs give for it."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments

from lp_dist import LpAdamW, LpCallback, SparsityTarget, measure_sparsity

TARGET = SparsityTarget(0.5, start=2, end=11)
PLAIN = {"prompt": "count to three", "completion": " one two three", "chosen": " one two three", "rejected": " six"}
# Of each trainer: its arguments, the columns of its data, and what it needs besides.
KINDS = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, ("prompt", "completion"), {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, ("prompt", "chosen", "rejected"), {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, ("prompt", "completion", "label"), {}),
    "Reward": (trl.RewardTrainer, trl.RewardConfig, ("prompt", "chosen", "rejected"), {}),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, ("prompt",), {"num_generations": 2, "max_completion_length": 4}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, ("prompt",), {"num_generations": 2, "max_completion_length": 4}),
}


def reward(completions, **kwargs) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "DPO" else [pytest.mark.long]) for kind in KINDS]
)
def test_each_trainer_of_trl_takes_the_optimizer(kind, tiny_model, tmp_path):
    trainer_class, config, columns, more = KINDS[kind]
    rows = [{**PLAIN, "label": i % 2 == 0} for i in range(16)]
    args = config(
        str(tmp_path),
        max_steps=12,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **more,
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    callback = LpCallback(target=TARGET)
    trainer = trainer_class(
        str(tiny_model) if kind == "Reward" else AutoModelForCausalLM.from_pretrained(tiny_model),
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        processing_class=tokenizer,
        callbacks=[callback],
        **({"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}),
    )
    trainer.optimizer_cls_and_kwargs = (LpAdamW, {})
    trainer.train()
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 5e-3
    assert measure_sparsity(trainer.model, names=callback.attached.counted).total == pytest.approx(0.5, abs=1e-3)


def test_the_sequence_to_sequence_trainer_takes_the_optimizer(tiny_model, tmp_path):
    ids = torch.randint(0, 300, (16, 8))
    args = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=5e-3, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = LpCallback(target=TARGET)
    trainer = Seq2SeqTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[callback],
    )
    trainer.optimizer_cls_and_kwargs = (LpAdamW, {})
    trainer.train()
    assert measure_sparsity(trainer.model, names=callback.attached.counted).total == pytest.approx(0.5, abs=1e-3)
