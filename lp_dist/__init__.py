"""lp_dist: decoupled Lp weight decay for training at scale. Importing it imports torch alone."""

from typing import Any

from lp_dist.attachment import attach
from lp_dist.groups import param_groups
from lp_dist.hooks import add_lp_decay
from lp_dist.merging import merge_adapter
from lp_dist.optim import LpAdamW, LpLion, LpSGD
from lp_dist.schedule import DecayWindow, Ramp
from lp_dist.sparsity import measure_histogram, measure_sparsity
from lp_dist.structure import groups_of
from lp_dist.target import GroupDecay, SparsityTarget

__version__ = "0.1.0"
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
    "add_lp_decay",
    "attach",
    "groups_of",
    "measure_histogram",
    "measure_sparsity",
    "merge_adapter",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    if name in ("LpCallback", "LpTrainer"):  # these need transformers, which takes seconds to import
        from lp_dist import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'lp_dist' has no attribute {name!r}")
