"""Trainer as people use it: the best model, a second train(), two callbacks, arguments that the optimizer was not
given, a hyperparameter search. What is said is counted in what comes out.
"""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from helpers.targets import decaying
from helpers.trainer_runs import END, START, STEPS, Interrupted, same, tiny, train
from lp_dist import DecayWindow, LpAdamW, LpCallback, LpTrainer, measure_sparsity, param_groups
from lp_dist.errors import UsageError

HALF = decaying(0.5)


def plain(model):
    """As little as one can write."""
    return {"optimizer_cls_and_kwargs": (LpAdamW, {})}


def with_lambda(model):
    return {"optimizer_cls_and_kwargs": (LpAdamW, {"params": param_groups(model, 0.3), "lr": 1e-2})}


def in_file(directory: str | Path, callback: LpCallback) -> float:
    """The share of zeros in a saved model, of the parameters that decay."""
    saved = load_file(Path(directory) / "model.safetensors")
    tensors = [saved[name] for name in callback.attached.decayed]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


class Worse(Trainer):
    """Its evaluations get worse from step to step, as where pruning costs loss."""

    def _determine_best_metric(self, metrics, trial):
        metrics["eval_loss"] = 1.0 + self.state.global_step / 100
        return super()._determine_best_metric(metrics, trial)

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_loss"] = 1.0 + self.state.global_step / 100
        return metrics


EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "save_total_limit": 2,
}


def evaluated(trainer):
    """A Trainer class with an evaluation set."""

    class Evaluated(trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=kwargs["train_dataset"][:8], **kwargs)

    return Evaluated


# -- the best model -----------------------------------------------------------


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_model_is_one_behind_the_window(strategy, tmp_path):
    callback = LpCallback(target=HALF)
    trainer = train(tmp_path, [callback], trainer=evaluated(Worse), **{**EVALUATED, "save_strategy": strategy})
    assert trainer.state.best_global_step == 18 >= END - 1
    trainer.save_model(tmp_path / "model")
    assert callback.attached.logs["lp/measured"] == in_file(tmp_path / "model", callback)
    assert in_file(tmp_path / "model", callback) == pytest.approx(0.5, abs=1e-3)


def test_early_stopping_waits_for_the_end_of_the_window(tmp_path):
    callback = LpCallback(target=HALF)
    trainer = train(
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=1), callback],
        trainer=evaluated(Worse),
        **EVALUATED,
    )
    assert trainer.state.global_step == 21, "the first one behind the window is the best, and the next one is worse"
    trainer.save_model(tmp_path / "model")
    assert callback.attached.logs["lp/measured"] == in_file(tmp_path / "model", callback)
    assert in_file(tmp_path / "model", callback) == pytest.approx(0.5, abs=1e-3)


class BringsBackOthers(Worse):
    """What it takes for the best model is a dense one."""

    def _load_best_model(self):
        with torch.no_grad():
            for param in self.model.parameters():
                param.fill_(0.5)


@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "stopped early"])
def test_what_comes_back_as_the_best_model_is_counted(stopped, tmp_path, caplog):
    callback = LpCallback(target=HALF)
    stopping = [EarlyStoppingCallback(early_stopping_patience=1)] if stopped else []
    train(tmp_path, [*stopping, callback], trainer=evaluated(BringsBackOthers), **EVALUATED)
    assert callback.attached.logs["lp/measured"] == 0.0
    assert "0.00 % of the weights are zero now, and 50." in caplog.text and "load_best_model_at_end" in caplog.text


def test_a_run_whose_evaluations_all_lie_before_the_end_of_the_window_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the last one, at step 15 of 24, lies before the end .* at 17.*at most 8"):
        train(
            tmp_path,
            [LpCallback(target=HALF)],
            trainer=evaluated(Worse),
            **{**EVALUATED, "eval_steps": 15, "save_steps": 15},
        )


# -- another training on the same Trainer -------------------------------------


def test_a_second_training_has_steps_and_a_window_of_its_own(tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["phase"])

    callback = LpCallback(DecayWindow(0.25, 0.75))
    trainer = train(tmp_path, [callback, Spy()], ways=with_lambda)
    first = measure_sparsity(trainer.model).zeros
    trainer.train()
    assert seen == 2 * (6 * ["off"] + 12 * ["decay"] + 6 * ["frozen"])
    assert measure_sparsity(trainer.model).zeros > first > 0


