"""Trap 11: inf and nan gradients. Where the step is skipped nothing advances, and where it is not the weights become
nan, never zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from helpers.decay_runs import STEPS, WINDOW, attached, batch_of, model_of, optimizer_of, scheduler_of, trained
from helpers.engines import deepspeed_config, ended, make, quiet
from helpers.snapshots import snapshot
from lp_dist import DecayWindow, LpAdamW, LpCallback, LpLion, LpSGD, add_lp_decay, attach, param_groups
from lp_dist.attachment.plan import verify
from lp_dist.optim.state import steps_taken

SKIPPING = {
    **{
        f"{kind}, {dtype}": (kind, dtype)
        for kind in ("zero1", "zero2", "zero3", "zero3 offload")
        for dtype in ("bf16", "fp16")
    },
    "zero0, fp16": ("zero0", "fp16"),
    "zero0, bf16": ("zero0", "bf16"),
    "BF16_Optimizer": ("bf16_optimizer", ""),
    "zero2, bf16, unchecked": ("zero2", "unchecked"),
}
PRECISION = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 128.0}},
    "": {},
    "unchecked": {"bf16": {"enabled": True, "check_grad_overflow": False}},
}


def with_bad_steps(cell: str, rank: int, bad: dict[int, float]) -> dict[str, Any]:
    """STEPS good steps in a window; before those in `bad`, one whose gradients overflow on the last rank."""
    engine = make(SKIPPING[cell][0], model_of(), optimizer_of, scheduler_of, **PRECISION[SKIPPING[cell][1]])
    attachment, weights = attached(engine), next(engine.handle.parameters())
    counts = []
    for step in range(STEPS):
        if step in bad:
            for group in attachment.optimizer.param_groups[:2]:
                group.update(WINDOW.at(steps_taken(attachment.optimizer), STEPS))
            loss = engine(batch_of(step, rank, 2).to(weights.dtype)).float().square().mean()
            engine.step(loss * bad[step] if rank == 1 else loss)
            counts.append((steps_taken(attachment.optimizer), engine.lr_scheduler.last_epoch))
        trained(engine, attachment, step, step + 1)
    taken = snapshot(engine, attachment)
    nan = sum(int(shard.local.values.isnan().sum()) for shard in attachment.shards)
    ended(engine)
    return {"taken": taken, "counts": counts, "nan": nan}


class Recorder(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        inner = verify(optimizer)
        self.seen.append(
            (state.global_step, steps_taken(inner), inner.param_groups[0]["phase"], lr_scheduler.last_epoch)
        )


class Overflowing(transformers.Trainer):
    """Its first and its fifth step overflow."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (math.inf if self.state.global_step in (0, 4) else 1.0)


def through_trainer(directory: Path) -> list[tuple]:
    from lp_dist.sharding.deepspeed import join_deepspeed

    config = deepspeed_config("zero2", train_micro_batch_size_per_gpu="auto", bf16={"enabled": "auto"})
    args = transformers.TrainingArguments(
        directory,
        max_steps=10,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        deepspeed=config,
    )
    join_deepspeed()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (40, 12))]
    recorder = Recorder()
    Overflowing(
        model=model,
        args=args,
        train_dataset=data,
        callbacks=[LpCallback(DecayWindow(2, 6)), recorder],
        optimizer_cls_and_kwargs=(LpAdamW, {"params": param_groups(model, 0.05), "lr": 1e-2, "precondition": 0.0}),
    ).train()
    return recorder.seen


