"""`lp-dist export --verify`: reads an export back and compares its weights and logits with those of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from lp_dist.checkpoints.bitmask import FORM as BITMASK_FORM
from lp_dist.checkpoints.hf_names import as_bytes, hf_tensors, in_dtype, model_class, model_entries
from lp_dist.checkpoints.opening import Checkpoint, open_checkpoint
from lp_dist.errors import DiffersError
from lp_dist.export.shrink import RemovedExperts, ShrinkPlan


def verify_export(
    source: Checkpoint,
    out: Path,
    *,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    plan: ShrinkPlan | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compares the weights bit for bit, the zeros, and the logits of the two models on a few tokens.

    The full model is loaded, one at a time. The bitmask form has no `from_pretrained`, so only its weights are
    compared.

    Args:
        source: the checkpoint.
        out: directory of the export.
        config: directory of the source's config.json.
        dtype: to which the export cast the floating-point weights.
        plan: what was removed. What stays is compared, and that nothing reads the rest. Logits are then computed in
            float32, and may differ by rounding, since sums of fewer terms are added up in another order.
        trust_remote_code: run code that comes with the model.
    Returns:
        {"tensors": number of tensors, "zeros": of the export, "logits": how many were compared}. "logits" is None
        where the model does not read tokens alone. Of a smaller model also {"difference": the largest difference of
        logits, "rounding": how large rounding may make it}. Where experts were removed, these two are between the
        export and the checkpoint's model without them, in which the router can't choose them: "without_experts" is
        how far the export is from the checkpoint's model as it is. "difference" is None where that could not be done.
    Raises:
        DiffersError: they differ; the message says where.
    """
    exported = open_checkpoint(out)
    zeros = _compare_tensors(source, exported, config, dtype, plan, trust_remote_code)
    result = {"tensors": len(exported.entries), "zeros": zeros, "logits": None}
    if exported.form == BITMASK_FORM or config is None:
        return result
    cls, _ = model_class(out, trust_remote_code)
    stored_dtype = next(entry.dtype for entry in exported.entries.values() if entry.dtype.is_floating_point)
    compute_dtype = stored_dtype if plan is None else torch.float32
    model, loading = cls.from_pretrained(
        out,
        dtype=compute_dtype,
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
    exported_logits = _logits(model)
    if exported_logits is None:
        return result
    cls, (_, settings) = type(model), model_class(config, trust_remote_code)
    if source.runtime_names:
        model = model if plan is None else cls._from_config(settings, dtype=compute_dtype)
        _fill(model, source, stored_dtype)
    else:
        del model
        state = {name: in_dtype(entry.read(), stored_dtype) for name, entry in source.entries.items()}
        model = cls.from_pretrained(None, config=settings, state_dict=state, dtype=compute_dtype)
    original_logits = _logits(model)
    result["logits"] = exported_logits.numel()
    if original_logits is not None and plan is not None and plan.experts:
        result["without_experts"] = float((exported_logits - original_logits).abs().max())
        original_logits = _logits_without_experts(model, plan)
        if original_logits is None:
            return {**result, "difference": None, "rounding": None}
    if original_logits is not None and plan is not None:
        return {**result, **_compare_logits(exported_logits, original_logits, plan, out, source)}
    if original_logits is None or not torch.equal(as_bytes(exported_logits), as_bytes(original_logits)):
        raise DiffersError(f"the logits of {out} are not those of {source.path}")
    return result


def _compare_logits(
    exported: Tensor, original: Tensor, plan: ShrinkPlan, out: Path, source: Checkpoint
) -> dict[str, float]:
    """How far the logits are apart, and how far rounding may bring them apart.

    A sum of K terms has a rounding error of about √K·ε of its size, another one in each order. The n tensors that were
    cut add n such errors, which grow with √n. The factor 8 allows for what the rest of the model makes of them.
    """
    # Of experts that are removed whole, the sums over the chosen ones are taken in another order.
    sums = [*plan.sums, *(len(removed.kept) for removed in plan.experts)]
    rounding = 8 * torch.finfo(original.dtype).eps * math.sqrt(max(sums) * len(sums)) * float(original.abs().max())
    difference = float((exported - original).abs().max())
    if not difference <= rounding:
        raise DiffersError(
            f"the logits of {out} are up to {difference:.2g} away from those of {source.path}, and rounding explains"
            f" {rounding:.2g}"
        )
    return {"difference": difference, "rounding": rounding}


class _RoutersWithout(TorchFunctionMode):
    """Sets the logits of removed experts to -inf, wherever a router's matrix is multiplied.

    Args:
        model: whose routers these are.
        experts: what is removed.
    """

    def __init__(self, model: nn.Module, experts: tuple[RemovedExperts, ...]) -> None:
        super().__init__()
        params = dict(model.named_parameters())
        self._kept = {params[removed.router].data_ptr(): removed.kept for removed in experts}
        self.met: set[int] = set()

    @property
    def met_all(self) -> bool:
        """Whether every router was met."""
        return self.met == self._kept.keys()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        weight = args[1].data_ptr() if func is F.linear and len(args) > 1 else None
        if weight in self._kept:
            self.met.add(weight)
            output = output.masked_fill(~self._kept[weight].to(output.device), -math.inf)
        return output


def _logits_without_experts(model: nn.Module, plan: ShrinkPlan) -> Tensor | None:
    """The logits of the checkpoint's model where its routers can't choose what is removed; None where a router is
    computed in another way than by torch's linear.
    """
    state = model.state_dict()
    for removed in plan.experts:
        numbers = removed.kept.nonzero().flatten()
        for name in removed.biases:
            if state[name].is_floating_point():
                state[name][~removed.kept] = -math.inf
        for name, saved_name in removed.tables.items():
            state[name].copy_(numbers[plan.cut(saved_name, state[name]).long()])
    mode = _RoutersWithout(model, plan.experts)
    logits = _logits(model, mode)
    return logits if mode.met_all else None


def _compare_tensors(
    source: Checkpoint,
    exported: Checkpoint,
    config: Path | None,
    dtype: torch.dtype | None,
    plan: ShrinkPlan | None,
    trust_remote_code: bool,
) -> int:
    remaining, zeros = dict(exported.entries), 0
    for name, tensor in _expected(source, config, trust_remote_code):
        expected = in_dtype(tensor, dtype)
        if plan is not None:
            if not plan.takes_only_zeros(name, expected):
                raise DiffersError(
                    f"{name} in {source.path} has other weights than zeros in what was removed from {exported.path}"
                )
            saved_name, name = name, plan.new_name(name)
            if name is None:
                continue
            expected = plan.cut(saved_name, expected)
        entry = remaining.pop(name, None)
        if entry is None:
            raise DiffersError(f"{exported.path} has no {name}")
        actual = entry.read()
        if (actual.dtype, actual.shape) != (expected.dtype, expected.shape) or not torch.equal(
            as_bytes(expected), as_bytes(actual)
        ):
            raise DiffersError(f"{name} in {exported.path} is not what {source.path} has")
        zeros += int((actual == 0).sum())
    if remaining:
        raise DiffersError(f"{exported.path} has {min(remaining)}, which {source.path} has not")
    return zeros


def _expected(source: Checkpoint, config: Path | None, trust_remote_code: bool) -> Iterator[tuple[str, Tensor]]:
    for hf_tensor in tqdm(hf_tensors(source, config, trust_remote_code), desc="Comparing"):
        yield from hf_tensor.read().items()


def _fill(model: nn.Module, source: Checkpoint, dtype: torch.dtype) -> None:
    """Copies the source's tensors into the model by their names in memory, since the conversion to Hugging Face names
    is what is checked.
    """
    state = model.state_dict()
    for name, entry in model_entries(source, model).items():
        tensor = entry.read()
        state[name].copy_(tensor.to(dtype) if tensor.is_floating_point() else tensor)


@torch.no_grad()
def _logits(model: Any, mode: TorchFunctionMode | None = None) -> Tensor | None:
    """The logits of a few tokens, or the hidden states of a model without a head; None if it needs other inputs.

    Args:
        model: on the CPU.
        mode: to compute them in.
    """
    if model.main_input_name != "input_ids":
        return None
    # How a product is added up depends on the alignment of its factors, so weights must not lie where a file has them.
    for param in model.parameters() if mode is None else ():
        param.data = param.data.clone()
    try:
        with mode or nullcontext():
            output = model.eval()(**model.dummy_inputs)
    except (TypeError, ValueError, AttributeError):  # what models raise that lack an image
        return None
    return output["logits"] if "logits" in output else output[0]
