"""LpOptimizer: what LpAdamW, LpSGD and LpLion have in common, torch's manners and the walk of a step over groups, runs
and slices.

Nothing here knows an engine: DeepSpeed, FSDP2 and DDP hand over ordinary tensors (flat shards) or DTensors, and the
step works on what is local.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lp_dist.optim import decay, hyperparameters, nm
from lp_dist.optim.batching import Row, batches, local
from lp_dist.optim.kernels import dispatch
from lp_dist.optim.latent import Hidden
from lp_dist.optim.nm_rows import Ends, acting, segments_of
from lp_dist.optim.parameter_map import Asked, SegmentMap, effective, part
from lp_dist.optim.state import refuse_all_zero

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS = ("reference", "foreach", "fused")
_ONE = torch.ones(())
LAGGED = "s"  # the state of the non-adiabatic variant
_REFUSED = (
    "implementation='fused' can't step this: {}. Use None, which takes the fused step wherever it can, or 'foreach'"
)


class LpOptimizer(Optimizer):
    """What the three have in common. A subclass gives its state names, its direction, and its own defaults."""

    state_names: tuple[str, ...] = ()
    kernel: str  # the base's name in `kernels`

    def __init__(self, params: Iterable, defaults: dict[str, Any], implementation: str | None) -> None:
        if defaults["capturable"] and implementation in ("reference", "foreach"):
            raise ValueError(
                f"capturable=True needs the fused step, not implementation={implementation!r}; use None or 'fused'"
            )
        if implementation is not None and implementation not in _IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={implementation!r} must be one of {_IMPLEMENTATIONS}, or None to let lp_dist choose"
            )
        self.implementation = implementation
        self._checked: set[int] = set()  # ids of parameters that have been looked at for zeros
        self._counts: dict[int, Tensor] = {}  # `step` by id of its parameter, as far as it is the optimizer's own
        self.segments = SegmentMap()  # filled by lp_dist.attach; without it, each parameter has its group's values
        self.asked = Asked()
        super().__init__(params, defaults)

    # -- torch's own manners --------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError on a bad hyperparameter and TypeError on complex parameters."""
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} takes real parameters, not {param.dtype}; optimize torch.view_as_real(w)"
                    " instead"
                )
            why = (
                self._not_fused(group, param.device)
                if self.implementation == "fused" and param.device.type != "meta"
                else None
            )
            if why is not None:
                self.param_groups.pop()
                raise ValueError(_REFUSED.format(why))
        self.asked.add(group, group.keys() - {"params"})

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "implementation": self.implementation,
            "_checked": set(),
            "_counts": {},
        }  # torch's has groups and state alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("segments", SegmentMap())  # not in a copy: its tensors are others; attach it anew
        self.__dict__.setdefault("asked", Asked())
        self.__dict__.setdefault("_counts", {})
        for group in self.param_groups:  # a checkpoint of an older version, or of AdamW, lacks our keys
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts this one among the defaults of what is unpickled
                    group.setdefault(key, value)
            for param in group["params"]:  # before its values, which may be another base's as well
                self.check_state(self.state.get(param, {}), group)
            self.check(group)
            self._checked.update(
                map(id, group["params"])
            )  # a tensor that died on the way here is no mistake of the user's
        for param_state in self.state.values():
            if "step" in param_state and not isinstance(param_state["step"], Tensor):  # as old checkpoints have it
                param_state["step"] = torch.tensor(float(param_state["step"]))

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for group values out of their range, or that this base can't have."""
        hyperparameters.check_hyperparameters(**{key: value for key, value in group.items() if key != "params"})

    def check_state(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Raises ValueError for the state of another base: it would be left lying, or start anew, without a word."""
        tensors, names = set(state) - {"step"}, set(self._state_names(group))
        if tensors and names - tensors == {LAGGED}:  # universal checkpoints carry Adam's state alone
            logger.warning(
                "the checkpoint has no %s, the lagging |w|^(p-2): it starts anew from the weights as they are", LAGGED
            )
        elif tensors and tensors != names:
            odd = ", ".join(sorted(tensors - names)) or "no " + ", ".join(sorted(names - tensors))
            raise ValueError(
                f"the checkpoint is of another optimizer than {type(self).__name__}: it has {odd} in its state. Go on"
                " with that optimizer, or start without its state"
            )

    # -- the step -------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient are left alone: neither stepped nor decayed.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: a hyperparameter is out of range, or a tensor that is to decay is all zeros at its first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fused: dict[str, dispatch.Work] = {}
        for group in self.param_groups:
            self.check(group)
            for values, rows in self._work(group):
                if self.implementation in (None, "fused"):
                    rows = self._divide(values, rows, fused)
                if self.implementation == "reference":
                    for row in rows:
                        self._update(values, [row], self._reference)
                else:
                    for batch in batches(rows):
                        self._update(values, batch, self._foreach)
        for device_type, work in fused.items():
            dispatch.step(device_type, self.kernel, work)
        return loss

    def _divide(self, values: dict[str, Any], rows: list[Row], fused: dict[str, dispatch.Work]) -> list[Row]:
        """Adds rows that the fused step takes to `fused`, by device; returns the others, which raise if it was asked
        for by name.
        """
        others: list[Row] = []
        ours: dict[str, list[Row]] = {}
        reasons: dict[torch.device, str | None] = {}
        for row in rows:
            device = row[0].device
            if device not in reasons:
                reasons[device] = self._not_fused(values, device)
                ours.setdefault(device.type, [])
            why = reasons[device] or dispatch.refusal(row, bool(values.get("pattern")))
            if why is None:
                ours[device.type].append(row)
            elif self.implementation == "fused":
                raise ValueError(_REFUSED.format(why))
            elif values["capturable"]:
                raise ValueError(
                    f"capturable=True needs the fused step, which can't step this: {why}. Set capturable=False, and"
                    " capture no graph"
                )
            else:
                others.append(row)
        for device_type, taken in ours.items():
            if taken:
                fused.setdefault(device_type, []).append((values, taken))
        return others

    def _not_fused(self, values: dict[str, Any], device: torch.device) -> str | None:
        if values.get("lag"):
            return f"lag={values['lag']}, which only the other implementations have"
        if values.get("precondition", 0.0) > dispatch.LARGEST_GAMMA:
            return f"precondition={values['precondition']}; it takes at most {dispatch.LARGEST_GAMMA}"
        why = dispatch.unavailable(device)
        if why is not None and self.implementation is None:
            _tell(device.type, why)
        return why

    def _work(self, group: dict[str, Any]) -> list[tuple[dict[str, Any], list[Row]]]:
        """The group's rows, by the values that hold for them: one list unless parameters have values of their own, or
        blocks lie on several ranks.
        """
        params = [param for param in group["params"] if param.grad is not None]
        names = self._state_names(group)
        states = [self._state_of(param, group, names) for param in params]
        capturable = group["capturable"]
        counts = [state["step"] for state in states]
        if (
            counts
        ):  # _ONE, a tensor, since a number would be wrapped into one for each. On an accelerator a number is no wait.
            torch._foreach_add_(counts, 1 if capturable else _ONE)
        work: dict[int, tuple[dict[str, Any], list[Row]]] = {}
        ends = Ends()
        for param, state, count in zip(params, states, counts):
            step = count.item() if count.device.type == "cpu" else count
            tensors = self._local(param, [state[name] for name in names])
            numel = tensors[0].numel()
            for offset, length, own in self.segments.runs(param, numel):
                if id(own) not in work:
                    work[id(own)] = acting(effective(group, own)), []
                values, rows = work[id(own)]
                if values.get("pattern"):
                    for segment in segments_of(self.segments, param, tensors[0], offset, length):
                        rows.extend(ends.whole(segment, values, (*tensors, step)))
                else:
                    run = tensors if length == numel else [part(t, offset, length) for t in tensors]
                    rows.append((*run, step))
        return [*work.values(), *ends.divided(self.segments, group, self._keys)]

    def _keys(self, values: dict[str, Any], row: Row) -> Tensor:
        """What the entries of a row are ranked by in their blocks, by the very arithmetic that ranks a whole block.
        The row is used up.
        """
        device = row[0].device
        if (
            self.implementation in (None, "fused")
            and self._not_fused(values, device) is None
            and dispatch.refusal(row) is None
        ):
            return nm.keys_of(dispatch.pull(device.type, self.kernel, values, row), smallest=True)
        return nm.keys_of(self._stepped(values, [row], self._foreach)[1][0])

    def _state_of(self, param: Tensor, group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
        if id(param) not in self._checked:
            if param not in self.segments:  # else attach has looked, over all ranks
                refuse_all_zero(param, group)
            self._checked.add(id(param))
        state = self.state[param]
        if "step" not in state:
            # On the CPU as torch's: reading it makes no GPU wait. Where a graph counts the steps, it must be on the
            # device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
        if (
            self._counts.get(id(param)) is not state["step"]
        ):  # DeepSpeed's loader of universal checkpoints gives all tensors one and the same
            state["step"] = self._counts[id(param)] = state["step"].clone()
        for name in names:
            if name not in state:  # |w|^(p-2) is beyond 16 bits
                dtype = torch.promote_types(param.dtype, torch.float32) if name == LAGGED else param.dtype
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _local(self, param: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The weight, its gradient and its state, as far as they lie on this rank."""
        grad = param.grad
        if grad.layout is not torch.strided:
            raise TypeError(
                f"{type(self).__name__} takes dense gradients, not sparse ones; build the embedding with sparse=False"
            )
        if type(grad) is Tensor and type(param) is Parameter:
            return [param, grad, *states]
        if getattr(grad, "placements", None) != getattr(param, "placements", None):
            grad = grad.redistribute(
                placements=param.placements
            )  # a DTensor gradient that was not reduced to the shard yet
        return [local(t) for t in (param, grad, *states)]

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self.state_names, LAGGED) if group["lag"] else self.state_names

    def _update(self, group: dict[str, Any], rows: list[Row], direction: Callable[..., list[Tensor] | None]) -> None:
        """w_new of the equation for some rows: x from the old weights, the base's step, then the decay."""
        columns, x, denom, hidden = self._stepped(group, rows, direction)
        values = {
            "lr": float(group["lr"]),
            **{key: group[key] for key in ("weight_decay", "p", "l2", "cutoff", "floor")},
        }
        if x is not None and group.get("pattern"):
            nm.spare_(x, *nm.parse(group["pattern"]))
        if hidden:
            hidden.decay_(*columns[:3], denom, x, group["precondition"], values)
        else:
            decay.decay_(columns[0], x, **values)

    def _stepped(self, group: dict[str, Any], rows: list[Row], direction: Callable[..., list[Tensor] | None]) -> tuple:
        """Steps the base. Gives the columns of the rows (weights, gradients, each state tensor), x, √v̂+ε where there
        is one, and what was hidden.
        """
        columns = [list(column) for column in zip(*rows)]
        weights, grads = columns[:2]
        lagged = columns.pop(-2) if group["lag"] else None
        if group["maximize"] or any(g.dtype != w.dtype for w, g in zip(weights, grads)):
            columns[1] = [(-g if group["maximize"] else g).to(w.dtype) for w, g in zip(weights, grads)]
        lr = float(group["lr"])
        x = hidden = None
        if (
            group.get("latent") and group["weight_decay"] > 0 and group["cutoff"] > 0
        ):  # else zeros are frozen, or nothing decays
            hidden = Hidden(weights, columns[2])
        if hidden or decay.is_active(lr, group["weight_decay"], group["cutoff"]):
            x = decay.resistance(hidden.latents if hidden else weights, group["p"])
            if (
                lagged is not None and group["cutoff"] > 0
            ):  # else zeros are frozen: only whether a weight is zero counts
                decay.lag_(x, lagged, group["lag"])
        denom = direction(group, lr, *columns)
        if x is not None and group.get("precondition"):
            decay.precondition_(x, denom, group["precondition"])
        return columns, x, denom, hidden

    # Each base gives its direction twice. Both get the group, the learning rate and the columns of the rows (weights,
    # gradients, each state tensor, steps), step weights and state in place (u of the equation), and return √v̂+ε of
    # each weight where the base has it.
    _reference: Callable[..., list[Tensor] | None]  # one row, in plain torch: the equation
    _foreach: Callable[..., list[Tensor] | None]  # many rows, a call for all of them


@cache
def _tell(device_type: str, why: str) -> None:
    logger.warning(
        "the fused step is not used on %s: %s. The foreach step is used instead, which takes several times as long",
        device_type,
        why,
    )
