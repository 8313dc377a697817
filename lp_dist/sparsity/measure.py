"""How sparse a model is, counted on the shards: one reduction of a small integer tensor, never a gather."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_dist.optim import batching
from lp_dist.sharding.collectives import all_reduce_sum
from lp_dist.sharding.engines import unwrap
from lp_dist.sharding.shards import full_shape, locate_copies, locate_shards
from lp_dist.sparsity.census import ZeroCount
from lp_dist.sparsity.selection import matrix_names


@dataclass(frozen=True)
class Sparsity:
    """What was counted, over all ranks.

    Args:
        counts: exact zeros and elements of each parameter, by name.
    """

    counts: dict[str, ZeroCount]

    @property
    def zeros(self) -> int:
        """Exact zeros of all counted parameters."""
        return sum(zeros for zeros, _ in self.counts.values())

    @property
    def elements(self) -> int:
        """Weights of all counted parameters."""
        return sum(elements for _, elements in self.counts.values())

    @property
    def total(self) -> float:
        """The fraction of the counted weights that is exactly zero, 0 to 1."""
        return self.zeros / max(1, self.elements)

    def only(self, names: Iterable[str]) -> Sparsity:
        """The counts of these parameters alone."""
        return Sparsity({name: self.counts[name] for name in sorted(names)})

    def by_kind(self) -> dict[str, ZeroCount]:
        """Zeros and elements per kind of layer (see `kind_of`): q_proj, down_proj, ..."""
        kinds: dict[str, ZeroCount] = {}
        for name, (zeros, elements) in self.counts.items():
            kind = kind_of(name)
            so_far = kinds.get(kind, ZeroCount(0, 0))
            kinds[kind] = ZeroCount(so_far.zeros + zeros, so_far.elements + elements)
        return kinds


def kind_of(name: str) -> str:
    """Kind of layer in the name of a parameter: `model.layers.3.mlp.up_proj.weight` → `up_proj`."""
    # `base_layer` is peft's name for the layer that it wraps.
    words = [word for word in name.split(".") if not word.isdigit() and word != "base_layer"]
    return words[-2] if len(words) > 1 and words[-1] in ("weight", "bias") else words[-1]


def layer_of(name: str) -> int | None:
    """The first number in the name of a parameter: `model.layers.3.mlp.up_proj.weight` → 3. None without a number."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


@dataclass(frozen=True)
class Histogram:
    """How many weights of each counted parameter have which magnitude.

    Args:
        edges: of the bins of |w|, ascending, four bins to an octave, from 2^-44 (about 6e-14) to 2^16. The first bin
            counts smaller weights too, and the last bin larger ones.
        counts: weights in each bin, by the name of the parameter.
        zeros: exact zeros, by the name of the parameter. They are in no bin.
    """

    edges: tuple[float, ...]
    counts: dict[str, list[int]]
    zeros: dict[str, int]

    def only(self, names: Iterable[str]) -> Histogram:
        """The counts of these parameters alone."""
        names = sorted(names)
        return Histogram(
            self.edges, {name: self.counts[name] for name in names}, {name: self.zeros[name] for name in names}
        )


