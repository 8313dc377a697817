"""A sample of what goes into linear layers, taken from a run's own forward passes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.optim.batching import to_local

# Rows that are held in fp32 while their products are summed.
ROWS_AT_A_TIME = 128


class InputSample:
    """Takes inputs of linear layers while it is open, and gives their products.

    An input is taken where the model itself is called in training mode: not in an evaluation, and not where gradient
    checkpointing computes a layer anew, since that happens in the backward pass. What an attention mask calls padding
    is left out. Layers that are given the same tensor share it.

    Args:
        model: the unwrapped model, whose `forward` the engine calls.
        layers: {name: linear layer}.
        tokens: rows that are kept of a layer's input on this rank at most: of the latest forward passes, evenly over
            each.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> None:
        self.model, self.layers, self.tokens = model, dict(layers), tokens
        # By layer, of each forward pass its step and (tokens, inputs); layers that are given the same tensor have the
        # same parts.
        self._parts: dict[str, list[tuple[int, Tensor]]] = {}
        self._rows_given: dict[str, dict[int, int]] = {}  # by layer and step, also those that were not kept
        self.steps = 0  # of the optimizer, in which it was open
        self.saved_at = 0  # how many of these were before the last save
        self._first = 0  # of these, the first one whose inputs count
        self._handles: list[Any] = []
        # Of the present forward pass.
        self._mask: Tensor | None = None
        self._is_inside = False
        self._taken: dict[int, tuple[weakref.ref[Tensor], Tensor, int]] = {}

    @property
    def is_open(self) -> bool:
        """Whether inputs are taken."""
        return bool(self._handles)

    def open(self) -> None:
        """Begins to take inputs; without those of before."""
        self.close()
        self._handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._end, always_call=True),
            *(
                layer.register_forward_pre_hook(_Taker(self, name), with_kwargs=True)
                for name, layer in self.layers.items()
            ),
        ]

    def close(self) -> None:
        """Ends it, and forgets what was taken."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()
        self._end()

    def clear(self) -> None:
        """Forgets what was taken, and goes on where it is open."""
        self._parts, self._rows_given = {}, {}
        self.steps = self.saved_at = self._first = 0

    def note_save(self) -> None:
        """Notes that the run may be resumed from here, where it will have no inputs of before."""
        self.saved_at = self.steps

    def forget_before(self, step: int) -> None:
        """Forgets what was taken in the steps before this one, of those in which it was open."""
        self._first = step
        self._parts = {name: [part for part in parts if part[0] >= step] for name, parts in self._parts.items()}

    @property
    def rows_a_step(self) -> float:
        """Rows of the layer that was given most of them, kept or not, for each step on this rank."""
        given = (
            sum(rows for step, rows in by_step.items() if step >= self._first) for by_step in self._rows_given.values()
        )
        return max(given, default=0) / max(1, self.steps - self._first)

    def _rows_of(self, name: str) -> list[Tensor]:
        return [rows for _, rows in self._parts.get(name, ())]

    def rows(self, name: str) -> int:
        """How many rows there are of a layer's input on this rank."""
        return sum(map(len, self._rows_of(name)))

    def parts(self, name: str) -> tuple[int, ...]:
        """What tells the inputs of layers apart: the same for layers with the same inputs; () without any."""
        return tuple(map(id, self._rows_of(name)))

    def checksum(self) -> int:
        """Of all that was taken: the same on ranks that were given the same, as those of tensor parallelism are."""
        parts = {id(part): part for name in self._parts for part in self._rows_of(name)}
        total = 0
        for number, part in enumerate(parts.values(), 1):
            bits = part.view(torch.int16 if part.element_size() == 2 else torch.int32)
            total += number * int(bits.sum(dtype=torch.int64))
        return total % (1 << 62)

    def values(self, name: str) -> Tensor:
        """A layer's inputs on this rank, (rows, inputs) fp32, on their device.

        Raises:
            KeyError: none were taken of it.
        """
        if not self.rows(name):
            raise KeyError(name)
        return torch.cat(self._rows_of(name)).float()

    def products(self, name: str, inputs: int, device: torch.device) -> Tensor:
        """XᵀX of a layer's inputs on this rank, (inputs, inputs) fp32; zeros without any."""
        gram = torch.zeros(inputs, inputs, device=device)
        for part in self._rows_of(name):
            for rows in part.split(ROWS_AT_A_TIME):
                rows = rows.to(device, torch.float32)
                gram.addmm_(rows.T, rows)
        return gram

    # -- hooks ----------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._is_inside, self._taken = module.training, {}
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _end(self, *_: Any) -> None:
        self._is_inside, self._mask, self._taken = False, None, {}

    @torch.no_grad()
    def take(self, name: str, values: Tensor) -> None:
        """Keeps rows of an input of a layer.

        Args:
            name: of the layer.
            values: (..., inputs).
        """
        if not self._is_inside:
            return
        reference, part, given = self._taken.get(id(values), (None, None, 0))
        if part is None or reference is None or reference() is not values:  # another one may have its address later
            rows = to_local(values.detach()).reshape(-1, values.shape[-1])
            if self._mask is not None and values.shape[:-1] == self._mask.shape:
                rows = rows[self._mask.reshape(-1).to(rows.device) != 0]
            part, given = rows[:: max(1, -(-len(rows) // self.tokens))].clone(), len(rows)
            self._taken[id(values)] = weakref.ref(values), part, given
        by_step = self._rows_given.setdefault(name, {})
        by_step[self.steps] = by_step.get(self.steps, 0) + given
        parts = self._parts.setdefault(name, [])
        parts.append((self.steps, part))
        while self.rows(name) > self.tokens:
            parts.pop(0)


class _Taker:
    """The hook of one layer."""

    def __init__(self, sample: InputSample, name: str) -> None:
        self.sample, self.name = sample, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(values, Tensor):
            self.sample.take(self.name, values)
