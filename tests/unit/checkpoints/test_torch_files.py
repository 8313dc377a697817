"""Files of torch.save are read one tensor at a time, also where torch does not tell where these lie in them."""

from __future__ import annotations

import pytest
import torch

from lp_dist.checkpoints import files
from lp_dist.checkpoints.files import TorchFile


@pytest.mark.parametrize("tells_offsets", [True, False] if files._tells_offsets() else [False])
def test_tensors_are_read_as_they_were_saved(tells_offsets, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_tells_offsets", lambda: tells_offsets)
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "base": base,
        "rows": base[1:3],
        "turned": base.t(),
        "half": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    torch.save(saved, tmp_path / "saved.bin")
    torch_file = TorchFile(tmp_path / "saved.bin")
    for name, tensor in saved.items():
        content = torch_file.content[name]
        torch_file.check_fits(name, content)
        assert content.is_meta == tells_offsets
        read = torch_file.read(content)
        assert torch.equal(read, tensor) and read.is_contiguous()
        assert read.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize, "a copy of its own"
    assert torch.equal(torch_file.read(torch_file.content["base"][:, 2:4]), base[:, 2:4])
