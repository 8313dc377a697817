"""TRL's SFTTrainer, which is a Trainer. (+) makes the model sparse.

python docs/examples/trl_sft.py MODEL TEXT.jsonl OUT, or through any launcher; TEXT has a column "text" (or
"messages", "prompt" and "completion"). RewardTrainer takes the same lines; DPO, KTO, GRPO and RLOO have no such
argument, and take it as an attribute before train(): trainer.optimizer_cls_and_kwargs = (LpAdamW, {}).
"""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from lp_dist import LpAdamW, LpCallback, SparsityTarget  # (+)

name, text, out = sys.argv[1:4]
args = SFTConfig(
    out,
    max_steps=40,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    max_length=64,
    packing=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    logging_steps=10,
)
trainer = SFTTrainer(
    name,
    args=args,
    train_dataset=load_dataset("json", data_files=text, split="train"),
    optimizer_cls_and_kwargs=(LpAdamW, {}),  # (+) learning rate, betas and eps are those of args
    callbacks=[LpCallback(target=SparsityTarget(0.5))],  # (+)
)
trainer.train()
trainer.save_model()
