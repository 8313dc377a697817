"""A teacher in Trainer: its loss, its part of the training, what is refused; and the same on ranks that share it
out.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from helpers.models import student
from lp_dist import LpAdamW, LpCallback, LpTrainer, SparsityTarget, param_groups
from lp_dist.errors import UsageError
from lp_dist.training.distillation import distilled_loss, divergence, sharded_alike

STEPS = 16


def dataset() -> list[dict]:
    """Rows of 12 tokens, of which some don't count."""
    ids = torch.randint(0, 32, (80, 12), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(12) < i % 5, -100, row)} for i, row in enumerate(ids)
    ]


def trainer(directory, model=None, **given) -> LpTrainer:
    model = model or student()
    trainer_arguments = {
        key: given.pop(key) for key in ("teacher", "distill", "compute_loss_func", "callbacks") if key in given
    }
    args = TrainingArguments(
        directory,
        **{
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **given,
        },
    )
    return LpTrainer(
        model=model,
        args=args,
        train_dataset=dataset(),
        eval_dataset=dataset(),
        optimizer_cls_and_kwargs=(LpAdamW, {"params": param_groups(model, 0.0), "lr": 1e-2}),
        **trainer_arguments,
    )


def trained(directory, **given) -> LpTrainer:
    lp_trainer = trainer(directory, **given)
    lp_trainer.train()
    return lp_trainer


def weights(lp_trainer: LpTrainer) -> list[torch.Tensor]:
    return [param.detach().clone() for param in lp_trainer.model.parameters()]


def losses(lp_trainer: LpTrainer) -> list[float]:
    return [entry["loss"] for entry in lp_trainer.state.log_history if "loss" in entry]


# -- the loss -----------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_written_out_in_float64(tokens, weight):
    generator = torch.Generator().manual_seed(1)
    logits, teacher_logits = (torch.randn(3, 5, 11, generator=generator).mul(3) for _ in range(2))
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, 2] = labels[1, 1:4] = -100
    total, counted = 0.0, 0
    for i in range(3):
        for t in range(4):
            if labels[i, t + 1] == -100:
                continue
            p, q = (each[i, t].double().softmax(-1).tolist() for each in (teacher_logits, logits))
            total += (1 - weight) * -math.log(q[labels[i, t + 1]]) + weight * sum(
                a * math.log(a / b) for a, b in zip(p, q)
            )
            counted += 1
    assert counted == 8
    loss = distilled_loss(
        SimpleNamespace(logits=logits.bfloat16().float()),
        labels,
        tokens,
        teacher_logits=teacher_logits,
        distill=weight,
    )
    exact = distilled_loss(
        SimpleNamespace(logits=logits), labels, tokens, teacher_logits=teacher_logits, distill=weight
    )
    assert float(exact) == pytest.approx(total / (counted if tokens is None else 7), rel=1e-5) and float(
        loss
    ) == pytest.approx(float(exact), rel=0.02)


def test_the_divergence_is_none_from_oneself_and_its_gradient_leads_there():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2), requires_grad=True)
    teacher_logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(divergence(logits, logits.detach()), torch.zeros(4))
    assert (divergence(logits, teacher_logits) > 0).all()
    divergence(logits, teacher_logits).sum().backward()
    torch.testing.assert_close(
        logits.grad, logits.detach().softmax(-1) - teacher_logits.softmax(-1), rtol=1e-4, atol=1e-6
    )
    assert divergence(logits.bfloat16(), teacher_logits.bfloat16()).dtype == torch.float32


# -- in Trainer ---------------------------------------------------------------


def test_a_teacher_that_knows_no_more_than_the_model_halves_the_first_loss(tmp_path):
    plain, taught = (
        trained(tmp_path / "a", max_steps=1),
        trained(tmp_path / "b", max_steps=1, teacher=student(), distill=0.5),
    )
    assert losses(taught)[0] == pytest.approx(losses(plain)[0] / 2, rel=1e-4)


