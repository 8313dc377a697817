"""A loop of Hugging Face Accelerate, for one process, DDP, DeepSpeed or FSDP2. (+) makes the model sparse; (-) is what
was there before.

accelerate launch --config_file configs/accelerate_zero2.yaml docs/examples/accelerate_loop.py MODEL TEXT OUT
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lp_dist import LpAdamW, SparsityTarget, attach  # (+)

name, text, out = sys.argv[1:4]
STEPS, BATCH, BLOCK = 40, 4, 64
accelerator = Accelerator()

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokens = torch.tensor(tokenizer(Path(text).read_text(), verbose=False)["input_ids"])
blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
loader = torch.utils.data.DataLoader(blocks, batch_size=BATCH, shuffle=True, drop_last=True)

optimizer = LpAdamW(model.parameters(), lr=1e-3)  # (-) torch.optim.AdamW(model.parameters(), lr=1e-3)
# Accelerate steps a scheduler once for each process.
scheduler = get_cosine_schedule_with_warmup(
    optimizer, 5 * accelerator.num_processes, STEPS * accelerator.num_processes
)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
attached = attach(model, optimizer, target=SparsityTarget(0.5), total_steps=STEPS, lr_scheduler=scheduler)  # (+)


def forever():
    while True:
        yield from loader


batches = forever()
for _step in tqdm(range(STEPS), disable=not accelerator.is_main_process):
    batch = next(batches)
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    attached.after_step()  # (+)
attached.finish()  # (+) prunes what is missing if the run ended early

accelerator.unwrap_model(model).save_pretrained(
    out, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
)
if accelerator.is_main_process:
    tokenizer.save_pretrained(out)
