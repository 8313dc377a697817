"""SparsityTarget: a sparsity instead of a λ, and by which steps it is to be reached. `control.py` brings the weights
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lp_dist.optim import nm
from lp_dist.optim.hyperparameters import P_MIN, check_hyperparameters
from lp_dist.structured.groups import Groups
from lp_dist.targets.schedule import check_window

# γ where neither the target nor the optimizer gives one, and the base has second moments: the pull is then that of the
# penalty's gradient as Adam would take it, divided by √v̂.
GAMMA = 1.0
MEMORY = 8.0  # of a target that names none, where the optimizer can keep latent weights
CURVES: dict[str, Callable[[float], float]] = {
    "cubic": (
        lambda u: 1.0 - (1.0 - u) ** 3
    ),  # Zhu and Gupta, arXiv 1710.01878: fast while there is much to spare, slow at the end
    "linear": lambda u: u,
}


@dataclass(frozen=True)
class SparsityTarget:
    """The share of exact zeros to end with, or of whole channels and heads (`groups`).

    Args:
        sparsity: of the weights that decay (`of="decayed"`) or of all parameters of the model (`of="all"`), between 0
            and 1. With groups: of each kind of them, or in `of="all"` the share of all parameters that die with them.
                None with a budget, or a pattern, which says it.
        start, end: the window in which weights die: a fraction of the run if ≤ 1, else an optimizer step. Before it
            nothing decays, so that Adam's second moments can fill; after it survivors recover.
        scope: "global", one threshold for all tensors, so that those lose most that can spare most; "layer", every
            tensor reaches the target. None: global, and layer with groups, so that every layer keeps as many and can
                be cut to one width.
        p, precondition: the form of the decay while it acts; None: as the optimizer's groups have them, and for a γ of
            0 (the default there) 1 in its place if the base has second moments, since that loses less. A 0 here is a
            0.
        cap: weights with x above `cap` times the planned threshold feel no decay, so that survivors are not bent;
            None: all feel it.
        curve: "cubic" or "linear", or a function of the part of the window that is over, rising from f(0) = 0 to f(1)
            = 1.
        memory: in the window weights below the planned threshold are zero in the model, and what they were is latent
            in the optimizer: it goes on learning, and comes back whole where it grows beyond the threshold. Its decay
                is such that at the threshold it would be forgotten in
            `memory` windows. When the window ends they die. 0: they decay in the model itself. None: 8 with LpAdamW, a
            cap of 1 and grace; else 0.
        grace: for the first four fifths of the window weights with x below `grace` times the planned threshold decay
            no faster than at it. Without memory they so fade to next to nothing, and come back if their gradient asks
            for it. 0: what dies stays dead from the first step on.
        freeze: after the window zeros stay zero and survivors train without decay; False: everything trains, and zeros
            come back.
        every: optimizer steps between two looks at the weights; None: a twentieth of the window, and 20 at most.
        groups: "channels" (feed-forward), "heads", "kv_groups" (heads of keys and values with the queries that read
            them), several of these, or `Groups` that `lp_dist.groups_of` describes: these die as wholes, and `lp-dist
            export --shrink` cuts them out. They decay by their norms, and have no memory.
        budget: with groups, the parameters of the model that are to be left at most, instead of a sparsity.
        interval: with groups, optimizer steps between two decays of them, each for the learning rates of all; see
            `lp_dist.structured.group_decay.Grouped`.
        pattern: "2:4" or "4:8": at the end at most 2 (4) weights of each 4 (8) consecutive inputs of a linear layer
            are not zero. The largest x of each block feel no decay. memory is 0 then.
    Raises:
        ValueError: a value is out of its range.
    """

    sparsity: float | None = None
    start: float = 0.1
    end: float = 0.7
    scope: str | None = None
    p: float | None = None
    precondition: float | None = None
    cap: float | None = 1.0
    memory: float | None = None
    grace: float = 0.1
    curve: str | Callable[[float], float] = "cubic"
    freeze: bool = True
    every: int | None = None
    of: str = "decayed"
    groups: str | Groups | Sequence[str | Groups] | None = None
    budget: int | None = None
    interval: int = 1
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.scope is None:
            object.__setattr__(self, "scope", "layer" if self.groups else "global")
        self._check_groups()
        nm.check(self.pattern)
        if self.pattern is not None:
            self._take_pattern()
        if self.budget is None and self.sparsity is None:
            raise ValueError(
                "sparsity=None: name the share of zeros to end with (0.5 is half of the weights), or a pattern ('2:4')"
            )
        if self.budget is None and not (isinstance(self.sparsity, (int, float)) and 0.0 < self.sparsity < 1.0):
            raise ValueError(
                f"sparsity={self.sparsity!r} must be between 0 and 1, the share of zeros to end with: 0.5 is half of"
                " the weights"
            )
        for key, choices in (("scope", ("layer", "global")), ("of", ("decayed", "all"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {', '.join(choices)}")
        check_window(self.start, self.end)
        if self.p is not None:
            check_p(self.p)
        if self.precondition is not None:
            check_hyperparameters(precondition=self.precondition)
        if self.cap is not None and not 1.0 <= self.cap < math.inf:
            raise ValueError(
                f"cap={self.cap!r} must be a number from 1 up, else weights that are to die feel no decay; None lets"
                " all weights feel it"
            )
        if self.memory is not None and not 0.0 <= self.memory < math.inf:
            raise ValueError(
                f"memory={self.memory!r} must be a finite number >= 0, of windows; 0 lets weights decay in the model"
                " itself, 8 is the default"
            )
        if not 0.0 <= self.grace <= 1.0:
            raise ValueError(f"grace={self.grace!r} must be a number from 0, no way back, to 1; 0.1 is the default")
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"every={self.every!r} must be at least 1 optimizer step, or None for a twentieth of the window, 20 at"
                " most"
            )
        if not callable(self.curve) and self.curve not in CURVES:
            raise ValueError(
                f"curve={self.curve!r} must be one of {', '.join(CURVES)}, or a function of the part of the window"
                " that is over"
            )
        points = [self.at(i / 16) for i in range(17)]
        if (
            abs(points[0]) > 1e-9
            or abs(points[-1] - 1.0) > 1e-9
            or any(a > b + 1e-9 for a, b in zip(points, points[1:]))
        ):
            raise ValueError("curve must rise from f(0) = 0 to f(1) = 1 and never fall, since what is dead stays dead")

    def _check_groups(self) -> None:
        if self.groups is not None:
            if not listed(self.groups):
                raise ValueError(
                    f"groups={self.groups!r} names none; name channels, heads or kv_groups, or leave it out for single"
                    " weights"
                )
            if self.pattern is not None:
                raise ValueError(
                    f"pattern={self.pattern!r} is of single weights, and groups have none; give the weights a target"
                    " of their own"
                )
            if self.memory:
                raise ValueError(f"memory={self.memory:g} is of single weights, and groups have none; leave it out")
            if (self.sparsity is None) == (self.budget is None):
                raise ValueError(
                    f"sparsity={self.sparsity} and budget={self.budget}: groups need one of them, the share that is to"
                    " die or the parameters to be left"
                )
            if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 1):
                raise ValueError(
                    f"budget={self.budget!r} must be a whole number from 1, the parameters of the model that are to be"
                    " left"
                )
            check_interval(self.interval)
            return
        for key, default in (("budget", None), ("interval", 1)):
            if getattr(self, key) != default:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is of groups, and none are named; set groups='channels', or leave"
                    " it out"
                )

    def _take_pattern(self) -> None:
        """The sparsity of the pattern; raises ValueError for what contradicts it."""
        n, m = nm.parse(self.pattern)
        if self.sparsity not in (None, (m - n) / m):
            raise ValueError(
                f"sparsity={self.sparsity!r} contradicts pattern={self.pattern!r}, which is {(m - n) / m:g}; leave one"
                " of them out"
            )
        if self.memory:
            raise ValueError(
                f"memory={self.memory!r} hides weights by one threshold, and pattern={self.pattern!r} goes by blocks;"
                " set memory=0, or leave one of them out"
            )
        if self.of != "decayed":
            raise ValueError(
                f"of={self.of!r} and pattern={self.pattern!r} can't be together: a pattern is one of the weights that"
                " decay; use of='decayed'"
            )
        object.__setattr__(self, "sparsity", (m - n) / m)

    def at(self, u: float) -> float:
        """Share of the way from the first sparsity to the last when the part u of the window is over."""
        return float((self.curve if callable(self.curve) else CURVES[self.curve])(min(max(u, 0.0), 1.0)))

    def phase(self) -> dict[str, Any]:
        """The param groups' values while it acts."""
        form = {key: getattr(self, key) for key in ("p", "precondition", "pattern") if getattr(self, key) is not None}
        return {"cutoff": math.inf, **form}

    def described(self) -> dict[str, Any]:
        """Plain JSON types: what a checkpoint must agree on."""
        # What is not asked for is left out, so that checkpoints of before it could be asked for are still those of the
        # same target.
        left_out = (("pattern",) if self.pattern is None else ()) + (
            () if self.groups else ("groups", "budget", "interval")
        )
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in left_out}
        plain["curve"] = getattr(self.curve, "__name__", "function") if callable(self.curve) else self.curve
        if self.groups:
            plain["groups"] = names_of(self.groups)
        return plain


