"""The ways to sparsity that the bench compares. A method is named by a line such as `gmp:c=0.33,lr=3e-4`, which is
also how to run it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks.quality import oneshot
from lp_dist.errors import UsageError
from lp_dist.targets.target import CURVES, GAMMA, MEMORY, SparsityTarget


@dataclass
class Run:
    """What a method works on. names: of the matrices that are to become sparse. inputs: gives token ids of the
    training text to calibrate on.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    names: list[str]
    sparsity: float
    steps: int
    inputs: Callable[[], Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.names}


class Method:
    """start() before the first step, after_step(t) when t are taken (and the scheduler's)."""

    keys: dict[str, Any] = {}  # what may be set, and its default

    def __init__(self, run: Run, **settings: Any) -> None:
        self.run, self.settings = run, {**self.keys, **settings}

    def start(self) -> None: ...

    def after_step(self, t: int) -> None: ...


class Dense(Method):
    """The fine-tune alone: the bound."""


class _Masked(Method):
    """Weights outside of the masks are put back to zero after each step."""

    masks: dict[str, Tensor] = {}

    def after_step(self, t: int) -> None:
        weights = self.run.weights
        for name, mask in self.masks.items():
            weights[name].mul_(mask)


class _OneShot(_Masked):
    """at: which part of the steps lies before the pruning; 1 prunes what the dense fine-tune has made, and nothing
    mends it.
    """

    keys = {"at": 0.0}
    prune: Callable[[], dict[str, Tensor]]  # of a subclass: the masks

    def start(self) -> None:
        self._at(0)

    def after_step(self, t: int) -> None:
        self._at(t)
        super().after_step(t)

    def _at(self, t: int) -> None:
        if not self.masks and t == round(self.settings["at"] * self.run.steps):
            self.run.model.eval()  # what calibrates it goes through no dropout
            self.masks = self.prune()
            self.run.model.train()
            _Masked.after_step(self, t)


class Magnitude(_OneShot):
    keys = {**_OneShot.keys, "scope": "layer"}

    def prune(self) -> dict[str, Tensor]:
        return oneshot.magnitude(self.run.model, self.run.names, self.run.sparsity, self.settings["scope"])


class Wanda(_OneShot):
    def prune(self) -> dict[str, Tensor]:
        return oneshot.wanda(self.run.model, self.run.names, self.run.sparsity, self.run.inputs())


class SparseGPT(_OneShot):
    def prune(self) -> dict[str, Tensor]:
        return oneshot.sparsegpt(self.run.model, self.run.names, self.run.sparsity, self.run.inputs())


class GMP(_Masked):
    """Gradual magnitude pruning (arXiv 1710.01878) between the parts `start` and `end` of the run, by |w|·(√v̂)^c,
    with Adam's v; 20 times, or every so many steps. A mask that has fallen stays: its weight is zero."""

    keys = {"c": 0.0, "start": 0.1, "end": 0.7, "scope": "layer", "every": 0, "curve": "cubic"}

    def after_step(self, t: int) -> None:
        s, (first, last) = self.settings, self._window()
        every = s["every"] or max(1, round((last - first) / 20))
        if first <= t <= last and ((t - first) % every == 0 or t == last):
            share = self.run.sparsity * CURVES[s["curve"]]((t - first) / (last - first))
            self.masks = oneshot.smallest(
                {name: self._score(name, weight) for name, weight in self.run.weights.items()}, share, s["scope"]
            )
        super().after_step(t)

    def _window(self) -> tuple[int, int]:
        return max(1, round(self.settings["start"] * self.run.steps)), round(self.settings["end"] * self.run.steps)

    def _score(self, name: str, weight: Tensor) -> Tensor:
        score = weight.abs()
        if self.settings["c"]:
            state = self.run.optimizer.state[dict(self.run.model.named_parameters())[name]]
            score = score * state["exp_avg_sq"].sqrt().pow(
                self.settings["c"]
            )  # v's own scale is the same for all, and ranks the same
        return score


class PAT(GMP):
    """What torchao's pruning-aware training does (`torchao.prototype.pat`, MinSparsityConstraint on its schedule):
    until the window ends, masks are taken off before each step and chosen anew after it. So what is masked goes on
    learning, from gradients at the pruned weights, and may come back. Its own saliency is |w|, c = 0."""

    keys = {**GMP.keys, "every": 1}

    def start(self) -> None:
        self._latent: dict[str, Tensor] = {}
        self.run.optimizer.register_step_pre_hook(lambda *_: self._unmask())

    def _unmask(self) -> None:
        weights = self.run.weights
        for name, latent in self._latent.items():
            weights[name].copy_(latent)

    def after_step(self, t: int) -> None:
        _, last = self._window()
        self._latent = {name: weight.clone() for name, weight in self.run.weights.items()} if t < last else {}
        super().after_step(t)


class Lp(Method):
    """Ours: a `SparsityTarget`, with its keys."""

    keys = {
        **{
            key: SparsityTarget.__dataclass_fields__[key].default
            for key in ("start", "end", "cap", "grace", "curve", "every")
        },
        "scope": "global",
        "p": 0.5,
        "precondition": GAMMA,
        "memory": MEMORY,
    }  # else what fits the optimizer

    def start(self) -> None:
        target = SparsityTarget(self.run.sparsity, **self.settings)
        self.attached = attach(
            self.run.model,
            self.run.optimizer,
            names=self.run.names,
            target=target,
            total_steps=self.run.steps,
            lr_scheduler=self.run.scheduler,
        )

    def after_step(self, t: int) -> None:
        self.attached.after_step()


