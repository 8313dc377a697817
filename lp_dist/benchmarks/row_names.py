"""Old names in committed results, and the names that replaced them.

Rows in docs/results/*.jsonl are measurements as printed, and are never rewritten. They are renamed here, when they are
read, so that a run that has a row is not run again.
"""

from __future__ import annotations

from typing import Any

# Keys of a row.
KEYS = {
    "work": "task",
    "contender": "implementation",
    "ours": "lp_dist",
    "part": "measured",
    "blocks": "rounds",
    "hidden": "hidden_size",
    "by_threshold": "pruned_at_end",
}
# Settings of a method: keys of a row's "settings", and words of its "method".
SETTINGS = {
    "memory": "latent_windows",
    "grace": "regrowth",
    "every": "update_every",
    "fall": "stable_fraction",
}
# Settings of a family that rows from before there was one lack, with the value with which they were run.
LACKING: dict[str, dict[str, Any]] = {
    "lp": {"reconstruct": 0, "pattern": None},
    "groups": {"reconstruct": 0},
    "masked": {"reconstruct": 0},
    "gmp": {"pattern": None, "correct": 0},
    "pat": {"pattern": None},
    "sparsegpt": {"pattern": None},
}
# Values of a row's "measured".
MEASURED = {"whole": "training step"}
# Options of the command that made a run.
OPTIONS = {"--no-whole": "--no-training-steps", "--blocks": "--rounds", "--hidden": "--hidden-size"}


def current_names(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the names of today; one that has them already stays as it is.

    Args:
        row: of any benchmark, as it was read from its file.
    Returns:
        A new dict. A row from before there was a setting has the value with which it was run, such as
        a `stable_fraction` of 0.
    """
    renamed = {KEYS.get(key, key): value for key, value in row.items()}
    if "measured" in renamed:
        renamed["measured"] = MEASURED.get(renamed["measured"], renamed["measured"])
    if "command" in renamed:
        renamed["command"] = " ".join(OPTIONS.get(word, word) for word in renamed["command"].split(" "))
    if "method" in renamed:
        renamed["method"] = current_line(renamed["method"])
    if "settings" in renamed:
        settings = {SETTINGS.get(key, key): value for key, value in renamed["settings"].items()}
        family = str(renamed.get("method", "")).partition(":")[0]
        common = {"stable_fraction": 0.0, "teacher": "dense", "optimizer": "adamw"}
        renamed["settings"] = {**common, **LACKING.get(family, {}), **settings}
    return renamed


def current_line(line: str) -> str:
    """A method's line, such as "lp:memory=0,p=0.5", with the names of today: "lp:latent_windows=0,p=0.5".

    Args:
        line: a family and its settings.
    Returns:
        The line with its settings sorted by name, as lines are printed.
    """
    family, _, words = line.partition(":")
    settings = [word.partition("=") for word in filter(None, words.split(","))]
    renamed = sorted((SETTINGS.get(key, key), value) for key, _, value in settings)
    return family + (":" if renamed else "") + ",".join(f"{key}={value}" for key, value in renamed)
