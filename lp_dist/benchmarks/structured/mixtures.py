"""Tiny mixtures of experts that `lp-dist bench structured` trains from random weights, and what their routers do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lp_dist.benchmarks.quality.tasks import Schedule, Task, characters
from lp_dist.export.shrink import RemovedExperts
from lp_dist.export.verify import RoutersWithout
from lp_dist.structured.groups import WeightGroups

FAMILIES = ("mixtral", "qwen3_moe")
# The weight of the loss of balance in the pretraining.
_BALANCE = 0.01


class MixtureTask(Task):
    """A task whose model is trained to send its experts as many tokens, where its config says `output_router_logits`.

    That is so in the pretraining alone, since fine-tunes of transformers have no such loss by default.
    """

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, *args: Any, **values: Any) -> Tensor:
        if not model.config.output_router_logits:
            return super().loss(model, inputs, targets, *args, **values)
        balance: list[Tensor] = []
        handle = model.register_forward_hook(lambda _, __, output: balance.append(output.aux_loss))
        loss = super().loss(model, inputs, targets, *args, **values)
        handle.remove()
        return loss + _BALANCE * balance[0] if model.training else loss


def mixture(family: str, text: str = "", steps: int | None = None) -> Task:
    """A mixture of 3 layers of 64, blocks of 64 characters, batches of 12; 1,500 steps of pretraining.

    Args:
        family: "mixtral", with 8 experts of 64 channels of which 2 are chosen, or "qwen3_moe", 16 of 32, and 4.
        text: a text file or hub dataset; "": the help texts of Python, each paragraph once.
        steps: of the run that makes the model smaller; None: 300.
    Returns:
        The task.
    Raises:
        UsageError: the text cannot be read.
    """
    of_text = characters(text)
    return MixtureTask(
        family,
        of_text,
        partial(_model, family, of_text.vocabulary),
        Schedule(1500, 1e-3, 100),
        Schedule(steps or 300, 1e-3, 20),
        rows=12,
        block=64,
        evaluated=10**9,
    )


def _model(family: str, vocabulary: int, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = (
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
        if family == "mixtral"
        else {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "norm_topk_prob": True}
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            vocab_size=vocabulary,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            output_router_logits=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            **sizes,
        )
    )


class RouterMask:
    """Keeps routers from choosing experts that are zero, as `--shrink` does by removing their rows.

    Args:
        model: that is trained.
        sets: its groups; only those that are experts matter.
    """

    def __init__(self, model: nn.Module, sets: list[WeightGroups]) -> None:
        self._model, self._sets = model, [groups for groups in sets if groups.kind == "experts"]
        self._mode: RoutersWithout | None = None
        self._handles: list[RemovableHandle] = []
        if self._sets:
            self._handles = [
                model.register_forward_pre_hook(self._enter),
                model.register_forward_hook(self._exit, always_call=True),
            ]

    def _enter(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.__enter__()

    def _exit(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)

    def update(self) -> None:
        """Masks the experts that are zero now."""
        removed = []
        for groups in self._sets:
            alive = torch.zeros(groups.count, dtype=torch.bool)
            for member in groups.members:
                values = self._model.get_parameter(member.name).detach()[member.start : member.stop]
                alive |= values.flatten(1).any(dim=1).cpu()
            removed.append(RemovedExperts(groups.followers[0].name, alive, (), {}))
        self._mode = RoutersWithout(self._model, tuple(removed))

    def remove(self) -> None:
        """Lets routers choose among all experts again."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def expert_scores(model: nn.Module, sets: list[WeightGroups], inputs: Tensor, criterion: str) -> Tensor:
    """What the routers make of each expert, on some text.

    Args:
        model: whose modules of experts are called with the tokens, the numbers of the chosen experts and the router's
            weights, [tokens, width], [tokens, chosen] and [tokens, chosen].
        sets: its experts.
        inputs: token ids, int64 [rows, block].
        criterion: "frequency", how often an expert is chosen; "reap", the mean over its tokens of the router's weight
            times the norm of the expert's output.
    Returns:
        The scores of all sets, one set after the other, [experts].
    """
    counts = {groups.name: torch.zeros(groups.count) for groups in sets}
    sums = {groups.name: torch.zeros(groups.count) for groups in sets}

    def record(name: str, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens, chosen, weights = args
        for expert in range(len(counts[name])):
            rows, places = torch.where(chosen == expert)
            counts[name][expert] += len(rows)
            if criterion == "reap" and len(rows):
                alone = torch.full_like(rows, expert)[:, None]
                outputs = module.forward(tokens[rows], alone, torch.ones_like(weights[rows, places])[:, None])
                sums[name][expert] += float((weights[rows, places] * outputs.norm(dim=1)).sum())

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in counts]
    for rows in inputs.split(16):
        model(input_ids=rows.to(next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    scores = counts if criterion == "frequency" else {name: sums[name] / counts[name].clamp(min=1) for name in sums}
    return torch.cat([*scores.values()])
