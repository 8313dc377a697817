"""lp_dist: decoupled Lp weight decay for training at scale. Importing it imports torch alone."""

from typing import Any

from lp_dist._version import __version__
from lp_dist.attachment.attach import attach
from lp_dist.export.merge import merge_adapter
from lp_dist.optim.hooks import add_lp_decay
from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD
from lp_dist.sparsity.measure import measure_histogram, measure_sparsity
from lp_dist.sparsity.selection import param_groups
from lp_dist.structured.resolve import groups_of
from lp_dist.targets.schedule import DecayWindow, Ramp
from lp_dist.targets.target import GroupDecay, SparsityTarget

__all__ = [
    "DecayWindow",
    "GroupDecay",
    "LpAdamW",
    "LpCallback",
    "LpLion",
    "LpSGD",
    "LpTrainer",
    "Ramp",
    "SparsityTarget",
    "__version__",
    "add_lp_decay",
    "attach",
    "explain",
    "groups_of",
    "measure_histogram",
    "measure_sparsity",
    "merge_adapter",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    # These need transformers, which takes seconds to import.
    if name == "LpCallback":
        from lp_dist.training.callback import LpCallback

        return LpCallback
    if name == "LpTrainer":
        from lp_dist.training.trainer import LpTrainer

        return LpTrainer
    # It prints itself by rich.
    if name == "explain":
        from lp_dist.report.explanation import explain

        return explain
    raise AttributeError(f"module 'lp_dist' has no attribute {name!r}")
