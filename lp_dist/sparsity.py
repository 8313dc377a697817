"""How sparse a model is, counted on the shards: one reduction of a small integer tensor, never a gather."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lp_dist.groups import matrix_names
from lp_dist.shards import full_shape, local_shard, reduction_device


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
    """Kind of layer of a parameter name: `model.layers.3.mlp.up_proj.weight` → `up_proj`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def measure_sparsity(model: nn.Module, names: Iterable[str] | None = None) -> Sparsity:
    """Counts exact zeros of parameters over all ranks. Every rank must call it, and every rank gets the same.

    Args:
        model: plain, or inside DDP, a DeepSpeed engine (ZeRO 1 to 3) or FSDP2.
        names: the parameters to count, as of the unwrapped model's `named_parameters()`; None counts the matrices of
            linear, convolution and attention modules (`lp_dist.groups.matrix_names`).
    Raises:
        ValueError: a name is not in the model.
        RuntimeError: what lies on the ranks is not the whole of a parameter (an engine that is not supported).
    """
    model = getattr(model, "module", model)  # DDP and DeepSpeed keep the model there
    params = dict(model.named_parameters())
    names = sorted(matrix_names(model) if names is None else names)
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(f"{len(unknown)} names are not parameters of {type(model).__name__}, such as {unknown[0]!r}; "
                         "pass names as model.named_parameters() gives them")
    counts = torch.zeros(len(names), 2, dtype=torch.int64)
    for row, name in zip(counts, names):
        shard = local_shard(params[name])
        if shard.owned:
            row[0] = shard.values.numel() - torch.count_nonzero(shard.values)
            row[1] = shard.values.numel()
    if torch.distributed.is_initialized():
        counts = counts.to(reduction_device())
        torch.distributed.all_reduce(counts)
    result = Sparsity({name: (zeros, elements) for name, (zeros, elements) in zip(names, counts.tolist())})
    for name in names:
        expected = full_shape(params[name]).numel()
        if result.counts[name][1] != expected:
            raise RuntimeError(
                f"counted {result.counts[name][1]} of {expected} elements of {name}: this way of sharding is not supported. "
                "Supported: DDP, ZeRO 1 to 3, FSDP2; with FSDP1 set fsdp_version: 2")
    return result