_LOWEST, _OCTAVES, _BITS = -44, 60, 2
_EDGES = tuple(2.0 ** (_LOWEST + i // 4) * (1 + i % 4 / 4) for i in range(_OCTAVES * 4 + 1))


def measure_sparsity(model: Any, optimizer: Any = None, *, names: Iterable[str] | None = None) -> Sparsity:
    """Counts the exact zeros of parameters over all ranks. Collective: every rank must call it, and gets the same.

    Each rank counts its own shards, without padding. One small tensor of integers is reduced, and nothing is gathered.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine (ZeRO 0 to 3), FSDP2, tensor parallelism.
        optimizer: None counts the model's own copy of the weights, which is what a checkpoint gets. With the optimizer
            (or a wrapper of it) its fp32 master weights are counted. The two differ in fp16, which rounds weights
            below 6e-8 to zero.
        names: the parameters to count, as of the unwrapped model's `named_parameters()`. None counts the matrices of
            linear, convolution, attention and expert modules (`lp_dist.sparsity.selection.matrix_names`).
    Returns:
        Zeros and elements by name.
    Raises:
        ValueError: a name is not in the model, or not stepped by the optimizer.
        RuntimeError: the ranks do not hold all elements of a parameter (an engine that is not supported).
    """
    values, shapes = _counted_values(model, optimizer, names)
    if not values:
        return Sparsity({})
    zeros = _stack([batching.count_zeros(tensor) for tensor in values.values()])
    numel = torch.tensor([tensor.numel() for tensor in values.values()], device=zeros.device)
    counts = all_reduce_sum(torch.stack([zeros, numel], dim=1)).tolist()
    for name, (_, elements) in zip(values, counts):
        if elements != shapes[name].numel():
            raise RuntimeError(
                f"counted {elements} of {shapes[name].numel()} elements of {name}: this way of sharding is not"
                " supported. Supported: DDP, ZeRO 0 to 3, FSDP2, tensor parallelism; with FSDP1 set fsdp_version: 2"
            )
    return Sparsity({name: ZeroCount(zeros, elements) for name, (zeros, elements) in zip(values, counts)})


def measure_histogram(model: Any, optimizer: Any = None, *, names: Iterable[str] | None = None) -> Histogram:
    """Counts the weights of parameters by magnitude over all ranks. Collective, with one reduction.

    The bins are cut by the bits of the float, so that no rounding moves a weight over an edge. Weights in fp64 are
    counted as fp32.

    Args:
        model: as for `measure_sparsity`.
        optimizer: as for `measure_sparsity`.
        names: as for `measure_sparsity`.
    Raises:
        ValueError: a name is not in the model, or not stepped by the optimizer.
    """
    values, _ = _counted_values(model, optimizer, names)
    if not values:
        return Histogram(_EDGES, {}, {})
    bins = len(_EDGES) - 1
    counts = all_reduce_sum(_stack([_histogram(tensor, bins) for tensor in values.values()])).tolist()
    return Histogram(
        _EDGES,
        {name: row[:bins] for name, row in zip(values, counts)},
        {name: row[bins] for name, row in zip(values, counts)},
    )


def _histogram(values: Tensor, bins: int) -> Tensor:
    """Weights per bin, and after them the number of zeros: int64 [bins + 1], on the device of `values`."""
    # Exponent and the first bits of the mantissa number the bins of all fp32 numbers: four equal ones to an octave.
    fp32_bins = torch.zeros(1 << (8 + _BITS), dtype=torch.int64, device=values.device)
    for tile in batching.tiles(values):
        fp32_bins += torch.bincount(tile.float().abs().view(torch.int32) >> (23 - _BITS), minlength=len(fp32_bins))
    first = (127 + _LOWEST) << _BITS
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
    counts[:bins] = fp32_bins[first : first + bins]
    counts[bins - 1] += fp32_bins[first + bins :].sum()
    counts[bins] = batching.count_zeros(values)
    counts[0] += fp32_bins[:first].sum() - counts[bins]
    return counts


def _stack(counts: list[Tensor]) -> Tensor:
    """Stacks tensors of equal shape, which lie on different devices where some of the weights are offloaded."""
    return torch.stack([count.to(counts[0].device) for count in counts])


def _counted_values(
    model: Any, optimizer: Any, names: Iterable[str] | None
) -> tuple[dict[str, Tensor], dict[str, torch.Size]]:
    """By name, in one order on all ranks: the values of a parameter that this rank counts, and its full shape."""
    inner = unwrap(model)
    params = dict(inner.named_parameters())
    names = sorted(matrix_names(inner) if names is None else names)
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(
            f"{len(unknown)} names are not parameters of {type(inner).__name__}, such as {unknown[0]!r}; "
            "pass names as model.named_parameters() gives them"
        )
    if optimizer is None:
        copies = locate_copies({name: params[name] for name in names})
        values = {name: copy.counted for name, copy in copies.items()}
    else:
        shards = {shard.name: shard for shard in locate_shards(model, optimizer)}
        foreign = [name for name in names if name not in shards]
        if foreign:
            raise ValueError(
                f"{len(foreign)} parameters are not stepped by this optimizer, such as {foreign[0]!r}; leave the"
                " optimizer out to count the model's own weights, or name others"
            )
        values = {name: shards[name].local.counted for name in names}
    return values, {name: full_shape(params[name]) for name in names}
