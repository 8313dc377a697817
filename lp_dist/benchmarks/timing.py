"""Progress bars, and how long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from tqdm import tqdm


class Quartiles(NamedTuple):
    """The three quartiles of a sample, in its unit."""

    low: float
    median: float
    high: float


def quartiles(values: Iterable[float]) -> Quartiles:
    """Quartiles with linear interpolation.

    Args:
        values: one at least, in any unit.
    Returns:
        The quartiles, in the same unit.
    """
    sample = torch.tensor(list(values), dtype=torch.float64)
    return Quartiles(*sample.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist())


def benchmark_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Waits until the accelerator has done all that was queued; on a CPU nothing is."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    """Calls once, and waits for the accelerator before and after.

    Args:
        call: what is timed.
    Returns:
        Wall-clock seconds.
    """
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def median_seconds(name: str, call: Callable[[], Any], repeats: int) -> float:
    """Median wall-clock seconds of a call, after one call that is not counted.

    Args:
        name: of the progress bar.
        call: what is timed.
        repeats: timed calls.
    Returns:
        Seconds; of an even number of repeats the upper one of the two in the middle.
    """
    call()
    times = [seconds_of(call) for _ in progress(range(repeats), name)]
    return sorted(times)[len(times) // 2]


def progress(iterable: Iterable[Any] | None, name: str, **settings: Any) -> tqdm:
    """A progress bar that is gone when it is done.

    Args:
        iterable: what the bar goes over; None: `update()` moves it.
        name: what stands before the bar.
        settings: others of tqdm, such as `total` and `leave`.
    Returns:
        The bar, to iterate over.
    """
    return tqdm(iterable, desc=name, **{"leave": False, **settings})


def note(line: str) -> None:
    """Prints a line to stdout above the progress bars.

    Args:
        line: what is printed.
    """
    tqdm.write(line)
