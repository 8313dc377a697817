"""A DeepSpeed that was not tested: a warning, and checks of where it keeps its shards. Without ranks."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.paths import ROOT
from lp_dist import LpAdamW, attach
from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed import TESTED_DEEPSPEED, update_copies
from lp_dist.sharding.shards import locate_shards


class DeepSpeedZeroOptimizer:
    """As ZeRO-2 of one rank: the parameters one after the other in a flat fp32 master."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    def __init__(self, model: nn.Module) -> None:
        self.bit16_groups = [list(model.parameters())]
        flat = torch.cat([param.detach().float().flatten() for param in self.bit16_groups[0]])
        self.single_partition_of_fp32_groups = [nn.Parameter(flat)]
        self.optimizer = LpAdamW(self.single_partition_of_fp32_groups, lr=1e-2, weight_decay=0.1)
        self.real_dp_process_group = [torch.distributed.group.WORLD]
        offset = 0
        for param in self.bit16_groups[0]:
            self.lay(param, offset)
            offset += param.numel()

    def lay(self, param: nn.Parameter, offset: int, start: int = 0) -> None:
        param._hp_mapping = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=start),
            hp_fragment_address=SimpleNamespace(start=offset, numel=param.numel() - start),
        )

    def update_lp_params(self) -> None:
        return self.gone_since


@pytest.fixture(autouse=True)
def _single_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)).to(request.param)


@pytest.fixture
def installed(monkeypatch):
    def install(version: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda _: version)

    return install


def test_a_version_that_was_not_run_is_a_warning_said_once(model, installed, caplog):
    version = f"0.99.1+{model[0].weight.dtype}"
    installed(version)
    wrapper = DeepSpeedZeroOptimizer(model)
    with caplog.at_level(logging.WARNING, "lp_dist"):
        for _ in range(2):
            attached = attach(model, wrapper)
    assert [shard.name for shard in attached.shards] == ["0.weight", "1.weight"]
    (message,) = [record.getMessage() for record in caplog.records if "deepspeed" in record.getMessage()]
    assert message.startswith(f"deepspeed {version} was not tested with this lp_dist, only ")
    assert all(f"{series}.x" in message for series in TESTED_DEEPSPEED)
    assert f"install 'deepspeed=={TESTED_DEEPSPEED[-1]}.*', or a newer lp_dist" in message


@pytest.mark.parametrize("series", TESTED_DEEPSPEED)
def test_a_version_that_was_run_is_not(series, model, installed, caplog):
    installed(f"{series}.5")
    attach(model, DeepSpeedZeroOptimizer(model))
    assert not caplog.records


def test_parameters_in_another_order_are_seen_by_their_values(model, installed):
    """Ranges and counts are right, as with round_robin_gradients: each parameter's decay would hit the other's."""
    installed("0.99.2")
    wrapper = DeepSpeedZeroOptimizer(model)
    first, second = wrapper.bit16_groups[0]
    wrapper.lay(first, offset=second.numel())
    wrapper.lay(second, offset=0)
    message = "deepspeed 0.99.2 steps other weights than the model's where 0.weight should lie.*It was tested with"
    with pytest.raises(UsageError, match=message):
        attach(model, wrapper)


@pytest.mark.parametrize("version", ["0.99.3", f"{TESTED_DEEPSPEED[-1]}.5"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"offset": 30}, "has elements 0 to 24 of a parameter of 24 at 30 in a tensor of 48"),
        ({"offset": -1}, "has elements 0 to 24 of a parameter of 24 at -1 in a tensor of 48"),
        ({"offset": 0, "start": -2}, "has elements -2 to 24 of a parameter of 24 at 0 in a tensor of 48"),
    ],
    ids=str,
)
def test_a_range_outside_of_its_tensor_is_refused_in_any_version(changes, message, version, model, installed):
    installed(version)
    wrapper = DeepSpeedZeroOptimizer(model)
    wrapper.lay(wrapper.bit16_groups[0][0], **changes)
    with pytest.raises(UsageError, match=f"deepspeed {version} {message}: its shards lie in another way"):
        locate_shards(model, wrapper)


def without_groups(model: nn.Module, wrapper: DeepSpeedZeroOptimizer) -> None:
    del wrapper.bit16_groups
    locate_shards(model, wrapper)


def without_mapping(model: nn.Module, wrapper: DeepSpeedZeroOptimizer) -> None:
    del model[0].weight._hp_mapping
    locate_shards(model, wrapper)


def without_masters(model: nn.Module, wrapper: DeepSpeedZeroOptimizer) -> None:
    update_copies(wrapper)


@pytest.mark.parametrize(
    "reads, attribute",
    [(without_groups, "bit16_groups"), (without_mapping, "_hp_mapping"), (without_masters, "gone_since")],
)
def test_a_private_attribute_that_is_gone_ends_in_one_clear_error(reads, attribute, model, installed):
    installed("0.99.4")
    tested = re.escape(" and ".join(f"{series}.x" for series in TESTED_DEEPSPEED))
    message = (
        rf"deepspeed 0\.99\.4 lacks what lp_dist reads of it \(.*'{attribute}'\): .* It was tested with {tested}; "
    )
    with pytest.raises(UsageError, match=message + r"install 'deepspeed==") as caught:
        reads(model, DeepSpeedZeroOptimizer(model))
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, AttributeError)


def test_the_extra_allows_the_series_that_were_run():
    (lowest, above) = re.search(r'"deepspeed>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text()).groups()
    first, last = (tuple(map(int, TESTED_DEEPSPEED[i].split("."))) for i in (0, -1))
    assert lowest == TESTED_DEEPSPEED[0]
    assert tuple(map(int, above.split("."))) == (last[0], last[1] + 1)
    assert tuple(f"{first[0]}.{minor}" for minor in range(first[1], last[1] + 1)) == TESTED_DEEPSPEED
