"""A checkpoint of any form: names, shapes and dtypes are read at once, each tensor when it is needed."""

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

from lp_dist.errors import UsageError, first_line

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Args:
        shape: of the full tensor.
        dtype: as it is stored.
        read: reads the full tensor: on the CPU, in `dtype`, new and contiguous.
    """

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
        path: the directory of its weights.
        form: the kind of checkpoint, in words.
        entries: {name: tensor}, in the order of the files.
        runtime_names: whether names and tensors are those of the model in memory, as engines save them, or those that
            `from_pretrained` reads. transformers keeps some models' weights in another form in memory, such as all
            experts of a layer in one tensor.
        tied: {another name of a tensor: the name that has an entry}, as an engine stores them.
        bytes_on_disk: None: those of its tensors.
    """

    path: Path
    form: str
    entries: dict[str, Entry]
    runtime_names: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    bytes_on_disk: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return (
            sum(entry.nbytes for entry in self.entries.values()) if self.bytes_on_disk is None else self.bytes_on_disk
        )

    def directory_of(self, file: str) -> Path | None:
        """The directory that has `file` (config.json, ...): that of the weights, or one or two above an engine's
        checkpoint, where Trainer writes it. None: there is none.
        """
        parents = self.path.resolve().parents[:2] if self.runtime_names else ()
        return next((directory for directory in (self.path, *parents) if (directory / file).is_file()), None)


def unwrapped(name: str) -> str:
    """A parameter's name in the user's model, without what torch.compile and the wrappers of FSDP and activation
    checkpointing add to it.
    """
    return _WRAPPERS.sub("", name)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: it is no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no JSON ({first_line(error)}); copy or download it anew") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a {type(content).__name__} and no object of JSON; copy or download it anew")
    return content


def check_inside(index: Path, name: str) -> None:
    """Raises UsageError for a name in `index` that leads out of the directory of the checkpoint."""
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UsageError(
            f"{index} names {name!r}, which is no file within the checkpoint; don't use a checkpoint from whoever made"
            " this one"
        )


def check_numbered(path: Path, files: list[str]) -> None:
    """Checks that all files of a set that no index lists are there, by the numbers in their names.

    Raises:
        UsageError: some are missing.
    """
    for file in files:
        total = re.search(r"-of-(\d+)\.", file)
        if total and int(total[1]) != sum(total[0] in other for other in files):
            raise UsageError(
                f"{path} has {file}, but not all {int(total[1])} files of its set; copy or download the checkpoint"
                " anew"
            )
