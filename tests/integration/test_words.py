"""The house speaks the field's words: names that it once had for them don't come back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT

# What each was called before, by what the field calls it. Whole names in our own code; words of libraries stay, and so
# do the symbols of the formulas.
BANNED = {
    "an update (of λ and the cutoff), update_every": "look looks every",
    "the final pruning, pruned_at_end": "close_window closed landing last_threshold by_threshold",
    "saliency": "resistance sensitivity",
    "latent weights": "memories Hidden hidden settle remembers",
    "regrowth, near zero": "grace floor faded",
    "relative_to": "sparsity_of group_of",
    "the domain's noun (requested, shards, overrides, ...)": "asked told found own one whole odd mine theirs",
    "assert_same_on_all_ranks, all_gather_objects, all_reduce_sum, all_reduce_max": "agree everyones summed largest",
    "a Protocol with a name": "book book_of",
    "Shard, LocalShard, ParamSlice, StepRow, tiles": "Segment SegmentMap segments Run Part Piece pieces Place Row",
    "Controller, WeightController, GroupController, GroupDecayHook, DecaySettings": (
        "Planned Control GroupControl Grouped Force forces"
    ),
    "inner optimizer; monitoring; runtime names": "live live_optimizer",
    "Hugging Face names, hf_names": "publishing published Published",
    "bitmask (storage), shrink (removal)": "compact compacted compaction",
    "task, stable fraction, implementations, lp_dist": "work works fall contender contenders ours",
    "shrink, become zero, to be pruned, keep, zero": "bend die dies doomed spare spared",
}
# Of libraries: math.floor, torch.topk(largest=), ...
OF_LIBRARIES = {"floor", "largest"}


def python_files() -> list[Path]:
    folders = (ROOT / "lp_dist", ROOT / "tests", ROOT / "docs" / "examples")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that the code itself gives or uses, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and node.attr not in OF_LIBRARIES:
            yield node.attr, node.lineno
        elif isinstance(node, ast.keyword) and node.arg and node.arg not in OF_LIBRARIES:
            yield node.arg, node.value.lineno


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_word_is_a_name(path: Path):
    field_words = {word: instead for instead, words in BANNED.items() for word in words.split()}
    banned = [
        f"line {line}: {name}; say {field_words[name]}"
        for name, line in names(ast.parse(path.read_text()))
        if name in field_words
    ]
    assert not banned, "\n".join(banned)


def test_a_banned_word_is_seen_wherever_it_is_a_name():
    source = "def settle(grace):\n    book.looks = found(memories=1)\n    class Piece: ..."
    assert {name for name, _ in names(ast.parse(source))} >= {
        "settle",
        "grace",
        "book",
        "looks",
        "found",
        "memories",
        "Piece",
    }
    assert "floor" not in {name for name, _ in names(ast.parse("math.floor(x)"))}


def test_no_line_is_over_119_columns():
    """ruff sees to Python alone."""
    folders = ("lp_dist", "tests", "docs/examples", "launch", "configs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    code = [path for path in files if path.suffix in (".py", ".cpp", ".sh", ".html", ".yaml", "")]
    long_lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*code, ROOT / "pyproject.toml"]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 119
    ]
    assert not long_lines
