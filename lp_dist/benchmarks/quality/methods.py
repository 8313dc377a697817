"""The methods of sparsity that the bench compares.

A method is named by a line such as `gmp:c=0.33,lr=3e-4`, which is also how to run it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks.quality import oneshot, regularizers, trust_region
from lp_dist.benchmarks.timing import note
from lp_dist.errors import UsageError
from lp_dist.optim import nm
from lp_dist.reconstruction.survivors import Reconstruction
from lp_dist.sharding.shards import find_shards
from lp_dist.sparsity.input_dims import input_dims, listed
from lp_dist.targets.target import CURVES, DEFAULT_LATENT_WINDOWS, DEFAULT_PRECONDITION, SparsityTarget, WeightTarget

# Of the training text, on which the trust region measures the divergence of an update.
TRUST_REGION_TOKENS = 2048


@dataclass
class TrainingRun:
    """What a method works on.

    Args:
        model: it is trained, and becomes sparse.
        optimizer: of the model.
        scheduler: of the learning rate, stepped after the optimizer.
        names: of the matrices that become sparse.
        sparsity: the fraction of exact zeros in them at the end.
        steps: of the optimizer.
        inputs: gives token ids of the training text for calibration, int64 [rows, block].
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
        """The matrices that become sparse, by name; changing them changes the model."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `weights`, which have gradients and the optimizer's state."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    def saliency(self, name: str, weight: Tensor, exponent: float) -> Tensor:
        """|w|·(√v)^c, with Adam's v. Its bias correction is the same for all weights, and ranks them the same.

        Args:
            name: of a weight in the model.
            weight: values in its place.
            exponent: c; 0: |w|. With 1 the order is that of v·w², with v for the diagonal of the Fisher information.
        Returns:
            The scores, in the shape of the weight.
        """
        if not exponent:
            return weight.abs()
        second_moments = self.optimizer.state[self.parameters[name]]["exp_avg_sq"]
        return weight.abs() * second_moments.sqrt().pow(exponent)


class Method:
    """A method, attached to one run.

    Args:
        run: what is trained.
        settings: values for `keys`; those that are not given have their default.
    """

    # What may be set, and its default.
    keys: ClassVar[dict[str, Any]] = {}
    # Whether the steps before it prunes are those of the dense fine-tune.
    trains_dense = False

    def __init__(self, run: TrainingRun, **settings: Any) -> None:
        self.run, self.settings = run, {**self.keys, **settings}

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        """Raises ValueError for a setting that is out of its range.

        Args:
            settings: all `keys` with their values.
        """

    def start(self) -> None:
        """Called once before the first step."""

    def after_step(self, t: int) -> None:
        """Called after each step of the optimizer and the scheduler.

        Args:
            t: steps taken.
        """


class Dense(Method):
    """The fine-tune alone, which is the upper bound."""

    trains_dense = True


class _Masked(Method):
    """Weights outside of the masks are set to zero after each step."""

    masks: dict[str, Tensor] = {}

    def after_step(self, t: int) -> None:
        self._mask_weights()

    def _mask_weights(self) -> None:
        weights = self.run.weights
        for name, mask in self.masks.items():
            weights[name].mul_(mask)

    def _masked_copies(self) -> dict[str, Tensor]:
        """Copies of the weights as the model has them under its masks, by name."""
        self._mask_weights()
        return {name: weight.clone() for name, weight in self.run.weights.items()}


class _OneShot(_Masked):
    """Prunes once. at: the fraction of the steps before it; 1 prunes the dense fine-tune, without recovery."""

    keys = {"at": 0.0}
    trains_dense = True
    # Of a subclass: makes the masks.
    prune: Callable[[], dict[str, Tensor]]

    def start(self) -> None:
        self._prune_at(0)

    def after_step(self, t: int) -> None:
        self._prune_at(t)
        super().after_step(t)

    def _prune_at(self, t: int) -> None:
        if not self.masks and t == round(self.settings["at"] * self.run.steps):
            # Calibration runs without dropout.
            self.run.model.eval()
            self.masks = self.prune()
            self.run.model.train()
            self._mask_weights()


class Magnitude(_OneShot):
    """One-shot pruning by |w|. scope: "layer" or "global"."""

    keys = {**_OneShot.keys, "scope": "layer"}

    def prune(self) -> dict[str, Tensor]:
        return oneshot.magnitude(self.run.model, self.run.names, self.run.sparsity, self.settings["scope"])


class Wanda(_OneShot):
    """One-shot pruning by Wanda (arXiv 2306.11695)."""

    def prune(self) -> dict[str, Tensor]:
        return oneshot.wanda(self.run.model, self.run.names, self.run.sparsity, self.run.inputs())


class SparseGPT(_OneShot):
    """One-shot pruning by SparseGPT (arXiv 2301.00774). pattern: such as 2:4."""

    keys = {**_OneShot.keys, "pattern": None}

    def prune(self) -> dict[str, Tensor]:
        return oneshot.sparsegpt(
            self.run.model, self.run.names, self.run.sparsity, self.run.inputs(), self.settings["pattern"]
        )


def keep_blocks(model: nn.Module, scores: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Scores with which no weight is pruned that an N:M pattern keeps.

    Args:
        model: whose matrices have the scores.
        scores: by name of the weight, in its shape, not negative.
        pattern: such as "2:4".
    Returns:
        Scores by name: infinite for the N largest of each M consecutive inputs, else as they were.
    Raises:
        UsageError: a matrix can't have the pattern.
    """
    known = input_dims(model, dict.fromkeys(scores, pattern))
    if known.reasons:
        raise UsageError(f"pattern={pattern} is not for all matrices that become sparse: {listed(known.reasons)}")
    n, m = nm.parse_pattern(pattern)
    kept = {}
    for name, score in scores.items():
        by_inputs = score.movedim(known.dims[name], -1).clone(memory_format=torch.contiguous_format)
        nm.keep_largest_([by_inputs], n, m)
        kept[name] = by_inputs.movedim(-1, known.dims[name]).contiguous()
    return kept


