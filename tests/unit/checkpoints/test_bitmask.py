"""The bitmask form: bitmask and values give back every tensor and every file bit for bit, and are as small as the
zeros allow.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.export_runs import llama
from helpers.snapshots import as_bytes
from lp_dist.checkpoints.bitmask import METADATA_KEY, pack, unpack
from lp_dist.checkpoints.opening import open_checkpoint
from lp_dist.errors import UsageError
from lp_dist.export.writer import export

BITS = {
    torch.float32: np.uint32,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
    torch.int8: np.uint8,
    torch.bool: np.uint8,
}


@st.composite
def tensors(draw) -> Tensor:
    """Of any bits at all, which includes -0, nan, infinities and subnormals, and many zeros; any shape, with and
    without elements.
    """
    dtype = draw(st.sampled_from(list(BITS)))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    values = (
        st.integers(0, 1)
        if dtype == torch.bool
        else st.one_of(*[st.just(0)] * 3, st.integers(0, np.iinfo(BITS[dtype]).max))
    )
    return torch.from_numpy(draw(arrays.arrays(BITS[dtype], shape, elements=values, fill=st.just(0)))).view(dtype)


@given(tensors())
def test_unpack_gives_back_what_pack_took_apart_and_it_is_smaller_or_not_done(tensor):
    nonzero = int(np.count_nonzero(bits_of(tensor)))
    size = math.ceil(tensor.numel() / 8) + nonzero * tensor.dtype.itemsize
    packed = pack(tensor)
    assert (packed is None) == (size >= tensor.nbytes)
    if packed is not None:
        assert (
            sum(array.nbytes for array in packed) == size
            and packed[1].dtype == tensor.dtype
            and len(packed[1]) == nonzero
        )
        again = unpack(*packed, tuple(tensor.shape))
        assert (
            again.dtype == tensor.dtype
            and again.shape == tensor.shape
            and np.array_equal(bits_of(again), bits_of(tensor))
        )


def bits_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(getattr(torch, BITS[tensor.dtype].__name__)).numpy()


def test_values_that_are_easily_lost():
    tensor = torch.tensor(
        [[0.0, -0.0, float("nan"), float("inf")], [1e-40, 0.0, -float("inf"), 0.0]] + [[0.0] * 4] * 9
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = tensor.to(dtype).t()  # not contiguous
        packed = pack(cast)
        assert packed is not None and len(packed[1]) == (
            4 if dtype == torch.float16 else 5
        )  # 1e-40 is too small for float16
        assert as_bytes(unpack(*packed, tuple(cast.shape))) == as_bytes(cast.contiguous())
    bitmask, _ = pack(torch.tensor([5.0] + [0.0] * 8 + [6.0] + [0.0] * 6))
    assert bitmask.tolist() == [0b10000000, 0b01000000], "the first is in the highest bit"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory as an export writes it, of which half of the weights are zero but those of its norms and of one
    matrix.
    """
    source, out = tmp_path_factory.mktemp("bitmask") / "source", tmp_path_factory.mktemp("bitmask") / "model"
    network = llama()
    for name, param in network.named_parameters():
        if "norm" not in name and "o_proj" not in name:
            param.data[param.data.abs() < param.data.abs().median()] = 0.0
    network.save_pretrained(source)
    export(source, out)
    return out


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("size", ["5GB", "4KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_every_file_is_the_same(model, size, dtype, tmp_path):
    first = export(model, tmp_path / "first", dtype=dtype, shard_size=size)
    packed = export(tmp_path / "first", tmp_path / "packed", bitmask=True, shard_size=size)
    again = export(tmp_path / "packed", tmp_path / "again", shard_size=size, verify=True)
    assert files(tmp_path / "first") == files(tmp_path / "again") and (len(first.files) > 1) == (size == "4KB")
    assert packed.counts == first.counts and again.form == "bitmask form"
    itemsize = 4 if dtype == "float32" else 2
    weights = load_file(model / "model.safetensors")
    wanted = sum(
        min(math.ceil(w.numel() / 8) + int((w != 0).sum()) * itemsize, w.numel() * itemsize) for w in weights.values()
    )
    bitmask_bytes = sum(
        tensor.nbytes for name in packed.files for tensor in load_file(tmp_path / "packed" / name).values()
    )
    assert (
        bitmask_bytes
        == wanted
        < packed.bytes_after
        == again.bytes_before
        == sum((tmp_path / "packed" / name).stat().st_size for name in packed.files)
    )
    assert wanted < 0.65 * first.bytes_dense == 0.65 * packed.bytes_dense
    assert [file.stem.startswith("bitmask") for file in sorted((tmp_path / "packed").glob("*.safetensors"))] == [
        True
    ] * len(packed.files)


def test_of_a_float32_model_a_bfloat16_bitmask_form_in_one_go(model, tmp_path):
    done = export(model, tmp_path / "packed", dtype="bfloat16", bitmask=True, verify=True)
    assert done.verification == {
        "tensors": len(done.counts),
        "zeros": sum(zeros for zeros, _ in done.counts.values()),
        "logits": None,
        "outputs": [],
        "inputs": [],
        "unread": [],
        "reason": "the bitmask form has no from_pretrained",
    }
    export(tmp_path / "packed", tmp_path / "again")
    export(model, tmp_path / "direct", dtype="bfloat16")
    assert files(tmp_path / "again") == files(tmp_path / "direct")


def test_it_is_not_mistaken_for_a_model(model, tmp_path):
    export(model, tmp_path / "packed", bitmask=True)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "bitmask.safetensors", framework="pt") as opened:
        matrix = "model.layers.0.self_attn.q_proj.weight"
        assert {"model.norm.weight", f"{matrix}.bitmask", f"{matrix}.values"} <= set(
            opened.keys()
        ) and matrix not in set(opened.keys())
        assert json.loads(opened.metadata()[METADATA_KEY])["model.norm.weight"] == [21]


def test_a_missing_or_short_file_is_an_error(model, tmp_path):
    export(model, tmp_path / "packed", bitmask=True, shard_size="4KB")
    names = sorted(file.name for file in (tmp_path / "packed").glob("*.safetensors"))
    for name in (names[0], names[-1]):
        shutil.copytree(tmp_path / "packed", tmp_path / f"without {name}")
        (tmp_path / f"without {name}" / name).unlink()
        with pytest.raises(UsageError, match=rf"not all {len(names)} files of its set; copy or download"):
            open_checkpoint(tmp_path / f"without {name}")
    (tmp_path / "packed" / names[0]).write_bytes((tmp_path / "packed" / names[0]).read_bytes()[:-1])
    with pytest.raises(UsageError, match="no complete safetensors file"):
        open_checkpoint(tmp_path / "packed")


def test_a_models_own_file_of_that_name_is_no_bitmask_form(model, tmp_path):
    shutil.copyfile(model / "model.safetensors", tmp_path / "bitmask.safetensors")
    with pytest.raises(UsageError, match="holds no weights"):
        open_checkpoint(tmp_path)
    shutil.copyfile(model / "model.safetensors", tmp_path / "bitmask_model.safetensors")
    assert open_checkpoint(tmp_path).form == "safetensors"
