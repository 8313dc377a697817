"""How many channels and heads a model has by its config.json: which entries hold these numbers, and whether a model
made with other numbers is the same model with fewer of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lp_dist.checkpoints.hf_names import build_on_meta
from lp_dist.errors import UsageError
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.recognition import HEAD_SIZES

ConfigPath = tuple[str, ...]  # the keys that lead to an entry of config.json
Edits = dict[ConfigPath, Any]  # {entry of config.json: its new value}
# What the width of a feed-forward layer is called. Entries of the same value with other names come after these.
_FEED_FORWARD = re.compile(r"inter|inner|ffn|ff_|_ff|mlp|feed")


class Cut(NamedTuple):
    """The removal of some groups.

    Args:
        groups: of one module.
        kept: (count,) bool, which of them stay.
    """

    groups: WeightGroups
    kept: Tensor


class Widths:
    """A model that is cut step by step: its config.json, and which indices of its parameters stay.

    A step is taken if the model that is made from the edited config has the shapes of what stays, and is as before in
    all else.

    Args:
        cls: as of `model_class`.
        settings: as of `model_class`.
        config: the model's config.json.
        model: made of these, on the meta device.
    """

    def __init__(self, cls: Any, settings: Any, config: dict[str, Any], model: nn.Module) -> None:
        self._cls, self._settings, self._config = cls, settings, config
        # With defaults that config.json leaves out.
        self._full_config = settings.to_dict()
        self._shapes, self._numbers = _traits(model)
        # {(parameter, dimension): which indices stay}; what has no entry is not cut.
        self.kept: dict[tuple[str, int], Tensor] = {}

    @property
    def config(self) -> dict[str, Any]:
        """config.json after the steps so far."""
        return self._config

    def cut(self, cuts: list[Cut], edits: Edits) -> bool | None:
        """Takes a step, if it can be taken.

        Args:
            cuts: what to remove.
            edits: what config.json says then.
        Returns:
            True: taken. False: with such a config the model is another one. None: the architecture takes no such
            config.
        """
        kept = dict(self.kept)
        for groups, kept_groups in cuts:
            for member in groups.members:
                indices = kept.get(
                    (member.name, member.dim), torch.ones(self._shapes[member.name][member.dim], dtype=torch.bool)
                ).clone()
                indices[member.start : member.stop] &= kept_groups.repeat_interleave(member.width)
                kept[member.name, member.dim] = indices
        shapes = dict(self._shapes)
        for (name, dim), indices in kept.items():
            shapes[name] = (*shapes[name][:dim], int(indices.sum()), *shapes[name][dim + 1 :])
        config = _edited(self._config, edits)
        try:
            model = self._build(config)
        except UsageError:
            return None
        if _traits(model) != (shapes, self._numbers):
            return False
        self._config, self.kept = config, kept
        return True

    def _build(self, config: dict[str, Any]) -> nn.Module:
        try:
            settings = type(self._settings).from_dict(deepcopy(config))
        except Exception as error:  # the class of a config may raise anything
            raise UsageError(str(error)) from error
        return build_on_meta(self._cls, settings, "the config of the smaller model")

    def layer_list_edits(self, widths: dict[int, int]) -> Iterator[Callable[[dict[int, int]], Edits]]:
        """For each entry that lists the widths of these layers: a function that gives its edit for other widths.

        Args:
            widths: {number of the layer: its width}.
        """
        for path, value in _entries(self._full_config):
            is_int_list = isinstance(value, list) and all(type(width) is int for width in value)
            if is_int_list and all(i < len(value) and value[i] == width for i, width in widths.items()):
                yield lambda new, path=path, value=value: {path: [new.get(i, width) for i, width in enumerate(value)]}

    def channel_entries(self, width: int) -> Iterator[tuple[ConfigPath, ...]]:
        """Entries that may hold the one width of the feed-forward layers.

        First those with a name for it, one at a time and together; then others of that value; then those without a
        value, which the architecture fills in (GPT-2's n_inner).
        """
        equal = [path for path, value in _entries(self._full_config) if type(value) is int and value == width]
        named = [path for path in equal if _FEED_FORWARD.search(str(path[-1]))]
        yield from ((path,) for path in named)
        if len(named) > 1:
            yield tuple(named)
        yield from ((path,) for path in equal if path not in named)
        yield from (
            (path,)
            for path, value in _entries(self._full_config)
            if value is None and _FEED_FORWARD.search(str(path[-1]))
        )

    def head_edits(self, heads: int, shared: int, size: int) -> Iterator[Callable[[int, int], Edits]]:
        """For each entry that holds these numbers of heads: a function that gives its edits for other numbers.

        The size of a head is written as well, since it might follow from their number.

        Args:
            heads: number of query heads.
            shared: number of heads of keys and values.
            size: of a head.
        """
        names = {"num_attention_heads", getattr(self._settings, "attribute_map", {}).get("num_attention_heads")}
        for path, value in _entries(self._full_config):
            section = self._section(path[:-1])
            if path[-1] in names and value == heads and (section.get("num_key_value_heads") or heads) == shared:
                size_edit = {(*path[:-1], "head_dim"): size}
                if "num_key_value_heads" in section:
                    yield lambda new_heads, new_shared, path=path, size_edit=size_edit: {
                        path: new_heads,
                        (*path[:-1], "num_key_value_heads"): new_shared,
                        **size_edit,
                    }
                elif heads == shared:
                    yield lambda new_heads, new_shared, path=path, size_edit=size_edit: {path: new_heads, **size_edit}

    def _section(self, path: ConfigPath) -> dict[str, Any]:
        section = self._full_config
        for key in path:
            section = section[key]
        return section


def _traits(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[tuple[str, str], float]]:
    """What tells whether two models compute alike.

    Returns:
        The shapes of parameters and buffers (such as the frequencies of positions), and numbers of modules: sizes of
        heads, and all floats (such as the scale of attention).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in (*model.state_dict().items(), *model.named_buffers())}
    return shapes, {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is float or key in HEAD_SIZES
    }


def _entries(config: dict[str, Any], above: ConfigPath = ()) -> list[tuple[ConfigPath, Any]]:
    """Every entry of the config, and of the configs in it, with its value."""
    entries: list[tuple[ConfigPath, Any]] = []
    for key, value in config.items():
        entries += _entries(value, (*above, key)) if isinstance(value, dict) else [((*above, key), value)]
    return entries


def _edited(config: dict[str, Any], edits: Edits) -> dict[str, Any]:
    edited = deepcopy(config)
    for path, value in edits.items():
        section = edited
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    return edited