class _Regularized(Magnitude):
    """A penalty on the weights until they are pruned by |w|, since it makes no weight exactly zero by itself.

    The penalty is decoupled, as AdamW's decay: before each step its gradient times the learning rate is taken off the
    weights. At `at` of the steps they are pruned as by `magnitude:at=...`, and the rest is a masked fine-tune without
    the penalty. So with a penalty of 0 it is that method.

    Raises:
        UsageError: it would prune before the penalty acts.
    """

    # Where the window of lp_dist and of gradual pruning ends.
    keys = {**Magnitude.keys, "at": 0.7}
    trains_dense = False

    def __init__(self, run: TrainingRun, **settings: Any) -> None:
        super().__init__(run, **settings)
        if not 0 < self.settings["at"] <= 1:
            raise UsageError(
                f"at={self.settings['at']} must be above 0, where the penalty would never act, and at most 1"
            )

    def start(self) -> None:
        self.run.optimizer.register_step_pre_hook(lambda *_: self._regularize())

    def _regularize(self) -> None:
        if not self.masks:
            rate = self.run.optimizer.param_groups[0]["lr"]
            for name, weight in self.run.weights.items():
                weight.sub_(rate * self.gradient(name, weight))

    def gradient(self, name: str, weight: Tensor) -> Tensor:
        """The gradient of the penalty.

        Args:
            name: of the weight in the model.
            weight: its values.
        Returns:
            In the shape of the weight.
        """
        raise NotImplementedError


class NormDecay(_Regularized):
    """Norm decay (arXiv 2009.08435): `beta` times the largest absolute sum of a row or column of each matrix.

    Setting `norm`: "rows", the ∞-norm of the linear map, or "columns", its 1-norm. The paper's `beta` of 1e-3 is for
    tens of thousands of steps at higher rates, and would move nothing here; 1 is a neutral value that is not tuned.
    """

    keys = {**_Regularized.keys, "beta": 1.0, "norm": "rows"}

    def __init__(self, run: TrainingRun, **settings: Any) -> None:
        super().__init__(run, **settings)
        if self.settings["norm"] not in regularizers.NORMS:
            raise UsageError(f"norm={self.settings['norm']} must be {' or '.join(regularizers.NORMS)}")
        self._output_dims = regularizers.output_dims(run.model, run.names)

    def gradient(self, name: str, weight: Tensor) -> Tensor:
        dim = self._output_dims[name]
        if self.settings["norm"] == "columns":
            dim = 1 - dim
        return self.settings["beta"] * regularizers.norm_decay(weight, dim)


