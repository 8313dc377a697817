"""`lp-dist bench survivors`: how much of a layer's loss its survivors take over, on text they have not seen, by the
number of tokens and by the damping.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.markdown import markdown_table
from lp_dist.benchmarks.quality import tasks
from lp_dist.benchmarks.quality.command import read_numbers
from lp_dist.benchmarks.quality.oneshot import keep_largest
from lp_dist.benchmarks.timing import progress
from lp_dist.errors import UsageError
from lp_dist.reconstruction.inputs import InputSample
from lp_dist.reconstruction.solver import damping_for, move_survivors
from lp_dist.report import environment
from lp_dist.sharding.deepspeed_slices import is_linear

# As shares of the diagonal of XᵀX.
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)
# Tokens a forward pass.
BLOCK = 512
HELD_OUT_TOKENS = 16 * BLOCK


def survivors(*, model: str, text: str, sparsity: float, tokens: str, layers: int, out: str, seed: int = 0) -> Path:
    """Runs `lp-dist bench survivors`.

    Args:
        model: a directory, hub id or .gguf file of a causal language model.
        text: a text file or hub dataset, whose last tenth is held out.
        sparsity: percent of each layer's weights that are removed, by |w|·‖x‖.
        tokens: numbers of tokens from which the inputs are known, with spaces between them.
        layers: linear layers of the blocks that are taken, evenly over all of them.
        out: directory of survivors.jsonl and survivors.md.
        seed: of the text's windows.
    Returns:
        The path of the page.
    Raises:
        UsageError: the text cannot be read, or is too short.
    """
    if not 0 < sparsity < 100:
        raise UsageError(f"--sparsity {sparsity:g}: it is a percent between 0 and 100")
    numbers = sorted({*read_numbers("--tokens", tokens, int)})
    if not numbers or numbers[0] < 1:
        raise UsageError(f"--tokens '{tokens}': these are numbers of tokens from 1 on, such as '512 8192'")
    task = tasks.lm(model, text, block=BLOCK)
    language_model = task.build(seed).train()  # a sample takes nothing of evaluations
    chosen = _spread(language_model, layers)
    generator = torch.Generator().manual_seed(seed)
    passes = -(-numbers[-1] // BLOCK)
    seen = [task.text.batch(generator, 1, BLOCK)[0] for _ in range(passes)]
    held_out = task.text.held_out[: min(len(task.text.held_out) // BLOCK * BLOCK, HELD_OUT_TOKENS)]
    unseen = list(held_out.view(-1, 1, BLOCK))
    rows = []
    for name, layer in progress(chosen.items(), "layers"):
        inputs, held_out = (_inputs(language_model, name, layer, batches) for batches in (seen, unseen))
        for number in numbers:
            rows.append(_row(name, layer.weight.detach().float(), inputs[:number], held_out, sparsity / 100))
    header = {
        "benchmark": "survivors",
        "command": f"lp-dist bench survivors --model {Path(model).name} --text {Path(text).name}"
        f" --sparsity {sparsity:g} --tokens {','.join(map(str, numbers))} --layers {layers} --seed {seed}",
        "model": Path(model).stem,
        "text": task.text.description,
        "sparsity": sparsity / 100,
        "seed": seed,
        "versions": environment.versions(),
    }
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "survivors.jsonl").write_text("".join(json_lines.to_line(row) + "\n" for row in [header, *rows]))
    page = directory / "survivors.md"
    page.write_text(_page(header, rows))
    return page


def _spread(model: nn.Module, number: int) -> dict[str, nn.Module]:
    """Linear layers evenly over the model, but not its head."""
    head = model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if is_linear(module) and module is not head]
    number = min(number, len(linear))
    return dict(linear[i * len(linear) // number] for i in range(number))


def _inputs(model: nn.Module, name: str, layer: nn.Module, batches: list[Tensor]) -> Tensor:
    """What goes into a layer, (tokens, inputs) fp32."""
    sample = InputSample(model, {name: layer}, sum(batch.numel() for batch in batches))
    sample.open()
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    values = sample.values(name)
    sample.close()
    return values


def _row(name: str, weight: Tensor, inputs: Tensor, held_out: Tensor, sparsity: float) -> json_lines.ResultRow:
    """What is left of the squared loss of a layer's outputs on held-out text when its survivors move.

    Args:
        name: of the layer.
        weight: (outputs, inputs) fp32.
        inputs: of the tokens by which they move, (tokens, inputs) fp32.
        held_out: of other tokens.
        sparsity: the fraction of the weights that is removed.
    """
    gram, other = inputs.T @ inputs, held_out.T @ held_out
    score = weight.abs() * gram.diagonal().sqrt()
    pruned = keep_largest({name: score}, sparsity, "layer")[name].logical_not()
    stay = weight.masked_fill(pruned, 0.0)

    def loss(after: Tensor) -> float:
        difference = after - weight
        return float((difference @ other * difference).sum())

    def left(damping: float) -> float:
        return loss(move_survivors(weight, stay, gram, damping=damping)) / loss(stay)

    default = damping_for(len(inputs), weight.shape[1])
    return {
        "layer": name,
        "outputs, inputs": list(weight.shape),
        "tokens": len(inputs),
        "damping": default,
        "left": left(default),
        "left by damping": {f"{damping:g}": left(damping) for damping in DAMPINGS},
    }


def _page(header: json_lines.ResultRow, rows: list[json_lines.ResultRow]) -> str:
    dampings = [f"{damping:g}" for damping in DAMPINGS]
    cells = [
        [
            row["layer"],
            f"{row['tokens']:,}",
            f"{row['damping']:.2f}",
            f"**{row['left']:.3f}**",
            *(f"{row['left by damping'][damping]:.3f}" for damping in dampings),
        ]
        for row in rows
    ]
    return "\n".join(
        [
            "# What survivors take over of a layer's loss",
            "",
            f"`{header['command']}`: {header['model']}, {header['text']}. {header['sparsity']:.0%} of each layer's"
            " weights are removed, by |w|·‖x‖, and the survivors move. The figure is what is left of the squared error"
            f" of its outputs on {HELD_OUT_TOKENS:,} held-out tokens, where 1 is that of survivors that stay. Bold: by"
            " the damping of the library, `damping_for(tokens, inputs)`; then by others, all as shares of the diagonal"
            " of XᵀX.",
            "",
            *markdown_table(["layer", "tokens", "damping", "left", *dampings], cells),
            "",
            *(f"- {name} {version}" for name, version in header["versions"].items()),
            "",
        ]
    )
