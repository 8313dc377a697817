"""How many channels and heads a model has by its config.json: where these numbers stand, and whether a model made of
others is the one meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.checkpoints.hf_names import made_on_meta
from lp_dist.errors import UsageError
from lp_dist.structured.groups import Groups
from lp_dist.structured.recognition import HEAD_SIZES

Edits = dict[tuple[str, ...], Any]  # {place in config.json: its new value}
# What the width of a feed-forward layer is called; other keys of the same value come after these.
_FEED_FORWARD = re.compile(r"inter|inner|ffn|ff_|_ff|mlp|feed")


class Widths:
    """A model that is cut step by step: its config.json, and what stays of its parameters. A step is taken if the
    model that is made from the config has the shapes of what stays, and is as before in all else.

    Args:
        cls, settings: as of `model_class`. config: its config.json. model: made of them, on the meta device.
    """

    def __init__(self, cls: Any, settings: Any, config: dict[str, Any], model: nn.Module) -> None:
        self._cls, self._settings, self._config = cls, settings, config
        self._all = settings.to_dict()  # with defaults that config.json leaves out
        self._shapes, self._numbers = _traits(model)
        self.kept: dict[
            tuple[str, int], Tensor
        ] = {}  # by parameter and dimension: which indices stay; those without an entry are whole

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    def cut(self, cuts: list[tuple[Groups, Tensor]], edits: Edits) -> bool | None:
        """Takes a step, if it can be taken.

        Args:
            cuts: groups, and which of them stay (count,). edits: what config.json says then.
        Returns:
            True: taken. False: by such a config the model is another one. None: the architecture takes no such config.
        """
        kept = dict(self.kept)
        for groups, stays in cuts:
            for member in groups.members:
                of = kept.get(
                    (member.name, member.dim), torch.ones(self._shapes[member.name][member.dim], dtype=torch.bool)
                ).clone()
                of[member.start : member.stop] &= stays.repeat_interleave(member.width)
                kept[member.name, member.dim] = of
        shapes = dict(self._shapes)
        for (name, dim), of in kept.items():
            shapes[name] = (*shapes[name][:dim], int(of.sum()), *shapes[name][dim + 1 :])
        config = _edited(self._config, edits)
        try:
            made = self._made(config)
        except UsageError:
            return None
        if _traits(made) != (shapes, self._numbers):
            return False
        self._config, self.kept = config, kept
        return True

    def _made(self, config: dict[str, Any]) -> nn.Module:
        try:
            settings = type(self._settings).from_dict(deepcopy(config))
        except Exception as error:  # a config's class raises what it likes
            raise UsageError(str(error)) from error
        return made_on_meta(self._cls, settings, "the config of the smaller model")

    def of_lists(self, widths: dict[int, int]) -> Iterator[Callable[[dict[int, int]], Edits]]:
        """Places that have a list of widths, one for each layer: what to write there for other widths. widths: by
        number of the layer.
        """
        for place, value in _places(self._all):
            whole = isinstance(value, list) and all(type(one) is int for one in value)
            if whole and all(i < len(value) and value[i] == width for i, width in widths.items()):
                yield lambda new, place=place, value=value: {
                    place: [new.get(i, width) for i, width in enumerate(value)]
                }

    def of_channels(self, width: int) -> Iterator[tuple[tuple[str, ...], ...]]:
        """Places that may have the one width of the feed-forward layers: those called like it, together as well,
        others of that value, and what is left to the architecture (GPT-2's n_inner)."""
        equal = [place for place, value in _places(self._all) if type(value) is int and value == width]
        called = [place for place in equal if _FEED_FORWARD.search(str(place[-1]))]
        yield from ((place,) for place in called)
        if len(called) > 1:
            yield tuple(called)
        yield from ((place,) for place in equal if place not in called)
        yield from (
            (place,) for place, value in _places(self._all) if value is None and _FEED_FORWARD.search(str(place[-1]))
        )

    def of_heads(self, heads: int, shared: int, size: int) -> Iterator[Callable[[int, int], Edits]]:
        """Places that have the numbers of heads of queries, and of keys and values: what to write there for others.
        The size of a head is written as well, since it might follow from their number."""
        called = {"num_attention_heads", getattr(self._settings, "attribute_map", {}).get("num_attention_heads")}
        for place, value in _places(self._all):
            inside = self._at(place[:-1])
            if place[-1] in called and value == heads and (inside.get("num_key_value_heads") or heads) == shared:
                more = {(*place[:-1], "head_dim"): size}
                if "num_key_value_heads" in inside:
                    yield lambda new, few, place=place, more=more: {
                        place: new,
                        (*place[:-1], "num_key_value_heads"): few,
                        **more,
                    }
                elif heads == shared:
                    yield lambda new, few, place=place, more=more: {place: new, **more}

    def _at(self, place: tuple[str, ...]) -> dict[str, Any]:
        inside = self._all
        for key in place:
            inside = inside[key]
        return inside


def _traits(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[tuple[str, str], float]]:
    """What tells whether two models compute alike: shapes of parameters and buffers (such as the frequencies of the
    positions), and numbers that modules have besides: sizes of heads, and all that are no integers (such as what
    attention is scaled by).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in (*model.state_dict().items(), *model.named_buffers())}
    return shapes, {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is float or key in HEAD_SIZES
    }


def _places(config: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every key of the config and of the configs in it, with its value."""
    found = []
    for key, value in config.items():
        found += _places(value, (*above, key)) if isinstance(value, dict) else [((*above, key), value)]
    return found


def _edited(config: dict[str, Any], edits: Edits) -> dict[str, Any]:
    edited = deepcopy(config)
    for place, value in edits.items():
        inside = edited
        for key in place[:-1]:
            inside = inside.setdefault(key, {})
        inside[place[-1]] = value
    return edited
