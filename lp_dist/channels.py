"""Feed-forward channels and attention heads that can't have an effect any more, whatever the input is: found from dead rows and columns.

Known by the names that most decoders and encoders give their parts. What is named otherwise is left out, and not guessed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# The matrix whose inputs the channels or heads are, and whose outputs they are: where two are multiplied, or the values. GPT-2's c_proj is both.
_FEED_FORWARD = {"down_proj": ("up_proj", "gate_proj"), "dense_4h_to_h": (), "fc2": (), "w2": ("w1", "w3"), "wo": ("wi_0", "wi_1"), "c_proj": ()}
_ATTENTION = {"o_proj": "v_proj", "out_proj": "v_proj", "o": "v", "c_proj": None}


def dead_channels(rows: dict[str, Tensor], columns: dict[str, Tensor]) -> dict[str, list[int]]:
    """`{module: [dead, all]}`: a channel is dead if its column of the last matrix is zero, or its row in one of the two that a gated layer multiplies.

    (The row of a plain layer may be zero and its activation not: gelu(bias).)
    Args: rows, columns: by parameter, which are all zero.
    """
    found = {}
    for name, column in columns.items():
        module, kind = _parts(name)
        if kind not in _FEED_FORWARD or kind == "c_proj" and "mlp" not in module:
            continue
        dead = column
        for other in _FEED_FORWARD[kind]:
            weight, bias = rows.get(f"{module}.{other}.weight"), rows.get(f"{module}.{other}.bias")
            if weight is not None and weight.shape == dead.shape:
                dead = dead | (weight if bias is None else weight & bias)
        found[module] = [int(dead.sum()), len(dead)]
    return found


def dead_heads(rows: dict[str, Tensor], columns: dict[str, Tensor], config: Any) -> dict[str, list[int]]:
    """`{module: [dead, all]}`: a head is dead if all its columns of the output matrix are zero, or all rows of the values that it reads.

    Args: config: of the model, for the number of heads; None: no heads are known.
    """
    config = getattr(config, "get_text_config", lambda: config)()
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    found = {}
    for name, column in columns.items():
        module, kind = _parts(name)
        if not isinstance(heads, int) or kind not in _ATTENTION or kind == "c_proj" and "attn" not in module or len(column) % heads:
            continue
        dead = column.view(heads, -1).all(dim=1)
        values, bias = (rows.get(f"{module}.{_ATTENTION[kind]}.{part}") for part in ("weight", "bias"))
        if values is not None and len(values) % groups == 0 and heads % groups == 0:
            silent = (values if bias is None else values & bias).view(groups, -1).all(dim=1)
            dead = dead | silent.repeat_interleave(heads // groups)
        found[module] = [int(dead.sum()), heads]
    return found


def _parts(name: str) -> tuple[str, str]:
    """Module and kind of a weight: `model.layers.0.mlp.down_proj.weight` → `model.layers.0.mlp`, `down_proj`."""
    parts = name.removesuffix(".weight").rsplit(".", 1)
    return (parts[0], parts[1]) if len(parts) == 2 and name.endswith(".weight") else ("", "")
