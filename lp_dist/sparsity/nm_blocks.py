"""N:M blocks on shards: which parameters have them, which blocks lie on several ranks, and what a target looks at of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from torch import Tensor

from lp_dist.optim import nm
from lp_dist.optim.nm import Straddling
from lp_dist.sharding.shards import Shard
from lp_dist.sparsity.quantiles import Part, stride_of


def parts(
    scoped: list[tuple[str, Shard]],
    values_of: Callable[[Shard], dict[str, Any]],
    pattern: str,
    divided: Straddling | None,
    whole: bool,
    elements: dict[str, int] | None = None,
) -> list[Part]:
    """What a target looks at, in which the x of what is spared is inf. Collective where blocks lie on several ranks.

    Args:
        scoped: scopes and shards, the same ones on every rank. divided: these blocks. whole: all that lies here, also
            what another rank counts.
        elements: of each scope, for samples of it (`stride_of`) by whole blocks, the same ones however the parameters
            are sharded.
    """
    n, m = nm.parse(pattern)
    found: list[Part] = []
    ends: list[tuple[str, Shard, int, int, int]] = []  # scope, shard, stride, where in what lies here, how much
    for scope, shard in scoped:
        stride = stride_of(shard, elements[scope], m) if elements is not None else 1
        head, middle = nm.spans(shard.start, shard.length, m)
        found.append(
            Part.of(
                scope, shard, values_of(shard), take=_blocks(shard, head, middle, m, whole, stride), pattern=(n, m)
            )
        )
        ends += [
            (scope, shard, stride, at, length)
            for at, length in ((0, head), (head + middle, shard.length - head - middle))
            if length
        ]
    if divided is None:
        return found
    mine = []
    for scope, shard, _, at, length in ends:
        ((_, _, x),) = Part.of(scope, shard, values_of(shard), take=_range(at, length)).x()
        mine.append((shard.name, shard.start + at, nm.keys_of(x)))
    for (scope, shard, stride, at, length), marks in zip(
        ends, divided.spared({shard.name: (n, m) for _, shard in scoped}, mine)
    ):
        if (shard.start + at) // m % stride:  # an end lies in one block, which is not of the sample
            continue
        for spared, some in groupby(range(length), marks.__getitem__):
            here = list(some)
            found.append(
                Part.of(
                    scope,
                    shard,
                    values_of(shard),
                    take=_range(at + here[0], len(here)),
                    pattern=(1, 1) if spared else None,
                )
            )
    return found


def _range(at: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(-1)[at : at + length]


def _blocks(shard: Shard, head: int, middle: int, m: int, whole: bool, stride: int) -> Callable[[Tensor], Tensor]:
    """Of what lies here, every so many of the whole blocks; of a piece that several ranks hold, each takes an equal
    part unless it is `whole`.
    """
    blocks = middle // m
    first, last = (
        (0, blocks)
        if whole
        else (blocks * shard.replica // shard.replicas, blocks * (shard.replica + 1) // shard.replicas)
    )
    begins = (shard.start + head) // m + first

    def take(tensor: Tensor) -> Tensor:
        mine = tensor.reshape(-1)[head + first * m : head + last * m]
        return mine if stride == 1 else mine.view(-1, m)[-begins % stride :: stride].reshape(-1)

    return take
