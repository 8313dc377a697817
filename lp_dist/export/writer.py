"""`lp-dist export`: a checkpoint as an ordinary model directory, or in the compact form, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from lp_dist.checkpoints import bitmask
from lp_dist.checkpoints.entries import read_json
from lp_dist.checkpoints.hf_names import Published, in_dtype, loadable, published
from lp_dist.checkpoints.opening import Checkpoint, open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.output_directory import replaceable, written_whole
from lp_dist.export.shrink import Shrunk, planned
from lp_dist.export.verify import verify
from lp_dist.report.schema import FILE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What makes a directory of weights a model: configuration, tokenizer, processor, and (where config.json refers to it)
# code of its own.
_ALONG = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "normalizer.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "LICENSE*",
)
_CODE = "*.py"


@dataclass
class Exported:
    """What was written. counts: zeros and elements of each tensor, as written. underflows: weights that became zero in
    the new dtype alone. bytes_dense: of the tensors before they were shrunk or compacted, in their dtype. shrunk: what
    was removed, None where it was not asked for.
    """

    out: Path
    form: str
    compacted: bool
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    underflows: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_dense: int = 0
    files: list[str] = field(default_factory=list)
    shrunk: Shrunk | None = None
    verified: dict[str, Any] | None = None

    def show(self) -> None:
        """What was gained, and where it is."""
        zeros, numel = (sum(count[i] for count in self.counts.values()) for i in (0, 1))
        table = Table(title=f"From {self.form}")
        for column in ("", "size", "of the dense size in its dtype"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("before", decimal(self.bytes_before), "")
        share = self.bytes_after / max(1, self.bytes_dense)
        table.add_row(
            "after" + ", shrunk" * (self.shrunk is not None) + ", compact form" * self.compacted,
            decimal(self.bytes_after),
            f"{share:.1%}",
        )
        lines = [] if self.shrunk is None else [f"{one}." for one in self.shrunk.removed]
        lines += [
            f"{zeros:,} of {numel:,} weights are exactly zero ({zeros / max(1, numel):.2%}), in {len(self.counts)}"
            f" tensors, {len(self.files)} file{'s' if len(self.files) > 1 else ''}."
        ]
        if self.underflows:
            lines.append(f"{self.underflows:,} of these were too small for the new dtype.")
        if self.verified is not None:
            logits = f", and so are {self.verified['logits']:,} logits" if self.verified["logits"] else ""
            if "difference" in self.verified:
                logits = (
                    "; {logits:,} logits differ by {difference:.1e} at most, and rounding explains up to"
                    " {rounding:.1e}".format(**self.verified)
                )
            what = "the checkpoint's" if self.shrunk is None else "what the checkpoint has, without these,"
            lines.append(f"Read back: {self.verified['tensors']} tensors are {what} bit for bit{logits}.")
        loads = (
            f"lp-dist export {self.out} OUT gives the model back" if self.compacted else "loads with from_pretrained"
        )
        lines.append(f"Saved to {self.out}; {loads}.")
        console = Console()
        console.print(table)
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str = "5GB",
    config: str | None = None,
    masters: bool = False,
    compacted: bool = False,
    shrunk: bool = False,
    multiple: int = 1,
    verified: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes the model of a checkpoint to `out`, whole or not at all: what is being written lies in `out`.partial
    until it is complete.

    Args:
        run: any directory that `open_checkpoint` knows; `masters` as there.
        dtype: float32, bfloat16 or float16 of the floating-point tensors; None: as stored (an engine's master weights
            are fp32).
        shard_size: of a file, such as "5GB"; so much is held in memory at a time, and one tensor more where a single
            one is larger.
        config: directory or hub id of the model, where no config.json is beside or above the checkpoint.
        compacted: the compact form (`lp_dist.checkpoints.bitmask`) instead of one that loads with `from_pretrained`.
        shrunk: without dead feed-forward channels and attention heads, as far as the config can say so; multiple: what
            their width is rounded up to (`lp_dist.export.shrink.planned`).
        verified: read it back and compare it (`lp_dist.export.verify.verify`) before it is put in its place.
    Raises:
        DiffersError: what was read back differs; it is left in `out`.partial.
        UsageError: bad arguments, an unknown or incomplete checkpoint, weights that are not finite, or beyond float16,
            nothing to shrink.
    """
    if multiple != 1 and not shrunk:
        raise UsageError("--multiple says what --shrink rounds widths up to; give --shrink too, or leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"--dtype {dtype} is none of {', '.join(DTYPES)}; choose one, or leave it out to keep the stored one"
        )
    try:
        limit = convert_file_size_to_int(shard_size)
    except ValueError:
        raise UsageError(f"--shard-size {shard_size} is no size; write it as 5GB or 500MB") from None
    given, out, cast = Path(out), replaceable(out, overwrite), DTYPES.get(dtype or "")
    checkpoint = open_checkpoint(run, masters=masters)
    beside = _config_directory(checkpoint, config)
    replaceable(out, overwrite, checkpoint.path, *([beside] if beside else []))
    pieces = published(checkpoint, beside, trust_remote_code)
    written = Exported(given, checkpoint.form, compacted, bytes_before=checkpoint.nbytes)
    if shrunk:
        if beside is None:
            raise UsageError(
                f"--shrink rewrites the model's config.json, and none is in {checkpoint.path}; give the model's"
                " directory or hub id: --config MODEL"
            )
        written.shrunk = planned(pieces, beside, cast, multiple, trust_remote_code)
    with written_whole(out) as partial:
        files = _Files(partial, limit, compacted)
        for name, tensor in _tensors(pieces, cast, written):
            files.add(name, tensor)
        written.files = files.close()
        written.bytes_after = sum((partial / file).stat().st_size for file in written.files)
        if beside is not None:
            _copy_along(beside, partial, checkpoint, cast, written.shrunk.config if written.shrunk else None)
        if verified:
            written.verified = verify(
                checkpoint,
                partial,
                config=beside,
                dtype=cast,
                shrunk=written.shrunk,
                trust_remote_code=trust_remote_code,
            )
    return written


