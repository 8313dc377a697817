"""N:M blocks on shards: which parameters have them, and which blocks lie on several ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lp_dist.errors import UsageError
from lp_dist.optim import nm
from lp_dist.optim.nm import Straddling
from lp_dist.optim.parameter_map import Segment, SegmentMap
from lp_dist.sharding.collectives import everyones, largest
from lp_dist.sharding.engines import unwrap
from lp_dist.sharding.shards import Shard


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
        why = nm.misfit(shard.shape, shard.start, nm.parse(wanted)[1]) or _not_linear(owners[id(shard.param)])
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
        if shard.length and len(shard.shape) == 2 and (shard.start or 0) % nm.LARGEST_BLOCK
    ]
    starts: dict[str, list[int]] = {}
    for name, start in (place for places in everyones(mine) for place in places):
        starts.setdefault(name, []).append(start)
    book.straddling = Straddling(starts, names, largest) if starts else None
    return book
