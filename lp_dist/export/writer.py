"""`lp-dist export`: writes a checkpoint as an ordinary model directory, or in bitmask form, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from rich.filesize import decimal
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from lp_dist.checkpoints.bitmask import METADATA_KEY, pack
from lp_dist.checkpoints.entries import read_json
from lp_dist.checkpoints.hf_names import HfTensor, hf_tensors, in_dtype, loadable_config
from lp_dist.checkpoints.opening import Checkpoint, open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.model_files import CODE, MODEL_FILES, copy_files, directory_of
from lp_dist.export.output_directory import atomic_directory, check_output_directory
from lp_dist.export.shrink import ShrinkPlan, shrink_plan
from lp_dist.export.verify import verify_export
from lp_dist.optim.batching import count_zeros
from lp_dist.report.console import print_table, say
from lp_dist.report.numbers import percent
from lp_dist.report.schema import FILE
from lp_dist.sparsity.census import ZeroCount

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ExportResult:
    """What was written.

    Args:
        out: the directory.
        form: of the checkpoint, in words.
        bitmask: whether it is in bitmask form.
        counts: {Hugging Face name: zeros and elements}.
        underflows: weights that became zero by the new dtype.
        bytes_before: of the checkpoint.
        bytes_after: of the written weights.
        bytes_dense: of all tensors in the new dtype, before any removal, and without bitmasks.
        files: names of the files of weights.
        shrink_plan: what was removed; None where that was not requested.
        verification: of `verify_export`; None where that was not requested.
    """

    out: Path
    form: str
    bitmask: bool
    counts: dict[str, ZeroCount] = field(default_factory=dict)
    underflows: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_dense: int = 0
    files: list[str] = field(default_factory=list)
    shrink_plan: ShrinkPlan | None = None
    verification: dict[str, Any] | None = None

    def show(self) -> None:
        """Prints what was gained, and where it is."""
        label = "after" + ", shrunk" * (self.shrink_plan is not None) + ", bitmask form" * self.bitmask
        print_table(
            f"From {self.form}",
            ("", "size", "of the dense size in its dtype"),
            [
                ("before", decimal(self.bytes_before), ""),
                (label, decimal(self.bytes_after), percent(self.bytes_after / max(1, self.bytes_dense), 1)),
            ],
        )
        for removal in self.shrink_plan.removals if self.shrink_plan else ():
            say(f"{removal}.")
        zeros = sum(count.zeros for count in self.counts.values())
        elements = sum(count.elements for count in self.counts.values())
        say(
            f"{zeros:,} of {elements:,} weights are exactly zero ({percent(zeros / max(1, elements))}), in"
            f" {len(self.counts)} tensors, {len(self.files)} file{'s' if len(self.files) > 1 else ''}."
        )
        if self.underflows:
            say(f"{self.underflows:,} of these were too small for the new dtype.")
        if self.verification is not None:
            say(self.verification_line())
        loads = f"lp-dist export {self.out} OUT gives the model back" if self.bitmask else "loads with from_pretrained"
        say(f"Saved to {self.out}; {loads}.")

    def verification_line(self) -> str:
        """What was compared, and what was not; "" where nothing was."""
        verification = self.verification
        if verification is None:
            return ""
        source = "the checkpoint's" if self.shrink_plan is None else "what the checkpoint has, without these,"
        tensors = f"Read back: {verification['tensors']} tensors are {source} bit for bit"
        if verification["logits"] is None:
            return f"{tensors}. No outputs were compared: {verification['reason']}."
        of = "" if verification["outputs"] == ["logits"] else "values of "
        values = f"{verification['logits']:,} {of}{_listed(verification['outputs'])}"
        line = f"{tensors}, and so are {values} for {_listed(verification['inputs'])}."
        if "difference" in verification:
            line = f"{tensors}; {self._difference_line(verification, values)}"
        unread = verification["unread"]
        if unread:
            more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            line += f" These outputs say nothing of {', '.join(unread[:3])}{more}."
        return line

    def _difference_line(self, verification: dict[str, Any], values: str) -> str:
        """How far the outputs of a smaller model are from the checkpoint's. values: what was compared, in words."""
        differ = (
            f"{values} differ by {verification['difference']:.1e} at most, and rounding explains up to"
            f" {verification['rounding']:.1e}."
            if verification["difference"] is not None
            else f"{values} could not be compared, since it is not known how the routers compute theirs."
        )
        if "without_experts" not in verification:
            return differ
        where = "where the checkpoint's routers can't choose the removed experts, "
        return (
            f"{where if verification['difference'] is not None else ''}{differ} As it is, its routers still"
            f" choose them, and its outputs differ by up to {verification['without_experts']:.1e}: evaluate"
            " the smaller model."
        )


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str = "5GB",
    config: str | None = None,
    masters: bool = False,
    bitmask: bool = False,
    shrink: bool = False,
    multiple: int = 1,
    verify: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    trust_pickles: bool = False,
) -> ExportResult:
    """Writes the model of a checkpoint to `out`, whole or not at all. The files lie in `out`.partial until all are
    written.

    Args:
        run: any directory that `open_checkpoint` knows.
        out: directory to write.
        dtype: float32, bfloat16 or float16, of the floating-point tensors. None: as stored (an engine's master weights
            are fp32).
        shard_size: of a file, such as "5GB". As much is in memory at a time, and one tensor more where it is larger.
        config: directory or hub id of the model, where no config.json is beside or above the checkpoint.
        masters: as of `open_checkpoint`.
        bitmask: write the bitmask form (`lp_dist.checkpoints.bitmask`), not one that loads with `from_pretrained`.
        shrink: remove dead feed-forward channels, attention heads, experts and channels of experts, as far as
            config.json can hold their numbers.
        multiple: with `shrink`, what the width of feed-forward layers is rounded up to.
        verify: read the export back and compare it (`verify_export`) before it replaces `out`.
        overwrite: replace an earlier output.
        trust_remote_code: run code that comes with the model.
        trust_pickles: as of `open_checkpoint`.
    Raises:
        DiffersError: what was read back differs; it stays in `out`.partial.
        UsageError: bad arguments, an unknown or incomplete checkpoint, weights that are not finite or too large for
            float16, or nothing to remove.
    """
    if multiple != 1 and not shrink:
        raise UsageError("--multiple says what --shrink rounds widths up to; give --shrink too, or leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"--dtype {dtype} is none of {', '.join(DTYPES)}; choose one, or leave it out to keep the stored one"
        )
    try:
        limit = convert_file_size_to_int(shard_size)
    except ValueError:
        raise UsageError(f"--shard-size {shard_size} is no size; write it as 5GB or 500MB") from None
    given, out, new_dtype = Path(out), check_output_directory(out, overwrite), DTYPES.get(dtype or "")
    checkpoint = open_checkpoint(run, masters=masters, trust_pickles=trust_pickles)
    config_directory = _config_directory(checkpoint, config)
    check_output_directory(out, overwrite, checkpoint.path, *([config_directory] if config_directory else []))
    tensors = hf_tensors(checkpoint, config_directory, trust_remote_code)
    result = ExportResult(given, checkpoint.form, bitmask, bytes_before=checkpoint.nbytes)
    if shrink:
        if config_directory is None:
            raise UsageError(
                f"--shrink rewrites the model's config.json, and none is in {checkpoint.path}; give the model's"
                " directory or hub id: --config MODEL"
            )
        result.shrink_plan = shrink_plan(tensors, config_directory, new_dtype, multiple, trust_remote_code)
    with atomic_directory(out) as partial:
        files = _Files(partial, limit, bitmask)
        for name, tensor in _tensors(tensors, new_dtype, result):
            files.add(name, tensor)
        result.files = files.close()
        result.bytes_after = sum((partial / file).stat().st_size for file in result.files)
        if config_directory is not None:
            shrunk_config = result.shrink_plan.config if result.shrink_plan else None
            copy_model_files(config_directory, partial, checkpoint, new_dtype, shrunk_config)
        if verify:
            result.verification = verify_export(
                checkpoint,
                partial,
                config=config_directory,
                dtype=new_dtype,
                plan=result.shrink_plan,
                trust_remote_code=trust_remote_code,
            )
    return result