class Weissi(_Regularized):
    """The weight-scale-shift invariant penalty (arXiv 2008.02965).

    Settings: `norms`, λ1 of the product of the matrices' norms, and `direction`, λ2 of the L1 norms of their
    directions. 1 is a neutral value for both that is not tuned.
    """

    keys = {**_Regularized.keys, "norms": 1.0, "direction": 1.0}

    def gradient(self, name: str, weight: Tensor) -> Tensor:
        return regularizers.scale_shift_invariant(weight, self.settings["norms"], self.settings["direction"])


class Window(NamedTuple):
    """Optimizer steps between which weights are pruned, both included."""

    first: int
    last: int


class GMP(_Masked):
    """Gradual magnitude pruning (arXiv 1710.01878) by |w|·(√v̂)^c, with Adam's v.

    Settings: `start` and `end` of the window as fractions of the run; `c`; `scope`, "layer" or "global"; `curve` as of
    a SparsityTarget; `update_every`, steps between two updates of the masks, 0: 20 updates in the window, 5 with the
    correction; `pattern`, such as 2:4: only the weights that are not among the N largest of their block are pruned;
    `correct`, 1: at each update the survivors take over what is pruned, as those of lp_dist do
    (`lp_dist.reconstruction`), but by the inputs of all steps since the last update, as far as these are kept. A
    pruned weight is zero and so stays pruned.
    """

    keys = {
        "c": 0.0,
        "start": 0.1,
        "end": 0.7,
        "scope": "layer",
        "update_every": 0,
        "curve": "cubic",
        "pattern": None,
        "correct": 0,
    }
    _reconstruction: Reconstruction | None = None

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        if settings.get("correct", 0) not in (0, 1):
            raise ValueError(f"correct={settings['correct']} must be 0, or 1 to correct the survivors at each update")

    def start(self) -> None:
        if self.settings.get("correct"):
            shards = [s for s in find_shards(self.run.model, self.run.optimizer) if s.name in self.run.names]
            self._reconstruction = Reconstruction(self.run.model, shards)
            self._reconstruction.sample.open()

    def after_step(self, t: int) -> None:
        settings, (first, last) = self.settings, self.window()
        update_every = settings["update_every"] or max(1, round((last - first) / self._default_updates()))
        if first <= t <= last and ((t - first) % update_every == 0 or t == last):
            sparsity = self.run.sparsity * CURVES[settings["curve"]]((t - first) / (last - first))
            self._update(sparsity, t == last)
        super().after_step(t)

    def _default_updates(self) -> int:
        """How many updates there are in the window where `update_every` does not say it."""
        return 5 if self._reconstruction else 20

    def _update(self, sparsity: float, is_last: bool) -> None:
        # At the start of the window nothing is pruned, and nothing to be taken over.
        if self._reconstruction is None or sparsity == 0.0:
            self.masks = self.choose(sparsity, is_last)
            return
        # What was pruned before is no part of what survivors take over.
        self._mask_weights()
        self.masks, weights = self.choose(sparsity, is_last), self.run.weights
        self._reconstruction.remove(weights, lambda name: weights[name].mul_(self.masks[name]))
        if is_last:
            self._reconstruction.sample.close()

    def choose(self, sparsity: float, is_last: bool) -> dict[str, Tensor]:
        """The masks of an update.

        Args:
            sparsity: the fraction that the plan prunes.
            is_last: whether this is the last update.
        Returns:
            Masks by name, bool: True where a weight is kept.
        """
        return oneshot.keep_largest(self._scores(), sparsity, self.settings["scope"])

    def _scores(self) -> dict[str, Tensor]:
        scores = {name: self.saliency(name, weight) for name, weight in self.run.weights.items()}
        pattern = self.settings["pattern"]
        return keep_blocks(self.run.model, scores, pattern) if pattern else scores

    def window(self) -> Window:
        """The steps between which the masks are updated."""
        return Window(
            max(1, round(self.settings["start"] * self.run.steps)), round(self.settings["end"] * self.run.steps)
        )

    def saliency(self, name: str, weight: Tensor) -> Tensor:
        """|w|·(√v)^c of a weight.

        Args:
            name: of the weight in the model.
            weight: its values.
        Returns:
            The scores, in the shape of the weight.
        """
        return self.run.saliency(name, weight, self.settings["c"])


