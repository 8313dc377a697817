"""The `lp-dist` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit(
        "lp-dist: error: the command needs more than the optimizers do; install the extra: pip install '.[finetune]'"
        " in the project"
    )

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Decoupled Lp weight decay: sparse fine-tuning on any shards.",
)
_Positive = Annotated[int, typer.Option(min=1)]
# --shard_size as well as --shard-size, as it is in the training program.
_UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user did wrong ends the command with one line, and no traceback. (Commands import what they need when
    they run: torch takes seconds.)
    """
    from lp_dist.errors import DiffersError, UsageError

    try:
        yield
    except (UsageError, DiffersError) as error:
        sys.exit(f"lp-dist: error: {error}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def finetune(context: typer.Context) -> None:
    """Fine-tune a model: [recipe.yaml] [--key value ...]"""
    from lp_dist.training.finetune import main

    main(context.args)


@app.command(context_settings=_UNDERSCORES)
def report(run: str, out: str = "", png: Annotated[bool, typer.Option("--png")] = False) -> None:
    """Draw the page of a finished run again, RUN/report.html; RUN is its output_dir.

    --out: another file for it. --png: its figures as well, for papers, beside it. Prints what was written.
    """
    from lp_dist.report import page
    from lp_dist.report.schema import read

    with _one_line_errors():
        for path in page.write(read(run), Path(out or Path(run) / page.FILE), png):
            typer.echo(path)


@app.command(context_settings=_UNDERSCORES)
def inspect(
    model: str,
    revision: str | None = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    page: str = "",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Where the zeros of a model lie, by kind of layer and by layer: any checkpoint's directory, or a hub id.

    --json: everything, tensor by tensor. --page: an HTML file with a map of the zeros.

    Dead rows and columns are all zeros. 2:4 blocks: four weights along the input of which two at least are zero, as
    sparse tensor cores take them.
    """
    from lp_dist.report import inspection

    with _one_line_errors():
        found = inspection.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
        if page:
            from lp_dist.report.page import build_inspection, write_text

            typer.echo(write_text(Path(page), build_inspection(found.as_json())))
        elif as_json:
            typer.echo(json.dumps(found.as_json()))
        else:
            inspection.show(found)


@app.command(context_settings=_UNDERSCORES)
def export(
    run: str,
    out: str,
    dtype: str | None = None,
    shard_size: str = "5GB",
    config: str | None = None,
    masters: Annotated[bool, typer.Option("--masters")] = False,
    compact: Annotated[bool, typer.Option("--compact")] = False,
    shrink: Annotated[bool, typer.Option("--shrink")] = False,
    multiple: _Positive = 1,
    verify: Annotated[bool, typer.Option("--verify")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Write the model of a checkpoint (Hugging Face, DeepSpeed of any stage and world size, FSDP2) as a directory that
    from_pretrained loads.

    --dtype: float32, bfloat16, float16; else as stored. --shard-size: of a file, and so much is in memory at a time.
    --config: directory or hub id of the model, where no config.json is with the checkpoint. --masters: an engine's
    fp32 weights where a directory holds both. --compact: a bit for each weight and the weights that are not zero, for
    storage and transfer; exporting that gives the model back. --shrink: leave out dead feed-forward channels and
    attention heads, for a smaller and faster model, its feed-forward width a multiple of --multiple. --verify: read it
    back, compare weights, zeros and logits.
    """
    from lp_dist.export.writer import export as write

    with _one_line_errors():
        write(
            run,
            out,
            dtype=dtype,
            shard_size=shard_size,
            config=config,
            masters=masters,
            compacted=compact,
            shrunk=shrink,
            multiple=multiple,
            verified=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        ).show()


@app.command(context_settings=_UNDERSCORES)
def merge(
    base: str,
    adapter: str,
    out: str,
    dtype: str = "auto",
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str = "text",
    blocks: _Positive = 32,
    block_size: _Positive = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Merge a LoRA adapter into a sparse model with its zeros kept (W + mask·BA), and write the model to OUT.

    Shows what the mask leaves out of the adapter, and with a --dataset (a file, or a hub id) the perplexity of the
    base, with the adapter, and merged.
    """
    from lp_dist.export import merge

    with _one_line_errors():
        merged = merge.merge(
            base,
            adapter,
            out,
            dtype=dtype,
            dataset=dataset,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            text_column=text_column,
            blocks=blocks,
            block_size=block_size,
            overwrite=overwrite,
        )
        merge.show(merged, out)


bench = typer.Typer(
    no_args_is_help=True, help="Measure what a feature costs, against a training step in the same run."
)
app.add_typer(bench, name="bench")


@bench.command()
def counting(
    layers: _Positive = 30, hidden: _Positive = 576, tokens: _Positive = 512, repeats: _Positive = 5, seed: int = 0
) -> None:
    """Counting zeros, and a histogram of |w|, against a training step of a Llama of this shape; prints one line of
    JSON.
    """
    from lp_dist.benchmarks.counting import counting as measure

    typer.echo(json.dumps(measure(layers, hidden, tokens, repeats, seed)))


@bench.command()
def trajectories(out: str = "docs/results", steps: _Positive = 300, sparsity: float = 0.5, seed: int = 0) -> None:
    """What each p does to single weights of a small Llama, and how well a target's plan is followed: which-p.png and
    which-p.json.
    """
    from lp_dist.benchmarks.trajectories import trajectories as draw

    with _one_line_errors():
        typer.echo(draw(out, steps, sparsity, seed))


@bench.command()
def step(
    sizes: str = "1e6,2e7",
    repeats: _Positive = 11,
    out: str = "docs/results",
    whole: bool = True,
    seed: int = 0,
    compiled: bool = True,
    layers: _Positive = 8,
    hidden: _Positive = 320,
    tokens: _Positive = 1024,
    blocks: _Positive = 6,
    groups: str = "",
    interval: _Positive = 1,
    engines: str = "one process; ZeRO-2; ZeRO-3; ZeRO-2, CPU offload",
) -> None:
    """An optimizer step against torch's, DeepSpeed's, eager and compiled ones, and whole training steps of a Llama;
    step.jsonl and step.md.
    """
    from lp_dist.benchmarks.step.command import step as measure
    from lp_dist.benchmarks.step.training_step import Shape

    with _one_line_errors():
        typer.echo(
            measure(
                sizes,
                repeats,
                out,
                whole,
                seed,
                compiled,
                Shape(layers, hidden, tokens, blocks, groups, interval),
                engines,
            )
        )


@bench.command()
def quality(
    work: str = "chars",
    text: str = "",
    model: str = "",
    methods: str = "baselines ours",
    sparsities: str = "50 70 80 90 95",
    seeds: str = "0 1 2",
    steps: Annotated[int, typer.Option(min=20)] | None = None,
    block: _Positive = 1024,
    jobs: _Positive = 1,
    out: str = "docs/results",
) -> None:
    """What each way to sparsity loses: one row a run in quality.jsonl, and the page quality.md from all of them; runs
    that have a row are skipped.

    --work: chars (nanoGPT's CPU setting), scratch (the same, sparse while it learns), nanogpt (its GPU setting), lm (a
    language model, --model). --text: a file or hub dataset. --methods: baselines, ours, forms, or lines such as
    "gmp:c=0.33,lr=3e-4 lp:p=0". --sparsities: in percent. --jobs: runs at a time.
    """
    from lp_dist.benchmarks.quality.command import quality as measure

    with _one_line_errors():
        typer.echo(measure(work, text, model, methods, sparsities, seeds, steps, block, jobs, out))


@bench.command(context_settings=_UNDERSCORES)
def structure(
    model: str = "",
    text: str = "",
    methods: str = "dense groups gcut cut cut:criterion=taylor lp",
    shares: str = "20 30 50",
    seeds: str = "0",
    groups: str = "channels",
    steps: Annotated[int, typer.Option(min=20)] | None = None,
    block: _Positive = 1024,
    tokens: _Positive = 64,
    out: str = "docs/results",
) -> None:
    """Fewer channels or heads of a language model: what it loses, its size and its speed once they are cut out;
    structure.jsonl and structure.md.

    --shares: of the --groups (channels, heads or kv_groups) of each layer, in percent. --methods: groups (ours), gcut
    and cut (by the norm, gradually and before the fine-tune; cut:criterion=taylor), lp (single zeros that leave as
    many parameters), dense; with settings such as groups:lr=3e-4.
    """
    from lp_dist.benchmarks.structured.command import structure as measure

    with _one_line_errors():
        typer.echo(measure(model, text, methods, shares, seeds, groups, steps, block, tokens, out))


def main() -> None:
    app()
