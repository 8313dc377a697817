"""Ranges of the hyperparameters, and what a param group holds in the phases without decay."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from lp_dist.optim import nm

P_MIN, P_MAX = -4.0, 4.0


_NOT_NEGATIVE = ("lr", "weight_decay", "l2", "precondition", "floor", "eps", "momentum")


_WAY_OUT = {
    "lr": "set it to 0 to stand still",
    "weight_decay": "it is λ; set it to 0 for no decay",
    "l2": "it is λ2 of the elastic net; set it to 0 for none",
    "precondition": "it is the exponent γ on √v̂; set it to 0 for the plain form",
    "floor": "it is the least x that a weight is taken to have; set it to 0 so that zeros stay zero",
    "eps": "1e-8 is usual",
    "momentum": "set it to 0 for none",
}


def check_hyperparameters(**values: Any) -> None:
    """Raises ValueError for the first value out of its range, with the value, the limit and the way out.

    Knows lr, weight_decay, p, l2, cutoff, floor, precondition, latent, pattern, lag, eps, momentum, betas, nesterov;
    other keys are ignored. A tensor on an accelerator is not looked at, since that would make the host wait for it.
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
        if key == "lag" and not (_is_real(value) and 0.0 <= value < 1.0):
            raise ValueError(
                f"lag={value!r} must be a number in [0, 1): the share of the last |w|^(p-2) that is kept; set it to 0"
                " for none"
            )
        if key == "p" and not (_is_real(value) and P_MIN <= value <= P_MAX):
            raise ValueError(
                f"p={value!r} must be a number in [{P_MIN:g}, {P_MAX:g}]: |w|^(2-p) leaves fp32's range beyond it. Use"
                " p < 1 for exact zeros (0.5 is the default, 0 the log penalty), p = 2 for AdamW's decay"
            )
        if key == "cutoff" and not (_is_real(value) and not math.isnan(value)):
            raise ValueError(
                f"cutoff={value!r} must be a number and not nan: weights with x above it feel no decay. Use math.inf"
                " for no cap, a negative one to switch the decay off"
            )
        if key == "betas":
            for i, beta in enumerate(value if isinstance(value, (tuple, list)) and len(value) == 2 else [value]):
                if not (_is_real(beta) and 0.0 <= beta < 1.0):
                    raise ValueError(f"betas[{i}]={beta!r} must be a number in [0, 1); betas=(0.9, 0.999) is usual")
    if "latent" in values and not isinstance(values["latent"], bool):
        raise ValueError(
            f"latent={values['latent']!r} must be True or False: whether weights that are not above the cutoff are"
            " kept out of the model"
        )
    if values.get("latent") and values.get("cutoff") == math.inf:
        raise ValueError(
            "latent=True with cutoff=inf would hide every weight; set the cutoff to the x below which weights are to"
            " be zero"
        )
    nm.check(values.get("pattern"))
    if values.get("pattern") and values.get("latent"):
        raise ValueError(
            f"latent=True and pattern={values['pattern']!r} can't be together: what is spared in its block is never"
            " hidden; set latent=False, or pattern=None"
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


# Group values for a phase in which the base optimizer's step is left exactly as it is. λ itself stays in the groups,
# so that a group that decays is known by weight_decay > 0 at any time, also after a resume in the middle of such a
# phase.
OFF = {"cutoff": -1.0}  # x > cutoff for every weight, zeros included: none decays


KEPT = {"cutoff": 0.0}  # x = 0: dead, by the group's own form, which comes back as the window begins


FROZEN = {"p": 1.0, "precondition": 0.0, "cutoff": 0.0}  # x = |w| > 0: free; x = 0: dead. Zeros stay, survivors train
