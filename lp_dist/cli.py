"""The `lp-dist` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
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
    help="Decoupled Lp weight decay: sparse fine-tuning, sharded or not.",
)
_Positive = Annotated[int, typer.Option(min=1)]
# Accept --shard_size as well as --shard-size, as `lp-dist finetune` has underscores.
_UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}


@contextmanager
def _one_line_errors(command: Callable[..., None]) -> Iterator[None]:
    """Bad input ends `command` with one line and no traceback. Arguments that the line names become its flags.

    Commands import what they need when they run, as importing torch takes seconds.
    """
    from lp_dist.errors import DiffersError, UsageError, printable, with_flags

    try:
        yield
    except (UsageError, DiffersError) as error:
        options = [param.name for param in signature(command).parameters.values() if param.default is not param.empty]
        flags = {name: f"--{name.replace('_', '-')}" for name in options}
        sys.exit(f"lp-dist: error: {printable(with_flags(str(error), flags))}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def finetune(context: typer.Context) -> None:
    """Fine-tune a model: [recipe.yaml] [--key value ...]"""
    from lp_dist.training.finetune import main

    main(context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def plan(context: typer.Context) -> None:
    """Show what a fine-tune would do, before it: MODEL|recipe.yaml [--key value ...]"""
    from lp_dist.training.planning import main

    main(context.args)


@app.command(context_settings=_UNDERSCORES)
def report(run: str, out: str = "", png: Annotated[bool, typer.Option("--png")] = False) -> None:
    """Draw the page of a finished run again, RUN/report.html. RUN is its output_dir. Prints the paths written.

    --out: another file for the page. --png: write its figures beside it as well, for papers.
    """
    from lp_dist.report import page

    with _one_line_errors(report):
        for path in page.draw_again(run, out, png):
            typer.echo(path)


@app.command(context_settings=_UNDERSCORES)
def inspect(
    model: str,
    revision: str | None = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    page: str = "",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    trust_pickles: Annotated[bool, typer.Option("--trust-pickles")] = False,
) -> None:
    """Count the zeros of a model by kind of layer and by layer. MODEL is any checkpoint's directory, or a hub id.

    --json: all tensors, one by one. --page: an HTML file with a map of the zeros. --trust-pickles: let the checkpoint
    run the code that it names; without it none of it runs.

    Dead rows (outputs) and columns (inputs) are all zero, in each expert by itself. 2:4: the percentage of blocks, of
    four weights along the inputs, of which two or more are zero, as sparse tensor cores need it.
    """
    from lp_dist.report import inspection

    with _one_line_errors(inspect):
        zeros = inspection.inspect(
            model, revision=revision, trust_remote_code=trust_remote_code, trust_pickles=trust_pickles
        )
        if page:
            from lp_dist.report.page import build_inspection, write_text

            typer.echo(write_text(Path(page), build_inspection(zeros.as_json())))
        elif as_json:
            typer.echo(json.dumps(zeros.as_json()))
        else:
            inspection.show(zeros)


@app.command(context_settings=_UNDERSCORES)
def export(
    run: str,
    out: str,
    dtype: str | None = None,
    shard_size: str = "5GB",
    config: str | None = None,
    masters: Annotated[bool, typer.Option("--masters")] = False,
    bitmask: Annotated[bool, typer.Option("--bitmask")] = False,
    shrink: Annotated[bool, typer.Option("--shrink")] = False,
    multiple: _Positive = 1,
    verify: Annotated[bool, typer.Option("--verify")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    trust_pickles: Annotated[bool, typer.Option("--trust-pickles")] = False,
) -> None:
    """Write the model of a checkpoint (Hugging Face, DeepSpeed of any stage and world size, FSDP2) as a directory that
    from_pretrained loads.

    --dtype: float32, bfloat16, float16; else as stored. --shard-size: of a file, and so much is in memory at a time.
    --config: directory or hub id of the model, where no config.json is with the checkpoint. --masters: an engine's
    fp32 weights where a directory holds both. --bitmask: a bit for each weight and the weights that are not zero, for
    storage and transfer; exporting that gives the model back. --shrink: leave out dead feed-forward channels,
    attention heads, experts and channels of experts, for a smaller and faster model, its feed-forward width a multiple
    of --multiple. --verify: read it back, compare weights, zeros and logits. --trust-pickles: let the checkpoint run
    the code that it names; without it none of it runs.
    """
    from lp_dist.export.writer import export as write

    with _one_line_errors(export):
        write(
            run,
            out,
            dtype=dtype,
            shard_size=shard_size,
            config=config,
            masters=masters,
            bitmask=bitmask,
            shrink=shrink,
            multiple=multiple,
            verify=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            trust_pickles=trust_pickles,
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
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Merge a LoRA adapter into a sparse model with its zeros kept (W + mask·BA), and write the model to OUT.

    For models of any task, with heads, tokens and the tokenizer that the adapter brings. Shows what the mask leaves
    out of the adapter, and with a --dataset (a file, or a hub id) the perplexity of the base, with the adapter, and
    merged.
    """
    from lp_dist.export import merge as merging

    with _one_line_errors(merge):
        merged = merging.merge(
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
            trust_remote_code=trust_remote_code,
        )
        merging.show(merged, out)


