"""What a configuration says a model is for: its class, and whether that is a causal language model."""

from __future__ import annotations

from typing import Any


def class_of(mapping: str, settings: Any) -> type | None:
    """The class that transformers has for a configuration and a task.

    Args:
        mapping: name of a mapping of transformers, such as "MODEL_FOR_CAUSAL_LM_MAPPING".
        settings: the configuration.
    Returns:
        The first class of the mapping; None where it has none for this configuration.
    """
    import transformers

    classes = getattr(transformers, mapping).get(type(settings), None)
    return classes[0] if isinstance(classes, tuple) else classes


def other_than_causal(settings: Any) -> str | None:
    """The name of a model's class, if that is no causal language model; None if it is one, or is not known.

    A model without a head, whose output head is its embeddings, is one.

    Args:
        settings: its configuration.
    """
    import transformers

    named = (getattr(settings, "architectures", None) or [None])[0]
    causal = class_of("MODEL_FOR_CAUSAL_LM_MAPPING", settings)
    if named is None:
        return None if causal is not None or hasattr(settings, "auto_map") else type(settings).__name__
    cls = getattr(transformers, str(named), None)
    if cls is None or cls is causal:
        return None
    if causal is not None and getattr(settings, "tie_word_embeddings", False):
        return None if cls is class_of("MODEL_MAPPING", settings) else str(named)
    return str(named)