def _config_directory(checkpoint: Checkpoint, config: str | None) -> Path | None:
    """Where the model's config.json lies. One from the hub is taken from its cache, or downloaded without the
    weights.
    """
    if config is None:
        return checkpoint.directory_of("config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(config if Path(config).is_dir() else snapshot_download(config, allow_patterns=[*_ALONG, _CODE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"--config {config} is no directory, and the hub did not give it ({str(error).splitlines()[0]}); name the"
            " directory or hub id of the model"
        ) from None
    if not (found / "config.json").is_file():
        raise UsageError(f"--config {config} has no config.json; name the directory or hub id of the model")
    return found


def _tensors(pieces: list[Published], dtype: torch.dtype | None, written: Exported) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write, in their new dtype, one at a time; counts their zeros on the way."""
    with tqdm(total=sum(piece.nbytes for piece in pieces), desc="Exporting", unit="B", unit_scale=True) as bar:
        for piece in pieces:
            for name, whole in piece.read().items():
                tensor = whole if written.shrunk is None else written.shrunk.cut(name, whole)
                cast = in_dtype(tensor, dtype)
                _check_finite(name, tensor, cast)
                zeros = _zeros(cast)
                written.underflows += zeros - _zeros(tensor) if cast is not tensor else 0
                written.counts[name] = (zeros, cast.numel())
                written.bytes_dense += whole.numel() * cast.itemsize
                yield name, cast.contiguous()
            bar.update(piece.nbytes)


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))


def _check_finite(name: str, tensor: Tensor, cast: Tensor) -> None:
    def finite(values: Tensor) -> bool:  # without a tensor of bools
        return all(bool(end.isfinite()) for end in torch.aminmax(values))

    if not cast.is_floating_point() or not cast.numel() or finite(cast):
        return
    if finite(tensor):
        raise UsageError(
            f"{name} has a value of {float(tensor.abs().max()):g}, which {str(cast.dtype).removeprefix('torch.')}"
            " can't hold; export in bfloat16 or float32"
        )
    raise UsageError(
        f"{name} has values that are not finite: the training was spoiled; export a checkpoint from before"
    )


class _Files:
    """Fills one file after the other; the names that loaders look for, and the index, come once their number is
    known.
    """

    def __init__(self, directory: Path, limit: int, compacted: bool) -> None:
        self._directory, self._limit, self._compacted, self._stem = (
            directory,
            limit,
            compacted,
            "compact" if compacted else "model",
        )
        self._held: dict[str, Tensor] = {}
        self._shapes: dict[str, list[int]] = {}
        self._written: list[list[str]] = []  # names of tensors, by file
        self._size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        packed = bitmask.pack(tensor) if self._compacted else None
        parts = {name: tensor} if packed is None else {f"{name}.bitmask": packed[0], f"{name}.values": packed[1]}
        size = sum(part.nbytes for part in parts.values())
        if self._held and self._size + size > self._limit:
            self._flush()
        self._held.update(parts)
        self._shapes[name] = list(tensor.shape)
        self._size += size

    def close(self) -> list[str]:
        """The names of the files."""
        self._flush()
        count = len(self._written)
        names = [
            f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{self._stem}.safetensors"
            for i in range(count)
        ]
        for i, name in enumerate(names):
            self._unnamed(i).rename(self._directory / name)
        if count > 1 and not self._compacted:
            places = {tensor: name for name, held in zip(names, self._written) for tensor in held}
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._directory / f"{self._stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n"
            )
        return names

    def _flush(self) -> None:
        more = {bitmask.KEY: json.dumps(self._shapes)} if self._compacted else {}
        save_file(self._held, self._unnamed(len(self._written)), metadata={"format": "pt", **more})
        self._written.append(list(self._held))
        self._total += self._size
        self._held, self._shapes, self._size = {}, {}, 0

    def _unnamed(self, i: int) -> Path:
        return self._directory / f"{self._stem}-{i + 1:05d}.safetensors"


def _copy_along(
    beside: Path, out: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, smaller: dict[str, Any] | None
) -> None:
    """dtype: None leaves what config.json says of a published model; an engine's weights may be wider than the model
    that they began as. smaller: the config of a shrunk model."""
    config = smaller or read_json(beside / "config.json")
    patterns = [
        *_ALONG,
        *([_CODE] if "auto_map" in config else []),
        *([FILE, "report.html"] if beside == checkpoint.path and smaller is None else []),
    ]  # these tell of the model as it was
    for file in (
        file
        for pattern in patterns
        for file in beside.glob(pattern)
        if file.is_file() and file.name != "zero_to_fp32.py"
    ):
        target = out / file.relative_to(beside)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if dtype is None and checkpoint.live:
        dtype = max(
            (entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point),
            key=lambda dtype: dtype.itemsize,
        )
    (out / "config.json").write_text(json.dumps(loadable(config, dtype), indent=2) + "\n")
