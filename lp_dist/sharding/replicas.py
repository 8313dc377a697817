"""Which ranks hold the same range of a parameter, and that all ranges together are the parameter."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from lp_dist.errors import UsageError
from lp_dist.optim.region import Region
from lp_dist.sharding.collectives import (
    all_gather_numbers,
    all_gather_objects,
    all_reduce_max,
    all_reduce_sum,
    is_simulated,
    rank_and_world_size,
)

# Numbers that are exchanged at once, over all ranks: 8 MB.
_EXCHANGED = 1 << 20


class HeldRange(NamedTuple):
    """Which elements of a parameter this rank holds.

    Args:
        region: of the parameter.
        start: the first element in the region, taken flat.
        length: elements.
        axes: how they came to be there, for messages: the axes of a device mesh and what each does.
    """

    region: Region
    start: int
    length: int
    axes: str

    def __str__(self) -> str:
        if self.region.is_full:
            held = f"elements {self.start} to {self.start + self.length}" if self.length else "nothing"
        else:
            held = str(self.region)
            if self.length != self.region.sizes.numel():
                held += f", of that elements {self.start} to {self.start + self.length}"
        return f"{held} ({self.axes})"


class Replica(NamedTuple):
    """The number of a copy among the ranks that hold the same range, and how many these are."""

    number: int
    total: int


def count_replicas(ranges: dict[str, HeldRange]) -> dict[str, Replica]:
    """Which of the ranks that hold the same range of a parameter this one is. Collective: two small exchanges, the
    second of 8 bytes for each parameter and rank.

    It asks nothing of device meshes: what a rank holds, and which others hold the same, is all that counting needs.

    Args:
        ranges: by parameter name; the same names on every rank.
    Raises:
        UsageError: the ranks have different parameters.
    """
    if not ranges or not torch.distributed.is_initialized():
        return dict.fromkeys(ranges, Replica(0, 1))
    _check_names(list(ranges))
    rank, world_size = rank_and_world_size()
    keys = torch.tensor([_digest(f"{r.region.runs} {r.start} {r.length}") for r in ranges.values()])
    replicas: list[Replica] = []
    for part in keys.split(max(1, _EXCHANGED // world_size)):
        is_same = all_gather_numbers(part) == part
        before, count = is_same[:rank].sum(0), is_same.sum(0)
        replicas += [Replica(*pair) for pair in zip(before.tolist(), count.tolist())]
    return dict(zip(ranges, replicas))


def check_coverage(ranges: dict[str, HeldRange], replicas: dict[str, Replica]) -> None:
    """Checks that all ranks together hold each parameter once, but for copies. Collective: one reduction of two
    numbers a parameter.

    Compared are how many elements they are and the sum of their positions.

    Args:
        ranges: by parameter name; the same names on every rank.
        replicas: of these.
    Raises:
        UsageError: names the parameter, and what each rank holds of it.
    """
    sums = [
        (held.length, held.region.checksum(held.start, held.length)) if replicas[name].number == 0 else (0, 0)
        for name, held in ranges.items()
    ]
    totals = all_reduce_sum(torch.tensor(sums, dtype=torch.int64).view(-1, 2)).tolist()
    if is_simulated():
        return
    for (name, held), (elements, checksum) in zip(ranges.items(), totals):
        full = Region.full(held.region.shape)
        count = full.shape.numel()
        if elements != count or (checksum - full.checksum(0, count)) % Region.MODULUS:
            held_by = all_gather_objects(str(held))
            raise UsageError(
                f"the ranks hold {elements:,} elements of {name}, which has {count:,}, or not each of them once, so"
                f" that zeros can't be counted: {_listed(held_by)}. This way of sharding is not supported; with FSDP1"
                " set fsdp_version: 2"
            )


def check_replicas(sums: dict[str, int], replicas: dict[str, Replica], ranges: dict[str, HeldRange]) -> None:
    """Checks that ranks which are said to hold the same do so. Collective: one reduction of a number a parameter.

    Parameters that an engine or a script has cut by itself look like replicas where they are plain tensors of one
    shape; their values tell.

    Args:
        sums: by parameter name, a number that follows from the values on this rank.
        replicas: of these.
        ranges: of these, for the message.
    Raises:
        UsageError: names the parameter and the ranks.
    """
    if not torch.distributed.is_initialized():
        return
    # The sum over the copies is zero where all are equal.
    shares = [
        0 if total == 1 else _digest(str(sums[name])) % Region.MODULUS * (total - 1 if number == 0 else -1)
        for name, (number, total) in replicas.items()
    ]
    differing = all_reduce_sum(torch.tensor(shares, dtype=torch.int64)).tolist()
    if is_simulated():
        return
    name = next((name for name, difference in zip(replicas, differing) if difference), None)
    if name is not None:
        held_by = all_gather_objects(f"values of the checksum {sums[name]} as {ranges[name]}")
        raise UsageError(
            f"{name} should be the same on ranks that hold {list(ranges[name].region.shape)} of it, and is not:"
            f" {_listed(held_by)}. If a parameter is cut by hand, or by DistributedDataParallel's device_mesh, zeros"
            " can't be counted: shard it as a DTensor (parallelize_module, fully_shard). If the ranks have begun with"
            " different weights, seed them alike, or broadcast the weights before attach"
        )


def _listed(held_by: list[str], most: int = 8) -> str:
    """What each rank holds, those with the same together."""
    ranks: dict[str, list[int]] = {}
    for rank, held in enumerate(held_by):
        ranks.setdefault(held, []).append(rank)
    listed = [
        f"{'rank' if len(of) == 1 else 'ranks'} {', '.join(map(str, of[:most]))}{', ...' * (len(of) > most)}: {held}"
        for held, of in ranks.items()
    ]
    return "; ".join(listed[:most]) + "; ..." * (len(listed) > most)


def _check_names(names: list[str]) -> None:
    """Raises UsageError, on every rank, where ranks have different names."""
    numbers = torch.tensor([len(names), _digest(" ".join(names))])
    highest, lowest = all_reduce_max(torch.stack([numbers, -numbers]))
    if bool((highest + lowest).any()):
        first, *others = all_gather_objects(names)
        for rank, other in enumerate(others, 1):
            different = sorted(set(first) ^ set(other))
            if different:
                raise UsageError(
                    f"the ranks have different parameters: {different[0]} is known to one of the ranks 0 and {rank}"
                    " alone. Where layers are spread over ranks (pipeline"
                    " parallelism) lp_dist can't count them: shard by FSDP2, ZeRO or tensor parallelism instead"
                )
        raise UsageError("the ranks have their parameters in different orders; build the model alike on every rank")


def _digest(text: str) -> int:
    """63 bits, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
