"""The `lp-dist` command."""

from __future__ import annotations

import sys

try:
    import typer
except ImportError:
    sys.exit("lp-dist: error: the command needs more than the optimizers do; install the extra: pip install '.[finetune]' in the project")

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  help="Decoupled Lp weight decay: sparse fine-tuning on any shards.")


@app.callback()
def _commands() -> None:
    """Keeps `finetune` a subcommand although it is the only one so far."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def finetune(context: typer.Context) -> None:
    """Fine-tune a model: [recipe.yaml] [--key value ...]"""
    from lp_dist.finetune import main  # here, since it imports transformers

    main(context.args)


def main() -> None:
    app()
