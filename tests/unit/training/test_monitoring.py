"""What can be watched: zeros beside the loss on Trainer's bar and in its log lines, histograms of |w| in
TensorBoard.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.models import tiny_llama
from lp_dist import (
    DecayWindow,
    LpAdamW,
    LpCallback,
    LpTrainer,
    SparsityTarget,
    measure_histogram,
    measure_sparsity,
    param_groups,
)
from lp_dist.training.monitoring import show_on_bar


class Bar:
    """Stands in for tqdm's."""

    def __init__(self) -> None:
        self.shown: list[dict] = []

    def set_postfix(self, shown: dict) -> None:
        self.shown.append(dict(shown))


class Watched:
    def __init__(self) -> None:
        self.training_bar = Bar()


def trained(
    tmp_path,
    callback,
    weight_decay: float,
    kind: type[Trainer] = LpTrainer,
    last: TrainerCallback | None = None,
    **arguments,
) -> tuple[LpTrainer, list[dict]]:
    model = tiny_llama(num_hidden_layers=2, bos_token_id=0, eos_token_id=0)
    data = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(0, 32, (40, 12), generator=torch.Generator().manual_seed(0))
    ]
    args = TrainingArguments(
        tmp_path,
        max_steps=20,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
        **{"report_to": "none", **arguments},
    )
    trainer = kind(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[callback],
        optimizer_cls_and_kwargs=(
            LpAdamW,
            {"params": param_groups(model, weight_decay), "lr": 1e-2, "precondition": 0.0},
        ),
    )
    watched = Watched()
    trainer.callback_handler.callbacks.append(Quiet(watched.training_bar))
    if last is not None:
        trainer.add_callback(last)
    trainer.train()
    return trainer, watched.training_bar.shown


class Quiet:
    """A callback that has a bar and does nothing, as Trainer asks every callback for every event."""

    def __init__(self, bar: Bar) -> None:
        self.training_bar = bar

    def __getattr__(self, name: str):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def test_the_bar_shows_loss_and_zeros_of_a_target(tmp_path):
    trainer, shown = trained(tmp_path, LpCallback(target=SparsityTarget(0.5)), 0.0)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [bar["loss"] for bar in shown[:4]] == [f"{entry['loss']:.3f}" for entry in logged] and len(logged) == 4
    assert [bar.get("zeros") for bar in shown[:4]] == [
        f"{100 * entry['lp/measured']:.1f} %" if "lp/measured" in entry else None for entry in logged
    ]
    assert shown[3]["zeros"] == "50.0 %"


def test_a_lambda_of_ones_own_is_shown_too_and_measured_when_it_is_logged(tmp_path):
    trainer, shown = trained(tmp_path, LpCallback(DecayWindow(0.1, 0.7)), 0.5)
    logged = [entry["lp/measured"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and logged[-1] == measure_sparsity(trainer.model).total > 0.05
    assert [bar["zeros"] for bar in shown[:4]] == [f"{100 * share:.1f} %" for share in logged]


class Lines(TrainerCallback):
    """As Trainer's own log lines, which come last."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize(
    "callback, weight_decay", [(LpCallback(target=SparsityTarget(0.5)), 0.0), (LpCallback(DecayWindow(0.1, 0.7)), 0.5)]
)
def test_with_trainer_itself_the_log_lines_have_the_zeros(callback, weight_decay, tmp_path):
    lines = Lines()
    trainer, _ = trained(tmp_path, callback, weight_decay, kind=Trainer, last=lines)
    logged = [line for line in lines.seen if "loss" in line]
    assert len(logged) == 4 and logged[-1]["lp/measured"] == pytest.approx(measure_sparsity(trainer.model).total)


def test_weights_near_zero_are_shown_beside_zeros_where_they_are_others():
    bar = Watched()
    show_on_bar([object(), bar], {"loss": 2.5, "lp/measured": 0.1, "lp/near_zero": 0.25, "lp/groups_measured": 0.3})
    show_on_bar([bar], {"eval_loss": 2.5})
    assert bar.training_bar.shown == [{"loss": "2.500", "zeros": "10.0 %", "near zero": "25.0 %", "groups": "30.0 %"}]


def test_a_dense_run_shows_its_loss_alone(tmp_path):
    trainer, shown = trained(tmp_path, LpCallback(), 0.0)
    assert all(set(bar) == {"loss"} for bar in shown) and len(shown) >= 4
    assert not any("lp/measured" in entry for entry in trainer.state.log_history)


def test_tensorboard_has_a_histogram_of_each_kind_of_layer_at_each_evaluation(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer, _ = trained(
        tmp_path,
        LpCallback(target=SparsityTarget(0.5, scope="layer")),
        0.0,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=10,
    )
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"histograms": 0}).Reload()
    kinds = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert sorted(board.Tags()["histograms"]) == [f"log2 |w|/{kind}" for kind in kinds]
    assert {f"zeros/{kind}" for kind in kinds} | {"train/lp/measured", "train/loss", "eval/sparsity"} <= set(
        board.Tags()["scalars"]
    )
    for kind, (zeros, elements) in measure_sparsity(trainer.model).by_kind().items():
        events = board.Histograms(f"log2 |w|/{kind}")
        assert [event.step for event in events] == [10, 20]
        last = events[-1].histogram_value
        assert last.num == sum(last.bucket) == elements - zeros > 0
        values = torch.cat(
            [param.detach().view(-1) for name, param in trainer.model.named_parameters() if f"{kind}.weight" in name]
        )
        logs = values[values != 0].abs().log2()
        assert (
            last.sum == pytest.approx(float(logs.sum()), rel=0.02)
            and last.bucket_limit[-1] >= float(logs.max()) >= last.bucket_limit[-2]
        )
        for limit, below in zip(last.bucket_limit, torch.tensor(last.bucket).cumsum(0).tolist()):
            assert below == int((logs < limit).sum()) or math.isinf(limit), (kind, limit)
        assert board.Scalars(f"zeros/{kind}")[-1].value == pytest.approx(zeros / elements)
    assert sum(measure_histogram(trainer.model).zeros.values()) == measure_sparsity(trainer.model).zeros