bench = typer.Typer(
    no_args_is_help=True, help="Measure what a feature costs, against a training step in the same run."
)
app.add_typer(bench, name="bench")


@bench.command(context_settings=_UNDERSCORES)
def counting(
    layers: _Positive = 30,
    hidden_size: _Positive = 576,
    tokens: _Positive = 512,
    repeats: _Positive = 5,
    seed: int = 0,
) -> None:
    """Time counting zeros, and a histogram of |w|, against a training step of a Llama of this shape; prints one line
    of JSON.
    """
    from lp_dist.benchmarks.counting import counting as measure
    from lp_dist.benchmarks.json_lines import to_line

    typer.echo(to_line(measure(layers, hidden_size, tokens, repeats, seed)))


@bench.command()
def trajectories(out: str = "docs/results", steps: _Positive = 300, sparsity: float = 0.5, seed: int = 0) -> None:
    """Show what each p does to single weights of a small Llama, and how well a target follows its plan: which-p.png
    and which-p.jsonl.
    """
    from lp_dist.benchmarks.trajectories import trajectories as draw

    with _one_line_errors(trajectories):
        typer.echo(draw(out, steps, sparsity, seed))


@bench.command(context_settings=_UNDERSCORES)
def step(
    sizes: str = "1e6,2e7",
    repeats: _Positive = 11,
    out: str = "docs/results",
    training_steps: bool = True,
    seed: int = 0,
    compiled: bool = True,
    layers: _Positive = 8,
    hidden_size: _Positive = 320,
    tokens: _Positive = 1024,
    rounds: _Positive = 6,
    groups: str = "",
    interval: _Positive = 1,
    engines: str = "one process; ZeRO-2; ZeRO-3; ZeRO-2, CPU offload",
) -> None:
    """Time an optimizer step against torch's, DeepSpeed's, eager and compiled ones, and training steps of a Llama;
    writes step.jsonl and step.md.

    --sizes: numbers of weights. --repeats: rounds of one call of each implementation. --no-training-steps: the step
    alone. --layers, --hidden-size, --tokens, --rounds, --engines: of the training steps; a round is 10 steps.
    --groups: the target is for channels, heads, kv_groups, experts or expert_channels, which decay every
    --interval steps.
    """
    from lp_dist.benchmarks.step.command import step as measure
    from lp_dist.benchmarks.step.training_step import Shape

    with _one_line_errors(step):
        typer.echo(
            measure(
                sizes=sizes,
                repeats=repeats,
                out=out,
                training_steps=training_steps,
                seed=seed,
                compiled=compiled,
                shape=Shape(layers, hidden_size, tokens, rounds, groups, interval),
                engines=engines,
            )
        )


