"""The documentation speaks of messages, files and options that there are."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What others print, or what is no message but something seen.
FOREIGN = (
    "You are using an untested ZeRO Optimizer",
    "nothing happens for minutes",
    "lp/measured stays behind lp/plan",
)


def texts_of(tree: ast.AST) -> list[str]:
    """Every string in a module; what an f-string fills in is left out."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("\0".join(value.value if isinstance(value, ast.Constant) else "" for value in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


@pytest.fixture(scope="module")
def said() -> str:
    return "\n".join(
        text.replace("\0", "")
        for path in (ROOT / "lp_dist").rglob("*.py")
        for text in texts_of(ast.parse(path.read_text()))
    )


def test_every_message_of_the_troubleshooting_page_is_one_that_is_printed(said):
    messages = re.findall(r"\*\*(.+?)\*\*", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(messages) > 25
    for message in messages:
        if message.startswith(FOREIGN):
            continue
        for phrase in re.split(r"\.\.\.|\bN\b|\bM\b", message):
            assert len(phrase.strip(" .%,")) < 3 or phrase.strip(" .%,=") in said, (message, phrase)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)#\s]*#?[^)\s]*)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if heading:
            headings = {
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in path.read_text().splitlines()
                if line.startswith("#")
            }
            assert heading in headings, f"{page.name} links to {target}; there are {sorted(headings)}"


def test_every_public_name_is_documented():
    import lp_dist

    for name in lp_dist.__all__:
        assert (getattr(lp_dist, name).__doc__ or "").strip(), name
