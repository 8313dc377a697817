"""SparsityTarget: a sparsity instead of a λ, and by which steps it is to be reached.

`SparsityTarget(...)` is the one way in. It makes one of three targets, by what its arguments name: single weights
(`WeightTarget`), N:M blocks of them (`PatternTarget`), or whole channels and heads (`GroupTarget`). The controllers
bring the weights there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any, ClassVar

from lp_dist.optim import nm
from lp_dist.optim.hyperparameters import P_MIN, check_hyperparameters
from lp_dist.structured.groups import WeightGroups
from lp_dist.targets.schedule import check_window

# γ where neither the target nor the optimizer names one, and the base has second moments. The pull is then that of the
# penalty's gradient as Adam would take it, divided by √v̂.
DEFAULT_PRECONDITION = 1.0
# Of a target that names none, where the optimizer can keep latent weights.
DEFAULT_LATENT_WINDOWS = 8.0
CURVES: dict[str, Callable[[float], float]] = {
    # Zhu and Gupta, arXiv 1710.01878: fast while there is much to prune, slow at the end
    "cubic": lambda u: 1.0 - (1.0 - u) ** 3,
    "linear": lambda u: u,
}

GroupNames = str | WeightGroups | Sequence[str | WeightGroups]


_POSITIONAL = Parameter.POSITIONAL_OR_KEYWORD


class _KindByArguments(type):
    """Makes `SparsityTarget(...)` an instance of the subclass that its arguments name."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not SparsityTarget:
            return super().__call__(*args, **kwargs)
        kind: type[SparsityTarget] = WeightTarget
        if kwargs.get("groups") is not None:
            kind = GroupTarget
        elif kwargs.get("pattern") is not None:
            kind = PatternTarget
        return kind(*args, **kind.own_arguments(kwargs))

    @property
    def __signature__(cls) -> Signature:
        """What `help` and editors show, which would see the one of `__call__`; of `SparsityTarget` the arguments of
        all three.
        """
        shared = {field.name for field in fields(SparsityTarget)}
        kinds: tuple[Any, ...] = (WeightTarget, PatternTarget, GroupTarget) if cls is SparsityTarget else (cls,)
        parameters = {
            field.name: Parameter(
                field.name,
                Parameter.KEYWORD_ONLY if cls is SparsityTarget and field.name not in shared else _POSITIONAL,
                default=None if cls is SparsityTarget and field.name in ("groups", "pattern") else field.default,
                annotation=field.type,
            )
            for kind in kinds
            for field in fields(kind)
        }
        return Signature(list(parameters.values()))


