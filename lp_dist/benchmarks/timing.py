"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm


def median_time(name: str, work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in tqdm(range(repeats), desc=name, leave=False):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
