"""`lp-dist inspect`: where the zeros of a model are, read one tensor at a time from a checkpoint or from the hub."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lp_dist.checkpoints.hf_names import meta_model, model_entries, name_map
from lp_dist.checkpoints.opening import Checkpoint, Entry, open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.report.console import print_table, say
from lp_dist.report.numbers import percent
from lp_dist.sparsity.measure import kind_of, layer_of
from lp_dist.sparsity.selection import matrix_names, named_like_a_matrix
from lp_dist.structured.dead_groups import dead_channels, dead_heads
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.resolve import recognised_groups

# The pattern of sparse tensor cores: of each four weights along the input at most two are not zero.
BLOCK, NONZERO = 4, 2


@dataclass
class TensorZeros:
    """The zeros of one tensor. From `rows` on, all are None if it is no matrix.

    Args:
        name: as the checkpoint has it.
        shape: as it is stored.
        dtype: without "torch.".
        kind: of layer, such as "q_proj".
        layer: its number; None outside of the layers.
        counted: whether it is one of the matrices that decay.
        zeros: exact zeros.
        elements: all elements.
        rows: outputs, whichever way the matrix is stored. A convolution is a matrix of outputs × all the rest.
        columns: inputs.
        dead_rows: rows that are all zero.
        dead_columns: columns that are all zero.
        blocks: 2:4 blocks, of four weights along the inputs.
        conforming: blocks that have two zeros or more.
    """

    name: str
    shape: list[int]
    dtype: str
    kind: str
    layer: int | None
    counted: bool
    zeros: int
    elements: int
    rows: int | None = None
    columns: int | None = None
    dead_rows: int | None = None
    dead_columns: int | None = None
    blocks: int | None = None
    conforming: int | None = None


@dataclass
class Inspection:
    """The zeros of a model.

    Args:
        model: the directory or hub id.
        form: of the checkpoint, in words.
        tensors: in the order of the model.
        channels: {module: [dead, all]} of feed-forward channels without an effect, in the modules that were
            recognised. Empty without a config.json.
        heads: the same of attention heads.
    """

    model: str
    form: str
    tensors: list[TensorZeros]
    channels: dict[str, list[int]]
    heads: dict[str, list[int]]

    def total(self, counted_alone: bool = True) -> tuple[int, int]:
        """Zeros and elements.

        Args:
            counted_alone: of the matrices that decay; False: of all parameters.
        """
        return sums(tensor for tensor in self.tensors if tensor.counted or not counted_alone)

    def tensors_by(self, key: str) -> dict[Any, list[TensorZeros]]:
        """The counted tensors by `key`, which is "kind" or "layer", in the order of the model."""
        groups: dict[Any, list[TensorZeros]] = {}
        for tensor in self.tensors:
            if tensor.counted:
                groups.setdefault(getattr(tensor, key), []).append(tensor)
        return groups

    def as_json(self) -> dict[str, Any]:
        """All tensors and the totals, in JSON's types."""
        zeros, elements = self.total()
        zeros_of_all, parameters = self.total(counted_alone=False)
        return {
            "version": 1,
            "model": self.model,
            "form": self.form,
            "zeros": zeros,
            "decayed_weights": elements,
            "sparsity": zeros / max(1, elements),
            "zeros_of_all": zeros_of_all,
            "parameters": parameters,
            "channels": self.channels,
            "heads": self.heads,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


class _NamedEntry(NamedTuple):
    """A tensor of a checkpoint.

    Args:
        name: in its files.
        param_name: in the model; `name` where it is not one parameter in the same form.
        params: the parameters of the model whose weights it holds; empty where the model is not known.
        entry: reads it.
    """

    name: str
    param_name: str
    params: tuple[str, ...]
    entry: Entry


def sums(tensors: Iterable[TensorZeros]) -> tuple[int, int]:
    """Zeros and elements of several tensors together."""
    zeros = elements = 0
    for tensor in tensors:
        zeros, elements = zeros + tensor.zeros, elements + tensor.elements
    return zeros, elements


def inspect(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_pickles: bool = False,
) -> Inspection:
    """Counts zeros, dead rows and columns, dead feed-forward channels and heads, and 2:4 blocks.

    One tensor at a time is in memory.

    Args:
        model: a directory that `open_checkpoint` reads, or a hub id. The safetensors files of a hub id are downloaded
            into the hub's cache.
        revision: of a model of the hub; None: its main one.
        trust_remote_code: let the model's repository run code of its own, to make its modules.
        trust_pickles: as of `open_checkpoint`.
    Raises:
        UsageError: it is neither, or can't be read.
    """
    path = model if Path(model).exists() else _download(str(model), revision)
    checkpoint = open_checkpoint(path, trust_pickles=trust_pickles)
    config = checkpoint.directory_of("config.json")
    skeleton = _skeleton(config, trust_remote_code)
    matrices: set[str] = set() if skeleton is None else matrix_names(skeleton)
    transposed = (
        set()
        if skeleton is None
        else {name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}
    )
    # Which rows and columns are dead, by the names of the parameters in the model.
    tensors, rows, columns = [], {}, {}
    with tqdm(total=checkpoint.nbytes, desc="Inspecting", unit="B", unit_scale=True) as bar:
        for name, param_name, params, entry in _untied(checkpoint, skeleton):
            counted = matrices.issuperset(params) if params else named_like_a_matrix(name, entry.shape)
            tensor = TensorZeros(
                name,
                list(entry.shape),
                str(entry.dtype).removeprefix("torch."),
                kind_of(name),
                layer_of(name),
                counted,
                0,
                entry.numel,
            )
            zero = entry.read() == 0
            tensor.zeros = int(zero.sum())
            if zero.ndim >= 2 and zero.numel():
                matrix = zero.flatten(1).T if param_name.rsplit(".", 1)[0] in transposed else zero.flatten(1)
                rows[param_name], columns[param_name] = _measure(matrix, tensor)
            # A bias has a value for each row.
            elif zero.ndim == 1:
                rows[param_name] = zero
            tensors.append(tensor)
            bar.update(entry.nbytes)
    groups: dict[str, list[WeightGroups]] = {} if skeleton is None else recognised_groups(skeleton)[0]
    return Inspection(
        str(model),
        checkpoint.form,
        tensors,
        dead_channels(skeleton, groups.get("channels", []), rows, columns),
        dead_heads(groups.get("heads", []), groups.get("kv_groups", []), rows, columns),
    )


def _measure(zero: Tensor, tensor: TensorZeros) -> tuple[Tensor, Tensor]:
    """Fills in `tensor` from `rows` on. zero: bool [outputs, inputs]. Returns which rows and columns are dead."""
    rows, columns = zero.all(dim=1), zero.all(dim=0)
    tensor.rows, tensor.dead_rows = len(rows), int(rows.sum())
    tensor.columns, tensor.dead_columns = len(columns), int(columns.sum())
    in_blocks = zero.shape[1] // BLOCK * BLOCK
    blocks = zero[:, :in_blocks].reshape(-1, BLOCK).sum(dim=1, dtype=torch.uint8)
    tensor.blocks, tensor.conforming = len(blocks), int((blocks >= BLOCK - NONZERO).sum())
    return rows, columns


def _skeleton(config: Path | None, trust_remote_code: bool) -> Any:
    """The model's modules without weights. None: its class is unknown, so that names say which matrices decay."""
    if config is None:
        return None
    try:
        return meta_model(config, trust_remote_code)
    except (UsageError, ValueError, OSError):
        return None


def _untied(checkpoint: Checkpoint, skeleton: Any) -> list[_NamedEntry]:
    """The tensors in the order of the model, a tied one once. (Files have layer 10 before layer 2.)"""
    entries = checkpoint.entries
    if skeleton is None:
        return [_NamedEntry(name, name, (), entries[name]) for name in sorted(entries, key=_by_number)]
    if checkpoint.runtime_names:
        # A checkpoint of another model than its config says keeps its own names.
        with suppress(UsageError):
            entries = model_entries(checkpoint, skeleton)
    names = name_map(
        skeleton,
        {name: entry.shape for name, entry in entries.items()},
        runtime_names=checkpoint.runtime_names,
    )
    param_names = {saved_name: name for name, saved_name in names.renamed.items()}
    position = {name: i for i, name in enumerate(skeleton.state_dict())}
    named = [
        _NamedEntry(
            name,
            param_names.get(name, name),
            tuple(names.by_tensor[name].shapes) if name in names.by_tensor else (),
            entry,
        )
        for name, entry in entries.items()
        if name not in names.duplicates
    ]
    return sorted(
        named,
        key=lambda tensor: (
            min((position[name] for name in tensor.params), default=len(position)),
            _by_number(tensor.name),
        ),
    )


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.json"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"{model} is no directory, and it could not be downloaded from the hub"
            f" ({str(error).splitlines()[0]}); name the directory of a checkpoint, or a model of the hub"
        ) from None