@dataclass(frozen=True)
class SparsityTarget(metaclass=_KindByArguments):
    """The share of exact zeros to end with: `SparsityTarget(0.5)`; by N:M blocks, `SparsityTarget(pattern="2:4")`; or
    of whole channels and heads, `SparsityTarget(0.3, groups="channels")`.

    Args:
        sparsity: between 0 and 1, the share to prune; what of, the subclass says. None with a pattern or a budget.
        start: where the window begins in which weights become zero: a fraction of the run if ≤ 1, else an optimizer
            step. Before it nothing decays, so that Adam's second moments can fill.
        end: where it ends, likewise. After it survivors recover.
        scope: "global", one threshold for all tensors; "layer", every tensor reaches the target. None: global, and
            layer with groups, so that every layer keeps as many and can be cut to one width.
        p: exponent of the norm while it acts; None: as the optimizer's groups have it.
        precondition: γ while it acts; None: as the optimizer's groups have it, and 1 where that is 0 and the base has
            second moments, since that loses less. A 0 here is a 0.
        cap: weights with a saliency above `cap` times the planned threshold do not decay, so that survivors do not
            shrink; None: all decay.
        regrowth: for the first four fifths of the window, weights with a saliency below `regrowth` times the planned
            threshold decay no faster than at it. They get near zero without being lost, and grow again if their
            gradient asks for it. 0: what is zero stays zero from the first step on.
        curve: "cubic" or "linear", or a function of the elapsed part of the window, rising from f(0) = 0 to f(1) = 1.
        freeze: after the window zeros stay zero and survivors train without decay; False: everything trains.
        update_every: optimizer steps between two updates of λ and the cutoff; None: a twentieth of the window, and 20
            at most; a fifth where survivors move.
        reconstruct: whether survivors move. At each update what is to go is removed at once, and the survivors of the
            same linear layer move so that its outputs on the inputs of the last steps change least; see
            `lp_dist.reconstruction`. Between two updates zeros stay, and survivors train without decay. None: they
            move where most weights are of layers that can, unless the weights have moved by a third of their norm in
            the steps before the window, as they do from scratch, where it gains nothing. False: what is to go decays.
        reconstruct_memory: GiB that this may take on each rank. Fewer tokens are kept within it, and layers that do
            not fit are left to their decay and named. None: as much as 8,192 tokens over all ranks need, which
            `explain` says.

    For single weights also:
        relative_to: "decayed", the sparsity is a share of the weights that decay; "all", of all parameters of the
            model.
        latent_windows: in the window weights below the planned threshold are set to zero in the model, while the
            optimizer keeps their values and goes on training them. They return when they grow beyond the threshold.
            Their decay is such that at the threshold they would be forgotten in so many windows. When the window ends
            they are pruned. 0: weights decay in the model itself. None: 8 with LpAdamW, a cap of 1 and regrowth;
            else 0. Layers whose survivors move have none.

    For N:M blocks instead:
        pattern: "2:4" or "4:8": at the end at most 2 (4) weights of each 4 (8) consecutive inputs of a layer are not
            zero. What can't have it stays dense, and is named in a warning.

    For whole groups instead:
        groups: "channels" (feed-forward), "heads", "kv_groups" (heads of keys and values with the queries that read
            them), "experts", "expert_channels" (channels inside of every expert), several of these, or `WeightGroups`
            that `lp_dist.groups_of` describes. They are pruned as wholes by their norms, and `lp-dist export --shrink`
            cuts them out.
        relative_to: "decayed", the sparsity is a share of each kind of groups; "all", the share of all parameters of
            the model that lie in the pruned ones.
        budget: the parameters of the model that may be left at most, instead of a sparsity.
        interval: optimizer steps between two decays of groups, each for the learning rates of all of them; see
            `lp_dist.structured.group_decay`.
    Raises:
        ValueError: a value is out of its range, or two arguments contradict each other.
    """

    sparsity: float | None = None
    start: float = 0.1
    end: float = 0.7
    scope: str | None = None
    p: float | None = None
    precondition: float | None = None
    cap: float | None = 1.0
    regrowth: float = 0.1
    curve: str | Callable[[float], float] = "cubic"
    freeze: bool = True
    update_every: int | None = None
    reconstruct: bool | None = None
    reconstruct_memory: float | None = None

    _default_scope: ClassVar[str] = "global"
    # Arguments of the other kinds: what to say where one is given.
    _arguments_of_others: ClassVar[dict[str, str]] = {}

    @classmethod
    def own_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """`arguments` without those of the other kinds that are left at what means none; ValueError for others."""
        own_names = {field.name for field in fields(cls)}
        for key, reason in cls._arguments_of_others.items():
            if arguments.get(key) not in (None, _NEUTRAL.get(key)):
                raise ValueError(f"{key}={arguments[key]!r} {reason}")
        return {key: value for key, value in arguments.items() if key in own_names or key not in _NEUTRAL}

    def __post_init__(self) -> None:
        if self.scope is None:
            object.__setattr__(self, "scope", self._default_scope)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope={self.scope!r} must be one of layer, global")
        self._check_kind()
        check_window(self.start, self.end)
        if self.p is not None:
            check_p(self.p)
        if self.precondition is not None:
            check_hyperparameters(precondition=self.precondition)
        if self.cap is not None and not 1.0 <= self.cap < math.inf:
            raise ValueError(
                f"cap={self.cap!r} must be a number from 1 up, else weights that are to be pruned do not decay; None"
                " lets all weights decay"
            )
        if not 0.0 <= self.regrowth <= 1.0:
            raise ValueError(
                f"regrowth={self.regrowth!r} must be a number from 0, no regrowth, to 1; 0.1 is the default"
            )
        if self.update_every is not None and self.update_every < 1:
            raise ValueError(
                f"update_every={self.update_every!r} must be at least 1 optimizer step, or None for a twentieth of the"
                " window, 20 at most"
            )
        if self.reconstruct_memory is not None and not 0.0 < self.reconstruct_memory < math.inf:
            raise ValueError(
                f"reconstruct_memory={self.reconstruct_memory!r} must be above 0, the GiB that moving survivors may"
                " take on each rank; None sets no bound"
            )
        if self.reconstruct_memory is not None and self.reconstruct is False:
            raise ValueError(
                f"reconstruct_memory={self.reconstruct_memory:g} bounds what reconstruct needs, and reconstruct=False;"
                " leave one of them out"
            )
        self._check_curve()

    def _check_kind(self) -> None:
        """Raises ValueError for what the kind of target can't have."""

    def _check_sparsity(self) -> None:
        if self.sparsity is None:
            raise ValueError(
                "sparsity=None: name the share of zeros to end with (0.5 is half of the weights), or a pattern ('2:4')"
            )
        if not (isinstance(self.sparsity, (int, float)) and 0.0 < self.sparsity < 1.0):
            raise ValueError(
                f"sparsity={self.sparsity!r} must be between 0 and 1, the share of zeros to end with: 0.5 is half of"
                " the weights"
            )

    def _check_curve(self) -> None:
        if not callable(self.curve) and self.curve not in CURVES:
            raise ValueError(
                f"curve={self.curve!r} must be one of {', '.join(CURVES)}, or a function of the elapsed part of the"
                " window"
            )
        points = [self.planned_share(i / 16) for i in range(17)]
        if (
            abs(points[0]) > 1e-9
            or abs(points[-1] - 1.0) > 1e-9
            or any(earlier > later + 1e-9 for earlier, later in zip(points, points[1:]))
        ):
            raise ValueError("curve must rise from f(0) = 0 to f(1) = 1 and never fall, since what is zero stays zero")

    def planned_share(self, elapsed: float) -> float:
        """Share of the way from the first sparsity to the last, at this elapsed part of the window (0 to 1)."""
        curve = self.curve if callable(self.curve) else CURVES[self.curve]
        return float(curve(min(max(elapsed, 0.0), 1.0)))

    def form(self) -> dict[str, Any]:
        """The hyperparameters that the target names for the decay while it acts."""
        return {key: getattr(self, key) for key in ("p", "precondition") if getattr(self, key) is not None}

    def described(self) -> dict[str, Any]:
        """The arguments as plain JSON types: what a checkpoint must agree on, and can be made again from."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["curve"] = getattr(self.curve, "__name__", "function") if callable(self.curve) else self.curve
        return plain


@dataclass(frozen=True)
class WeightTarget(SparsityTarget):
    """A target of single weights; arguments as of `SparsityTarget`."""

    relative_to: str = "decayed"
    latent_windows: float | None = None

    pattern: ClassVar[str | None] = None
    _arguments_of_others: ClassVar[dict[str, str]] = {
        "budget": "is of groups, and none are named; set groups='channels', or leave it out",
        "interval": "is of groups, and none are named; set groups='channels', or leave it out",
    }

    def _check_kind(self) -> None:
        self._check_sparsity()
        check_relative_to(self.relative_to)
        if self.latent_windows is not None and not 0.0 <= self.latent_windows < math.inf:
            raise ValueError(
                f"latent_windows={self.latent_windows!r} must be a finite number >= 0, of windows; 0 lets weights"
                " decay in the model itself, 8 is the default"
            )


@dataclass(frozen=True)
class PatternTarget(SparsityTarget):
    """A target of N:M blocks; arguments as of `SparsityTarget`. Its weights decay in the model itself."""

    pattern: str = "2:4"

    relative_to: ClassVar[str] = "decayed"
    latent_windows: ClassVar[float] = 0.0
    _arguments_of_others: ClassVar[dict[str, str]] = {
        **WeightTarget._arguments_of_others,
        "latent_windows": (
            "keeps weights latent by one threshold, and a pattern goes by blocks; set latent_windows=0, or"
            " leave one of them out"
        ),
        "relative_to": (
            "and a pattern can't be together: a pattern is one of the weights that decay; use relative_to='decayed'"
        ),
    }

    def _check_kind(self) -> None:
        nm.check_pattern(self.pattern)
        n, m = nm.parse_pattern(self.pattern)
        if self.sparsity not in (None, (m - n) / m):
            raise ValueError(
                f"sparsity={self.sparsity!r} contradicts pattern={self.pattern!r}, which is {(m - n) / m:g}; leave one"
                " of them out"
            )
        object.__setattr__(self, "sparsity", (m - n) / m)

    def form(self) -> dict[str, Any]:
        return {**super().form(), "pattern": self.pattern}


@dataclass(frozen=True)
class GroupTarget(SparsityTarget):
    """A target of whole groups of weights; arguments as of `SparsityTarget`."""

    groups: GroupNames = ()
    relative_to: str = "decayed"
    budget: int | None = None
    interval: int = 1

    _default_scope: ClassVar[str] = "layer"
    _arguments_of_others: ClassVar[dict[str, str]] = {
        "pattern": "is of single weights, and groups have none; give the weights a target of their own",
        "latent_windows": "is of single weights, and groups have none; leave it out",
    }

    def _check_kind(self) -> None:
        if not group_list(self.groups):
            raise ValueError(
                f"groups={self.groups!r} names none; name channels, heads, kv_groups, experts or expert_channels, or"
                " leave it out for single weights"
            )
        if (self.sparsity is None) == (self.budget is None):
            raise ValueError(
                f"sparsity={self.sparsity} and budget={self.budget}: groups need one of them, the share to prune or"
                " the parameters to be left"
            )
        if self.budget is None:
            self._check_sparsity()
        elif not isinstance(self.budget, int) or self.budget < 1:
            raise ValueError(
                f"budget={self.budget!r} must be a whole number from 1, the parameters of the model that are to be"
                " left"
            )
        check_relative_to(self.relative_to)
        check_interval(self.interval)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "groups": group_labels(self.groups)}


# What arguments of one kind of target hold where they ask for nothing.
_NEUTRAL: dict[str, Any] = {
    "groups": None,
    "pattern": None,
    "budget": None,
    "interval": 1,
    "relative_to": "decayed",
    "latent_windows": 0,
}


@dataclass(frozen=True)
class GroupDecay:
    """A λ for whole groups of weights, at every step: `attach(..., groups=GroupDecay("channels", 0.1))`. It comes on
    top of the decay of single weights.

    Args:
        groups: as of `SparsityTarget`.
        weight_decay: λ of the penalty (λ/p)·Σ‖w_g‖_2^p.
        p: of the form in `lp_dist.structured.group_decay`, as are the next two.
        precondition: γ.
        cutoff: groups with a saliency above it do not decay.
        interval: optimizer steps between two decays, each for the learning rates of all of them.
    Raises:
        ValueError: a value is out of its range.
    """

    groups: GroupNames
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
        """The arguments as plain JSON types."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "groups": group_labels(self.groups)}


