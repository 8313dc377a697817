"""The classes that the pickles of a checkpoint may name.

A pickle can name any function, which is called when the file is read (https://docs.python.org/3/library/pickle.html,
"Restricting Globals"). So what is not listed here is refused by its name, before anything is made. What is no tensor
and no number is made as an empty object: weights are all that lp_dist reads.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import torch

from lp_dist.errors import UsageError

# The way out in messages.
TRUST = "if you trust who wrote it, --trust-pickles, or `trust_pickles=True` in Python, lets it run"


class Unread:
    """Stands for an object that lp_dist makes no use of. Whatever it is made with is dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What DeepSpeed's engines write besides tensors and containers, and random states of numpy, which scripts save.
# torch.load has a list of its own for the rest (torch/_weights_only_unpickler.py).
OF_TORCH_FILES: dict[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    **dict.fromkeys(
        (
            "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
            "deepspeed.utils.tensor_fragment.fragment_address",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.ndarray",
            "numpy.dtype",
        ),
        Unread,
    ),
}

_OF_DCP = "torch.distributed.checkpoint."
# What torch.distributed.checkpoint writes into `.metadata`.
_OF_INDEX = {
    f"{_OF_DCP}filesystem._StorageInfo",
    *(
        f"{_OF_DCP}metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.serialization._get_layout",
}
_PLAIN = {
    "collections.OrderedDict": collections.OrderedDict,
    "pathlib.PosixPath": PurePosixPath,
    "pathlib.WindowsPath": PureWindowsPath,
    "pathlib._local.PosixPath": PurePosixPath,  # of Python 3.13
    "pathlib._local.WindowsPath": PureWindowsPath,
    "torch.Size": torch.Size,
}


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], file: Path) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _PLAIN:
            return _PLAIN[full_name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full_name in _OF_INDEX:
            return super().find_class(module, name)
        raise UsageError(refusal(self.file, [full_name]))


def load_index(file: Path) -> Any:
    """What a `.metadata` of torch.distributed.checkpoint holds.

    Raises:
        UsageError: it names something else than that format has.
        pickle.UnpicklingError, EOFError, and whatever a broken pickle raises: it is not complete.
    """
    with file.open("rb") as stream:
        return _IndexUnpickler(stream, file).load()


def torch_file_globals() -> list[tuple[Any, str]]:
    """`OF_TORCH_FILES` as torch.serialization.safe_globals takes it."""
    return [(stand_in, name) for name, stand_in in OF_TORCH_FILES.items()]


def refusal(file: Path, names: list[str]) -> str:
    """Says that a file names classes that are not known, and what can be done."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{file} names {names[0]}{others}, whose code would run when the file is read, and which neither torch nor"
        f" DeepSpeed writes for weights; {TRUST}"
    )
