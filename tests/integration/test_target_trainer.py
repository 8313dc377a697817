"""A target in Hugging Face's Trainer: reached, resumed, logged, refused; and `lp-dist finetune --sparsity`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from helpers.targets import decaying
from helpers.trainer_runs import END, START, STEPS, Interrupted, same, tiny, train
from lp_dist import DecayWindow, LpAdamW, LpCallback, LpTrainer, measure_sparsity, param_groups
from lp_dist.report import schema
from lp_dist.training import finetune

TARGET = decaying(0.6, p=0.0, scope="layer")


def zeros(trainer: Trainer) -> dict[str, tuple[int, int]]:
    return measure_sparsity(trainer.model).counts


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Trainer:
    """A run that was not interrupted."""
    return train(tmp_path_factory.mktemp("uninterrupted"), [LpCallback(target=TARGET)])


def test_every_matrix_ends_with_its_share_of_zeros(uninterrupted):
    assert {name: count for name, (count, _) in zeros(uninterrupted).items()} == {
        name: round(0.6 * numel) for name, (_, numel) in zeros(uninterrupted).items()
    }
    assert len(zeros(uninterrupted)) == 7


def test_the_trainer_counts_what_the_target_counts(tmp_path):
    """A matrix that an override leaves dense is no part of the share, of the target's or of an evaluation's."""
    left_out = {"*.0.mlp.*": {"weight_decay": 0.0}}
    target = decaying(0.6, p=0.0, relative_to="decayed")
    trainer = train(tmp_path, [LpCallback(target=target, overrides=left_out)], trainer=LpTrainer)
    sparsity = trainer.measure_sparsity()
    assert (
        sparsity.counts.keys() == {name for name in zeros(trainer) if ".0.mlp." not in name} != zeros(trainer).keys()
    )
    assert sparsity.zeros == round(0.6 * sparsity.elements)


def test_a_target_may_be_a_mapping_of_its_arguments(uninterrupted, tmp_path):
    assert same(
        train(tmp_path, [LpCallback(target={"sparsity": 0.6, "p": 0.0, "scope": "layer", "reconstruct": False})]),
        uninterrupted,
    )


# Before the start, at it, in the window, at the final pruning, after the end; and with callbacks that Trainer makes
# anew from their state.
@pytest.mark.parametrize(
    "step, restored",
    [(1, False), (START, False), (10, False), (END - 1, False), (20, False), (1, True), (10, True), (20, True)],
)
def test_an_interrupted_run_resumes_bit_for_bit(step, restored, uninterrupted, tmp_path):
    train(tmp_path, [LpCallback(target=TARGET), Interrupted(step)])
    checkpoint = get_last_checkpoint(str(tmp_path))
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["stateful_callbacks"]["LpCallback"]
    progress = state["progress"]["weights"]
    assert progress["version"] == 7 and (progress["final_pruning"] is not None) == (step >= END - 1)
    resumed = train(
        tmp_path, [LpCallback(target=TARGET)], resume=checkpoint, restore_callback_states_from_checkpoint=restored
    )
    assert resumed.state.global_step == STEPS and same(resumed, uninterrupted)


@pytest.mark.parametrize("step, warned", [(2, True), (12, True), (END, False)])
def test_a_run_that_is_stopped_before_its_window_ends_says_what_is_zero_then(step, warned, tmp_path, caplog):
    trainer = train(tmp_path, [LpCallback(target=TARGET), Interrupted(step)])
    counts = zeros(trainer).values()
    share = sum(count for count, _ in counts) / sum(elements for _, elements in counts)
    line = (
        f"the run ends after {step} steps, before the window of the weights does at {END} of {STEPS}:"
        f" {100 * share:.2f} % are zero, of the 60.00 % to end with"
    )
    assert (line in caplog.text) == warned and ("Nothing was pruned" in caplog.text) == warned, caplog.text


def test_a_curve_of_ones_own_can_not_come_from_a_checkpoint(tmp_path):
    target = decaying(0.6, curve=lambda u: u * u)
    train(tmp_path, [LpCallback(target=target), Interrupted(6)])
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=False"):
        train(
            tmp_path,
            [LpCallback(target=target)],
            resume=get_last_checkpoint(str(tmp_path)),
            restore_callback_states_from_checkpoint=True,
        )


def test_skipped_steps_do_not_keep_a_run_from_its_target(tmp_path):
    """A window up to the end of the run, and steps that fp16 would skip, which Trainer counts all the same."""

    class Skipping(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step in (4, 12, 20):
                model.zero_grad()

    callback = LpCallback(target=decaying(0.6, p=0.0, scope="layer", end=1.0))
    trainer = train(tmp_path, [callback, Skipping()])
    assert callback.attached.weight_controller.last_step == STEPS - 3 and trainer.state.global_step == STEPS
    assert all(count == round(0.6 * elements) for count, elements in zeros(trainer).values())


def test_a_run_can_be_resumed_twice(uninterrupted, tmp_path):
    """The second checkpoint is one that a resumed run has written."""
    train(tmp_path, [LpCallback(target=TARGET), Interrupted(6)])
    train(tmp_path, [LpCallback(target=TARGET), Interrupted(11)], resume=True)
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-11")
    assert same(train(tmp_path, [LpCallback(target=TARGET)], resume=True), uninterrupted)


def test_another_target_than_that_of_the_checkpoint_is_refused(tmp_path):
    train(tmp_path, [LpCallback(target=TARGET), Interrupted(6)])
    with pytest.raises(ValueError, match="trained for another target of weights than the script asks for"):
        train(tmp_path, [LpCallback(target=decaying(0.7, p=0.0))], resume=True)
    with pytest.raises(ValueError, match="trained for another window of weights than the script asks for"):
        train(tmp_path, [LpCallback(target=TARGET)], resume=True, steps=STEPS + 6)
    with pytest.raises(ValueError, match="was trained for .*'sparsity': 0.6.*there is no target of weights"):
        train(tmp_path, [LpCallback()], resume=True)


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path):
    train(tmp_path, [LpCallback(target=TARGET), Interrupted(6)], save_only_model=True)
    with pytest.raises(ValueError, match="checkpoint of step 6 has no optimizer state.*save_only_model=False"):
        train(tmp_path, [LpCallback(target=TARGET)], resume=True)


def test_a_window_and_a_target_together_are_refused():
    with pytest.raises(ValueError, match="a window and a target were given.*set its start and end"):
        LpCallback(DecayWindow(0.1, 0.7), target=TARGET)


def test_what_the_groups_have_besides_a_target_is_refused(tmp_path):
    ways = {
        "weight_decay=0.1 is set as well": lambda model: {
            "optimizers": (LpAdamW(param_groups(model, 0.1), lr=1e-2, precondition=0.0), None)
        },
        "cutoff=0.5 is set as well": lambda model: {
            "optimizers": (LpAdamW(param_groups(model, 0.0), lr=1e-2, cutoff=0.5), None)
        },
    }
    for message, way in ways.items():
        with pytest.raises(ValueError, match=message):
            train(tmp_path, [LpCallback(target=TARGET)], way)


def test_a_run_too_short_for_its_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="from step 1 to 7 of 10 has 6 steps.*train for at least 15 steps"):
        train(tmp_path, [LpCallback(target=TARGET)], steps=10)


@pytest.mark.parametrize(
    "arguments", [{"weight_decay": 0.0}, {"weight_decay": 0.0, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5}]
)
def test_trap_4_trainers_own_groups_leave_embeddings_head_and_norms_dense(arguments, tmp_path):
    """They hold embeddings and head in the group that decays."""
    trainer = train(
        tmp_path,
        [LpCallback(target=TARGET)],
        lambda model: {"optimizer_cls_and_kwargs": (LpAdamW, {"lr": 1e-2})},
        **arguments,
    )
    everything = measure_sparsity(trainer.model, names=[name for name, _ in trainer.model.named_parameters()]).counts
    assert {name for name, (count, _) in everything.items() if count} == set(zeros(trainer))
    assert all(count == round(0.6 * numel) for count, numel in zeros(trainer).values())


class Updates(TrainerCallback):
    """At which of Trainer's steps the target had looked at the weights."""

    def __init__(self, callback: LpCallback) -> None:
        self.callback, self.steps = callback, []

    def on_step_end(self, args, state, control, **kwargs):
        logs = self.callback.attached.logs
        if logs and logs not in [other for _, other in self.steps[-1:]]:
            self.steps.append((state.global_step, logs))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_updates_come_at_optimizer_steps_and_not_at_batches(accumulation, tmp_path):
    callback = LpCallback(target=decaying(0.5, update_every=4))
    updates = Updates(callback)
    train(tmp_path, [callback, updates], gradient_accumulation_steps=accumulation)
    assert [step for step, _ in updates.steps] == [2, 6, 10, 14, END - 1]


