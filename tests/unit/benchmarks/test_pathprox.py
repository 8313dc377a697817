"""PathProx in the bench of structured pruning: its step, what it takes for a hidden unit, and its λ."""

from __future__ import annotations

import pytest
import torch

from helpers.families import model_of
from lp_dist.benchmarks.quality import runs
from lp_dist.benchmarks.quality.tasks import Schedule
from lp_dist.benchmarks.structured.methods import PathProx
from lp_dist.benchmarks.structured.pathprox import HiddenUnits, hidden_units, proximal_step
from lp_dist.errors import UsageError
from lp_dist.optim.optimizers import LpSGD
from lp_dist.structured.resolve import resolve_groups

INPUTS = torch.arange(24).view(2, 12) % 61
STEPS = 20


def test_a_step_by_hand():
    """‖w‖ is 5, 2 and 0, so v becomes (10, 0), (0, 0.6) and stays (1.5, 2); then each loses 1 of its norm."""
    units = HiddenUnits(
        torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]]),
        torch.tensor([10.0, 1.0, 7.0]),
        torch.tensor([[2.0, 0.0], [0.0, 0.3], [1.5, 2.0]]),
    )
    proximal_step(units, 1.0)
    torch.testing.assert_close(units.inputs, torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]]))
    torch.testing.assert_close(units.biases, torch.tensor([2.0, 0.5, 7.0]))
    torch.testing.assert_close(units.outputs, torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.9, 1.2]]))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def rows_of(model, name: str, layer: int) -> torch.Tensor:
    return model.get_parameter(name.format(layer)).detach()


@pytest.mark.parametrize(
    "family, name, bias",
    [
        ("llama", "model.layers.{}.mlp.up_proj.weight", False),
        # ReLU, in a feed-forward that is no module of its own.
        ("opt", "model.decoder.layers.{}.fc1.weight", True),
    ],
)
def test_a_hidden_unit_is_what_can_be_scaled_without_a_change_of_the_model(family, name, bias):
    model = model_of(family).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0)
    before, parameters = logits_of(model), [param.clone() for param in model.parameters()]
    layers = hidden_units(model, resolve_groups(model, "channels"), INPUTS[:1])
    assert all(torch.equal(old, param) for old, param in zip(parameters, model.parameters())), "changed back"
    assert len(layers) == 2 and all((units.biases is not None) == bias for units in layers)
    for i, units in enumerate(layers):
        assert units.inputs.data_ptr() == rows_of(model, name, i).data_ptr() and units.outputs.shape == (48, 32)
        proximal_step(units, 0.0)
        torch.testing.assert_close(rows_of(model, name, i).norm(dim=1), torch.ones(48))
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)
    proximal_step(layers[0], 0.1)
    assert (logits_of(model) - before).abs().max() > 1e-4


def test_it_refuses_what_does_not_scale():
    model = model_of("gpt2").eval()
    with pytest.raises(UsageError, match="this model's activation function does not scale"):
        hidden_units(model, resolve_groups(model, "channels"), INPUTS[:1])
    model = model_of("llama").eval()
    with pytest.raises(UsageError, match="heads: pathprox is for channels"):
        hidden_units(model, resolve_groups(model, "heads"), INPUTS[:1])


def started(sparsity: float = 0.5, **settings) -> PathProx:
    model = model_of("llama")
    optimizer = LpSGD(model.parameters(), lr=0.1)
    scheduler = Schedule(STEPS, 0.1, 2).scheduler(optimizer)
    method = PathProx(runs.TrainingRun(model, optimizer, scheduler, [], sparsity, STEPS, lambda: INPUTS), **settings)
    method.start()
    return method


def take_step(method: PathProx, t: int) -> None:
    """As a run does, with gradients of zero."""
    for param in method.run.model.parameters():
        param.grad = torch.zeros_like(param)
    method.run.optimizer.step()
    method.run.scheduler.step()
    method.after_step(t)


def path_norms(method: PathProx) -> list[torch.Tensor]:
    mlps = [layer.mlp for layer in method.run.model.model.layers]
    return [(mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)).detach() for mlp in mlps]


def test_without_gradients_its_λ_brings_the_fraction_of_each_layer_to_zero_at_the_end_of_the_window():
    method = started(0.25)
    assert method.run.model.training
    before = path_norms(method)
    for t in range(1, 14):
        take_step(method, t)
    left = path_norms(method)
    scheduled = Schedule(STEPS, 0.1, 2)
    twin = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, rates = scheduled.scheduler(twin), []
    for _ in range(14):
        rates.append(twin.param_groups[0]["lr"])
        twin.step()
        scheduler.step()
    for old, new in zip(before, left):
        threshold = old.sort().values[11]
        torch.testing.assert_close(
            new, (old - threshold * sum(rates[:13]) / sum(rates)).clamp_min(0.0), rtol=1e-4, atol=1e-6
        )
    take_step(method, 14)
    for old, new in zip(before, path_norms(method)):
        assert (new == 0).sum() == 12
        torch.testing.assert_close(new, (old - old.sort().values[11]).clamp_min(0.0), rtol=1e-4, atol=1e-6)
    after = path_norms(method)
    take_step(method, 15)
    assert all(torch.equal(old, new) for old, new in zip(after, path_norms(method))), "and then it ends"
    gates = [layer.mlp.gate_proj.weight for layer in method.run.model.model.layers]
    assert [int((gate == 0).all(1).sum()) for gate in gates] == [12, 12], "the whole channel is zero"


def test_a_given_λ_is_that_of_all_layers_and_the_cut_does_the_rest():
    method = started(weight_decay=0.01, end=0.1)
    assert method.weight_decays == [0.01, 0.01]
    before = path_norms(method)
    rate = method.run.optimizer.param_groups[0]["lr"]
    take_step(method, 1)
    for old, new in zip(before, path_norms(method)):
        torch.testing.assert_close(new, old - rate * 0.01, rtol=1e-4, atol=1e-6)
    take_step(method, 2)
    assert [int((norms == 0).sum()) for norms in path_norms(method)] == [24, 24]
    for end in (0.0, 1.2):
        with pytest.raises(UsageError, match=rf"end={end} must be above 0"):
            started(end=end)
