"""The fused step on a CPU: builds `step.cpp` with the system's C++ compiler on first use, and calls it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lp_dist.optim.acting import once
from lp_dist.optim.cache import cache_directory
from lp_dist.optim.decay import SNAP
from lp_dist.optim.kernels.dispatch import Unavailable, ValuedRows
from lp_dist.optim.nm import parse_pattern

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("step.cpp")
# No -ffast-math: nan and inf mean something here. Without contraction a value doesn't depend on how its loop was made
# into vectors.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
_OF_PROCESSOR = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
}
_BASES = {"adamw": 0, "sgd": 1, "lion": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_library: Any = None


def prepare() -> None:
    """Builds the step, or finds it built.

    Raises:
        Unavailable: there is no compiler, it fails, or the processor is too old.
    """
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(_built()))
        _library.lp_dist_step.argtypes = [
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
        ]
        _library.lp_dist_step.restype = None


def _built() -> Path:
    flags = (*_FLAGS, *_for_this_processor())
    name = hashlib.sha256(_SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16] + ".so"
    directory = cache_directory()
    if (directory / name).exists():
        return directory / name
    compiler = _compiler()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=directory)
    except OSError as error:
        directory = Path(tempfile.mkdtemp())  # built anew by each process, then
        scratch = tempfile.mkdtemp(dir=directory)
        logger.warning(
            "the fused step can't be kept, and is built by every process: %s. Set LP_DIST_CACHE to a folder that can"
            " be written",
            error,
        )
    logger.info("building the fused step for this processor with %s; this is done once", compiler)
    start = time.perf_counter()
    command = [compiler, *flags, str(_SOURCE), "-o", str(Path(scratch) / name)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise Unavailable(f"'{' '.join(command)}' failed: {done.stderr.strip()[:600]}")
        # Ranks that start together each build their own, and the last one to finish stays: no lock, so none is left
        # behind to wait for.
        os.replace(Path(scratch) / name, directory / name)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"'{' '.join(command)}' failed: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("built the fused step in %.1f s: %s", time.perf_counter() - start, directory / name)
    return directory / name


def _for_this_processor() -> tuple[str, ...]:
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ()  # NEON and its fma are in every one
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _OF_PROCESSOR:
        raise Unavailable(f"the processor has {capability} and no AVX2")
    return _OF_PROCESSOR[capability]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise Unavailable("there is no C++ compiler (CXX, c++, g++ or clang++); install g++")


def step(base: str, valued_rows: ValuedRows) -> None:
    """See `dispatch.step`. Allocates some numbers for each row, and nothing that grows with the tensors."""
    table, numbers = array("q"), array("d")
    weights = None
    for number, (values, rows) in enumerate(valued_rows):
        numbers.append(float(values["lr"]))
        numbers.extend(once(values, "cpu", _numbers))
        for row in rows:
            if row.weights is not weights:  # else it is another span of the same
                weights, grads = row.weights, row.grads
                dtypes = _TYPES[weights.dtype], _TYPES[grads.dtype]
                tensors = row.tensors
                places = [t.data_ptr() for t in tensors]
                none = (0,) * (4 - len(places))  # of a base with fewer states
            if row.span is None:
                table.extend((*places, *none, weights.numel(), *dtypes, number, int(row.step)))
            else:
                first, length = row.span
                starts = [place + first * t.element_size() for place, t in zip(places, tensors)]
                table.extend((*starts, *none, length, *dtypes, number, int(row.step)))
    table_address, numbers_address = table.buffer_info()[0], numbers.buffer_info()[0]
    _library.lp_dist_step(_BASES[base], len(table) // 9, table_address, numbers_address, torch.get_num_threads())


def _numbers(values: Mapping[str, Any]) -> tuple[float, ...]:
    """All that `step.cpp` needs of values, but the learning rate."""
    n, m = parse_pattern(values["pattern"]) if values.get("pattern") else (0, 0)
    numbers = (
        *values.get("betas", (0.0, 0.0)),
        values.get("eps", 0.0),
        values.get("momentum", 0.0),
        values.get("nesterov", False),
        values["maximize"],
        values["weight_decay"],
        values["p"],
        values["l2"],
        values.get("precondition", 0.0),
        values["cutoff"],
        values.get("regrowth_below", 0.0),
        SNAP,
        values.get("latent", False),
        n,
        m,
        values.get("ranked", False),
    )
    return tuple(map(float, numbers))
