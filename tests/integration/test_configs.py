"""configs/: every file is read by the program that it is for, and holds what the traps of these programs ask for."""

from __future__ import annotations

import gc
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.paths import ROOT

DEEPSPEED = sorted((ROOT / "configs").glob("ds_*.json"))
STAGE_3 = [path for path in DEEPSPEED if "zero3" in path.name]
ACCELERATE = sorted((ROOT / "configs").glob("accelerate_*.yaml"))
RECIPES = sorted((ROOT / "configs").glob("recipe_*.yaml"))


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def no_trace(monkeypatch: pytest.MonkeyPatch):
    """Runs in the project root, as the launchers do, and leaves none of Accelerate's and Transformers' global state
    behind.
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    monkeypatch.chdir(ROOT)
    yield
    gc.collect()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_none_is_forgotten():
    assert sorted((ROOT / "configs").iterdir()) == sorted(DEEPSPEED + ACCELERATE + RECIPES)
    assert len(DEEPSPEED) >= 5 and len(STAGE_3) >= 3 and len(ACCELERATE) >= 4 and len(RECIPES) >= 2


# --- DeepSpeed ---


@each(DEEPSPEED)
def test_trainer_fills_in_every_auto_and_deepspeed_reads_the_result(path: Path):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args = SimpleNamespace(
        world_size=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_grad_norm=0.5,
        bf16=True,
        bf16_full_eval=False,
        fp16=False,
        fp16_full_eval=False,
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_epsilon=1e-8,
        weight_decay=0.1,
        save_on_each_node=False,
        get_warmup_steps=lambda steps: 0,
    )
    config = HfTrainerDeepSpeedConfig(str(path))
    config.trainer_config_process(args)
    config.trainer_config_finalize(
        args, SimpleNamespace(config=SimpleNamespace(hidden_size=64)), num_training_steps=10
    )
    assert '"auto"' not in json.dumps({key: value for key, value in config.config.items() if key != "_comment"})
    read = DeepSpeedConfig(config.config)
    assert read.zero_optimization_stage == int(path.stem[len("ds_zero")])
    assert (read.train_batch_size, read.gradient_accumulation_steps, read.gradient_clipping) == (6, 3, 0.5)
    assert read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.zero_allow_untested_optimizer and not read.zero_force_ds_cpu_optimizer
    assert read.zero_config.gather_16bit_weights_on_model_save == (path in STAGE_3 or "autotp" in path.name)
    assert read.tensor_parallel_config.autotp_size == (2 if "autotp" in path.name else 0)
    experts = read.expert_parallel_config
    assert (experts.enabled, experts.autoep_size) == ((True, 2) if "autoep" in path.name else (False, 1))


@each(DEEPSPEED)
def test_trap_1_accelerate_must_not_replace_our_optimizer_by_DeepSpeedCPUAdam(path: Path):
    assert json.loads(path.read_text())["zero_force_ds_cpu_optimizer"] is False


@each(DEEPSPEED)
def test_trap_2_bare_deepspeed_refuses_optimizers_that_it_does_not_know(path: Path):
    assert json.loads(path.read_text())["zero_allow_untested_optimizer"] is True


@each(DEEPSPEED)
def test_trap_3_nothing_may_step_some_of_the_weights_by_another_optimizer(path: Path):
    zero = json.loads(path.read_text())["zero_optimization"]
    offload = zero.get("offload_optimizer", {"ratio": 1.0})
    assert offload["ratio"] == 1.0 and "super_offload" not in offload and "zenflow" not in zero


@each(STAGE_3)
def test_trap_14_without_gathering_a_saved_model_has_no_weights(path: Path):
    assert json.loads(path.read_text())["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@each(DEEPSPEED)
def test_optimizer_and_scheduler_are_left_to_the_program(path: Path):
    assert not {"optimizer", "scheduler"} & set(json.loads(path.read_text()))


@each(DEEPSPEED)
def test_our_own_start_up_check_agrees(path: Path):
    from lp_dist.errors import UsageError
    from lp_dist.sharding.deepspeed import check_deepspeed_config

    config = json.loads(path.read_text())
    if "autoep" in path.name:
        with pytest.raises(UsageError, match="what Trainer saves has the experts of one rank alone"):
            check_deepspeed_config(config)
        return
    check_deepspeed_config(config)
    if "autotp" in path.name:
        del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
        with pytest.raises(UsageError, match="under AutoTP a checkpoint without .* has no usable weights"):
            check_deepspeed_config(config)


@each(DEEPSPEED)
def test_every_unusual_key_says_why_it_is_there(path: Path):
    config = json.loads(path.read_text())
    comment = " ".join(config["_comment"])
    for key in (
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "ratio",
        "buffer_count",
        "buffer_size",
        "nvme_path",
        "stage3_gather_16bit_weights_on_model_save",
        "allgather_bucket_size",
    ):
        assert (f'"{key}"' in path.read_text().partition("],")[2]) == (key in comment), key


@pytest.mark.parametrize("name, device", [("ds_zero3_offload", "cpu"), ("ds_zero3_nvme", "nvme")])
def test_optimizer_and_weights_go_where_the_name_says(name: str, device: str):
    zero = json.loads((ROOT / "configs" / f"{name}.json").read_text())["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == device


# --- Accelerate ---


def launch_environment(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file PATH` hands to the processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = launch.launch_command_parser().parse_args(["--config_file", str(path), "-m", "lp_dist.finetune"])
    args, defaults, mixed_precision_is_set = launch._validate_launch_command(args)
    assert not mixed_precision_is_set, "--bf16 decides, in one place"
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as launch_command does
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@each(ACCELERATE)
def test_accelerate_reads_it(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    kinds = {
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "fsdp2_tp": DistributedType.FSDP,
        "hsdp": DistributedType.FSDP,
        "zero2": DistributedType.DEEPSPEED,
        "zero3": DistributedType.DEEPSPEED,
    }
    assert config.distributed_type == kinds[path.stem.partition("_")[2]] and not config.use_cpu
    environment = launch_environment(path)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (config.distributed_type == DistributedType.FSDP)
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == (
        config.distributed_type == DistributedType.DEEPSPEED
    )


@each([path for path in ACCELERATE if path.stem.endswith(("hsdp", "tp"))])
def test_accelerate_builds_its_axes_of_all_processes(path: Path, monkeypatch):
    from accelerate import ParallelismConfig

    for key, value in launch_environment(path).items():
        if key.startswith("PARALLELISM_CONFIG"):
            monkeypatch.setenv(key, value)
    axes = ParallelismConfig()
    assert axes.total_size == yaml.safe_load(path.read_text())["num_processes"]
    assert (axes.tp_enabled, axes.dp_replicate_enabled) == (path.stem.endswith("tp"), path.stem.endswith("hsdp"))
    assert axes.dp_shard_enabled


@each([path for path in ACCELERATE if "zero" in path.name])
def test_accelerate_takes_the_deepspeed_config_of_the_same_name(path: Path, monkeypatch: pytest.MonkeyPatch):
    from accelerate.utils import DeepSpeedPlugin

    for key, value in launch_environment(path).items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()  # raises where both files say the same thing
    same = ROOT / "configs" / f"ds_{path.stem.partition('_')[2]}.json"
    assert (
        plugin.deepspeed_config.items()
        >= {key: value for key, value in json.loads(same.read_text()).items() if key != "bf16"}.items()
    )
    assert plugin.zero3_init_flag == (plugin.zero_stage == 3)


def test_accelerate_fsdp_is_version_2_and_saves_unsharded_models(monkeypatch: pytest.MonkeyPatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    for key, value in launch_environment(ROOT / "configs" / "accelerate_fsdp2.yaml").items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and "FULL" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy is not None and plugin.cpu_ram_efficient_loading


# --- recipes ---

NEEDED = {"model": "some/model", "dataset": "some/data", "output_dir": "runs/some"}


@each(RECIPES)
def test_every_key_of_a_recipe_is_an_argument(path: Path):
    from lp_dist.training.arguments import ARGUMENT_CLASSES

    recipe = yaml.safe_load(path.read_text())
    assert not set(recipe) - {field.name for arguments in ARGUMENT_CLASSES for field in fields(arguments)}
    assert 0 < recipe["sparsity"] < 1 and recipe["p"] <= 1 and "weight_decay" not in recipe


@each(RECIPES)
def test_the_program_takes_the_recipe(path: Path):
    from lp_dist.training import arguments

    recipe = yaml.safe_load(path.read_text())
    missing = [word for key, value in NEEDED.items() if key not in recipe for word in (f"--{key}", value)]
    *lp_dist_arguments, training = arguments.parse([str(path), *missing])
    parsed = {key: value for each_class in (*lp_dist_arguments, training) for key, value in vars(each_class).items()}
    for key, value in recipe.items():
        if isinstance(value, (bool, int, float)) or key in ("model", "dataset", "base", "deepspeed"):
            assert parsed[key] == value and isinstance(parsed[key], bool) == isinstance(value, bool), key
    assert training.save_strategy == recipe["save_strategy"]
    assert (ROOT / recipe["deepspeed"]).is_file() and training.hf_deepspeed_config is not None
