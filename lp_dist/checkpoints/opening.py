"""Opens a checkpoint of any form: Hugging Face directories, DeepSpeed's and torch's distributed checkpoints, and our
bitmask form.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lp_dist.checkpoints import bitmask, distributed, plain, zero
from lp_dist.checkpoints.entries import Checkpoint, Entry
from lp_dist.errors import UsageError, in_one_line

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]


def open_checkpoint(path: str | Path, *, masters: bool = False, trust_pickles: bool = False) -> Checkpoint:
    """Finds out what form the checkpoint at `path` has, and reads its index. No weight is read yet.

    Args:
        path: the directory of a Hugging Face model; of a Trainer's checkpoint; of a DeepSpeed checkpoint, ZeRO 0 to 3
            or universal, with its tags or of one tag; of `torch.distributed.checkpoint`; or of the bitmask form.
        masters: take the fp32 master weights of an engine's checkpoint, and nothing else, where the directory holds a
            model's own weights as well. Trainer writes both under DeepSpeed.
        trust_pickles: let the checkpoint's pickles run the code that they name. Without it no code of a file runs.
    Raises:
        UsageError: it is none of these, not complete, damaged, or of a kind that can't be read (tensor parallel,
            quantized, an adapter alone); or it names code, and is not trusted.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            f"{path} is no directory; name that of a checkpoint"
            if path.exists()
            else (
                f"there is no {path}; name the directory of a checkpoint, and download what is on the hub first:"
                " hf download ID"
            )
        )
    with in_one_line(
        f"{path} is damaged, or of a form that lp_dist does not know: reading its index ended with",
        "copy or download it anew",
    ):
        checkpoint = _found(path, masters, trust_pickles)
    if checkpoint is not None:
        unprintable = next((name for name in checkpoint.entries if not name.isprintable()), None)
        if unprintable is not None:  # a terminal would take it for a command
            raise UsageError(
                f"{path} holds a tensor called {unprintable!r}, as no model does; copy or download it anew"
            )
        entries = {
            name: replace(entry, read=partial(_read, path, name, entry)) for name, entry in checkpoint.entries.items()
        }
        return replace(checkpoint, entries=entries)
    raise UsageError(_why_none(path, masters))


def _found(path: Path, masters: bool, trust_pickles: bool) -> Checkpoint | None:
    if not masters and (checkpoint := bitmask.find(path)) is not None:
        return checkpoint
    finders = [zero.find, distributed.find] if masters else [plain.find, zero.find, distributed.find]
    for find in finders:
        if (checkpoint := find(path, trust_pickles)) is not None:
            return checkpoint
    return None


def _read(path: Path, name: str, entry: Entry) -> Tensor:
    with in_one_line(f"{name} in {path} is damaged: reading it ended with", "copy or download the checkpoint anew"):
        tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise UsageError(
            f"{name} in {path} is damaged: {tuple(tensor.shape)} of {tensor.dtype}, and the index says"
            f" {entry.shape} of {entry.dtype}; copy or download the checkpoint anew"
        )
    return tensor


def _why_none(path: Path, masters: bool) -> str:
    steps = sorted(path.glob("checkpoint-*"), key=lambda step: (len(step.name), step.name))
    hint = f"; it holds checkpoints of a run, of which {steps[-1]} is the last" if steps else ""
    if masters:
        return (
            f"{path} holds no checkpoint of an engine, which --masters asks for; leave it out, or name the directory"
            f" of one{hint}"
        )
    if (path / "adapter_config.json").exists():
        return f"{path} holds an adapter and no model; merge it into its base first: lp-dist merge BASE {path} OUT"
    return (
        f"{path} holds no weights that lp_dist knows: no *.safetensors or pytorch_model*.bin (or, as ZeRO-3 that does"
        " not gather leaves them, with empty tensors), DeepSpeed checkpoint (latest, *_states.pt) or"
        f" torch.distributed.checkpoint (.metadata){hint or '; name the directory of one, or copy it anew'}"
    )
