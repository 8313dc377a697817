"""What an N:M pattern makes of a step's rows. Complete blocks are rows like others; entries of blocks that lie on
several ranks are rows of their own. Where the weights of a block don't lie one after the other, rows are views whose
last dimension is that of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lp_dist.optim import decay, nm
from lp_dist.optim.batching import RowCopy, StepRow
from lp_dist.optim.hyperparameters import acting_values
from lp_dist.optim.parameter_map import ParameterMap, ParamSlice, effective_values, flat_view
from lp_dist.optim.region import Region

Values = dict[str, Any]


def without_idle_pattern(values: Values) -> Values:
    """`values` without a pattern where the Lp term does not act: a pattern exempts weights from that term alone."""
    if not values.get("pattern"):
        return values
    lr = values["lr"]
    # The host would have to wait for a learning rate on an accelerator.
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    acts = values["cutoff"] > 0 and decay.is_active(1.0 if on_device else float(lr), values["weight_decay"])
    return values if acts else {**values, "pattern": None}


def slices_in(
    parameter_map: ParameterMap, param: Tensor, local: Tensor, offset: int, length: int, inputs: int | None
) -> list[ParamSlice]:
    """The parameters in a span of `local`, the local part of `param`, a tensor that the optimizer steps.

    Without `attach` it is taken for one parameter: a whole one, or rows of it as FSDP2 shards. `inputs` is then its
    dimension of inputs, if the param group says so.
    """
    if param in parameter_map:
        return [s for s in parameter_map.of(param) if offset <= s.offset < offset + length]
    if not local.numel():
        return []
    # Blocks along the rows themselves may be divided among ranks.
    has_rows = local.shape[1:] == param.shape[1:] and (inputs != 0 or local.shape == param.shape)
    name = f"a parameter of shape {tuple(param.shape)}"
    return [ParamSlice(name, 0, local.numel(), 0 if has_rows else None, param.shape, inputs)]


class _SplitEntries(NamedTuple):
    """Entries of one split block on this rank, or of several that lie between each other.

    Args:
        name: of the parameter.
        positions: where they lie in it, taken flat; int64.
        is_many: whether they may be of thousands of blocks.
        values: that hold for them.
        row: in which they lie, flat.
        offsets: where they lie in the row; int64. None: they are the row.
    """

    name: str
    positions: Tensor
    is_many: bool
    values: Values
    row: StepRow
    offsets: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the row, of the entries alone."""
        if self.offsets is None:
            return self.row.tensors
        index = self.offsets.to(self.row.weights.device)
        return tuple(tensor[index] for tensor in self.row.tensors)


