"""An export needs memory for one file and a tensor, not for the model, nor for the files that it is made from. In a
process under a ceiling.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from export_runs import llama
from safetensors.torch import save_file

FORMS = ("plain", "zero", "dcp")
RUNS = {
    "shards": {},
    "compact": {"compacted": True},
    "bfloat16": {"dtype": "bfloat16"},
    "shrunk": {"shrunk": True},
    "one file": {"shard_size": "1GB"},
}
CASES = [
    "compact, plain",
    *(f"shards, {form}" for form in FORMS),
    "bfloat16, zero",
    "shrunk, dcp",
    *(f"one file, {form}" for form in FORMS),
]
# What a case may need beside what the process had: so much, the compact form less, since an index of its weights would
# be 8 bytes for each.
ROOM = {case: 40_000_000 if case.startswith("compact") else 60_000_000 for case in CASES}
# Every form is exported once before, in small, and torch's threads are started, so that what is loaded on the way and
# their stacks do not count.
PROGRAM = f"""
import json, resource, sys
from pathlib import Path
import torch
from lp_dist.export import export

small, large, out = map(Path, sys.argv[1:])
for form in {FORMS}:
    export(small / form, out / "small" / form)
export(small / "plain", out / "small" / "compact", compacted=True)
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


def written(directory: Path, model: torch.nn.Module) -> int:
    """The same weights in each form; gives their bytes."""
    tensors = {name: param.detach() for name, param in model.named_parameters()}
    for form in FORMS:
        (directory / form).mkdir(parents=True)
        model.config.save_pretrained(directory / form)
    save_file(tensors, directory / "plain" / "model.safetensors")
    dcp.save(tensors, checkpoint_id=directory / "dcp", no_dist=True)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
    torch.save(
        {"module": {}, "buffer_names": [], "param_shapes": shapes}, directory / "zero" / "mp_rank_00_model_states.pt"
    )
    for rank, part in enumerate(flat.chunk(2)):
        state = {
            "zero_stage": 2,
            "partition_count": [2],
            "single_partition_of_fp32_groups": [part.clone()],
            "base_optimizer_state": {"exp_avg": part.clone()},
        }
        torch.save(
            {"optimizer_state_dict": state}, directory / "zero" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    return flat.nbytes


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
