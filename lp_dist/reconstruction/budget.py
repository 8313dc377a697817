"""The memory that moving survivors takes on a rank, and how it is kept within a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lp_dist.errors import UsageError

GIB = 1 << 30
# Rows of a layer's input that are sampled over all ranks, and the fewest on a rank, which are two blocks of a text.
TOKENS = 8192
LEAST_ROWS = 256
# Weights that are solved at a time, with temporaries of eight times their size; and the fewest, within a bound.
CHUNK = 1 << 24
LEAST_CHUNK = 1 << 18


def bytes_to_solve(outputs: int, inputs: int, chunk: int = CHUNK) -> int:
    """Bytes that a rank needs for a layer beside the sample, at most: where the layer lies on it as a whole.

    Args:
        outputs: of the layer.
        inputs: of the layer.
        chunk: weights that are solved at a time.
    """
    weights = outputs * inputs
    # XᵀX, the weights from before, and eight tensors of the rows of a chunk.
    return 4 * (inputs**2 + weights + 8 * min(weights, max(chunk, inputs)))


@dataclass(frozen=True)
class Budget:
    """What fits into a bound.

    Args:
        rows: of a layer's input that are kept on a rank at most.
        chunk: weights that are solved at a time.
        reasons: {name of a layer: why it doesn't fit, in words}.
    """

    rows: int
    chunk: int
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Mapping[str, tuple[int, int]], ranks: int, memory: float | None) -> Budget:
        """Half of a bound is for the layer that needs most, the rest for inputs.

        Args:
            layers: (outputs, inputs) by name.
            ranks: that share the tokens.
            memory: GiB on each rank; None: no bound.
        Returns:
            What fits.
        Raises:
            UsageError: the inputs of 256 tokens don't, or of all that the rank would keep.
        """
        rows = -(-TOKENS // ranks)
        if memory is None:
            return cls(rows, CHUNK)
        least_rows = min(LEAST_ROWS, rows)
        half = memory * GIB / 2
        reasons = {
            name: f"needs {needed / GIB:.3g} GiB to be solved, and of reconstruct_memory={memory:g} half is for that"
            for name, shape in layers.items()
            if (needed := bytes_to_solve(*shape, LEAST_CHUNK)) > half
        }
        shapes = [shape for name, shape in layers.items() if name not in reasons]
        chunk = CHUNK
        while chunk > LEAST_CHUNK and any(bytes_to_solve(*shape, chunk) > half for shape in shapes):
            chunk //= 2
        solving = max((bytes_to_solve(*shape, chunk) for shape in shapes), default=0)
        bytes_of_a_row = 4 * sum(inputs for _, inputs in shapes)
        fitting = int((memory * GIB - solving) // max(1, bytes_of_a_row))
        if fitting < least_rows:
            # Where half of it is enough for any layer, and for the inputs of all.
            of_all = 4 * least_rows * sum(inputs for _, inputs in layers.values())
            enough = 2 * max(of_all, *(bytes_to_solve(*shape, LEAST_CHUNK) for shape in layers.values())) / GIB
            raise UsageError(
                f"reconstruct_memory={memory:g} GiB is too little: the inputs of {least_rows} tokens of {len(shapes)}"
                f" layers need {least_rows * bytes_of_a_row / GIB:.3g}; set {math.ceil(100 * enough) / 100:g} or more,"
                " or reconstruct=False"
            )
        return cls(min(rows, fitting), chunk, reasons)
