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
from lp_dist.structured.groups import Member, WeightGroups
from lp_dist.structured.recognition import HEAD_SIZES

ConfigPath = tuple[str, ...]  # the keys that lead to an entry of config.json
Edits = dict[ConfigPath, Any]  # {entry of config.json: its new value}
# What the width of a feed-forward layer is called. Entries of the same value with other names come after these.
_FEED_FORWARD = re.compile(r"inter|inner|ffn|ff_|_ff|mlp|feed")
# What numbers of heads are called, and those of keys and values.
_HEADS = re.compile(r"heads?$")
_SHARED_HEADS = re.compile(r"kv|key_value")


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
        self._cls, self._settings, self._config, self._model = cls, settings, config, model
        # With defaults that config.json leaves out.
        self._full_config = settings.to_dict()
        self._shapes, self._numbers = _traits(model)
        # {(parameter, dimension): which indices stay}; what has no entry is not cut. Bool, (size,).
        self.kept: dict[tuple[str, int], Tensor] = {}
        # As `kept`, of what each expert keeps by itself. Bool, (experts, size).
        self.kept_by_expert: dict[tuple[str, int], Tensor] = {}
        # {module of one expert: its name after the steps, or None where it is removed}
        self._renamed: dict[str, str | None] = {}

    @property
    def config(self) -> dict[str, Any]:
        """config.json after the steps so far."""
        return self._config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name before the steps: shape after them} of the parameters and buffers that stay."""
        return {
            name: shape
            for name, shape in _shapes_of_rest(self._shapes, self.kept, self.kept_by_expert).items()
            if self.renamed(name) is not None
        }

    def renamed(self, name: str) -> str | None:
        """The name of a parameter or buffer after the steps; None where it is removed."""
        return _renamed(name, self._renamed)

    def model(self) -> nn.Module:
        """The model after the steps so far, on the meta device."""
        return self._build(self._config)

    def removes(self, member: Member) -> bool:
        """Whether the expert of this member is removed by the steps so far."""
        if self.renamed(member.name) is None:
            return True
        kept = self.kept.get((member.name, 0))
        return member.expert is not None and kept is not None and not bool(kept[member.expert])

    def cut(self, cuts: list[Cut], edits: Edits) -> bool | None:
        """Takes a step, if it can be taken.

        Args:
            cuts: what to remove.
            edits: what config.json says then.
        Returns:
            True: taken. False: with such a config the model is another one. None: the architecture takes no such
            config.
        """
        kept, by_expert = dict(self.kept), dict(self.kept_by_expert)
        renamed = dict(self._renamed)
        for groups, kept_groups in cuts:
            for member in (*groups.members, *groups.followers):
                size = self._shapes[member.name][member.dim]
                count = (member.stop - member.start) // member.width
                lines = kept_groups[member.first : member.first + count].repeat_interleave(member.width)
                key = member.name, member.dim
                if member.expert is None:
                    indices = kept.get(key, torch.ones(size, dtype=torch.bool)).clone()
                    indices[member.start : member.stop] &= lines
                    kept[key] = indices
                else:
                    experts = self._shapes[member.name][0]
                    table = by_expert.get(key, torch.ones(experts, size, dtype=torch.bool)).clone()
                    table[member.expert, member.start : member.stop] &= lines
                    by_expert[key] = table
            renamed |= self._renamed_experts(groups, kept)
        try:
            shapes = _shapes_of_rest(self._shapes, kept, by_expert)
        except _UnequalError:
            return False
        config = _edited(self._config, edits)
        try:
            model = self._build(config)
        except UsageError:
            return None
        if _traits(model) != (
            {new: shape for name, shape in shapes.items() if (new := _renamed(name, renamed)) is not None},
            {
                (new, key): number
                for (name, key), number in self._numbers.items()
                if (new := _renamed(name, renamed)) is not None
            },
        ):
            return False
        self._config, self.kept, self.kept_by_expert, self._renamed = config, kept, by_expert, renamed
        return True

    def _renamed_experts(self, groups: WeightGroups, kept: dict[tuple[str, int], Tensor]) -> dict[str, str | None]:
        """New names of experts that are modules, of which some are removed."""
        removed = {member.name for member in groups.members if not kept.get((member.name, 0), torch.ones(1)).any()}
        if not removed:
            return {}
        children = [f"{groups.name}.{child}" for child, _ in self._model.get_submodule(groups.name).named_children()]
        stay = [child for child in children if not any(name.startswith(child + ".") for name in removed)]
        return dict.fromkeys(children) | dict(zip(stay, children))

    def _build(self, config: dict[str, Any]) -> nn.Module:
        try:
            # Infinite floats are written as objects in config.json.
            settings = type(self._settings).from_dict(_with_special_floats(deepcopy(config)))
        except Exception as error:  # the class of a config may raise anything
            raise UsageError(str(error)) from error
        return build_on_meta(self._cls, settings, "the config of the smaller model")

    def layer_list_edits(self, widths: dict[int, int]) -> Iterator[Callable[[dict[int, int]], Edits]]:
        """For each entry that lists the widths of these layers: a function that gives its edit for other widths.

        Args:
            widths: {number of the layer: its width}.
        """
        entries = _entries(self._full_config)
        for path, value in entries:
            is_int_list = isinstance(value, list) and all(type(width) is int for width in value)
            if is_int_list and all(i < len(value) and value[i] == width for i, width in widths.items()):
                yield lambda new, path=path, value=value: {path: [new.get(i, width) for i, width in enumerate(value)]}
        if len(set(widths.values())) > 1:
            return
        # A number for all layers, where the class may take a list as well, or has configurations of single layers.
        for path, value in entries:
            section = self._section(path[:-1])
            layers = section.get("num_hidden_layers")
            if type(value) is int and value in widths.values() and isinstance(layers, int) and layers > max(widths):
                yield lambda new, path=path, value=value, layers=layers: {
                    path: [new.get(i, value) for i in range(layers)]
                }
                of_layers = section.get("per_layer_config") or {}
                yield lambda new, path=path, of_layers=of_layers: {
                    (*path[:-1], "per_layer_config"): {
                        **of_layers,
                        **{str(i): {**of_layers.get(str(i), {}), path[-1]: width} for i, width in new.items()},
                    }
                }

    def expert_entries(self, count: int) -> Iterator[tuple[ConfigPath, ...]]:
        """Entries that may hold the one number of experts: those with a name for it, one at a time and together; then
        others of that value.
        """
        equal = [path for path, value in _entries(self._full_config) if type(value) is int and value == count]
        named = [path for path in equal if "expert" in str(path[-1])]
        yield from ((path,) for path in named)
        if len(named) > 1:
            yield tuple(named)
        yield from ((path,) for path in equal if path not in named)

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
        for path, value in _entries(self._full_config):
            key = str(path[-1])
            if type(value) is not int or value != heads or not _HEADS.search(key) or _SHARED_HEADS.search(key):
                continue
            section = self._section(path[:-1])
            shared_keys = [
                other
                for other, number in section.items()
                if type(number) is int and number == shared and _SHARED_HEADS.search(str(other))
            ]
            if not shared_keys and heads != shared:
                continue
            for size_edit in ({}, {(*path[:-1], "head_dim"): size}):
                yield lambda new_heads, new_shared, path=path, keys=shared_keys, size_edit=size_edit: {
                    path: new_heads,
                    **{(*path[:-1], shared_key): new_shared for shared_key in keys},
                    **size_edit,
                }

    def _section(self, path: ConfigPath) -> dict[str, Any]:
        section = self._full_config
        for key in path:
            section = section[key]
        return section


class _UnequalError(Exception):
    """Experts keep different numbers."""


def _shapes_of_rest(
    shapes: dict[str, tuple[int, ...]],
    kept: dict[tuple[str, int], Tensor],
    by_expert: dict[tuple[str, int], Tensor],
) -> dict[str, tuple[int, ...]]:
    """The shapes of what stays; _UnequalError where that is no tensor."""
    rest = dict(shapes)
    for (name, dim), indices in kept.items():
        rest[name] = (*rest[name][:dim], int(indices.sum()), *rest[name][dim + 1 :])
    for (name, dim), table in by_expert.items():
        experts = kept.get((name, 0))
        counts = (table if experts is None else table[experts]).sum(1).unique().tolist()
        if len(counts) != 1:
            raise _UnequalError(name)
        rest[name] = (*rest[name][:dim], counts[0], *rest[name][dim + 1 :])
    return rest


def _renamed(name: str, renamed: dict[str, str | None]) -> str | None:
    """A name of a parameter, buffer or module, where modules have other names or none."""
    for module, new in renamed.items():
        if name == module or name.startswith(module + "."):
            return None if new is None else new + name.removeprefix(module)
    return name


def _with_special_floats(config: Any) -> Any:
    """config.json's objects for floats that JSON has not, such as {"__float__": "Infinity"}, as floats."""
    if isinstance(config, dict):
        if set(config) == {"__float__"}:
            return float(config["__float__"])
        return {key: _with_special_floats(value) for key, value in config.items()}
    return [_with_special_floats(value) for value in config] if isinstance(config, list) else config


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
