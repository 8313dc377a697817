"""Shared by the tests: what may become of a file, by chance or by somebody's will, and what it must lead to."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lp_dist.errors import UsageError


class Touching:
    """Unpickled, it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def files_of(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def damaged(content: bytes, chance: random.Random) -> bytes:
    """What may become of a file: cut short, bits turned over, a stretch of another, longer, empty, of another kind."""
    kind = chance.choice(["short", "bits", "bits", "bits", "stretch", "longer", "empty", "text", "digits"])
    changed = bytearray(content)
    if kind == "short":
        return bytes(changed[: chance.randrange(len(content) + 1)])
    if kind == "bits":
        # Most of a file is weights, in which anything is right: so near its ends, where indices lie.
        for _ in range(chance.choice([1, 3, 20])):
            reach = chance.choice([len(content), 200, 1000])
            at = chance.randrange(min(reach, len(content))) if content else 0
            at = at if chance.random() < 0.5 else len(content) - 1 - at
            if content:
                changed[at] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == "stretch" and content:
        start = chance.randrange(len(content))
        changed[start : start + 64] = chance.randbytes(64)
        return bytes(changed)
    if kind == "digits":  # numbers of headers and indices
        return bytes(chance.choice(b"0123456789-") if 48 <= b <= 57 and chance.random() < 0.2 else b for b in changed)
    return {"longer": content + chance.randbytes(100), "empty": b"", "text": b'{"a": [1, null, {}]}'}.get(kind, b"[]")


# Of the wrong type or size, or leading somewhere.
_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 2**70, 10**400, 1e308, "a", "", "../../x", "/etc/passwd", "a\0b", "\x1b[2J", "[/b]",
    "$x^$", "--overwrite", [], {}, [[]], [1, "a", None], {"a": {}}, ["../x"], "inf", "<script>",
]  # fmt: skip


def altered(content: Any, chance: random.Random) -> Any:
    """JSON's types with one to three values, anywhere in them, replaced, left out or added."""
    content = json.loads(json.dumps(content))
    for _ in range(chance.choice([1, 1, 2, 3])):
        where = content
        while True:
            keys = list(where) if isinstance(where, dict) else range(len(where))
            if not keys:
                break
            key = chance.choice(list(keys))
            if isinstance(where[key], (dict, list)) and where[key] and chance.random() < 0.7:
                where = where[key]
                continue
            kind = chance.choice(["other", "other", "none of it", "more"])
            if kind == "none of it":
                del where[key]
            elif kind == "more" and isinstance(where, dict):
                where[chance.choice(["a", "../x", "[/b]", "\x1b[2J", ""])] = copy.deepcopy(chance.choice(_VALUES))
            else:
                where[key] = copy.deepcopy(chance.choice(_VALUES))
            break
    return content


def fuzz(
    directory: Path,
    scratch: Path,
    rounds: int,
    seed: int,
    use: Callable[[Path], Any],
    of: Callable[[Path], bool] = lambda file: True,
) -> tuple[int, int]:
    """Damages one file after another of a copy of the directory in `scratch`, and uses that.

    Args:
        use: the reader.
        of: which files are damaged.
    Returns:
        How often it was refused, in one line with the way out, and how often it was taken.
    """
    chance = random.Random(seed)
    refused = taken = 0
    for _ in range(rounds):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(directory, scratch)
        file = scratch / chance.choice([file for file in files_of(directory) if of(file)])
        content = file.read_bytes()
        if file.suffix == ".json" and chance.random() < 0.7:
            file.write_text(json.dumps(altered(json.loads(content), chance)))
        else:
            file.write_bytes(damaged(content, chance))
        before = files_of(scratch)
        if is_taken(lambda: use(scratch)):
            taken += 1
        else:
            refused += 1
        assert files_of(scratch) == before, "reading writes nothing"
    return refused, taken


def is_taken(use: Callable[[], Any]) -> bool:
    """Whether it is; else it is refused in one line, with the way out. Anything else is an error."""
    try:
        use()
    except UsageError as error:
        assert "\n" not in str(error) and ";" in str(error), f"no one line with the way out: {error}"
        return False
    return True
