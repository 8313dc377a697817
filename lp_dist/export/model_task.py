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
    # An encoder has a causal class as well, for use as a decoder.
    masked = class_of("MODEL_FOR_MASKED_LM_MAPPING", settings) is not None and not getattr(
        settings, "is_decoder", False
    )
    if named is None:
        known = (causal is not None and not masked) or hasattr(settings, "auto_map")
        return None if known else type(settings).__name__
    cls = getattr(transformers, str(named), None)
    if cls is None or cls is causal:
        return None
    is_bare = causal is not None and cls is class_of("MODEL_MAPPING", settings)
    return None if is_bare and not masked and getattr(settings, "tie_word_embeddings", False) else str(named)
