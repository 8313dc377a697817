"""The versions and the machine of a run, as its report holds them."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that train, those that are installed."""
    installed = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "deepspeed"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """The machine of this rank. Its host name is left out on purpose.

    Args:
        device: what the rank trains on.
        ranks: number of processes of the run.
    """
    module = None if device.type == "cpu" else torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": "CPU" if module is None else name,
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }
