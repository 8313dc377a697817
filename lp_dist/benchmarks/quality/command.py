"""`lp-dist bench quality`: reads what is asked for, runs it, and draws the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lp_dist.benchmarks.quality import page, runs, tasks
from lp_dist.benchmarks.quality.methods import specs
from lp_dist.errors import UsageError

_TEXTS = (
    "nanoGPT's is tinyshakespeare's input.txt, of github.com/karpathy/char-rnn",
    "for example a hub dataset of WikiText-2",
)


def quality(
    work: str,
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
    """See `lp-dist bench quality --help`; returns the page's path.

    Raises:
        UsageError: something in it can't be read, or is missing.
    """
    makers = {"chars": tasks.chars, "scratch": partial(tasks.chars, scratch=True), "nanogpt": tasks.nanogpt}
    if work not in (*makers, "lm"):
        raise UsageError(f"--work {work}: it is chars, scratch, nanogpt or lm")
    if not text:
        raise UsageError(f"--text is missing, a text file or a hub dataset; {_TEXTS[work == 'lm']}")
    if bool(model) != (work == "lm"):
        raise UsageError(
            "--work lm needs a --model, a directory, hub id or .gguf file"
            if work == "lm"
            else f"--model is for --work lm, and not for {work}"
        )
    wanted_methods = specs(methods)
    shares, numbers = _numbers("--sparsities", sparsities, float), _numbers("--seeds", seeds, int)
    if not all(0 < share < 100 for share in shares):
        raise UsageError(f"--sparsities {sparsities}: these are percents between 0 and 100")
    make = partial(tasks.lm, model, text, steps, block) if work == "lm" else partial(makers[work], text, steps)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "quality.jsonl"
    runs.run_all(make, runs.wanted(make(), wanted_methods, [share / 100 for share in shares], numbers), path, jobs)
    return page.draw(runs.read(path), directory)


def _numbers(key: str, words: str, kind: type) -> list:
    try:
        return [kind(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{key} {words}: these must be numbers, such as '50 70' or '0 1'") from None
