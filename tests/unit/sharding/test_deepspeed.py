"""DeepSpeed without ranks: refused configs, and our state in the engine's checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.checkpoints import tagged, zero2
from helpers.damage import Touching
from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed import check_deepspeed_config, in_checkpoints


def test_no_state_is_restored_where_only_the_weights_are_loaded():
    """DeepSpeed returns the client state whatever is loaded."""

    class Engine:
        def load_checkpoint(
            self,
            load_dir,
            tag=None,
            load_module_strict=True,
            load_optimizer_states=True,
            load_lr_scheduler_states=True,
            load_module_only=False,
        ):
            return load_dir, {"lp_dist": "state"}

        def save_checkpoint(self, save_dir, tag=None, client_state=None):
            return True

    engine, restored = Engine(), []
    Engine.__module__ = "deepspeed.runtime.engine"
    Engine.__name__ = "DeepSpeedEngine"
    in_checkpoints(engine, dict, restored.append)
    engine.load_checkpoint("x")
    engine.load_checkpoint("x", load_module_only=True)
    engine.load_checkpoint("x", None, True, False)
    assert restored == ["state", None, None]


def test_a_second_attach_replaces_the_first_in_an_engines_checkpoints():
    saved, restored = [], []

    class Engine:
        __module__ = "deepspeed.runtime.engine"

        def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True):
            """Saves."""
            saved.append((save_dir, tag, client_state, save_latest))
            return True

        def load_checkpoint(self, load_dir, tag=None):
            return load_dir, {"lp_dist": "state", "user": 1}

    engine = Engine()
    in_checkpoints(engine, lambda: "first", lambda state: restored.append(("first", state)))
    in_checkpoints(engine, lambda: "second", lambda state: restored.append(("second", state)))
    assert engine.save_checkpoint("x", client_state={"user": 1}, save_latest=False)
    assert saved == [("x", None, {"user": 1, "lp_dist": "second"}, False)]
    assert engine.load_checkpoint("x") == ("x", {"lp_dist": "state", "user": 1})
    assert restored == [("second", "state")]
    assert engine.save_checkpoint.__name__ == "save_checkpoint" and engine.save_checkpoint.__doc__ == "Saves."
    in_checkpoints(engine, lambda: None, restored.append)
    engine.save_checkpoint("y", save_latest=False)
    assert saved[-1] == ("y", None, {}, False)


GOOD = {
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimizer": {"type": "AdamW"}}, '"optimizer" section'),
        ({"zero_force_ds_cpu_optimizer": True}, '"zero_force_ds_cpu_optimizer": false'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio=0.5"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, '"zenflow"'),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            '"super_offload"',
        ),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, '"round_robin_gradients"'),
        ({"zero_optimization": {"stage": 3}}, '"stage3_gather_16bit_weights_on_model_save": true'),
    ],
    ids=["section", "trap1", "trap3-ratio", "trap3-zenflow", "trap3-super_offload", "round robin", "trap14"],
)
def test_deepspeed_configs_that_would_train_or_save_something_else_are_refused(change, message):
    check_deepspeed_config(GOOD)
    with pytest.raises(ValueError) as caught:
        check_deepspeed_config({**GOOD, **change})
    assert message in str(caught.value)


def test_latest_names_a_checkpoint_when_it_is_complete_and_not_before(tmp_path):
    """DeepSpeed names it while other ranks may still write theirs."""

    class Engine:
        __module__ = "deepspeed.runtime.engine"
        global_steps = 7
        is_decoupled = False

        @property
        def checkpoint_engine(self):
            return SimpleNamespace(is_decoupled=lambda: self.is_decoupled)

        def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen=False):
            calls.append((tag, save_latest, exclude_frozen, sorted(path.name for path in tmp_path.iterdir())))
            if tag == "fails":
                raise OSError("No space left on device")
            return True

        def load_checkpoint(self, load_dir, tag=None):
            return load_dir, {}

    calls: list[tuple] = []
    engine = Engine()
    in_checkpoints(engine, dict, lambda state: None)
    assert engine.save_checkpoint(tmp_path, exclude_frozen=True)
    assert calls.pop() == ("global_step7", False, True, []) and (tmp_path / "latest").read_text() == "global_step7"
    with pytest.raises(OSError, match="No space left"):
        engine.save_checkpoint(tmp_path, "fails")
    assert (tmp_path / "latest").read_text() == "global_step7"
    assert engine.save_checkpoint(tmp_path, 9) and (tmp_path / "latest").read_text() == "9"
    engine.save_checkpoint(tmp_path, "10", None, False)
    engine.is_decoupled = True
    engine.save_checkpoint(tmp_path, "11")
    assert (tmp_path / "latest").read_text() == "9"
    assert [call[:2] for call in calls[-2:]] == [("10", False), ("11", True)], "as the engine does it by itself"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_an_engine_loads_no_checkpoint_that_names_code_unless_it_is_trusted(tmp_path):
    loaded = []

    class Engine:
        __module__ = "deepspeed.runtime.engine"

        def save_checkpoint(self, save_dir, tag=None, client_state=None):
            return True

        def load_checkpoint(self, load_dir, tag=None, **more):
            loaded.append((load_dir, tag, more))
            return load_dir, {}

    engine = Engine()
    in_checkpoints(engine, dict, lambda state: None)
    zero2(tmp_path)
    engine.load_checkpoint(tmp_path)
    torch.save({"more": Touching(tmp_path / "it ran")}, tagged(tmp_path) / "mp_rank_00_model_states.pt")
    for arguments in ((tmp_path,), (tmp_path, "step3")):
        with pytest.raises(UsageError, match=r"names posix.mkdir, whose code would run .*`trust_pickles=True`"):
            engine.load_checkpoint(*arguments)
    with pytest.raises(UsageError, match="names posix.mkdir"):
        engine.load_checkpoint(load_dir=str(tmp_path), tag="step3")
    assert loaded == [(tmp_path, None, {})] and not (tmp_path / "it ran").exists()
    engine.load_checkpoint(tmp_path, "step3", trust_pickles=True)
    assert loaded[1:] == [(tmp_path, "step3", {})]


@pytest.mark.parametrize(
    "config", [{"zero_optimization": [1]}, {"zero_optimization": {"offload_optimizer": "cpu"}}], ids=str
)
def test_a_section_of_a_config_that_is_none_is_told(config):
    with pytest.raises(UsageError, match=r'the DeepSpeed config has a (list|str) for "\w+", which is a section'):
        check_deepspeed_config(config)
