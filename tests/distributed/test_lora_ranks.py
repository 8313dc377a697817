"""A base that decays beside adapters, under DeepSpeed, whose checkpoints hold it."""

from __future__ import annotations

import torch
from peft import get_peft_model

from helpers.lora import KINDS, llama, unfrozen
from lp_dist import LpAdamW, SparsityTarget, attach, param_groups
from lp_dist.sparsity.selection import matrix_names


def under_deepspeed(rank: int, world_size: int, directory: str) -> list[str]:
    """What of a model with adapters, whose base decays, differs after DeepSpeed's checkpoint was loaded, as Trainer
    saves it: without what is frozen.
    """
    from helpers.engines import gathered, make

    def started():
        model = unfrozen(get_peft_model(llama(), KINDS["LoRA"]))
        engine = make("zero2", model, lambda model: LpAdamW(param_groups(model, 0.0), lr=1e-2))
        return engine, attach(engine.handle, target=SparsityTarget(0.5), total_steps=20)

    def stepped(engine, attached, steps):
        for step in steps:
            ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
            engine.step(engine.handle(input_ids=ids, labels=ids).loss)
            attached.after_step()

    engine, attached = started()
    stepped(engine, attached, range(6))
    engine.handle.save_checkpoint(directory, tag="6", exclude_frozen_parameters=True)
    stepped(engine, attached, range(6, 20))
    other, again = started()
    other.handle.load_checkpoint(directory, tag="6", load_module_strict=False)
    stepped(other, again, range(6, 20))
    uninterrupted, resumed = gathered(engine), gathered(other)
    zeros, elements = (
        sum(counts)
        for counts in zip(
            *(
                (int((uninterrupted[name] == 0).sum()), uninterrupted[name].numel())
                for name in matrix_names(engine.handle.module)
            )
        )
    )
    assert abs(zeros / elements - 0.5) < 1e-3
    return [name for name, weight in uninterrupted.items() if not torch.equal(weight, resumed[name])]


def test_deepspeeds_checkpoints_hold_a_base_that_decays(run_ranks, tmp_path):
    assert run_ranks(under_deepspeed, 2, str(tmp_path / "saved")) == [[], []]
