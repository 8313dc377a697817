"""LpAdamW, LpSGD, LpLion: torch optimizers whose decoupled weight decay is the Lp one of `decay.py`.

Each base is its direction and its state; walking over groups, slices and the decay are shared. Nothing here knows an
engine: DeepSpeed, FSDP2 and DDP hand over ordinary tensors (flat shards) or DTensors, and the step works on what is local.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lp_dist import decay
from lp_dist.segments import Asked, SegmentMap, effective, part
from lp_dist.slices import Row, batches, local, refuse_all_zero

_IMPLEMENTATIONS = ("reference", "foreach")


class LpOptimizer(Optimizer):
    """What the three have in common. A subclass gives its state names, its direction, and its own defaults."""

    state_names: tuple[str, ...] = ()

    def __init__(self, params: Iterable, defaults: dict[str, Any], implementation: str | None) -> None:
        if implementation == "fused":
            raise ValueError("implementation='fused' is not there yet in this version; use 'foreach', or None to let lp_dist choose")
        if implementation is not None and implementation not in _IMPLEMENTATIONS:
            raise ValueError(f"implementation={implementation!r} must be one of {_IMPLEMENTATIONS}, or None to let lp_dist choose")
        self.implementation = implementation
        self._checked: set[int] = set()  # ids of parameters that have been looked at for zeros
        self.segments = SegmentMap()     # filled by lp_dist.attach; without it, each parameter has its group's values
        self.asked = Asked()
        super().__init__(params, defaults)

    # -- torch's own manners ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError on a bad hyperparameter and TypeError on complex parameters."""
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex():
                self.param_groups.pop()
                raise TypeError(f"{type(self).__name__} takes real parameters, not {param.dtype}; optimize torch.view_as_real(w) instead")
        self.asked.add(group, group.keys() - {"params"})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "implementation": self.implementation, "_checked": set()}  # torch's has groups and state alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("segments", SegmentMap())  # not in a copy: its tensors are others; attach it anew
        self.__dict__.setdefault("asked", Asked())
        for group in self.param_groups:  # a checkpoint of an older version, or of AdamW, lacks our keys
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts this one among the defaults of what is unpickled
                    group.setdefault(key, value)
            self.check(group)
            self._checked.update(map(id, group["params"]))  # a tensor that died on the way here is no mistake of the user's
            for param in group["params"]:
                self.check_state(self.state.get(param, {}), group)
        for param_state in self.state.values():
            if "step" in param_state and not isinstance(param_state["step"], Tensor):  # as old checkpoints have it
                param_state["step"] = torch.tensor(float(param_state["step"]))

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for group values out of their range, or that this base can't have."""
        decay.check_hyperparameters(**{key: value for key, value in group.items() if key != "params"})

    def check_state(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Raises ValueError for the state of another base: it would be left lying, or start anew, without a word."""
        tensors, names = set(state) - {"step"}, set(self._state_names(group))
        if tensors and tensors != names:
            odd = ", ".join(sorted(tensors - names)) or "no " + ", ".join(sorted(names - tensors))
            raise ValueError(f"the checkpoint is of another optimizer than {type(self).__name__}: it has {odd} in its state. Go on with that "
                             "optimizer, or start without its state")

    # -- the step -----------------------------------------------------------------------------------------------------

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
        for group in self.param_groups:
            self.check(group)
            for values, rows in self._work(group):
                if self.implementation == "reference":
                    for row in rows:
                        self._update(values, [row], self._reference)
                else:
                    for batch in batches(rows):
                        self._update(values, batch, self._foreach)
        return loss

    def _work(self, group: dict[str, Any]) -> list[tuple[dict[str, Any], list[Row]]]:
        """The group's rows, by the values that hold for them: one list unless parameters have values of their own."""
        work: dict[int, tuple[dict[str, Any], list[Row]]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            row = self._row(param, group)
            for offset, length, own in self.segments.runs(param, row[0].numel()):
                if id(own) not in work:
                    work[id(own)] = effective(group, own), []
                work[id(own)][1].append((*(part(t, offset, length) for t in row[:-1]), row[-1]))
        return list(work.values())

    def _row(self, param: Tensor, group: dict[str, Any]) -> Row:
        grad = param.grad
        if grad.layout is not torch.strided:
            raise TypeError(f"{type(self).__name__} takes dense gradients, not sparse ones; build the embedding with sparse=False")
        if id(param) not in self._checked:
            if param not in self.segments:  # else attach has looked, over all ranks
                refuse_all_zero(param, group)
            self._checked.add(id(param))
        names = self._state_names(group)
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU as torch's: reading it makes no GPU wait
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        # Not in place: DeepSpeed's loader of universal checkpoints gives all tensors one and the same `step`.
        state["step"] = state["step"] + 1
        step = float(state["step"])
        if getattr(grad, "placements", None) != getattr(param, "placements", None):
            grad = grad.redistribute(placements=param.placements)  # a DTensor gradient that was not reduced to the shard yet
        return (*(local(t) for t in (param, grad, *(state[name] for name in names))), step)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names

    def _update(self, group: dict[str, Any], rows: list[Row], direction: Callable[..., list[Tensor] | None]) -> None:
        """w_new of the equation for some rows: x from the old weights, the base's step, then the decay."""
        columns = [list(column) for column in zip(*rows)]
        weights, grads = columns[:2]
        if group["maximize"] or any(g.dtype != w.dtype for w, g in zip(weights, grads)):
            columns[1] = [(-g if group["maximize"] else g).to(w.dtype) for w, g in zip(weights, grads)]
        lr = float(group["lr"])
        x = None
        if decay.is_active(lr, group["weight_decay"], group["cutoff"]):
            x = decay.resistance(weights, group["p"])
        denom = direction(group, lr, *columns)
        if x is not None and group.get("precondition"):
            decay.precondition_(x, denom, group["precondition"])
        decay.decay_(weights, x, lr=lr, **{key: group[key] for key in ("weight_decay", "p", "l2", "cutoff")})

    # Each base gives its direction twice. Both get the group, the learning rate and the columns of the rows (weights,
    # gradients, each state tensor, steps), step weights and state in place (u of the equation), and return √v̂+ε of each
    # weight where the base has it.
    _reference: Callable[..., list[Tensor] | None]  # one row, in plain torch: the equation
    _foreach: Callable[..., list[Tensor] | None]    # many rows, a call for all of them


class LpAdamW(LpOptimizer):
    """AdamW with decoupled Lp decay (arXiv 2404.10824); with weight_decay = 0 bit for bit torch.optim.AdamW without decay.

    Args:
        params: parameters or groups; every argument below but `implementation` is a group key too.
        lr: α, a number or a one-element tensor.
        betas: decay rates of the moments.
        eps: ε, added to √v̂.
        weight_decay: λ. Our λ carries the 1/p (see `decay.py`). A fine-tune needs one two or three orders of magnitude
            above what training from scratch uses, since a weight dies once the learning rates summed since the start
            reach |w|^(2−p)/((2−p)·λ).
        p: exponent of the norm, in [−4, 4]. Exact zeros need p < 1 or so; p = 2 is AdamW's decay to first order.
        l2: λ2, an L2 term beside it (elastic net).
        precondition: γ ≥ 0: weights on which the loss is sensitive decay less, x = |w|^(2−p)·(√v̂+ε)^γ.
        cutoff: weights with x above it feel no Lp term; negative: none does.
        maximize: step along the gradient, not against it.
        implementation: None chooses; "reference" is the clear loop; "foreach" takes many tensors at a time.
    State of each parameter: `step` (fp32 scalar on the CPU), `exp_avg`, `exp_avg_sq` (like the parameter), nothing else.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, p: float = 0.5, l2: float = 0.0, precondition: float = 0.0, cutoff: float = math.inf,
        maximize: bool = False, implementation: str | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, p=p, l2=l2,
                                      precondition=precondition, cutoff=cutoff, maximize=maximize), implementation)

    @staticmethod
    def _reference(group, lr, weights, grads, exp_avgs, exp_avg_sqs, steps):
        (w,), (g,), (m,), (v,), (t,) = weights, grads, exp_avgs, exp_avg_sqs, steps
        beta1, beta2 = map(float, group["betas"])
        m.lerp_(g, 1 - beta1)                                       # m = β1·m + (1−β1)·g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)               # v = β2·v + (1−β2)·g²
        denom = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])   # √v̂ + ε
        w.addcdiv_(m, denom, value=-(lr / (1 - beta1**t)))          # u = w − α·m̂/(√v̂+ε)
        return [denom]

    @staticmethod
    def _foreach(group, lr, weights, grads, exp_avgs, exp_avg_sqs, steps):
        beta1, beta2 = map(float, group["betas"])
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denom = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denom, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(denom, group["eps"])
        torch._foreach_addcdiv_(weights, exp_avgs, denom, [-(lr / (1 - beta1**t)) for t in steps])
        return denom


class _Unconditioned(LpOptimizer):
    """A base without second moments: there is no √v̂ to precondition with."""

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group.get("precondition"):
            raise ValueError(f"precondition={group['precondition']} needs Adam's second moments, which {type(self).__name__} has not; "
                             "use LpAdamW, or leave it out")


class LpSGD(_Unconditioned):
    """SGD with momentum and decoupled Lp decay; with weight_decay = 0 bit for bit torch.optim.SGD.

    Args as LpAdamW's, and momentum ≥ 0; nesterov: look ahead along the momentum. State: `step`, and
    `momentum_buffer` if there is momentum.
    """

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, momentum: float = 0.0, nesterov: bool = False,
        weight_decay: float = 0.0, *, p: float = 0.5, l2: float = 0.0, cutoff: float = math.inf, maximize: bool = False,
        implementation: str | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, p=p, l2=l2,
                                      cutoff=cutoff, maximize=maximize), implementation)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    @staticmethod
    def _reference(group, lr, weights, grads, *rest):
        (w,), (g,) = weights, grads
        if group["momentum"]:
            (b,) = rest[0]
            b.mul_(group["momentum"]).add_(g)                               # b = μ·b + g
            g = g.add(b, alpha=group["momentum"]) if group["nesterov"] else b
        w.add_(g, alpha=-lr)                                                # u = w − α·b

    @staticmethod
    def _foreach(group, lr, weights, grads, *rest):
        if group["momentum"]:
            torch._foreach_mul_(rest[0], group["momentum"])
            torch._foreach_add_(rest[0], grads)
            grads = torch._foreach_add(grads, rest[0], alpha=group["momentum"]) if group["nesterov"] else rest[0]
        torch._foreach_add_(weights, grads, alpha=-lr)


class LpLion(_Unconditioned):
    """Lion (Chen et al., arXiv 2302.06675) with decoupled Lp decay. Args as LpAdamW's. State: `step`, `exp_avg`.

    Lion's direction has magnitude 1, so lr is usually 3 to 10 times smaller than Adam's, and λ as much larger.
    """

    state_names = ("exp_avg",)

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
        *, p: float = 0.5, l2: float = 0.0, cutoff: float = math.inf, maximize: bool = False, implementation: str | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, p=p, l2=l2, cutoff=cutoff,
                                      maximize=maximize), implementation)

    @staticmethod
    def _reference(group, lr, weights, grads, exp_avgs, steps):
        (w,), (g,), (m,) = weights, grads, exp_avgs
        beta1, beta2 = map(float, group["betas"])
        w.add_(m.lerp(g, 1 - beta1).sign_(), alpha=-lr)             # u = w − α·sign(β1·m + (1−β1)·g)
        m.lerp_(g, 1 - beta2)                                       # m = β2·m + (1−β2)·g
        w.add_(m, alpha=0.0)                                        # sign(nan) is 0: a spoiled weight would stand still, unseen

    @staticmethod
    def _foreach(group, lr, weights, grads, exp_avgs, steps):
        beta1, beta2 = map(float, group["betas"])
        direction = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_add_(weights, direction, alpha=-lr)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)
        torch._foreach_add_(weights, exp_avgs, alpha=0.0)
