"""The compact form, for storage and transfer: of each tensor with many zeros a bit for every weight, and the weights
that are not zero.

Safetensors files in which `NAME` became `NAME.bitmask` (uint8, eight weights to a byte, the first in the highest bit)
and `NAME.values` (its dtype, in their order); the shapes of all are in a file's metadata, in the order of the
checkpoint. A weight of -0.0 counts as a value, so every tensor comes back bit for bit. `lp-dist export` reads it.
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
from lp_dist.checkpoints.files import Place, safetensors

KEY = "lp_dist.compact"  # of the metadata
_NAME = re.compile(r"compact(-\d+-of-\d+)?\.safetensors")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bitmask and values of a tensor; None where they are not smaller than it."""
    bits = tensor.contiguous().view(-1).view(_BITS[tensor.dtype.itemsize]).numpy()
    mask = bits != 0
    if math.ceil(len(bits) / 8) + np.count_nonzero(mask) * tensor.dtype.itemsize >= tensor.nbytes:
        return None
    # By numpy: torch would make an index of eight bytes for every weight.
    return torch.from_numpy(np.packbits(mask)), torch.from_numpy(bits[mask]).view(tensor.dtype)


def unpack(bitmask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `pack` took apart, bit for bit."""
    mask = np.unpackbits(bitmask.numpy(), count=math.prod(shape)).view(bool)
    bits = torch.zeros(len(mask), dtype=_BITS[values.dtype.itemsize])
    bits.numpy()[mask] = values.view(bits.dtype).numpy()
    return bits.view(values.dtype).view(shape)


def find(path: Path) -> Checkpoint | None:
    """The model in compact form in this directory; None if there is none."""
    files = [file for file in sorted(path.glob("compact*.safetensors")) if _NAME.fullmatch(file.name)]
    check_numbered(path, [file.name for file in files])
    entries = {name: entry for file in files for name, entry in _entries(file).items()}
    return (
        Checkpoint(path, "compact form", entries, stored=sum(file.stat().st_size for file in files))
        if entries
        else None
    )


def _entries(file: Path) -> dict[str, Entry]:
    places, metadata = safetensors(file)
    entries = {}
    for name, shape in json.loads(metadata.get(KEY, "{}")).items():
        if name in places:
            entries[name] = Entry(tuple(shape), places[name].dtype, places[name].read)
        else:
            bitmask, values = places[f"{name}.bitmask"], places[f"{name}.values"]
            entries[name] = Entry(tuple(shape), values.dtype, partial(_unpacked, bitmask, values, tuple(shape)))
    return entries


def _unpacked(bitmask: Place, values: Place, shape: tuple[int, ...]) -> Tensor:
    return unpack(bitmask.read(), values.read(), shape)
