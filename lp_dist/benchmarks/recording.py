"""What a run asks of the machine: its collectives, and the bytes of its tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Call(NamedTuple):
    """One collective.

    Args:
        kind: as torch names its operator, such as "allreduce_".
        largest_numel: elements of its largest tensor.
        itemsize: bytes of an element.
        bytes: of what this rank holds when it is done: the sum of an all-reduce, what an all-gather has gathered.
    """

    kind: str
    largest_numel: int
    itemsize: int
    bytes: int


class Volume(NamedTuple):
    """How many collectives, and the sum of their bytes, as of `Call`."""

    calls: int
    bytes: int


class Collectives(TorchDispatchMode):
    """Records each collective, whoever calls it.

    Attributes:
        calls: in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # come back with what the DTensor makes of it
        # A wait is no collective.
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith("wait_tensor"):
            sizes = [[(t.numel(), t.element_size()) for t in _tensors_in(arg)] for arg in args]
            tensors = [size for of_arg in sizes for size in of_arg]
            if tensors:
                kind = func.__name__.split(".")[0]
                most = max(sum(numel * itemsize for numel, itemsize in of_arg) for of_arg in sizes)
                self.calls.append(Call(kind, max(tensors)[0], tensors[0][1], most))
        return func(*args, **(kwargs or {}))

    def by_kind(self) -> dict[str, Volume]:
        """The volume of each kind, in the order of their first calls."""
        volumes: dict[str, Volume] = {}
        for call in self.calls:
            calls, in_bytes = volumes.get(call.kind, Volume(0, 0))
            volumes[call.kind] = Volume(calls + 1, in_bytes + call.bytes)
        return volumes


def _tensors_in(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors_in(item)


class Allocated:
    """Bytes of tensors on the CPU, between marks.

    `with Allocated() as allocated: ...; allocated.mark("x"); ...` → afterwards `allocated.at["x"]`.

    Attributes:
        at: bytes allocated at each mark, since the beginning.
        peak: the most until the next mark.
    """

    def __enter__(self) -> Allocated:
        self.at: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        self.mark("start")
        return self

    def mark(self, name: str) -> None:
        """Begins what `name` stands for."""
        with torch.profiler.record_function(f"mark {name}"):
            pass

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        blocks: dict[int, int] = {}
        allocated, mark = 0, "start"
        for event in self._events():
            if event["name"] != "[memory]":
                mark = event["name"][len("mark ") :]
                self.at[mark] = self.peak[mark] = allocated
                continue
            # By address: a block from before counts nothing when it is freed, and one that another thread freed (gloo
            # does that), which is not seen, is known to be gone when its address is given out again.
            allocated -= blocks.pop(event["args"]["Addr"], 0)
            if event["args"]["Bytes"] > 0:
                blocks[event["args"]["Addr"]] = event["args"]["Bytes"]
                allocated += event["args"]["Bytes"]
            self.peak[mark] = max(self.peak.get(mark, 0), allocated)

    def _events(self) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as directory:
            self._profile.export_chrome_trace(f"{directory}/trace.json")
            events = json.loads(Path(f"{directory}/trace.json").read_text())["traceEvents"]
        return sorted(
            (e for e in events if e["name"] == "[memory]" or e["name"].startswith("mark ")), key=lambda e: e["ts"]
        )
