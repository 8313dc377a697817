"""What moving survivors costs, on paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lp_dist.reconstruction.solver import ITERATIONS
from lp_dist.reconstruction.survivors import CHUNK, TOKENS, modules_by_weight, why_not_linear
from lp_dist.sharding.deepspeed_slices import is_transposed
from lp_dist.sharding.shards import full_shape


@dataclass(frozen=True)
class ReconstructionCost:
    """Of one update, on each rank. Upper bounds: layers that are given the same inputs share what is of these.

    Args:
        layers: whose survivors can move.
        sample: bytes of the inputs that are kept over the step before.
        solving: bytes while the layer with the most inputs is solved, beside the sample.
        reduced: bytes that are summed over the ranks.
        flops: floating-point operations, in fp32.
    """

    layers: int
    sample: int
    solving: int
    reduced: int
    flops: float


def linear_shapes(model: nn.Module, names: Iterable[str]) -> list[tuple[int, int]]:
    """(outputs, inputs) of the layers whose survivors can move, of those of these weights.

    Args:
        model: unwrapped, on any device.
        names: of the weights that decay.
    """
    uses, params = modules_by_weight(model), dict(model.named_parameters())
    shapes = []
    for name in names:
        users, shape = uses.get(id(params[name]), []), full_shape(params[name])
        if not why_not_linear(users, shape):
            outputs, inputs = reversed(shape) if is_transposed(users[0]) else shape
            shapes.append((outputs, inputs))
    return shapes


def reconstruction_cost(shapes: Iterable[tuple[int, int]], ranks: int, bytes_of_inputs: int = 2) -> ReconstructionCost:
    """What an update costs where rows are divided evenly, as by FSDP2 and ZeRO.

    Args:
        shapes: (outputs, inputs) of each layer.
        ranks: that share the rows and the tokens.
        bytes_of_inputs: of an element of a layer's input: 2 in mixed precision.
    """
    shapes, tokens = list(shapes), -(-TOKENS // ranks)
    solving = 0
    for outputs, inputs in shapes:
        weights = -(-outputs // ranks) * inputs
        # XᵀX and that of a block of tokens; then the weights from before, and eight tensors of the rows that are
        # solved at a time.
        solving = max(solving, 8 * inputs**2, 4 * (inputs**2 + weights + 8 * min(weights, max(CHUNK, inputs))))
    return ReconstructionCost(
        len(shapes),
        sum(inputs for _, inputs in shapes) * tokens * bytes_of_inputs,
        solving,
        sum(4 * inputs**2 for _, inputs in shapes) if ranks > 1 else 0,
        float(sum(2 * inputs**2 * (tokens + (ITERATIONS + 1) * -(-outputs // ranks)) for outputs, inputs in shapes)),
    )
