"""What lp_dist knows of DeepSpeed: configs that it refuses, wrappers whose shards it finds, and state that goes along
in the engine's checkpoints.
"""

from __future__ import annotations

import pytest

from lp_dist.sharding.deepspeed import check_deepspeed_config, in_checkpoints


def test_weights_that_are_loaded_alone_begin_anew():
    """DeepSpeed gives the client state whatever is loaded."""

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

    engine, seen = Engine(), []
    Engine.__module__ = "deepspeed.runtime.engine"
    Engine.__name__ = "DeepSpeedEngine"
    in_checkpoints(engine, dict, seen.append)
    engine.load_checkpoint("x")
    engine.load_checkpoint("x", load_module_only=True)
    engine.load_checkpoint("x", None, True, False)
    assert seen == ["state", None, None]


def test_every_wrapper_that_is_let_in_has_its_shards_located():
    from lp_dist.sharding import deepspeed
    from lp_dist.sharding import shards as room

    assert set(room._LOCATORS) == {"", *deepspeed.TESTED_WRAPPERS}


GOOD = {
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.mark.parametrize(
    "change, part",
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
def test_deepspeed_configs_that_would_train_or_save_something_else_are_refused(change, part):
    check_deepspeed_config(GOOD)
    with pytest.raises(ValueError) as caught:
        check_deepspeed_config({**GOOD, **change})
    assert part in str(caught.value)
