"""What `lp-dist bench quality` trains: a work is a model, its text, and how long and how fast it is trained."""

from __future__ import annotations

import hashlib
import json
import math
import os
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
from lp_dist.training.distillation import divergence

HELD_OUT = ", the last tenth held out"  # as a text's description ends


@dataclass(frozen=True)
class Schedule:
    """steps: of the optimizer. The learning rate rises over `warmup` steps to `lr`, stays there until the part `fall`
    of the steps, and falls along a cosine to `last` of it."""

    steps: int
    lr: float
    warmup: int
    last: float = 0.1
    fall: float = 0.0

    def of(self, optimizer: Optimizer) -> LRScheduler:
        begin = max(self.warmup, round(self.fall * self.steps))

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / (self.warmup + 1)
            part = min(1.0, max(0, step - begin) / max(1, self.steps - begin))
            return self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * part))

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Text:
    """Token ids, one after the other. description: where they come from."""

    train: Tensor
    held_out: Tensor
    vocabulary: int
    description: str

    def batch(self, generator: torch.Generator, rows: int, block: int) -> tuple[Tensor, Tensor]:
        """Random windows of the training text and what follows each token, [rows, block]."""
        starts = torch.randint(len(self.train) - block, (rows,), generator=generator).tolist()
        windows = torch.stack([self.train[start : start + block + 1] for start in starts])
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Work:
    """One of the bench's works.

    Args:
        name: "chars", "scratch", "nanogpt" or "lm". text: its tokens. build: makes the model before any training, of a
            seed.
        pretraining: of the dense model that is to become sparse; None: `build` gives it as it is.
        schedule: of the run that makes it sparse. rows, block: of a batch. evaluated: windows of the held-out text
            that are evaluated.
        betas, clip: Adam's, and the largest norm of a gradient.
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
        """Plain JSON types: rows can be compared where this is equal."""

        def plain(schedule: Schedule) -> dict[str, Any]:
            return {key: value for key, value in asdict(schedule).items() if key != "fall"}  # a method's own

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

    def loss_of(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        teacher: nn.Module | None = None,
        distill: float = 0.0,
    ) -> Tensor:
        """Cross-entropy; or the part `distill` of it is the divergence from what a teacher says instead (Hinton et
        al., arXiv 1503.02531).
        """
        logits = self._logits(model, inputs)
        loss = F.cross_entropy(logits, targets.to(logits.device).flatten(), reduction=reduction)
        if teacher is None:
            return loss
        with torch.no_grad():
            theirs = self._logits(teacher, inputs)
        return (1 - distill) * loss + distill * divergence(logits, theirs).mean()

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(input_ids=inputs.to(next(model.parameters()).device)).logits.float().flatten(0, 1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean cross-entropy of a token of the held-out text, in nats, over windows side by side."""
        windows = self.text.held_out[: (len(self.text.held_out) - 1) // self.block * self.block + 1]
        inputs, targets = (
            windows[:-1].view(-1, self.block)[: self.evaluated],
            windows[1:].view(-1, self.block)[: self.evaluated],
        )
        model.eval()
        total = sum(
            float(self.loss_of(model, x, y, "sum")) for x, y in zip(inputs.split(self.rows), targets.split(self.rows))
        )
        model.train()
        return total / inputs.numel()


# -- the works ----------------------------------------------------------------


def chars(text: str, steps: int | None = None, scratch: bool = False) -> Work:
    """nanoGPT's CPU setting (`config/train_shakespeare_char.py` with the values of its README): 4 layers of 128,
    blocks of 64 characters, batches of 12, 2,000 steps, without dropout.

    scratch: sparse while it learns, and not afterwards. steps: of the run that makes it sparse, instead of 600 (2,000
    from scratch).
    """
    characters = _characters(text)
    whole = Schedule(2000, 1e-3, 100)
    return Work(
        "scratch" if scratch else "chars",
        characters,
        partial(_gpt, characters.vocabulary, 64, 4, 128, 4, 0.0),
        None if scratch else whole,
        Schedule(steps or 2000, 1e-3, 100) if scratch else Schedule(steps or 600, 1e-3, 20),
        rows=12,
        block=64,
        evaluated=10**9,
    )


def nanogpt(text: str, steps: int | None = None) -> Work:
    """nanoGPT's `config/train_shakespeare_char.py` for a GPU: 6 layers of 384, blocks of 256 characters, batches of
    64, dropout of 0.2. The dense model learns for 2,000 of its 5,000 steps: nanoGPT keeps the best of its evaluations,
    and afterwards the model learns by heart.

    steps: of the run that makes it sparse, instead of 600.
    """
    characters = _characters(text)
    return Work(
        "nanogpt",
        characters,
        partial(_gpt, characters.vocabulary, 256, 6, 384, 6, 0.2),
        Schedule(2000, 1e-3, 100),
        Schedule(steps or 600, 1e-3, 20),
        rows=64,
        block=256,
        evaluated=10**9,
    )


def _characters(text: str) -> Text:
    parts = _read(text)
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(parts))))}
    tokens = [torch.tensor([alphabet[c] for c in part]) for part in parts]
    return Text(*tokens, len(alphabet), f"{Path(text).name}, {sum(map(len, parts)):,} characters{HELD_OUT}")


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
            activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one pass
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def lm(model: str, text: str, steps: int | None = None, block: int = 1024) -> Work:
    """Any causal language model of a hub or a directory, fine-tuned by one block of `block` tokens a step (100 steps,
    learning rate 1e-4).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lp_dist.data.gguf import dequantised

    path = dequantised(model) if model.endswith(".gguf") else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = [
        torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in _read(text)
    ]
    if any(len(part) <= block for part in tokens):
        raise UsageError(
            f"--text {text} has {len(tokens[0]):,} tokens to train on and {len(tokens[1]):,} to evaluate; both must be"
            f" more than a block of {block}: give more text, or lower --block"
        )

    def build(seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_cache=False)

    described = f"{Path(text).name}, {sum(map(len, tokens)):,} tokens of {Path(model).stem}{HELD_OUT}"
    return Work(
        "lm",
        Text(*tokens, len(tokenizer), described),
        build,
        None,
        Schedule(steps or 100, 1e-4, 5),
        rows=1,
        block=block,
        evaluated=16,
        betas=(0.9, 0.999),
    )


def _read(text: str) -> tuple[str, str]:
    """The text to train on, and what is held out: its last tenth."""
    parts = load_text(text, None, "train", "text", None, 0.1, 0)
    whole = "".join(parts["train"]["text"]) + "".join(parts["eval"]["text"])
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


# -- where dense models are kept ----------------------------------------------


def cached(key: Any, make: Callable[[], Any]) -> Any:
    """What `make` makes, by torch.save in the user's cache, under the JSON of `key`."""
    folder = (
        Path(
            os.environ.get("LP_DIST_CACHE")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lp_dist"
        )
        / "quality"
    )
    path = folder / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20] + ".pt")
    if path.exists():
        return torch.load(path, weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    made = make()
    scratch = path.with_suffix(f".{os.getpid()}")
    torch.save(made, scratch)
    os.replace(scratch, path)  # whole, or not at all; of two processes that make it the last one stays
    return made
