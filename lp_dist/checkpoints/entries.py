"""What every form of checkpoint is read as: names, shapes and dtypes at once, each tensor when it is asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lp_dist.errors import UsageError

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Entry:
    """One tensor. read(): the whole of it, on the CPU, in `dtype`, new and contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Args:
        path: where its weights lie. form: what it is, in words.
        entries: by name, in the order in which they lie there.
        live: names and tensors are those of the model in memory, as an engine saves them, and not those of a published
            checkpoint. (transformers keeps some models' weights otherwise in memory, such as all experts of a layer in
            one tensor.)
        tied: names that an engine knows as other names of a tensor: {name: the one that has an entry}.
        stored: bytes of it on disk, where they are not those of its tensors.
    """

    path: Path
    form: str
    entries: dict[str, Entry]
    live: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values()) if self.stored is None else self.stored

    def directory_of(self, file: str) -> Path | None:
        """Where `file` (config.json, ...) lies: beside the weights, or above an engine's checkpoint, where Trainer
        writes it.
        """
        above = self.path.resolve().parents[:2] if self.live else ()
        return next((place for place in (self.path, *above) if (place / file).is_file()), None)


def unwrapped(name: str) -> str:
    """A parameter's name in the user's own model, without what torch.compile and the wrappers of FSDP and
    checkpointing put into it.
    """
    return _WRAPPERS.sub("", name)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is no JSON ({error}); copy or download it anew") from None


def check_numbered(path: Path, files: list[str]) -> None:
    """Files of a set that no index lists are all there, by the number in their names.

    Raises:
        UsageError: some are missing.
    """
    for file in files:
        wanted = re.search(r"-of-(\d+)\.", file)
        if wanted and int(wanted[1]) != sum(wanted[0] in other for other in files):
            raise UsageError(
                f"{path} has {file}, but not all {int(wanted[1])} files of its set; copy or download the checkpoint"
                " anew"
            )
