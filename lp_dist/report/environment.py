"""Versions and the machine of a run."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of what a run stands on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "deepspeed"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """The machine of this rank, not by its name; `device` is what it trains on."""
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