def test_a_second_training_to_the_same_target_is_refused_for_its_zeros_before_a_step(tmp_path):
    trainer = train(tmp_path, [LpCallback(target=HALF)])
    with pytest.raises(UsageError, match="50.0% zeros already, and the target is 50.0%; ask for more"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_two_callbacks_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(UsageError, match="a later one on the same optimizer has replaced.*Of several callbacks leave"):
        train(tmp_path, [LpCallback(target=HALF), LpCallback(target=decaying(0.3))])


def test_a_state_from_the_middle_of_a_window_is_not_gone_on_with_without_the_callback(tmp_path):
    train(tmp_path, [LpCallback(target=HALF), Interrupted(10)])
    with pytest.raises(UsageError, match="from the middle of a target's window, and no target goes on with it"):
        train(tmp_path, [], resume=True)
    with pytest.raises(UsageError, match="trained for .* there is no target of weights"):
        train(tmp_path, [LpCallback()], resume=True)


def test_a_dense_checkpoint_is_gone_on_with_where_the_window_lies_ahead(tmp_path):
    train(tmp_path, [Interrupted(6)])
    callback = LpCallback(target=decaying(0.5, start=8, end=20))
    trainer = train(tmp_path, [callback], resume=True)
    assert callback.attached.steps.taken == STEPS and callback.attached.weight_controller.window[:2] == (8, 20)
    assert measure_sparsity(trainer.model).total == pytest.approx(0.5, abs=1e-3)
    train(tmp_path / "late", [Interrupted(6)])
    with pytest.raises(UsageError, match=rf"the run is at step 6, and the window of the weights began at {START}"):
        train(tmp_path / "late", [LpCallback(target=HALF)], resume=True)


def test_a_finished_run_is_resumed_for_more_steps_and_keeps_its_zeros(tmp_path, caplog):
    train(tmp_path, [LpCallback(target=HALF)], save_strategy="steps", save_steps=STEPS)
    caplog.clear()
    callback = LpCallback(target=HALF)
    trainer = train(tmp_path, [callback], resume=True, steps=STEPS + 12)
    assert trainer.state.global_step == STEPS + 12
    assert measure_sparsity(trainer.model, names=callback.attached.counted).total == pytest.approx(0.5, abs=1e-3)


def test_a_run_that_ran_out_of_memory_begins_anew_with_smaller_batches(tmp_path):
    """Trainer keeps the optimizer, with the steps of the attempt."""
    phases: list[str] = []

    class Full(LpTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) == 4 and self.state.global_step == 5:
                phases.clear()
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            phases.append(optimizer.param_groups[0]["phase"])

    train(
        tmp_path, [LpCallback(DecayWindow(0.5, 0.75)), Spy()], ways=with_lambda, trainer=Full,
        auto_find_batch_size=True,
    )  # fmt: skip
    assert phases == 12 * ["off"] + 6 * ["decay"] + 6 * ["frozen"]


def test_a_run_that_ran_out_of_memory_in_its_window_is_not_begun_again_on_half_pruned_weights(tmp_path):
    class Full(LpTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) == 4 and self.state.global_step == 10:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    with pytest.raises(UsageError, match="from the middle of a target's window"):
        train(tmp_path, [LpCallback(target=HALF)], trainer=Full, auto_find_batch_size=True)


# -- what TrainingArguments say -----------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_arguments_are_the_defaults_of_an_optimizer_that_was_given_none(schedule, tmp_path, caplog):
    arguments = {
        "learning_rate": 2e-3,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": schedule,
        "warmup_steps": 3,
    }
    by_hand = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-6}
    expected = train(
        tmp_path / "named",
        [LpCallback(target=HALF)],
        ways=lambda model: {"optimizer_cls_and_kwargs": (LpAdamW, by_hand)},
        **arguments,
    )
    taken = train(tmp_path / "taken", [LpCallback(target=HALF)], ways=plain, **arguments)
    assert same(taken, expected)
    assert "the optimizer's own holds" not in caplog.text