FAMILIES: dict[str, type[Method]] = {
    "dense": Dense,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "gmp": GMP,
    "pat": PAT,
    "lp": Lp,
}
# lr: instead of the work's. fall: the part of the run at which it begins to fall. distill: the part of the loss that
# is the divergence from the dense fine-tune.
_COMMON = {"lr": None, "fall": 0.0, "distill": 0.0}


@dataclass(frozen=True)
class Spec:
    """A method with its settings, as far as they were given."""

    family: str
    given: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, line: str) -> Spec:
        """Raises UsageError for a name, a key or a value that there is not."""
        family, _, rest = line.strip().partition(":")
        if family not in FAMILIES:
            raise UsageError(f"--methods {line}: {family!r} is none of {', '.join(FAMILIES)}")
        known, given = {**FAMILIES[family].keys, **_COMMON}, {}
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if key not in known:
                raise UsageError(f"--methods {line}: {family} has no {key!r}; it has {', '.join(known)}")
            given[key] = _value(line, value)
        fall = given.get("fall", 0)
        if not isinstance(fall, (int, float)) or not 0 <= fall < 1:
            raise UsageError(
                f"--methods {line}: fall={fall} is no part of the run; give one from 0, where the learning rate falls"
                " from the start, to below 1"
            )
        return cls(family, tuple(sorted(given.items())))

    @property
    def line(self) -> str:
        """A 1.0 is a 1 in it, as it may have been given."""

        def word(value: Any) -> Any:
            return (
                "none" if value is None else int(value) if isinstance(value, float) and value.is_integer() else value
            )

        return (
            self.family + (":" if self.given else "") + ",".join(f"{key}={word(value)}" for key, value in self.given)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All that it is run with, in plain JSON types: a line means something else when a default changes."""
        return {**FAMILIES[self.family].keys, **_COMMON, **dict(self.given)}

    @classmethod
    def of(cls, family: str, settings: dict[str, Any]) -> Spec:
        """The shortest that is run with these settings: it names what differs from the defaults."""
        usual = cls(family, ()).settings
        return cls(family, tuple(sorted((key, value) for key, value in settings.items() if value != usual.get(key))))

    def without(self, *keys: str) -> Spec:
        return Spec(self.family, tuple((key, value) for key, value in self.given if key not in keys))

    @property
    def lr(self) -> float | None:
        return self.settings["lr"]

    @property
    def fall(self) -> float:
        return self.settings["fall"]

    @property
    def distill(self) -> float:
        return self.settings["distill"]

    def method(self, run: Run) -> Method:
        return FAMILIES[self.family](run, **{key: value for key, value in self.given if key not in _COMMON})


def _value(line: str, text: str) -> Any:
    if text.lower() == "none":
        return None
    if text.isalpha():
        return text
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise UsageError(f"--methods {line}: {text!r} is neither a number, a word nor none") from None


# -- which methods are run ----------------------------------------------------

BASELINES = [
    "dense",
    "magnitude:at=1",
    "magnitude",
    "wanda:at=1",
    "wanda",
    "sparsegpt:at=1",
    "sparsegpt",
    "pat",
    "pat:c=0.33,scope=global",
    "pat:c=0.67,scope=global",
    "gmp",
    "gmp:c=0.33",
    "gmp:c=0.33,scope=global",
    "gmp:c=0.67,scope=global",
]
OURS = [
    "lp",
    "lp:precondition=0.5",
    "lp:precondition=0",
    "lp:scope=layer",
    "lp:memory=1,precondition=0.5",
    "lp:memory=0",
    "lp:memory=0,precondition=0.5",
]
# Of the decay in the model itself: where weights are latent, p and γ are but how they are ranked. Every p with every γ
# under the cap; without it, where survivors are bent, with γ = 0 and 1; layer by layer the paper's own form at every
# p, and every γ at one.
_PS, _GAMMAS = (-1, 0, 0.5, 0.8, 1), (0, 0.5, 1, 2)
FORMS = [
    f"lp:cap={cap},memory=0,p={p:g},precondition={gamma:g},scope={scope}"
    for scope, cap, ps, gammas in (
        ("global", "1.0", _PS, _GAMMAS),
        ("global", "none", _PS, (0, 1)),
        ("layer", "none", _PS, (0,)),
        ("layer", "1.0", (0.5,), _GAMMAS),
    )
    for gamma in gammas
    for p in ps
]
GROUPS = {"baselines": BASELINES, "ours": OURS, "forms": FORMS}


def specs(methods: str) -> list[Spec]:
    """Of names of GROUPS and of lines, with spaces or semicolons between them; each once."""
    lines = [line for word in methods.replace(";", " ").split() for line in GROUPS.get(word, [word])]
    if not lines:
        raise UsageError(f"--methods names nothing; give some of {', '.join(GROUPS)}, or lines such as lp:p=0.5")
    return list(dict.fromkeys(map(Spec.read, lines)))
