"""Several axes of ranks (FSDP2, HSDP and replicas beside tensor parallelism) come to the bits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import axes
from helpers.axes import OF_MIXTURES, TARGETS, Axes, Loaded, needs_replicate, needs_sharding_config
from helpers.engines import quiet
from helpers.tables import hold, rows
from lp_dist.export.writer import export

FSDP_TP = (("fsdp", 2), ("tp", 2))
# With the suite every way once, but for `replicate`, and every form of target. The rest is long.
CELLS = {
    Axes((("tp", 4),)): ["2:4"],
    Axes(FSDP_TP): ["weights", "heads"],
    Axes(FSDP_TP, "head"): ["channels"],
    Axes(FSDP_TP, "norms"): ["weights by layer"],
    Axes((("replicas", 2), ("fsdp", 1), ("tp", 2))): ["4:8"],
    Axes((("ddp", 2), ("tp", 2))): [],
    Axes((("replicas", 2), ("fsdp", 2))): ["weights"],
    Axes((("dp", 2), ("cp", 2))): ["weights"],
}
LATER = {way: [target for target in TARGETS if target not in targets] for way, targets in CELLS.items()}
CONFIGS = [
    (("fsdp_size", 2), ("tp_size", 2), ("tp_plan", "auto")),
    (("fsdp_size", 4), ("ep_size", 2)),
    (("tp_size", 4), ("tp_plan", "auto")),
    (("tp_size", 2), ("tp_plan", "auto"), ("ep_size", 2), ("fsdp_size", 2)),
    (("fsdp_size", 2), ("tp_size", 2), ("tp_plan", "auto"), ("enable_sequence_parallel", True)),
    (("fsdp_size", 2), ("dp_replicate_size", 2)),
]
EIGHT = {Axes((("replicas", 2), ("fsdp", 2), ("tp", 2))): [*TARGETS]}


def select(cells: dict[Axes, list[str]], by_replicate: bool) -> dict[Axes, list[str]]:
    return {way: targets for way, targets in cells.items() if targets and way.is_by_replicate == by_replicate}


def on_ranks(rank: int, world_size: int, cells: dict[Axes, list[str]]) -> dict[Axes, Any]:
    quiet()
    return {way: axes.followed(way.shard, targets) for way, targets in cells.items()}


def loaded_on_ranks(rank: int, world_size: int, directory: str, configs: list[Any], targets: list[str]) -> Any:
    quiet()
    ways = [Loaded(config, directory) for config in configs]
    return {way: axes.followed(way.shard, targets, axes.mixture) for way in ways}


@pytest.mark.parametrize(
    ("ranks", "cells"),
    [
        pytest.param(4, select(CELLS, False), id="4 ranks"),
        pytest.param(4, select(LATER, False), id="4 ranks, the others", marks=pytest.mark.long),
        pytest.param(4, select(LATER, True), id="replicate", marks=[pytest.mark.long, needs_replicate]),
        pytest.param(8, EIGHT, id="8 ranks", marks=pytest.mark.long),
    ],
)
def test_axes_come_to_the_bits_of_one_process(ranks, cells, run_ranks):
    alone = axes.followed(axes.unsharded, TARGETS)
    for rank, results in enumerate(run_ranks(on_ranks, ranks, cells)):
        for way, by_target in results.items():
            compare(by_target, alone, f"rank {rank} of {way}")


@needs_sharding_config
@pytest.mark.parametrize(
    ("configs", "targets"),
    [
        pytest.param(CONFIGS[:2], ["channels of experts"], id="some"),
        pytest.param(CONFIGS[:3], [*OF_MIXTURES], id="three", marks=pytest.mark.long),
        pytest.param(CONFIGS[3:], [*OF_MIXTURES], id="the others", marks=pytest.mark.long),
    ],
)
def test_what_transformers_shards_comes_to_the_bits_of_one_process(configs, targets, run_ranks, tmp_path):
    alone = axes.followed(axes.unsharded, targets, axes.mixture)
    for rank, results in enumerate(run_ranks(loaded_on_ranks, 4, str(tmp_path / "model"), configs, targets)):
        for way, by_target in results.items():
            compare(by_target, alone, f"rank {rank} of {way}")


HALF = axes.STEPS // 2
# Saved on the first of each, and gone on with on all of them.
RESUMED = [
    ("weights", [Axes(FSDP_TP), Axes((("tp", 4),)), Axes((("fsdp", 4),))]),
    ("2:4", [Axes((("fsdp", 4),)), Axes(FSDP_TP, "head")]),
    ("channels", [Axes(FSDP_TP, "norms"), Axes((("ddp", 2), ("tp", 2)))]),
]


def resumed_on_ranks(rank: int, world_size: int, directory: str, cases: list[Any]) -> list[tuple[str, str, Any]]:
    quiet()
    results = []
    for target, ways in cases:
        place = Path(directory) / target.replace(":", "_")
        saved = axes.TrainedModel.begin(ways[0].shard, target, axes.gradients(ways[0].shard, axes.dense))
        saved.take(0, HALF)
        saved.save(place)
        for way in ways:
            trained = axes.TrainedModel.begin(way.shard, target, axes.gradients(way.shard, axes.dense))
            trained.load(place)
            trained.take(HALF, axes.STEPS)
            results.append((target, str(way), trained.results()))
    return results


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(RESUMED[:1], id="weights"),
        pytest.param(RESUMED[1:2], id="blocks", marks=pytest.mark.long),
        pytest.param(RESUMED[2:], id="groups", marks=[pytest.mark.long, needs_replicate]),
    ],
)
def test_runs_go_on_to_the_same_bits_on_the_same_mesh_and_on_another(cases, run_ranks, tmp_path):
    targets = [target for target, _ in cases]
    alone = axes.followed(axes.unsharded, targets)
    for rank, results in enumerate(run_ranks(resumed_on_ranks, 4, str(tmp_path), cases)):
        for target, way, reached in results:
            compare({target: reached}, alone, f"rank {rank} of {way}")
    axes.dense().save_pretrained(tmp_path / "config")
    for target, ways in cases:
        halfway = axes.TrainedModel.begin(axes.unsharded, target, axes.gradients(axes.unsharded, axes.dense))
        halfway.take(0, HALF)
        saved = tmp_path / target.replace(":", "_") / "step"
        export(saved, tmp_path / "out", config=str(tmp_path / "config"), overwrite=True)
        exported = type(halfway.model).from_pretrained(tmp_path / "out").state_dict()
        for name, param in halfway.model.named_parameters():
            assert torch.equal(exported[name], param), f"{name} of {ways[0]}, exported"


# What others say of axes that they don't have on a CPU.
ANSWERS = {
    "torch's `context_parallel` on a CPU": "NotImplementedError: Operator"
    " aten._scaled_dot_product_flash_attention_for_cpu.default does not have a sharding strategy registered",
    "Accelerate's `ParallelismConfig`, also in Trainer, on a CPU": "ValueError: ParallelismConfig is only compatible"
    " DistributedType.FSDP (version 2)",
}


def context_parallel_on_a_rank() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    inputs = torch.randn(1, 2, 8, 4)
    with context_parallel(mesh, buffers=[inputs], buffer_seq_dims=[2]):
        torch.nn.functional.scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True)


def parallelism_config_on_a_rank() -> None:
    from accelerate import Accelerator, ParallelismConfig

    Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=2))


def answers_on_ranks(rank: int, world_size: int) -> list[str]:
    answers = []
    for ask in (context_parallel_on_a_rank, parallelism_config_on_a_rank):
        with pytest.raises((NotImplementedError, ValueError)) as error:
            ask()
        answers.append(f"{error.type.__name__}: {error.value}")
    return answers


def test_what_others_say_and_the_table(rank_pool):
    for answers in rank_pool(answers_on_ranks):
        for answer, expected in zip(answers, ANSWERS.values(), strict=True):
            assert answer.startswith(expected)
    all_targets = ", ".join(TARGETS)
    ways = [[str(way), all_targets] for way in (*CELLS, *EIGHT)]
    ways += [[str(Loaded(config, "")), ", ".join(OF_MIXTURES)] for config in CONFIGS]
    resumed = [[target, str(ways[0]), "; ".join(map(str, ways[1:]))] for target, ways in RESUMED]
    made = "\n\n".join(
        [
            rows(["axes (ranks)", "targets, each bitwise one process"], *ways),
            rows(["target", "saved halfway on", "gone on with there and, bitwise, on"], *resumed),
            rows(["asked of others", "their answer"], *([what, f"`{answer}`"] for what, answer in ANSWERS.items())),
        ]
    )
    hold("docs/matrix.md", "axes", "python -m pytest tests/distributed/test_axes.py", made)


def compare(by_target: dict[str, Any], alone: dict[str, Any], where: str) -> None:
    """Asserts that runs have come to the bits of one process, which says something."""
    for target, reached in by_target.items():
        expected = alone[target]
        zeros, elements = (sum(numbers) for numbers in zip(*expected["counts"].values()))
        assert 0.1 < zeros / elements < 0.7, f"{target} says nothing with {zeros} zeros of {elements}"
        different = [
            name for name, weights in expected["weights"].items() if not torch.equal(reached["weights"][name], weights)
        ]
        assert not different, f"{target} on {where}"
        assert reached["counts"] == reached["masters"] == expected["counts"], f"{target} on {where}"
        assert (reached["state"], reached["logs"]) == (expected["state"], expected["logs"]), f"{target} on {where}"
