"""A loop over FSDP2 and tensor parallelism, where transformers shards the model itself. (+) makes it sparse; (-) is
what was there before.

torchrun --nproc_per_node 4 docs/examples/fsdp2_tp.py MODEL TEXT OUT
"""

import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from lp_dist import LpAdamW, SparsityTarget, attach  # (+)

name, text, out = sys.argv[1:4]
STEPS, BATCH, BLOCK, TENSOR = 40, 4, 64, 2
torch.distributed.init_process_group()
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

tokenizer = AutoTokenizer.from_pretrained(name)
# A mixture can spread its experts as well: ep_size=TENSOR.
config = DistributedConfig(fsdp_size=world_size // TENSOR, tp_size=TENSOR, tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, distributed_config=config)
tokens = torch.tensor(tokenizer(Path(text).read_text(), verbose=False)["input_ids"])
blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK).to(model.device)

optimizer = LpAdamW(model.parameters(), lr=1e-3)  # (-) torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
attached = attach(model, optimizer, target=SparsityTarget(0.5), total_steps=STEPS, lr_scheduler=scheduler)  # (+)

for step in tqdm(range(STEPS), disable=rank > 0):
    # Ranks of one tensor-parallel group see the same batch.
    generator = torch.Generator().manual_seed(step * world_size + rank // TENSOR)
    batch = blocks[torch.randint(len(blocks), (BATCH,), generator=generator).to(blocks.device)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    attached.after_step()  # (+)
attached.finish()  # (+) prunes what is missing if the run ended early

model.save_pretrained(out, is_main_process=rank == 0)
if rank == 0:
    tokenizer.save_pretrained(out)
torch.distributed.destroy_process_group()
