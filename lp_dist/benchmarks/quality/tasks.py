"""The tasks of `lp-dist bench quality`: a model, its text, and how long and how fast it is trained."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lp_dist.data.text import load_text
from lp_dist.errors import UsageError
from lp_dist.optim.cache import cache_directory
from lp_dist.training.distillation import divergence

# How the description of a text ends.
HELD_OUT = ", the last tenth held out"


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run: a linear warm-up, a stable part, and a cosine down to the last rate.

    Args:
        steps: of the optimizer.
        lr: the highest learning rate.
        warmup: steps in which the rate rises to `lr`.
        last: the rate at the end, as a fraction of `lr`.
        stable_fraction: the fraction of the steps until which the rate stays at `lr`; 0: it falls from the warm-up on.
    """

    steps: int
    lr: float
    warmup: int
    last: float = 0.1
    stable_fraction: float = 0.0

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """The schedule for an optimizer.

        Args:
            optimizer: its groups have `lr` as their learning rate.
        Returns:
            A scheduler, to be stepped after each step of the optimizer.
        """
        decay_start = max(self.warmup, round(self.stable_fraction * self.steps))

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / (self.warmup + 1)
            progress = min(1.0, max(0, step - decay_start) / max(1, self.steps - decay_start))
            return self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * progress))

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Text:
    """Token ids, one after the other.

    Args:
        train: token ids to train on, int64 [tokens].
        held_out: token ids to evaluate on, int64 [tokens].
        vocabulary: number of different token ids.
        description: where they come from.
    """

    train: Tensor
    held_out: Tensor
    vocabulary: int
    description: str

    def batch(self, generator: torch.Generator, rows: int, block: int) -> tuple[Tensor, Tensor]:
        """Random windows of the training text.

        Args:
            generator: draws where the windows start.
            rows: number of windows.
            block: tokens a window.
        Returns:
            The token ids and what follows each of them, int64 [rows, block] both.
        """
        starts = torch.randint(len(self.train) - block, (rows,), generator=generator).tolist()
        windows = torch.stack([self.train[start : start + block + 1] for start in starts])
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Task:
    """What all methods are trained on and compared by.

    Args:
        name: "chars", "scratch", "nanogpt" or "lm".
        text: its tokens.
        build: makes the model before any training, from a seed.
        pretraining: of the dense model that is to become sparse; None: `build` gives that model.
        schedule: of the run that makes it sparse.
        rows: sequences a batch.
        block: tokens a sequence.
        evaluated: sequences of the held-out text that are evaluated, at most.
        betas: Adam's.
        clip: the largest norm of the gradient.
    """

    name: str
    text: Text
    build: Callable[[int], nn.Module]
    pretraining: Schedule | None
    schedule: Schedule
    rows: int
    block: int
    evaluated: int
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0

    def described(self) -> dict[str, Any]:
        """The task in plain JSON types; rows can be compared where this is equal."""

        def plain(schedule: Schedule) -> dict[str, Any]:
            # The stable fraction is a setting of the method, not of the task.
            return {key: value for key, value in asdict(schedule).items() if key != "stable_fraction"}

        return {
            "name": self.name,
            "text": self.text.description,
            "pretraining": self.pretraining and plain(self.pretraining),
            "schedule": plain(self.schedule),
            "rows": self.rows,
            "block": self.block,
            "evaluated": self.evaluated,
            "betas": list(self.betas),
            "clip": self.clip,
        }

    def loss(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        teacher: nn.Module | None = None,
        distill: float = 0.0,
    ) -> Tensor:
        """Cross-entropy, or a mix of it with the divergence from a teacher (Hinton et al., arXiv 1503.02531).

        Args:
            model: a causal language model of Transformers.
            inputs: token ids, int64 [rows, block].
            targets: what follows each of them, int64 [rows, block].
            reduction: "mean" or "sum" over the tokens.
            teacher: a model with the same vocabulary; None: cross-entropy alone.
            distill: the weight of the divergence, from 0 to 1; the cross-entropy has the rest.
        Returns:
            The loss in nats, float32 scalar.
        """
        logits = self._logits(model, inputs)
        loss = F.cross_entropy(logits, targets.to(logits.device).flatten(), reduction=reduction)
        if teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self._logits(teacher, inputs)
        return (1 - distill) * loss + distill * divergence(logits, teacher_logits).mean()

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(input_ids=inputs.to(next(model.parameters()).device)).logits.float().flatten(0, 1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Evaluates a model on the held-out text, in sequences that do not overlap.

        Args:
            model: a causal language model of Transformers.
        Returns:
            The mean cross-entropy in nats a token.
        """
        windows = self.text.held_out[: (len(self.text.held_out) - 1) // self.block * self.block + 1]
        inputs, targets = (
            windows[:-1].view(-1, self.block)[: self.evaluated],
            windows[1:].view(-1, self.block)[: self.evaluated],
        )
        model.eval()
        total = sum(
            float(self.loss(model, x, y, "sum")) for x, y in zip(inputs.split(self.rows), targets.split(self.rows))
        )
        model.train()
        return total / inputs.numel()


# -- the tasks ----------------------------------------------------------------


def chars(text: str, steps: int | None = None, scratch: bool = False) -> Task:
    """nanoGPT's setting for CPUs: `config/train_shakespeare_char.py` with the values of its README.

    4 layers of 128, blocks of 64 characters, batches of 12, 2,000 steps, no dropout.

    Args:
        text: a text file or hub dataset.
        steps: of the run that makes the model sparse; None: 600, and 2,000 from scratch.
        scratch: train the sparse model from random weights, not from a dense one.
    Returns:
        The task.
    Raises:
        UsageError: the text cannot be read.
    """
    of_text = characters(text)
    dense_schedule = Schedule(2000, 1e-3, 100)
    return Task(
        "scratch" if scratch else "chars",
        of_text,
        partial(_gpt, of_text.vocabulary, 64, 4, 128, 4, 0.0),
        None if scratch else dense_schedule,
        Schedule(steps or 2000, 1e-3, 100) if scratch else Schedule(steps or 600, 1e-3, 20),
        rows=12,
        block=64,
        evaluated=10**9,
    )


def nanogpt(text: str, steps: int | None = None) -> Task:
    """nanoGPT's setting for GPUs: `config/train_shakespeare_char.py`.

    6 layers of 384, blocks of 256 characters, batches of 64, dropout of 0.2. The dense model is trained for 2,000 of
    its 5,000 steps: nanoGPT keeps the best of its evaluations, and afterwards the model overfits.

    Args:
        text: a text file or hub dataset.
        steps: of the run that makes the model sparse; None: 600.
    Returns:
        The task.
    Raises:
        UsageError: the text cannot be read.
    """
    of_text = characters(text)
    return Task(
        "nanogpt",
        of_text,
        partial(_gpt, of_text.vocabulary, 256, 6, 384, 6, 0.2),
        Schedule(2000, 1e-3, 100),
        Schedule(steps or 600, 1e-3, 20),
        rows=64,
        block=256,
        evaluated=10**9,
    )


def characters(text: str) -> Text:
    """A text with a token for each of its characters.

    Args:
        text: a text file or hub dataset; "": the help texts that Python has of its language, each paragraph once.
    Raises:
        UsageError: the text cannot be read.
    """
    splits = _read(text) if text else _split(_help_texts())
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(splits))))}
    tokens = [torch.tensor([alphabet[c] for c in split]) for split in splits]
    name = Path(text).name if text else f"help texts of Python {sys.version_info.major}.{sys.version_info.minor}"
    return Text(*tokens, len(alphabet), f"{name}, {sum(map(len, splits)):,} characters{HELD_OUT}")


def _help_texts() -> str:
    from pydoc_data.topics import topics

    # Some topics have others in them, so that what is held out would be trained on.
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraph.strip() for paragraph in paragraphs))


def _gpt(vocabulary: int, block: int, layers: int, width: int, heads: int, dropout: float, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=block,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            # GPT-2's activation, as one kernel.
            activation_function="gelu_pytorch_tanh",
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def lm(model: str, text: str, steps: int | None = None, block: int = 1024) -> Task:
    """Fine-tunes any causal language model, one sequence a step, at a learning rate of 1e-4.

    Args:
        model: a hub id, a directory, or a .gguf file.
        text: a text file or hub dataset.
        steps: of the run that makes the model sparse; None: 100.
        block: tokens a sequence.
    Returns:
        The task.
    Raises:
        UsageError: the text cannot be read, or is shorter than a sequence.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lp_dist.data.gguf import dequantised

    path = dequantised(model) if model.endswith(".gguf") else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = [
        torch.tensor(tokenizer(split, add_special_tokens=False, verbose=False)["input_ids"]) for split in _read(text)
    ]
    if any(len(split) <= block for split in tokens):
        raise UsageError(
            f"--text {text} has {len(tokens[0]):,} tokens to train on and {len(tokens[1]):,} to evaluate; both must be"
            f" more than a block of {block}: give more text, or lower --block"
        )

    def build(seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_cache=False)

    description = f"{Path(text).name}, {sum(map(len, tokens)):,} tokens of {Path(model).stem}{HELD_OUT}"
    return Task(
        "lm",
        Text(*tokens, len(tokenizer), description),
        build,
        None,
        Schedule(steps or 100, 1e-4, 5),
        rows=1,
        block=block,
        evaluated=16,
        betas=(0.9, 0.999),
    )


def _read(text: str) -> tuple[str, str]:
    """The text to train on, and the last tenth, which is held out."""
    splits = load_text(text, None, "train", "text", None, 0.1, 0)
    return _split("".join(splits["train"]["text"]) + "".join(splits["eval"]["text"]))


def _split(text: str) -> tuple[str, str]:
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


# -- where dense models are kept ----------------------------------------------


def cached(key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, kept by torch.save in the user's cache.

    Args:
        key: plain JSON types; what was made under the same key is loaded.
        make: makes it if it is not there.
    Returns:
        Tensors and plain types, on the device on which they were made.
    """
    folder = cache_directory("quality")
    path = folder / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20] + ".pt")
    if path.exists():
        return torch.load(path, weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    value = make()
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(value, temporary)
    # Never half a file: if two processes make it, the last one stays.
    os.replace(temporary, path)
    return value
