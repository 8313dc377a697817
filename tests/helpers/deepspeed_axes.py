"""Shared by the tests: models for DeepSpeed's AutoTP, linear in their weights, whose gradients are exact wherever their
weights lie; and what ranks hold of them, put together by plain loops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.engines import ZERO, Engine, deepspeed_config

# What a rank of two has along the divided dimension of each weight, written down by hand: (dimension, indices).
SLICES = {
    "up.weight": (0, [[*range(7)], [*range(7, 13)]]),
    "up.bias": (0, [[*range(7)], [*range(7, 13)]]),
    "down.weight": (1, [[*range(12)], [*range(12, 24)]]),
    "fused.weight": (
        0,
        [[*range(4), *range(8, 10), *range(12, 14)], [*range(4, 8), *range(10, 12), *range(14, 16)]],
    ),
}
PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r"up\.weight$"], "partition_type": "column"},
        {"patterns": [r"down\.weight$"], "partition_type": "row"},
        {"patterns": [r"fused\.weight$"], "partition_type": "column", "shape": [[8, 4, 4], -1], "partition_dim": 0},
    ],
}
INPUTS = 40


class SideBySide(nn.Module):
    """Layers side by side, each of the first of the inputs. One is divided by columns, unevenly, one by rows, one is
    three matrices in one, and one is left whole, as is a vector.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(INPUTS, 13), nn.Linear(24, 9)
        self.fused, self.whole = nn.Linear(16, 16, bias=False), nn.Linear(20, 5)
        self.scale = nn.Parameter(torch.ones(5))
        with torch.no_grad():
            for param in self.parameters():
                # Weights that bf16 holds, and none that is zero.
                param.copy_((param * 64).round() / 128)
                param[param == 0] = 1 / 64

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """By layer, what this rank has of the outputs."""
        down = self.down.weight.shape[1]
        first = 24 - down if getattr(self.down, "tp_index", 0) else 0
        return {
            "up": self.up(rows),
            "down": self.down(rows[:, first : first + down]),
            "fused": self.fused(rows[:, :16]),
            "whole": self.whole(rows[:, :20]),
            "scale": rows[:, :5] * self.scale,
        }


def loss_of(model: Any, step: int, data_rank: int, tensor_rank: int = 0) -> Tensor:
    """Of which the gradients are small integers whatever the weights are, so that averages over ranks are exact."""
    generator = torch.Generator().manual_seed(10 * step + data_rank)
    outputs = model(torch.randint(-1, 2, (4, INPUTS), generator=generator).float())
    loss = torch.zeros(())
    for name, width in {"up": 13, "down": 9, "fused": 16, "whole": 5, "scale": 5}.items():
        slopes = torch.randint(-1, 2, (4, width), generator=generator).float() / 16
        if outputs[name].shape[1] != width:
            slopes = slopes[:, SLICES[f"{name}.weight"][1][tensor_rank]]
        loss = loss + (outputs[name] * slopes).sum()
    return loss


def engine_of(stage: str, optimizer_of: Any, scheduler_of: Any, tensor_ranks: int = 2, **more: Any) -> Engine:
    """The model under AutoTP and a stage of ZeRO ("zero0" to "zero3", "bf16_optimizer")."""
    import deepspeed

    model = SideBySide()
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    config = deepspeed_config(
        stage, tensor_parallel={"autotp_size": tensor_ranks, "partition_config": PARTITION}, **more
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
    )
    assert stage in {"zero0", "bf16_optimizer", *ZERO}
    return Engine(engine, optimizer, scheduler)


def put_together(name: str, shape: torch.Size, held: list[tuple[int, Tensor, torch.Size]]) -> Tensor:
    """A parameter from what the ranks of each tensor-parallel index have of it.

    Args:
        name: of the parameter.
        shape: of the parameter.
        held: of every tensor-parallel index: (index, all values of its slice in order, the slice's shape).
    """
    if name not in SLICES:
        assert all(values.equal(held[0][1]) for _, values, _ in held), f"{name} differs between copies"
        return held[0][1].view(shape)
    dim, indices = SLICES[name]
    result = torch.full(shape, torch.nan)
    for index, values, slice_shape in held:
        result.index_copy_(dim, torch.tensor(indices[index]), values.view(slice_shape))
    assert not result.isnan().any()
    return result
