"""Groups of every architecture of `helpers.architectures` are pruned, and removed by `--shrink` where that was
foreseen. What comes out is docs/models.md.

Four go with the other tests, the others under the marker `long`. After a change that is meant to change what decays,
or what is cut,

    LP_DIST_WRITE_DOCS=1 python -m pytest tests/integration/test_model_groups.py -m "long or not long"

writes docs/models.md instead of comparing with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.architectures import ARCHITECTURES, CHAPTERS, FAILING, Architecture
from helpers.model_runs import START, WRITES, sampled, train
from helpers.paths import ROOT
from lp_dist import SparsityTarget
from lp_dist.errors import UsageError, first_line
from lp_dist.export.writer import export
from lp_dist.sparsity.measure import kind_of
from lp_dist.sparsity.selection import Reason, choices
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.removal import foreseen_removals
from lp_dist.structured.resolve import recognised_groups

PAGE = ROOT / "docs" / "models.md"
# Pruning groups takes longest.
SAMPLE_OF_GROUPS = [
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
]
# Kinds of groups that share no weights, and so may be pruned in one run. A shared expert may be as wide as the others,
# so that its channels go with theirs.
TOGETHER = (("channels", "kv_groups", "expert_channels"), ("heads", "experts"))


@dataclass
class ModelLine:
    """A line of docs/models.md.

    Args:
        decays: weights that decay.
        params: of the model.
        dense: {reason: the kinds of layers that stay dense for it}.
        groups: kinds that are recognised.
        cut: those that `--shrink` cuts.
        kept: {kind: the reasons why `--shrink` doesn't cut it, or not all of it}.
    """

    model_type: str
    decays: int
    params: int
    dense: dict[str, list[str]] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)


LINES: dict[str, ModelLine] = {}


def row_of(name: str, model: Any) -> ModelLine:
    chosen, params = choices(model), dict(model.named_parameters())
    decaying = sum(params[name].numel() for name, choice in chosen.items() if choice.decays)
    row = ModelLine(model.config.model_type, decaying, sum(param.numel() for param in params.values()))
    for name, choice in chosen.items():
        if not choice.decays and choice.reason is not Reason.VECTOR and params[name].dim() > 1:
            kinds = row.dense.setdefault(choice.reason.name.lower().replace("_", " "), [])
            if kind_of(name) not in kinds:
                kinds.append(kind_of(name))
    return row


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, SAMPLE_OF_GROUPS))
def test_groups_are_pruned_and_cut_where_that_was_foreseen(name, tmp_path):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    row = row_of(name, model)
    recognised, why = recognised_groups(model)
    assert all(recognised.values()) and all(why)
    row.groups = [*recognised]
    for kinds in TOGETHER:
        pruned = [kind for kind in kinds if kind in recognised]
        cut = foresee(model, recognised, pruned, row) if pruned else set()
        # Heads of their own are pruned where they are no part of groups that are pruned already.
        pruned = [kind for kind in pruned if kind != "heads" or "kv_groups" not in recognised]
        pruned = [kind for kind in pruned if any(groups.removable for groups in recognised[kind])]
        if pruned:
            check_groups(architecture, recognised, pruned, cut, tmp_path / pruned[0])
    LINES[name] = row


def foresee(model: Any, recognised: dict[str, list[WeightGroups]], kinds: list[str], row: ModelLine) -> set[str]:
    """What `--shrink` would remove if half of these groups were dead: the labels of the groups that it would cut."""
    counts = {groups.label: min(groups.count // 2, groups.removable) for kind in kinds for groups in recognised[kind]}
    foreseen = foreseen_removals(type(model), model.config, counts)
    for kind in kinds:
        uncut = [groups.label in foreseen.uncut for groups in recognised[kind]]
        if not all(uncut):
            row.cut.append(kind if not any(uncut) else f"{kind} in part")
        if any(uncut):
            noun = "head" if kind in ("heads", "kv_groups") else kind.rpartition("_")[2]
            reasons = [removal.why for removal in foreseen.removals if noun in removal.what and removal.why]
            removable = any(counts[groups.label] for groups in recognised[kind])
            row.kept[kind] = reasons if removable else ["none can be spared"]
            assert row.kept[kind]
    return counts.keys() - foreseen.uncut


def check_groups(
    architecture: Architecture,
    recognised: dict[str, list[WeightGroups]],
    kinds: list[str],
    cut: set[str],
    directory: Path,
) -> None:
    """Prunes half of these groups, and removes what can be removed: some of each of those in `cut`, and no others."""
    model = architecture.model()
    reached = train(architecture, model, SparsityTarget(0.5, start=START, end=0.9, groups=kinds))
    counts = {
        groups.label: min(groups.count // 2, groups.removable)
        for kind in kinds
        for groups in recognised[kind]
        if any(reached[member.name].any() for member in groups.members)
    }
    # What no gradient reaches keeps its groups, and so may others of the one width that it has with them.
    cut = cut & (counts.keys() - foreseen_removals(type(model), model.config, counts).uncut)
    model.save_pretrained(directory / "model")
    try:
        done = export(directory / "model", directory / "small", shrink=True, verify=True)
    except UsageError as error:
        assert not cut, error
        assert re.search(r"nothing: .+ dead and stay: .+|nothing to remove: .+", str(error))
        return
    assert all(removal.why for removal in done.shrink_plan.removals if not removal.removed)
    assert done.verification is not None and done.verification["logits"], done.verification_line()
    before, after = (
        {name: param.shape for name, param in each.named_parameters()}
        for each in (model, type(model).from_pretrained(directory / "small"))
    )
    cuts = {
        groups.label
        for kind in kinds
        for groups in recognised[kind]
        if any(after.get(member.name) != before[member.name] for member in groups.members)
    }
    assert cuts == cut & {groups.label for kind in kinds for groups in recognised[kind]}


# -- the page -----------------------------------------------------------------


def short(reason: str) -> str:
    """Why groups stay, for models of any size."""
    reason = re.sub(r"[\w.]+\.\d+[\w.]*(\[\d+\])?", "a layer", reason)
    return re.sub(r" \d[\d,]*", " N", reason).replace("one of a layer", "one of its groups")


def cell_of_cuts(row: ModelLine, notes: list[str]) -> str:
    stays = []
    for kind, reasons in row.kept.items():
        for reason in map(short, reasons):
            if reason not in notes:
                notes.append(reason)
        numbers = dict.fromkeys(str(notes.index(short(reason)) + 1) for reason in reasons)
        stays.append(f"{kind} ({', '.join(numbers)})")
    return "; ".join([", ".join(row.cut) or "nothing", *([f"not {', '.join(stays)}"] if stays else [])])


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def line_of(name: str, notes: list[str]) -> list[str]:
    row = LINES[name]
    dense = "; ".join(f"{reason}: {', '.join(f'`{kind}`' for kind in kinds)}" for reason, kinds in row.dense.items())
    share = f"{row.decays / row.params:.0%}"
    return [
        f"`{row.model_type}`",
        f"`{name}`",
        share,
        dense,
        ", ".join(row.groups) or "none",
        cell_of_cuts(row, notes),
    ]


def page() -> str:
    notes: list[str] = []
    chapters = []
    for chapter in CHAPTERS:
        names = [name for name, architecture in ARCHITECTURES.items() if architecture.chapter == chapter]
        names.sort(key=lambda name: (LINES[name].model_type, name))
        head = ["model type", "class", "decays", "stays dense", "groups", "`--shrink` removes"]
        chapters.append(f"## {chapter}\n\n{table(head, [line_of(name, notes) for name in names])}")
    why = "\n".join(f"{i}. {note}." for i, note in enumerate(notes, 1))
    errors = table(
        ["class", "what Transformers says"], [[f"`{cls}`", f"`{error_of(cls)}`"] for cls in sorted(FAILING)]
    )
    return "\n\n".join([*chapters, f"## Why groups stay\n\n{why}", f"## What can't be built or run\n\n{errors}"])


def error_of(cls: str) -> str:
    """What is said when a model of this class is built, or run."""
    with pytest.raises(Exception) as raised:
        FAILING[cls]()
    return f"{type(raised.value).__name__}: {first_line(raised.value).partition('. ')[0]}"


def test_the_page_says_what_ran():
    command = "python -m pytest tests/integration/test_model_groups.py"
    first, last = f"<!-- models: {command} -->\n", "\n<!-- end of models -->"
    text = PAGE.read_text()
    assert text.count(first) == text.count(last) == 1, f"{PAGE} lacks its markers: {first}{last}"
    before, _, rest = text.partition(first)
    written, _, after = rest.partition(last)
    if LINES.keys() == ARCHITECTURES.keys():
        made = page()
        if WRITES:
            PAGE.write_text(before + first + made + last + after)
        else:
            assert written == made, f"{PAGE} says something else; LP_DIST_WRITE_DOCS=1 writes what ran"
        return
    assert not WRITES, "run the whole file, and mend what failed before this"
    # With a part of the models, their lines must be those of the page.
    notes = re.findall(r"^\d+\. (.+)\.$", written.partition("## Why groups stay")[2], re.MULTILINE)
    for name in LINES:
        assert "| " + " | ".join(line_of(name, notes)) + " |" in written, name
