"""Checkpoints of torch.distributed.checkpoint, as FSDP2 writes them, of any number of ranks.

The format is torch's (`torch/distributed/checkpoint/metadata.py` and `filesystem.py`): `.metadata` is a pickled index
of tensors and of the byte ranges of the ranks' `*.distcp` files that hold them. torch itself reads it here.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lp_dist.checkpoints.allowed import TRUST, load_index
from lp_dist.checkpoints.entries import Checkpoint, Entry, check_inside, unwrapped
from lp_dist.checkpoints.files import TorchFile
from lp_dist.errors import UsageError, first_line

# Accelerate's folder of the model's weights, in its own checkpoints and in Trainer's.
_ACCELERATE = "pytorch_model_fsdp_0"
# What scripts call the optimizer that they save beside the model, in one checkpoint of both.
_OPTIMIZER = re.compile(r"(^|\.)optim\w*\.")


def find(path: Path, trust_pickles: bool = False) -> Checkpoint | None:
    """The distributed checkpoint in this directory; None if there is none.

    Raises:
        UsageError: it is not complete, holds no weights of a model, or its index names classes that are not known,
            unless it is trusted.
    """
    directory = next((folder for folder in (path, path / _ACCELERATE) if (folder / ".metadata").is_file()), None)
    if directory is None:
        return None
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = _Reader(directory, trust_pickles)
    index = _index(directory, reader.read_metadata)
    _check_sizes(directory, index)
    tensors = {
        key: metadata
        for key, metadata in index.state_dict_metadata.items()
        if isinstance(metadata, TensorStorageMetadata)
    }
    entries = {
        unwrapped(key): Entry(tuple(metadata.size), metadata.properties.dtype, partial(_tensor, reader, key, metadata))
        for key, metadata in tensors.items()
        if not _OPTIMIZER.search(key)
    }
    if not entries:
        raise UsageError(
            f"{directory} holds no weights of a model, only {len(tensors)} tensors of an optimizer; name the directory"
            " of the model's checkpoint"
        )
    return Checkpoint(directory, "torch.distributed.checkpoint", entries, runtime_names=True)


def check_pickles(directory: Path) -> None:
    """Checks what torch unpickles by itself when it loads the distributed checkpoint in this directory: the index,
    and whatever in the files is no tensor.

    Raises:
        UsageError: it is not complete, or names classes that are not known.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = _index(directory, lambda: load_index(directory / ".metadata"))
    for part, storage in index.storage_data.items():
        # Tensors are read by the list of torch's own.
        if isinstance(index.state_dict_metadata.get(part.fqn), TensorStorageMetadata):
            continue
        file = directory / storage.relative_path
        packed = ", ".join(map(str, getattr(storage, "transform_descriptors", None) or ()))
        if packed:
            raise UsageError(
                f"{file} holds {part.fqn} packed ({packed}), so it can't be checked before torch unpickles it; {TRUST}"
            )
        with file.open("rb") as stream:
            stream.seek(storage.offset)
            TorchFile(file, saved=stream.read(storage.length))


def _index(directory: Path, read: Callable[[], Any]) -> Any:
    """The index that `read` gives, of files that are inside of the directory and complete."""
    try:
        index = read()
    except (pickle.UnpicklingError, EOFError) as error:
        raise UsageError(
            f"{directory / '.metadata'} is not complete ({first_line(error)}); copy the checkpoint anew"
        ) from None
    for storage in index.storage_data.values():
        check_inside(directory / ".metadata", storage.relative_path)
    _check_files(directory, index.storage_data)
    return index


def _check_files(directory: Path, storage_data: dict[Any, Any]) -> None:
    """Raises UsageError where a file is too short, which torch finds out only when it reads the tensor."""
    ends: dict[str, int] = {}
    for storage in storage_data.values():
        ends[storage.relative_path] = max(ends.get(storage.relative_path, 0), storage.offset + storage.length)
    for name, end in sorted(ends.items()):
        size = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if size < end:
            raise UsageError(
                f"{directory / name} has {size:,} of the {end:,} bytes that .metadata knows of; copy the checkpoint"
                " anew, from every node"
            )


def _check_sizes(directory: Path, index: Any) -> None:
    """Raises UsageError where a tensor would be larger in memory than what the files hold of it."""
    stored: dict[str, float] = {}
    for part, storage in index.storage_data.items():
        is_packed = bool(getattr(storage, "transform_descriptors", None))
        stored[part.fqn] = stored.get(part.fqn, 0) + (math.inf if is_packed else storage.length)
    for key, metadata in index.state_dict_metadata.items():
        size = getattr(metadata, "size", None)
        if size is None:
            continue
        needed = math.prod(size) * metadata.properties.dtype.itemsize
        if min(size, default=0) < 0 or needed > stored.get(key, 0):
            raise UsageError(
                f"{directory / '.metadata'} gives {key} the shape {tuple(size)}, {needed:,} bytes, of which the files"
                f" hold {stored.get(key, 0):,}; copy the checkpoint anew"
            )


class _Reader(dcp.FileSystemReader):
    """Reads the index once, and not for every tensor; from it no other classes than torch writes there."""

    def __init__(self, directory: Path, trust_pickles: bool) -> None:
        super().__init__(directory)
        self._directory, self._trust_pickles = directory, trust_pickles

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_index"):
            if self._trust_pickles:
                self._index = super().read_metadata(*args, **kwargs)
            else:
                self._index = load_index(self._directory / ".metadata")
        return self._index


def _tensor(reader: _Reader, key: str, metadata: Any) -> Tensor:
    state = {key: torch.empty(metadata.size, dtype=metadata.properties.dtype)}
    with warnings.catch_warnings():
        # One process reads the checkpoint, on purpose.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.load(state, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException, around that of each rank
            raise next((cause for cause, _ in error.failures.values()), error) from None
    return state[key]