@dataclass(frozen=True)
class GroupDecay:
    """A λ for whole groups of weights, at every step: `attach(..., groups=GroupDecay("channels", 0.1))`. It comes on
    top of the decay of single weights.

    Args:
        groups: as of `SparsityTarget`. weight_decay: λ of the penalty (λ/p)·Σ‖w_g‖_2^p. p, precondition, cutoff: of
            the form in `lp_dist.structured.group_decay`.
        interval: optimizer steps between two decays, each for the learning rates of all.
    Raises:
        ValueError: a value is out of its range.
    """

    groups: str | Groups | Sequence[str | Groups]
    weight_decay: float
    p: float = 0.5
    precondition: float = 0.0
    cutoff: float = math.inf
    interval: int = 1

    def __post_init__(self) -> None:
        check_hyperparameters(
            weight_decay=self.weight_decay, p=self.p, precondition=self.precondition, cutoff=self.cutoff
        )
        if self.p >= 2.0:
            raise ValueError(f"p={self.p:g} makes no groups zero; take p < 1, such as 0.5")
        check_interval(self.interval)

    def described(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "groups": names_of(self.groups)}


def names_of(groups: str | Groups | Sequence[str | Groups]) -> list[str]:
    """What to call groups that a user named."""
    return [one if isinstance(one, str) else one.label for one in listed(groups)]


def listed(groups: str | Groups | Sequence[str | Groups]) -> list[str | Groups]:
    """Groups as a user may name them, as a list."""
    return [groups] if isinstance(groups, (str, Groups)) else list(groups)


def check_interval(interval: int) -> None:
    """Raises ValueError for steps between two decays that are none."""
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval={interval!r} must be a whole number of optimizer steps from 1")


def check_p(p: float) -> None:
    """Raises ValueError for an exponent with which a target makes no sense: above 1 weights become small and not zero,
    so that nearly all of them would die at the last threshold (docs/which-p.md has the figures)."""
    if not P_MIN <= p <= 1.0:
        raise ValueError(
            f"p={p:g} reaches no sparsity by itself: for p > 1 weights become small, and not zero. Take p in"
            f" [{P_MIN:g}, 1]; 0.5 is the default, 0 the log penalty"
        )
