"""Values that are kept from step to step: whatever changes is seen in the next step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lp_dist import LpAdamW
from lp_dist.optim.parameter_map import ParamSlice

NAMES = ("a", "b", "c")


def run(change: str, implementation: str | None, anew: bool) -> list[Tensor]:
    """Six steps with a change before the fourth. anew: with values that are made for each step."""
    betas = [0.9, 0.99] if "list" in change else (0.9, 0.99)
    params = [Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(n))) for n in range(3)]
    optimizer = LpAdamW(params, lr=0.05, weight_decay=0.1, betas=betas, implementation=implementation)
    optimizer.parameter_map.replace({p: [ParamSlice(n, 0, 24, 0, p.shape)] for p, n in zip(params, NAMES)})
    optimizer.parameter_map.set("b", weight_decay=0.3)
    for number in range(6):
        for param in params:
            param.grad = torch.sin(number + torch.arange(24.0)).view(4, 6)
        optimizer.param_groups[0]["lr"] = 0.05 / (number + 1)
        if number == 3:
            CHANGES[change](optimizer)
        if anew:
            optimizer._acting.clear()
        optimizer.step()
    return [param.detach().clone() for param in params]


CHANGES = {
    "nothing": lambda optimizer: None,
    "a number": lambda optimizer: optimizer.param_groups[0].update(p=1.0),
    "a list in place": lambda optimizer: optimizer.param_groups[0]["betas"].__setitem__(0, 0.2),
    "another phase": lambda optimizer: optimizer.param_groups[0].update(phase="frozen"),
    "an override": lambda optimizer: optimizer.parameter_map.set("b", weight_decay=0.7),
    "an override of another": lambda optimizer: optimizer.parameter_map.set("c", phase="off"),
    "an override that goes": lambda optimizer: optimizer.parameter_map.set("b", weight_decay=None),
}


@pytest.mark.parametrize("implementation", [None, "foreach", "reference"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_in_the_next_step(change, implementation):
    kept, anew = (run(change, implementation, anew) for anew in (False, True))
    assert all(map(torch.equal, kept, anew))
    if change != "nothing":
        assert not all(map(torch.equal, kept, run("nothing", implementation, True)))


def test_what_is_kept_does_not_grow():
    param = Parameter(torch.ones(4))
    optimizer = LpAdamW([param], lr=0.1, weight_decay=0.1)
    optimizer.parameter_map.replace({param: [ParamSlice("a", 0, 4, 0, param.shape)]})
    for number in range(50):
        optimizer.parameter_map.set("a", weight_decay=0.1 + number / 100)
        param.grad = torch.ones(4)
        optimizer.step()
    (acting,) = optimizer._acting.values()
    assert len(acting._kept) == 1
