"""The zeros of a model's parameters, counted in its files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress

from torch import nn

from lp_dist.checkpoints.hf_names import Conversion, meta_model, name_map
from lp_dist.checkpoints.opening import Checkpoint, open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.optim.batching import count_zeros
from lp_dist.sparsity.census import ZeroCount
from lp_dist.sparsity.measure import Sparsity


def count_saved(
    directory: str | os.PathLike,
    names: Iterable[str],
    *,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Sparsity:
    """Counts the exact zeros of parameters in the files of a saved model, by whatever names and in whatever form they
    are saved. A few tensors are in memory at a time.

    Args:
        directory: of the files.
        names: of the parameters in memory that are counted, as of `named_parameters()`. A parameter that is many
            tensors in the files, such as the experts of a layer, has the sum of their counts.
        model: of the same class and sizes, not sharded, on any device; None: it is made of the config.json beside the
            files, on the meta device.
        trust_remote_code: run code that comes with the model.
    Raises:
        UsageError: a parameter is not in the files, or not completely; or the files can't be read.
    """
    checkpoint = open_checkpoint(directory)
    config = checkpoint.directory_of("config.json")
    if model is None and config is not None:
        # What has no class in transformers is saved as it is in memory.
        with suppress(UsageError):
            model = meta_model(config, trust_remote_code)
    saved = name_map(
        model,
        {name: entry.shape for name, entry in checkpoint.entries.items()},
        runtime_names=checkpoint.runtime_names,
    )
    requested = list(dict.fromkeys(names))
    missing = sorted(name for name in requested if name not in saved.by_param)
    if missing:
        raise UsageError(
            f"{len(missing)} parameters are not in the files of {directory}, or not completely, such as"
            f" {missing[0]!r}; name a directory that save_pretrained wrote, with all of its files"
        )
    counts: dict[str, ZeroCount] = {}
    for name in requested:
        if name not in counts:
            counts |= _count_conversion(saved.by_param[name], checkpoint)
    return Sparsity({name: counts[name] for name in requested})


def _count_conversion(conversion: Conversion, checkpoint: Checkpoint) -> dict[str, ZeroCount]:
    """{runtime name: its zeros and elements}."""
    if conversion.is_of_one_param:
        # Whatever order the weights have in the files, one tensor after the other will do.
        zeros = sum(int(count_zeros(checkpoint.entries[name].read())) for name in conversion.hf_shapes)
        return {name: ZeroCount(zeros, math.prod(shape)) for name, shape in conversion.shapes.items()}
    tensors = conversion.to_memory({name: checkpoint.entries[name].read() for name in conversion.hf_shapes})
    return {name: ZeroCount(int(count_zeros(tensor)), tensor.numel()) for name, tensor in tensors.items()}
