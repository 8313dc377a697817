"""GGUF files become plain checkpoints."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lp_dist.data import gguf


def gguf_file(path: Path, tokenizer: Path, layers: int = 2, width: int = 64, wide: int = 96) -> None:
    """A small Llama in Q4_1, the format of the demo's file."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    tokenizer_model, writer = json.loads(tokenizer.read_text())["model"], GGUFWriter(path, "llama")
    tokens, merges = (
        sorted(tokenizer_model["vocab"], key=tokenizer_model["vocab"].get),
        [" ".join(pair) for pair in tokenizer_model["merges"]],
    )
    for add, value in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, width),
        (writer.add_block_count, layers),
        (writer.add_feed_forward_length, wide),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, width // 4),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, tokens),
        (writer.add_token_merges, merges),
        (writer.add_token_types, [1] * len(tokens)),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 0),
    ):
        add(value)
    layer = {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (width // 2, width),
        "attn_v": (width // 2, width),
        "attn_output": (width, width),
        "ffn_gate": (wide, width),
        "ffn_up": (wide, width),
        "ffn_down": (width, wide),
    }
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)} | {
        f"blk.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()
    }
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        kind = GGMLQuantizationType.Q4_1 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantised_to_a_plain_checkpoint(tiny_model, tmp_path, monkeypatch):
    """Against gguf's own dequantisation of a tensor. (The demo does so with a file of the Hub.)"""
    from gguf import GGUFReader, dequantize

    source = tmp_path / "small.gguf"
    gguf_file(source, tiny_model / "tokenizer.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = gguf.dequantised(str(source))
    assert gguf.dequantised(str(source)) == directory  # made once
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    tensor = next(t for t in GGUFReader(source).tensors if t.name == "blk.1.ffn_up.weight")
    wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    assert (
        torch.equal(load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight"], wanted)
        and wanted.any()
    )
    text, tokenizers = "The for statement", [AutoTokenizer.from_pretrained(place) for place in (directory, tiny_model)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_the_package_has_the_version_that_transformers_asks_for_while_a_file_is_read(monkeypatch):
    import gguf as package

    monkeypatch.delattr(package, "__version__", raising=False)
    with gguf._with_version():
        assert package.__version__ == importlib.metadata.version("gguf")
    assert not hasattr(package, "__version__")
    monkeypatch.setattr(package, "__version__", "1.2", raising=False)
    with gguf._with_version():
        assert package.__version__ == "1.2"
    assert package.__version__ == "1.2"
