"""The bitmask form, for storage and transfer: a bit for every weight, and the weights that are not zero.

The format is our own, in safetensors files. A tensor with many zeros is stored as `NAME.bitmask` (uint8, eight weights
to a byte, the first in the highest bit, as numpy's packbits) and `NAME.values` (its dtype, in the order of the
weights). Other tensors are stored as they are. The entry `lp_dist.bitmask` of a file's metadata is a JSON object
{name: shape} of all its tensors, in the order of the checkpoint. A weight of -0.0 counts as a value, so every tensor
comes back bit for bit. `lp-dist export --bitmask` writes this form, and `lp-dist export` reads it.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lp_dist.checkpoints.entries import Checkpoint, Entry, check_numbered
from lp_dist.checkpoints.files import TensorLocation, safetensors
from lp_dist.errors import UsageError

FORM = "bitmask form"
METADATA_KEY = "lp_dist.bitmask"
_FILE_NAME = re.compile(r"bitmask(-\d+-of-\d+)?\.safetensors")
_ANEW = "copy it anew, or export the model again"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bitmask and values of a tensor.

    Args:
        tensor: any shape and dtype, on the CPU.
    Returns:
        (ceil(elements / 8),) uint8, and (elements that are not zero,) in the tensor's dtype; None where they are not
        smaller than the tensor.
    """
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.dtype.itemsize]).numpy()
    mask = bits != 0
    if math.ceil(len(bits) / 8) + np.count_nonzero(mask) * tensor.dtype.itemsize >= tensor.nbytes:
        return None
    # By numpy: torch would make an index of eight bytes for every weight.
    return torch.from_numpy(np.packbits(mask)), torch.from_numpy(bits[mask]).view(tensor.dtype)


def unpack(bitmask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this shape that `pack` was given, bit for bit.

    Raises:
        ValueError: the bitmask has more or fewer ones than there are values.
    """
    mask = np.unpackbits(bitmask.numpy(), count=math.prod(shape)).view(bool)
    if np.count_nonzero(mask) != values.numel():
        raise ValueError(f"a bitmask has {np.count_nonzero(mask):,} ones, and {values.numel():,} values are there")
    bits = torch.zeros(len(mask), dtype=_INTEGERS[values.dtype.itemsize])
    bits.numpy()[mask] = values.view(bits.dtype).numpy()
    return bits.view(values.dtype).view(shape)


def find(path: Path) -> Checkpoint | None:
    """The model in bitmask form in this directory; None if there is none."""
    files = [file for file in sorted(path.glob("bitmask*.safetensors")) if _FILE_NAME.fullmatch(file.name)]
    check_numbered(path, [file.name for file in files])
    entries = {name: entry for file in files for name, entry in _entries(file).items()}
    if not entries:
        return None
    return Checkpoint(path, FORM, entries, bytes_on_disk=sum(file.stat().st_size for file in files))


def _entries(file: Path) -> dict[str, Entry]:
    locations, metadata = safetensors(file)
    entries = {}
    for name, shape in json.loads(metadata.get(METADATA_KEY, "{}")).items():
        numel = math.prod(shape)
        if name in locations:
            is_right = tuple(shape) == locations[name].shape
            entries[name] = Entry(tuple(shape), locations[name].dtype, locations[name].read)
        else:
            bitmask, values = locations[f"{name}.bitmask"], locations[f"{name}.values"]
            is_right = bitmask.shape == (math.ceil(numel / 8),) and len(values.shape) == 1
            entries[name] = Entry(tuple(shape), values.dtype, partial(_read, bitmask, values, tuple(shape)))
        if min(shape, default=0) < 0 or not is_right:
            raise UsageError(f"{file} holds another number of weights of {name} than its shape {shape} has; {_ANEW}")
    return entries


def _read(bitmask: TensorLocation, values: TensorLocation, shape: tuple[int, ...]) -> Tensor:
    try:
        return unpack(bitmask.read(), values.read(), shape)
    except ValueError as error:
        raise UsageError(f"{bitmask.file} is damaged: {error}; {_ANEW}") from None
