"""GGUF files as plain Hugging Face directories."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lp_dist.errors import UsageError
from lp_dist.optim.cache import cache_directory
from lp_dist.sharding.deepspeed import zero_init_disabled

logger = logging.getLogger(__name__)


def dequantised(gguf: str) -> Path:
    """Converts a GGUF file to a plain Hugging Face directory, once, and keeps it in the user's cache.

    The first process of each node calls it before the model is loaded. Inside the engine's own loading ZeRO-3 would
    partition the weights.

    Args:
        gguf: path of the file.
    Returns:
        The directory: fp32 weights, configuration and tokenizer.
    Raises:
        UsageError: there is no such file.
    """
    source = Path(gguf).expanduser().resolve()
    if not source.is_file():
        raise UsageError(f"{gguf} is not a file; give the path of a .gguf file")
    key = hashlib.sha256(f"{source} {source.stat().st_size} {source.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    cache = cache_directory("gguf")
    target = cache / f"{source.stem}-{key}"
    if target.exists():
        return target
    logger.info("converting %s to fp32 weights", source.name)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch, _with_version():
        partial = Path(scratch) / "model"
        with zero_init_disabled():
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            # The weights are plain from here on, but the configuration still says that they are quantised, and
            # save_pretrained would refuse them.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            # Another run that converted the same file may have been faster.
            if not target.exists():
                raise
    return target


@contextlib.contextmanager
def _with_version() -> Iterator[None]:
    """The package gguf has the `__version__` that it lacks, while this is open.

    On Python 3.10, transformers 5.12 can't find which distribution the package is of, asks for this attribute instead,
    and fails at a version "N/A".
    """
    try:
        package = importlib.import_module("gguf")
    except ImportError:
        # transformers says what is to be installed.
        yield
        return
    if hasattr(package, "__version__"):
        yield
        return
    package.__version__ = importlib.metadata.version("gguf")
    try:
        yield
    finally:
        del package.__version__
