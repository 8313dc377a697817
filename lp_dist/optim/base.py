"""LpOptimizer: what LpAdamW, LpSGD and LpLion have in common, and the walk of a step over param groups and tensors.

Nothing here knows an engine. DeepSpeed, FSDP2 and DDP hand over ordinary tensors (flat shards) or DTensors, and the
step works on what is local.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lp_dist.optim import decay, nm
from lp_dist.optim.acting import ActingValues, KeptValues
from lp_dist.optim.attachable import AttachedState
from lp_dist.optim.batching import RowCopy, StepRow, batches, copies, count_zeros, to_local
from lp_dist.optim.hyperparameters import check_hyperparameters, plain_value
from lp_dist.optim.kernels import dispatch
from lp_dist.optim.latent import LatentWeights
from lp_dist.optim.nm_rows import SplitBlockRows, slices_in, without_idle_pattern
from lp_dist.optim.parameter_map import ParameterMap
from lp_dist.optim.state import IN_WINDOW, refuse_all_zero, refuse_unattended_window, warn_of_free_zeros
from lp_dist.optim.step_counts import StepCounts

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS = ("reference", "foreach", "fused")
LAGGED = "s"  # the state of the non-adiabatic variant
_REFUSED = (
    "implementation='fused' can't step this: {}. Use None, which takes the fused step wherever it can, or 'foreach'"
)

# The group, the learning rate, then the columns of the rows: weights, gradients, each state tensor, steps.
Direction = Callable[..., "list[Tensor] | None"]


class _Stepped(NamedTuple):
    """Some rows after the base's step: its columns, the saliencies x of the weights before it, √v̂+ε where the base
    has it, and the latent weights where there are some.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    x: list[Tensor] | None
    denom: list[Tensor] | None
    latent: LatentWeights | None


# Arguments of torch's optimizers that ours don't have, and what to do instead.
_OF_TORCH = {
    "fused": "the fused step is chosen by itself, or by implementation='fused'",
    "foreach": "it is chosen by itself, or by implementation='foreach'",
    "amsgrad": "there is no such variant here; leave it out",
    "differentiable": "the step can't be differentiated; leave it out",
    "correct_bias": "the bias is corrected always; leave it out",
    "dampening": "there is none; leave it out",
    "decoupled_weight_decay": "the decay is decoupled always; leave it out",
}
_ALWAYS = ("correct_bias", "decoupled_weight_decay")


def refuse_arguments(cls: type, arguments: dict[str, Any]) -> None:
    """Raises TypeError for arguments that an optimizer lacks; those of torch's that ask for what it does anyway
    are taken.
    """
    for key, value in arguments.items():
        if key in _OF_TORCH and bool(value) is (key in _ALWAYS):
            continue
        way_out = _OF_TORCH.get(key, "see help(" + cls.__name__ + ") for those that it has")
        raise TypeError(f"{cls.__name__} has no argument {key}={value!r}: {way_out}")


