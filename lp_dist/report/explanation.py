"""What a run would do to a model, before anything is trained: what decays and what stays dense, what a target comes
to, which weight groups there are, and the memory per rank. No weight is needed for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lp_dist.attachment.cuttable import cuttable_groups, plain_class
from lp_dist.attachment.plan import check_names, matching_overrides, split_targets
from lp_dist.errors import UsageError
from lp_dist.optim.batching import count_zeros
from lp_dist.reconstruction.cost import ReconstructionCost, linear_shapes, reconstruction_cost
from lp_dist.reconstruction.survivors import is_most
from lp_dist.report.console import table_text
from lp_dist.report.memory import ENGINES, footprint
from lp_dist.report.numbers import percent
from lp_dist.sharding.engines import unwrap
from lp_dist.sharding.shards import full_shape, is_dtensor
from lp_dist.sparsity.input_dims import input_dims, listed
from lp_dist.sparsity.measure import kind_of
from lp_dist.sparsity.selection import Reason, choices
from lp_dist.structured.budget import groups_to_prune, required_costs, shares_to_prune
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.removal import Removal, foreseen_removals
from lp_dist.structured.resolve import KINDS, resolve_groups
from lp_dist.targets.feasibility import Window, check_share, check_steps, update_interval
from lp_dist.targets.group_controller import check_order, check_room, group_budget
from lp_dist.targets.schedule import DecayWindow, window_steps
from lp_dist.targets.target import GroupTarget, PatternTarget, SparsityTarget, WeightTarget

# Reasons that come from a run, beside those of `Reason`, which come from the model.
FROZEN = "frozen (requires_grad=False)"
ALL_ZEROS = "all zeros now, and zero stays zero"
NOT_NAMED = "not among the names that may decay"
NAMED = "named by hand"
OVERRIDDEN = "left out by an override"

WIDTH = 100
# Kinds whose widths may be one entry of the configuration.
_FEED_FORWARD = ("channels", "expert_channels")
_GPUS = (1, 8, 64)
_SHARED = (
    "several heads share keys and values, and each group of them must lose as many heads, which is not likely;"
    " kv_groups prunes these groups"
)


@dataclass(frozen=True)
class ParameterChoice:
    """What holds for a parameter in the run.

    Args:
        name: as of the model's `named_parameters()`.
        shape: before sharding.
        kind: of layer, such as "q_proj", in the words of `lp-dist inspect`.
        decays: whether it can become sparse.
        reason: why, in words.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    decays: bool
    reason: str

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerKind:
    """The parameters of one kind of layer for which the same holds.

    Args:
        kind: as of `ParameterChoice`.
        decays: as of `ParameterChoice`.
        reason: as of `ParameterChoice`.
        tensors: how many parameters.
        weights: their elements.
    """

    kind: str
    decays: bool
    reason: str
    tensors: int
    weights: int


@dataclass(frozen=True)
class StepWindow:
    """When something decays.

    Args:
        start: as the target has it: a fraction of the run if <= 1, else an optimizer step.
        end: likewise.
        first: the first optimizer step, from 0; None where the steps of the run are not known.
        last: the step after the last one; likewise.
        total: optimizer steps of the run; likewise.
        update_every: optimizer steps between two updates of λ; None where λ is given, or likewise.
    """

    start: float
    end: float
    first: int | None = None
    last: int | None = None
    total: int | None = None
    update_every: int | None = None

    def __str__(self) -> str:
        if self.total is None:
            points = (f"{100 * x:g} % of the run" if x <= 1 else f"step {x:g}" for x in (self.start, self.end))
            return "from {} to {}".format(*points)
        interval = "step" if self.update_every == 1 else f"{self.update_every or 0:,} steps"
        updates = f", λ updated every {interval}" if self.update_every else ""
        return f"steps {self.first:,}–{self.last:,} of {self.total:,}{updates}"


