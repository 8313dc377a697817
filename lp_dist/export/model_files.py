"""The files that make a directory of weights a model: configuration, tokenizer, processor, and its own code."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "normalizer.json",
)
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
_OTHER_FILES = ("generation_config.json", "*processor_config.json")
MODEL_FILES = ("config.json", *TOKENIZER_FILES, *TEMPLATE_FILES, *_OTHER_FILES, "LICENSE*")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# A model's own code, where its config.json refers to it.
CODE = "*.py"


def directory_of(model: str | Path, patterns: Iterable[str]) -> Path:
    """The directory of a model. One on the hub is taken from the cache, or downloaded.

    Args:
        model: directory or hub id.
        patterns: of the files that are downloaded.
    Raises:
        Exception: what `huggingface_hub.snapshot_download` raises where there is no such model, or no connection.
    """
    from huggingface_hub import snapshot_download

    return Path(model if Path(model).is_dir() else snapshot_download(str(model), allow_patterns=[*patterns]))


def copy_files(source: Path, out: Path, patterns: Iterable[str]) -> None:
    """Copies the files of a directory that one of the patterns matches, as they are.

    Args:
        source: directory.
        out: directory, which exists.
        patterns: globs, relative to `source`.
    """
    for file in _matching(source, patterns):
        # The launcher's script that DeepSpeed puts beside its checkpoints is no model's code.
        if file.name != "zero_to_fp32.py":
            target = out / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def copy_files_of_merged(base: Path, adapter: Path, out: Path, *, with_code: bool) -> list[str]:
    """Copies what belongs to a merged model: the adapter's own tokenizer, chat template, processor and settings for
    generation where it has them, and else the base's.

    Args:
        base: directory.
        adapter: directory.
        out: directory, which exists.
        with_code: copy the base's code too.
    Returns:
        What came from the adapter, in words.
    """
    copy_files(base, out, ["LICENSE*", *([CODE] if with_code else [])])
    together, taken = has_tokenizer(adapter), []
    # A template of the base may not fit another tokenizer.
    kinds = (
        ("tokenizer", (*TOKENIZER_FILES, *(TEMPLATE_FILES if together else ()))),
        ("chat template", () if together else TEMPLATE_FILES),
        *((pattern.strip("*").removesuffix(".json").replace("_", " "), (pattern,)) for pattern in _OTHER_FILES),
    )
    for kind, patterns in kinds:
        from_adapter = any(_matching(adapter, patterns))
        copy_files(adapter if from_adapter else base, out, patterns)
        taken += [kind] if from_adapter else []
    return taken


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer's files."""
    return bool(_matching(directory, TOKENIZER_FILES))


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for pattern in patterns for file in directory.glob(pattern) if file.is_file()]
