"""The methods that `lp-dist bench structured` compares: fewer channels, heads or experts.

The sparsity of a run is the fraction of each layer's groups that become zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks.quality.methods import FAMILIES, Method, TrainingRun
from lp_dist.benchmarks.structured.mixtures import RouterMask, expert_scores
from lp_dist.benchmarks.structured.pathprox import hidden_units, proximal_step
from lp_dist.errors import UsageError
from lp_dist.sharding.shards import locate_shards
from lp_dist.structured.group_decay import GroupDecayHook
from lp_dist.structured.resolve import resolve_groups
from lp_dist.targets.lr_lookahead import LearningRates
from lp_dist.targets.target import CURVES, DEFAULT_PRECONDITION, GroupTarget, SparsityTarget


class LpGroups(Method):
    """lp_dist: a `SparsityTarget` of groups, with its arguments as settings."""

    keys = {
        **{
            key: GroupTarget.__dataclass_fields__[key].default
            for key in ("start", "end", "cap", "regrowth", "curve", "update_every", "interval")
        },
        "p": 0.5,
        "precondition": DEFAULT_PRECONDITION,
        "scope": "layer",
        "groups": "channels",
        "reconstruct": 0,
    }

    def start(self) -> None:
        target = SparsityTarget(
            self.run.sparsity, **{**self.settings, "reconstruct": bool(self.settings["reconstruct"])}
        )
        self.attached = attach(
            self.run.model,
            self.run.optimizer,
            target=target,
            total_steps=self.run.steps,
            lr_scheduler=self.run.scheduler,
        )

    def after_step(self, t: int) -> None:
        self.attached.after_step()


class MaskedGroups(LpGroups):
    """`LpGroups` of experts, where a router can't choose an expert from the step on in which it dies."""

    keys = {**LpGroups.keys, "groups": "experts"}

    def start(self) -> None:
        super().start()
        self.router_mask = RouterMask(self.run.model, resolve_groups(self.run.model, self.settings["groups"]))

    def after_step(self, t: int) -> None:
        super().after_step(t)
        self.router_mask.update()
        if t == self.run.steps:
            self.router_mask.remove()


class _Cut(Method):
    """Groups are set to zero and kept there; routers can't choose experts that are.

    lp_dist's hook does it for all of these methods. What they differ in is which groups become zero, and when.
    """

    keys = {"groups": "channels"}
    # Of the saliency ‖w·(√v̂)^c‖.
    c = 0.0

    def start(self) -> None:
        sets = resolve_groups(self.run.model, self.settings["groups"])
        shards = locate_shards(self.run.model, self.run.optimizer)
        self.hook = GroupDecayHook(self.run.optimizer, sets, shards, p=0.0, precondition=2.0 * self.c)
        self.router_mask = RouterMask(self.run.model, sets)

    def after_step(self, t: int) -> None:
        if t == self.run.steps:
            self.router_mask.remove()

    def prune(self, scores: Tensor, sparsity: float) -> None:
        """Sets the groups with the lowest scores to zero, layer by layer.

        Args:
            scores: of all groups, [groups].
            sparsity: the fraction of each layer's groups, from 0 to 1.
        """
        masks = []
        for layer in scores.split([groups.count for groups in self.hook.sets]):
            pruned = torch.zeros(len(layer), dtype=torch.bool, device=layer.device)
            pruned[torch.argsort(layer, stable=True)[: round(sparsity * len(layer))]] = True
            masks.append(pruned)
        self.hook.prune(torch.cat(masks))
        self.hook.keep_zero(torch.cat(masks))
        self.router_mask.update()

    def scores(self) -> Tensor:
        """‖w·(√v̂)^c‖² of all groups, [groups]."""
        self.hook.forget()
        self.hook.measure()
        return self.hook.squares


class OneCut(_Cut):
    """Cuts once, before the fine-tune.

    Setting `criterion`: "norm"; "taylor", which is LLM-Pruner's (arXiv 2305.11627; first order, element by element):
    Σ|w·∂L/∂w| over the group, on calibration text; for experts, on the same text, "frequency", how often the router
    chooses each, or "reap" (arXiv 2510.13999), the mean of router weight times norm of the expert's output over its
    tokens.
    """

    keys = {**_Cut.keys, "criterion": "norm"}

    def start(self) -> None:
        super().start()
        criterion = self.settings["criterion"]
        if criterion in ("frequency", "reap"):
            scores = expert_scores(self.run.model, self.hook.sets, self.run.inputs(), criterion)
        else:
            scores = self.scores() if criterion == "norm" else self.taylor_scores()
        self.prune(scores, self.run.sparsity)

    def taylor_scores(self) -> Tensor:
        """Σ|w·∂L/∂w| of all groups, [groups]; the gradients are those of the run's calibration text."""
        model, inputs = self.run.model, self.run.inputs()
        for rows in inputs.split(1):
            rows = rows.to(next(model.parameters()).device)
            model(input_ids=rows, labels=rows).loss.backward()
        params = dict(model.named_parameters())
        scores = []
        for groups in self.hook.sets:
            score = torch.zeros(groups.count, device=next(model.parameters()).device)
            for member in groups.members:
                effect, dim = (params[member.name] * params[member.name].grad).detach().abs(), member.dim
                if member.expert is not None:
                    effect, dim = effect[member.expert], dim - 1
                lines = effect.movedim(dim, 0)[member.start : member.stop].flatten(1).sum(1)
                by_group = lines.view(-1, member.width).sum(1)
                score[member.first : member.first + len(by_group)] += by_group
            scores.append(score)
        self.run.optimizer.zero_grad()
        return torch.cat(scores)