class SplitBlockRows:
    """Collects, in one call of a step, the entries of blocks that lie on several ranks: the ends of the shards.

    Attributes:
        copies: of entries, to be written back after the step.
    """

    def __init__(self) -> None:
        self.copies: list[RowCopy] = []
        self._entries: list[_SplitEntries] = []

    def complete_blocks(self, param_slice: ParamSlice, values: Values, row: StepRow) -> list[StepRow]:
        """The row of a parameter's complete blocks, if it has any; keeps the other entries for `divided`.

        Args:
            param_slice: of the parameter.
            values: with a pattern.
            row: of the whole tensor in which it lies.
        Raises:
            ValueError: the parameter has no blocks.
        """
        m = nm.parse_pattern(values["pattern"])[1]
        inputs = param_slice.inputs
        reason = nm.why_no_blocks(param_slice.shape, param_slice.start, m, inputs)
        if reason is not None or param_slice.start is None or inputs is None:
            unknown = (
                " lp_dist.attach and lp_dist.param_groups read it from the model, or set it in the param group:"
                " input_dim=1 for [outputs, inputs], 0 for GPT-2's Conv1D. Else leave"
                if inputs is None
                else " Leave"
            )
            raise ValueError(
                f"{param_slice.name} can't have pattern={values['pattern']!r}: {reason}.{unknown} it out: pattern=None"
                " or weight_decay=0 in a group of its own, or by attach(..., overrides=), without which a shard of"
                " DeepSpeed's is no matrix either"
            )
        region = param_slice.region
        shape = param_slice.shape if region is None else region.sizes
        if region is not None and region.divided(inputs, m) is None:
            return self._complete_runs(param_slice, region, inputs, m, values, row)
        start, length, stride = param_slice.start, param_slice.length, nm.block_stride(shape, inputs)
        head, complete = nm.split_at_blocks(start, length, m * stride)
        if complete == row.weights.numel():
            if stride == 1 and row.weights.is_contiguous():
                # The last dimensions may be of size 1, and the inputs before them.
                is_last = row.weights.ndim != len(shape) or inputs == len(shape) - 1
                return [row if is_last else row.with_tensors(tuple(t.movedim(inputs, -1) for t in row.tensors))]
            if not row.weights.is_contiguous():
                return [row.with_tensors(tuple(t.movedim(inputs, -1) for t in row.tensors))]
        if not row.grads.is_contiguous():
            row = row._replace(grads=row.grads.contiguous())

        def cut(at: int, count: int) -> StepRow:
            return row.with_tensors(tuple(flat_view(t, param_slice.offset + at, count) for t in row.tensors))

        for at, count in ((0, head), (head + complete, length - head - complete)):
            if count:
                positions = torch.arange(start + at, start + at + count)
                positions = positions if region is None else region.positions(positions)
                self._entries.append(_SplitEntries(param_slice.name, positions, stride > 1, values, cut(at, count)))
        if not complete:
            return []
        blocks = cut(head, complete)
        if stride == 1:
            return [blocks]
        return [blocks.with_tensors(tuple(t.view(-1, m, stride).transpose(1, 2) for t in blocks.tensors))]

    def _complete_runs(
        self, param_slice: ParamSlice, region: Region, inputs: int, m: int, values: Values, row: StepRow
    ) -> list[StepRow]:
        """As `complete_blocks`, where this rank has some of the inputs, and blocks that another one has too."""
        assert param_slice.length == region.sizes.numel(), "attach has refused a range of it"
        flat = row.with_tensors(
            tuple(flat_view(t.contiguous(), param_slice.offset, param_slice.length).view(-1) for t in row.tensors)
        )
        index = nm.split_entries(region, inputs, m)
        if len(index):
            self._entries.append(_SplitEntries(param_slice.name, region.positions(index), True, values, flat, index))
        return [
            flat.with_tensors(
                tuple(
                    t.view(region.sizes).narrow(inputs, run.first, run.length).movedim(inputs, -1)
                    for t in flat.tensors
                )
            )
            for run in nm.complete_runs(region, inputs, m)
        ]

    def divided(
        self, parameter_map: ParameterMap, group: Values, ranking_keys: Callable[[Values, StepRow], Tensor]
    ) -> list[tuple[Values, list[StepRow]]]:
        """The rows of the collected entries, those that are kept apart from the others. Collective where a tensor of
        the group has such blocks on any rank.

        Args:
            parameter_map: of the optimizer.
            group: the param group.
            ranking_keys: gives the `nm.ranking_keys` of the entries of a row with these values; uses up the row, which
                is a copy.
        """
        patterns = self._patterns_on_any_rank(parameter_map, group)
        if not patterns:
            if self._entries:
                raise RuntimeError(
                    f"a block of {self._entries[0].name} lies on several ranks, and nothing is known of the others;"
                    " call lp_dist.attach on every rank"
                )
            return []
        assert parameter_map.split_blocks is not None
        # Entries that can be ranked as one row.
        alike: dict[tuple, list[_SplitEntries]] = {}
        for entries in self._entries:
            row = entries.row
            step = id(row.step) if isinstance(row.step, Tensor) else row.step
            key = id(entries.values), step, row.weights.dtype, row.grads.dtype, row.weights.device
            alike.setdefault(key, []).append(entries)
        ordered = [entries for batch in alike.values() for entries in batch]
        ranked: list[nm.BlockEntries] = []
        for batch in alike.values():
            joined = batch[0].row.with_tensors(
                tuple(torch.cat(tensors) for tensors in zip(*(entries.tensors for entries in batch)))
            )
            keys = ranking_keys(batch[0].values, joined).split([len(entries.positions) for entries in batch])
            ranked += [nm.BlockEntries(entries.name, entries.positions, key) for entries, key in zip(batch, keys)]
        rows: dict[tuple[int, bool], tuple[Values, list[StepRow]]] = {}
        for entries, flags in zip(ordered, parameter_map.split_blocks.kept(patterns, ranked)):
            values = entries.values
            for is_kept, row in self._by_flag(entries, flags):
                pattern = nm.ALL_KEPT if is_kept else None
                rows.setdefault((id(values), is_kept), ({**values, "pattern": pattern}, []))[1].append(row)
        return list(rows.values())

    def _by_flag(self, entries: _SplitEntries, flags: Tensor) -> Iterator[tuple[bool, StepRow]]:
        """Rows of the entries that are kept, and of those that are not."""
        row = entries.row
        if entries.is_many:
            # A row for each few entries would take long.
            for is_kept in (True, False):
                index = (flags == is_kept).nonzero().flatten()
                index = index if entries.offsets is None else entries.offsets[index]
                if len(index):
                    self.copies.append(RowCopy.of(row, index.to(row.weights.device)))
                    yield is_kept, self.copies[-1].row
            return
        at = 0
        for is_kept, run in groupby(flags.tolist()):
            count = len(list(run))
            yield is_kept, row.with_tensors(tuple(t[at : at + count] for t in row.tensors))
            at += count

    @staticmethod
    def _patterns_on_any_rank(parameter_map: ParameterMap, group: Values) -> dict[str, tuple[int, int]]:
        """N and M of the parameters that take part, by name. From all parameters of the group, whatever of them is on
        this rank, since every rank must take part alike.
        """
        if parameter_map.split_blocks is None:
            return {}
        patterns = {}
        for param in group["params"]:
            for name in parameter_map.split_blocks.names(param):
                overrides = parameter_map.values(name)
                if overrides.get("pattern") or group.get("pattern"):
                    values = without_idle_pattern(acting_values(effective_values(group, overrides)))
                    if values.get("pattern"):
                        patterns[name] = nm.parse_pattern(values["pattern"])
        return patterns
