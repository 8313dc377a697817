"""`lp-dist inspect`: where the zeros of a model are, read one tensor at a time from a checkpoint or from the hub."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lp_dist.checkpoints.hf_names import NameMap, meta_model, model_entries, name_map
from lp_dist.checkpoints.opening import Checkpoint, Entry, open_checkpoint
from lp_dist.checkpoints.saved_slices import SavedSlice, saved_slices
from lp_dist.errors import UsageError
from lp_dist.modules.code import Product, Use
from lp_dist.modules.model import ModelCode, read_model
from lp_dist.report.console import print_table, say
from lp_dist.report.numbers import percent
from lp_dist.sparsity.measure import kind_of, layer_of
from lp_dist.sparsity.selection import matrix_names, named_like_a_matrix
from lp_dist.structured.dead_groups import ReadingWeights, dead_channels, dead_heads
from lp_dist.structured.groups import WeightGroups
from lp_dist.structured.resolve import recognised_groups

# The pattern of sparse tensor cores: of each four weights along the input at most two are not zero.
BLOCK, NONZERO = 4, 2
# Fields of an inspection, and what their groups are called in words.
GROUPS = {
    "channels": "feed-forward channels",
    "heads": "attention heads",
    "experts": "experts",
    "expert_channels": "channels of experts",
}


@dataclass
class ExpertZeros:
    """The zeros of the matrix that one expert has in a tensor.

    Args:
        zeros: exact zeros.
        dead_rows: outputs that are all zero.
        dead_columns: inputs that are all zero.
        conforming: 2:4 blocks that have two zeros or more.
    """

    zeros: int
    dead_rows: int
    dead_columns: int
    conforming: int


@dataclass
class TensorZeros:
    """The zeros of one tensor. From `rows` on, all are None if it is no matrix, or it is not known which of its
    dimensions are inputs and outputs.

    Args:
        name: as the checkpoint has it.
        shape: as it is stored.
        dtype: without "torch.".
        kind: of layer, such as "q_proj".
        layer: its number; None outside of the layers.
        counted: whether it is one of the matrices that decay.
        zeros: exact zeros.
        elements: all elements.
        rows: outputs, whichever way the matrix is stored; of several experts, those of all together.
        columns: inputs; of several experts, those of all together. Those of a convolution are its input channels.
        dead_rows: rows that are all zero.
        dead_columns: columns that are all zero: over the outputs of one expert, or of one group of a convolution.
        blocks: 2:4 blocks, of four weights along the inputs; of a convolution at one output and position of its
            kernel.
        conforming: blocks that have two zeros or more.
        experts: how many experts have a matrix of their own in it; None for one matrix.
        dead_experts: experts whose matrix is all zero; None for one matrix.
        by_expert: of each expert; None for one matrix.
        is_buffer: whether the model has it as a buffer, such as running means, and not as a parameter.
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
    experts: int | None = None
    dead_experts: int | None = None
    by_expert: list[ExpertZeros] | None = None
    is_buffer: bool = False


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
        experts: the same of experts that add nothing, since all that makes their outputs is zero.
        expert_channels: the same of the channels inside of experts, those of all experts of a module together. A
            channel is dead where all that reads it is zero.
    """

    model: str
    form: str
    tensors: list[TensorZeros]
    channels: dict[str, list[int]]
    heads: dict[str, list[int]]
    experts: dict[str, list[int]]
    expert_channels: dict[str, list[int]]

    def total(self, counted_alone: bool = True) -> tuple[int, int]:
        """Zeros and elements.

        Args:
            counted_alone: of the matrices that decay; False: of all parameters.
        """
        return sums(t for t in self.tensors if t.counted or not (counted_alone or t.is_buffer))

    def tensors_by(self, key: str) -> dict[Any, list[TensorZeros]]:
        """The counted tensors by `key`, which is "kind" or "layer", in the order of the model."""
        groups: dict[Any, list[TensorZeros]] = {}
        for tensor in self.tensors:
            if tensor.counted:
                groups.setdefault(getattr(tensor, key), []).append(tensor)
        return groups

    def groups(self) -> dict[str, dict[str, list[int]]]:
        """{a kind of groups in words: {module: [dead, all]}}, of the kinds that were recognised."""
        return {label: modules for key, label in GROUPS.items() if (modules := getattr(self, key))}

    def as_json(self) -> dict[str, Any]:
        """All tensors and the totals, in JSON's types."""
        zeros, elements = self.total()
        zeros_of_all, parameters = self.total(counted_alone=False)
        return {
            "version": 2,
            "model": self.model,
            "form": self.form,
            "zeros": zeros,
            "decayed_weights": elements,
            "sparsity": zeros / max(1, elements),
            "zeros_of_all": zeros_of_all,
            "parameters": parameters,
            "channels": self.channels,
            "heads": self.heads,
            "experts": self.experts,
            "expert_channels": self.expert_channels,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


class _NamedEntry(NamedTuple):
    """A tensor of a checkpoint.

    Args:
        name: in its files.
        param_name: in the model; `name` where it is not one parameter in the same form.
        params: the parameters of the model whose weights it holds; empty where the model is not known.
        entry: reads it.
        axes: what its dimensions are; None where it is no matrix, or that is not known.
    """

    name: str
    param_name: str
    params: tuple[str, ...]
    entry: Entry
    axes: _Axes | None


class _Axes(NamedTuple):
    """What the dimensions of a tensor are.

    Args:
        product: which of them are inputs, outputs and experts. The others are positions of a kernel.
        groups: of a convolution, whose dimension 0 is divided among as many groups.
    """

    product: Product
    groups: int = 1

    def matrices(self, tensor: Tensor) -> Tensor:
        """A view [experts or groups, outputs, positions, inputs]."""
        inputs, outputs, experts = self.product.inputs, self.product.outputs, self.product.experts
        if experts is None:
            # Of a convolution this is a matrix for each group, else one.
            tensor, inputs, outputs, experts = tensor.unflatten(0, (self.groups, -1)), inputs + 1, outputs + 1, 0
        ordered = tensor.movedim((experts, outputs, inputs), (0, 1, -1))
        return ordered.flatten(2, -2) if ordered.ndim > 3 else ordered.unsqueeze(2)


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
    buffers: set[str] = set() if skeleton is None else {name for name, _ in skeleton.named_buffers()}
    groups: dict[str, list[WeightGroups]] = {} if skeleton is None else recognised_groups(skeleton)[0]
    of_experts = [*groups.get("experts", []), *groups.get("expert_channels", [])]
    reading, readers = _tensors_of(checkpoint, skeleton, of_experts)
    # Which rows and columns are dead, by the names of the parameters in the model.
    tensors, rows, columns = [], {}, {}
    with tqdm(total=checkpoint.nbytes, desc="Inspecting", unit="B", unit_scale=True) as bar:
        for name, param_name, params, entry, axes in reading:
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
                is_buffer=bool(params) and buffers.issuperset(params),
            )
            values = entry.read()
            readers.add(name, values)
            zero = values == 0
            del values
            tensor.zeros = int(zero.sum())
            if axes is not None and zero.numel():
                rows[param_name], columns[param_name] = _measure(axes.matrices(zero), tensor, axes)
            # A bias has a value for each row.
            elif zero.ndim == 1:
                rows[param_name] = zero
            tensors.append(tensor)
            bar.update(entry.nbytes)
    dead = readers.dead()
    return Inspection(
        str(model),
        checkpoint.form,
        tensors,
        dead_channels(skeleton, groups.get("channels", []), rows, columns),
        dead_heads(groups.get("heads", []), groups.get("kv_groups", []), rows, columns),
        *(_counts_by_module(groups.get(kind, []), dead) for kind in ("experts", "expert_channels")),
    )


