"""Files of safetensors and of torch.save, of which one tensor is read at a time, by plain reads.

Both libraries would map the whole file, privately: that counts against limits of memory, and Linux refuses it for a
file larger than the machine's memory (as a rank's optimizer states of a large model can be).
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lp_dist.errors import UsageError

# No 8-bit floats: they are no weights without the scales that some other tensor holds.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file, row by row."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        count = math.prod(self.shape) * self.dtype.itemsize
        read = np.fromfile(self.file, np.uint8, count, offset=self.offset)
        if len(read) < count:
            raise UsageError(f"{self.file} ends within a tensor: was it changed meanwhile? Copy it anew")
        return (
            torch.from_numpy(read).view(self.dtype).view(self.shape)
            if count
            else torch.empty(self.shape, dtype=self.dtype)
        )


def safetensors(file: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Where its tensors lie, in their order in the file, and the file's metadata.

    Raises:
        UsageError: it is not complete, or has tensors of a dtype that is not known here.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length)) if length < size else {}
        except ValueError:
            header = {}
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != end:
        raise UsageError(
            f"{file} is no complete safetensors file: it has {size:,} bytes, and its header tells of {end:,}; copy or"
            " download it anew"
        )
    unknown = {tensor["dtype"] for tensor in header.values()} - _DTYPES.keys()
    if unknown:
        raise UsageError(
            f"{file} holds tensors of dtype {min(unknown)}, which lp_dist does not read; dequantise the model first"
        )
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Place(file, start + of["data_offsets"][0], _DTYPES[of["dtype"]], tuple(of["shape"]))
        for name, of in ordered
    }, metadata


class Pickled:
    """A file of torch.save. content: what was saved, with tensors on the meta device, which `read` reads, and slices
    of them.

    Args:
        trusted: it may hold any objects, whose code is run.
    Raises:
        UsageError: it is not complete, or needs modules that are not there.
    """

    def __init__(self, file: Path, trusted: bool) -> None:
        self.file = file
        if not zipfile.is_zipfile(file):
            raise UsageError(f"{file} is no complete file of torch.save (since torch 1.6); copy it anew")
        try:
            self.content: Any = torch.load(file, map_location="meta", weights_only=not trusted)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{file} can't be read ({str(error) or type(error).__name__}); copy it anew") from None
        except (AttributeError, ImportError) as error:
            raise UsageError(
                f"{file} holds objects of the training script ({error}); run lp-dist where Python finds its code"
            ) from None

    def read(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if self._records.get(start) != storage.nbytes():  # found by torch without looking, from how it writes files
            raise UsageError(
                f"torch {torch.__version__} does not tell where {self.file} has its tensors; take a newer torch (2.13"
                " does), and save the file anew if it was not torch.save that wrote it"
            )
        if tensor.is_contiguous():
            return Place(
                self.file, start + tensor.storage_offset() * tensor.dtype.itemsize, tensor.dtype, tuple(tensor.shape)
            ).read()
        whole = Place(self.file, start, tensor.dtype, (storage.nbytes() // tensor.dtype.itemsize,)).read()
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).contiguous()

    @cached_property
    def _records(self) -> dict[int, int]:
        """Where the file's records begin: {offset: length}."""
        found = {}
        with zipfile.ZipFile(self.file) as listed, self.file.open("rb") as opened:
            for record in (record for record in listed.infolist() if record.compress_type == zipfile.ZIP_STORED):
                opened.seek(record.header_offset + 26)
                found[record.header_offset + 30 + sum(struct.unpack("<HH", opened.read(4)))] = record.file_size
        return found