class PAT(GMP):
    """torchao's pruning-aware training (`torchao.prototype.pat`, MinSparsityConstraint on its schedule).

    Until the window ends, masks are taken off before each step and chosen anew after it. So a masked weight goes on
    learning, from gradients at the pruned weights, and may come back. torchao's saliency is |w|, c = 0.
    """

    # A correction would count twice what comes back.
    keys = {**{key: value for key, value in GMP.keys.items() if key != "correct"}, "update_every": 1}

    def start(self) -> None:
        self._latents: dict[str, Tensor] = {}
        self.run.optimizer.register_step_pre_hook(lambda *_: self._unmask())

    def _unmask(self) -> None:
        weights = self.run.weights
        for name, latent in self._latents.items():
            weights[name].copy_(latent)

    def after_step(self, t: int) -> None:
        window = self.window()
        self._latents = {name: weight.clone() for name, weight in self.run.weights.items()} if t < window.last else {}
        super().after_step(t)


class TrustRegion(GMP):
    """Gradual pruning by v̂·w² with one global threshold, each update in a trust region.

    An update is what its plan asks for, and half of that, and so on, until KL(model before ‖ model after) is at most
    `bound`, in nats a token over a small batch of the training text. What is left over waits for the next update. The
    last one prunes all that is left, since only equal sparsities can be compared. Other settings as of GMP. With
    `correct=1` the survivors are corrected after the update is accepted: the divergence is that of pruning alone. The
    updates are 20 then as well, since larger ones would be halved.
    """

    keys = {**GMP.keys, "c": 1.0, "scope": "global", "bound": 0.05}

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        super().check(settings)
        if not isinstance(settings["bound"], (int, float)) or settings["bound"] <= 0:
            raise ValueError(f"bound={settings['bound']} must be above 0, the divergence of an update in nats a token")

    def start(self) -> None:
        super().start()
        inputs = self.run.inputs()
        self._batch = inputs[: max(1, TRUST_REGION_TOKENS // inputs.shape[1])]
        # Of the updates so far: the sparsity that they have reached, and how many were made smaller.
        self._sparsity, self._smaller_updates = 0.0, 0

    def _default_updates(self) -> int:
        return 20

    def choose(self, sparsity: float, is_last: bool) -> dict[str, Tensor]:
        before = self._masked_copies()
        scores = self._scores()

        def masks_at(total: float) -> dict[str, Tensor]:
            return oneshot.keep_largest(scores, total, self.settings["scope"])

        planned_step = sparsity - self._sparsity
        if is_last:
            note(
                f"trust_region: {self._smaller_updates} updates were smaller than planned, and the last one prunes"
                f" {planned_step:.2%}"
            )
            return masks_at(sparsity)
        if planned_step <= 0:
            return masks_at(self._sparsity)
        logits_before = trust_region.logits(self.run.model, self._batch)

        def divergence_after(step: float) -> float:
            masks = masks_at(self._sparsity + step)
            for name, weight in self.run.weights.items():
                weight.mul_(masks[name])
            divergence = trust_region.mean_divergence(self.run.model, self._batch, logits_before)
            for name, weight in self.run.weights.items():
                weight.copy_(before[name])
            return divergence

        step = trust_region.accepted_step(planned_step, divergence_after, self.settings["bound"])
        self._smaller_updates += step < planned_step
        self._sparsity += step
        return masks_at(self._sparsity)


class ELSA(_Masked):
    """ELSA: sparse training by ADMM (arXiv 2510.01650), of which z is the sparse copy and u the scaled dual variable.

    Until `end`, a fraction of the run, the gradient that the optimizer sees has λ·(w − z + u) added to it, with λ =
    `penalty`. Every `interval` steps z is w + u with its k weights of largest v̂ᶜ·(w + u)² alone, with Adam's v̂, and
    u grows by w − z. At `end` all weights outside of z become zero, and the rest of the run trains with that mask. It
    starts with z = w and u = 0. As published it is `end=1`, where the run ends with the projection.

    Settings: `interval`, 0: 20 updates until `end`; `c`, 0: the largest of (w + u)²; `scope`, "layer" or "global".
    """

    keys = {"penalty": 0.001, "interval": 0, "end": 0.7, "c": 1.0, "scope": "global"}

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        for key, is_right, limit in (
            ("penalty", lambda value: value > 0, "above 0, the λ of the augmented Lagrangian"),
            ("interval", lambda value: value >= 0 and value == int(value), "a number of steps, or 0 for 20 updates"),
            ("end", lambda value: 0 < value <= 1, "above 0 and at most 1, a fraction of the run"),
        ):
            if not isinstance(settings[key], (int, float)) or not is_right(settings[key]):
                raise ValueError(f"{key}={settings[key]} must be {limit}")

    def start(self) -> None:
        self.sparse_copies = {name: weight.clone() for name, weight in self.run.weights.items()}
        self.duals = {name: torch.zeros_like(weight) for name, weight in self.run.weights.items()}
        self._penalty_hook = self.run.optimizer.register_step_pre_hook(lambda *_: self._add_penalty())

    @torch.no_grad()
    def _add_penalty(self) -> None:
        for name, parameter in self.run.parameters.items():
            residual = parameter - self.sparse_copies[name] + self.duals[name]
            parameter.grad.add_(residual, alpha=self.settings["penalty"])

    def after_step(self, t: int) -> None:
        last = max(1, round(self.settings["end"] * self.run.steps))
        interval = self.settings["interval"] or max(1, round(last / 20))
        if t < last and t % interval == 0:
            self._project()
        elif t == last:
            self.masks = self._project()
            self._penalty_hook.remove()
            self.sparse_copies, self.duals = {}, {}
        super().after_step(t)

    def _project(self) -> dict[str, Tensor]:
        """One update of z and u; returns the mask of z."""
        sums = {name: weight + self.duals[name] for name, weight in self.run.weights.items()}
        # The order of v̂ᶜ·x² is that of its root.
        scores = {name: self.run.saliency(name, total, self.settings["c"]) for name, total in sums.items()}
        masks = oneshot.keep_largest(scores, self.run.sparsity, self.settings["scope"])
        for name, total in sums.items():
            self.sparse_copies[name] = total * masks[name]
            self.duals[name] = total - self.sparse_copies[name]
        return masks


class Lp(Method):
    """lp_dist: a `SparsityTarget`, with its arguments as settings.

    A pattern has neither latent weights nor another sparsity than its own: `latent_windows` does nothing there.
    """

    keys = {
        **{
            key: WeightTarget.__dataclass_fields__[key].default
            for key in ("start", "end", "cap", "regrowth", "curve", "update_every")
        },
        "scope": "global",
        "p": 0.5,
        # These two would else depend on the optimizer.
        "precondition": DEFAULT_PRECONDITION,
        "latent_windows": DEFAULT_LATENT_WINDOWS,
        "reconstruct": 0,
        "pattern": None,
    }

    def start(self) -> None:
        settings = {**self.settings, "reconstruct": bool(self.settings["reconstruct"])}
        if settings["pattern"]:
            del settings["latent_windows"]
        target = SparsityTarget(self.run.sparsity, **settings)
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
    "normdecay": NormDecay,
    "weissi": Weissi,
    "gmp": GMP,
    "pat": PAT,
    "trust_region": TrustRegion,
    "elsa": ELSA,
    "lp": Lp,
}
# Settings that all families have.
# lr: the highest learning rate, instead of the task's.
# stable_fraction: the fraction of the steps until which the learning rate stays at its highest.
# distill: the weight of the divergence from a teacher in the loss.
# teacher: dense, the dense fine-tune; self, the model as it is before the run.
# optimizer: a key of OPTIMIZERS.
COMMON_SETTINGS = {"lr": None, "stable_fraction": 0.0, "distill": 0.0, "teacher": "dense", "optimizer": "adamw"}
# Their learning rate where none is given, as a fraction of the task's. Lion's authors (arXiv 2302.06675) take a third
# to a tenth of AdamW's; the third is not tuned.
OPTIMIZERS = {"adamw": 1.0, "lion": 1 / 3}
# Settings that need Adam's moments, which Lion has not.
_NEED_ADAM = ("c", "precondition", "latent_windows")


@dataclass(frozen=True)
class Spec:
    """A method with the settings that were given.

    Args:
        family: a key of FAMILIES.
        given: settings and their values, sorted by name.
    """

    family: str
    given: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, line: str) -> Spec:
        """Reads a line such as "gmp:c=0.33,lr=3e-4".

        Args:
            line: a family, and settings with their values.
        Returns:
            The method.
        Raises:
            UsageError: there is no such family or setting, or a value cannot be read.
        """
        family, _, words = line.strip().partition(":")
        if family not in FAMILIES:
            raise UsageError(f"--methods {line}: {family!r} is none of {', '.join(FAMILIES)}")
        known, given = {**FAMILIES[family].keys, **COMMON_SETTINGS}, {}
        for word in filter(None, words.split(",")):
            key, _, value = word.partition("=")
            if key not in known:
                raise UsageError(f"--methods {line}: {family} has no {key!r}; it has {', '.join(known)}")
            given[key] = _value(line, value)
        try:
            nm.check_pattern(given.get("pattern"))
            FAMILIES[family].check({**FAMILIES[family].keys, **given})
        except ValueError as error:
            raise UsageError(f"--methods {line}: {error}") from None
        stable_fraction = given.get("stable_fraction", 0)
        if not isinstance(stable_fraction, (int, float)) or not 0 <= stable_fraction < 1:
            raise UsageError(
                f"--methods {line}: stable_fraction={stable_fraction} must be at least 0, where the learning rate"
                " falls from the start, and below 1"
            )
        teacher = given.get("teacher", "dense")
        if teacher not in ("dense", "self") or ("teacher" in given and not given.get("distill")):
            raise UsageError(
                f"--methods {line}: teacher={teacher} must be dense or self, and needs distill, the weight of its"
                " divergence in the loss"
            )
        spec = cls(family, tuple(sorted(given.items())))
        if spec.optimizer not in OPTIMIZERS:
            raise UsageError(f"--methods {line}: optimizer={spec.optimizer} must be {' or '.join(OPTIMIZERS)}")
        need_adam = [f"{key}=0" for key in _NEED_ADAM if spec.settings.get(key)]
        if spec.optimizer != "adamw" and need_adam:
            raise UsageError(
                f"--methods {line}: {spec.optimizer} has not Adam's moments, which {family} would use; add"
                f" {','.join(need_adam)}"
            )
        return spec

    @property
    def line(self) -> str:
        """The line that is read as this method; a whole float is printed as an integer."""

        def word(value: Any) -> Any:
            return (
                "none" if value is None else int(value) if isinstance(value, float) and value.is_integer() else value
            )

        return (
            self.family + (":" if self.given else "") + ",".join(f"{key}={word(value)}" for key, value in self.given)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All settings in plain JSON types: the line alone means something else when a default changes."""
        return {**FAMILIES[self.family].keys, **COMMON_SETTINGS, **dict(self.given)}

    @classmethod
    def from_settings(cls, family: str, settings: dict[str, Any]) -> Spec:
        """The shortest method with these settings: it names what differs from the defaults.

        Args:
            family: a key of FAMILIES.
            settings: as `settings` gives them, or as a row has them.
        Returns:
            The method.
        """
        defaults = cls(family, ()).settings
        return cls(
            family, tuple(sorted((key, value) for key, value in settings.items() if value != defaults.get(key)))
        )

    def without(self, *keys: str) -> Spec:
        """The method with some settings at their defaults.

        Args:
            keys: the settings.
        Returns:
            A new method.
        """
        return Spec(self.family, tuple((key, value) for key, value in self.given if key not in keys))

    def sparsities(self, requested: Iterable[float]) -> list[float]:
        """The sparsities at which the method is run.

        Args:
            requested: fractions of zeros.
        Returns:
            The same; of a dense run 0, and of a pattern its own, once.
        """
        pattern = self.settings.get("pattern")
        if pattern:
            n, m = nm.parse_pattern(pattern)
            return [(m - n) / m]
        return [0.0] if self.family == "dense" else list(requested)

    @property
    def lr(self) -> float | None:
        """The highest learning rate; None: the task's."""
        return self.settings["lr"]

    @property
    def stable_fraction(self) -> float:
        """The fraction of the steps until which the learning rate stays at its highest."""
        return self.settings["stable_fraction"]

    @property
    def teacher(self) -> str:
        """Who teaches where `distill` is above 0: "dense" or "self"."""
        return self.settings["teacher"]

    @property
    def distill(self) -> float:
        """The weight of the divergence from the dense fine-tune in the loss."""
        return self.settings["distill"]

    @property
    def optimizer(self) -> str:
        """The optimizer: a key of OPTIMIZERS."""
        return self.settings["optimizer"]

    @property
    def follows_dense(self) -> bool:
        """Whether all of its steps are those of the dense fine-tune, which it prunes at the end, if at all."""
        return FAMILIES[self.family].trains_dense and self.settings.get("at", 1) == 1

    def method(self, run: TrainingRun) -> Method:
        """The method for a run.

        Args:
            run: what is trained.
        Returns:
            The method; it has not started.
        """
        return FAMILIES[self.family](run, **{key: value for key, value in self.given if key not in COMMON_SETTINGS})


def _value(line: str, text: str) -> Any:
    if text.lower() == "none":
        return None
    if text.isalpha() or text in nm.PATTERNS:
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
LP_DIST = [
    "lp",
    "lp:precondition=0.5",
    "lp:precondition=0",
    "lp:scope=layer",
    "lp:latent_windows=1,precondition=0.5",
    "lp:latent_windows=0",
    "lp:latent_windows=0,precondition=0.5",
]
# Forms of the decay in the model itself: with latent weights, p and γ only rank them. With the cap every p is run with
# every γ. Without it, where all weights shrink, γ is 0 and 1. Layer by layer there is the paper's form with every p,
# and every γ with one p.
_PS, _GAMMAS = (-1, 0, 0.5, 0.8, 1), (0, 0.5, 1, 2)
FORMS = [
    f"lp:cap={cap},latent_windows=0,p={p:g},precondition={gamma:g},scope={scope}"
    for scope, cap, ps, gammas in (
        ("global", "1.0", _PS, _GAMMAS),
        ("global", "none", _PS, (0, 1)),
        ("layer", "none", _PS, (0,)),
        ("layer", "1.0", (0.5,), _GAMMAS),
    )
    for gamma in gammas
    for p in ps
]
# What is published as the best while training, and GMP by the saliency of lp_dist with the same correction.
RIVALS = [
    "dense",
    "lp",
    "lp:reconstruct=1",
    "gmp:c=0.67,scope=global",
    "gmp:c=0.67,correct=1,scope=global",
    "trust_region",
    "trust_region:correct=1",
    "elsa:penalty=0.0001",
    "elsa",
    "elsa:penalty=0.01",
]
PATTERNS = [
    "dense",
    "sparsegpt:at=1,pattern=2:4",
    "sparsegpt:pattern=2:4",
    "pat:pattern=2:4",
    "pat:c=0.67,pattern=2:4",
    "lp:pattern=2:4",
]
# Penalties of other papers beside the same pruning without them, and Lion as the base of the methods.
REGULARIZERS = [
    "magnitude:at=0.7",
    "normdecay",
    "weissi",
    "dense:optimizer=lion",
    "magnitude:at=0.7,optimizer=lion",
    "gmp:optimizer=lion",
    "lp:latent_windows=0,optimizer=lion,precondition=0",
]
METHOD_SETS = {
    "baselines": BASELINES,
    "lp_dist": LP_DIST,
    "forms": FORMS,
    "rivals": RIVALS,
    "patterns": PATTERNS,
    "regularizers": REGULARIZERS,
}


def read_specs(methods: str) -> list[Spec]:
    """Reads what --methods names.

    Args:
        methods: names of METHOD_SETS and lines, with spaces or semicolons between them.
    Returns:
        The methods in that order, each once.
    Raises:
        UsageError: nothing is named, or a line cannot be read.
    """
    lines = [line for word in methods.replace(";", " ").split() for line in METHOD_SETS.get(word, [word])]
    if not lines:
        raise UsageError(f"--methods names nothing; give some of {', '.join(METHOD_SETS)}, or lines such as lp:p=0.5")
    return list(dict.fromkeys(map(Spec.read, lines)))
