"""The fused step is built on first use: by many ranks at once, once for all, and with a clear word where it can't
be.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long  # the kernel is compiled for each of them

STEP = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from lp_dist import LpAdamW
torch.manual_seed(0)
def stepped(implementation):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (10, 2000)]
    optimizer = LpAdamW(params, lr=0.1, weight_decay=0.1, p=0.8, implementation=implementation)
    for _ in range(2):
        for param in params:
            param.grad = param.detach().cos()
        optimizer.step()
    return torch.cat([param.detach() for param in params])
"""
CHOSEN = (
    STEP + "print('as foreach' if torch.equal(stepped(None), stepped('foreach')) else 'as fused' if"
    " torch.equal(stepped(None), stepped('fused')) else '?')"
)


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "LP_DIST_CACHE": str(cache), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


def test_ranks_that_start_together_all_get_it_and_the_next_finds_it_built(tmp_path):
    ends = [finish(process) for process in [start(CHOSEN, tmp_path) for _ in range(3)]]
    assert [out for out, _ in ends] == ["as fused"] * 3, ends
    # One that comes late may find it there already.
    assert any(
        "INFO building the fused step for this processor" in err and "INFO built the fused step in" in err
        for _, err in ends
    )
    assert len(list(tmp_path.iterdir())) == 1, "one library, and nothing left over"
    out, err = finish(start(CHOSEN, tmp_path, CXX="false"))
    assert out == "as fused" and "building" not in err


def test_a_compiler_that_fails_is_told_once_and_foreach_steps(tmp_path):
    out, err = finish(start(CHOSEN.replace("stepped('fused')", "0"), tmp_path, CXX="false"))
    assert out == "as foreach"
    assert (
        err.count("WARNING the fused step is not used on cpu: 'false ") == 1
        and "The foreach step is used instead" in err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "false"}, "'false .*failed"),
        ({"CXX": "", "PATH": ""}, "install g\\+\\+"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "no AVX2"),
    ],
)
def test_requested_by_name_it_raises_before_the_first_step(tmp_path, environment, why):
    code = (
        "import torch, pytest; from lp_dist import LpAdamW\nwith pytest.raises(ValueError,"
        f" match=\"implementation='fused' can't step this: .*{why}.*Use None\"):\n   "
        " LpAdamW([torch.nn.Parameter(torch.ones(2))], implementation='fused')"
    )
    finish(start(code, tmp_path, **environment))


def test_a_cache_that_can_not_be_written_is_told_and_built_aside(tmp_path):
    file = tmp_path / "file"
    file.touch()
    out, err = finish(start(CHOSEN, file))
    assert out == "as fused" and err.count("WARNING the fused step can't be kept") == 1 and "LP_DIST_CACHE" in err
