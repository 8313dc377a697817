"""Files of safetensors and of torch.save, of which one tensor is read at a time, by plain reads.

safetensors (https://huggingface.co/docs/safetensors, "Format"): eight bytes with the length of a JSON header, the
header with dtype, shape and byte range of each tensor, then the tensors. torch.save (`torch/serialization.py`): a zip
file without compression, with a pickle and a record for each storage; the offset of a record's data follows from the
local file header of the zip format (PKWARE's APPNOTE, 4.3.7).

Both libraries would map the whole file, privately. That counts against limits of memory, and Linux refuses it for a
file larger than the machine's memory, as a rank's optimizer states of a large model can be.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lp_dist.checkpoints.allowed import refusal, torch_file_globals
from lp_dist.errors import UsageError, first_line

# No 8-bit floats: without the scales, which another tensor holds, they are no weights.
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
class TensorLocation:
    """Where a tensor lies in a file, row by row.

    Args:
        file: that holds it.
        offset: of its first byte.
        dtype: of its elements.
        shape: of the tensor.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            UsageError: the file ends within it.
        """
        count = math.prod(self.shape) * self.dtype.itemsize
        octets = np.fromfile(self.file, np.uint8, count, offset=self.offset)
        if len(octets) < count:
            raise UsageError(f"{self.file} ends within a tensor, changed meanwhile perhaps; copy it anew")
        return (
            torch.from_numpy(octets).view(self.dtype).view(self.shape)
            if count
            else torch.empty(self.shape, dtype=self.dtype)
        )


def safetensors(file: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """The index of a safetensors file.

    Returns:
        {name: location}, in the order of the file, and its metadata.
    Raises:
        UsageError: it is not complete, or has tensors of a dtype that is not supported.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if length < size else {}
        except ValueError:
            header = {}
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != end:
        raise UsageError(
            f"{file} is no complete safetensors file: it has {size:,} bytes, and its header describes {end:,}; copy or"
            " download it anew"
        )
    unknown = {tensor["dtype"] for tensor in header.values()} - _DTYPES.keys()
    if unknown:
        raise UsageError(
            f"{file} holds tensors of dtype {min(unknown)}, which lp_dist does not read; dequantise the model first"
        )
    for name, tensor in header.items():
        begin, stop = tensor["data_offsets"]
        needed = math.prod(tensor["shape"]) * _DTYPES[tensor["dtype"]].itemsize
        if begin < 0 or min(tensor["shape"], default=0) < 0 or stop - begin != needed:
            raise UsageError(
                f"{file} gives {name} the shape {tensor['shape']}, {needed:,} bytes, and {stop - begin:,} bytes of"
                " data; copy or download it anew"
            )
    in_file_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    locations = {
        name: TensorLocation(file, start + tensor["data_offsets"][0], _DTYPES[tensor["dtype"]], tuple(tensor["shape"]))
        for name, tensor in in_file_order
    }
    return locations, metadata


@cache
def _tells_offsets() -> bool:
    """Whether this torch tells where a tensor that it loads to the meta device lies in the file; 2.7 does not."""
    stream = BytesIO()
    torch.save(torch.zeros(1), stream)
    stream.seek(0)
    loaded = torch.load(stream, map_location="meta", weights_only=True)
    return getattr(loaded.untyped_storage(), "_checkpoint_offset", None) is not None


