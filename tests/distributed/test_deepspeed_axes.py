"""What DeepSpeed's other axes do: Ulysses shards nothing and comes to one process; what lp_dist does not support it
refuses by name; and what DeepSpeed itself can't do ends in its own error, as docs/matrix.md says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.deepspeed_axes import (
    AUTOEP,
    EXPERT_CASES,
    LONG_EXPERT_CASES,
    LONG_TENSOR_CASES,
    TENSOR_CASES,
    NativeMixture,
    marked_groups,
    mixture,
)
from helpers.engines import Engine, deepspeed_config, ended, gathered, quiet
from helpers.tables import hold, rows
from lp_dist import LpAdamW, SparsityTarget, attach, measure_sparsity, param_groups
from lp_dist.errors import UsageError
from lp_dist.structured.resolve import groups_of

STEPS, TOKENS, VOCABULARY = 15, 8, 50
NEAR = "rtol 1e-4, atol 1e-6, the same zeros"


def started(model: nn.Module, optimizer: Any, stage: str, **more: Any) -> Any:
    import deepspeed

    mpu = more.pop("mpu", None)
    config = deepspeed_config(stage, **more)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False)[0]


# --- Ulysses ---


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            vocab_size=VOCABULARY,
            max_position_embeddings=TOKENS,
            attn_implementation="sdpa",
        )
    )


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(step))


def labels_of(tokens: Tensor) -> Tensor:
    return nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]


def optimizer_of(model: nn.Module) -> LpAdamW:
    return LpAdamW(param_groups(model, 0.0), lr=5e-3, eps=1e-3)


TARGETS = {"zero1": SparsityTarget(0.5, update_every=2), "zero3": SparsityTarget(pattern="2:4", update_every=2)}


def ulysses(rank: int, stage: str, mpu: Any) -> dict[str, Any]:
    model = llama()
    engine = started(model, optimizer_of(model), stage, mpu=mpu, sequence_parallel_size=2)
    attachment = attach(engine, target=TARGETS[stage], total_steps=STEPS)
    half = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    for step in range(STEPS):
        tokens = tokens_of(step)
        logits = engine(input_ids=tokens[:, half], position_ids=torch.arange(TOKENS)[None, half]).logits
        losses = nn.functional.cross_entropy(logits[0], labels_of(tokens)[0, half], ignore_index=-100, reduction="sum")
        # The gradients of the ranks are added up at stage 1, and averaged at stage 3.
        engine.backward(losses / (TOKENS - 1) * (2 if stage == "zero3" else 1))
        engine.step()
        attachment.after_step()
    results = {"counts": measure_sparsity(engine).counts, "model": gathered(Engine(engine, None))}
    ended(Engine(engine, None))
    return results


def ulysses_on_ranks(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from lp_dist.sharding.deepspeed import join_deepspeed

    quiet()
    join_deepspeed()
    # Once in a process.
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=llama(),
        core_attn_implementation="sdpa",
        sequence_parallel_size=2,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    return {stage: ulysses(rank, stage, mpu) for stage in TARGETS}


@pytest.mark.long
def test_ulysses_doubles_neither_gradients_nor_counts(run_ranks):
    ranks = run_ranks(ulysses_on_ranks, 2)
    for stage, target in TARGETS.items():
        model = llama()
        optimizer = optimizer_of(model)
        attachment = attach(model, optimizer, target=target, total_steps=STEPS)
        for step in range(STEPS):
            model(input_ids=tokens_of(step), labels=tokens_of(step)).loss.backward()
            optimizer.step()
            attachment.after_step()
            optimizer.zero_grad()
        counts = measure_sparsity(model).counts
        for rank in ranks:
            assert rank[stage]["counts"] == counts, stage
            for name, param in model.named_parameters():
                weight = rank[stage]["model"][name]
                torch.testing.assert_close(weight, param.detach(), rtol=1e-4, atol=1e-6)
                assert torch.equal(weight == 0, param == 0), name


# --- what is refused ---


def pipeline(stage: str = "zero1") -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers = [LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.Linear, 8, 8)]
    model = PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss())
    optimizer = LpAdamW(param_groups(nn.Sequential(*model.forward_funcs), 0.1), lr=1e-2)
    return started(model, optimizer, stage, train_batch_size=2, gradient_accumulation_steps=2)


def attach_to_a_pipeline() -> None:
    attach(pipeline())


def count_a_pipeline() -> None:
    measure_sparsity(pipeline())


def groups_of_local_experts() -> None:
    model = NativeMixture(2)
    experts = {id(param) for name, param in model.named_parameters() if ".experts." in name}
    optimizer = LpAdamW(marked_groups(param_groups(model, 0.0), experts, "ep_size_2"), lr=1e-2)
    engine = started(model, optimizer, "zero1")
    sets = groups_of(engine.module, along="moe.deepspeed_moe.experts.deepspeed_experts.0.0.weight")
    attach(engine, target=SparsityTarget(0.5, groups=sets), total_steps=30)


def a_preset_of_autoep() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    started(model, optimizer_of(model), "zero0", expert_parallel={"enabled": True, "autoep_size": 2})


def unmarked_experts() -> None:
    model = mixture()
    started(model, optimizer_of(model), "zero1", expert_parallel=AUTOEP)


def native_experts_in_zero3() -> None:
    model = NativeMixture(2)
    started(model, optimizer_of(model), "zero3")


def a_pipeline_in_zero2() -> None:
    pipeline("zero2")


def autoep_and_autotp() -> None:
    model = mixture()
    started(model, optimizer_of(model), "zero0", expert_parallel=AUTOEP, tensor_parallel={"autotp_size": 2})


REFUSED: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "attach": (attach_to_a_pipeline, UsageError, "PipelineEngine gives each rank the layers of its stage alone"),
    "count": (count_a_pipeline, UsageError, "PipelineEngine gives each rank the layers of its stage alone"),
    "groups": (
        groups_of_local_experts,
        UsageError,
        "deepspeed_experts.0.0.weight, and that is of different experts on",
    ),
}
# {how its answer begins: (what is asked of it, in words, and by code)}
OWN_ERRORS: dict[str, tuple[str, Callable[[], None]]] = {
    "TypeError: _CanRecordRegistry.get() takes 2 positional arguments but 3 were given": (
        "AutoEP's presets of Mixtral and Qwen3-MoE, with transformers 5.24",
        a_preset_of_autoep,
    ),
    "AssertionError: The model has moe layers, but None of the param groups are marked as MoE": (
        "AutoEP or `deepspeed.moe` under ZeRO 1 or 2, with experts in the param groups of others",
        unmarked_experts,
    ),
    "AssertionError: Native DeepSpeed MoE is not supported with ZeRO Stage 3": (
        "`deepspeed.moe` under ZeRO 3",
        native_experts_in_zero3,
    ),
    "AssertionError: ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism": (
        "PipelineModule under ZeRO 2 or 3",
        a_pipeline_in_zero2,
    ),
    "ValueError: HuggingFace tp_plan contains unsupported partition style(s)": (
        "AutoTP with a model's own plan for its experts, as OLMoE's",
        autoep_and_autotp,
    ),
}


def errors_on_ranks(rank: int, world_size: int) -> dict[str, str]:
    from lp_dist.sharding.deepspeed import join_deepspeed

    quiet()
    join_deepspeed()
    errors = {}
    runs = {name: refused[0] for name, refused in REFUSED.items()} | {
        words: run for words, (_, run) in OWN_ERRORS.items()
    }
    # A pipeline stays DeepSpeed's grid of ranks for all engines after it.
    for name, run in sorted(runs.items(), key=lambda item: "pipeline" in item[1].__name__):
        try:
            run()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


@pytest.fixture(scope="module")
def errors(module_ranks) -> list[dict[str, str]]:
    return module_ranks(errors_on_ranks, 2)


def test_what_is_not_supported_is_refused_by_name(errors):
    for name, (_, kind, message) in REFUSED.items():
        for rank in errors:
            assert rank[name].startswith(f"{kind.__name__}: ") and message in rank[name], rank.get(name)


def test_what_deepspeed_cannot_do_ends_in_its_own_error(errors):
    for words in OWN_ERRORS:
        assert all(rank[words].startswith(words) for rank in errors), [rank.get(words) for rank in errors]


def test_the_table_says_what_runs():
    def listed(what: set[str]) -> str:
        return ", ".join(sorted(what))

    tensor_cases, expert_cases = [*TENSOR_CASES, *LONG_TENSOR_CASES], [*EXPERT_CASES, *LONG_EXPERT_CASES]
    targets = {"global": "weights", "layer": "weights", "by hand": "a λ"}
    ways = [
        [
            "AutoTP",
            listed({case.stage[4:] for case in tensor_cases}),
            listed({targets.get(case.how, case.how) for case in tensor_cases}),
            "one process, bitwise",
        ]
    ]
    for kind, name, compared in (("autoep", "AutoEP", "one process"), ("native", "`deepspeed.moe`", "DDP")):
        cases = [case for case in expert_cases if case.kind == kind and case.ep_size > 1]
        ways.append(
            [
                name,
                listed({case.stage[4:] for case in cases}),
                listed({case.what for case in cases}),
                f"{compared}, {NEAR}",
            ]
        )
    patterns = {target.pattern or "weights" for target in TARGETS.values()}
    ways.append(["Ulysses", listed({stage[4:] for stage in TARGETS}), listed(patterns), f"one process, {NEAR}"])
    ways.append(["PipelineModule", "none", "refused by name", ""])
    made = "\n\n".join(
        [
            rows(["axis", "ZeRO", "target", "compared with"], *ways),
            rows(
                ["asked of bare DeepSpeed", "its answer"],
                *([what, f"`{words}`"] for words, (what, _) in OWN_ERRORS.items()),
            ),
        ]
    )
    command = "python -m pytest tests/distributed/test_deepspeed_axes.py"
    hold("docs/matrix.md", "axes of DeepSpeed", command, made)
    # The first two are those of test_axes.py.
    in_short = [
        ["FSDP2, HSDP, `replicate` × tensor, sequence, context parallelism", "bitwise"],
        ["transformers' `DistributedConfig`: FSDP2 × tensor × expert parallelism", "bitwise"],
    ]
    for name, stages, _, compared in ways:
        verdict = compared.rpartition("one process, ")[2].rpartition("DDP, ")[2]
        in_short.append([f"DeepSpeed's {name}" + f", ZeRO {stages}" * bool(verdict), verdict or "refused by name"])
    hold("README.md", "axes", command, rows(["several axes", "compared with one process"], *in_short))