@dataclass(frozen=True)
class TargetShare:
    """What a target comes to.

    Args:
        subject: "weights", a pattern such as "2:4", or "groups".
        sparsity: share of `of` to prune; of a budget what that comes to.
        of: weights that decay, or those in the groups.
        zeros: weights to be zero at the end.
        share_of_all: these among all parameters of the model.
        window: when.
        is_upper_bound: whether weights are in two of the groups, so that fewer become zero.
        groups: {kind: [groups to prune, all groups]}; empty for single weights.
    """

    subject: str
    sparsity: float
    of: int
    zeros: int
    share_of_all: float
    window: StepWindow
    is_upper_bound: bool = False
    groups: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        most = "at most " * self.is_upper_bound
        share = f"{most}{percent(self.share_of_all)} of all parameters"
        if self.groups:
            counts = ", ".join(f"{dead:,} of {count:,} {kind}" for kind, (dead, count) in self.groups.items())
            return f"prune {counts}: {most}{self.zeros:,} weights, or {share}; {self.window}"
        blocks = "" if self.subject == "weights" else f" in {self.subject} blocks"
        return (
            f"{percent(self.sparsity)} of the {self.of:,} weights that decay become zero{blocks}: {self.zeros:,}, or"
            f" {share}; {self.window}"
        )


@dataclass(frozen=True)
class GroupKind:
    """The weight groups of one kind, and what `lp-dist export --shrink` could do.

    Args:
        kind: "channels", "heads", ..., or what a user calls them.
        counts: groups in each module that has some.
        sizes: weights of each group, by module.
        pruned: how many groups are taken for dead in `removals`: as many as the target asks for, else half.
        removals: what would be removed then, in words; empty where nothing would be.
        reason: why there are none, or why dead ones stay in the model; empty where neither holds.
    """

    kind: str
    counts: list[int]
    sizes: list[int]
    pruned: int
    removals: list[str]
    reason: str

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class StrategyMemory:
    """Bytes of the training state of one rank, as of `lp_dist.report.memory`.

    Args:
        strategy: the engine in words.
        gpus: number of ranks.
        device: on the GPU.
        host: in host memory.
    """

    strategy: str
    gpus: int
    device: int
    host: int


@dataclass(frozen=True)
class UpdateCost:
    """What an update costs in which survivors move.

    Args:
        subject: as of `TargetShare`.
        gpus: number of ranks.
        cost: on each of them.
    """

    subject: str
    gpus: int
    cost: ReconstructionCost


