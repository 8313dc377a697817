"""Holds what `attach` planned against what is there while the run goes on.

Engines that are made after `attach` put other tensors into the optimizer, or into the model: the map of `attach` then
knows none of what steps, and nothing would decay without a word. Only identities and flags are looked at, which costs
no communication and makes no accelerator wait.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lp_dist.attachment.plan import Plan
from lp_dist.errors import UsageError


class Watch:
    """Checks before the first step, whenever a param group was added, and at each update of a target.

    Args:
        plan: that was applied.
    """

    def __init__(self, plan: Plan) -> None:
        self._optimizer: Optimizer = plan.optimizer
        self._model: nn.Module = plan.model
        self._params = dict(plan.model.named_parameters())
        self._trainable = {name for name, param in self._params.items() if param.requires_grad}
        # Engines may hand the optimizer some of its tensors at a time, or none between steps.
        self._known = WeakIdKeyDictionary()
        for tensor in [*_stepped(plan.optimizer), *(shard.tensor for shard in plan.shards)]:
            self._known[tensor] = True
        self._groups_checked = 0
        self._attached_state = plan.attachable.attached
        self._attached_state.before_step = self._before_step

    def remove(self) -> None:
        """Ends it."""
        self._attached_state.before_step = None

    def _before_step(self) -> None:
        if len(self._optimizer.param_groups) != self._groups_checked:
            self.check()
            self._groups_checked = len(self._optimizer.param_groups)

    def check(self) -> None:
        """Compares the model's and the optimizer's tensors with those of the plan.

        Raises:
            UsageError: they are others, some were added, or what was frozen trains now.
        """
        self._check_model()
        unknown = [tensor for tensor in _stepped(self._optimizer) if tensor not in self._known]
        if not unknown:
            return
        names = {id(param): name for name, param in self._model.named_parameters()}
        added = [names[id(tensor)] for tensor in unknown if id(tensor) in names]
        if added:
            raise UsageError(
                f"{len(added)} parameters were added to the optimizer after attach, such as {added[0]}: no target"
                " counts them, and what may not decay would. Add them before, or call attach again"
            )
        raise UsageError(
            f"the optimizer steps {len(unknown)} other tensors than when attach was called, such as one of shape"
            f" {tuple(unknown[0].shape)}: an engine was made after it, and the weights would not decay. Call attach"
            " after deepspeed.initialize, accelerator.prepare or fully_shard, with what they return"
        )

    def _check_model(self) -> None:
        now = dict(self._model.named_parameters())
        replaced = [name for name, param in self._params.items() if name in now and now[name] is not param]
        if replaced:
            raise UsageError(
                f"{len(replaced)} parameters of the model are other tensors than when attach was called, such as"
                f" {replaced[0]}: it was sharded, converted or loaded anew after it, and the optimizer's weights are"
                " no longer the model's. Call attach after that, with an optimizer made of the new parameters"
            )
        unfrozen = [name for name, param in now.items() if param.requires_grad and name not in self._trainable]
        unfrozen = [name for name in unfrozen if not self._is_foreign(now[name])]
        if unfrozen:
            raise UsageError(
                f"{len(unfrozen)} parameters were frozen when attach was called and train now, such as"
                f" {unfrozen[0]}: no target counts them, and what may not decay would. Unfreeze them before attach,"
                " and freeze them after it for as long as they are not to train"
            )

    def _is_foreign(self, param: Tensor) -> bool:
        """Whether this optimizer has nothing to do with a parameter: one that it steps itself would be known to it."""
        return param not in self._known and all(param is not tensor for tensor in _stepped(self._optimizer))


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
