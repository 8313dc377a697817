"""add_lp_decay: the Lp decay on any torch optimizer, through torch's step pre- and post-hooks."""

from __future__ import annotations

import logging
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lp_dist.errors import UsageError
from lp_dist.optim import decay
from lp_dist.optim.attachable import AttachedState
from lp_dist.optim.base import LpOptimizer
from lp_dist.optim.batching import to_local
from lp_dist.optim.hyperparameters import Phase, acting_values, check_hyperparameters
from lp_dist.optim.parameter_map import ParameterMap, effective_values, flat_view
from lp_dist.optim.state import IN_WINDOW, STEP_COUNT, refuse_all_zero, refuse_unattended_window

logger = logging.getLogger(__name__)

# torch's own optimizers that treat each parameter by itself and count its steps in its state: stepping them a few
# parameters at a time gives the same weights. Exact types, since a subclass may do anything.
_PER_PARAMETER = tuple(
    getattr(torch.optim, name)
    for name in (
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "Adamax",
        "AdamW",
        "ASGD",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
    if hasattr(torch.optim, name)
)

# Keys that a checkpoint must not change. Others may be the optimizer's own state (Prodigy's d, FusedAdam's step).
_REQUESTED = ("lr", "weight_decay", "p", "l2", "cutoff", "regrowth_below", "phase", "betas", "eps", "momentum")
_OF_DECAY = ("weight_decay", "p", "l2", "cutoff", "regrowth_below")

# The handle of each optimizer that has one. The optimizer's hooks keep it alive.
_HANDLES: weakref.WeakKeyDictionary[Optimizer, weakref.ref[LpDecay]] = weakref.WeakKeyDictionary()


def handle_of(optimizer: Any) -> LpDecay | None:
    """The handle that `add_lp_decay` returned for this optimizer; None where it has no Lp decay, or its own."""
    handle = _HANDLES.get(optimizer) if isinstance(optimizer, Optimizer) else None
    return handle() if handle is not None else None


class _BeforeStep(NamedTuple):
    """What the decay needs from before a step: some weights, the values that hold for them, and their saliencies."""

    values: dict[str, Any]
    weights: list[Tensor]
    x: list[Tensor] | None


def add_lp_decay(
    optimizer: Optimizer,
    *,
    p: float = 0.5,
    l2: float = 0.0,
    cutoff: float = math.inf,
    regrowth_below: float = 0.0,
    one_at_a_time: bool | None = None,
) -> LpDecay:
    """Gives `optimizer` (8-bit Adam, Adafactor, Muon, DeepSpeedCPUAdam, ...) the decoupled Lp decay of arXiv
    2404.10824.

    λ is each group's `weight_decay`, which the optimizer itself no longer sees: it is 0 while the base steps, so
    nothing is decayed twice. α is the group's `lr`.

    The decay needs the weights from before the step, and memory for them: one temporary of the largest decayed tensor
    where the optimizer can be stepped a few parameters at a time, else one copy of all decayed weights (fp32 for
    16-bit ones). Under ZeRO the tensors are the flat shards; stage 3 steps them one sub-group at a time anyway.

    Args:
        optimizer: any torch optimizer but LBFGS and those of lp_dist, with a number `lr` in each group.
        p: exponent of the norm; becomes a group key, as do the next three, with this value where a group has none.
        l2: λ2 of the elastic net.
        cutoff: weights with a saliency above it feel no Lp term.
        regrowth_below: a saliency below this is taken as this.
        one_at_a_time: None chooses: True for torch's own per-parameter optimizers, else False. True is your word that
            the optimizer treats each parameter by itself and counts no calls of `step()`.
    Returns:
        A handle: `.memory` is "largest tensor" or "copy", `.remove()` takes the decay off again.
    Raises:
        ValueError: the optimizer is one of lp_dist, LBFGS, has the decay already, keeps other weights than the model's
            (schedule-free), or a hyperparameter is bad. At the first step: its state holds a copy of the weights.
    """
    defaults = {
        "p": p,
        "l2": l2,
        "cutoff": cutoff,
        "regrowth_below": regrowth_below,
        "phase": Phase.DECAY.value,
        IN_WINDOW: False,
    }
    return LpDecay(optimizer, defaults, one_at_a_time)


class LpDecay:
    """The handle that `add_lp_decay` returns.

    Attributes:
        attached: what `lp_dist.attach` leaves here, as on the optimizers of lp_dist.
        one_at_a_time: whether the optimizer is stepped a few parameters at a time.
    """

    def __init__(self, optimizer: Optimizer, defaults: dict[str, Any], one_at_a_time: bool | None) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, LpOptimizer):
            raise ValueError(f"{name} has the Lp decay built in; set its weight_decay and p instead")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS takes many inner steps a call, so there is no weight 'before the step'; use another optimizer"
            )
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"{name} has a train() and an eval(), by which it changes the model's weights for others that it keeps"
                " (schedule-free): zeros would not be in what is saved. Use an optimizer with one copy of the weights"
            )
        if handle_of(optimizer) is not None:
            raise ValueError(
                f"this {name} has the Lp decay already; call .remove() of the handle that add_lp_decay returned first"
            )
        self._optimizer, self._defaults = optimizer, defaults
        for group in optimizer.param_groups:
            self.check(group)
            for param in group["params"]:
                refuse_all_zero(param, {**defaults, **group})
        for group in optimizer.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
        self.one_at_a_time = type(optimizer) in _PER_PARAMETER if one_at_a_time is None else one_at_a_time
        self.attached = AttachedState()
        for group in optimizer.param_groups:
            self.attached.requested.add(group, _REQUESTED)
        self._has_stepped = False
        # What must be put back or used after the step; all empty between steps.
        self._before_step: list[_BeforeStep] = []
        self._weight_decays: list[tuple[dict, float]] = []  # group, λ, which the base must not see
        self._params: list[tuple[dict, list[Tensor]]] = []  # group, its parameters, while stepped in batches
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            # A step that raised must not be saved half done.
            optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
        ]
        _HANDLES[optimizer] = weakref.ref(self)
        cost = (
            "one temporary of the largest decayed tensor"
            if self.one_at_a_time
            else "a copy of the decayed weights during each step"
        )
        logger.info("Lp decay on %s: costs %s", name, cost)

    @property
    def parameter_map(self) -> ParameterMap:
        """Which parameter lies where in the stepped tensors, and what single parameters override."""
        return self.attached.parameter_map

    @property
    def memory(self) -> str:
        """What the decay costs during a step: "largest tensor", or "copy" (of all decayed weights)."""
        return "largest tensor" if self.one_at_a_time else "copy"

    def remove(self) -> None:
        """Takes the decay off: from now on the optimizer does with weight_decay what it did before."""
        self._restore()
        self.attached.hooks.remove()
        for hook in self._hooks:
            hook.remove()
        _HANDLES.pop(self._optimizer, None)

    def begin_later(self) -> None:
        """Puts its own hook before a step behind those that were registered since: it may step the parameters then."""
        self._hooks[0].remove()
        self._hooks[0] = self._optimizer.register_step_pre_hook(self._before)

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for group values out of their range, or that the decay lacks."""
        if group.get("precondition"):
            raise ValueError(
                f"precondition={group['precondition']} needs Adam's second moments, of which add_lp_decay knows"
                " nothing; use LpAdamW, or leave it out"
            )
        if group.get("latent"):
            raise ValueError(
                "latent=True keeps latent weights where Adam has its first moments, of which add_lp_decay knows"
                " nothing; use LpAdamW, or leave it out"
            )
        group = {**self._defaults, **group}  # of a group that was added later, and not stepped yet
        if group.get("pattern"):
            raise ValueError(
                f"pattern={group['pattern']!r} is for LpAdamW, LpSGD and LpLion; use one of these, or leave it out"
            )
        for key, way_out in (
            ("lr", "with Adafactor set relative_step=False and an lr"),
            ("weight_decay", "give the groups a weight_decay, λ"),
        ):
            if group.get(key) is None:
                raise ValueError(
                    f"a group of {type(self._optimizer).__name__} has {key}={group.get(key)!r}, but the decay needs a"
                    f" number; {way_out}"
                )
        check_hyperparameters(**{key: group[key] for key in ("lr", "phase", *_OF_DECAY)})

    # -- around a step --------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._restore()
        if self.attached.before_step is not None:
            self.attached.before_step()
        args, kwargs, changed = _evaluate_closure(args, kwargs)
        groups = optimizer.param_groups
        for group in groups:
            for key, value in self._defaults.items():
                group.setdefault(key, value)  # a group that was added later
            self.check(group)
            if not self.attached.in_window:
                refuse_unattended_window(group)
        self._weight_decays = [(group, group["weight_decay"]) for group in groups]
        for group in groups:
            group["weight_decay"] = 0.0
        if not self.one_at_a_time:
            self._before_step = [
                saved
                for group, weight_decay in self._weight_decays
                for saved in self._save({**group, "weight_decay": weight_decay}, _with_grad(group["params"]))
            ]
        else:
            try:
                self._step_in_batches(optimizer)
            except BaseException:
                self._restore()
                raise
        return (args, kwargs) if changed else None

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._has_stepped:
            self._refuse_copies(optimizer)
            self._has_stepped = True
        self._apply(optimizer)
        self._restore()
        for group in optimizer.param_groups:
            for param in _with_grad(group["params"]):
                state = optimizer.state[param]
                if "step" not in state:
                    # Plain SGD counts none, and `steps_taken` must know which were skipped. No tensor: torch would
                    # load it in the dtype of the weight.
                    state[STEP_COUNT] = state.get(STEP_COUNT, 0) + 1

    def _refuse_copies(self, optimizer: Optimizer) -> None:
        """Raises UsageError where the state holds the stepped weights once more: the next step would begin there."""
        if type(optimizer).__module__.startswith("torch."):
            return  # none of them does; ASGD's average is for its user to take
        for group in optimizer.param_groups:
            for param in _with_grad(group["params"]):
                weights = to_local(param)
                for key, value in optimizer.state[param].items():
                    copy = to_local(value) if isinstance(value, Tensor) else None
                    if copy is None or copy.numel() < 2 or copy.shape != weights.shape or not weights.any():
                        continue
                    if torch.equal(copy.to(weights.dtype), weights):
                        raise UsageError(
                            f"{type(optimizer).__name__} keeps a copy of the weights in its state ({key!r}), and"
                            " writes it over them at each step: zeros would not stay. Use an optimizer without masters"
                            " of its own; lp_dist's keep bf16 weights exact under DeepSpeed and FSDP2"
                        )

    def _step_in_batches(self, optimizer: Optimizer) -> None:
        """Steps and decays a few parameters at a time; leaves the groups empty, so that the step proper has nothing to
        do.
        """
        self._params = [(group, group["params"]) for group in optimizer.param_groups]
        pairs = [(i, param) for i, (_, params) in enumerate(self._params) for param in _with_grad(params)]
        group_values = [{**group, "weight_decay": weight_decay} for group, weight_decay in self._weight_decays]
        decaying = {
            id(param)
            for i, param in pairs
            if any(values["weight_decay"] or values["l2"] for values in self._values_of(group_values[i], param))
        }
        decayed = [(i, param) for i, param in pairs if id(param) in decaying]
        others = [(i, param) for i, param in pairs if id(param) not in decaying]
        # Without the hooks: those run once a step. torch wraps `step` when an optimizer is made.
        step = type(optimizer).step.__wrapped__  # type: ignore[attr-defined]  # of the wrapper
        for batch in [others, *_packed(decayed)]:
            for i, (group, _) in enumerate(self._params):
                group["params"] = [param for j, param in batch if j == i]
            self._before_step = [
                saved
                for (group, _), values in zip(self._params, group_values)
                for saved in self._save(values, group["params"])
            ]
            step(optimizer)
            self._apply(optimizer)
        for group, _ in self._params:
            group["params"] = []

    def _values_of(self, group: dict[str, Any], param: Tensor) -> list[dict[str, Any]]:
        """The values that hold for each span of a parameter."""
        spans = self.parameter_map.value_spans(param, to_local(param).numel())
        return [acting_values(effective_values(group, span.overrides)) for span in spans]

    @torch.no_grad()
    def _save(self, group: dict[str, Any], params: list[Tensor]) -> list[_BeforeStep]:
        """What the decay needs from before the step, by the values that hold."""
        by_values: dict[int, tuple[dict, list[Tensor]]] = {}
        for param in params:
            local = to_local(param)
            for offset, length, overrides in self.parameter_map.value_spans(param, local.numel()):
                if id(overrides) not in by_values:
                    by_values[id(overrides)] = acting_values(effective_values(group, overrides)), []
                by_values[id(overrides)][1].append(flat_view(local, offset, length))
        return [
            _BeforeStep(
                values,
                weights,
                decay.saliency(weights, values["p"])
                if decay.is_active(float(values["lr"]), values["weight_decay"])
                else None,
            )
            for values, weights in by_values.values()
        ]

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer) -> None:
        skip = getattr(optimizer, "found_inf", None)  # AMP's GradScaler: a fused base leaves out the step by itself
        for values, weights, x in self._before_step:
            decay.decay_(weights, x, lr=float(values["lr"]), skip=skip, **{key: values[key] for key in _OF_DECAY})
        self._before_step = []

    def _restore(self) -> None:
        for group, weight_decay in self._weight_decays:
            if group["weight_decay"] == 0.0:  # else a schedule has set it anew after a step that raised
                group["weight_decay"] = weight_decay
        for group, params in self._params:
            group["params"] = params
        self._before_step, self._weight_decays, self._params = [], [], []


def _with_grad(params: list[Tensor]) -> list[Tensor]:
    # The base leaves the others alone, and so does the decay.
    return [param for param in params if param.grad is not None]


def _evaluate_closure(args: tuple, kwargs: dict) -> tuple[tuple, dict, bool]:
    """Calls the closure now, as gradients must be there before x is taken, and hands its loss on in a new one."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return args, kwargs, False
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}, True
    return (args[0], lambda: loss, *args[2:]), kwargs, True


def _packed(pairs: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Batches of parameters, none with more elements than the largest parameter has."""
    limit = max((to_local(param).numel() for _, param in pairs), default=0)
    batches: list[list[tuple[int, Tensor]]] = []
    size = 0
    for pair in pairs:
        numel = to_local(pair[1]).numel()
        if not batches or size + numel > limit:
            batches.append([])
            size = 0
        batches[-1].append(pair)
        size += numel
    return batches
