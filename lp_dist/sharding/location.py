"""Where a parameter lies in a tensor that the optimizer steps: what the locator of every engine returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lp_dist.optim.region import Region


class ShardLocation(NamedTuple):
    """Where one parameter lies in what this rank's optimizer steps.

    Args:
        start: the first element of the shard in `region`, taken flat.
        tensor: what the optimizer steps: a flat fp32 shard of many parameters, an fp32 master copy, a DTensor, or the
            parameter itself.
        offset: the first element of the shard in the local part of `tensor`, taken flat.
        length: elements of the shard without padding; 0 if this rank has none.
        group: index of the param group.
        replica: the number of this copy among the ranks that hold the same shard; None: not known without an exchange.
            As many as `replicas`: other ranks count all of it.
        replicas: how many ranks hold the same shard.
        region: of the parameter, of which the shard is a contiguous range; None: the parameter itself.
    """

    start: int
    tensor: Tensor
    offset: int
    length: int
    group: int
    replica: int | None = 0
    replicas: int = 1
    region: Region | None = None


# Takes a parameter of the model; None where the optimizer does not step it.
Locator = Callable[[Tensor], ShardLocation | None]