@bench.command()
def quality(
    task: str = "chars",
    text: str = "",
    model: str = "",
    methods: str = "baselines lp_dist",
    sparsities: str = "50 70 80 90 95",
    seeds: str = "0 1 2",
    steps: Annotated[int, typer.Option(min=20)] | None = None,
    block: _Positive = 1024,
    jobs: _Positive = 1,
    out: str = "docs/results",
) -> None:
    """Compare what each method of sparsity loses: one row a run in quality.jsonl, and the page quality.md from all of
    them; runs that have a row are skipped.

    --task: chars (nanoGPT's CPU setting), scratch (the same, sparse while it learns), nanogpt (its GPU setting), lm (a
    language model, --model). --text: a file or hub dataset. --methods: baselines, lp_dist, forms, rivals, patterns,
    regularizers, or lines such as "gmp:c=0.33,lr=3e-4 lp:p=0". --sparsities: in percent. --jobs: runs at a time.
    """
    from lp_dist.benchmarks.quality.command import quality as measure

    with _one_line_errors(quality):
        typer.echo(
            measure(
                task=task,
                text=text,
                model=model,
                methods=methods,
                sparsities=sparsities,
                seeds=seeds,
                steps=steps,
                block=block,
                jobs=jobs,
                out=out,
            )
        )


@bench.command(context_settings=_UNDERSCORES)
def structured(
    task: str = "lm",
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
    """Compare methods that leave fewer channels, heads or experts in a language model: what it loses, and its size and
    speed without them; writes structured.jsonl and structured.md.

    --task: lm takes --model and --text; mixtral and qwen3_moe are tiny mixtures that are trained first, on Python's
    help texts where there is no --text.

    --shares: of the --groups (channels, heads, kv_groups, experts or expert_channels) of each layer, in percent.
    --methods: groups (lp_dist), masked (lp_dist, and routers can't choose experts that have died), gcut and cut (by
    the norm, gradually and before the fine-tune; cut:criterion=taylor, of experts also frequency and reap), pathprox
    (of channels), lp (single zeros that leave as many parameters), dense; with settings such as groups:lr=3e-4.
    """
    from lp_dist.benchmarks.structured.command import structured as measure

    with _one_line_errors(structured):
        typer.echo(
            measure(
                task=task,
                model=model,
                text=text,
                methods=methods,
                shares=shares,
                seeds=seeds,
                groups=groups,
                steps=steps,
                block=block,
                tokens=tokens,
                out=out,
            )
        )


@bench.command()
def survivors(
    model: str = typer.Option(..., help="a directory, hub id or .gguf file"),
    text: str = typer.Option(..., help="a text file or hub dataset; its last tenth is held out"),
    sparsity: float = 70.0,
    tokens: str = "512 2048 8192",
    layers: _Positive = 8,
    out: str = "docs/results",
    seed: int = 0,
) -> None:
    """Show how much of a layer's loss its survivors take over on held-out text, by the number of tokens and by the
    damping; writes survivors.jsonl and survivors.md.
    """
    from lp_dist.benchmarks.survivors import survivors as measure

    with _one_line_errors(survivors):
        typer.echo(
            measure(model=model, text=text, sparsity=sparsity, tokens=tokens, layers=layers, out=out, seed=seed)
        )


@bench.command()
def scale(models: str = "8B 70B 235B", ranks: str = "64 512 1024", out: str = "docs/results") -> None:
    """Simulate single ranks of up to a thousand: time, collectives and memory of attach, of steps and of updates of a
    target; writes scale.jsonl and scale.md.

    --models: 8B (Llama-3, from 64 ranks on), 70B (from 256), 235B (Qwen3-235B-A22B, from 512), or tiny and
    tiny-mixture (from 4). --ranks: numbers of ranks. The full sizes take up to 8 GB of memory.
    """
    from lp_dist.benchmarks.scale.command import scale as measure

    with _one_line_errors(scale):
        typer.echo(measure(models=models, ranks=ranks, out=out))


def main() -> None:
    app()
