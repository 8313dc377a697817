"""DeepSpeed's AutoTP with ZeRO: four ranks, two of them for the tensors, come to the bits of one process with a
target, a pattern and groups; counted once each, resumed bit for bit.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.deepspeed_axes import (
    LONG_TENSOR_CASES,
    SLICES,
    TENSOR_CASES,
    SideBySide,
    TensorCase,
    engine_of,
    loss_of,
    put_together,
)
from helpers.engines import Engine, convert, deepspeed_config, ended, quiet
from helpers.export_runs import llama
from helpers.targets import decaying
from lp_dist import LpAdamW, attach, measure_histogram, measure_sparsity, param_groups
from lp_dist.attachment.attachment import Attachment
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.report import schema
from lp_dist.structured.resolve import groups_of

STEPS, HALF = 15, 8
SHAPES = {name: param.shape for name, param in SideBySide().named_parameters()}


FAST, LONG = TENSOR_CASES, LONG_TENSOR_CASES
EACH = pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)], ids=str
)
RESUMED = [TensorCase("zero1", "2:4"), TensorCase("zero2", "layer")]


def optimizer_of(case: TensorCase) -> Any:
    def made(model: SideBySide) -> LpAdamW:
        if case.how == "by hand":
            return LpAdamW(param_groups(model, 0.02), lr=5e-3, precondition=0.5)
        return LpAdamW(param_groups(model, 0.0), lr=5e-3)

    return made


def scheduler_of(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, STEPS)


def attached_to(engine: Engine, case: TensorCase) -> Attachment:
    is_sharded = hasattr(engine.handle, "load_checkpoint")
    others = {} if is_sharded else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    if case.how == "by hand":
        return attach(engine.handle, **others)
    if case.how == "groups":
        # Rows of a matrix that AutoTP divides unevenly, and columns of one that it divides by columns.
        model = engine.handle.module if is_sharded else engine.handle
        sets = groups_of(model, outputs="up", kind="rows") + groups_of(model, inputs="down", kind="columns")
        target = decaying(0.4, groups=sets, update_every=2, start=2, end=12, precondition=0.0)
        return attach(engine.handle, target=target, total_steps=STEPS, **others)
    pattern = case.how if ":" in case.how else None
    target = decaying(
        None if pattern else 0.5, pattern=pattern, scope="layer" if case.how == "layer" else "global", update_every=2
    )
    return attach(engine.handle, target=target, total_steps=STEPS, **others)


def train(engine: Engine, attachment: Attachment, steps: range, rank: int) -> None:
    for step in steps:
        engine.step(loss_of(engine, step, rank // 2, rank % 2))
        attachment.after_step()


def results_of(engine: Engine, attachment: Attachment) -> dict[str, Any]:
    return {
        "slices": {
            shard.name: (shard.param.shape if not hasattr(shard.param, "ds_shape") else shard.param.ds_shape)
            for shard in attachment.shards
        },
        "shards": [
            (f"{key} of {shard.name}", shard.name, shard.start, values.flatten().clone())
            for shard in attachment.shards
            if shard.length
            for key, values in {"master": shard.local.values, **shard.state}.items()
        ],
        "state": json.dumps(attachment.state_dict()),
        "counts": measure_sparsity(engine.handle).counts,
        "masters": measure_sparsity(engine.handle, engine.handle.optimizer).counts,
        "histogram": measure_histogram(engine.handle).zeros,
        "all": measure_sparsity(engine.handle, names=[*SHAPES]).counts,
    }


def on_a_rank(
    rank: int, world_size: int, directory: Path, cases: list[TensorCase]
) -> dict[TensorCase, dict[str, Any]]:
    quiet()
    results = {}
    for number, case in enumerate(cases):
        engine = engine_of(case.stage, optimizer_of(case), scheduler_of)
        attachment = attached_to(engine, case)
        train(engine, attachment, range(HALF), rank)
        if case in RESUMED:
            engine.save(directory / str(number), "half")
        train(engine, attachment, range(HALF, STEPS), rank)
        results[case] = results_of(engine, attachment)
        ended(engine)
        if case in RESUMED:
            engine = engine_of(case.stage, optimizer_of(case), scheduler_of)
            attachment = attached_to(engine, case)
            engine.load(directory / str(number), "half")
            train(engine, attachment, range(HALF, STEPS), rank)
            results[case]["resumed"] = results_of(engine, attachment)["shards"]
            ended(engine)
    return results


@cache
def alone(case: TensorCase) -> dict[str, Any]:
    """One process: what becomes of the weights, the controller's state, and what is counted."""
    model = SideBySide()
    optimizer = optimizer_of(case)(model)
    engine = Engine(model, optimizer, scheduler_of(optimizer))
    attachment = attached_to(engine, case)
    for step in range(STEPS):
        (loss_of(model, step, 0) / 2).backward()
        engine.step(loss_of(model, step, 1) / 2)
        attachment.after_step()
    states = {name: optimizer.state[param] for name, param in model.named_parameters()}
    tensors = {f"master of {name}": param.detach() for name, param in model.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{key} of {name}": state[key] for name, state in states.items()}
    return {
        "tensors": tensors,
        "state": json.dumps(attachment.state_dict()),
        "counts": measure_sparsity(model).counts,
        "all": measure_sparsity(model, names=[*SHAPES]).counts,
    }


def tensors_of(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Masters and moments, put together from the ranks' shards."""
    parts_of: dict[str, dict[int, dict[int, Tensor]]] = {}
    names = {}
    for rank, result in enumerate(ranks):
        for key, name, start, values in result["shards"]:
            names[key] = name
            parts_of.setdefault(key, {}).setdefault(rank % 2, {})[start] = values
    return {
        key: put_together(
            names[key],
            SHAPES[names[key]],
            [
                (index, torch.cat([parts[start] for start in sorted(parts)]), ranks[index]["slices"][names[key]])
                for index, parts in by_index.items()
            ],
        )
        for key, by_index in parts_of.items()
    }


@pytest.fixture(scope="module")
def fast_results(module_ranks, tmp_path_factory) -> list[dict[TensorCase, dict[str, Any]]]:
    return module_ranks(on_a_rank, 4, tmp_path_factory.mktemp("saved"), FAST)


@pytest.fixture(scope="module")
def long_results(module_ranks, tmp_path_factory) -> list[dict[TensorCase, dict[str, Any]]]:
    return module_ranks(on_a_rank, 4, tmp_path_factory.mktemp("saved"), LONG)


@pytest.fixture
def ranks(case: TensorCase, request) -> list[dict[str, Any]]:
    """What each rank has of a case."""
    results = request.getfixturevalue("fast_results" if case in FAST else "long_results")
    return [rank[case] for rank in results]


@EACH
def test_slices_of_two_ranks_are_one_process_bit_for_bit(ranks, case):
    single = alone(case)
    tensors = tensors_of(ranks)
    assert tensors.keys() == single["tensors"].keys() and len(tensors) == 3 * len(SHAPES)
    differs = [key for key in tensors if not tensors[key].equal(single["tensors"][key])]
    assert not differs, differs
    assert all(rank["state"] == single["state"] for rank in ranks)


@EACH
def test_each_element_is_counted_once(ranks, case):
    single = alone(case)
    assert {name: elements for name, (_, elements) in single["all"].items()} == {
        name: shape.numel() for name, shape in SHAPES.items()
    }
    for rank in ranks:
        assert rank["counts"] == single["counts"] == rank["masters"]
        assert rank["all"] == single["all"]
        assert rank["histogram"] == {name: zeros for name, (zeros, _) in single["counts"].items()}
    assert 0 < sum(zeros for zeros, _ in single["counts"].values()) < sum(n for _, n in single["counts"].values())


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(ranks, case):
    for rank in ranks:
        for (key, _, start, values), (key_, _, start_, resumed) in zip(rank["shards"], rank["resumed"], strict=True):
            assert (key, start) == (key_, start_) and values.equal(resumed), key


@pytest.mark.parametrize("case", FAST[:1], ids=str)
def test_slices_are_uneven_and_shards_begin_inside_of_rows(ranks, case):
    assert any(start % SHAPES[name][-1] for rank in ranks for _, name, start, _ in rank["shards"] if start)
    assert ranks[0]["slices"]["up.weight"] != ranks[1]["slices"]["up.weight"]
    assert {name for name in SHAPES if ranks[0]["slices"][name] != SHAPES[name]} == {*SLICES}


def saved_on_a_rank(rank: int, world_size: int, directory: Path) -> Any:
    """Of a Llama with uneven slices: what Accelerate saves of it, the counts; and a checkpoint in `directory`."""
    import deepspeed

    quiet()
    model = llama(num_attention_heads=4, num_key_value_heads=2, hidden_size=24)
    config = deepspeed_config("zero1", tensor_parallel={"autotp_size": 2})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=LpAdamW(param_groups(model, 0.1), lr=1e-2),
        config=config,
        dist_init_required=False,
    )
    attach(engine)
    for step in range(2):
        tokens = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank // 2))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(directory, tag="saved")
    consolidated = engine._consolidated_16bit_state_dict()
    counts = measure_sparsity(engine, names=[name for name, _ in engine.module.named_parameters()]).counts
    engine.destroy()
    return consolidated, counts


@pytest.mark.long
def test_what_is_saved_has_all_slices(run_ranks, tmp_path):
    consolidated, counts = run_ranks(saved_on_a_rank, 4, tmp_path)[0]
    llama(num_attention_heads=4, num_key_value_heads=2, hidden_size=24).config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="tensor, pipeline or expert parallelism.*ds_to_universal"):
        open_checkpoint(tmp_path / "saved")
    convert(tmp_path)
    done = export(tmp_path / "universal", tmp_path / "out")
    written = load_file(done.out / "model.safetensors")
    assert {name: ((weight == 0).sum(), weight.numel()) for name, weight in written.items()} == counts
    assert all(weight.equal(consolidated[name]) for name, weight in written.items())
    assert sum(zeros for zeros, _ in counts.values()) > 100


@pytest.mark.long
def test_the_training_program_with_the_config_of_autotp(tiny_model, topics, tmp_path, run_program):
    words = ["--model", tiny_model, "--dataset", topics, "--block_size", 64, "--max_steps", 20, "--sparsity", 0.5]
    words += [
        "--learning_rate",
        1e-2,
        "--per_device_train_batch_size",
        2,
        "--save_strategy",
        "no",
        "--use_cpu",
        "true",
    ]
    words += ["--deepspeed", "configs/ds_zero2_autotp.json", "--output_dir", tmp_path / "out"]
    run_program([[str(word) for word in words]])
    saved, weights = schema.read(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    zeros = sum(int((weight == 0).sum()) for name, weight in weights.items() if "proj" in name)
    assert zeros == saved["zeros"] == saved["decayed_weights"] // 2
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (48, 96)
