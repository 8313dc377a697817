"""One cell of the matrix as two nodes: two torchrun agents that only know a rendezvous address. Here both are this
machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from helpers.matrix import Cell, decayed, how, one_process
from helpers.paths import ROOT

SCRIPT = """
import os
import sys

import deepspeed
import torch

from lp_dist import LpAdamW, param_groups
from helpers.matrix import OPTIMIZERS, STEPS, batch_of, loss_of, model_of

deepspeed.init_distributed("gloo")
rank, model, (_, settings) = int(os.environ["RANK"]), model_of(), OPTIMIZERS["LpAdamW"]
groups = param_groups(model, settings["weight_decay"])
optimizer = LpAdamW(groups, lr=settings["lr"], p=settings["p"], precondition=0.0)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
    "train_micro_batch_size_per_gpu": 3, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2}})
for step in range(STEPS):
    engine.backward(loss_of(engine(batch_of(step, 0, rank))))
    engine.step()
names = ("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
place = {name: int(os.environ[name]) for name in names}
torch.save({"weights": [p.detach().clone() for p in model.parameters()], "place": place}, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.long
def test_two_nodes_are_one_process(tmp_path, cpu_op):
    (tmp_path / "train.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        "--rdzv_id",
        "matrix",
        str(tmp_path / "train.py"),
        str(tmp_path),
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    logs = [tmp_path / f"node_{node}.txt" for node in range(2)]
    nodes = [subprocess.Popen(words, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT) for log in logs]
    try:
        statuses = [node.wait(240) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # an agent takes its rank along
    assert statuses == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)

    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, result in enumerate(saved):
        assert result["place"] == {
            "GROUP_RANK": rank,
            "GROUP_WORLD_SIZE": 2,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "WORLD_SIZE": 2,
        }
    cell = Cell("ZeRO 2")
    wanted = one_process(how(cell), cell, 2, []).weights[-1]
    assert 0.05 < float((decayed(wanted) == 0).float().mean()) < 0.95
    for result in saved:
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], wanted, strict=True))
