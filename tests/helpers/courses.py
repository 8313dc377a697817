"""Courses of calls that a script may make, in any order, legal or not: what each of them says, and what is counted in
the file that a save writes at that moment.
"""

from __future__ import annotations

import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.engines import ended, full, make, quiet
from helpers.targets import decaying
from lp_dist import LpAdamW, attach
from lp_dist.sharding.engines import unwrap

TOTAL = 14
TARGET = {"start": 2, "end": 12, "update_every": 2}


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Linear(9, 5)
    )
    model[2].weight.requires_grad_(False)
    return model


class Course:
    """A model, its optimizer, perhaps its engine and what attach returned, through one call after the other.

    Args:
        kind: of the engine, as of `helpers.engines.make`.
        directory: for what is saved, the same on every rank.
    """

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory, self.taken = kind, directory, 0
        self.model = small()
        self.optimizer = LpAdamW(self.model.parameters(), lr=1e-2)
        self.engine = self.attached = None
        self.state: Any = None  # what attach's state was at the last save
        self.checks: list[tuple[float, float]] = []  # what was said, what was counted
        self.logs: dict[str, float] = {}
        self.has_finished = False
        self.zeros_at_attach = self.files_written = 0

    # -- the calls ------------------------------------------------------------

    def wrap(self) -> None:
        if self.engine is not None:
            return

        def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
            if self.attached is None:  # as one does it: made for what was sharded
                self.optimizer = LpAdamW(model.parameters(), lr=1e-2)
            return self.optimizer

        self.engine = make(self.kind, self.model, optimizer_of)
        if hasattr(self.engine.handle, "save_16bit_model"):
            self.engine.handle._config.zero_config.gather_16bit_weights_on_model_save = True

    def attach(self, sparsity: float | None) -> None:
        target = None if sparsity is None else decaying(sparsity, **TARGET)
        handle = self.model if self.engine is None else self.engine.handle
        self.attached = attach(handle, self.optimizer, target=target, total_steps=TOTAL)
        self.logs, self.has_finished = {}, False
        self.zeros_at_attach = self.zeros()

    def step(self, count: int, tells: bool) -> None:
        for _ in range(count):
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(self.taken))
            handle = self.model if self.engine is None else self.engine.handle
            loss = (handle(x) - x[:, :5]).square().mean()
            if self.engine is None:
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                self.engine.step(loss)
            self.taken += 1
            if tells and self.attached is not None:
                self.attached.after_step()
                self.compare()

    def save(self) -> None:
        if self.engine is not None:
            self.engine.save(self.directory, "saved")
            self.state = (None, None, self.attached and self.attached.state_dict())
        else:
            copy = {name: value.clone() for name, value in self.model.state_dict().items()}
            optimizer = torch.load(_saved(self.directory, self.optimizer.state_dict()), weights_only=True)
            self.state = (copy, optimizer, self.attached and self.attached.state_dict())

    def load(self, with_state: bool) -> None:
        if self.state is None or hasattr(self.model, "added"):  # no engine loads into other parameters
            return
        model, optimizer, target_state = self.state
        if model is None:
            self.engine.load(self.directory, "saved")
        else:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
        if with_state and self.attached is not None and target_state is not None:
            self.attached.load_state_dict(target_state)

    def unfreeze(self) -> None:
        self.model[2].weight.requires_grad_(True)

    def freeze(self) -> None:
        self.model[0].weight.requires_grad_(False)

    def set_weight_decay(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = value

    def add_group(self) -> None:
        self.model.add_module("added", nn.Linear(5, 5))
        self.optimizer.add_param_group({"params": list(self.model.added.parameters())})

    def replace(self) -> None:
        self.model[4].weight = nn.Parameter(self.model[4].weight.detach().clone())

    def finish(self) -> None:
        if self.attached is not None:
            self.attached.finish()
            self.has_finished = True
            self.compare(anyway=True)

    # -- what is said, and what is there --------------------------------------

    def compare(self, anyway: bool = False) -> None:
        logs = self.attached.logs
        if "lp/measured" in logs and (anyway or logs != self.logs):
            self.checks.append((logs["lp/measured"], self.share(self.attached.decayed)))
        self.logs = dict(logs)

    def in_file(self) -> dict[str, torch.Tensor]:
        """What a save of the model writes now, read back."""
        handle = self.model if self.engine is None else self.engine.handle
        self.files_written += 1  # another file each time: one of the ranks may still be reading the last
        file = self.directory / f"model_{self.files_written}.bin"
        if hasattr(handle, "save_16bit_model"):
            handle.save_16bit_model(str(self.directory), file.name)
            torch.distributed.barrier()
        else:
            state = unwrap(handle).state_dict()
            state = {key: full(value) for key, value in state.items()}
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                torch.save(state, file)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        return torch.load(file, weights_only=True)

    def share(self, names: Any) -> float:
        saved = self.in_file()
        return sum(int((saved[name] == 0).sum()) for name in names) / sum(saved[name].numel() for name in names)

    def zeros(self) -> dict[str, int]:
        """By name of the parameter, in what a save writes."""
        return {name: int((value == 0).sum()) for name, value in self.in_file().items()}

    def zeros_elsewhere(self) -> int:
        """Zeros that have come since `attach` into what does not decay now; it may have decayed before, and have zeros
        of that time.
        """
        before = {name: count for name, count in self.zeros_at_attach.items() if name not in self.attached.decayed}
        now = self.zeros()
        return sum(max(0, now[name] - count) for name, count in before.items())


def _saved(directory: Path, state: Any) -> Path:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(state, directory / f"optimizer_{rank}.bin")
    return directory / f"optimizer_{rank}.bin"


def follow(kind: str, calls: list[tuple]) -> dict[str, Any]:
    """Makes the calls until one of them raises, and looks at what is left.

    Returns:
        "raised": the error, or ""; "by_lp_dist": whether lp_dist raised it; "checks": pairs of what was said and what
        the saved file held; "finished"; "elsewhere": zeros that what may not decay has got since attach.
    """
    if kind != "plain":
        quiet()
    with tempfile.TemporaryDirectory() as target_state:
        directory = Path(target_state)
        if torch.distributed.is_initialized():
            shared = [target_state]
            torch.distributed.broadcast_object_list(shared)
            directory = Path(shared[0])
        course, raised, by_lp_dist = Course(kind, directory), "", False
        for name, *arguments in calls:
            try:
                getattr(course, name)(*arguments)
            except Exception as error:
                raised = f"{name}: {type(error).__name__}: {error}"
                by_lp_dist = "/lp_dist/" in traceback.extract_tb(error.__traceback__)[-1].filename
                break
        seen = {"raised": raised, "by_lp_dist": by_lp_dist, "checks": course.checks, "finished": course.has_finished}
        watched = not raised and course.attached is not None
        seen["elsewhere"] = course.zeros_elsewhere() if watched else 0
        if course.engine is not None:
            with suppress(IndexError):  # DeepSpeed's, of a param group that it was not made with
                ended(course.engine)
        if course.attached is not None:
            course.attached.watch.end.is_known = True  # the course ends anywhere, and need not say so
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return seen


def follow_on_ranks(rank: int, world_size: int, kind: str, calls: list[tuple]) -> dict[str, Any]:
    return follow(kind, calls)
