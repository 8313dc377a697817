"""Shared by the tests: runs to a target that are killed by SIGKILL, also in the midst of a save, and started again as
a launcher would: from the last checkpoint that was complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.engines import Engine, ended, quiet
from helpers.snapshots import snapshot
from helpers.target_runs import Case, engine_of, trained
from lp_dist import SparsityTarget, attach
from lp_dist.attachment.attachment import Attachment
from lp_dist.checkpoints.resuming import check_pickles
from lp_dist.structured.resolve import groups_of

STEPS, SAVE_EVERY = 24, 3
ENGINES = {"one process": "plain", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP2": "fsdp2"}
TARGETS = ("target", "groups", "both")


@dataclass(frozen=True)
class Death:
    """When a run is killed.

    Args:
        engine: a key of ENGINES.
        target: of TARGETS.
        moment: "before" a step, in the midst of the "step", or of a "save".
        step: the step, or how many are taken when it saves.
        ranks: that die; the others end as a launcher ends them.
        write: of a save: the number of the file in which it happens, from 1.
        share: of a save: how much of that file is written.
    """

    engine: str
    target: str
    moment: str
    step: int
    ranks: tuple[int, ...]
    write: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.target}".replace(" ", "_")


def case_of(engine: str) -> Case:
    return Case(ENGINES[engine], steps=STEPS)


def attached(engine: Engine, target: str) -> Attachment:
    from lp_dist.sharding.engines import unwrap

    model = unwrap(engine.handle)
    channels = groups_of(model, outputs="0", inputs="3", kind="first")
    groups = SparsityTarget(0.3, groups=channels, start=2, end=11, update_every=2)
    weights = SparsityTarget(0.6, start=11 if target == "both" else 2, end=20, update_every=2)
    others = (
        {}
        if hasattr(engine.handle, "load_checkpoint")
        else {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler}
    )
    targets = {"target": weights, "groups": groups, "both": [groups, weights]}[target]
    return attach(engine.handle, target=targets, total_steps=STEPS, **others)


def run(engine_name: str, target: str, directory: Path, death: Death | None = None) -> dict[str, str]:
    """Trains from the last complete checkpoint in `directory`, or from the start, to the end. Collective.

    Returns:
        Digests of all that this rank has at the end.
    """
    case = case_of(engine_name)
    engine = engine_of(case)
    attachment = attached(engine, target)
    start = _resumed(engine, attachment, directory)
    for step in range(start, STEPS):
        if death is not None and (death.moment, death.step) == ("before", step):
            _die(death, directory)
        if death is not None and (death.moment, death.step) == ("step", step):
            attachment.optimizer.register_step_pre_hook(lambda *_: _die(death, directory))
        trained(engine, attachment, case, step, step + 1)
        if (step + 1) % SAVE_EVERY == 0:
            if death is not None and (death.moment, death.step) == ("save", step + 1):
                _die_in_a_save(death, directory)
            _save(engine, attachment, directory, str(step + 1))
    attachment.finish()
    state = snapshot(engine, attachment) | {"target": json.dumps(attachment.state_dict())}
    ended(engine)
    return {key: hashlib.sha256(repr(value).encode()).hexdigest() for key, value in state.items()}


def _save(engine: Engine, attachment: Attachment, directory: Path, tag: str) -> None:
    engine.save(directory, tag)
    if torch.distributed.get_rank() == 0 and not hasattr(engine.handle, "load_checkpoint"):
        (directory / tag / "target.json").write_text(json.dumps(attachment.state_dict()))
        # As DeepSpeed: the name of a checkpoint is written when the checkpoint is complete.
        (directory / "latest.partial").write_text(tag)
        (directory / "latest.partial").replace(directory / "latest")
    torch.distributed.barrier()


def _resumed(engine: Engine, attachment: Attachment, directory: Path) -> int:
    """The step to go on with."""
    if not (directory / "latest").is_file():
        return 0
    tag = (directory / "latest").read_text()
    # As `finetune` does. DeepSpeed's engine does so by itself.
    check_pickles(directory / tag)
    engine.load(directory, tag)
    if not hasattr(engine.handle, "load_checkpoint"):
        attachment.load_state_dict(json.loads((directory / tag / "target.json").read_text()))
    return int(tag)


def marker_of(directory: Path, rank: int) -> Path:
    return directory / f"killed_{rank}"


def _die(death: Death, directory: Path) -> None:
    if torch.distributed.get_rank() in death.ranks:
        marker_of(directory, torch.distributed.get_rank()).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _die_in_a_save(death: Death, directory: Path) -> None:
    """From now on the write of that number is the last one, and is not finished."""
    save, written = torch.save, 0

    def dying(content: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        written += 1
        if written < death.write:
            save(content, target, *args, **kwargs)
            return
        stream = io.BytesIO()
        save(content, stream, *args, **kwargs)
        octets = stream.getvalue()[: int(death.share * len(stream.getvalue()))]
        if hasattr(target, "write"):
            target.write(octets)
            target.flush()
        else:
            Path(target).write_bytes(octets)
        _die(death, directory)

    if torch.distributed.get_rank() in death.ranks:
        torch.save = dying


def killed_on_a_rank(rank: int, world_size: int, directory: Path, death: Death) -> None:
    """A run that does not come to its end."""
    quiet()
    threading.Thread(target=_leave_with_the_others, args=(directory,), daemon=True).start()
    run(death.engine, death.target, directory, death)


def _leave_with_the_others(directory: Path) -> None:
    """A launcher ends the ranks whose peers have died. Else they may wait for them in a collective."""
    while not list(directory.glob("killed_*")):
        time.sleep(0.1)
    time.sleep(3)
    os._exit(1)


def run_on_a_rank(rank: int, world_size: int, runs: dict[str, tuple[str, str, Path]]) -> dict[str, dict[str, str]]:
    """Runs that come to their end: {name: (engine, target, directory)}. Returns the digests of each."""
    quiet()
    return {name: run(*values) for name, values in runs.items()}
