"""`lp-dist bench quality`: reads the command's options, runs what is missing, and draws the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.quality import page, runs, tasks
from lp_dist.benchmarks.quality.methods import read_specs
from lp_dist.errors import UsageError

_CHARACTERS_TEXT = "nanoGPT's is tinyshakespeare's input.txt, of github.com/karpathy/char-rnn"
_LM_TEXT = "for example a hub dataset of WikiText-2"


def quality(
    *,
    task: str,
    text: str,
    model: str,
    methods: str,
    sparsities: str,
    seeds: str,
    steps: int | None,
    block: int,
    jobs: int,
    out: str,
) -> Path:
    """Runs `lp-dist bench quality`.

    Args:
        task: "chars", "scratch", "nanogpt" or "lm".
        text: a text file or hub dataset.
        model: of "lm" alone: a directory, hub id or .gguf file.
        methods: names of `methods.METHOD_SETS` and lines, with spaces between them.
        sparsities: percents of zeros, with spaces between them.
        seeds: integers, with spaces between them.
        steps: of the run that makes the model sparse; None: the task's.
        block: tokens a sequence, of "lm" alone.
        jobs: runs at a time.
        out: directory of quality.jsonl and of the page.
    Returns:
        The path of the page.
    Raises:
        UsageError: an option cannot be read, or is missing.
    """
    makers = {"chars": tasks.chars, "scratch": partial(tasks.chars, scratch=True), "nanogpt": tasks.nanogpt}
    if task not in (*makers, "lm"):
        raise UsageError(f"--task {task}: it must be chars, scratch, nanogpt or lm")
    if not text:
        example = _LM_TEXT if task == "lm" else _CHARACTERS_TEXT
        raise UsageError(f"--text is missing, a text file or a hub dataset; {example}")
    if bool(model) != (task == "lm"):
        raise UsageError(
            "--task lm needs a --model, a directory, hub id or .gguf file"
            if task == "lm"
            else f"--model is for --task lm, and not for {task}"
        )
    specs = read_specs(methods)
    percents, seed_numbers = read_numbers("--sparsities", sparsities, float), read_numbers("--seeds", seeds, int)
    if not all(0 < percent < 100 for percent in percents):
        raise UsageError(f"--sparsities {sparsities}: these are percents between 0 and 100")
    make = partial(tasks.lm, model, text, steps, block) if task == "lm" else partial(makers[task], text, steps)
    rows = runs.planned_rows(make(), specs, [percent / 100 for percent in percents], seed_numbers)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "quality.jsonl"
    runs.run_all(make, rows, path, jobs)
    return page.draw(json_lines.read(path), directory)


def read_numbers(option: str, words: str, kind: type) -> list:
    """Numbers with spaces or commas between them.

    Raises:
        UsageError: one can't be read.
    """
    try:
        return [kind(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{option} {words}: these must be numbers, such as '50 70' or '0 1'") from None