class LpOptimizer(Optimizer):
    """What the three optimizers have in common. A subclass gives its state names, its direction and its defaults.

    Attributes:
        state_names: of the state tensors, `step` aside.
        kernel: the base's name in `kernels`.
        attached: what `lp_dist.attach` leaves here; without it each parameter has its group's values.
    """

    state_names: tuple[str, ...] = ()
    kernel: str
    attached: AttachedState

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
        self._checked: set[int] = set()  # ids of parameters that were checked for zeros
        self._counts: dict[int, StepCounts] = {}  # by id of a group's first parameter: engines make groups anew
        self._acting: dict[int, ActingValues] = {}  # likewise
        self.attached = AttachedState()
        plain = {key: plain_value(value) for key, value in defaults.items()}
        self._left_open = frozenset(key for key, value in defaults.items() if value is not plain[key])
        super().__init__(params, {**plain, IN_WINDOW: False})

    @property
    def parameter_map(self) -> ParameterMap:
        """Which parameter lies where in the stepped tensors, and what single parameters override."""
        return self.attached.parameter_map

    # -- torch's own conventions ----------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError on a bad hyperparameter and TypeError on complex parameters."""
        self.check({**self.defaults, **param_group})
        left_open = self._left_open - param_group.keys()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} takes real parameters, not {param.dtype}; optimize torch.view_as_real(w)"
                    " instead"
                )
            if self.implementation == "fused" and param.device.type != "meta":
                reason = self._why_not_fused(group, param.device)
                if reason is not None:
                    self.param_groups.pop()
                    raise ValueError(_REFUSED.format(reason))
        self.attached.requested.add(group, group.keys() - {"params", IN_WINDOW}, left_open)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own has groups and state alone.
        own_state: dict[str, Any] = {
            "implementation": self.implementation,
            "_checked": set(),
            "_counts": {},
            "_acting": {},
        }
        return {**super().__getstate__(), **own_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("attached", AttachedState())  # not in a copy: its tensors are others; attach it anew
        self.__dict__.setdefault("_counts", {})
        self.__dict__.setdefault("_acting", {})
        self.__dict__.setdefault("_left_open", frozenset())
        for group in self.param_groups:  # a checkpoint of an older version, or of AdamW, lacks our keys
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts this one among the defaults of what is unpickled
                    group.setdefault(key, value)
            for param in group["params"]:  # before its values, which may be another base's as well
                self.check_state(self.state.get(param, {}), group)
            self.check(group)
            # A tensor that has become zero on the way here is no mistake of the user's.
            self._checked.update(map(id, group["params"]))
        for param_state in self.state.values():
            if "step" in param_state and not isinstance(param_state["step"], Tensor):  # as old checkpoints have it
                param_state["step"] = torch.tensor(float(param_state["step"]))

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for group values out of their range, or that this base can't have."""
        check_hyperparameters(**{key: value for key, value in group.items() if key != "params"})

    def check_state(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Raises ValueError for the state of another base: it would be ignored, or start anew, without a word."""
        tensors, names = set(state) - {"step"}, set(self._state_names(group))
        if tensors and names - tensors == {LAGGED}:  # universal checkpoints carry Adam's state alone
            logger.warning(
                "the checkpoint has no %s, the lagging |w|^(p-2): it starts anew from the weights as they are", LAGGED
            )
        elif tensors and tensors != names:
            difference = ", ".join(sorted(tensors - names)) or "no " + ", ".join(sorted(names - tensors))
            raise ValueError(
                f"the checkpoint is of another optimizer than {type(self).__name__}: it has {difference} in its state."
                " Go on with that optimizer, or start without its state"
            )

    # -- the step -------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient are left alone: neither stepped nor decayed.

        Args:
            closure: evaluates the model again and returns the loss, as torch's optimizers have it.
        Returns:
            What the closure returned, or None.
        Raises:
            TypeError: a gradient is sparse.
            ValueError: a hyperparameter is out of range, a tensor that is to decay is all zeros at its first step, or
                the tensors are not those that `attach` has seen; the state is from the middle of a target's window,
                and no target goes on with it.
        """
        if self.attached.before_step is not None:
            self.attached.before_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state and self.attached.attachment is None:
            self._warn_of_zeros()
        fused: dict[str, dispatch.ValuedRows] = {}
        copied: list[RowCopy] = []
        for group in self.param_groups:
            self.check(group)
            if not self.attached.in_window:
                refuse_unattended_window(group)
            for values, rows in self._rows_by_values(group, copied):
                if values.get("pattern"):
                    rows = self._without_scattered(values, rows)
                self._step_rows(values, rows, fused)
        self._step_fused(fused)
        for copy in copied:
            copy.write_back()
        return loss

    def _step_rows(self, values: dict[str, Any], rows: list[StepRow], fused: dict[str, dispatch.ValuedRows]) -> None:
        """Steps rows, all but those that the fused step takes: these are added to `fused`."""
        if self.implementation in (None, "fused"):
            rows = self._without_fused(values, rows, fused)
        else:
            rows = [row.cut() for row in rows]
        if self.implementation == "reference":
            for row in rows:
                self.update_rows(values, [row], self._reference)
        else:
            for batch in batches(rows):
                self.update_rows(values, batch, self._foreach)

    def _step_fused(self, fused: dict[str, dispatch.ValuedRows]) -> None:
        for device_type, valued_rows in fused.items():
            dispatch.step(device_type, self.kernel, valued_rows)

    def _without_scattered(self, values: dict[str, Any], rows: list[StepRow]) -> list[StepRow]:
        """Steps rows whose blocks don't lie one after the other, in copies in which they do, and returns the others.
        So no value depends on the layout, or on where a shard ends.
        """
        others: list[StepRow] = []
        for row in rows:
            # A graph would repeat the step on the copies of its capture.
            if row.weights.is_contiguous() or values["capturable"]:
                others.append(row)
                continue
            for copy in copies(row):
                fused: dict[str, dispatch.ValuedRows] = {}
                self._step_rows(values, [copy.row], fused)
                self._step_fused(fused)
                copy.write_back()
        return others

    def _warn_of_zeros(self) -> None:
        """Looks once, before the first step of all, for the zeros of a model that comes sparse; `attach` does so over
        all ranks.
        """
        weights = [
            to_local(param)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and param.ndim >= 2 and not group["weight_decay"] > 0
        ]
        counts = [(int(count_zeros(w)), w.numel()) for w in weights if w.numel()]
        # All of them: a layer that begins at zero, as the output of a residual branch may.
        counts = [(zeros, elements) for zeros, elements in counts if zeros < elements]
        warn_of_free_zeros(sum(zeros for zeros, _ in counts), sum(elements for _, elements in counts))

    def _without_fused(
        self, values: dict[str, Any], rows: list[StepRow], fused: dict[str, dispatch.ValuedRows]
    ) -> list[StepRow]:
        """Adds the rows that the fused step takes to `fused`, by device type, and returns the others. These raise if
        the fused step was asked for by name.
        """
        others: list[StepRow] = []
        taken: dict[str, list[StepRow]] = {}
        # Of this device there may be thousands of values with a row each.
        reasons: dict[torch.device, str | None] = values.made if isinstance(values, KeptValues) else {}
        has_blocks, weights, refusal = bool(values.get("pattern")), None, None
        for row in rows:
            if row.weights is not weights:  # else it is another span of the same
                weights, device = row.weights, row.weights.device
                if device not in reasons:
                    reasons[device] = self._why_not_fused(values, device)
                refusal = reasons[device] or dispatch.refusal(row, has_blocks)
            reason = refusal
            if reason is None:
                taken.setdefault(device.type, []).append(row)
            elif self.implementation == "fused":
                raise ValueError(_REFUSED.format(reason))
            elif values["capturable"]:
                raise ValueError(
                    f"capturable=True needs the fused step, which can't step this: {reason}. Set capturable=False, and"
                    " capture no graph"
                )
            else:
                others.append(row.cut())
        for device_type, device_rows in taken.items():
            fused.setdefault(device_type, []).append((values, device_rows))
        return others

    def _why_not_fused(self, values: dict[str, Any], device: torch.device) -> str | None:
        if values.get("lag"):
            return f"lag={values['lag']}, which only the other implementations have"
        if values.get("precondition", 0.0) > dispatch.LARGEST_GAMMA:
            return f"precondition={values['precondition']}; it takes at most {dispatch.LARGEST_GAMMA}"
        reason = dispatch.unavailable(device)
        if reason is not None and self.implementation is None:
            _warn_once(device.type, reason)
        return reason

    def _rows_by_values(
        self, group: dict[str, Any], copied: list[RowCopy]
    ) -> list[tuple[dict[str, Any], list[StepRow]]]:
        """The group's rows, by the hyperparameters that hold for them. One list unless parameters override some, or
        blocks lie on several ranks. Rows that are copies are added to `copied`.
        """
        params = [param for param in group["params"] if param.grad is not None]
        names = self._state_names(group)
        states = [self._state_of(param, group, names) for param in params]
        by_values: dict[int, tuple[dict[str, Any], list[StepRow]]] = {}
        split_rows, parameter_map = SplitBlockRows(), self.parameter_map
        if not params:
            return split_rows.divided(parameter_map, group, self._ranking_keys)  # other ranks may have some
        counts = self._counts.setdefault(id(params[0]), StepCounts()).advance(states)
        acting = self._acting.setdefault(id(params[0]), ActingValues()).of(group, parameter_map)
        for param, state, step in zip(params, states, counts):
            weights, grads, *local_states = self._local(param, [state[name] for name in names])
            param_row = StepRow(weights, grads, tuple(local_states), step)
            numel = weights.numel()
            for offset, length, overrides in parameter_map.value_spans(param, numel):
                if id(overrides) not in by_values:
                    by_values[id(overrides)] = without_idle_pattern(acting[overrides]), []
                values, rows = by_values[id(overrides)]
                if values.get("pattern"):
                    inputs = values.get("input_dim")
                    for param_slice in slices_in(parameter_map, param, weights, offset, length, inputs):
                        rows.extend(split_rows.complete_blocks(param_slice, values, param_row))
                elif length == numel:
                    rows.append(param_row)
                else:
                    rows.append(param_row._replace(span=(offset, length)))
        divided = split_rows.divided(parameter_map, group, self._ranking_keys)
        copied += split_rows.copies
        return [*by_values.values(), *divided]

    def _ranking_keys(self, values: dict[str, Any], row: StepRow) -> Tensor:
        """What the entries of a row are ranked by in their blocks, by the very arithmetic that ranks a complete block.
        The row is used up.
        """
        device = row.weights.device
        if (
            self.implementation in (None, "fused")
            and self._why_not_fused(values, device) is None
            and dispatch.refusal(row) is None
        ):
            return nm.ranking_keys(dispatch.pull(device.type, self.kernel, values, row), smallest=True)
        x = self._step_base(values, [row], self._foreach).x
        assert x is not None
        return nm.ranking_keys(x[0])

    def _state_of(self, param: Tensor, group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
        if id(param) not in self._checked:
            if param not in self.parameter_map:  # else attach has checked, over all ranks
                refuse_all_zero(param, group)
            self._checked.add(id(param))
        state = self.state[param]
        if "step" not in state:
            # On the CPU as torch's: reading it makes no GPU wait. Where a graph counts the steps, it must be on the
            # device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
        for name in names:
            if name not in state:
                # |w|^(p-2) is beyond 16 bits
                dtype = torch.promote_types(param.dtype, torch.float32) if name == LAGGED else param.dtype
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _local(self, param: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The weight, its gradient and its state, as far as they lie on this rank."""
        grad = param.grad
        assert grad is not None
        if grad.layout is not torch.strided:
            raise TypeError(
                f"{type(self).__name__} takes dense gradients, not sparse ones; build the embedding with sparse=False"
            )
        if type(grad) is Tensor and type(param) is Parameter:
            return [param, grad, *states]
        if getattr(grad, "placements", None) != getattr(param, "placements", None):
            # A DTensor gradient that was not reduced to the shard yet.
            grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]  # of a DTensor
        return [to_local(t) for t in (param, grad, *states)]

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self.state_names, LAGGED) if group["lag"] else self.state_names

    def update_rows(self, group: dict[str, Any], rows: list[StepRow], direction: Direction) -> None:
        """w_new of the equation for some rows: x from the old weights, the base's step, then the decay."""
        stepped = self._step_base(group, rows, direction)
        values = {
            "lr": float(group["lr"]),
            **{key: group[key] for key in ("weight_decay", "p", "l2", "cutoff", "regrowth_below")},
        }
        if stepped.x is not None and group.get("pattern"):
            nm.keep_largest_(stepped.x, *nm.parse_pattern(group["pattern"]))
        if stepped.latent is not None:
            assert stepped.denom is not None and stepped.x is not None
            weights, grads, exp_avgs = stepped.weights, stepped.grads, stepped.states[0]
            stepped.latent.decay_(weights, grads, exp_avgs, stepped.denom, stepped.x, group["precondition"], values)
        else:
            decay.decay_(stepped.weights, stepped.x, **values)

    def _step_base(self, group: dict[str, Any], rows: list[StepRow], direction: Direction) -> _Stepped:
        """Takes the saliencies x of the weights as they are, then steps the base."""
        weights, grads = [row.weights for row in rows], [row.grads for row in rows]
        states = [list(column) for column in zip(*(row.states for row in rows))]
        lagged = states.pop() if group["lag"] else None
        if group["maximize"] or any(g.dtype != w.dtype for w, g in zip(weights, grads)):
            grads = [(-g if group["maximize"] else g).to(w.dtype) for w, g in zip(weights, grads)]
        lr = float(group["lr"])
        x = latent = None
        # With a cutoff of 0 zeros are frozen, and nothing is latent.
        if group.get("latent") and group["weight_decay"] > 0 and group["cutoff"] > 0:
            latent = LatentWeights(weights, states[0])
        if latent is not None or decay.is_active(lr, group["weight_decay"]):
            x = decay.saliency(latent.values if latent is not None else weights, group["p"])
            # Where zeros are frozen only whether a weight is zero counts.
            if lagged is not None and group["cutoff"] > 0:
                decay.lag_(x, lagged, group["lag"])
        denom = direction(group, lr, weights, grads, *states, [row.step for row in rows])
        if x is not None and group.get("precondition"):
            assert denom is not None
            decay.precondition_(x, denom, group["precondition"])
        return _Stepped(weights, grads, states, x, denom, latent)

    # Each base gives its direction twice. Both get the group, the learning rate and the columns of the rows (weights,
    # gradients, each state tensor, steps), step weights and state in place (u of the equation), and return √v̂+ε of
    # each weight where the base has it.
    _reference: Direction  # one row, in plain torch: the equation
    _foreach: Direction  # many rows, a call for all of them


@cache
def _warn_once(device_type: str, reason: str) -> None:
    logger.warning(
        "the fused step is not used on %s: %s. The foreach step is used instead, which takes several times as long",
        device_type,
        reason,
    )
