"""Checkpoints of torch.distributed.checkpoint, as FSDP2 writes them, of any number of ranks."""

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

_ACCELERATE = "pytorch_model_fsdp_0"  # Accelerate's folder of the model's weights, in its and Trainer's checkpoints
_OPTIMIZER = re.compile(r"(^|\.)optim\w*\.")  # what scripts call it beside the model, in one checkpoint of both


def find(path: Path) -> Checkpoint | None:
    """The distributed checkpoint in this directory; None if there is none."""
    places = [place for place in (path, path / _ACCELERATE) if (place / ".metadata").is_file()]
    if not places:
        return None
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = _Reader(places[0])
    try:
        index = reader.read_metadata()
    except (pickle.UnpicklingError, EOFError) as error:
        raise UsageError(
            f"{places[0] / '.metadata'} is not complete ({error or type(error).__name__}); copy the checkpoint anew"
        ) from None
    _check_files(places[0], index.storage_data)
    tensors = {
        key: saved for key, saved in index.state_dict_metadata.items() if isinstance(saved, TensorStorageMetadata)
    }
    entries = {
        unwrapped(key): Entry(tuple(saved.size), saved.properties.dtype, partial(_tensor, reader, key, saved))
        for key, saved in tensors.items()
        if not _OPTIMIZER.search(key)
    }
    if not entries:
        raise UsageError(
            f"{places[0]} holds no weights of a model, only {len(tensors)} tensors of an optimizer; name the directory"
            " of the model's checkpoint"
        )
    return Checkpoint(places[0], "torch.distributed.checkpoint", entries, live=True)


def _check_files(place: Path, stored: dict[Any, Any]) -> None:
    """torch finds out only when it reads the tensor."""
    ends: dict[str, int] = {}
    for piece in stored.values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        size = (place / name).stat().st_size if (place / name).is_file() else 0
        if size < end:
            raise UsageError(
                f"{place / name} has {size:,} of the {end:,} bytes that .metadata knows of; copy the checkpoint anew,"
                " from every node"
            )


class _Reader(dcp.FileSystemReader):
    """Reads the index once, and not for every tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_index"):
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


def _tensor(reader: _Reader, key: str, saved: Any) -> Tensor:
    wanted = {key: torch.empty(saved.size, dtype=saved.properties.dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled, unavailable or uninitialized"
        )  # as it is to be
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted[key]
