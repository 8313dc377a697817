"""The step counts of an optimizer's parameters, which one addition advances."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


class StepCounts:
    """Counts of parameters as views of one tensor for each device that has some. So a step makes one addition of
    them, and reads them at once, and each parameter's state still has a `step` of its own, as torch's have it.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, list[int]]] = []  # with the positions of its counts among all
        self._views: list[Tensor] = []

    def advance(self, states: list[dict[str, Any]]) -> list[float] | list[Tensor] | list[float | Tensor]:
        """Adds 1 to the `step` of each state, and returns them: numbers where they are on the CPU, else tensors there.

        Args:
            states: each has a `step`, a one-element tensor. It becomes a view; where somebody else has replaced it, as
                loading a checkpoint does, or gave several the same one, it keeps its number.
        """
        counts = [state["step"] for state in states]
        if len(counts) != len(self._views) or not all(map(operator.is_, counts, self._views)):
            if any(map(_is_captured, {count.device: count for count in counts}.values())):
                # A graph would repeat with each replay what is copied here once.
                torch._foreach_add_(counts, 1)
                return counts
            self._gather(states, counts)
        for block, _ in self._blocks:
            block.add_(1)
        if len(self._blocks) == 1:
            block = self._blocks[0][0]
            return block.tolist() if block.device.type == "cpu" else self._views
        steps: list[float | Tensor] = [*self._views]
        for block, positions in self._blocks:
            if block.device.type == "cpu":
                for position, step in zip(positions, block.tolist()):
                    steps[position] = step
        return steps

    def _gather(self, states: list[dict[str, Any]], counts: list[Tensor]) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for position, count in enumerate(counts):
            by_device.setdefault(count.device, []).append(position)
        self._views = [*counts]
        self._blocks = []
        for positions in by_device.values():
            block = torch.stack([counts[position].detach().reshape(()).float() for position in positions])
            self._blocks.append((block, positions))
            for position, view in zip(positions, block.unbind()):
                self._views[position] = states[position]["step"] = view


def _is_captured(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
