"""Which region of a parameter DeepSpeed's tensor and expert parallelism leave on a rank, read from what DeepSpeed
writes on the parameter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed_slices import in_parameter, is_linear, model_region
from lp_dist.sharding.shards import full_shape


class Layer:
    """As DeepSpeed's layers of tensor parallelism: parameters have its `gather_params`."""

    def __init__(self, tp_index: int) -> None:
        self.tp_index, self.name = tp_index, "layers.0.up"

    def gather_params(self) -> None:
        raise NotImplementedError


def divided(shape: list[int], full_shape_of: list[int], index: int = 1, **meta: Any) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(shape))
    param.ds_autotp_universal_checkpoint_meta = {"original_shape": tuple(full_shape_of), "conversion": {}, **meta}
    param.gather_params = Layer(index).gather_params
    return param


def test_rows_columns_and_fused_matrices():
    rows = divided([6, 8], [13, 8], partition_dim=0, partition_sizes=(7, 6))
    assert in_parameter(rows, 5) == (7 * 8 + 5, None) and full_shape(rows) == torch.Size([13, 8])
    columns = divided([3, 4], [3, 8], partition_dim=1, partition_sizes=(4, 4))
    start, region = in_parameter(columns, 5)
    assert start == 5 and region.runs == ((range(3),), (range(4, 8),)) and full_shape(columns) == torch.Size([3, 8])
    fused = divided([8, 2], [16, 2], partition_dim=0, sub_param_shard_widths=[[4, 4], [2, 2], [2, 2]])
    assert model_region(fused).runs[0] == (range(4, 8), range(10, 12), range(14, 16))


def test_what_every_rank_has_or_is_gathered_has_no_region():
    replicated = divided([3], [3], replicated=True)
    gathered = divided([13, 8], [13, 8], partition_dim=0, partition_sizes=(7, 6))
    for param in (replicated, gathered, nn.Parameter(torch.zeros(3))):
        assert model_region(param) is None and in_parameter(param, 2) == (2, None)


def test_under_zero3_the_slice_is_the_shape_that_it_partitioned():
    param = divided([0], [13, 8], partition_dim=0, partition_sizes=(7, 6))
    param.ds_shape = torch.Size([6, 8])
    assert in_parameter(param, 0) == (56, None) and full_shape(param) == torch.Size([13, 8])


def test_experts_of_autoep_are_those_that_it_says():
    param = nn.Parameter(torch.zeros(2, 3, 4))
    param.ds_autoep_uc_meta = {"logical_shape": [6, 3, 4], "local_experts": [2, 3], "ep_rank": 1}
    assert in_parameter(param, 1) == (2 * 12 + 1, None) and full_shape(param) == torch.Size([6, 3, 4])
    param.ds_autoep_uc_meta["local_experts"] = [1, 4]
    assert model_region(param).runs[0] == (range(1, 2), range(4, 5))


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (divided([4, 8], [13, 8], partition_dim=0, partition_sizes=(7, 6)), "says that a rank has .* of a parameter"),
        (
            divided([6, 8], [13, 8], partition_dim=0, conversion={"unsupported_reason": "rows are interleaved"}),
            r"layers.0.up \(Layer\) a rank has \(rows are interleaved\); name other layers",
        ),
        (divided([6, 8], [13, 8], partition_dim=0), r"does not say which part of layers.0.up \(Layer\)"),
        (divided([6, 8], [13, 8], partition_dim=0, partition_sizes=(7, 7)), "does not say which part"),
    ],
)
def test_what_deepspeed_does_not_say_is_refused(param, message):
    with pytest.raises(UsageError, match=message):
        model_region(param)


def test_a_replaced_layer_without_a_word_is_refused():
    param = nn.Parameter(torch.zeros(3, 4))
    param.ds_is_replaced_module = True
    with pytest.raises(UsageError, match=r"which part of a parameter of shape \(3, 4\) a rank has"):
        model_region(param)


def test_linear_layers_and_what_takes_their_place():
    base = type("TensorParallel_Layer", (nn.Module,), {})
    replaced, embedding = type("LinearLayer", (base,), {})(), type("VocabParallelEmbedding", (base,), {})()
    assert is_linear(nn.Linear(2, 3)) and is_linear(replaced)
    assert not is_linear(embedding) and not is_linear(nn.Embedding(2, 3)) and not is_linear(SimpleNamespace())
