"""The ways to fewer channels and heads that `lp-dist bench structure` compares; the share of a run is that of the
groups of each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_dist.attachment.attach import attach
from lp_dist.benchmarks.quality.methods import FAMILIES, Method, Run
from lp_dist.sharding.shards import shards
from lp_dist.structured.group_decay import Grouped
from lp_dist.structured.naming import structure
from lp_dist.targets.target import CURVES, GAMMA, SparsityTarget


class LpGroups(Method):
    """Ours: a `SparsityTarget` of groups, with its keys."""

    keys = {
        **{
            key: SparsityTarget.__dataclass_fields__[key].default
            for key in ("start", "end", "cap", "grace", "curve", "every", "interval")
        },
        "p": 0.5,
        "precondition": GAMMA,
        "scope": "layer",
        "groups": "channels",
    }

    def start(self) -> None:
        target = SparsityTarget(self.run.sparsity, **self.settings)
        self.attached = attach(
            self.run.model,
            self.run.optimizer,
            target=target,
            total_steps=self.run.steps,
            lr_scheduler=self.run.scheduler,
        )

    def after_step(self, t: int) -> None:
        self.attached.after_step()


class _Cut(Method):
    """Groups that are zero stay so. (What kills and holds them is ours; what is compared is which die, and when.)"""

    keys = {"groups": "channels"}
    c = 0.0  # of the saliency ‖w·(√v̂)^c‖

    def start(self) -> None:
        sets = structure(self.run.model, self.settings["groups"])
        self.grouped = Grouped(
            self.run.optimizer, sets, shards(self.run.model, self.run.optimizer), p=0.0, precondition=2.0 * self.c
        )

    def kill(self, scores: Tensor, share: float) -> None:
        """The share of each layer that has the lowest scores."""
        dead = []
        for layer in scores.split([groups.count for groups in self.grouped.sets]):
            dead.append(torch.zeros(len(layer), dtype=torch.bool, device=layer.device))
            dead[-1][torch.argsort(layer, stable=True)[: round(share * len(layer))]] = True
        self.grouped.kill(torch.cat(dead))
        self.grouped.hold(torch.cat(dead))

    def scores(self) -> Tensor:
        self.grouped.forget()
        self.grouped.measure()
        return self.grouped.squares


class OneCut(_Cut):
    """Before the fine-tune, at once. criterion: "norm", or "taylor", Σ|w·∂L/∂w| over the group on text to calibrate
    on, which is LLM-Pruner's (arXiv 2305.11627; first order, element by element)."""

    keys = {**_Cut.keys, "criterion": "norm"}

    def start(self) -> None:
        super().start()
        self.kill(self.scores() if self.settings["criterion"] == "norm" else self._taylor(), self.run.sparsity)

    def _taylor(self) -> Tensor:
        model, inputs = self.run.model, self.run.inputs()
        for rows in inputs.split(1):
            rows = rows.to(next(model.parameters()).device)
            model(input_ids=rows, labels=rows).loss.backward()
        params = dict(model.named_parameters())
        scores = []
        for groups in self.grouped.sets:
            score = torch.zeros(groups.count, device=next(model.parameters()).device)
            for member in groups.members:
                effect = (
                    (params[member.name] * params[member.name].grad)
                    .detach()
                    .abs()
                    .narrow(member.dim, member.start, member.stop - member.start)
                )
                score += effect.transpose(0, member.dim).flatten(1).sum(1) if effect.ndim > 1 else effect
            scores.append(score)
        self.run.optimizer.zero_grad()
        return torch.cat(scores)


class GradualCut(_Cut):
    """A cubic ramp over the same window as ours, 20 times, by ‖w·(√v̂)^c‖: what `gmp` is for single weights."""

    keys = {**_Cut.keys, "c": 0.0, "start": 0.1, "end": 0.7, "curve": "cubic"}

    def start(self) -> None:
        self.c = self.settings["c"]
        super().start()

    def after_step(self, t: int) -> None:
        s = self.settings
        first, last = max(1, round(s["start"] * self.run.steps)), round(s["end"] * self.run.steps)
        every = max(1, round((last - first) / 20))
        if first <= t <= last and ((t - first) % every == 0 or t == last):
            self.kill(self.scores(), self.run.sparsity * CURVES[s["curve"]]((t - first) / (last - first)))


STRUCTURED: dict[str, type[Method]] = {"groups": LpGroups, "cut": OneCut, "gcut": GradualCut}
FAMILIES.update(STRUCTURED)  # their lines can be read wherever this module is imported


def share_of(run: Run, groups: Any) -> float:
    """Of the weights that may decay the share that is in groups: what single zeros must be to leave as many
    parameters.
    """
    return sum(one.count * one.elements for one in structure(run.model, groups)) / sum(
        weight.numel() for weight in run.weights.values()
    )
