"""The hyperparameters of a param group: their ranges, and the phase that says what the decay does now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from numbers import Real
from typing import Any

from torch import Tensor

from lp_dist.optim import nm

P_MIN, P_MAX = -4.0, 4.0


class OpenFloat(float):
    """A default that a caller did not name, so that Trainer's arguments may take its place."""


class OpenPair(tuple[float, float]):
    """As `OpenFloat`, of two numbers."""


def plain_value(value: Any) -> Any:
    """The plain number or pair of a default that was left open; other values as they are."""
    if isinstance(value, OpenFloat):
        return float(value)
    return tuple(value) if isinstance(value, OpenPair) else value


class Phase(str, Enum):
    """What the decay does to the parameters that have a weight_decay above 0.

    A group, or a single parameter, holds the value (a plain string) under the key "phase", so that checkpoints need
    nothing of lp_dist to be read.
    """

    OFF = "off"  # nothing: the base optimizer's step is left as it is, with its l2
    DECAY = "decay"  # the Lp decay acts
    FROZEN = "frozen"  # zeros stay zero, and all other weights train without Lp decay


def phase_of(values: Mapping[str, Any]) -> Phase:
    """The phase of a group or a parameter, by its hyperparameters; DECAY where they name none."""
    return Phase(values.get("phase", Phase.DECAY))


def acting_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values with which a step computes: those of its phase, in which only DECAY has the group's own form.

    The equation of `decay.py` covers the other phases: with λ = 0 nothing decays; with p = 1, γ = 0 and a cutoff of 0
    only x = |w| = 0 decays, so that zeros stay.
    """
    phase = phase_of(values)
    if phase is Phase.DECAY:
        return values
    without_form = {"latent": False, "pattern": None, "regrowth_below": 0.0}
    if phase is Phase.OFF or not values["weight_decay"] > 0:
        return {**values, **without_form, "weight_decay": 0.0}
    return {**values, **without_form, "p": 1.0, "precondition": 0.0, "cutoff": 0.0}


_NOT_NEGATIVE = ("lr", "weight_decay", "l2", "precondition", "regrowth_below", "eps", "momentum")
_WAY_OUT = {
    "lr": "set it to 0 to stand still",
    "weight_decay": "it is λ; set it to 0 for no decay",
    "l2": "it is λ2 of the elastic net; set it to 0 for none",
    "precondition": "it is the exponent γ on √v̂; set it to 0 for the plain form",
    "regrowth_below": "it is the least saliency that a weight is taken to have; set it to 0 so that zeros stay zero",
    "eps": "1e-8 is usual",
    "momentum": "set it to 0 for none",
}


def check_hyperparameters(**values: Any) -> None:
    """Raises ValueError for the first value out of its range, with the value, the limit and the way out.

    Knows lr, weight_decay, p, l2, cutoff, regrowth_below, precondition, latent, pattern, input_dim, phase, lag, eps,
    momentum, betas, nesterov; other keys are ignored. A tensor on an accelerator is not looked at, since that would
    make the host wait for it.
    """
    for key, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {key} must be 1-element, not of shape {tuple(value.shape)}; pass a scalar")
            if value.device.type != "cpu":
                continue
            value = value.item()
        if key in _NOT_NEGATIVE and not (_is_real(value) and 0.0 <= value < math.inf):
            raise ValueError(f"{key}={value!r} must be a finite number >= 0; {_WAY_OUT[key]}")
        check = _CHECKS.get(key)
        if check is not None:
            check(value)
    _check_together(values)


def _check_lag(lag: Any) -> None:
    if not (_is_real(lag) and 0.0 <= lag < 1.0):
        raise ValueError(
            f"lag={lag!r} must be a number in [0, 1): the share of the last |w|^(p-2) that is kept; set it to 0 for"
            " none"
        )


def _check_p(p: Any) -> None:
    if not (_is_real(p) and P_MIN <= p <= P_MAX):
        raise ValueError(
            f"p={p!r} must be a number in [{P_MIN:g}, {P_MAX:g}]: |w|^(2-p) leaves fp32's range beyond it. Use p < 1"
            " for exact zeros (0.5 is the default, 0 the log penalty), p = 2 for AdamW's decay"
        )


def _check_cutoff(cutoff: Any) -> None:
    if not (_is_real(cutoff) and cutoff >= 0.0):  # nan is not
        raise ValueError(
            f"cutoff={cutoff!r} must be a number >= 0: weights with a saliency above it do not decay. Use math.inf for"
            " no cap, and phase='off' to switch the decay off"
        )


def _check_betas(betas: Any) -> None:
    for i, beta in enumerate(betas if isinstance(betas, (tuple, list)) and len(betas) == 2 else [betas]):
        if not (_is_real(beta) and 0.0 <= beta < 1.0):
            raise ValueError(f"betas[{i}]={beta!r} must be a number in [0, 1); betas=(0.9, 0.999) is usual")


def _check_latent(latent: Any) -> None:
    if not isinstance(latent, bool):
        raise ValueError(
            f"latent={latent!r} must be True or False: whether weights that are not above the cutoff are zero in the"
            " model, while the optimizer keeps their values"
        )


def _check_input_dim(input_dim: Any) -> None:
    if input_dim is not None and not (type(input_dim) is int and input_dim >= 0):
        raise ValueError(
            f"input_dim={input_dim!r} must be the dimension of inputs, along which the blocks of a pattern lie: 1 for"
            " [outputs, inputs], 0 for [inputs, outputs]; None where lp_dist.attach is to find it"
        )


_PHASES = frozenset(known.value for known in Phase)


def _check_phase(phase: Any) -> None:
    # A member of Phase is no plain string: checkpoints that hold one could not be loaded with weights_only.
    if type(phase) is not str or phase not in _PHASES:
        raise ValueError(
            f"phase={phase!r} must be 'decay', 'off' (no Lp decay) or 'frozen' (zeros stay zero, the rest trains)"
        )


_CHECKS = {
    "lag": _check_lag,
    "p": _check_p,
    "cutoff": _check_cutoff,
    "betas": _check_betas,
    "latent": _check_latent,
    "pattern": nm.check_pattern,
    "input_dim": _check_input_dim,
    "phase": _check_phase,
}


def _check_together(values: dict[str, Any]) -> None:
    """Raises ValueError for values that contradict each other."""
    if values.get("latent") and values.get("cutoff") == math.inf:
        raise ValueError(
            "latent=True with cutoff=inf would make every weight zero; set the cutoff to the saliency below which"
            " weights are to be zero"
        )
    if values.get("pattern") and values.get("latent"):
        raise ValueError(
            f"latent=True and pattern={values['pattern']!r} can't be together: what is kept in its block is never"
            " latent; set latent=False, or pattern=None"
        )
    if values.get("pattern") and values.get("p", 0.0) >= 2:
        raise ValueError(
            f"pattern={values['pattern']!r} needs p < 2, not p={values['p']!r}: x = |w|^(2-p) of a larger weight is"
            " not larger then; use p=0.5, or pattern=None"
        )
    if values.get("nesterov") and not values.get("momentum"):
        raise ValueError(
            f"nesterov=True needs momentum > 0, not momentum={values.get('momentum')!r}; set momentum=0.9, or"
            " nesterov=False"
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
