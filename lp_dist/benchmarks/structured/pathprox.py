"""PathProx (Yang et al., arXiv 2210.03069) on the feed-forward channels of a model. It is a baseline of the bench.

Weight decay on the input weights w and the output weights v of a hidden unit has the same solutions as a penalty
λ·‖w‖·‖v‖, where the unit is homogeneous: scaled by a positive number, w scales what the unit gives. Its proximal step
keeps ‖w‖ = 1 and shrinks ‖v‖.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lp_dist.errors import UsageError
from lp_dist.structured.groups import Member, WeightGroups


class HiddenUnits(NamedTuple):
    """The hidden units of one layer, as views of its parameters.

    Args:
        inputs: w of each unit, [units, inputs].
        biases: of the units, [units]; None: they have none.
        outputs: v of each unit, [units, outputs].
    """

    inputs: Tensor
    biases: Tensor | None
    outputs: Tensor


def proximal_step(units: HiddenUnits, threshold: float) -> None:
    """The step of PathProx after that of the optimizer, in place.

    First w ← w/‖w‖, b ← b/‖w‖ and v ← v·‖w‖, which keeps what the model computes; then the soft threshold
    v ← v·max(0, 1 − threshold/‖v‖). Units without weights (w = 0) keep their scale.

    Args:
        units: they are changed.
        threshold: the learning rate times λ; 0: only the scales change.
    """
    norms = units.inputs.norm(dim=1, keepdim=True)
    scales = torch.where(norms > 0, norms, 1.0)
    units.inputs.div_(scales)
    if units.biases is not None:
        units.biases.div_(scales[:, 0])
    units.outputs.mul_(scales)
    path_norms = units.outputs.norm(dim=1, keepdim=True)
    units.outputs.mul_(torch.where(path_norms > threshold, 1.0 - threshold / path_norms, 0.0))


@torch.no_grad()
def hidden_units(model: nn.Module, sets: list[WeightGroups], inputs: Tensor) -> list[HiddenUnits]:
    """The hidden units of channels.

    Which weights are w is found by what the model computes: it stays the same when they are doubled and v is halved.
    Of a gated feed-forward this is so for the half that has no activation function, of others with ReLU. Numbers are
    powers of two, so that nothing is rounded.

    Args:
        model: in evaluation mode. It is changed and changed back.
        sets: its channels, layer by layer.
        inputs: token ids to compute on, int64 [rows, block].
    Returns:
        Views of the model's parameters, one entry for each set.
    Raises:
        UsageError: a set is not homogeneous in any of its weights.
    """
    inputs = inputs.to(next(model.parameters()).device)
    expected = model(input_ids=inputs).logits
    return [_units_of(model, groups, inputs, expected) for groups in sets]


def _units_of(model: nn.Module, groups: WeightGroups, inputs: Tensor, expected: Tensor) -> HiddenUnits:
    readers = [member for member in groups.members if member.reads]
    if groups.kind != "channels" or len(readers) != 1:
        raise UsageError(f"{groups.label}: pathprox is for channels of a feed-forward, which one layer reads")
    outputs = _view(model, readers[0])
    for member in groups.members:
        if member.reads or not member.name.endswith(".weight"):
            continue
        bias_name = member.name.removesuffix("weight") + "bias"
        biases = [m for m in groups.members if m.name == bias_name and m.start == member.start]
        units = HiddenUnits(_view(model, member), _view(model, biases[0]) if biases else None, outputs)
        _scale(units, 2.0)
        change = (model(input_ids=inputs).logits - expected).abs().max()
        _scale(units, 0.5)
        if change <= 1e-6 * expected.abs().max():
            return units
    raise UsageError(
        f"{groups.label}: pathprox needs units whose output scales with their weights, as those of ReLU and of gated"
        " feed-forwards do; this model's activation function does not scale"
    )


def _view(model: nn.Module, member: Member) -> Tensor:
    return model.get_parameter(member.name).detach().movedim(member.dim, 0)[member.start : member.stop]


def _scale(units: HiddenUnits, factor: float) -> None:
    units.inputs.mul_(factor)
    if units.biases is not None:
        units.biases.mul_(factor)
    units.outputs.div_(factor)