class TorchFile:
    """A file of torch.save.

    Attributes:
        content: the saved object, with tensors on the meta device; with a torch that does not tell where these lie in
            the file, with tensors that are mapped to it. `read` reads these, and slices of them.

    Args:
        file: its path.
        trusted: whether it may hold any objects. Their code is run.
        saved: what torch.save wrote, where that is a part of the file.
    Raises:
        UsageError: it is not complete, names classes beyond `lp_dist.checkpoints.allowed`, or, if it is trusted, needs
            modules that can't be imported.
    """

    def __init__(self, file: Path, trusted: bool = False, saved: bytes | None = None) -> None:
        self.file = file
        self._saved = saved
        if not zipfile.is_zipfile(self._source):
            raise UsageError(f"{file} is no complete file of torch.save (since torch 1.6); copy it anew")
        self._check_records()
        try:
            self.content: Any = self._trusted() if trusted else self._restricted()
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{file} can't be read ({first_line(error)}); copy it anew") from None

    @property
    def _source(self) -> Path | IO[bytes]:
        return self.file if self._saved is None else BytesIO(self._saved)

    @property
    def _without_reading(self) -> dict[str, Any]:
        """Arguments with which torch.load reads no tensor of a file."""
        if _tells_offsets():
            return {"map_location": "meta"}
        return {"map_location": "cpu", "mmap": self._saved is None}

    def _check_records(self) -> None:
        """Raises UsageError for records that would be larger in memory than in the file."""
        try:
            with zipfile.ZipFile(self._source) as archive:
                packed = [record for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
        except zipfile.BadZipFile as error:
            raise UsageError(f"{self.file} can't be read ({first_line(error)}); copy it anew") from None
        if packed:
            raise UsageError(
                f"{self.file} holds {packed[0].filename!r} compressed, which torch.save does not do, and it could be"
                " of any size in memory; save it anew by torch.save"
            )

    def _restricted(self) -> Any:
        with torch.serialization.safe_globals(torch_file_globals()):
            try:
                return torch.load(self._source, weights_only=True, **self._without_reading)
            except pickle.UnpicklingError:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(self._source)
                if names:
                    raise UsageError(refusal(self.file, sorted(names))) from None
                raise

    def _trusted(self) -> Any:
        try:
            return torch.load(self._source, weights_only=False, **self._without_reading)
        except (AttributeError, ImportError) as error:
            raise UsageError(
                f"{self.file} holds objects of DeepSpeed or of the training script ({first_line(error)}); run"
                " lp-dist where Python finds their code, such as by pip install '.[deepspeed]' in the project"
            ) from None

    def check_fits(self, name: str, tensor: Any) -> None:
        """Raises UsageError unless `tensor`, of `content` or a slice of it, is one that the file can hold."""
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"{self.file} holds {name} as a {type(tensor).__name__} and not as a tensor; save it anew as a plain"
                " tensor"
            )
        nbytes, size = tensor.untyped_storage().nbytes(), self.file.stat().st_size
        if max(nbytes, tensor.numel() * tensor.dtype.itemsize) > size:
            raise UsageError(
                f"{self.file} has {size:,} bytes, and gives {name} more: {tuple(tensor.shape)} of a storage of"
                f" {nbytes:,}; copy it anew"
            )

    def read(self, tensor: Tensor) -> Tensor:
        """Reads a tensor of `content`, or a slice of one.

        Raises:
            UsageError: torch does not tell where the tensor lies in the file.
        """
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if not tensor.is_meta:
            return tensor.clone(memory_format=torch.contiguous_format)
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        # torch computes the offset from how it writes files, without a look at this one.
        if self._records.get(start) != storage.nbytes():
            raise UsageError(
                f"torch {torch.__version__} does not tell where {self.file} has its tensors; take a newer torch (2.13"
                " does), and save the file anew if it was not torch.save that wrote it"
            )
        assert start is not None
        if tensor.is_contiguous():
            offset = start + tensor.storage_offset() * tensor.dtype.itemsize
            return TensorLocation(self.file, offset, tensor.dtype, tuple(tensor.shape)).read()
        length = storage.nbytes() // tensor.dtype.itemsize
        values = TensorLocation(self.file, start, tensor.dtype, (length,)).read()
        return values.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).contiguous()

    @cached_property
    def _records(self) -> dict[int | None, int]:
        """{offset of a record's data: its length}, of the records without compression."""
        records: dict[int | None, int] = {}
        with zipfile.ZipFile(self.file) as archive, self.file.open("rb") as stream:
            for record in (record for record in archive.infolist() if record.compress_type == zipfile.ZIP_STORED):
                stream.seek(record.header_offset + 26)
                records[record.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))] = record.file_size
        return records