def test_a_resumed_schedule_is_not_touched(tmp_path):
    arguments = {"learning_rate": 2e-3, "lr_scheduler_type": "linear", "adam_beta2": 0.95}
    expected = train(tmp_path / "whole", [LpCallback(target=HALF)], ways=plain, **arguments)
    train(tmp_path / "cut", [LpCallback(target=HALF), Interrupted(10)], ways=plain, **arguments)
    assert same(train(tmp_path / "cut", [LpCallback(target=HALF)], ways=plain, resume=True, **arguments), expected)


def test_other_arguments_than_a_checkpoints_are_said(tmp_path, caplog):
    arguments = {"learning_rate": 2e-3, "lr_scheduler_type": "linear", "adam_beta2": 0.95}
    expected = train(tmp_path / "uncut", [LpCallback(target=HALF)], ways=plain, **arguments)
    for name in ("rate", "betas"):
        train(tmp_path / name, [LpCallback(target=HALF), Interrupted(10)], ways=plain, **arguments)
    caplog.clear()
    faster = {**arguments, "learning_rate": 4e-3}
    trainer = train(tmp_path / "rate", [LpCallback(target=HALF)], ways=plain, resume=True, **faster)
    assert same(trainer, expected), "the schedule is the checkpoint's"
    assert "from a rate of 0.002; the rate of 0.004 with which the optimizer was made" in caplog.text
    other = {**arguments, "adam_beta2": 0.9}
    trainer = train(tmp_path / "betas", [LpCallback(target=HALF)], ways=plain, resume=True, **other)
    assert (
        "param group 0 has betas=(0.9, 0.95), from a checkpoint perhaps; going on with betas=(0.9, 0.9)" in caplog.text
    )
    assert not same(trainer, expected) and trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.9)


def test_what_the_caller_named_holds_and_what_differs_is_said_once(tmp_path, caplog):
    ways = lambda model: {"optimizer_cls_and_kwargs": (LpAdamW, {"lr": 1e-2, "betas": (0.8, 0.99)})}  # noqa: E731
    trainer = train(tmp_path, [LpCallback(target=HALF)], ways=ways, learning_rate=2e-3, adam_beta1=0.7)
    group = trainer.optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.99) and group["initial_lr"] == 1e-2
    lines = [record.getMessage() for record in caplog.records if "the optimizer's own holds" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == [
        "the optimizer was made with lr=0.01, and TrainingArguments say 0.002",
        "the optimizer was made with betas=(0.8, 0.99), and TrainingArguments say (0.7, 0.999)",
    ]


def test_a_schedule_that_has_ended_before_the_window_is_refused_since_trainer_steps_it_each_step(tmp_path):
    def ways(model):
        optimizer = LpAdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - min(step, 2) / 2)
        return {"optimizers": (optimizer, schedule)}

    with pytest.raises(UsageError, match=f"the learning rate is 0 in the whole window from step {START} to {END}"):
        train(tmp_path, [LpCallback(target=HALF)], ways=ways)


def test_a_schedule_that_is_made_from_the_rate_itself_needs_it_named(tmp_path):
    with pytest.raises(UsageError, match="lr_scheduler_type='polynomial' was made from the optimizer's learning rate"):
        train(tmp_path, [LpCallback(target=HALF)], ways=plain, lr_scheduler_type="polynomial")


