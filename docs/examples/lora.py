"""A LoRA adapter on a sparse model, merged with the zeros kept. Then some steps in which all but the zeros trains.
(+) marks what lp_dist does.

python docs/examples/lora.py SPARSE_MODEL TEXT.jsonl OUT. SPARSE_MODEL is what lp-dist finetune --sparsity 0.5 made,
or any model with zeros.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from lp_dist import LpAdamW, measure_sparsity, merge_adapter, param_groups  # (+)

name, text, out = sys.argv[1:4]
data = load_dataset("json", data_files=text, split="train").train_test_split(0.1, seed=0)


def trainer_of(model, where, **more):
    args = SFTConfig(
        f"{out}/{where}",
        max_steps=40,
        learning_rate=2e-4,
        per_device_train_batch_size=4,
        max_length=64,
        packing=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"} if isinstance(model, str) else None,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
    )
    return SFTTrainer(model, args=args, train_dataset=data["train"], eval_dataset=data["test"], **more)


trainer = trainer_of(name, "adapter", peft_config=LoraConfig(r=8, target_modules="all-linear"))
trainer.train()
trainer.save_model()
print("with the adapter", trainer.evaluate()["eval_loss"])

merged = merge_adapter(trainer.model)  # (+)
# (+) Zeros stay zero, and all other weights train without decay.
frozen = {"params": param_groups(merged.model, 1.0), "lr": 1e-5, "phase": "frozen"}  # (+)
trainer = trainer_of(
    merged.model,
    "merged",
    processing_class=trainer.processing_class,
    optimizer_cls_and_kwargs=(LpAdamW, frozen),  # (+)
)
print(f"merged, {merged.left_out:.1%} of the adapter's change left out", trainer.evaluate()["eval_loss"])
trainer.train()
print(f"after some steps with {measure_sparsity(trainer.model).total:.2%} zeros", trainer.evaluate()["eval_loss"])
trainer.save_model()
