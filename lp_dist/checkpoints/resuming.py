"""What is checked of a checkpoint before an engine or Trainer resumes from it.

They unpickle its files by themselves, and some without a list of what these may name: DeepSpeed all of its files
(`deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py`), torch.distributed.checkpoint its index and whatever
is no tensor (`torch/distributed/checkpoint/default_planner.py`). So the same files are read here before, by the list
of `allowed.py` and without their tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lp_dist.checkpoints import distributed
from lp_dist.checkpoints.entries import check_inside, read_json
from lp_dist.checkpoints.files import TorchFile, safetensors
from lp_dist.errors import UsageError, in_one_line

# What DeepSpeed, Accelerate and Trainer load. Not training_args.bin, which Trainer writes and never reads.
_PICKLES = re.compile(r".*\.(pt|pth|pkl)|(pytorch_model|adapter_model|optimizer|scheduler|sampler).*\.bin")
_ANEW = "copy the checkpoint anew, or resume from another one"
# Each names the directory below it that DeepSpeed goes on with.
_LATEST = ("latest", "latest_universal")


def check_run(directory: str | os.PathLike, *, trust_pickles: bool = False, share: tuple[int, int] = (0, 1)) -> None:
    """Checks a checkpoint of a run, before Trainer goes on from it under any engine. No tensor is read.

    Args:
        directory: a `checkpoint-*` of its output_dir.
        trust_pickles: let its pickles run the code that they name when they are loaded.
        share: (index, count) of the pickles to check, where several ranks divide them.
    Raises:
        UsageError: it is no directory, files are damaged or lead out of it, or a pickle names a class that is not
            known, and is not trusted.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"there is no checkpoint {directory} to resume from; name the directory of one")
    with in_one_line(f"{directory} is damaged: reading it before the run ended with", _ANEW):
        if (directory / "trainer_state.json").is_file():
            _check_trainer_state(directory / "trainer_state.json")
        for file in sorted(directory.glob("*.safetensors")):
            safetensors(file)
    if not trust_pickles:
        check_pickles(directory, share)


def check_engine(directory: str | os.PathLike, tag: str | None = None, *, share: tuple[int, int] = (0, 1)) -> None:
    """Checks the pickles of a DeepSpeed checkpoint, before an engine loads it.

    Args:
        directory: the `load_dir` of an engine's `load_checkpoint`.
        tag: the directory below it; None: the one that `latest`, or `latest_universal`, names.
        share: as of `check_run`.
    Raises:
        UsageError: a file is damaged or leads out of it, or a pickle names a class that is not known.
    """
    tags = [tag] if tag is not None else [name for _, name in _latest(Path(directory))]
    for name in tags:
        # Where nothing is, the engine has its own words.
        if (Path(directory) / str(name)).is_dir():
            check_pickles(Path(directory) / str(name), share)


def check_pickles(directory: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Checks all pickles in a directory and below it that an engine or Trainer may load.

    Args:
        directory: of a checkpoint.
        share: as of `check_run`.
    Raises:
        UsageError: one is damaged, or names a class that is not known; or a name leads out of the directory.
    """
    with in_one_line(f"{directory} is damaged: reading its pickles ended with", _ANEW):
        _latest(directory)
        pickles = [file for file in _files(directory) if file.name == ".metadata" or _PICKLES.fullmatch(file.name)]
        for file in pickles[share[0] :: share[1]]:
            if file.name == ".metadata":
                distributed.check_pickles(file.parent)
            else:
                TorchFile(file)


def _latest(directory: Path) -> list[tuple[Path, str]]:
    """The tags that a directory of DeepSpeed's checkpoints goes on with, by the files that name them."""
    tags = [
        (directory / name, (directory / name).read_text().strip()) for name in _LATEST if (directory / name).is_file()
    ]
    for file, tag in tags:
        check_inside(file, tag)
    return tags


def _files(directory: Path) -> Iterator[Path]:
    """All files below a directory, links to directories included, since loaders follow them."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        # Of a link that leads up again.
        folders[:] = sorted(name for name in folders if os.path.realpath(os.path.join(folder, name)) not in seen)
        seen.update(os.path.realpath(os.path.join(folder, name)) for name in folders)
        yield from (Path(folder) / name for name in sorted(names))


def _check_trainer_state(file: Path) -> None:
    """Raises UsageError for a trainer_state.json that Trainer would stumble over in the midst of its start."""
    state = read_json(file)
    for key, kinds in {"global_step": int, "max_steps": int, "stateful_callbacks": dict, "log_history": list}.items():
        if key in state and (not isinstance(state[key], kinds) or isinstance(state[key], bool)):
            raise UsageError(f"{file} has {state[key]!r:.80} for {key}, which is no {kinds.__name__}; {_ANEW}")
    for name, saved in state.get("stateful_callbacks", {}).items():
        for callback in saved if isinstance(saved, list) else [saved]:
            if not isinstance(callback, dict) or not all(
                isinstance(callback.get(part), dict) for part in ("args", "attributes")
            ):
                raise UsageError(f"{file} has {saved!r:.80} for the state of {name}; {_ANEW}")
