"""Along which dimension of a parameter its inputs lie, and so the blocks of N:M patterns; and which parameters can
have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lp_dist.modules.model import read_model
from lp_dist.optim import nm
from lp_dist.sharding.shards import full_shape


@dataclass
class InputDims:
    """What is known of the parameters that are to have a pattern.

    Args:
        dims: {name: dimension of inputs}, of those that can have it.
        reasons: {name: why it can't have it}, of the others.
    """

    dims: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def input_dims(
    model: nn.Module, patterns: Mapping[str, str], named: Mapping[str, int | None] | None = None
) -> InputDims:
    """Finds the dimension of inputs of parameters, by what the model's code does with them.

    Args:
        model: unwrapped, before or after it is sharded.
        patterns: {name of a parameter: the pattern that it is to have}.
        named: {name: its dimension of inputs}, where the script says so.
    """
    reading = read_model(model)
    owners = {
        f"{path}.{name}".lstrip("."): module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    params = dict(model.named_parameters())
    known = InputDims()
    for name, pattern in patterns.items():
        owner, shape = owners[name], full_shape(params[name])
        product = None if name in reading.unclear else reading.products.get(name)
        dim = (named or {}).get(name)
        if dim is None and product is not None:
            dim = product.inputs
        elif dim is None and name not in reading.products and len(shape) == 2 and "Linear" in type(owner).__name__:
            # Compiled layers of other libraries, whose code can't be read.
            dim = 1
        # The inputs of a transposed convolution are its first dimension, which the groups divide.
        groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) and dim == 0 else 1
        if dim is None and len(shape) < 2:
            reason: str | None = f"it has the shape {tuple(shape)}, and is no matrix"
        elif dim is None and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            reason = "it is a table whose rows are looked up"
        elif dim is None and name in reading.unclear:
            reason = f"its inputs are different dimensions in different places of the code ({type(owner).__name__})"
        elif dim is None:
            reason = f"it is not known along which of its dimensions the inputs of {type(owner).__name__} lie"
        else:
            reason = nm.why_no_blocks(shape, 0, nm.parse_pattern(pattern)[1], dim, groups)
        if reason is not None or dim is None:
            known.reasons[name] = str(reason)
        else:
            known.dims[name] = dim
    return known


def listed(reasons: Mapping[str, str]) -> str:
    """The parameters that can have no pattern, by their reasons."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(of_reason)}: {reason}" for reason, of_reason in names.items())


def share_left_out(sizes: Mapping[str, int], left_out: Iterable[str]) -> str:
    """How much of the parameters is left out of a pattern.

    Args:
        sizes: {name: elements}, of all that were to have it.
        left_out: names of those that don't.
    """
    names = [*left_out]
    elements, total = sum(sizes[name] for name in names), sum(sizes.values())
    return (
        f"{len(names)} of {len(sizes)} parameters ({elements:,} of {total:,} weights,"
        f" {100 * elements / max(1, total):.2f} %)"
    )
