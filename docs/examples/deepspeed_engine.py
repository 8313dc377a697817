"""A bare DeepSpeed engine, ZeRO-2. (+) makes the model sparse; (-) is what was there before.

torchrun --nproc_per_node 2 docs/examples/deepspeed_engine.py MODEL TEXT OUT, or deepspeed instead of torchrun. The
engine's checkpoint becomes a model by: lp-dist export OUT/checkpoint OUT/model --config MODEL
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lp_dist import LpAdamW, SparsityTarget, attach  # (+)

name, text, out = sys.argv[1:4]
STEPS, BATCH, BLOCK = 40, 4, 64
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # (+) DeepSpeed knows its own optimizers and torch's
}
deepspeed.init_distributed()

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokens = torch.tensor(tokenizer(Path(text).read_text(), verbose=False)["input_ids"])
blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)

optimizer = LpAdamW(model.parameters(), lr=1e-3)  # (-) torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = get_cosine_schedule_with_warmup(optimizer, 5, STEPS)
engine, optimizer, loader, scheduler = deepspeed.initialize(
    model=model, optimizer=optimizer, lr_scheduler=scheduler, training_data=list(blocks), config=CONFIG
)
attached = attach(engine, target=SparsityTarget(0.5), total_steps=STEPS)  # (+)


def forever():
    while True:
        yield from loader


batches = forever()
for _step in tqdm(range(STEPS), disable=int(os.environ.get("RANK", 0)) != 0):
    batch = next(batches).to(engine.device)
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    attached.after_step()  # (+)
attached.finish()  # (+) prunes what is missing if the run ended early

engine.save_checkpoint(f"{out}/checkpoint")