def _config_directory(checkpoint: Checkpoint, config: str | None) -> Path | None:
    """The directory of the model's config.json. A model on the hub is taken from the cache, or downloaded without its
    weights.
    """
    if config is None:
        return checkpoint.directory_of("config.json")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = directory_of(config, [*MODEL_FILES, CODE])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"--config {config} is no directory, and the hub did not give it ({str(error).splitlines()[0]}); name the"
            " directory or hub id of the model"
        ) from None
    if not (directory / "config.json").is_file():
        raise UsageError(f"--config {config} has no config.json; name the directory or hub id of the model")
    return directory


def _tensors(sources: list[HfTensor], dtype: torch.dtype | None, result: ExportResult) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write, in their new dtype, one at a time. Counts their zeros in `result`."""
    with tqdm(total=sum(source.nbytes for source in sources), desc="Exporting", unit="B", unit_scale=True) as bar:
        for source in sources:
            for saved_name, stored in source.read().items():
                result.bytes_dense += stored.numel() * in_dtype(stored.new_empty(0), dtype).itemsize
                plan = result.shrink_plan
                name = saved_name if plan is None else plan.new_name(saved_name)
                if name is None:
                    continue
                tensor = stored if plan is None else plan.cut(saved_name, stored)
                cast = in_dtype(tensor, dtype)
                _check_finite(name, tensor, cast)
                zeros = int(count_zeros(cast))
                result.underflows += zeros - int(count_zeros(tensor)) if cast is not tensor else 0
                result.counts[name] = ZeroCount(zeros, cast.numel())
                yield name, cast.contiguous()
            bar.update(source.nbytes)


def _check_finite(name: str, tensor: Tensor, cast: Tensor) -> None:
    def finite(values: Tensor) -> bool:
        # Without a tensor of bools as large as the values.
        return all(bool(end.isfinite()) for end in torch.aminmax(values))

    if not cast.is_floating_point() or not cast.numel() or finite(cast):
        return
    if finite(tensor):
        raise UsageError(
            f"{name} has a value of {float(tensor.abs().max()):g}, which {str(cast.dtype).removeprefix('torch.')}"
            " can't hold; export in bfloat16 or float32"
        )
    raise UsageError(f"{name} has values that are not finite: the training diverged; export an earlier checkpoint")


class _Files:
    """Fills one file after the other. The names that loaders look for, and the index, follow once the number of files
    is known.
    """

    def __init__(self, directory: Path, limit: int, bitmask: bool) -> None:
        self._directory, self._limit, self._bitmask = directory, limit, bitmask
        self._stem = "bitmask" if bitmask else "model"
        self._pending: dict[str, Tensor] = {}
        self._shapes: dict[str, list[int]] = {}
        self._names_by_file: list[list[str]] = []
        self._size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        packed = pack(tensor) if self._bitmask else None
        stored = {name: tensor} if packed is None else {f"{name}.bitmask": packed[0], f"{name}.values": packed[1]}
        size = sum(values.nbytes for values in stored.values())
        if self._pending and self._size + size > self._limit:
            self._flush()
        self._pending.update(stored)
        self._shapes[name] = list(tensor.shape)
        self._size += size

    def close(self) -> list[str]:
        """Writes the last file, and returns the names of all."""
        self._flush()
        count = len(self._names_by_file)
        files = [
            f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{self._stem}.safetensors"
            for i in range(count)
        ]
        for i, file in enumerate(files):
            self._unnamed(i).rename(self._directory / file)
        if count > 1 and not self._bitmask:
            weight_map = {name: file for file, names in zip(files, self._names_by_file) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._directory / f"{self._stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n"
            )
        return files

    def _flush(self) -> None:
        shapes = {METADATA_KEY: json.dumps(self._shapes)} if self._bitmask else {}
        save_file(self._pending, self._unnamed(len(self._names_by_file)), metadata={"format": "pt", **shapes})
        self._names_by_file.append(list(self._pending))
        self._total += self._size
        self._pending, self._shapes, self._size = {}, {}, 0

    def _unnamed(self, i: int) -> Path:
        return self._directory / f"{self._stem}-{i + 1:05d}.safetensors"


def copy_model_files(
    source: Path, out: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, shrunk_config: dict[str, Any] | None
) -> None:
    """Copies the files beside the weights, and writes config.json.

    Args:
        source: directory of the model's config.json.
        out: directory of the export.
        checkpoint: that was exported.
        dtype: what config.json says of the weights. None: what it says already; an engine's weights may be wider than
            those that the model had at first, so for them it is the widest dtype of the checkpoint.
        shrunk_config: config.json of the smaller model; None: nothing was removed.
    """
    config = shrunk_config or read_json(source / "config.json")
    patterns = [*MODEL_FILES, *([CODE] if "auto_map" in config else [])]
    # Reports describe the model as it was, and not a smaller one.
    if source == checkpoint.path and shrunk_config is None:
        patterns += [FILE, "report.html"]
    copy_files(source, out, patterns)
    if dtype is None and checkpoint.runtime_names:
        dtype = max(
            (entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point),
            key=lambda dtype: dtype.itemsize,
        )
    (out / "config.json").write_text(json.dumps(loadable_config(config, dtype), indent=2) + "\n")
