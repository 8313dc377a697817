"""What the directory of an adapter brings: tensors, and perhaps a tokenizer. Of which class the model is that it
belongs to.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lp_dist.checkpoints.entries import read_json
from lp_dist.checkpoints.files import TorchFile, safetensors
from lp_dist.checkpoints.hf_names import build_on_meta, model_class
from lp_dist.errors import UsageError, in_one_line
from lp_dist.export.model_files import has_tokenizer
from lp_dist.export.model_task import class_of

# The heads that peft's kinds of tasks have, where the model was made of one with another head.
_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
}
# What peft puts before the model's names, and between a layer and what it wraps. With resized embeddings it saves the
# tensors inside of its wrappers as well.
_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save|token_adapter)(?=\.)")


@dataclass(frozen=True)
class Adapter:
    """The directory of an adapter.

    Args:
        path: the directory.
        config: its adapter_config.json.
        shapes: {name of a tensor in the base, or of one that is added: shape}.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdaptedModel:
    """The model that an adapter belongs to.

    Args:
        cls: its class.
        settings: its configuration, with as many labels as the adapter has.
        vocabulary: rows of its embeddings that the adapter was trained with; None: as many as the base has.
        notes: what is not as the base's config says it, in sentences.
    """

    cls: Any
    settings: Any
    vocabulary: int | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


def read_adapter(directory: Path) -> Adapter:
    """Reads an adapter's config and the shapes of its tensors, before peft reads them.

    Raises:
        UsageError: one is damaged, its weights name classes that are not known, or its config has Megatron imported.
    """
    with in_one_line(f"the adapter {directory} is damaged: reading it ended with", "copy or download it anew"):
        file = directory / "adapter_config.json"
        if not file.is_file():
            raise UsageError(
                f"{directory} has no adapter_config.json, so it is no adapter; name what peft's save_pretrained wrote"
            )
        config, shapes = read_json(file), {}
        if config.get("megatron_config") is not None:
            # peft imports a module by a name of the file then.
            raise UsageError(f"{file} is of an adapter for Megatron; make one of the base in Transformers")
        if (directory / "adapter_model.safetensors").is_file():
            locations, _ = safetensors(directory / "adapter_model.safetensors")
            shapes = {name: location.shape for name, location in locations.items()}
        elif (directory / "adapter_model.bin").is_file():
            weights = TorchFile(directory / "adapter_model.bin")
            for name, tensor in weights.content.items():
                weights.check_fits(name, tensor)
                shapes[name] = tuple(tensor.shape)
    return Adapter(directory, config, {_name_in_base(name): shape for name, shape in shapes.items()})


def _name_in_base(name: str) -> str:
    """The name that a tensor of an adapter has in the base, where it replaces one there."""
    return _WRAPPERS.sub("", name.removeprefix(_PREFIX))


def adapted_model(base: Path, settings: Any, adapter: Adapter, trust_remote_code: bool) -> AdaptedModel:
    """Of which class and sizes the model is that the adapter was trained with.

    That is the class that the base's config names, if it has all modules that the adapter has tensors for. A
    classifier made of a language model is not the class of the base: then it is the one that the adapter's config
    names, by its class or its task.

    Args:
        base: directory of the base's config.json.
        settings: the base's configuration.
        adapter: its adapter.
        trust_remote_code: run code that comes with the base.
    Raises:
        UsageError: transformers does not know the class, or can't make it.
    """
    candidates = []
    for cls in _candidates(base, settings, adapter, trust_remote_code):
        # Some classes change the configuration that they are made of.
        model = build_on_meta(cls, copy.deepcopy(settings), f"{base}/config.json")
        candidates.append((cls, model))
        if _has_modules(model, adapter.shapes):
            break
    else:
        # An older adapter may have other names, which peft converts.
        cls, model = candidates[0]
    notes = []
    if settings.architectures and type(model).__name__ != settings.architectures[0]:
        notes.append(f"The adapter is of {type(model).__name__}, and the base is {settings.architectures[0]}.")
    vocabulary, labels = _sizes(model, adapter.shapes)
    if labels is not None and labels != settings.num_labels:
        notes.append(f"The adapter has {labels} labels, without names, and the base's config {settings.num_labels}.")
        settings.num_labels = labels
    return AdaptedModel(cls, settings, vocabulary, tuple(notes))


def _candidates(base: Path, settings: Any, adapter: Adapter, trust_remote_code: bool) -> Iterable[Any]:
    import transformers

    if settings.architectures:
        yield model_class(base, trust_remote_code)[0]
    # These two are written by peft, of models without and with a kind of task.
    named = getattr(transformers, str((adapter.config.get("auto_mapping") or {}).get("base_model_class")), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        yield named
    kind = adapter.config.get("task_type") or ("" if settings.architectures else "CAUSAL_LM")
    task = class_of(_TASKS[kind], settings) if kind in _TASKS else None
    if task is not None:
        yield task
    elif not settings.architectures:
        raise UsageError(
            f"{base}/config.json names no class in architectures, and transformers has no language model of the type"
            f" {settings.model_type}; save the base by its model's save_pretrained"
        )


def _has_modules(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether every tensor of an adapter has a module of the model to go to, by the first word that is not shared."""
    modules = {name for name, _ in model.named_modules()} - {""}

    def nearest(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return all(nearest(name) for name in names)


def _sizes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """The rows of embeddings, and the number of labels, that the adapter has, where the model has others."""
    embeddings = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = _of(getattr(model, get, None))
        embeddings |= {id(param) for param in module.parameters()} if module is not None else set()
    vocabulary = labels = None
    for name, param in model.named_parameters(remove_duplicate=False):
        shape = shapes.get(name, tuple(param.shape))
        if shape != tuple(param.shape) and shape and shape[1:] == tuple(param.shape)[1:]:
            if id(param) in embeddings:
                vocabulary = shape[0]
            elif param.shape[0] == getattr(model.config, "num_labels", None):
                labels = shape[0]
    return vocabulary, labels


def _of(get: Callable[[], Any] | None) -> Any:
    try:
        return get() if get is not None else None
    except NotImplementedError:  # of models that embed no tokens
        return None


def check_tokenizer(adapter: Adapter, rows: int | None) -> None:
    """Raises UsageError if the adapter's own tokenizer has tokens that the merged model has no embeddings for.

    Args:
        adapter: with a tokenizer or without.
        rows: tokens that the model has embeddings for; None where it embeds none.
    """
    from transformers import AutoTokenizer

    if rows is None or not has_tokenizer(adapter.path):
        return
    with in_one_line(
        f"the tokenizer in {adapter.path} can't be read: reading it ended with",
        "copy it anew, or remove it to keep the base's",
    ):
        tokens = max(AutoTokenizer.from_pretrained(adapter.path, trust_remote_code=False).get_vocab().values())
    if tokens >= rows:
        raise UsageError(
            f"the tokenizer in {adapter.path} has the token {tokens}, and the model has embeddings for {rows} tokens,"
            " since the adapter brings none; train it with the embeddings in modules_to_save, or remove its tokenizer"
            " to keep the base's"
        )
