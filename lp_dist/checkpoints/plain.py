"""Directories that `from_pretrained` reads: safetensors, or torch's pickled files, sharded or not.

The file names, and the index `*.index.json` with its `weight_map`, are those of transformers' `save_pretrained`
(https://huggingface.co/docs/transformers/big_models, "Sharded checkpoints").
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from lp_dist.checkpoints.entries import Checkpoint, Entry, check_inside, check_numbered, read_json, unwrapped
from lp_dist.checkpoints.files import TorchFile, safetensors
from lp_dist.errors import UsageError

_UNSHARDED = ("model.safetensors", "pytorch_model.bin")  # in from_pretrained's order, each before its index
_NO_MODEL = re.compile(r"adapter_|bitmask(-\d+-of-\d+)?\.safetensors$")
_ACCELERATE = "pytorch_model_fsdp.bin"  # what Accelerate, and Trainer with it, writes under FSDP


def find(path: Path, trust_pickles: bool = False) -> Checkpoint | None:
    """The model in this directory; None if there is none.

    Raises:
        UsageError: it is not complete, or quantized, or names classes that are not known, unless it is trusted.
    """
    _refuse_quantized(path)
    for name in _UNSHARDED:
        if (path / name).is_file():
            return _read(path, [name], trust_pickles)
        if (path / f"{name}.index.json").is_file():
            return _indexed(path, f"{name}.index.json", trust_pickles)
    files = sorted(file.name for file in path.glob("*.safetensors") if not _NO_MODEL.match(file.name))
    if files:
        check_numbered(path, files)
        return _read(path, files, trust_pickles)
    return _read(path, [_ACCELERATE], trust_pickles) if (path / _ACCELERATE).is_file() else None


def _indexed(path: Path, index: str, trust_pickles: bool) -> Checkpoint | None:
    names = read_json(path / index)["weight_map"]
    files = sorted(set(names.values()))
    for file in files:
        check_inside(path / index, file)
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise UsageError(
            f"{path / index} names {missing[0]}, which is not there ({len(missing)} of {len(files)} files are"
            " missing); copy or download the checkpoint anew"
        )
    return _read(path, files, trust_pickles, names)


def _read(path: Path, files: list[str], trust_pickles: bool, names: Iterable[str] = ()) -> Checkpoint | None:
    """The model in these files. names: the tensors that an index lists."""
    entries: dict[str, Entry] = {}
    for file in files:
        is_safe = file.endswith(".safetensors")
        entries.update(_safetensors(path / file) if is_safe else _pickle(path / file, trust_pickles))
    absent = sorted({unwrapped(name) for name in names} - entries.keys())
    if absent:
        raise UsageError(
            f"none of the {len(files)} files in {path} holds {absent[0]}, which their index names; copy or download"
            " the checkpoint anew"
        )
    if not entries or any(entry.shape == (0,) for entry in entries.values()):
        # ZeRO-3 without the gathering of weights saves only names, or only small tensors.
        return None
    return Checkpoint(
        path,
        "safetensors" if files[0].endswith(".safetensors") else "torch's pickled weights",
        entries,
        runtime_names=_ACCELERATE in files,
    )


def _safetensors(file: Path) -> dict[str, Entry]:
    return {
        unwrapped(name): Entry(location.shape, location.dtype, location.read)
        for name, location in safetensors(file)[0].items()
    }


def _pickle(file: Path, trust_pickles: bool) -> dict[str, Entry]:
    torch_file = TorchFile(file, trust_pickles)
    tensors = torch_file.content.items()
    for name, tensor in tensors:
        torch_file.check_fits(name, tensor)
    return {
        unwrapped(name): Entry(tuple(tensor.shape), tensor.dtype, partial(torch_file.read, tensor))
        for name, tensor in tensors
    }


def _refuse_quantized(path: Path) -> None:
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    # compressed-tensors writes the last two. In its format "dense" tensors are as they are without it.
    sections = [config.get(key) for key in ("quantization_config", "compression_config", "sparsity_config")]
    sections = [section for section in sections if section and section.get("format") != "dense"]
    if sections:
        method = sections[0].get("quant_method") or sections[0].get("format") or "by an unnamed method"
        raise UsageError(
            f"{path} is quantized or compressed ({method}), so its tensors are no weights to count or convert; undo"
            " that first, with from_pretrained(...).dequantize() for instance"
        )
