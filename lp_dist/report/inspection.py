"""`lp-dist inspect`: where the zeros of a model lie, read one tensor at a time from any checkpoint or from the hub."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from lp_dist.checkpoints.hf_names import meta_model, names_in, of_model
from lp_dist.checkpoints.opening import Checkpoint, Entry, open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.sparsity.measure import kind_of, layer_of
from lp_dist.sparsity.selection import matrix_names, named_like_a_matrix
from lp_dist.structured.dead_groups import dead_channels, dead_heads
from lp_dist.structured.groups import Groups
from lp_dist.structured.naming import recognised

BLOCK, NONZERO = (
    4,
    2,
)  # the pattern that sparse tensor cores take: of each four weights along the input at most two are not zero


@dataclass
class TensorZeros:
    """One tensor. counted: whether it is one of the matrices that decay. Rows are outputs and columns are inputs,
    whichever way it is stored (GPT-2's lies the other way); convolutions are taken as matrices of outputs × all the
    rest. blocks: groups of four along the inputs, conforming: how many of them have two zeros or more. From `rows` on
    all are None for what is no matrix.
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
    """What `inspect` found. channels, heads: {module: [dead, all]} of the feed-forward channels and attention heads
    that can't have an effect, of the modules whose parts were recognised; none where there is no config.json."""

    model: str
    form: str
    tensors: list[TensorZeros]
    channels: dict[str, list[int]]
    heads: dict[str, list[int]]

    def total(self, counted_alone: bool = True) -> tuple[int, int]:
        """Zeros and elements, of the matrices that decay or of all parameters."""
        return sums(tensor for tensor in self.tensors if tensor.counted or not counted_alone)

    def grouped(self, key: str) -> dict[Any, list[TensorZeros]]:
        """The counted tensors by `kind` or `layer`, in the order of the model."""
        groups: dict[Any, list[TensorZeros]] = {}
        for tensor in self.tensors:
            if tensor.counted:
                groups.setdefault(getattr(tensor, key), []).append(tensor)
        return groups

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types: everything, and the totals."""
        zeros, elements = self.total()
        of_all, parameters = self.total(counted_alone=False)
        return {
            "version": 1,
            "model": self.model,
            "form": self.form,
            "zeros": zeros,
            "decayed_weights": elements,
            "sparsity": zeros / max(1, elements),
            "zeros_of_all": of_all,
            "parameters": parameters,
            "channels": self.channels,
            "heads": self.heads,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def sums(tensors: Iterable[TensorZeros]) -> tuple[int, int]:
    zeros = elements = 0
    for tensor in tensors:
        zeros, elements = zeros + tensor.zeros, elements + tensor.elements
    return zeros, elements


def inspect(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Counts zeros, dead rows and columns, dead feed-forward channels and heads, and blocks of the 2:4 pattern.

    Args:
        model: a directory that `open_checkpoint` knows, or a hub id, whose safetensors files are downloaded into the
            hub's cache. One tensor at a time is in memory.
    Raises:
        UsageError: it is neither, or can't be read.
    """
    checkpoint = open_checkpoint(model if Path(model).exists() else _download(str(model), revision))
    config = checkpoint.directory_of("config.json")
    skeleton = _skeleton(config, trust_remote_code)
    known, matrices = (set(), set()) if skeleton is None else (set(skeleton.state_dict()), matrix_names(skeleton))
    transposed = (
        set()
        if skeleton is None
        else {name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}
    )
    tensors, rows, columns = [], {}, {}  # rows and columns by the model's own names
    with tqdm(total=checkpoint.nbytes, desc="Inspecting", unit="B", unit_scale=True) as bar:
        for name, mine, entry in _once(checkpoint, skeleton):
            # A published name may be none of the model's in memory: the experts of a layer are one tensor there.
            counted = mine in matrices if mine in known else named_like_a_matrix(name, entry.shape)
            found = TensorZeros(
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
            found.zeros = int(zero.sum())
            if zero.ndim >= 2 and zero.numel():
                matrix = zero.flatten(1).T if mine.rsplit(".", 1)[0] in transposed else zero.flatten(1)
                rows[mine], columns[mine] = _measure(matrix, found)
            elif zero.ndim == 1:
                rows[mine] = zero  # a bias
            tensors.append(found)
            bar.update(entry.nbytes)
    parts: dict[str, list[Groups]] = {} if skeleton is None else recognised(skeleton)[0]
    return Inspection(
        str(model),
        checkpoint.form,
        tensors,
        dead_channels(skeleton, parts.get("channels", []), rows, columns),
        dead_heads(parts.get("heads", []), parts.get("kv_groups", []), rows, columns),
    )


def _measure(zero: Tensor, found: TensorZeros) -> tuple[Tensor, Tensor]:
    """Fills in what a matrix has besides; which of its rows and columns are dead."""
    rows, columns = zero.all(dim=1), zero.all(dim=0)
    found.rows, found.columns, found.dead_rows, found.dead_columns = (
        len(rows),
        len(columns),
        int(rows.sum()),
        int(columns.sum()),
    )
    whole = zero.shape[1] // BLOCK * BLOCK
    blocks = zero[:, :whole].reshape(-1, BLOCK).sum(dim=1, dtype=torch.uint8)
    found.blocks, found.conforming = len(blocks), int((blocks >= BLOCK - NONZERO).sum())
    return rows, columns


def _skeleton(config: Path | None, trust_remote_code: bool) -> Any:
    """The model's modules without weights, where its class is known; what decays is then known by modules, and else by
    names.
    """
    if config is None:
        return None
    try:
        return meta_model(config, trust_remote_code)
    except (UsageError, ValueError, OSError):
        return None


def _once(checkpoint: Checkpoint, skeleton: Any) -> list[tuple[str, str, Entry]]:
    """Name, name in the model, and entry of each tensor, in the order of the model, a tied one once. (Files have them
    in the order of the alphabet, layer 10 before layer 2.)"""
    place: dict[str, int] = {}
    own: dict[str, str] = {}
    twice: set[str] = set()
    entries = checkpoint.entries
    if skeleton is not None and checkpoint.live:
        with suppress(UsageError):  # of another model than its config says: its own names are what there is
            entries = of_model(checkpoint, skeleton)
    if skeleton is not None:
        place = {name: i for i, name in enumerate(skeleton.state_dict())}
        own = {
            known: name
            for name, known in names_in(skeleton, {name: entry.shape for name, entry in entries.items()}).items()
        }
        first: dict[int, str] = {}
        there = {own.get(name, name) for name in entries}
        twice = {
            name
            for name, param in skeleton.named_parameters(remove_duplicate=False)
            if first.setdefault(id(param), name) != name and first[id(param)] in there
        }
    names = sorted(
        (name for name in entries if name not in twice),
        key=lambda name: (place.get(own.get(name, name), len(place)), _by_number(name)),
    )
    return [(name, own.get(name, name), entries[name]) for name in names]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


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
            f"{model} is no directory here, and the hub did not give it ({str(error).splitlines()[0]}); name a"
            " checkpoint's directory or a model of the hub"
        ) from None


def show(found: Inspection) -> None:
    """The totals, a row for each kind of layer, and the share of zeros by layer and kind."""
    console = Console()
    kinds = Table(title=f"{found.model} ({found.form})")
    for column in ("layer", "matrices", "weights", "zeros", "share", "dead rows", "columns", "2:4"):
        kinds.add_column(column, justify="left" if column == "layer" else "right", no_wrap=column != "dead rows")
    groups = found.grouped("kind")
    for kind, tensors in groups.items():
        zeros, elements = sums(tensors)
        dead_rows, dead_columns, blocks, conforming = (
            sum(getattr(tensor, key) or 0 for tensor in tensors)
            for key in ("dead_rows", "dead_columns", "blocks", "conforming")
        )
        kinds.add_row(
            kind,
            str(len(tensors)),
            f"{elements:,}",
            f"{zeros:,}",
            f"{zeros / max(1, elements):.2%}",
            f"{dead_rows:,}",
            f"{dead_columns:,}",
            f"{conforming / blocks:.0%}" if blocks else "",
        )
    console.print(kinds)
    layers = found.grouped("layer")
    if len(layers) > 1:
        table = Table(title="Exact zeros, in % of the layer's weights")
        for column in ("layer", *groups):
            table.add_column(column, justify="right")
        for layer, tensors in layers.items():
            shares = {kind: sums(tensor for tensor in tensors if tensor.kind == kind) for kind in groups}
            table.add_row(
                "" if layer is None else str(layer),
                *(f"{100 * zeros / elements:.1f}" if elements else "" for zeros, elements in shares.values()),
            )
        console.print(table)
    zeros, elements = found.total()
    of_all, parameters = found.total(counted_alone=False)
    console.print(
        f"{zeros:,} of {elements:,} weights that decay are exactly zero ({zeros / max(1, elements):.2%}); {of_all:,}"
        f" of all {parameters:,} parameters ({of_all / max(1, parameters):.2%}).",
        soft_wrap=True,
        highlight=False,
    )
    for what, modules in (("feed-forward channels", found.channels), ("attention heads", found.heads)):
        if modules:
            dead, all_ = (sum(counts[i] for counts in modules.values()) for i in (0, 1))
            console.print(
                f"{dead:,} of {all_:,} {what} can't have an effect any more.", soft_wrap=True, highlight=False
            )
