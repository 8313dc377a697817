"""What a model of any task says of inputs that are made from its configuration: tokens, images, sound."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lp_dist.errors import first_line

_ROWS, _TOKENS, _SAMPLES, _FRAMES = 3, 5, 4000, 64


@dataclass
class Outputs:
    """The outputs of a model.

    Args:
        values: {name: a floating-point output}. Empty where no inputs were accepted.
        inputs: what the model was given, in words.
        reason: why there are no outputs; "" where there are some.
        unread: paths of the modules and parameters that no output was computed from.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    reason: str = ""
    unread: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(value.numel() for value in self.values.values())


_WORDS = {
    "input_ids": "tokens",
    "decoder_input_ids": "tokens",
    "pixel_values": "an image",
    "pixel_values_videos": "a video",
    "input_values": "sound",
    "input_features": "sound",
}


def outputs_of(model: Any, mode: AbstractContextManager | None = None) -> Outputs:
    """The outputs of one small pass, the same for each model of the same configuration.

    Inputs of the usual names and forms are tried until the model accepts them. Where its outputs need no image, but it
    can read some, the features that it makes of an image are outputs too.

    Args:
        model: of transformers. It is in evaluation mode afterwards, and its parameters are trainable and have new
            storage.
        mode: to compute them in; None: without one. The parameters then keep their storage.
    """
    for param in model.parameters():
        if mode is None:
            # How a product is added up depends on the alignment of its factors: they must not lie where a file has
            # them.
            param.data = param.data.clone()
        # What is frozen is not in autograd's record.
        param.requires_grad_(param.is_floating_point())
    model.eval()
    with mode or nullcontext():
        result = _all_outputs(model)
    if result.values:
        read = _read_parameters(result.values.values())
        result.unread = list(_without(model, read))
        result.values = {name: value.detach() for name, value in result.values.items()}
    return result


def _all_outputs(model: Any) -> Outputs:
    result = _first_pass(model, model, _inputs(model))
    features = getattr(model, "get_image_features", None)
    if result.values and features is not None and not any(word in result.inputs for word in ("an image", "a video")):
        images = _first_pass(model, features, ({**image} for image in _images(model)))
        result.values |= {f"image_features.{name}": value for name, value in images.values.items()}
        result.inputs += images.inputs
    return result


def _first_pass(model: Any, forward: Any, candidates: Iterable[dict[str, Tensor]]) -> Outputs:
    reason = f"no inputs are known for {type(model).__name__}, which reads {model.main_input_name}"
    for i, inputs in enumerate(candidates):
        try:
            # Some models draw random numbers in evaluation too.
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                values = dict(_values(forward(**inputs)))
        except Exception as error:  # whatever a model raises that lacks an input, or has one of another form
            if i == 0:
                reason = (
                    f"{type(model).__name__} did not take {', '.join(inputs)} ({type(error).__name__}:"
                    f" {first_line(error)})"
                )
            continue
        if values:
            return Outputs(values, list(dict.fromkeys(_WORDS[name] for name in inputs if name in _WORDS)))
    return Outputs(reason=reason)


