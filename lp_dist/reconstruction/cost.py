"""What moving survivors costs, on paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lp_dist.reconstruction.budget import Budget, bytes_to_solve
from lp_dist.reconstruction.solver import ITERATIONS
from lp_dist.reconstruction.survivors import modules_by_weight, why_not_linear
from lp_dist.sharding.deepspeed_slices import is_transposed
from lp_dist.sharding.shards import full_shape


@dataclass(frozen=True)
class ReconstructionCost:
    """Of one update, on each rank. Upper bounds: layers that are given the same inputs share what is of these.

    Args:
        layers: whose survivors can move.
        sample: bytes of the inputs that are kept until then.
        solving: bytes while the layer that needs most is solved, beside the sample.
        reduced: bytes that are summed over the ranks. Where a layer lies on some of them only, or on all of them as a
            copy (ZeRO-1 and 2, DDP), its weights are as well, three times in fp32.
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


def reconstruction_cost(
    shapes: Iterable[tuple[int, int]], ranks: int, bytes_of_inputs: int = 2, memory: float | None = None
) -> ReconstructionCost:
    """What an update costs. Ranks share the tokens and the rows evenly.

    Args:
        shapes: (outputs, inputs) of each layer.
        ranks: that share them.
        bytes_of_inputs: of an element of a layer's input: 2 in mixed precision.
        memory: `reconstruct_memory` of the target, GiB.
    Raises:
        UsageError: as of `Budget.of`.
    """
    by_name = {str(number): shape for number, shape in enumerate(shapes)}
    budget = Budget.of(by_name, ranks, memory)
    fitting = [shape for name, shape in by_name.items() if name not in budget.reasons]
    return ReconstructionCost(
        len(fitting),
        sum(inputs for _, inputs in fitting) * budget.rows * bytes_of_inputs,
        max((bytes_to_solve(*shape, budget.chunk) for shape in fitting), default=0),
        sum(4 * inputs**2 for _, inputs in fitting) if ranks > 1 else 0,
        float(
            sum(2 * inputs**2 * (budget.rows + (ITERATIONS + 1) * -(-outputs // ranks)) for outputs, inputs in fitting)
        ),
    )
