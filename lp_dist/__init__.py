"""lp_dist: decoupled Lp weight decay for training at scale.

Public names are imported when they are first used: `lp-dist --help` needs no torch, and what needs Transformers takes
its seconds only where it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lp_dist._version import __version__

if TYPE_CHECKING:
    from lp_dist.attachment.attach import attach
    from lp_dist.export.merge import merge_adapter
    from lp_dist.optim.hooks import add_lp_decay
    from lp_dist.optim.optimizers import LpAdamW, LpLion, LpSGD
    from lp_dist.report.explanation import explain
    from lp_dist.sparsity.measure import measure_histogram, measure_sparsity
    from lp_dist.sparsity.selection import param_groups
    from lp_dist.structured.resolve import groups_of
    from lp_dist.targets.schedule import DecayWindow, Ramp
    from lp_dist.targets.target import GroupDecay, SparsityTarget
    from lp_dist.training.callback import LpCallback
    from lp_dist.training.trainer import LpTrainer

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

_MODULES = {
    "attachment.attach": ("attach",),
    "export.merge": ("merge_adapter",),
    "optim.hooks": ("add_lp_decay",),
    "optim.optimizers": ("LpAdamW", "LpLion", "LpSGD"),
    "report.explanation": ("explain",),
    "sparsity.measure": ("measure_histogram", "measure_sparsity"),
    "sparsity.selection": ("param_groups",),
    "structured.resolve": ("groups_of",),
    "targets.schedule": ("DecayWindow", "Ramp"),
    "targets.target": ("GroupDecay", "SparsityTarget"),
    "training.callback": ("LpCallback",),
    "training.trainer": ("LpTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lp_dist' has no attribute {name!r}")
    value = getattr(import_module(f"lp_dist.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
