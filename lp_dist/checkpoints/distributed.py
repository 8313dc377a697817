"""Checkpoints of torch.distributed.checkpoint, as FSDP2 writes them, of any number of ranks.

The format is torch's (`torch/distributed/checkpoint/metadata.py` and `filesystem.py`): `.metadata` is a pickled index
of tensors and of the byte ranges of the ranks' `*.distcp` files that hold them. torch itself reads it here.
"""

from __future__ import annotations

import pickle
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lp_dist.checkpoints.entries import Checkpoint, Entry, unwrapped
from lp_dist.errors import UsageError

# Accelerate's folder of the model's weights, in its own checkpoints and in Trainer's.
_ACCELERATE = "pytorch_model_fsdp_0"
# What scripts call the optimizer that they save beside the model, in one checkpoint of both.
_OPTIMIZER = re.compile(r"(^|\.)optim\w*\.")


def find(path: Path) -> Checkpoint | None:
    """The distributed checkpoint in this directory; None if there is none.

    Raises:
        UsageError: it is not complete, or holds no weights of a model.
    """
    directory = next((folder for folder in (path, path / _ACCELERATE) if (folder / ".metadata").is_file()), None)
    if directory is None:
        return None
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = _Reader(directory)
    try:
        index = reader.read_metadata()
    except (pickle.UnpicklingError, EOFError) as error:
        raise UsageError(
            f"{directory / '.metadata'} is not complete ({error or type(error).__name__}); copy the checkpoint anew"
        ) from None
    _check_files(directory, index.storage_data)
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


class _Reader(dcp.FileSystemReader):
    """Reads the index once, and not for every tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_index"):
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


def _tensor(reader: _Reader, key: str, metadata: Any) -> Tensor:
    state = {key: torch.empty(metadata.size, dtype=metadata.properties.dtype)}
    with warnings.catch_warnings():
        # One process reads the checkpoint, on purpose.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state[key]
