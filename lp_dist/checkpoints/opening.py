"""Weights on disk, read one tensor at a time: Hugging Face directories, DeepSpeed's and torch's distributed
checkpoints, and our compact form.
"""

from __future__ import annotations

from pathlib import Path

from lp_dist.checkpoints import bitmask, distributed, plain, zero
from lp_dist.checkpoints.entries import Checkpoint, Entry
from lp_dist.errors import UsageError

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]


def open_checkpoint(path: str | Path, *, masters: bool = False) -> Checkpoint:
    """Finds out what lies at `path`, and reads its index. No weight is read yet.

    Args:
        path: a directory: of a Hugging Face model; of a Trainer's checkpoint; of a DeepSpeed checkpoint, ZeRO 0 to 3,
            or a universal one, with its tags or of one tag; of `torch.distributed.checkpoint`; or of the compact form.
        masters: where a directory holds a model's own weights and an engine's checkpoint besides, as Trainer writes
            them under DeepSpeed: take the engine's fp32 master weights, and nothing else.
    Raises:
        UsageError: it is none of these, not complete, or of a kind that can't be read (tensor parallel, quantized, an
            adapter alone).
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            f"{path} is no directory; name that of a checkpoint"
            if path.exists()
            else (
                f"there is no {path}; name the directory of a "
                "checkpoint, and download what is on the hub first: hf download ID"
            )
        )
    for find in (zero.find, distributed.find) if masters else (bitmask.find, plain.find, zero.find, distributed.find):
        found = find(path)
        if found is not None:
            return found
    steps = sorted(path.glob("checkpoint-*"), key=lambda step: (len(step.name), step.name))
    hint = f"; it holds checkpoints of a run, of which {steps[-1]} is the last" if steps else ""
    if masters:
        raise UsageError(
            f"{path} holds no checkpoint of an engine, which --masters asks for; leave it out, or name the directory"
            f" of one{hint}"
        )
    if (path / "adapter_config.json").exists():
        raise UsageError(
            f"{path} holds an adapter and no model; merge it into its base first: lp-dist merge BASE {path} OUT"
        )
    raise UsageError(
        f"{path} holds no weights that lp_dist knows: no *.safetensors or pytorch_model*.bin (or, as ZeRO-3 that does"
        " not gather leaves them, with empty tensors), DeepSpeed checkpoint (latest, *_states.pt) or"
        f" torch.distributed.checkpoint (.metadata){hint}"
    )