def test_the_learning_rates_ahead_are_those_of_trainers_scheduler(tmp_path):
    """λ times the sum of the rates of the next four steps is half of the threshold at p = 0, which the cutoff is."""
    callback, rates = LpCallback(target=decaying(0.5, p=0.0, update_every=4, latent_windows=0.0)), []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            rates.append(lr_scheduler.get_last_lr()[0])
            if state.global_step == 6:
                parameter_map = callback.attached.optimizer.parameter_map
                self.values = [parameter_map.values(name) for name in callback.attached.decayed]

    seen = Rates()
    train(tmp_path, [callback, seen], lr_scheduler_type="cosine", warmup_steps=8)
    for values in seen.values:
        assert values["weight_decay"] == pytest.approx(values["cutoff"] / (2 * sum(rates[6:10]))), (
            "the warm-up ends among them"
        )


class Reporter(TrainerCallback):
    """As the loggers of `report_to`: it sees what on_log is given, and comes before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


KEYS = {
    "lp/target",
    "lp/plan",
    "lp/measured",
    "lp/lambda_min",
    "lp/lambda_median",
    "lp/lambda_max",
    "lp/dead_channels",
}


def test_progress_reaches_the_loggers_through_lp_trainer(tmp_path):
    reporter = Reporter()
    target = replace(TARGET, latent_windows=0.0)  # with latent weights zeros come and go
    trainer = train(tmp_path, [reporter, LpCallback(target=target)], trainer=LpTrainer, logging_steps=1)
    for seen in (trainer.state.log_history, reporter.logs):
        losses = [logs for logs in seen if "loss" in logs]
        assert len(losses) == STEPS and not any("lp/target" in logs for logs in losses[: START - 1])
        assert all(logs.keys() >= KEYS for logs in losses[START - 1 :])
        assert all(logs["lp/target"] == 0.6 for logs in losses[START - 1 :])
        measured = [logs["lp/measured"] for logs in losses[START - 1 :]]
        assert measured == sorted(measured) and measured[0] == 0.0 and measured[-1] == pytest.approx(0.6, abs=1e-3)
        assert not any(key.startswith("lp/") for logs in seen if "loss" not in logs for key in logs)
    plain = train(tmp_path, [LpCallback(target=target)], logging_steps=8)
    assert not any(KEYS & logs.keys() for logs in plain.state.log_history), (
        "a plain Trainer trains the same, and its logs are its own"
    )
    assert same(plain, trainer)


# -- the program --------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_model, topics) -> list[str]:
    return [
        "--model",
        str(tiny_model),
        "--dataset",
        str(topics),
        "--block_size",
        "64",
        "--max_steps",
        "20",
        "--learning_rate",
        "5e-3",
        "--sparsity",
        "0.5",
        "--per_device_train_batch_size",
        "4",
        "--logging_steps",
        "5",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--max_eval_blocks",
        "8",
    ]


@pytest.fixture(scope="module")
def program(common, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("program") / "sparse"
    finetune.main([*common, "--output_dir", str(out), "--save_steps", "8"])
    return out


def test_the_program_reaches_its_sparsity_and_reports_it(program):
    saved = schema.read(program)
    assert saved["sparsity"] == pytest.approx(0.5, abs=1e-3) and saved["weight_decay"] == 0.0
    shares = [count / numel for count, numel in saved["kinds"].values()]
    assert max(shares) > min(shares) + 0.02, "one threshold for all, so kinds differ"
    target = saved["target"]
    assert target["sparsity"] == 0.5 and target["final_pruning"]["after"] == pytest.approx(saved["sparsity"])
    assert target["final_pruning"]["before"] + target["final_pruning"]["pruned_at_end"] == pytest.approx(
        target["final_pruning"]["after"]
    )
    assert [entry["step"] for entry in saved["log"] if entry.get("lp/target") == 0.5] == [5, 10, 15, 20]


def test_the_program_resumes_to_the_same_files(program, common, tmp_path):
    finetune.main([*common, "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(program / "checkpoint-8")])
    first, second = load_file(program / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    assert schema.read(tmp_path)["target"] == schema.read(program)["target"]


def test_the_program_takes_a_share_of_all_parameters_in_every_tensor(common, tmp_path):
    words = [
        "--scope",
        "layer",
        "--relative_to",
        "all",
        "--sparsity",
        "0.4",
        "--curve",
        "linear",
        "--cap",
        "inf",
        "--update_every",
        "3",
        "--p",
        "0",
        "--decay_start",
        "0",
        "--decay_end",
        "15",
        "--base",
        "lion",
        "--learning_rate",
        "1e-3",
    ]
    finetune.main([*common, *words, "--output_dir", str(tmp_path)])
    saved = schema.read(tmp_path)
    assert saved["sparsity_of_all"] == pytest.approx(0.4, abs=1e-4)
    share = 0.4 * saved["parameters"] / saved["decayed_weights"]
    assert all(count / numel == pytest.approx(share, abs=1e-3) for count, numel in saved["kinds"].values()) and saved[
        "target"
    ]["sparsity"] == pytest.approx(share)


@pytest.mark.parametrize(
    "words, optimizers, targets",
    [([], 0.0, None), (["--precondition", "0"], 0.0, 0.0), (["--precondition", "0.5"], 0.5, 0.5)],
)
def test_the_program_takes_a_gamma_of_ones_own(words, optimizers, targets, common, tmp_path):
    _, _, decay, args = finetune.arguments.parse([*common, "--output_dir", str(tmp_path), *words])
    model = tiny()
    assert (
        finetune.optimizer_and_arguments(model, {name for name, _ in model.named_parameters()}, decay, args)[1][
            "precondition"
        ]
        == optimizers
        and decay.targets()[0].precondition == targets
    )


@pytest.mark.parametrize(
    "words, phrases",
    [
        (["--weight_decay", "0.1"], ["--sparsity 0.5 finds λ by itself", "--weight_decay", "leave one of them out"]),
        (["--overrides", '{"*": {"weight_decay": 0.1}}'], ["--sparsity 0.5 finds λ by itself", "overrides"]),
        (["--cutoff", "1"], ["--sparsity 0.5 finds the cutoff by itself", "--cap"]),
        (
            ["--load_best_model_at_end", "true", "--eval_strategy", "steps"],
            ["--load_best_model_at_end", "set it to false"],
        ),
        (["--sparsity", "50"], ["--sparsity 50.0", "between 0 and 1"]),
        (["--cap", "0.5"], ["--cap 0.5", "from 1 up"]),
        (["--p", "1.5"], ["--p 1.5", "[-4, 1]"]),
        (
            ["--decay_start", "1", "--decay_end", "11"],
            ["to 11 holds no step", "up to 1 they are fractions of the run"],
        ),
        (["--max_steps", "10"], ["6 steps", "takes 8", "at least 15 steps"]),
        (
            ["--relative_to", "all", "--sparsity", "0.95"],
            ["--sparsity 0.95 of all", "can't be reached", "--relative_to decayed"],
        ),
    ],
)
def test_a_sparsity_that_contradicts_something_ends_with_one_line(words, phrases, common, tmp_path):
    with pytest.raises(SystemExit) as caught:
        finetune.main([*common, "--output_dir", str(tmp_path), *words])
    message = str(caught.value.code)
    assert message.startswith("lp-dist: error: ") and all(phrase in message for phrase in phrases), message


@pytest.mark.parametrize(
    "words",
    [("--scope", "layer"), ("--relative_to", "all"), ("--curve", "linear"), ("--cap", "2.0"), ("--update_every", "3")],
)
def test_what_belongs_to_a_sparsity_is_refused_without_one(words, common, tmp_path):
    with pytest.raises(SystemExit) as caught:
        finetune.main(
            [word for word in common if word not in ("--sparsity", "0.5")] + ["--output_dir", str(tmp_path), *words]
        )
    assert f"{' '.join(words)} belongs to a --sparsity, and none is given" in str(caught.value.code), caught.value.code
