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
         layers: _Positive = 8, hidden: _Positive = 320, tokens: _Positive = 1024, blocks: _Positive = 6) -> None:
    """An optimizer step against torch's, DeepSpeed's, eager and compiled ones, and whole training steps of a Llama; step.jsonl and step.md."""
    from lp_dist.errors import UsageError
    from lp_dist.stepping import step as measure
    from lp_dist.stepping_whole import Shape

    try:
        typer.echo(measure(sizes, repeats, out, whole, seed, compiled, Shape(layers, hidden, tokens, blocks)))
    except UsageError as error:
        sys.exit(f"lp-dist: error: {error}")


def main() -> None:
    app()
