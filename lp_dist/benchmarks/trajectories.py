"""`lp-dist bench trajectories`: what each p does to single weights, and how well a target follows its plan.

Both are measured in a real training run.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.json_lines import ResultRow
from lp_dist.benchmarks.timing import progress
from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpAdamW
from lp_dist.report import environment
from lp_dist.sparsity.measure import measure_sparsity
from lp_dist.sparsity.selection import matrix_names, param_groups
from lp_dist.targets.target import SparsityTarget

EXPONENTS = (2.0, 1.0, 0.8, 0.5, 0.0, -1.0)
_LR, _BATCH, _CONTEXT, _SHOWN = 2e-3, 16, 64, 60


def trajectories(out: str, steps: int = 300, sparsity: float = 0.5, seed: int = 0) -> Path:
    """Trains a small Llama on the bytes of Python's language reference, and goes on from there with each p.

    Each p has a run with a λ, and each p ≤ 1 one with a target. The λ is the one with which, without gradients, the
    fraction `sparsity` of the weights would be zero after `steps` steps. With p = 2 no weight becomes zero, and all
    would shrink to a tenth.

    Args:
        out: directory; a row is appended to its which-p.jsonl, and which-p.png is written.
        steps: of each run.
        sparsity: the fraction of zeros.
        seed: of the weights and batches.
    Returns:
        The path of the figure.
    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "the figure needs matplotlib; install the extra: pip install '.[bench]' in the project"
        ) from None
    matplotlib.use("Agg")
    torch.manual_seed(seed)
    data = _bytes()
    start = _model()
    _train(start, LpAdamW(start.parameters(), lr=_LR), data, steps, seed, "dense, to start from")
    rows = [_with_lambda(copy.deepcopy(start), p, data, steps, sparsity, seed) for p in EXPONENTS]
    plans = [_with_target(copy.deepcopy(start), p, data, steps, sparsity, seed) for p in EXPONENTS if p <= 1]
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    json_lines.append(
        directory / "which-p.jsonl",
        {
            "benchmark": "trajectories",
            "steps": steps,
            "sparsity": sparsity,
            "seed": seed,
            "lr": _LR,
            "machine": platform.machine(),
            "versions": environment.versions(),
            "lambda": [{key: row[key] for key in ("p", "weight_decay", "zeros", "loss")} for row in rows],
            "target": [{key: row[key] for key in ("p", "final_pruning", "loss", "lag")} for row in plans],
        },
    )
    path = directory / "which-p.png"
    _draw(path, rows, plans, steps)
    return path


def _bytes() -> Tensor:
    from pydoc_data.topics import topics

    return torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.int64)


def _model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=_CONTEXT,
            tie_word_embeddings=True,
        )
    )


def _batches(data: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - _CONTEXT, (_BATCH, 1), generator=generator)
        yield data[starts + torch.arange(_CONTEXT)]


def _train(
    model: nn.Module,
    optimizer: LpAdamW,
    data: Tensor,
    steps: int,
    seed: int,
    name: str,
    after: Callable[[int], None] = lambda step: None,
) -> float:
    """The mean loss of the last tenth of the steps. after: called with the step's number after each step."""
    losses = []
    for step, batch in enumerate(progress(_batches(data, steps, seed), name, total=steps)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step)
    last_losses = losses[-max(1, steps // 10) :]
    return sum(last_losses) / len(last_losses)


def _with_lambda(model: nn.Module, p: float, data: Tensor, steps: int, sparsity: float, seed: int) -> ResultRow:
    params = dict(model.named_parameters())
    names = sorted(matrix_names(model))
    magnitudes = torch.cat([params[name].detach().abs().flatten() for name in names]).sort().values
    quantile = float(magnitudes[round(sparsity * (len(magnitudes) - 1))])
    total = _LR * steps
    lam = 2.3026 / total if p == 2 else quantile ** (2 - p) / ((2 - p) * total)
    optimizer = LpAdamW(param_groups(model, lam), lr=_LR, p=p, precondition=0.0)
    shown = params[names[0]].detach().abs().flatten().argsort()[:: params[names[0]].numel() // _SHOWN]
    paths = [params[names[0]].detach().abs().flatten()[shown]]

    def record(step: int) -> None:
        paths.append(params[names[0]].detach().abs().flatten()[shown])

    loss = _train(model, optimizer, data, steps, seed + 1, f"p = {p:g}, λ = {lam:.3g}", record)
    return {
        "p": p,
        "weight_decay": lam,
        "zeros": measure_sparsity(model).total,
        "loss": loss,
        "paths": torch.stack(paths),
    }


def _with_target(model: nn.Module, p: float, data: Tensor, steps: int, sparsity: float, seed: int) -> ResultRow:
    optimizer = LpAdamW(model.parameters(), lr=_LR, p=p, precondition=0.5)
    attached = attach(
        model, optimizer, target=SparsityTarget(sparsity, scope="layer", regrowth=0.0), total_steps=steps
    )
    plan, measured = [], []

    def record(step: int) -> None:
        attached.after_step()
        controller = attached.weight_controller
        first = next(iter(controller.before.values()), 0.0)
        plan.append(
            first + (controller.sparsity - first) * controller.planned_share(step + 1) if controller.before else 0.0
        )
        measured.append(measure_sparsity(model).total)

    loss = _train(model, optimizer, data, steps, seed + 1, f"p = {p:g}, {sparsity:.0%} zeros", record)
    return {
        "p": p,
        "plan": plan,
        "measured": measured,
        "final_pruning": attached.weight_controller.final_pruning,
        "loss": loss,
        "lag": max(a - b for a, b in zip(plan, measured)),
    }


def _draw(path: Path, rows: list[ResultRow], plans: list[ResultRow], steps: int) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 6.5), layout="constrained")
    panels = [*axes[:, :3].flatten()]
    for axis, row in zip(panels, rows):
        axis.semilogy(row["paths"].clamp_min(1e-9).numpy(), linewidth=0.7, alpha=0.7)
        axis.set(
            ylim=(1e-8, 1),
            title=f"p = {row['p']:g}, λ = {row['weight_decay']:.2g}: {row['zeros']:.1%} zeros, loss {row['loss']:.2f}",
            xlabel="optimizer step",
            ylabel="|w|",
        )
        axis.title.set_fontsize(9)
    plan, deviation = axes[:, 3]
    for row in plans:
        plan.plot(row["measured"], linewidth=1, label=f"p = {row['p']:g}, loss {row['loss']:.2f}")
    plan.plot(plans[0]["plan"], "k--", linewidth=1, label="plan")
    plan.set(title="target: plan and measured fraction of zeros", xlabel="optimizer step")
    plan.legend(fontsize=7)
    for row in plans:
        deviation.plot([a - b for a, b in zip(row["measured"], row["plan"])], linewidth=1, label=f"p = {row['p']:g}")
    deviation.set(title="measured − plan", xlabel="optimizer step")
    for axis in (plan, deviation):
        axis.title.set_fontsize(9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