def _measure(matrices: Tensor, tensor: TensorZeros, axes: _Axes) -> tuple[Tensor, Tensor]:
    """Fills in `tensor` from `rows` on.

    Args:
        matrices: where its weights are zero; bool [experts or groups, outputs, positions, inputs].
        tensor: to fill in.
        axes: of the tensor.
    Returns:
        Which rows and columns are dead, those of all matrices one after the other.
    """
    rows, columns = matrices.all(-1).all(-1), matrices.all(1).all(1)
    count = matrices.shape[-1] // BLOCK
    blocks = matrices[..., : count * BLOCK].unflatten(-1, (count, BLOCK)).sum(-1, dtype=torch.uint8)
    conforming = (blocks >= BLOCK - NONZERO).flatten(1).sum(1)
    tensor.rows, tensor.dead_rows = rows.numel(), int(rows.sum())
    tensor.columns, tensor.dead_columns = columns.numel(), int(columns.sum())
    tensor.blocks, tensor.conforming = blocks.numel(), int(conforming.sum())
    if axes.product.experts is not None:
        of_experts = [matrices.flatten(1).sum(1), rows.sum(1), columns.sum(1), conforming]
        tensor.by_expert = [ExpertZeros(*counts) for counts in torch.stack(of_experts, 1).tolist()]
        tensor.experts, tensor.dead_experts = len(rows), int(rows.all(1).sum())
    return rows.flatten(), columns.flatten()


def _counts_by_module(sets: list[WeightGroups], dead: dict[str, Tensor]) -> dict[str, list[int]]:
    """{module: [dead, all]} of the sets whose weights are in the files."""
    counts: dict[str, list[int]] = {}
    for groups in sets:
        if groups.label in dead:
            of_module = counts.setdefault(groups.name, [0, 0])
            of_module[0] += int(dead[groups.label].sum())
            of_module[1] += groups.count
    return counts


