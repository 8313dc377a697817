"""GGUF files as plain Hugging Face directories."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed import zero_init_disabled

logger = logging.getLogger(__name__)


def dequantised(gguf: str) -> Path:
    """A GGUF file as a plain Hugging Face directory, made once and kept in the user's cache.

    Made on each node by its first process. Not inside the training's own loading, where ZeRO-3 would partition it.
    """
    source = Path(gguf).expanduser().resolve()
    if not source.is_file():
        raise UsageError(f"--model {gguf} is not a file")
    key = hashlib.sha256(f"{source} {source.stat().st_size} {source.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lp_dist" / "gguf"
    target = cache / f"{source.stem}-{key}"
    if target.exists():
        return target
    logger.info("dequantising %s", source.name)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as room:
        partial = Path(room) / "model"
        with zero_init_disabled():
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            # The weights are plain from here on, but the model object still says that it is quantised, and won't be
            # saved.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # else another run was faster
                raise
    return target
