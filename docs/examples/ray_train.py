"""Hugging Face's Trainer under Ray Train, which starts the workers and keeps checkpoints. (+) makes the model sparse.

python docs/examples/ray_train.py MODEL TEXT.jsonl OUT [WORKERS], on a machine of a Ray cluster, or on this machine
alone. TEXT has a column "text". MODEL, TEXT and OUT must be readable, and OUT writable, on all machines.

Engines are Trainer's, as under any launcher: `deepspeed="configs/ds_zero3.json"` in TrainingArguments, or fsdp. A loop
of your own takes the lines of accelerate_loop.py or deepspeed_engine.py instead, in the same function.
"""

import sys
from pathlib import Path

import ray.train
import ray.train.huggingface.transformers as ray_transformers
import torch
from datasets import load_dataset
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lp_dist import LpAdamW, LpCallback, SparsityTarget  # (+)


class WaitForSave(TrainerCallback):
    """Ray's callback copies the checkpoint on every worker, and none may do so before the first has written it."""

    def on_save(self, args, state, control, **kwargs):
        torch.distributed.barrier()


def train(config: dict[str, str]) -> None:
    """What each worker runs; Ray has joined them in a process group, one GPU each where there are some."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    text = load_dataset("json", data_files=config["text"], split="train")
    samples = text.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns=text.column_names
    )
    args = TrainingArguments(
        config["out"],
        max_steps=40,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        save_strategy="steps",
        save_steps=40,
        logging_steps=10,
    )
    trainer = Trainer(
        model,
        args=args,
        train_dataset=samples,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizer_cls_and_kwargs=(LpAdamW, {}),  # (+) learning rate, betas and eps are those of args
        callbacks=[LpCallback(target=SparsityTarget(0.5))],  # (+)
    )
    trainer.add_callback(WaitForSave())
    trainer.add_callback(ray_transformers.RayTrainReportCallback())
    # After a failure, with RunConfig(failure_config=...), Ray starts this function again.
    checkpoint = ray.train.get_checkpoint()
    folder = str(Path(checkpoint.to_directory()) / "checkpoint") if checkpoint else None
    ray_transformers.prepare_trainer(trainer).train(resume_from_checkpoint=folder)
    trainer.save_model()


name, text, out = sys.argv[1:4]
# Workers run in directories of their own.
paths = {"model": str(Path(name).resolve()) if Path(name).exists() else name}
paths |= {"text": str(Path(text).resolve()), "out": str(Path(out).resolve())}
workers = int(sys.argv[4]) if len(sys.argv) > 4 else 2
result = TorchTrainer(
    train,
    train_loop_config=paths,
    scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.accelerator.is_available()),
    run_config=RunConfig(name="ray", storage_path=paths["out"]),
).fit()
print(f"The last metrics that Ray has: {result.metrics}")
