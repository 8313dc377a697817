"""`lp-dist export --verify`: reads an export back and compares weights and outputs with those of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from lp_dist.export.outputs import outputs_of
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
    """Compares the weights bit for bit, the zeros, and the outputs of the two models for a few inputs of their kind.

    The full model is loaded, one at a time. The bitmask form has no `from_pretrained`, so only its weights are
    compared.

    Args:
        source: the checkpoint.
        out: directory of the export.
        config: directory of the source's config.json.
        dtype: to which the export cast the floating-point weights.
        plan: what was removed. What stays is compared, and that nothing reads the rest. Outputs are then computed in
            float32, and may differ by rounding, since sums of fewer terms are added up in another order.
        trust_remote_code: run code that comes with the model.
    Returns:
        {"tensors": number of tensors, "zeros": of the export, "logits": how many values of outputs were compared,
        "outputs": their names, "inputs": what the models were given, in words, "unread": paths of the modules and
        parameters that no output was computed from}. "logits" is None where no outputs were compared, and "reason"
        says why. Of a smaller model also {"difference": the largest difference of outputs, "rounding": how large
        rounding may make it}. Where experts were removed, these two are between the export and the checkpoint's model
        without them, in which the router can't choose them: "without_experts" is how far the export is from the
        checkpoint's model as it is. "difference" is None where that could not be done.
    Raises:
        DiffersError: they differ; the message says where.
    """
    exported = open_checkpoint(out)
    zeros = _compare_tensors(source, exported, config, dtype, plan, trust_remote_code)
    result: dict[str, Any] = {"tensors": len(exported.entries), "zeros": zeros}
    result |= {"logits": None, "outputs": [], "inputs": [], "unread": [], "reason": ""}
    if exported.form == BITMASK_FORM or config is None:
        reason = "the bitmask form has no from_pretrained" if config is not None else "there is no config.json"
        return {**result, "reason": reason}
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
    exported_outputs = outputs_of(model)
    if not exported_outputs.values:
        return {**result, "reason": exported_outputs.reason}
    cls, (_, settings) = type(model), model_class(config, trust_remote_code)
    if source.runtime_names:
        model = model if plan is None else cls._from_config(settings, dtype=compute_dtype)
        _fill(model, source, stored_dtype)
    else:
        del model
        state = {name: in_dtype(entry.read(), stored_dtype) for name, entry in source.entries.items()}
        model = cls.from_pretrained(None, config=settings, state_dict=state, dtype=compute_dtype)
    actual, original = exported_outputs.values, outputs_of(model).values
    if original.keys() != actual.keys():
        raise DiffersError(
            f"{out} has the outputs {', '.join(actual)}, and {source.path} {', '.join(original) or 'none'}"
        )
    if plan is not None and plan.experts:
        # What routers say of their experts has another shape without some.
        actual = {name: value for name, value in actual.items() if value.shape == original[name].shape}
    result |= {
        "logits": sum(value.numel() for value in actual.values()),
        "outputs": list(actual),
        "inputs": exported_outputs.inputs,
        "unread": exported_outputs.unread,
    }
    if plan is not None and plan.experts:
        result["without_experts"] = max(float((actual[name] - original[name]).abs().max()) for name in actual)
        original = _outputs_without_experts(model, plan)
        if not original:
            return {**result, "difference": None, "rounding": None}
    rounded = []
    for name, value in actual.items():
        if value.shape != original[name].shape:
            raise DiffersError(
                f"the {name} of {out} have the shape {list(value.shape)}, and those of {source.path}"
                f" {list(original[name].shape)}"
            )
        if plan is not None:
            rounded.append(_compare_rounded(name, value, original[name], plan, out, source))
        elif not torch.equal(as_bytes(value), as_bytes(original[name])):
            raise DiffersError(f"the {name} of {out} are not those of {source.path}")
    return {**result, **max(rounded, key=lambda values: values["difference"], default={})}


def _compare_rounded(
    name: str, exported: Tensor, original: Tensor, plan: ShrinkPlan, out: Path, source: Checkpoint
) -> dict[str, float]:
    """How far the values of an output are apart, and how far rounding may bring them apart.

    A sum of K terms has a rounding error of about √K·ε of its size, another one in each order. The n tensors that were
    cut add n such errors, which grow with √n. The factor 8 allows for what the rest of the model makes of them.
    """
    # Of experts that are removed whole, the sums over the chosen ones are taken in another order.
    sums = [*plan.sums, *(len(removed.kept) for removed in plan.experts)]
    rounding = 8 * torch.finfo(original.dtype).eps * math.sqrt(max(sums) * len(sums)) * float(original.abs().max())
    difference = float((exported - original).abs().max())
    if not difference <= rounding:
        raise DiffersError(
            f"the {name} of {out} are up to {difference:.2g} away from those of {source.path}, and rounding explains"
            f" {rounding:.2g}"
        )
    return {"difference": difference, "rounding": rounding}


class RoutersWithout(TorchFunctionMode):
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


def _outputs_without_experts(model: nn.Module, plan: ShrinkPlan) -> dict[str, Tensor]:
    """The outputs of the checkpoint's model where its routers can't choose what is removed; none where a router is
    computed in another way than by torch's linear.

    Args:
        model: of which `outputs_of` was taken.
        plan: what is removed.
    """
    state = model.state_dict()
    for removed in plan.experts:
        numbers = removed.kept.nonzero().flatten()
        for name in removed.biases:
            if state[name].is_floating_point():
                state[name][~removed.kept] = -math.inf
        for name, saved_name in removed.tables.items():
            state[name].copy_(numbers[plan.cut(saved_name, state[name]).long()])
    mode = RoutersWithout(model, plan.experts)
    values = outputs_of(model, mode).values
    return values if mode.met_all else {}


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
