"""Opens a checkpoint of any form: Hugging Face directories, DeepSpeed's and torch's distributed checkpoints, and our
bitmask form.
"""

from __future__ import annotations

from pathlib import Path

from lp_dist.checkpoints import bitmask, distributed, plain, zero
from lp_dist.checkpoints.entries import Checkpoint, Entry
from lp_dist.errors import UsageError

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]


def open_checkpoint(path: str | Path, *, masters: bool = False) -> Checkpoint:
    """Finds out what form the checkpoint at `path` has, and reads its index. No weight is read yet.

    Args:
        path: the directory of a Hugging Face model; of a Trainer's checkpoint; of a DeepSpeed checkpoint, ZeRO 0 to 3
            or universal, with its tags or of one tag; of `torch.distributed.checkpoint`; or of the bitmask form.
        masters: take the fp32 master weights of an engine's checkpoint, and nothing else, where the directory holds a
            model's own weights as well. Trainer writes both under DeepSpeed.
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
                f"there is no {path}; name the directory of a checkpoint, and download what is on the hub first:"
                " hf download ID"
            )
        )
    for find in (zero.find, distributed.find) if masters else (bitmask.find, plain.find, zero.find, distributed.find):
        checkpoint = find(path)
        if checkpoint is not None:
            return checkpoint
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
