"""`lp-dist export --verify`: the export is read back and held against the checkpoint it came from, weight by weight
and by what it predicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lp_dist.checkpoints.hf_names import bits, in_dtype, model_class, of_model, published
from lp_dist.checkpoints.opening import Checkpoint, open_checkpoint
from lp_dist.errors import DiffersError
from lp_dist.export.shrink import Shrunk


def verify(
    source: Checkpoint,
    out: Path,
    *,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    shrunk: Shrunk | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compares the weights bit for bit, the zeros, and the logits of the two models on a few tokens.

    The whole model is loaded, once at a time. The compact form has no `from_pretrained`, and only its weights are
    compared.

    Args:
        config: directory of the source's config.json. dtype: to which the export cast the floating-point weights.
        shrunk: what was left out. What stays is compared, and that nothing is read of the rest; logits are computed in
            float32 from the weights of that dtype, and may differ by rounding, since sums of fewer terms are added up
            in another order.
    Returns:
        {"tensors": number of them, "zeros": of the export, "logits": how many were compared, None where the model does
        not read tokens alone}, of a shrunk model {"difference": the largest one of logits, "rounding": and how large
        rounding may make it} as well
    Raises:
        DiffersError: they differ; the message says where.
    """
    again = open_checkpoint(out)
    zeros = _compare_tensors(source, again, config, dtype, shrunk, trust_remote_code)
    seen = {"tensors": len(again.entries), "zeros": zeros, "logits": None}
    if again.form == "compact form" or config is None:
        return seen
    cls, _ = model_class(out, trust_remote_code)
    loaded = next(entry.dtype for entry in again.entries.values() if entry.dtype.is_floating_point)
    computed = loaded if shrunk is None else torch.float32
    model, loading = cls.from_pretrained(
        out,
        dtype=computed,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=trust_remote_code,
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[key]:
            raise DiffersError(
                f"from_pretrained of {out} has {len(loading[key])} {key.replace('_', ' ')}, such as"
                f" {min(map(str, loading[key]))}"
            )
    exported = _logits(model)
    if exported is None:
        return seen
    cls, (_, settings) = type(model), model_class(config, trust_remote_code)
    if source.live:
        model = model if shrunk is None else cls._from_config(settings, dtype=computed)
        _fill(model, source, loaded)
    else:
        del model
        state = {name: in_dtype(entry.read(), loaded) for name, entry in source.entries.items()}
        model = cls.from_pretrained(None, config=settings, state_dict=state, dtype=computed)
    original = _logits(model)
    if original is not None and shrunk is not None:
        return {**seen, "logits": exported.numel(), **_alike(exported, original, shrunk, out, source)}
    if original is None or not torch.equal(bits(exported), bits(original)):
        raise DiffersError(f"the logits of {out} are not those of {source.path}")
    return {**seen, "logits": exported.numel()}


def _alike(exported: Tensor, original: Tensor, shrunk: Shrunk, out: Path, source: Checkpoint) -> dict[str, float]:
    """How far the logits are apart, and how far they may be. A sum of K terms is rounded by about √K·ε of its size, in
    either order in another way; the n tensors that were cut add n such errors, which go with √n; and 8 leaves room for
    what the rest of the model makes of them.
    """
    rounding = (
        8
        * torch.finfo(original.dtype).eps
        * math.sqrt(max(shrunk.sums) * len(shrunk.sums))
        * float(original.abs().max())
    )
    difference = float((exported - original).abs().max())
    if not difference <= rounding:
        raise DiffersError(
            f"the logits of {out} are up to {difference:.2g} away from those of {source.path}, and rounding explains"
            f" {rounding:.2g}"
        )
    return {"difference": difference, "rounding": rounding}


def _compare_tensors(
    source: Checkpoint,
    again: Checkpoint,
    config: Path | None,
    dtype: torch.dtype | None,
    shrunk: Shrunk | None,
    trust_remote_code: bool,
) -> int:
    left, zeros = dict(again.entries), 0
    for name, wanted in _wanted(source, config, trust_remote_code):
        entry = left.pop(name, None)
        if entry is None:
            raise DiffersError(f"{again.path} has no {name}")
        found, cast = entry.read(), in_dtype(wanted, dtype)
        if shrunk is not None:
            if not shrunk.takes_only_zeros(name, cast):
                raise DiffersError(
                    f"{name} in {source.path} has other weights than zeros in what was left out of {again.path}"
                )
            cast = shrunk.cut(name, cast)
        if (found.dtype, found.shape) != (cast.dtype, cast.shape) or not torch.equal(bits(cast), bits(found)):
            raise DiffersError(f"{name} in {again.path} is not what {source.path} has")
        zeros += int((found == 0).sum())
    if left:
        raise DiffersError(f"{again.path} has {min(left)}, which {source.path} has not")
    return zeros


def _wanted(source: Checkpoint, config: Path | None, trust_remote_code: bool) -> Iterator[tuple[str, Tensor]]:
    for piece in tqdm(published(source, config, trust_remote_code), desc="Comparing"):
        yield from piece.read().items()


def _fill(model: nn.Module, source: Checkpoint, dtype: torch.dtype) -> None:
    """Puts the source's tensors into the model under their own names: a way that knows nothing of published ones."""
    state = model.state_dict()
    for name, entry in of_model(source, model).items():
        tensor = entry.read()
        state[name].copy_(tensor.to(dtype) if tensor.is_floating_point() else tensor)


@torch.no_grad()
def _logits(model: Any) -> Tensor | None:
    """What it says of a few tokens (the hidden states, where it has no head); None if it wants other things to say
    something of.
    """
    if model.main_input_name != "input_ids":
        return None
    for param in (
        model.parameters()
    ):  # not where a file has them: how a product is added up depends on how its factors are aligned
        param.data = param.data.clone()
    try:
        said = model.eval()(**model.dummy_inputs)
    except (TypeError, ValueError, AttributeError):  # whichever a model happens to raise for want of an image
        return None
    return said["logits"] if "logits" in said else said[0]