def test_the_model_comes_near_its_teacher_and_the_teacher_stays(tmp_path):
    teacher = student(7)
    before = [param.clone() for param in teacher.parameters()]
    far = trained(tmp_path / "a", learning_rate=1e-2)
    near = trained(tmp_path / "b", learning_rate=1e-2, teacher=teacher, distill=1.0)
    ids = torch.stack([row["input_ids"] for row in dataset()])
    with torch.no_grad():
        teacher_logits = teacher(ids).logits
        apart = [
            float(divergence(lp_trainer.model.eval()(ids).logits, teacher_logits).mean())
            for lp_trainer in (tiny_trainer(tmp_path), near, far)
        ]
    assert apart[1] < 0.7 * apart[0] < apart[2]
    assert all(
        torch.equal(a, b) and b.grad is None and not b.requires_grad for a, b in zip(before, teacher.parameters())
    )
    assert not any("teacher" in name for name, _ in near.model.named_parameters())


def tiny_trainer(tmp_path) -> LpTrainer:
    return trainer(tmp_path / "untouched")


def test_an_evaluation_knows_the_text_alone(tmp_path):
    taught = trained(tmp_path / "a", teacher=student(7))
    plain = trainer(tmp_path / "b", model=taught.model)
    assert taught.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_micro_batches_make_the_same_step(tmp_path):
    """In other sums, so to rounding; labels that don't count lie unevenly in them."""
    batches = trained(tmp_path / "a", teacher=student(7), max_steps=4)
    micro_batches = trained(
        tmp_path / "b", teacher=student(7), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert losses(micro_batches) == pytest.approx(losses(batches), rel=1e-3)
    for a, b in zip(weights(batches), weights(micro_batches)):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-3)


def test_a_target_is_reached_and_an_interrupted_run_resumes_bit_for_bit(tmp_path):
    def make(directory, **given):
        return trainer(
            directory,
            teacher=student(7),
            callbacks=[LpCallback(target=SparsityTarget(0.5))],
            save_strategy="steps",
            save_steps=8,
            **given,
        )

    uninterrupted = make(tmp_path / "a")
    uninterrupted.train()
    assert uninterrupted.measure_sparsity().total == pytest.approx(0.5, abs=1e-3)
    saved = tmp_path / "a" / "checkpoint-8"
    resumed = make(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(saved))
    assert all(torch.equal(a, b) for a, b in zip(weights(uninterrupted), weights(resumed)))
    with pytest.raises(
        UsageError, match="had a teacher with distill=0.5, and now there is a teacher with distill=0.25"
    ):
        make(tmp_path / "d", distill=0.25).train(resume_from_checkpoint=str(saved))
    with pytest.raises(UsageError, match="step 8 had a teacher with distill=0.5, .* now there is no teacher"):
        trainer(tmp_path / "e", callbacks=[LpCallback(target=SparsityTarget(0.5))]).train(
            resume_from_checkpoint=str(saved)
        )
    plain = trained(tmp_path / "c", callbacks=[LpCallback(target=SparsityTarget(0.5))])
    assert not all(torch.equal(a, b) for a, b in zip(weights(uninterrupted), weights(plain))), (
        "the teacher does something"
    )


@pytest.mark.parametrize(
    "section, dtype",
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True}}, torch.float16),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, torch.float32),
    ],
)
def test_where_deepspeed_shards_no_weights_the_teacher_is_unsharded_and_in_the_engines_dtype(section, dtype):
    config = {"zero_optimization": {"stage": 2}, **section}
    accelerator = SimpleNamespace(
        distributed_type="DEEPSPEED",
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)),
        device=torch.device("cpu"),
    )
    teacher = sharded_alike(student(), accelerator)
    assert {param.dtype for param in teacher.parameters()} == {dtype} and not teacher.training


@pytest.mark.parametrize(
    "given, word",
    [
        ({"teacher": lambda model: model}, "is the model itself"),
        ({"teacher": lambda _: student(0, 48)}, "knows 48 tokens and the model 32"),
        ({"teacher": lambda _: nn.Linear(2, 2)}, "Linear is no causal"),
        ({"distill": 0.0}, "distill=0.0 must be above 0"),
        ({"distill": 1.5}, "distill=1.5"),
        ({"compute_loss_func": lambda *_: None}, "as well as a loss of your own"),
        ({"label_smoothing_factor": 0.1}, "as well as a loss of your own"),
    ],
)
def test_what_can_not_teach_is_refused_before_training(given, word, tmp_path):
    model = student()
    given = {**given, "teacher": given.get("teacher", lambda _: student(7))(model)}
    with pytest.raises(ValueError, match=word):
        trainer(tmp_path, model=model, **given)
