"""A loop of plain torch. (+) makes the model sparse; (-) is what was there before.

python docs/examples/plain_torch.py MODEL TEXT OUT, such as HuggingFaceTB/SmolLM2-135M book.txt runs/plain
"""

import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lp_dist import LpAdamW, SparsityTarget, attach  # (+)

name, text, out = sys.argv[1:4]
STEPS, BATCH, BLOCK = 40, 4, 64
device = torch.accelerator.current_accelerator() or torch.device("cpu")

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
tokens = torch.tensor(tokenizer(Path(text).read_text(), verbose=False)["input_ids"])
blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
loader = torch.utils.data.DataLoader(blocks, batch_size=BATCH, shuffle=True, drop_last=True)

optimizer = LpAdamW(model.parameters(), lr=1e-3)  # (-) torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = get_cosine_schedule_with_warmup(optimizer, 5, STEPS)
attached = attach(model, optimizer, target=SparsityTarget(0.5), total_steps=STEPS, lr_scheduler=scheduler)  # (+)


def forever():
    while True:
        yield from loader


batches = forever()
for _step in tqdm(range(STEPS)):
    batch = next(batches).to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    attached.after_step()  # (+)
attached.finish()  # (+) prunes what is missing if the run ended early

model.save_pretrained(out)
tokenizer.save_pretrained(out)