@dataclass(frozen=True)
class Explanation:
    """What a run would do to a model; `print` shows it as tables.

    Args:
        model: name of its class.
        choices: of every parameter, in the order of the model.
        weight_decay: λ, where one is given.
        window: of a given λ.
        targets: groups first.
        groups: of all kinds; empty where they were left out.
        memory: of every strategy and number of GPUs.
        dtype: as of `lp_dist.report.memory.footprint`.
        strategy: that of the run; None where it is not known.
        notes: what else is to be known, a sentence each.
        updates: of targets whose survivors move, for every number of GPUs.
    """

    model: str
    choices: list[ParameterChoice]
    weight_decay: float
    window: StepWindow | None
    targets: list[TargetShare]
    groups: list[GroupKind]
    memory: list[StrategyMemory]
    dtype: str
    strategy: str | None
    notes: list[str]
    updates: list[UpdateCost] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(choice.weights for choice in self.choices)

    @property
    def decayed_weights(self) -> int:
        """Elements of the parameters that decay."""
        return sum(choice.weights for choice in self.choices if choice.decays)

    @property
    def kinds(self) -> list[LayerKind]:
        """What decays and what stays dense, by kind of layer and reason, in the order of the model."""
        grouped: dict[tuple[str, bool, str], list[ParameterChoice]] = {}
        for choice in self.choices:
            grouped.setdefault((choice.kind, choice.decays, choice.reason), []).append(choice)
        return [
            LayerKind(*key, len(members), sum(choice.weights for choice in members))
            for key, members in grouped.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        return {
            "version": 1,
            "model": self.model,
            "parameters": self.parameters,
            "decayed_weights": self.decayed_weights,
            "kinds": [asdict(kind) for kind in self.kinds],
            "weight_decay": self.weight_decay,
            "window": self.window and asdict(self.window),
            "targets": [asdict(target) for target in self.targets],
            "groups": [asdict(kind) for kind in self.groups],
            "memory": [asdict(memory) for memory in self.memory],
            "dtype": self.dtype,
            "strategy": self.strategy,
            "notes": self.notes,
            "updates": [asdict(update) for update in self.updates],
            "tensors": [{**asdict(choice), "shape": list(choice.shape)} for choice in self.choices],
        }

    def short(self) -> list[str]:
        """The same in a few lines."""
        dense: dict[str, int] = {}
        for choice in self.choices:
            if not choice.decays:
                dense[choice.reason] = dense.get(choice.reason, 0) + choice.weights
        lines = [f"Plan: {self._totals()}"]
        if dense:
            lines.append("Dense stay " + ", ".join(f"{weights:,} ({reason})" for reason, weights in dense.items()))
        lines += self._course()
        for need in self.memory:
            if need.strategy == self.strategy:
                scale, unit = _unit([need])
                host = f" and {_in_unit(need.host, scale)} {unit} of its host" if need.host else ""
                ranks = "" if need.gpus == 1 else f" on each of {need.gpus} ranks by {need.strategy}"
                lines.append(
                    f"Training state: {_in_unit(need.device, scale)} {unit}{host}{ranks}; activations come on top"
                )
        return lines

    def __str__(self) -> str:
        blocks = [f"{self.model}: {self._totals()}"]
        total = max(1, self.parameters)
        decaying = [kind for kind in self.kinds if kind.decays]
        if decaying:
            blocks.append(
                table_text(
                    "What decays",
                    ("kind of layer", "tensors", "weights", "of the model"),
                    (
                        (kind, f"{tensors:,}", f"{weights:,}", percent(weights / total))
                        for kind, (tensors, weights) in _summed(decaying, "kind").items()
                    ),
                    width=WIDTH,
                )
            )
        dense = [choice for choice in self.choices if not choice.decays]
        if dense:
            blocks.append(
                table_text(
                    "What stays dense",
                    ("because", "kinds of layer", "tensors", "weights", "of the model"),
                    (_dense_row(reason, members, total) for reason, members in _by_reason(dense).items()),
                    texts=("kinds of layer",),
                    no_wrap=("tensors", "weights", "of the model"),
                    width=WIDTH,
                )
            )
        blocks.append("\n".join(self._course()))
        if self.groups:
            blocks.append(self._groups_table())
        if self.memory:
            blocks.append(self._memory_table())
        if self.updates:
            blocks.append(self._updates_table())
        blocks += self.notes
        return "\n\n".join(blocks)

    def _totals(self) -> str:
        tensors = sum(choice.decays for choice in self.choices)
        share = percent(self.decayed_weights / max(1, self.parameters))
        return (
            f"{self.decayed_weights:,} of {self.parameters:,} parameters decay ({share}), in {tensors:,} of"
            f" {len(self.choices):,} tensors"
        )

    def _course(self) -> list[str]:
        """The targets or the λ, a line each."""
        if self.targets:
            among = "; the zeros of the groups count as well" if len(self.targets) > 1 else ""
            return [f"Target: {target}{among if not target.groups else ''}" for target in self.targets]
        if self.window is not None:
            return [f"λ = {self.weight_decay:g} acts {self.window}; how many weights become zero is not known before"]
        return ["No sparsity and no λ are given, so the run would be dense; with one of them this decays"]

    def _groups_table(self) -> str:
        rows: dict[tuple[str, ...], list[str]] = {}
        heads = next((kind for kind in self.groups if kind.kind == "heads"), None)
        for kind in self.groups:
            outcome = "; ".join(filter(None, [*kind.removals, kind.reason])) if kind.counts else f"none: {kind.reason}"
            if kind.kind == "kv_groups" and kind.counts and replace(kind, kind="heads") == heads:
                outcome = "the same as heads"
            sizes = (
                " to ".join(f"{size:,}" for size in sorted({min(kind.sizes), max(kind.sizes)})) if kind.sizes else ""
            )
            # Kinds that are not there for one reason share a row.
            rows.setdefault((_counts(kind.counts), sizes, outcome), []).append(kind.kind)
        dead = "half (or the target's)" if any(target.groups for target in self.targets) else "half"
        column = f"--shrink, if {dead} are zero"
        return table_text(
            "Groups of weights that can be pruned as wholes (--groups), and what lp-dist export --shrink then cuts",
            ("kind", "groups", "weights each", column),
            ((", ".join(kinds), *cells) for cells, kinds in rows.items()),
            texts=(column,),
            width=WIDTH,
        )

    def _memory_table(self) -> str:
        scale, unit = _unit(self.memory)
        precision = "bf16 mixed precision" if self.dtype == "bf16" else self.dtype
        gpus = list(dict.fromkeys(need.gpus for need in self.memory))
        rows = []
        for strategy in dict.fromkeys(need.strategy for need in self.memory):
            cells = [
                _in_unit(need.device, scale) + (f" + {_in_unit(need.host, scale)}" if need.host else "")
                for need in self.memory
                if need.strategy == strategy
            ]
            rows.append((f"{strategy} (this run)" if strategy == self.strategy else strategy, *cells))
        return table_text(
            f"Memory of the training state in {precision}, {unit} per GPU (+ host); activations come on top",
            ("strategy", *(f"{count:,} GPU{'s' * (count > 1)}" for count in gpus)),
            rows,
            width=WIDTH,
        )

    def _updates_table(self) -> str:
        rows = [
            (
                "1 GPU" if update.gpus == 1 else f"{update.gpus:,} GPUs",
                f"{update.cost.layers:,}" + ("" if update.subject == "weights" else f" ({update.subject})"),
                *(
                    _in_unit(number, 2**30)
                    for number in (update.cost.sample, update.cost.solving, update.cost.reduced)
                ),
                f"{update.cost.flops / 1e12:,.2f}",
            )
            for update in self.updates
        ]
        return table_text(
            "Survivors move at each update; at most, on each of them",
            ("", "layers", "inputs kept, GiB", "while solving, GiB", "summed, GiB", "TFLOP"),
            rows,
            width=WIDTH,
        )


def explain(
    model: Any,
    target: SparsityTarget | Sequence[SparsityTarget] | None = None,
    *,
    names: Iterable[str] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    include_embeddings: bool = False,
    weight_decay: float = 0.0,
    window: DecayWindow | None = None,
    total_steps: int | None = None,
    gpus: Sequence[int] = _GPUS,
    optimizer: str = "LpAdamW",
    momentum: bool = False,
    dtype: str = "bf16",
    strategy: str | None = None,
    groups: bool = True,
    all_zero: Collection[str] | None = None,
) -> Explanation:
    """Says what a run would do to a model: `print(lp_dist.explain(model, SparsityTarget(0.5)))`.

    It decides as `lp_dist.param_groups` and `lp_dist.attach` do. Nothing is changed, gathered or sent, so that one
    rank alone may call it.

    Args:
        model: plain or sharded, on any device (meta as well), or in an engine.
        target: as of `lp_dist.attach`.
        names: the parameters that may decay, as of `lp_dist.attach`; None: what the rules choose.
        overrides: as of `lp_dist.attach`.
        include_embeddings: also decay the embeddings and the output head.
        weight_decay: a λ instead of a target.
        window: when that λ acts; None: always.
        total_steps: optimizer steps of the run; None: not known, so that windows are fractions.
        gpus: numbers of ranks to calculate the memory for; empty: none.
        optimizer: as of `lp_dist.report.memory.footprint`.
        momentum: likewise.
        dtype: likewise, "bf16" for mixed precision or "fp32".
        strategy: of this run, to be marked among those of the memory, such as "ZeRO-3".
        groups: also recognise weight groups, and try how `lp-dist export --shrink` would cut them. It takes seconds
            for a large model.
        all_zero: names of the parameters that are all zeros now; None: looked up in those that lie on this rank in
            full.
    Raises:
        UsageError: a name or an override matches nothing, groups are not recognised in this model, or a target can't
            be reached.
    """
    module = unwrap(model)
    weight_target, group_target = split_targets(target)
    overrides = overrides or {}
    given = [weight_decay, *(values.get("weight_decay", 0.0) for values in overrides.values())]
    if (weight_target or group_target) and max(given) > 0:
        raise UsageError(
            f"weight_decay={max(given):g} is given as well as a target, which finds λ by itself; leave one of them out"
        )
    chosen = _choices(module, names, overrides, include_embeddings, all_zero, weight_decay)
    notes = _notes(module, chosen, all_zero, bool(weight_target or group_target))
    if isinstance(weight_target, PatternTarget):
        chosen = _with_blocks(module, chosen, weight_target.pattern)
    total = sum(choice.weights for choice in chosen)
    sets: list[WeightGroups] = []
    targets = []
    moving: list[tuple[str, list[tuple[int, int]], float | None]] = []  # (subject, shapes of layers, GiB at most)
    group_share = None
    if group_target is not None:
        with _collected("lp_dist.structured.recognition", "lp_dist.attachment.cuttable") as messages:
            sets = resolve_groups(module, group_target.groups)
            if group_target.budget is not None:
                cuttable = cuttable_groups(module, group_target, sets)
                group_target, sets = cuttable.target, cuttable.sets
        notes += messages
        readers = [member.name for groups in sets for member in groups.members if member.reads]
        shapes = _shapes_that_move(module, group_target, readers)
        moving.append(("groups", shapes, group_target.reconstruct_memory))
        group_window = _window_of(group_target, total_steps, optimizer, bool(shapes))
        group_share = _group_share(group_target, sets, total, group_window)
        targets.append(group_share)
    if weight_target is not None:
        shapes = _shapes_that_move(module, weight_target, (choice.name for choice in chosen if choice.decays))
        moving.append((weight_target.pattern or "weights", shapes, weight_target.reconstruct_memory))
        weight_window = _window_of(weight_target, total_steps, optimizer, bool(shapes))
        targets.append(_weight_share(weight_target, chosen, total, weight_window))
        if group_target is not None:
            _check_together(group_target, sets, weight_target, targets, chosen, total)
    updates = [
        UpdateCost(
            subject,
            count,
            reconstruction_cost(shapes, count, 2 if dtype == "bf16" else 4, memory),
        )
        for subject, shapes, memory in moving
        if shapes
        for count in gpus
    ]
    kinds = []
    if groups:
        counts = {} if group_target is None else groups_to_prune(group_budget(group_target), sets, total)
        kinds = _group_kinds(module, sets, counts)
    lambda_window = None
    if not targets and max(given) > 0:
        steps = (None, None) if total_steps is None else (window or DecayWindow()).steps(total_steps)
        lambda_window = StepWindow(
            0.0 if window is None else window.start, 1.0 if window is None else window.end, *steps, total_steps
        )
    return Explanation(
        type(module).__name__,
        chosen,
        weight_decay,
        lambda_window,
        targets,
        kinds,
        [need for count in gpus for need in _memory(total, count, optimizer, momentum, dtype)],
        dtype,
        strategy,
        notes,
        updates,
    )


# -- what decays --------------------------------------------------------------


def _choices(
    module: nn.Module,
    names: Iterable[str] | None,
    overrides: dict[str, dict[str, Any]],
    include_embeddings: bool,
    all_zero: Collection[str] | None,
    weight_decay: float,
) -> list[ParameterChoice]:
    params = dict(module.named_parameters())
    by_rules = choices(module, include_embeddings=include_embeddings)
    named = None if names is None else set(names)
    check_names(module, named or set())
    may_decay = {name for name, choice in by_rules.items() if choice.decays} if named is None else named
    trainable = [name for name, param in params.items() if param.requires_grad]
    values = matching_overrides(trainable, may_decay, overrides) if overrides else {}
    results = []
    for name, param in params.items():
        decays, reason = by_rules[name].decays, by_rules[name].reason.value
        strength = values.get(name, {}).get("weight_decay")
        if named is not None and (name in named) != decays:
            decays, reason = name in named, NAMED if name in named else NOT_NAMED
        if not decays and strength:
            decays, reason = True, NAMED
        if decays and not param.requires_grad:
            decays, reason = False, FROZEN
        if decays and strength == 0.0:
            decays, reason = False, OVERRIDDEN
        if name in (all_zero or ()) or (all_zero is None and decays and _is_all_zero(param)):
            decays, reason = False, ALL_ZEROS if decays or reason == NOT_NAMED else reason
        results.append(ParameterChoice(name, tuple(full_shape(param)), kind_of(name), decays, reason))
    return results


def _is_known(param: torch.Tensor) -> bool:
    """Whether all values of a parameter lie on this rank."""
    return not param.is_meta and not is_dtensor(param) and param.shape == full_shape(param)


def _is_all_zero(param: torch.Tensor) -> bool:
    return _is_known(param) and param.numel() > 0 and int(count_zeros(param.detach())) == param.numel()


def _notes(
    module: nn.Module, chosen: list[ParameterChoice], all_zero: Collection[str] | None, has_target: bool
) -> list[str]:
    notes = []
    foreign = [choice for choice in chosen if choice.decays and choice.reason == Reason.FOREIGN_MATRIX.value]
    if foreign:
        kinds = ", ".join(dict.fromkeys(choice.kind for choice in foreign))
        notes.append(
            f"The code that uses {len(foreign):,} of these tensors can't be read, so their shapes and names decided"
            f" that they decay: {kinds}."
        )
    frozen = [choice for choice in chosen if choice.reason == FROZEN]
    if frozen:
        notes.append("The memory is that of a run in which all parameters are trained.")
    later = []
    if all_zero is None and not all(map(_is_known, module.parameters())):
        later.append("what is all zeros")
    if has_target:
        later.append("what gets no gradient before the window")
    if later:
        notes.append(f"Stays dense as well, and is known in the run alone: {', and '.join(later)}. The log names it.")
    return notes


def _with_blocks(module: nn.Module, chosen: list[ParameterChoice], pattern: str) -> list[ParameterChoice]:
    """The choices where what can't have blocks of a pattern stays dense."""
    decaying = [choice.name for choice in chosen if choice.decays]
    reasons = input_dims(module, dict.fromkeys(decaying, pattern)).reasons
    if decaying and len(reasons) == len(decaying):
        raise UsageError(
            f"no parameter that decays can have pattern={pattern!r}: {listed(reasons)}. Name others (names=), or leave"
            " the pattern out"
        )
    return [
        replace(choice, decays=False, reason=f"no {pattern} blocks: {reasons[choice.name]}")
        if choice.name in reasons
        else choice
        for choice in chosen
    ]


# -- targets ------------------------------------------------------------------


def _window_of(target: SparsityTarget, total_steps: int | None, optimizer: str, moves: bool) -> StepWindow:
    if total_steps is None:
        return StepWindow(target.start, target.end)
    start, end = window_steps(target.start, target.end, total_steps)
    # Adam's second moments come with the first step.
    has_moments = optimizer == "LpAdamW"
    latent = getattr(target, "latent_windows", 0.0)
    if has_moments and (target.precondition != 0.0 or latent or (latent is None and target.cap == 1.0)):
        start = max(1, start)
    steps = Window(start, min(end, total_steps), total_steps)
    check_steps(target, steps)
    return StepWindow(
        target.start, target.end, *steps, update_interval(target, steps, moves or bool(target.reconstruct))
    )


def _weight_share(
    target: WeightTarget | PatternTarget, chosen: list[ParameterChoice], total: int, window: StepWindow
) -> TargetShare:
    sizes = [choice.weights for choice in chosen if choice.decays]
    elements = sum(sizes)
    check_share(target, elements, total)
    assert target.sparsity is not None
    sparsity = target.sparsity * total / elements if target.relative_to == "all" else target.sparsity
    by_tensor = target.scope == "layer" or target.pattern
    zeros = sum(round(sparsity * size) for size in sizes) if by_tensor else round(sparsity * elements)
    return TargetShare(target.pattern or "weights", sparsity, elements, zeros, zeros / total, window)


def _group_share(target: GroupTarget, sets: list[WeightGroups], total: int, window: StepWindow) -> TargetShare:
    counts = groups_to_prune(group_budget(target), sets, total)
    by_kind: dict[str, list[int]] = {}
    for groups in sets:
        so_far = by_kind.setdefault(groups.kind, [0, 0])
        so_far[0] += counts[groups.label]
        so_far[1] += groups.count
    weights = sum(groups.count * groups.elements for groups in sets)
    zeros = sum(counts[groups.label] * groups.elements for groups in sets)
    dims: dict[str, set[int]] = {}
    for member in (member for groups in sets for member in groups.members):
        dims.setdefault(member.name, set()).add(member.dim)
    overlap = any(len(grouped) > 1 for grouped in dims.values())
    sparsity = zeros / weights
    return TargetShare("groups", sparsity, weights, zeros, zeros / total, window, overlap, by_kind)


def _shapes_that_move(module: nn.Module, target: SparsityTarget, names: Iterable[str]) -> list[tuple[int, int]]:
    """(outputs, inputs) of the layers of these weights whose survivors a target moves."""
    if target.reconstruct is False:
        return []
    params, of_target = dict(module.named_parameters()), dict.fromkeys(names)
    shapes = linear_shapes(module, of_target)
    weights = sum(full_shape(params[name]).numel() for name in of_target)
    return shapes if target.reconstruct or is_most(sum(map(math.prod, shapes)), weights) else []


def _check_together(
    group_target: GroupTarget,
    sets: list[WeightGroups],
    weight_target: WeightTarget | PatternTarget,
    targets: list[TargetShare],
    chosen: list[ParameterChoice],
    total: int,
) -> None:
    """Raises UsageError where the two targets get into each other's way."""
    windows = [
        Window(target.window.first, target.window.last, target.window.total)
        for target in targets
        if target.window.first is not None and target.window.last is not None and target.window.total is not None
    ]
    if len(windows) == 2:
        check_order(*windows)
    budget = group_budget(group_target)
    shares = shares_to_prune(budget, sets, required_costs(budget, sets, total))
    shapes = {choice.name: torch.Size(choice.shape) for choice in chosen if choice.decays}
    check_room(group_target, shares, weight_target, targets[-1].sparsity, shapes)


# -- groups of weights --------------------------------------------------------


@contextmanager
def _collected(*loggers: str) -> Iterator[list[str]]:
    """Within it what these loggers would say is collected instead."""
    messages: dict[str, None] = {}

    def collect(record: logging.LogRecord) -> bool:
        messages[record.getMessage()] = None
        return False

    collected: list[str] = []
    try:
        for name in loggers:
            logging.getLogger(name).addFilter(collect)
        yield collected
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(collect)
        collected += [f"{message[0].upper()}{message[1:]}." for message in messages]


def _group_kinds(module: nn.Module, targeted: list[WeightGroups], counts: dict[str, int]) -> list[GroupKind]:
    """The groups of every kind, and of those that a user described.

    Args:
        module: the model.
        targeted: the groups of the target.
        counts: {label: how many of them it prunes}.
    """
    recognised: dict[str, list[WeightGroups]] = {}
    reasons: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for kind, recognise in KINDS.items():
        try:
            with _collected("lp_dist.structured.recognition") as messages:
                recognised[kind] = recognise(module)
            left_out[kind] = [
                "none in " + message.partition(" are recognised in ")[2].rstrip(".")
                for message in messages
                # Of another kind, which has a row of its own.
                if kind != "channels" or "expert_channels" not in message
            ]
        except UsageError as error:
            reasons[kind] = _why_none(str(error))
    described: dict[str, list[WeightGroups]] = {}
    for groups in targeted:
        if groups.kind not in KINDS:
            described.setdefault(groups.kind, []).append(groups)
    kinds = []
    for kind in [*KINDS, *described]:
        sets = recognised.get(kind) or described.get(kind, [])
        if not sets:
            kinds.append(GroupKind(kind, [], [], 0, [], reasons[kind]))
            continue
        dead = {groups.label: counts.get(groups.label, 0) for groups in sets}
        if not any(dead.values()):
            dead = {groups.label: min(groups.count // 2, groups.removable) for groups in sets}
        removals, reason = (
            _foreseen(module, dead, recognised)
            if kind in KINDS
            else ([], "groups of your own: it is not known how to remove them")
        )
        if kind in _FEED_FORWARD and reason:
            reason += _with_the_other(module, kind, dead, recognised)
        reason = "; ".join(filter(None, [reason, *left_out.get(kind, [])]))
        kinds.append(
            GroupKind(
                kind,
                [groups.count for groups in sets],
                [groups.elements for groups in sets],
                sum(dead.values()),
                removals,
                reason,
            )
        )
    return kinds


def _why_none(message: str) -> str:
    """Why a kind of groups is not recognised, out of the message, which also says what was looked for."""
    failures = message.partition(" Describe them by")[0].partition(" Found: ")[2].rstrip(".")
    # The first module is enough to know where.
    why = failures.partition("; ")[0]
    return why or (message if "Looked for" not in message else "nothing in the model is built like them")


def _foreseen(
    module: nn.Module, dead: dict[str, int], recognised: dict[str, list[WeightGroups]]
) -> tuple[list[str], str]:
    """What --shrink would remove, and why not more."""
    cls = plain_class(module)
    if cls is None:
        return [], "not known: this is no model of Transformers with a configuration"
    if not any(dead.values()):
        sets = [groups for kind in recognised.values() for groups in kind if groups.label in dead]
        why = (
            "routers choose as many as there are" if any(groups.least > 1 for groups in sets) else "there is just one"
        )
        return [], f"no: {why}"
    try:
        foreseen = foreseen_removals(cls, module.config, dead, recognised)
    except UsageError as error:
        return [], f"not known: {error}"
    removed = [removal for removal in foreseen.removals if removal.removed]
    # Without a reason it is the rest of what another line has removed.
    of_heads = any(groups.label in dead for groups in recognised.get("heads", []))
    reasons = dict.fromkeys(
        _SHARED if of_heads and "groups" in removal.what else removal.why
        for removal in foreseen.removals
        if removal.why and removal.removed < sum(removal.dead)
    )
    if not removed:
        return [], f"no: {'; '.join(reasons)}"
    lines = _removed(
        removed, [groups.count for kind in recognised.values() for groups in kind if groups.label in dead]
    )
    return lines, f"not all: {'; '.join(reasons)}" if reasons else ""


def _with_the_other(
    module: nn.Module, kind: str, dead: dict[str, int], recognised: dict[str, list[WeightGroups]]
) -> str:
    """Whether --shrink would cut all modules if channels of both kinds were dead, as the end of a sentence: shared
    experts may have the width of the others.

    Args:
        module: the model.
        kind: of the groups, of which not all could be removed.
        dead: {label: how many of them are dead}.
        recognised: the groups of all kinds.
    """
    other = next(other for other in _FEED_FORWARD if other != kind)
    half = {groups.label: min(groups.count // 2, groups.removable) for groups in recognised.get(other, [])}
    cls = plain_class(module)
    if not half or cls is None or dead.keys() & foreseen_removals(cls, module.config, dead | half, recognised).uncut:
        return ""
    return f"; if {other} are pruned as well, all are cut"


def _removed(removals: list[Removal], counts: list[int]) -> list[str]:
    """What is removed, a line for each kind and width.

    Args:
        removals: of some groups.
        counts: how many groups there are in each module.
    """
    layers: dict[tuple[str, str, str], int] = {}
    for removal in removals:
        before, after = (
            f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
            for counts in (removal.before, removal.after)
        )
        key = removal.what, f"{before} → {after}", removal.where
        layers[key] = layers.get(key, 0) + len(removal.before)
    # Of heads that share keys and values, groups of heads may be removed.
    has_kinds = sorted(number for removal in removals for number in removal.before) != sorted(counts)
    return [
        f"{widths}{f' {what}' if has_kinds else ''} in "
        + (f"each of {count:,} {where}" if count > 1 else "one module")
        for (what, widths, where), count in layers.items()
    ]


def _counts(counts: list[int]) -> str:
    if not counts:
        return ""
    if len(set(counts)) == 1:
        return f"{len(counts):,} × {counts[0]:,}"
    return f"{sum(counts):,} in {len(counts):,} modules"


# -- memory -------------------------------------------------------------------


def _memory(parameters: int, gpus: int, optimizer: str, momentum: bool, dtype: str) -> list[StrategyMemory]:
    needs = []
    for strategy, stage, offload in ENGINES:
        need = footprint(parameters, gpus, stage, optimizer=optimizer, momentum=momentum, dtype=dtype, offload=offload)
        needs.append(StrategyMemory(strategy, gpus, need.device.total, need.host.total))
    return needs


def _unit(needs: Sequence[StrategyMemory]) -> tuple[int, str]:
    """The unit in which these are printed: bytes of it, and its name."""
    most = max(max(need.device, need.host) for need in needs)
    return next(((scale, unit) for scale, unit in ((2**30, "GiB"), (2**20, "MiB")) if most >= scale), (2**10, "KiB"))


def _in_unit(number: int, scale: int) -> str:
    return f"{number / scale:,.2f}"


# -- rows ---------------------------------------------------------------------


def _summed(kinds: list[LayerKind], key: str) -> dict[str, tuple[int, int]]:
    """{value of `key`: (tensors, weights)}."""
    sums: dict[str, tuple[int, int]] = {}
    for kind in kinds:
        tensors, weights = sums.get(getattr(kind, key), (0, 0))
        sums[getattr(kind, key)] = tensors + kind.tensors, weights + kind.weights
    return sums


def _by_reason(chosen: list[ParameterChoice]) -> dict[str, list[ParameterChoice]]:
    grouped: dict[str, list[ParameterChoice]] = {}
    for choice in chosen:
        grouped.setdefault(choice.reason, []).append(choice)
    return grouped


def _dense_row(reason: str, members: list[ParameterChoice], total: int) -> tuple[str, ...]:
    weights = sum(choice.weights for choice in members)
    biases = dict.fromkeys(choice.kind for choice in members if choice.name.endswith(".bias"))
    kinds = dict.fromkeys(choice.kind for choice in members if not choice.name.endswith(".bias"))
    alone = [kind for kind in biases if kind not in kinds]
    words = ", ".join(filter(None, [", ".join(kinds), f"biases of {', '.join(alone)}" if alone else ""]))
    return reason, words, f"{len(members):,}", f"{weights:,}", percent(weights / total)
