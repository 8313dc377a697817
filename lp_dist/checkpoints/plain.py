"""Directories that `from_pretrained` reads: safetensors, or torch's pickled files, sharded or not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from lp_dist.checkpoints.entries import Checkpoint, Entry, check_numbered, read_json, unwrapped
from lp_dist.checkpoints.files import Pickled, safetensors
from lp_dist.errors import UsageError

_WHOLE = ("model.safetensors", "pytorch_model.bin")  # in from_pretrained's order, each before its index
_NO_MODEL = re.compile(r"adapter_|compact(-\d+-of-\d+)?\.safetensors$")
_ACCELERATE = "pytorch_model_fsdp.bin"  # what Accelerate writes of FSDP, and Trainer under it


def find(path: Path) -> Checkpoint | None:
    """The model in this directory; None if there is none."""
    _refuse_quantized(path)
    for whole in _WHOLE:
        if (path / whole).is_file():
            return _read(path, [whole])
        if (path / f"{whole}.index.json").is_file():
            return _indexed(path, f"{whole}.index.json")
    others = sorted(file.name for file in path.glob("*.safetensors") if not _NO_MODEL.match(file.name))
    if others:
        check_numbered(path, others)
        return _read(path, others)
    return _read(path, [_ACCELERATE]) if (path / _ACCELERATE).is_file() else None


def _indexed(path: Path, index: str) -> Checkpoint | None:
    names = read_json(path / index)["weight_map"]
    files = sorted(set(names.values()))
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise UsageError(
            f"{path / index} names {missing[0]}, which is not there ({len(missing)} of {len(files)} files are"
            " missing); copy or download the checkpoint anew"
        )
    return _read(path, files, names)


def _read(path: Path, files: list[str], names: Iterable[str] = ()) -> Checkpoint | None:
    """names: what an index says that the files hold."""
    entries: dict[str, Entry] = {}
    for file in files:
        entries.update(_safetensors(path / file) if file.endswith(".safetensors") else _pickle(path / file))
    absent = sorted({unwrapped(name) for name in names} - entries.keys())
    if absent:
        raise UsageError(
            f"none of the {len(files)} files in {path} holds {absent[0]}, which their index names; copy or download"
            " the checkpoint anew"
        )
    if not entries or any(entry.shape == (0,) for entry in entries.values()):
        return None  # ZeRO-3 without the gathering of weights leaves names alone, or the small ones of its tensors
    return Checkpoint(
        path,
        "safetensors" if files[0].endswith(".safetensors") else "torch's pickled weights",
        entries,
        live=_ACCELERATE in files,
    )


def _safetensors(file: Path) -> dict[str, Entry]:
    return {
        unwrapped(name): Entry(place.shape, place.dtype, place.read) for name, place in safetensors(file)[0].items()
    }


def _pickle(file: Path) -> dict[str, Entry]:
    pickled = Pickled(file, trusted=False)
    tensors = pickled.content.items()
    return {
        unwrapped(name): Entry(tuple(tensor.shape), tensor.dtype, partial(pickled.read, tensor))
        for name, tensor in tensors
    }


def _refuse_quantized(path: Path) -> None:
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    # compressed-tensors writes the last two; "dense" is a format in which tensors are what they are without it.
    found = [config.get(key) for key in ("quantization_config", "compression_config", "sparsity_config")]
    found = [part for part in found if part and part.get("format") != "dense"]
    if found:
        method = found[0].get("quant_method") or found[0].get("format") or "by a method of no name"
        raise UsageError(
            f"{path} is quantized or compressed ({method}), so its tensors are no weights to count or convert; undo"
            " that first, with from_pretrained(...).dequantize() for instance"
        )
