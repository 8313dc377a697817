"""What an optimizer's state tells: how many steps were taken, and whether a parameter that decays is all zeros."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim.hyperparameters import Phase, phase_of

logger = logging.getLogger(__name__)

# Where `add_lp_decay` counts steps of an optimizer that counts none itself, such as plain SGD.
STEP_COUNT = "lp_decay_step"
# The group key that says that a target's window is open: set by the target, and so in every saved state.
IN_WINDOW = "in_window"


def steps_taken(optimizer: Optimizer) -> int:
    """Steps that the optimizer has really taken, as its state counts them; 0 before the first.

    A step that was skipped, as after an fp16 overflow, is none.
    """
    counts = [state[key] for state in optimizer.state.values() for key in ("step", STEP_COUNT) if key in state]
    on_device = [count for count in counts if isinstance(count, Tensor) and count.device.type != "cpu"]
    if on_device:  # a fused base keeps them there: one wait for all of them
        counts = [count for count in counts if not (isinstance(count, Tensor) and count.device.type != "cpu")]
        counts.append(torch.stack([count.reshape(()).float() for count in on_device]).max())
    return max(map(int, counts), default=0)


def refuse_all_zero(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError if the parameter is to decay by its group's values and could never move."""
    if not (group["weight_decay"] > 0 and group["p"] < 2) or phase_of(group) is Phase.OFF:
        return
    # Only what is whole here is judged. A 1-D tensor may be a flat shard that holds nothing but an engine's padding on
    # this rank, and the local part of a DTensor says nothing. `param_groups` and `attach` look over all ranks.
    if param.ndim >= 2 and param.numel() and not hasattr(param, "to_local") and not bool(param.any()):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is to decay, but it is all zeros: zero absorbs for p < 2, so"
            " it could never move. Put it into a group with weight_decay=0 (lp_dist.param_groups does so by itself),"
            " or initialise it"
        )


# From here on the zeros of a model are no accident of its initialisation.
MANY_ZEROS = 0.1


def warn_of_free_zeros(zeros: int, elements: int) -> None:
    """Warns of weights that are zero in a model which comes sparse, where nothing keeps them."""
    if elements and zeros >= MANY_ZEROS * elements:
        logger.warning(
            "%.1f %% of %s weights are zero, and nothing keeps them: they will grow. To keep them:"
            ' LpAdamW(param_groups(model, 1.0), lr=..., phase="frozen")',
            100 * zeros / elements,
            f"{elements:,}",
        )


def mark_window(optimizer: Optimizer, is_open: bool) -> None:
    """Notes in the param groups, which are saved with the state, whether a target's window is open."""
    for group in optimizer.param_groups:
        group[IN_WINDOW] = is_open


def refuse_unattended_window(group: dict[str, Any]) -> None:
    """Raises UsageError for a state from the middle of a target's window, where no target goes on with it."""
    if group.get(IN_WINDOW):
        raise UsageError(
            "the optimizer's state is from the middle of a target's window, and no target goes on with it: zeros would"
            " grow again, from latent weights that lie where the momentum is kept. Give the same target (LpCallback;"
            " attach, and load_state_dict() of what it returned), or start anew from the saved model without its"
            " optimizer state"
        )