def _values(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of an output, under the names that the model has for them."""
    if isinstance(output, Tensor):
        output = {"output": output}
    elif not isinstance(output, dict):
        output = dict(enumerate(output))
    for name, value in output.items():
        tensors = value if isinstance(value, (list, tuple)) else [value]
        # The features of several images are a list.
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield (str(name) if tensor is value else f"{name}.{i}"), tensor


def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs that the model may accept, the likeliest ones first."""
    accepted = set(inspect.signature(model.forward).parameters)
    ids = _tokens(model.config)
    by_decoder = model.config.is_encoder_decoder and "decoder_input_ids" in accepted
    # Classifiers without a token to pad by take one text at a time, and models of sound a row for each codebook.
    codebooks = _number(model.config, "num_codebooks") or 1
    texts = [
        {
            "input_ids": rows,
            **({"decoder_input_ids": rows} if by_decoder else {}),
            **({"bbox": torch.zeros(*rows.shape, 4, dtype=torch.long)} if "bbox" in accepted else {}),
        }
        for rows in (ids, ids[:1], *([ids[:1].repeat(codebooks, 1)] if codebooks > 1 else []))
    ]
    decoder = {"decoder_input_ids": ids[:1]} if by_decoder else {}
    if model.main_input_name == "input_ids":
        yield from texts
    for kind, shaped in (("pixel_values", _images), ("input_values", _sounds), ("input_features", _features)):
        if kind not in accepted:
            continue
        for inputs in shaped(model):
            if inputs.keys() <= accepted:
                yield {**inputs, **decoder}
                if "input_ids" in accepted:
                    yield {**texts[1], **inputs}


def _tokens(config: Any) -> Tensor:
    """Rows of different tokens, none of them special but the last, with which a text may have to end."""
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 2
    context = getattr(text, "max_position_embeddings", None) or _TOKENS
    ends = getattr(text, "eos_token_id", None)
    special = {
        value
        for settings in _settings(config)
        for name, value in vars(settings).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    plain = [token for token in range(min(vocabulary, 100)) if token not in special] or [0]
    length = min(_TOKENS, max(1, context - 1))
    ids = torch.tensor([plain[(3 + 7 * i) % len(plain)] for i in range(_ROWS * length)]).view(_ROWS, length)
    end = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _images(model: Any) -> Iterator[dict[str, Tensor]]:
    for settings in _settings(model.config):
        channels = _number(settings, "num_channels", "in_channels", "in_chans") or 3
        side = getattr(settings, "image_size", None)
        patch = _number(settings, "patch_size")
        merge = _number(settings, "spatial_merge_size")
        if patch and merge:
            # One image as a list of patches, such as Qwen's: two by two merged ones.
            rows = 2 * merge
            size = channels * (_number(settings, "temporal_patch_size") or 1) * patch * patch
            grid = torch.tensor([[1, rows, rows]])
            yield {"pixel_values": _waves(model, rows * rows, size), "image_grid_thw": grid}
        for size in (side, 64, 224):
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            if not isinstance(height, int) or not isinstance(width, int) or (size != side and side is not None):
                continue
            frames = _number(settings, "num_frames")
            for leading in ((1, frames), (1,)) if frames else ((1,), (1, 1)):
                yield {"pixel_values": _waves(model, *leading, channels, height, width)}


def _sounds(model: Any) -> Iterator[dict[str, Tensor]]:
    bands, length = _number(model.config, "num_mel_bins"), _number(model.config, "max_length")
    if bands and length:
        yield {"input_values": _waves(model, 1, length, bands)}
    yield {"input_values": _waves(model, 1, _SAMPLES)}
    yield {"input_values": _waves(model, 1, 1, _SAMPLES)}


def _features(model: Any) -> Iterator[dict[str, Tensor]]:
    for settings in _settings(model.config):
        bands, positions = _number(settings, "num_mel_bins"), _number(settings, "max_source_positions")
        if bands and positions:
            yield {"input_features": _waves(model, 1, bands, 2 * positions)}
        for size in (
            _number(settings, "feature_projection_input_dim"),
            _number(settings, "input_feat_per_channel"),
            bands,
        ):
            if size:
                yield {"input_features": _waves(model, 1, _FRAMES, size)}


def _settings(config: Any) -> list[Any]:
    """A configuration, and those of the models that it is made of."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(settings for settings in inner if settings is not None)]


def _number(settings: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(settings, name, None), int)), None)


def _waves(model: Any, *shape: int) -> Tensor:
    """Values between -1 and 1 of no short period, in the dtype of the model."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7).view(shape).to(model.dtype)


def _read_parameters(values: Iterable[Tensor]) -> set[int]:
    """The ids of the parameters that values were computed from, by autograd's record of it."""
    nodes = [value.grad_fn for value in values]
    seen, params = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            params.add(id(node.variable))
        following = {parent for parent, _ in node.next_functions} - seen
        seen |= following
        nodes += following
    return params


def _without(module: nn.Module, read: set[int], path: str = "") -> Iterator[str]:
    """The largest modules of which no parameter was read, and single parameters besides."""
    params = [id(param) for param in module.parameters()]
    if params and not read & set(params):
        yield path or type(module).__name__
        return
    for name, param in module.named_parameters(recurse=False):
        if id(param) not in read:
            yield f"{path}.{name}".lstrip(".")
    for name, child in module.named_children():
        yield from _without(child, read, f"{path}.{name}".lstrip("."))