def group_labels(groups: GroupNames) -> list[str]:
    """What to call groups that a user named."""
    return [group if isinstance(group, str) else group.label for group in group_list(groups)]


def group_list(groups: GroupNames) -> list[str | WeightGroups]:
    """Groups as a user may name them, as a list."""
    return [groups] if isinstance(groups, (str, WeightGroups)) else list(groups)


def check_interval(interval: int) -> None:
    """Raises ValueError for an interval that is no number of optimizer steps."""
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval={interval!r} must be a whole number of optimizer steps from 1")


def check_relative_to(relative_to: str) -> None:
    """Raises ValueError for what a sparsity can't be a share of."""
    if relative_to not in ("decayed", "all"):
        raise ValueError(f"relative_to={relative_to!r} must be one of decayed, all")


def check_p(p: float) -> None:
    """Raises ValueError for an exponent with which a target makes no sense.

    Above 1 weights become small and not zero, so that nearly all of them would be pruned in the final step
    (docs/which-p.md has the figures).
    """
    if not P_MIN <= p <= 1.0:
        raise ValueError(
            f"p={p:g} reaches no sparsity by itself: for p > 1 weights become small, and not zero. Take p in"
            f" [{P_MIN:g}, 1]; 0.5 is the default, 0 the log penalty"
        )
