"""N:M blocks on shards: which parameters have them, which blocks lie on several ranks, and what a target looks at of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from lp_dist import patterns
from lp_dist.engines import everyones, largest, unwrap
from lp_dist.errors import UsageError
from lp_dist.patterns import Straddling
from lp_dist.quantiles import Part, stride_of
from lp_dist.segments import Segment, SegmentMap
from lp_dist.shards import Shard


def refuse_misfits(
    model: Any,
    found: list[Shard],
    asked: list[dict[str, Any]],
    own: dict[str, dict[str, Any]],
    targeted: set[str],
    pattern: str | None,
) -> None:
    """Raises UsageError for a parameter that is to decay in blocks, and has none.

    Args:
        asked: values of each group. own: of single parameters. targeted: names of what may decay to a target with this
            `pattern`; none without one.
    """
    owners = {id(param): module for module in unwrap(model).modules() for param in module.parameters(recurse=False)}
    for shard in found:
        values = {**asked[shard.group], **own.get(shard.name, {})}
        decays = values["weight_decay"] > 0 or (
            shard.name in targeted and own.get(shard.name, {}).get("weight_decay") != 0.0
        )
        wanted = pattern or values.get("pattern")
        if not (decays and wanted):
            continue
        why = patterns.misfit(shard.shape, shard.start, patterns.parse(wanted)[1]) or _not_linear(
            owners[id(shard.param)]
        )
        if why is None and shard.is_on_disk:
            why = "it lies on the disk (NVMe offload)"
        elif why is None and not _local(shard.tensor).is_contiguous():
            why = "it does not lie in memory row by row"
        if why is not None:
            raise UsageError(
                f"{shard.name} can't have pattern={wanted!r}: {why}. Leave it out by an override, {{{shard.name!r}: "
                "{'weight_decay': 0.0}}"
            )


def _not_linear(owner: nn.Module) -> str | None:
    """Along which dimension the inputs lie is known of linear layers alone."""
    if isinstance(owner, (nn.Linear, nn.MultiheadAttention)) or "Linear" in type(owner).__name__:
        return None
    return (
        f"it is of a module of the kind {type(owner).__name__}, and blocks are those of the weight [outputs, inputs]"
        " of a linear layer"
    )


def _local(tensor: Tensor) -> Tensor:
    data = tensor.detach()
    return data.to_local() if hasattr(data, "to_local") else data


def segment_map(found: list[Shard]) -> SegmentMap:
    """Which parameter each part of a tensor belongs to, and which blocks lie on several ranks. One exchange, of where
    shards begin inside of one.
    """
    book = SegmentMap()
    tensors: dict[Tensor, list[Segment]] = {}
    names: dict[Tensor, list[str]] = {}
    for shard in found:
        tensors.setdefault(shard.tensor, []).append(
            Segment(shard.name, shard.offset, shard.length, shard.start, shard.shape)
        )
        names.setdefault(shard.tensor, []).append(shard.name)
    book.replace(tensors)
    mine = [
        (shard.name, shard.start)
        for shard in found
        if shard.length and len(shard.shape) == 2 and (shard.start or 0) % patterns.LARGEST_BLOCK
    ]
    starts: dict[str, list[int]] = {}
    for name, start in (place for places in everyones(mine) for place in places):
        starts.setdefault(name, []).append(start)
    book.straddling = Straddling(starts, names, largest) if starts else None
    return book


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
    n, m = patterns.parse(pattern)
    found: list[Part] = []
    ends: list[tuple[str, Shard, int, int, int]] = []  # scope, shard, stride, where in what lies here, how much
    for scope, shard in scoped:
        stride = stride_of(shard, elements[scope], m) if elements is not None else 1
        head, middle = patterns.spans(shard.start, shard.length, m)
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
        mine.append((shard.name, shard.start + at, patterns.keys_of(x)))
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
