"""How sparse a model is, counted on the shards: one reduction of a small integer tensor, never a gather."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_dist.optim import batching
from lp_dist.sharding.collectives import summed
from lp_dist.sharding.engines import unwrap
from lp_dist.sharding.shards import full_shape, local_piece, shards
from lp_dist.sparsity.selection import matrix_names


@dataclass(frozen=True)
class Sparsity:
    """Exact zeros and elements of each counted parameter, by name: `{name: (zeros, elements)}`."""

    counts: dict[str, tuple[int, int]]

    @property
    def zeros(self) -> int:
        return sum(zeros for zeros, _ in self.counts.values())

    @property
    def elements(self) -> int:
        return sum(elements for _, elements in self.counts.values())

    @property
    def total(self) -> float:
        """Share of exact zeros among the counted weights, 0 to 1."""
        return self.zeros / max(1, self.elements)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Zeros and elements per kind of layer, the last part of the module's name: q_proj, down_proj, ..."""
        kinds: dict[str, tuple[int, int]] = {}
        for name, (zeros, elements) in self.counts.items():
            kind = kind_of(name)
            old = kinds.get(kind, (0, 0))
            kinds[kind] = (old[0] + zeros, old[1] + elements)
        return kinds


def kind_of(name: str) -> str:
    """Kind of layer of a parameter name: `model.layers.3.mlp.up_proj.weight` → `up_proj`. (`base_layer` is peft's name
    for what it wraps.)
    """
    parts = [part for part in name.split(".") if not part.isdigit() and part != "base_layer"]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def layer_of(name: str) -> int | None:
    """Number of the layer in a parameter's name, the first one in it: `model.layers.3.mlp.up_proj.weight` → 3; None
    where there is none.
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


@dataclass(frozen=True)
class Histogram:
    """How many weights of each counted parameter have which magnitude.

    Args:
        edges: of the bins of |w|, ascending, four to an octave from 2^-44 (about 6e-14) to 2^16; the first and the
            last bin take what is below and above as well.
        counts: by name, one number per bin. zeros: by name.
    """

    edges: tuple[float, ...]
    counts: dict[str, list[int]]
    zeros: dict[str, int]


_LOWEST, _OCTAVES, _BITS = -44, 60, 2
_EDGES = tuple(2.0 ** (_LOWEST + i // 4) * (1 + i % 4 / 4) for i in range(_OCTAVES * 4 + 1))


def measure_sparsity(model: Any, optimizer: Any = None, *, names: Iterable[str] | None = None) -> Sparsity:
    """Counts exact zeros of parameters over all ranks. Every rank must call it, and every rank gets the same.

    Local pieces are counted, each once, and one small tensor of integers is reduced; padding does not count.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine (ZeRO 0 to 3) or FSDP2.
        optimizer: None counts the model's own copy of the weights, which is what a checkpoint gets; with the optimizer
            (or a wrapper of it), its fp32 master weights are counted. They differ in fp16, which rounds what is below
            6e-8 to zero.
        names: the parameters to count, as of the unwrapped model's `named_parameters()`; None counts the matrices of
            linear, convolution and attention modules (`lp_dist.sparsity.selection.matrix_names`).
    Raises:
        ValueError: a name is not in the model.
        RuntimeError: what lies on the ranks is not the whole of a parameter (an engine that is not supported).
    """
    pieces, shapes = _pieces(model, optimizer, names)
    if not pieces:
        return Sparsity({})
    zeros = _together([batching.count_zeros(values) for values in pieces.values()])
    counts = summed(
        torch.stack([zeros, torch.tensor([values.numel() for values in pieces.values()], device=zeros.device)], dim=1)
    ).tolist()
    for name, (_, elements) in zip(pieces, counts):
        if elements != shapes[name].numel():
            raise RuntimeError(
                f"counted {elements} of {shapes[name].numel()} elements of {name}: this way of sharding is not"
                " supported. Supported: DDP, ZeRO 0 to 3, FSDP2; with FSDP1 set fsdp_version: 2"
            )
    return Sparsity({name: (zeros, elements) for name, (zeros, elements) in zip(pieces, counts)})


def measure_histogram(model: Any, optimizer: Any = None, *, names: Iterable[str] | None = None) -> Histogram:
    """Histogram of |w| of parameters over all ranks, counted as `measure_sparsity` does, with one reduction; arguments
    as there.

    The bins are cut by the bits of the float, so no rounding moves a weight across an edge. (fp64 weights are taken as
    fp32.)
    """
    pieces, _ = _pieces(model, optimizer, names)
    if not pieces:
        return Histogram(_EDGES, {}, {})
    bins = len(_EDGES) - 1
    counts = summed(_together([_binned(values, bins) for values in pieces.values()])).tolist()
    return Histogram(
        _EDGES,
        {name: row[:bins] for name, row in zip(pieces, counts)},
        {name: row[bins] for name, row in zip(pieces, counts)},
    )


def _binned(values: Tensor, bins: int) -> Tensor:
    """Weights per bin, and after them the number of zeros."""
    # Exponent and the first bits of the mantissa number the bins of all fp32 numbers: four equal ones to an octave.
    every = torch.zeros(1 << (8 + _BITS), dtype=torch.int64, device=values.device)
    for part in batching.pieces(values):
        every += torch.bincount(part.float().abs().view(torch.int32) >> (23 - _BITS), minlength=len(every))
    first = (127 + _LOWEST) << _BITS
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
    counts[:bins] = every[first : first + bins]
    counts[bins - 1] += every[first + bins :].sum()
    counts[bins] = batching.count_zeros(values)
    counts[0] += every[:first].sum() - counts[bins]
    return counts


def _together(counts: list[Tensor]) -> Tensor:
    """One tensor of all; they lie on different devices where some of the weights are offloaded."""
    return torch.stack([count.to(counts[0].device) for count in counts])


def _pieces(
    model: Any, optimizer: Any, names: Iterable[str] | None
) -> tuple[dict[str, Tensor], dict[str, torch.Size]]:
    """What this rank counts of each parameter, and the shapes of the whole ones, by name in one order on all ranks."""
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
        pieces = {name: local_piece(params[name]).share for name in names}
    else:
        masters = {shard.name: shard for shard in shards(model, optimizer)}
        foreign = [name for name in names if name not in masters]
        if foreign:
            raise ValueError(
                f"{len(foreign)} parameters are not stepped by this optimizer, such as {foreign[0]!r}; leave the"
                " optimizer out to count the model's own weights, or name others"
            )
        pieces = {name: masters[name].piece.share for name in names}
    return pieces, {name: full_shape(params[name]) for name in names}