def on_two_ranks(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    quiet()
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for fast fp16; torch computes it on any CPU
    results: dict[str, Any] = {}
    for cell in SKIPPING:
        good, bad = with_bad_steps(cell, rank, {}), with_bad_steps(cell, rank, {0: math.inf, 5: math.nan})
        results[cell] = {
            "differs": sorted(
                key
                for key in good["taken"].keys() | bad["taken"].keys()
                if good["taken"].get(key) != bad["taken"].get(key)
            ),
            "counts": bad["counts"],
            "nan": (good["nan"], bad["nan"]),
            "compared": len(good["taken"]),
        }
    return results | {"trainer": through_trainer(directory)}


def test_trap_11_a_skipped_step_advances_nothing(run_ranks, tmp_path_factory):
    """Neither Adam's step count nor the learning rate nor the window: the run is bit for bit the one without that
    step.
    """
    for rank, results in enumerate(run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("trainer"))):
        window = results.pop("trainer")
        unchecked = results.pop("zero2, bf16, unchecked")
        for cell, seen in results.items():
            assert seen["differs"] == [] and seen["compared"] > 40, f"{cell}, rank {rank}"
            assert seen["counts"] == [(0, 0), (5, 5)] and seen["nan"] == (0, 0), f"{cell}, rank {rank}"
        assert (
            unchecked["counts"] == [(1, 1), (7, 7)] and unchecked["nan"][1] > 0 == unchecked["nan"][0]
        )  # nan, not zero
        assert [step for step, *_ in window] == list(range(1, 11))
        taken = [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
        assert [(steps, rate) for _, steps, _, rate in window] == [(n, n) for n in taken]
        assert [phase for _, _, phase, _ in window] == ["off"] * 3 + ["decay"] * 5 + ["frozen"] * 2


@pytest.mark.parametrize(
    "make_it, make_torch_optimizer",
    [
        (
            lambda groups, how: LpAdamW(groups, lr=0.1, implementation=how),
            lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0),
        ),
        (
            lambda groups, how: LpSGD(groups, lr=0.1, momentum=0.9, implementation=how),
            lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        ),
        (lambda groups, how: LpLion(groups, lr=0.1, implementation=how), None),
    ],
    ids=["LpAdamW", "LpSGD", "LpLion"],
)
@pytest.mark.parametrize("how", ["reference", "foreach"])
@pytest.mark.parametrize("p", [-1.0, 0.5, 1.0, 1.5, 2.0])
def test_a_nan_gradient_makes_the_weight_nan_and_never_zero(make_it, make_torch_optimizer, how, p):
    """As it does in torch's optimizers, where nothing skips the step; a weight that is zero is no exception, and its
    neighbours are.
    """
    start, bad = torch.tensor([0.5, -0.5, 0.0, 0.3, -0.2]), torch.tensor([math.nan, math.inf, math.nan, 1.0, -1.0])
    weights, others = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = make_it([{"params": [weights], "weight_decay": 0.01, "p": p}], how)
    other = make_torch_optimizer([others]) if make_torch_optimizer else None
    for gradient in (torch.ones(5), bad, torch.ones(5)):
        for param, step in ((weights, optimizer), (others, other)):
            param.grad = gradient.clone()
            if step is not None:
                step.step()
    assert not (weights[:2] == 0).any() and weights[3:].isfinite().all() and weights[[0, 2]].isnan().all()
    if make_torch_optimizer:
        assert torch.equal(weights.isfinite(), others.isfinite()) and torch.equal(weights.isnan(), others.isnan())


def test_a_grad_scaler_skips_the_step():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer, scaler = (
        LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0),
        torch.amp.GradScaler("cpu", init_scale=2.0**10),
    )
    attach(model, optimizer)
    for step, factor in enumerate((math.inf, 1.0, math.nan)):
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(2, 5)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == (factor != 1.0) and steps_taken(optimizer) == min(step, 1)
    assert scaler.get_scale() == 2.0**8


@pytest.mark.parametrize(
    "optimizer_of",
    [lambda groups: LpAdamW(groups, lr=0.1), lambda groups: hooked(torch.optim.SGD(groups, lr=0.1))],
    ids=["counts its steps", "counts none"],
)
def test_trap_11_the_window_of_the_callback_does_not_count_skipped_steps(optimizer_of, tmp_path):
    """Trainer counts them: global_step goes on."""
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer, state = (
        optimizer_of(param_groups(model, 0.1)),
        SimpleNamespace(global_step=0, max_steps=8, stateful_callbacks={}),
    )
    callback, phases = LpCallback(DecayWindow(2, 4)), []
    args = transformers.TrainingArguments(tmp_path, use_cpu=True, learning_rate=0.1)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    for skipped in (True, False, True, False, False, False, True, False):
        callback.on_step_begin(None, state, None)
        phases.append(optimizer.param_groups[0]["phase"])
        model(torch.ones(2, 5)).sum().backward()
        if not skipped:
            optimizer.step()
        callback.on_optimizer_step(None, state, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
        state.global_step += 1
    assert phases == ["off"] * 4 + ["decay"] * 2 + ["frozen"] * 2


def hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    add_lp_decay(optimizer)
    return optimizer


@pytest.mark.parametrize("logs", [{"loss": math.nan}, {"loss": 1.0, "grad_norm": math.nan}])
def test_nan_in_the_log_ends_the_run_unless_fp16_skips_such_steps(logs):
    state = SimpleNamespace(global_step=7)
    with pytest.raises(
        RuntimeError, match="is nan at step 7: the weights are spoiled. Resume from the last checkpoint"
    ):
        LpCallback().on_log(SimpleNamespace(fp16=False), state, None, logs=logs)
    LpCallback().on_log(SimpleNamespace(fp16=True), state, None, logs=logs)
    LpCallback().on_log(SimpleNamespace(fp16=False), state, None, logs={"loss": 1.0, "grad_norm": math.inf})
