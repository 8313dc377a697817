"""Hugging Face's Trainer: the ways in, the decay window, and the self-check that the inner optimizer is of lp_dist."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from helpers.models import tiny_llama
from lp_dist import DecayWindow, LpAdamW, LpCallback, add_lp_decay, measure_sparsity, param_groups
from lp_dist.attachment.plan import verify

WINDOW = DecayWindow(2, 8, {"p": 0.0})


def train(tmp_path, ways, callbacks, **arguments) -> LlamaForCausalLM:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (40, 12), generator=generator)]
    args = TrainingArguments(
        tmp_path,
        max_steps=10,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks, **ways(model)).train()
    return model


def by_class(model):
    return {
        "optimizer_cls_and_kwargs": (LpAdamW, {"params": param_groups(model, 0.05), "lr": 1e-2, "precondition": 0.0})
    }


def by_instance(model):
    return {"optimizers": (LpAdamW(param_groups(model, 0.05), lr=1e-2, precondition=0.0), None)}


def test_both_ways_into_trainer_give_the_same_sparse_model(tmp_path):
    from_class, from_instance = (train(tmp_path, way, [LpCallback(WINDOW)]) for way in (by_class, by_instance))
    assert all(
        torch.equal(a, b) for a, b in zip(from_class.state_dict().values(), from_instance.state_dict().values())
    )
    counted = measure_sparsity(from_class)
    assert counted.total > 0.05
    everything = measure_sparsity(from_class, names=[name for name, _ in from_class.named_parameters()])
    assert everything.zeros == counted.zeros  # embeddings, head and norms have none


class Recorder(TrainerCallback):
    """Writes down which phase the decayed group is in at the moment of each optimizer step."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.phases.append(verify(optimizer).param_groups[0]["phase"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_phases_change_at_the_exact_optimizer_steps(tmp_path, accumulation):
    recorder = Recorder()
    train(tmp_path, by_class, [LpCallback(WINDOW), recorder], gradient_accumulation_steps=accumulation)
    assert recorder.phases == ["off"] * 2 + ["decay"] * 6 + ["frozen"] * 2


def test_without_a_window_the_groups_decide(tmp_path):
    assert measure_sparsity(train(tmp_path, by_class, [LpCallback()])).total > 0.05


def test_an_optimizer_that_is_not_ours_is_found_before_the_first_batch(tmp_path):
    with pytest.raises(RuntimeError, match="AdamW, not one of lp_dist.*zero_force_ds_cpu_optimizer"):
        train(tmp_path, lambda model: {}, [LpCallback(WINDOW)], optim="adamw_torch")


def test_trap_1_accelerate_really_replaces_our_optimizer_under_offload(monkeypatch):
    """What Accelerate calls under offload_optimizer, with the versions that are installed; its CPUAdam is not compiled
    for this.
    """
    import deepspeed.ops.adam
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    monkeypatch.setattr(
        deepspeed.ops.adam,
        "DeepSpeedCPUAdam",
        type(
            "DeepSpeedCPUAdam",
            (torch.optim.Adam,),
            {
                "__init__": lambda self, params, adamw_mode=True, **kwargs: torch.optim.Adam.__init__(
                    self, params, **kwargs
                )
            },
        ),
    )
    replaced = map_pytorch_optim_to_deepspeed(LpAdamW(param_groups(tiny_llama(), 0.1), lr=1e-3))
    assert type(replaced).__name__ == "DeepSpeedCPUAdam"
    with pytest.raises(
        RuntimeError, match='DeepSpeedCPUAdam, not one of lp_dist.*"zero_force_ds_cpu_optimizer": false'
    ):
        verify(replaced)


def test_trap_4_trainers_own_groups_leave_embeddings_and_head_dense(tmp_path):
    model = train(
        tmp_path,
        lambda model: {"optimizer_cls_and_kwargs": (LpAdamW, {"lr": 1e-2})},
        [LpCallback(WINDOW)],
        weight_decay=0.05,
    )
    everything = measure_sparsity(model, names=[name for name, _ in model.named_parameters()])
    assert {name for name, (zeros, _) in everything.counts.items() if zeros} <= set(measure_sparsity(model).counts)
    assert measure_sparsity(model).total > 0.05


def test_overrides_reach_single_parameters_through_the_callback(tmp_path):
    callback = LpCallback(
        WINDOW, overrides={"*.q_proj.weight": {"weight_decay": 0.0}, "*.up_proj.weight": {"weight_decay": 0.5}}
    )
    kinds = measure_sparsity(train(tmp_path, by_class, [callback])).by_kind()
    assert (
        kinds["q_proj"][0] == 0
        and kinds["up_proj"][0] / kinds["up_proj"][1] > kinds["gate_proj"][0] / kinds["gate_proj"][1] > 0
    )


def test_a_spoiled_run_is_stopped_when_it_logs(tmp_path):
    class Spoiler(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(model.parameters()).grad.fill_(math.nan)

    with pytest.raises(RuntimeError, match=r"(loss|grad_norm) is nan at step [4-9].*Resume from the last checkpoint"):
        train(tmp_path, by_class, [LpCallback(WINDOW), Spoiler()], logging_steps=1)


def test_trap_11_a_step_that_was_skipped_does_not_advance_the_window(tmp_path):
    """Trainer counts it all the same. The scaler's inf makes Accelerate leave the step out, as fp16 does."""

    class Skipped(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step in (0, 4):
                step = type(optimizer).step
                optimizer.step = lambda *a, **k: setattr(optimizer, "step", step.__get__(optimizer))

    recorder = Recorder()
    train(tmp_path, by_class, [LpCallback(WINDOW), recorder, Skipped()])
    # Off in steps 0 and 1 that were taken, which are Trainer's 1 and 2; Trainer's 4 is asked again as its 5.
    assert recorder.phases == ["off"] * 3 + ["decay"] * 7


def test_a_window_that_could_do_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weight_decay=0"):
        train(tmp_path, lambda m: {"optimizers": (LpAdamW(param_groups(m, 0.0), lr=1e-2), None)}, [LpCallback(WINDOW)])
    with pytest.raises(ValueError, match="holds no step of a run of 10 steps"):
        train(tmp_path, by_class, [LpCallback(DecayWindow(20, 30))])

    def frozen(model):
        groups = [{**group, "phase": "frozen"} for group in param_groups(model, 0.1)]
        return {"optimizers": (LpAdamW(groups, lr=1e-2), None)}

    with pytest.raises(ValueError, match="param group 0 has phase='frozen', and the decay window switches the phases"):
        train(tmp_path, frozen, [LpCallback(WINDOW)])


def test_a_cutoff_of_the_groups_holds_in_a_window_that_names_none(tmp_path):
    optimizers = []

    def capped(model):
        optimizers.append(LpAdamW(param_groups(model, 0.1), lr=1e-2, cutoff=0.25))
        return {"optimizers": (optimizers[0], None)}

    train(tmp_path, capped, [LpCallback(WINDOW)])
    assert [group["cutoff"] for group in optimizers[0].param_groups] == [0.25, 0.25]


def test_verify_sees_through_wrappers():
    model = tiny_llama()
    optimizer = LpAdamW(param_groups(model, 0.1), lr=1e-3)
    assert verify(Accelerator(cpu=True).prepare(optimizer)) is optimizer
    other = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="torch.optim.adamw.AdamW"):
        verify(Accelerator(cpu=True).prepare(other))
    add_lp_decay(other)
    assert verify(other) is other