@pytest.mark.parametrize("called", [False, True])
def test_each_trial_of_a_search_trains_at_its_own_rate_and_nothing_of_it_is_held(called, tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    alive, rates, held = [], [], []

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            gc.collect()
            held.append([weights() is not None or moments() is not None for weights, moments in alive])

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 1:
                rates.append((args.learning_rate, optimizer.param_groups[0]["initial_lr"]))

        def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            moments = next(iter(inner.state.values()))["exp_avg"]
            alive.append((weakref.ref(model.lm_head.weight), weakref.ref(moments)))

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (32, 12))]
    args = TrainingArguments(
        tmp_path,
        max_steps=20,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    callbacks = [Keep(), LpCallback(target=HALF)] if called else [Keep()]
    trainer = Trainer(
        model_init=lambda trial=None: tiny(), args=args, train_dataset=data, eval_dataset=data[:4],
        callbacks=callbacks, **plain(None),
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        n_trials=3, backend="optuna", direction="minimize",
    )  # fmt: skip
    assert held == [[], [False], [False, False]]
    if called:
        assert len(rates) == 3 and all(requested == used for requested, used in rates) and len(set(rates)) == 3


# -- other settings -----------------------------------------------------------


def test_steps_that_fp16_skips_end_no_run_whoever_asked_for_it(tmp_path, monkeypatch):
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    logs = {"loss": 4.5, "grad_norm": float("nan")}
    with pytest.raises(RuntimeError, match="grad_norm is nan"):
        LpCallback().on_log(arguments, TrainerState(), TrainerControl(), logs=dict(logs))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    LpCallback().on_log(arguments, TrainerState(), TrainerControl(), logs=dict(logs))


def test_a_model_that_was_compiled_by_hand_is_evaluated(tmp_path):
    class Compiled(evaluated(LpTrainer)):
        def __init__(self, model, **kwargs):
            super().__init__(model=torch.compile(model, backend="eager"), **kwargs)

    callback = LpCallback(target=HALF)
    trainer = train(
        tmp_path, [callback], ways=plain, trainer=Compiled, eval_strategy="steps", eval_steps=12,
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    evaluations = [entry for entry in trainer.state.log_history if "eval_sparsity" in entry]
    assert len(evaluations) == 2
    assert evaluations[-1]["eval_sparsity"] == measure_sparsity(trainer.model, names=callback.attached.counted).total
    assert evaluations[-1]["eval_sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_each_evaluation_set_and_prefix_has_its_perplexity_and_sparsity(tmp_path):
    class Several(LpTrainer):
        def __init__(self, train_dataset, **kwargs):
            sets = {"a": train_dataset[:8], "b": train_dataset[8:16]}
            super().__init__(train_dataset=train_dataset, eval_dataset=sets, **kwargs)

    trainer = train(tmp_path, [LpCallback(target=HALF)], trainer=Several)
    metrics = trainer.evaluate()
    for name in ("a", "b"):
        assert metrics[f"eval_{name}_sparsity"] == pytest.approx(0.5, abs=1e-3)
        loss = torch.tensor(metrics[f"eval_{name}_loss"], dtype=torch.float64)
        assert metrics[f"eval_{name}_perplexity"] == pytest.approx(float(loss.exp()))
    tested = trainer.evaluate(trainer.train_dataset[:8], metric_key_prefix="test")
    assert tested["test_perplexity"] == pytest.approx(metrics["eval_a_perplexity"]) and "test_sparsity" in tested
    assert "train_perplexity" not in {key for entry in trainer.state.log_history for key in entry}


def test_what_the_callback_says_after_the_end_is_what_a_save_writes(tmp_path, caplog):
    callback = LpCallback(target=HALF)
    with caplog.at_level(logging.INFO, "lp_dist"):
        trainer = train(tmp_path, [callback])
    trainer.save_model(tmp_path / "model")
    assert callback.attached.logs["lp/measured"] == in_file(tmp_path / "model", callback)
    assert callback.state()["progress"]["step"] == STEPS


# -- a checkpoint that someone sent -------------------------------------------


class Runs:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_a_trainer_of_ours_resumes_from_no_file_that_runs_code(tmp_path):
    train(tmp_path, [LpCallback(target=HALF), Interrupted(10)], trainer=LpTrainer)
    checkpoint = tmp_path / "checkpoint-10"
    (checkpoint / "global_step10").mkdir()
    torch.save({"module": Runs(tmp_path / "ran")}, checkpoint / "global_step10" / "mp_rank_00_model_states.pt")
    for resume in (True, str(checkpoint)):
        with pytest.raises(UsageError, match="names builtins.getattr .* whose code would run"):
            train(tmp_path, [LpCallback(target=HALF)], trainer=LpTrainer, resume=resume)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("progress", [{"step": 10, "weights": 3}, {"weights": {"version": 4}}, [1], {"step": "ten"}])
def test_a_state_of_any_content_ends_in_one_line(progress, tmp_path):
    train(tmp_path, [LpCallback(target=HALF), Interrupted(10)])
    file = tmp_path / "checkpoint-10" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["LpCallback"]["progress"] = progress
    file.write_text(json.dumps(state))
    with pytest.raises(UsageError) as caught:
        train(tmp_path, [LpCallback(target=HALF)], resume=True)
    assert "\n" not in str(caught.value)
