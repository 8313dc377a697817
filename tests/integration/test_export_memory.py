"""An export needs memory for one file and a tensor, not for the model, nor for the files that it is made from. In a
process under a ceiling.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from helpers.export_runs import llama
from helpers.model_directories import FORMS, written

RUNS = {
    "shards": {},
    "bitmask": {"bitmask": True},
    "bfloat16": {"dtype": "bfloat16"},
    "shrunk": {"shrink": True},
    "one file": {"shard_size": "1GB"},
}
CASES = [
    "bitmask, plain",
    *(f"shards, {form}" for form in FORMS),
    "bfloat16, zero",
    "shrunk, dcp",
    *(f"one file, {form}" for form in FORMS),
]
# What a case may need beside what the process had: so much, the bitmask form less, since an index of its weights would
# be 8 bytes for each.
ROOM = {case: 40_000_000 if case.startswith("bitmask") else 60_000_000 for case in CASES}
# Every form is exported once before, in small, and torch's threads are started, so that what is loaded on the way and
# their stacks do not count.
PROGRAM = f"""
import json, resource, sys
from pathlib import Path
import torch
from lp_dist.export.writer import export

small, large, out = map(Path, sys.argv[1:])
for form in {FORMS}:
    export(small / form, out / "small" / form)
export(small / "plain", out / "small" / "bitmask", bitmask=True)
torch.ones(1_000_000).sum()
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
seen = {{}}
for case, room in {ROOM}.items():
    resource.setrlimit(resource.RLIMIT_DATA, (held + room, resource.RLIM_INFINITY))
    name, form = case.split(", ")
    try:
        export(large / form, out / name / form, **({{"shard_size": "20MB"}} | {RUNS}[name]))
        seen[case] = "done"
    except BaseException as error:      # as one of torch.distributed.checkpoint's is
        seen[case] = "no memory" if "allocate" in str(error) else str(error)
Path(out, "seen.json").write_text(json.dumps(seen))
"""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_ceiling_far_below_the_model_is_enough(tmp_path):
    written(tmp_path / "small", llama())
    with torch.device("meta"):
        large = llama(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=64,
        )
    large.to_empty(device="cpu")
    for param in large.parameters():
        param.data.uniform_(-1, 1)
    for layer in large.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    assert 190e6 < written(tmp_path / "large", large) < 210e6
    places = [str(tmp_path / name) for name in ("small", "large", "out")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen == {case: "no memory" if case.startswith("one file") else "done" for case in CASES}
    sizes = [file.stat().st_size for file in (tmp_path / "out" / "shards" / "zero").glob("*.safetensors")]
    assert len(sizes) > 10 and max(sizes) < 20.1e6 and sum(sizes) > 190e6
    assert (
        sum(file.stat().st_size for file in (tmp_path / "out" / "shrunk").glob("*/*.safetensors")) < sum(sizes) - 70e6
    )
    assert not list(tmp_path.glob("out/*/*.partial")), "what failed is left lying"
