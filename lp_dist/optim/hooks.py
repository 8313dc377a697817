"""add_lp_decay: the Lp decay on any torch optimizer, through torch's step pre- and post-hooks."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lp_dist.optim import decay, hyperparameters
from lp_dist.optim.batching import local
from lp_dist.optim.optimizers import LpOptimizer
from lp_dist.optim.parameter_map import Asked, SegmentMap, effective, part
from lp_dist.optim.state import COUNT, refuse_all_zero

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

_ASKED = ("lr", "weight_decay", "p", "l2", "cutoff", "floor", "betas", "eps", "momentum")


def add_lp_decay(
    optimizer: Optimizer,
    *,
    p: float = 0.5,
    l2: float = 0.0,
    cutoff: float = math.inf,
    floor: float = 0.0,
    one_at_a_time: bool | None = None,
) -> LpDecay:
    """Gives `optimizer` (8-bit Adam, Adafactor, Muon, DeepSpeedCPUAdam, ...) the decoupled Lp decay of arXiv
    2404.10824.

    λ is each group's `weight_decay`, which the optimizer itself no longer sees: it is 0 while the base steps, so
    nothing is decayed twice. p, l2, cutoff and floor become group keys, with these values where a group has none of
    its own. α is the group's `lr`.

    The decay needs the weights from before the step, hence memory: one temporary of the largest decayed tensor where
    the optimizer can be stepped a few parameters at a time, else one copy of all decayed weights (fp32 for 16-bit
    ones). Under ZeRO the tensors are the flat shards; stage 3 steps them one sub-group at a time anyway.

    Args:
        one_at_a_time: None chooses: True for torch's own per-parameter optimizers, else False. True is your word that
            the optimizer treats each parameter by itself and counts no calls of `step()`.
    Returns:
        A handle: `.memory` is "largest tensor" or "copy", `.remove()` takes the decay off again.
    Raises:
        ValueError: the optimizer is one of ours, LBFGS, has the decay already, or a hyperparameter is bad.
    """
    return LpDecay(optimizer, {"p": p, "l2": l2, "cutoff": cutoff, "floor": floor}, one_at_a_time)


class LpDecay:
    """The handle that `add_lp_decay` returns."""

    def __init__(self, optimizer: Optimizer, defaults: dict[str, float], one_at_a_time: bool | None) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, LpOptimizer):
            raise ValueError(f"{name} has the Lp decay built in; set its weight_decay and p instead")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS takes many inner steps a call, so there is no weight 'before the step'; use another optimizer"
            )
        if hasattr(optimizer, "lp_decay"):
            raise ValueError(f"this {name} has the Lp decay already; call .lp_decay.remove() first")
        self._optimizer = optimizer
        for group in optimizer.param_groups:
            self.check({**defaults, **group})
            for param in group["params"]:
                refuse_all_zero(param, {**defaults, **group})
        for group in optimizer.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
        self.one_at_a_time = type(optimizer) in _PER_PARAMETER if one_at_a_time is None else one_at_a_time
        self._defaults = defaults
        self.segments = SegmentMap()  # filled by lp_dist.attach, as in our own optimizers
        self.asked = Asked()
        for group in optimizer.param_groups:
            self.asked.add(group, _ASKED)
        # What must be put back or used after the step; all empty between steps.
        self._olds: list[
            tuple[dict, list[Tensor], list[Tensor] | None]
        ] = []  # values, weights, their x before the step
        self._decays: list[tuple[dict, float]] = []  # group, λ, which the base must not see
        self._params: list[tuple[dict, list[Tensor]]] = []  # group, its parameters, while stepped in batches
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(
                lambda _: self._restore()
            ),  # a step that raised must not be saved half done
        ]
        optimizer.lp_decay = self
        logger.info(
            "Lp decay on %s: costs %s",
            name,
            (
                "one temporary of the largest decayed tensor"
                if self.one_at_a_time
                else "a copy of the decayed weights during each step"
            ),
        )

    @property
    def memory(self) -> str:
        """What the decay costs during a step: "largest tensor", or "copy" (of all decayed weights)."""
        return "largest tensor" if self.one_at_a_time else "copy"

    def remove(self) -> None:
        """Takes the decay off: from now on the optimizer does with weight_decay what it did before."""
        self._restore()
        if getattr(self, "grouped", None) is not None:
            self.grouped.remove()  # `attach` has put it here
        for handle in self._handles:
            handle.remove()
        del self._optimizer.lp_decay

    def begin_later(self) -> None:
        """Puts its own hook before a step behind those that were registered since: it may step the parameters then."""
        self._handles[0].remove()
        self._handles[0] = self._optimizer.register_step_pre_hook(self._before)

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for group values out of their range, or that the decay lacks."""
        if group.get("precondition"):
            raise ValueError(
                f"precondition={group['precondition']} needs Adam's second moments, of which add_lp_decay knows"
                " nothing; use LpAdamW, or leave it out"
            )
        if group.get("latent"):
            raise ValueError(
                "latent=True keeps hidden weights where Adam has its first moments, of which add_lp_decay knows"
                " nothing; use LpAdamW, or leave it out"
            )
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
        hyperparameters.check_hyperparameters(
            **{key: group[key] for key in ("lr", "weight_decay", "p", "l2", "cutoff", "floor")}
        )

    # -- around a step --------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._restore()
        args, kwargs, changed = _evaluate_closure(args, kwargs)
        groups = optimizer.param_groups
        for group in groups:
            for key, value in self._defaults.items():
                group.setdefault(key, value)  # a group that was added later
            self.check(group)
        self._decays = [(group, group["weight_decay"]) for group in groups]
        for group in groups:
            group["weight_decay"] = 0.0
        if not self.one_at_a_time:
            self._olds = [
                old
                for group, lam in self._decays
                for old in self._old({**group, "weight_decay": lam}, _with_grad(group["params"]))
            ]
        else:
            try:
                self._step_in_batches(optimizer)
            except BaseException:
                self._restore()
                raise
        return (args, kwargs) if changed else None

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._apply(optimizer)
        self._restore()
        for group in optimizer.param_groups:
            for param in _with_grad(group["params"]):
                state = optimizer.state[param]
                if (
                    "step" not in state
                ):  # plain SGD counts none; `attachment.steps_taken` must know those that were skipped
                    state[COUNT] = state.get(COUNT, 0) + 1  # no tensor: torch would load it in the dtype of the weight

    def _step_in_batches(self, optimizer: Optimizer) -> None:
        """Steps and decays a few parameters at a time; leaves the groups empty, so that the step proper has nothing to
        do.
        """
        self._params = [(group, group["params"]) for group in optimizer.param_groups]
        pairs = [(i, param) for i, (group, params) in enumerate(self._params) for param in _with_grad(params)]
        values = [{**group, "weight_decay": lam} for group, lam in self._decays]
        decays = {
            id(param)
            for i, param in pairs
            if any(v["weight_decay"] or v["l2"] for v, *_ in self._runs(values[i], param))
        }
        decayed = [(i, param) for i, param in pairs if id(param) in decays]
        rest = [(i, param) for i, param in pairs if id(param) not in decays]
        step = type(optimizer).step.__wrapped__  # without the hooks, ours and others': those run once a step
        for batch in [rest, *_packed(decayed)]:
            for i, (group, _) in enumerate(self._params):
                group["params"] = [param for j, param in batch if j == i]
            self._olds = [old for (group, _), v in zip(self._params, values) for old in self._old(v, group["params"])]
            step(optimizer)
            self._apply(optimizer)
        for group, _ in self._params:
            group["params"] = []

    def _runs(self, values: dict, param: Tensor) -> list[tuple[dict, int, int]]:
        """The parts of a parameter, each with the values that hold for it."""
        return [
            (effective(values, own), offset, length)
            for offset, length, own in self.segments.runs(param, local(param).numel())
        ]

    @torch.no_grad()
    def _old(self, values: dict, params: list[Tensor]) -> list[tuple[dict, list[Tensor], list[Tensor] | None]]:
        """What the decay needs from before the step: the weights, by the values that hold for them, and their x."""
        weights: dict[int, tuple[dict, list[Tensor]]] = {}
        for param in params:
            for offset, length, own in self.segments.runs(param, local(param).numel()):
                weights.setdefault(id(own), (effective(values, own), []))[1].append(part(local(param), offset, length))
        return [
            (
                v,
                w,
                (
                    decay.resistance(w, v["p"])
                    if decay.is_active(float(v["lr"]), v["weight_decay"], v["cutoff"])
                    else None
                ),
            )
            for v, w in weights.values()
        ]

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer) -> None:
        skip = getattr(optimizer, "found_inf", None)  # AMP's GradScaler: a fused base leaves out the step by itself
        for values, weights, x in self._olds:
            decay.decay_(
                weights,
                x,
                lr=float(values["lr"]),
                skip=skip,
                **{key: values[key] for key in ("weight_decay", "p", "l2", "cutoff", "floor")},
            )
        self._olds = []

    def _restore(self) -> None:
        for group, lam in self._decays:
            if group["weight_decay"] == 0.0:  # else a schedule has set it anew after a step that raised
                group["weight_decay"] = lam
        for group, params in self._params:
            group["params"] = params
        self._olds, self._decays, self._params = [], [], []


def _with_grad(params: list[Tensor]) -> list[Tensor]:
    return [
        param for param in params if param.grad is not None
    ]  # the base leaves the others alone, and so does the decay


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
    limit = max((local(param).numel() for _, param in pairs), default=0)
    batches, size = [], 0
    for pair in pairs:
        numel = local(pair[1]).numel()
        if not batches or size + numel > limit:
            batches.append([])
            size = 0
        batches[-1].append(pair)
        size += numel
    return batches