class GradualCut(_Cut):
    """Cuts 20 times on a cubic ramp, in the window of lp_dist, by ‖w·(√v̂)^c‖: `gmp` for groups."""

    keys = {**_Cut.keys, "c": 0.0, "start": 0.1, "end": 0.7, "curve": "cubic"}

    def start(self) -> None:
        self.c = self.settings["c"]
        super().start()

    def after_step(self, t: int) -> None:
        settings = self.settings
        first, last = max(1, round(settings["start"] * self.run.steps)), round(settings["end"] * self.run.steps)
        update_every = max(1, round((last - first) / 20))
        if first <= t <= last and ((t - first) % update_every == 0 or t == last):
            progress = CURVES[settings["curve"]]((t - first) / (last - first))
            self.prune(self.scores(), self.run.sparsity * progress)
        super().after_step(t)


class PathProx(_Cut):
    """PathProx (arXiv 2210.03069) until `end`, then a cut of the channels with the lowest ‖w‖·‖v‖ to the sparsity.

    `weight_decay` is the λ of all layers. None: of each layer the λ by which the requested fraction of its channels
    would become zero until `end` if there were no gradients, which is their quantile of ‖w‖·‖v‖ over the sum of the
    learning rates.
    """

    keys = {**_Cut.keys, "weight_decay": None, "end": 0.7}

    def start(self) -> None:
        super().start()
        model, end = self.run.model, self.settings["end"]
        self._last = round(end * self.run.steps)
        if not 1 <= self._last <= self.run.steps:
            raise UsageError(f"end={end} must be above 0, where the penalty would never act, and at most 1")
        model.eval()
        self._layers = hidden_units(model, self.hook.sets, self.run.inputs()[:1, :16])
        model.train()
        for units in self._layers:
            proximal_step(units, 0.0)
        self.weight_decays = self._weight_decays()
        self._handle = self.run.optimizer.register_step_post_hook(lambda *_: self._shrink())

    def _weight_decays(self) -> list[float]:
        """λ of each layer, whose channels have ‖w‖ = 1 already."""
        if self.settings["weight_decay"] is not None:
            return [self.settings["weight_decay"]] * len(self._layers)
        ahead = LearningRates(self.run.scheduler, self.run.optimizer, is_stepped_each_step=True).ahead(self._last)
        rate_sum = sum(rates[0] for rates in ahead)
        thresholds = []
        for units in self._layers:
            norms = units.outputs.norm(dim=1)
            thresholds.append(float(norms.kthvalue(max(1, round(self.run.sparsity * len(norms)))).values))
        return [threshold / rate_sum for threshold in thresholds]

    def _shrink(self) -> None:
        rate = self.run.optimizer.param_groups[0]["lr"]
        for units, weight_decay in zip(self._layers, self.weight_decays):
            proximal_step(units, rate * weight_decay)

    def after_step(self, t: int) -> None:
        if t == self._last:
            self._handle.remove()
            self.prune(torch.cat([units.outputs.norm(dim=1) for units in self._layers]), self.run.sparsity)
        super().after_step(t)


STRUCTURED: dict[str, type[Method]] = {
    "groups": LpGroups,
    "masked": MaskedGroups,
    "cut": OneCut,
    "gcut": GradualCut,
    "pathprox": PathProx,
}
# Their lines can be read wherever this module is imported.
FAMILIES.update(STRUCTURED)


def fraction_in_groups(run: TrainingRun, groups: Any) -> float:
    """The fraction of the weights that may decay and are in groups.

    Args:
        run: its model and names.
        groups: as of a SparsityTarget, such as "channels".
    Returns:
        From 0 to 1. With this fraction of single zeros as many parameters are left.
    """
    in_groups = sum(layer.count * layer.elements for layer in resolve_groups(run.model, groups))
    return in_groups / sum(weight.numel() for weight in run.weights.values())
