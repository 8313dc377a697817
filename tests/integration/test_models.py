"""Every architecture of `helpers.architectures` goes the way of a user: what decays, a run to a target, `inspect`,
`export` to the bitmask form and back, `from_pretrained`. Groups and `--shrink` are in test_model_groups.py.

A dozen go with the other tests, the others under the marker `long`. After a change that is meant to change what
decays,

    LP_DIST_WRITE_DOCS=1 python -m pytest tests/integration/test_models.py -m "long or not long"

writes tests/integration/choices.json instead of comparing with it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

import pytest
import torch

from helpers.architectures import ARCHITECTURES, Architecture, tensors_of
from helpers.model_runs import SAMPLE, START, WRITES, sampled, train
from helpers.paths import ROOT
from helpers.saved_models import files_of, unequal_params, zeros_of
from lp_dist import SparsityTarget
from lp_dist.checkpoints.hf_names import hf_shapes_of, name_map, skeleton_of
from lp_dist.export.writer import export
from lp_dist.report.inspection import inspect
from lp_dist.report.saved_zeros import count_saved
from lp_dist.sparsity.selection import Choice, Reason, choices

CHOICES = ROOT / "tests" / "integration" / "choices.json"

# -- what decays --------------------------------------------------------------


def collapsed(choice_of: dict[str, Choice]) -> dict[str, dict[str, str]]:
    """{reason: {module: its parameters}}; a star is for the numbers of layers that are alike."""
    by_pattern: dict[str, set[Reason]] = defaultdict(set)
    for name, choice in choice_of.items():
        by_pattern[starred(name)].add(choice.reason)
    table: dict[str, dict[str, list[str]]] = {}
    for name, choice in choice_of.items():
        pattern = starred(name) if len(by_pattern[starred(name)]) == 1 else name
        words = pattern.split(".")
        module, param = ".".join(words[:-2]), ".".join(words[-2:])
        reason = f"decays: {choice.reason.value}" if choice.decays else f"dense: {choice.reason.value}"
        params = table.setdefault(reason, {}).setdefault(module, [])
        if param not in params:
            params.append(param)
    return {
        reason: {module: " ".join(params) for module, params in modules.items()} for reason, modules in table.items()
    }


def starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@pytest.mark.parametrize("name", sampled(ARCHITECTURES))
def test_what_decays_is_what_the_table_says(name):
    table = json.loads(CHOICES.read_text()) if CHOICES.exists() else {}
    chosen = collapsed(choices(ARCHITECTURES[name].model()))
    if WRITES:
        entries = {**table, name: chosen}
        ordered = {name: entries[name] for name in ARCHITECTURES if name in entries}
        CHOICES.write_text(json.dumps(ordered, indent=1) + "\n")
        return
    assert chosen == table[name]


def test_the_table_has_each_architecture_and_no_others():
    assert [*json.loads(CHOICES.read_text())] == [*ARCHITECTURES]
    assert set(SAMPLE) <= ARCHITECTURES.keys()
    types = {architecture.config().model_type for architecture in ARCHITECTURES.values()}
    assert len(types) >= 100


# -- a target, and the files --------------------------------------------------


@pytest.mark.parametrize("name", sampled(ARCHITECTURES))
def test_half_of_what_decays_is_zero_in_the_model_and_in_all_forms_of_its_files(name, tmp_path):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    decays = {name for name, choice in choices(model).items() if choice.decays}
    reached = train(architecture, model, SparsityTarget(0.5, start=START, end=0.9))
    counts = zeros_of(model, decays.__contains__)
    zeros, elements = map(sum, zip(*counts.values()))
    # What no gradient has reached stays dense, and does not count.
    trained = sum(elements * float(reached[name].double().mean()) for name, (_, elements) in counts.items())
    assert abs(zeros - trained / 2) < 1
    for name, flags in reached.items():
        assert name not in decays or model.get_parameter(name).view(len(flags), -1)[~flags].all()

    first, packed, back = (tmp_path / name for name in ("first", "packed", "back"))
    model.save_pretrained(first)
    files = files_of(first)
    inspection = inspect(first)
    assert inspection.total() == (zeros, elements)
    assert [(tensor.zeros, tensor.elements) for tensor in inspection.tensors] == [
        (int((files[tensor.name] == 0).sum()), files[tensor.name].numel()) for tensor in inspection.tensors
    ]
    assert len(inspection.tensors) == len(files)
    assert count_saved(first, decays).counts == counts

    shapes = {name: tuple(tensor.shape) for name, tensor in files.items()}
    skeleton = skeleton_of(model)
    assert hf_shapes_of(skeleton) == shapes
    names = name_map(skeleton, shapes)
    assert names.by_tensor.keys() == files.keys() and not names.duplicates
    assert not unequal_params(model, names, files)

    export(first, packed, bitmask=True)
    done = export(packed, back, verify=True)
    assert done.verification is not None and done.verification["logits"], done.verification_line()
    assert inspect(packed).total() == inspect(back).total() == (zeros, elements)
    again = files_of(back)
    assert files.keys() == again.keys() and all(torch.equal(files[name], again[name]) for name in files)
    loaded, info = type(model).from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    for before, after in zip(outputs(architecture, model), outputs(architecture, loaded), strict=True):
        assert torch.equal(before.nan_to_num(), after.nan_to_num())


def outputs(architecture: Architecture, model: Any) -> list[torch.Tensor]:
    for param in model.parameters():
        # How a product is added up depends on the alignment of its factors, and in a file they may lie anywhere.
        param.data = param.data.clone()
    torch.manual_seed(1)
    inputs = architecture.inputs(model.config)
    with torch.no_grad():
        return tensors_of(model.eval()(**inputs))