def _skeleton(config: Path | None, trust_remote_code: bool) -> Any:
    """The model's modules without weights. None: its class is unknown, so that names say which matrices decay."""
    if config is None:
        return None
    try:
        return meta_model(config, trust_remote_code)
    except (UsageError, ValueError, OSError):
        return None


def _tensors_of(
    checkpoint: Checkpoint, skeleton: Any, sets: list[WeightGroups]
) -> tuple[list[_NamedEntry], ReadingWeights]:
    """The tensors in the order of the model, a tied one once (files have layer 10 before layer 2); and what finds out
    which of these groups are dead, as far as the files have all that reads them.
    """
    entries = checkpoint.entries
    if skeleton is None:
        by_number = sorted(entries, key=_by_number)
        return [
            _NamedEntry(name, name, (), entries[name], _default_axes(entries[name].shape)) for name in by_number
        ], ReadingWeights([], {})
    if checkpoint.runtime_names:
        # A checkpoint of another model than its config says keeps its own names.
        with suppress(UsageError):
            entries = model_entries(checkpoint, skeleton)
    names = name_map(
        skeleton,
        {name: entry.shape for name, entry in entries.items()},
        runtime_names=checkpoint.runtime_names,
    )
    reading = read_model(skeleton)
    read_by = {groups.label: {member.name for member in groups.members if member.reads} for groups in sets}
    converted = {
        name
        for conversion in names.conversions
        if not conversion.is_renaming
        for name in conversion.shapes.keys() & reading.products.keys()
    }
    slices = saved_slices(skeleton, converted.union(*read_by.values()), names)
    axes = _AxesInFiles(skeleton, reading, names, slices)
    param_names = {saved_name: name for name, saved_name in names.renamed.items()}
    position = {name: i for i, name in enumerate(skeleton.state_dict())}
    named = [
        _NamedEntry(
            name,
            param_names.get(name, name),
            tuple(names.by_tensor[name].shapes) if name in names.by_tensor else (),
            entry,
            axes.of(name, entry.shape),
        )
        for name, entry in entries.items()
        if name not in names.duplicates
    ]
    in_order = sorted(
        named,
        key=lambda tensor: (
            min((position[name] for name in tensor.params), default=len(position)),
            _by_number(tensor.name),
        ),
    )
    return in_order, ReadingWeights([groups for groups in sets if read_by[groups.label] <= slices.keys()], slices)


def _default_axes(shape: tuple[int, ...]) -> _Axes | None:
    """Of a tensor of which nothing else is known."""
    return _Axes(Product(1, 0)) if len(shape) == 2 else None


@dataclass(frozen=True)
class _AxesInFiles:
    """Finds out what the dimensions of the files' tensors are.

    Args:
        skeleton: the model.
        reading: what its code does with its parameters.
        names: which tensors hold which of them.
        slices: of `saved_slices`, of the parameters that have another form in the files.
    """

    skeleton: nn.Module
    reading: ModelCode
    names: NameMap
    slices: dict[str, list[SavedSlice]]

    def of(self, name: str, shape: tuple[int, ...]) -> _Axes | None:
        """The axes of the tensor of this name in the files."""
        conversion = self.names.by_tensor.get(name)
        if conversion is None:
            return _default_axes(shape)
        of_params = [self._of_param(param, param_shape) for param, param_shape in conversion.shapes.items()]
        if conversion.is_renaming:
            return of_params[0]
        if len(of_params) > 1:
            # Layers that are side by side in the files, and have the same inputs; or experts one by one.
            first = of_params[0]
            if first is None or len(shape) != 2 or any(axes != first for axes in of_params):
                return None
            inputs = int(first.product.outputs < first.product.inputs)
            widths = {param_shape[first.product.inputs] for param_shape in conversion.shapes.values()}
            is_known = first.product.experts is None or shape[inputs] in widths
            return _Axes(Product(inputs, 1 - inputs)) if is_known else None
        (param,) = conversion.shapes
        saved = next((saved for saved in self.slices.get(param, []) if saved.name == name), None)
        if of_params[0] is None or saved is None:
            return None
        product, groups = of_params[0]
        inputs, outputs = saved.along[product.inputs], saved.along[product.outputs]
        experts = None if product.experts is None else saved.along[product.experts]
        return None if inputs is None or outputs is None else _Axes(Product(inputs, outputs, experts), groups)

    def _of_param(self, param: str, shape: tuple[int, ...]) -> _Axes | None:
        product, uses = self.reading.products.get(param), self.reading.uses.get(param, set())
        if product is not None:
            owner = self.skeleton.get_submodule(param.rpartition(".")[0])
            return _Axes(product, owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else 1)
        # Biases of experts are looked up too, and added.
        is_matrix = Use.PRODUCT in uses or uses <= {Use.LOOKUP}
        return _default_axes(shape) if is_matrix else None


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
    for label, modules in inspection.groups().items():
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
