"""Text for training: a hub dataset or a local file, split into training and held-out documents, packed into blocks.

Errors name arguments; the command line gives them the names of its flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from lp_dist.errors import UsageError

_LOADERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text(
    dataset: str,
    config: str | None,
    split: str,
    text_column: str,
    eval_split: str | None,
    eval_fraction: float,
    seed: int,
) -> DatasetDict:
    """Loads documents as `{"train": ..., "eval": ...}`, each with "text" as its only column.

    Args:
        dataset: a hub id, or a local .txt, .md, .jsonl, .json, .csv or .parquet file.
        config: configuration of a hub dataset; None: its default one.
        split: split of a hub dataset to train on. A file has none.
        text_column: the column that holds the text.
        eval_split: split of a hub dataset to evaluate on; None: documents are held out of the training data.
        eval_fraction: the fraction of the documents that is held out: the end of a plain text file, else chosen at
            random.
        seed: of that choice.
    Raises:
        UsageError: a name, column or fraction can't be used. The message says what there is instead.
    """
    path = Path(dataset).expanduser()
    plain = False
    if path.suffix in _LOADERS or path.exists():
        if not path.is_file() or path.suffix not in _LOADERS:
            raise UsageError(
                f"dataset={dataset!r} must be an existing file that ends in one of {sorted(_LOADERS)}, or a hub id"
            )
        if eval_split is not None:
            raise UsageError(
                f"eval_split={eval_split!r} is for hub datasets, but {dataset} is a file; leave it out, and"
                f" eval_fraction={eval_fraction:g} is held out of the file"
            )
        loader = _LOADERS[path.suffix]
        plain = loader == "text"
        options: dict[str, Any] = {"keep_linebreaks": True} if plain else {}
        data = datasets.load_dataset(loader, data_files=str(path), split="train", **options)
    else:
        data = datasets.load_dataset(dataset, config, split=split)
    if text_column not in data.column_names:
        chat = next((name for name in ("messages", "conversations") if name in data.column_names), None)
        way_out = (
            f". {chat!r} holds chats, and this program trains on plain text: write a column of text by the tokenizer's"
            " apply_chat_template, or use TRL's SFTTrainer (docs/examples/trl_sft.py)"
            if chat is not None
            else ""
        )
        raise UsageError(
            f"text_column={text_column!r} is not in {dataset}; its columns are {data.column_names}{way_out}"
        )
    if eval_split is not None:
        held_out = datasets.load_dataset(dataset, config, split=eval_split)
    else:
        if not 0.0 < eval_fraction < 1.0:
            raise UsageError(f"eval_fraction={eval_fraction:g} must lie between 0 and 1; 0.05 is usual")
        if len(data) < 2:
            raise UsageError(
                f"{dataset} has {len(data)} documents, so none can be held out; give at least 2 lines, or name"
                " an eval_split"
            )
        splits = data.train_test_split(test_size=eval_fraction, shuffle=not plain, seed=None if plain else seed)
        data, held_out = splits["train"], splits["test"]
    return DatasetDict(train=_text_only(data, text_column), eval=_text_only(held_out, text_column))


def _text_only(data: Dataset, column: str) -> Dataset:
    data = data.select_columns([column])
    return data if column == "text" else data.rename_column(column, "text")


def pack(data: Dataset, tokenizer: Any, block_size: int, separate: bool = True) -> Dataset:
    """Tokenises documents and joins them into blocks of exactly `block_size` tokens.

    The last, incomplete block of each batch of 1,000 documents is dropped.

    Args:
        data: documents with "text" as their only column.
        tokenizer: of transformers.
        block_size: tokens of a block.
        separate: put the end-of-text token after each document. False for the lines of a plain text file.
    Returns:
        Blocks with "input_ids", and "labels" equal to them.
    Raises:
        UsageError: there is less text than one block.
    """
    end = [tokenizer.eos_token_id] if separate and tokenizer.eos_token_id is not None else []

    def to_blocks(batch: dict[str, list]) -> dict[str, list]:
        # verbose=False: a document longer than the model's context is cut into blocks, so the warning would be wrong.
        documents = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        tokens = [token for document in documents for token in document + end]
        ids = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": ids, "labels": ids}

    packed = data.map(
        to_blocks, batched=True, remove_columns=data.column_names, desc=f"packing into blocks of {block_size} tokens"
    )
    if len(packed) == 0:
        raise UsageError(
            f"{len(data)} documents give less than one block of block_size={block_size} tokens; lower it, or give"
            " more text"
        )
    return packed