def show(inspection: Inspection) -> None:
    """Prints the totals, a row for each kind of layer, and the percentage of zeros by layer and kind."""
    by_kind = inspection.tensors_by("kind")
    columns = ("layer", "matrices", "weights", "zeros", "share", "dead rows", "columns", "2:4")
    print_table(
        f"{inspection.model} ({inspection.form})",
        columns,
        (_kind_row(kind, tensors) for kind, tensors in by_kind.items()),
        no_wrap=[column for column in columns if column != "dead rows"],
    )
    by_layer = inspection.tensors_by("layer")
    if len(by_layer) > 1:
        print_table(
            "Exact zeros, in % of the layer's weights",
            ("layer", *by_kind),
            (_layer_row(layer, tensors, list(by_kind)) for layer, tensors in by_layer.items()),
        )
    zeros, elements = inspection.total()
    zeros_of_all, parameters = inspection.total(counted_alone=False)
    say(
        f"{zeros:,} of {elements:,} weights that decay are exactly zero ({percent(zeros / max(1, elements))});"
        f" {zeros_of_all:,} of all {parameters:,} parameters ({percent(zeros_of_all / max(1, parameters))})."
    )
    for label, modules in (("feed-forward channels", inspection.channels), ("attention heads", inspection.heads)):
        if modules:
            dead, total = (sum(counts[i] for counts in modules.values()) for i in (0, 1))
            say(f"{dead:,} of {total:,} {label} can't have an effect any more.")


def _kind_row(kind: str, tensors: list[TensorZeros]) -> list[str]:
    zeros, elements = sums(tensors)
    dead_rows, dead_columns, blocks, conforming = (
        sum(getattr(tensor, key) or 0 for tensor in tensors)
        for key in ("dead_rows", "dead_columns", "blocks", "conforming")
    )
    return [
        kind,
        str(len(tensors)),
        f"{elements:,}",
        f"{zeros:,}",
        percent(zeros / max(1, elements)),
        f"{dead_rows:,}",
        f"{dead_columns:,}",
        percent(conforming / blocks, 0) if blocks else "",
    ]


def _layer_row(layer: int | None, tensors: list[TensorZeros], kinds: list[str]) -> list[str]:
    counts = [sums(tensor for tensor in tensors if tensor.kind == kind) for kind in kinds]
    return [
        "" if layer is None else str(layer),
        *(f"{100 * zeros / elements:.1f}" if elements else "" for zeros, elements in counts),
    ]
