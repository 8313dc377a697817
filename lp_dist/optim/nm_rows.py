"""What a pattern makes of a step's rows: whole blocks are rows as ever, and entries of blocks that lie on several
ranks are rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lp_dist.optim import decay, nm
from lp_dist.optim.batching import Row
from lp_dist.optim.parameter_map import Segment, SegmentMap, effective, part

Values = dict[str, Any]


def acting(values: Values) -> Values:
    """Values without a pattern where the Lp term is off, or zeros are frozen: it spares weights from the pull
    alone.
    """
    if not values.get("pattern"):
        return values
    lr = values["lr"]
    unread = isinstance(lr, Tensor) and lr.device.type != "cpu"  # the host would have to wait for it
    acts = values["cutoff"] > 0 and decay.is_active(
        1.0 if unread else float(lr), values["weight_decay"], values["cutoff"]
    )
    return values if acts else {**values, "pattern": None}


def segments_of(book: SegmentMap, param: Tensor, there: Tensor, offset: int, length: int) -> list[Segment]:
    """The parameters in a run of `there`, the local part of a tensor; without `attach` that is one, whole but for
    FSDP2, which has shards of rows.
    """
    if param in book:
        return [segment for segment in book.of(param) if offset <= segment.offset < offset + length]
    rows = there.shape[1:] == param.shape[1:]
    return (
        [Segment(f"a parameter of shape {tuple(param.shape)}", 0, there.numel(), 0 if rows else None, param.shape)]
        if there.numel()
        else []
    )


class Ends:
    """Of one step's call: entries of blocks that lie on several ranks, at the ends of the pieces of parameters that
    are here.
    """

    def __init__(self) -> None:
        self._found: list[
            tuple[str, int, Values, Row]
        ] = []  # the parameter's name, the first entry's place in it, values, a row of them

    def whole(self, segment: Segment, values: Values, row: Row) -> list[Row]:
        """The row of a parameter's whole blocks, if there are any; keeps the rest. row: of the tensor in which it
        lies.

        Raises:
            ValueError: it has no blocks.
        """
        *tensors, step = row
        m = nm.parse(values["pattern"])[1]
        why = nm.misfit(segment.shape, segment.start, m)
        if why:
            raise ValueError(
                f"{segment.name} can't have pattern={values['pattern']!r}: {why}. Leave it out: pattern=None or"
                " weight_decay=0 in a group of its own, or by attach(..., overrides=), without which a shard of"
                " DeepSpeed's is no matrix either"
            )
        head, whole = nm.spans(segment.start, segment.length, m)
        if whole == tensors[0].numel():
            return [row]
        for at, length in ((0, head), (head + whole, segment.length - head - whole)):
            if length:
                cut = (*(part(t, segment.offset + at, length) for t in tensors), step)
                self._found.append((segment.name, segment.start + at, values, cut))
        return [(*(part(t, segment.offset + head, whole) for t in tensors), step)] if whole else []

    def divided(
        self, book: SegmentMap, group: Values, keys: Callable[[Values, Row], Tensor]
    ) -> list[tuple[Values, list[Row]]]:
        """The rows of the rest, by whether they are spared. Collective, where a tensor of the group has such blocks on
        any rank.

        keys: what the entries of a row with these values are ranked by (`patterns.keys_of`); the row, a copy, is used
        up.
        """
        # By all parameters of the group, whatever is here of them: every rank must take part alike
        names = (
            [name for param in group["params"] for name in book.straddling.names(param)]
            if book.straddling is not None
            else []
        )
        own = [
            (name, values)
            for name in names
            for values in [book.values(name)]
            if values.get("pattern") or group.get("pattern")
        ]
        held = {name: acting(effective(group, values)).get("pattern") for name, values in own}
        taking = {name: nm.parse(pattern) for name, pattern in held.items() if pattern}
        if not taking:
            if self._found:
                raise RuntimeError(
                    f"a block of {self._found[0][0]} lies on several ranks, and nothing is known of the others; call"
                    " lp_dist.attach on every rank"
                )
            return []
        alike: dict[tuple, list[tuple[str, int, Values, Row]]] = {}  # ends that can be ranked as one row
        for end in self._found:
            weights, grads, *_, step = end[3]
            same = (
                id(end[2]),
                id(step) if isinstance(step, Tensor) else step,
                weights.dtype,
                grads.dtype,
                weights.device,
            )
            alike.setdefault(same, []).append(end)
        ends, mine = [end for some in alike.values() for end in some], []
        for some in alike.values():
            columns = zip(*(row[:-1] for *_, row in some))
            joined = (*(torch.cat(column) for column in columns), some[0][3][-1])
            found = keys(some[0][2], joined).split([row[0].numel() for *_, row in some])
            mine += [(name, first, key) for (name, first, *_), key in zip(some, found)]
        work: dict[tuple[int, bool], tuple[Values, list[Row]]] = {}
        for (_, _, values, row), marks in zip(ends, book.straddling.spared(taking, mine)):
            at = 0
            for spared, some in groupby(marks):
                length = len(list(some))
                rows = work.setdefault(
                    (id(values), spared), ({**values, "pattern": nm.SPARED if spared else None}, [])
                )[1]
                rows.append((*(t[at : at + length] for t in row[:-1]), row[-1]))
                at += length
        return list(work.values())
