"""The `lp-dist` command."""

from __future__ import annotations

import json
import sys
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit("lp-dist: error: the command needs more than the optimizers do; install the extra: pip install '.[finetune]' in the project")

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  help="Decoupled Lp weight decay: sparse fine-tuning on any shards.")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def finetune(context: typer.Context) -> None:
    """Fine-tune a model: [recipe.yaml] [--key value ...]"""
    from lp_dist.finetune import main  # here, since it imports transformers

    main(context.args)


_Positive = Annotated[int, typer.Option(min=1)]
bench = typer.Typer(no_args_is_help=True, help="Measure what a feature costs, against a training step in the same run.")
app.add_typer(bench, name="bench")


@bench.command()
def counting(layers: _Positive = 30, hidden: _Positive = 576, tokens: _Positive = 512, repeats: _Positive = 5, seed: int = 0) -> None:
    """Counting zeros, and a histogram of |w|, against a training step of a Llama of this shape; prints one line of JSON."""
    from lp_dist.bench import counting as measure

    typer.echo(json.dumps(measure(layers, hidden, tokens, repeats, seed)))


@bench.command()
def trajectories(out: str = "docs/results", steps: _Positive = 300, sparsity: float = 0.5, seed: int = 0) -> None:
    """What each p does to single weights of a small Llama, and how well a target's plan is followed: which-p.png and which-p.json."""
    from lp_dist.errors import UsageError
    from lp_dist.trajectories import trajectories as draw

    try:
        typer.echo(draw(out, steps, sparsity, seed))
    except UsageError as error:
        sys.exit(f"lp-dist: error: {error}")


@bench.command()
def step(sizes: str = "1e6,2e7", repeats: _Positive = 11, out: str = "docs/results", whole: bool = True, seed: int = 0, compiled: bool = True,
         layers: _Positive = 8, hidden: _Positive = 320, tokens: _Positive = 1024, blocks: _Positive = 6,
         engines: str = "one process; ZeRO-2; ZeRO-3; ZeRO-2, CPU offload") -> None:
    """An optimizer step against torch's, DeepSpeed's, eager and compiled ones, and whole training steps of a Llama; step.jsonl and step.md."""
    from lp_dist.errors import UsageError
    from lp_dist.stepping import step as measure
    from lp_dist.stepping_whole import Shape

    try:
        typer.echo(measure(sizes, repeats, out, whole, seed, compiled, Shape(layers, hidden, tokens, blocks), engines))
    except UsageError as error:
        sys.exit(f"lp-dist: error: {error}")


@bench.command()
def quality(work: str = "chars", text: str = "", model: str = "", methods: str = "baselines ours", sparsities: str = "50 70 80 90 95", seeds: str = "0 1 2",
            steps: Annotated[int, typer.Option(min=20)] | None = None, block: _Positive = 1024, jobs: _Positive = 1,
            out: str = "docs/results") -> None:
    """What each way to sparsity loses: one row a run in quality.jsonl, and the page quality.md from all of them; runs that have a row are skipped.

    --work: chars (nanoGPT's CPU setting), scratch (the same, sparse while it learns), nanogpt (its GPU setting), lm (a language model, --model). --text: a file or hub
    dataset. --methods: baselines, ours, forms, or lines such as "gmp:c=0.33,lr=3e-4 lp:p=0". --sparsities: in percent. --jobs: runs at a time.
    """
    from lp_dist.errors import UsageError
    from lp_dist.quality.command import quality as measure

    try:
        typer.echo(measure(work, text, model, methods, sparsities, seeds, steps, block, jobs, out))
    except UsageError as error:
        sys.exit(f"lp-dist: error: {error}")


def main() -> None:
    app()
