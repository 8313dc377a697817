"""Mixtures in `lp-dist bench structured`: what routers make of experts is counted rightly, and a masked expert is as a
removed one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.quality import runs
from lp_dist.benchmarks.quality.tasks import Schedule
from lp_dist.benchmarks.structured import command, mixtures
from lp_dist.benchmarks.structured.methods import OneCut
from lp_dist.errors import UsageError
from lp_dist.export.writer import export
from lp_dist.structured.resolve import resolve_groups


@pytest.fixture(scope="module", params=mixtures.FAMILIES)
def task(request):
    made = mixtures.mixture(request.param)
    return replace(made, pretraining=Schedule(3, 1e-3, 1), schedule=Schedule(20, 1e-3, 1), rows=2, evaluated=4)


@pytest.mark.parametrize("task", ["mixtral"], indirect=True)
def test_methods_of_experts_are_rows_whose_router_chooses_among_those_left(task, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "cached", lambda key, make: make())
    monkeypatch.setattr(mixtures, "mixture", lambda *_: task)
    methods = "dense masked cut:criterion=reap"
    page = command.structured(
        task=task.name, model="", text="", methods=methods, shares="50", seeds="0", groups="experts", steps=None,
        block=1, tokens=2, out=str(tmp_path),
    )  # fmt: skip
    rows = {row["method"]: row for row in json_lines.read(tmp_path / "structured.jsonl")}
    assert list(rows) == methods.split()
    for method in ("masked", "cut:criterion=reap"):
        # Four experts of each of 3 layers, and their rows of the router.
        assert rows[method]["parameters"] - rows[method]["parameters cut"] == 3 * 4 * (3 * 64 * 64 + 64)
        apart = abs(rows[method]["loss"] - rows[method]["loss cut"])
        assert apart > 1e-5, "routers may choose dead experts again"
    assert f"## {task.name}, experts, help texts of Python" in page.read_text() and "| loss |" in page.read_text()


def test_a_masked_expert_is_as_removed(task, tmp_path):
    model, inputs = task.build(0).eval(), task.text.held_out[:64][None]
    sets = resolve_groups(model, "experts")
    router_mask = mixtures.RouterMask(model, sets)
    with torch.no_grad():
        for i, groups in enumerate(sets):
            for member in groups.members:
                model.get_parameter(member.name)[i : i + groups.count // 2] = 0.0
        as_trained = model(input_ids=inputs).logits
        router_mask.update()
        masked = model(input_ids=inputs).logits
        router_mask.remove()
        assert torch.equal(model(input_ids=inputs).logits, as_trained)
        model.save_pretrained(tmp_path / "full")
        export(tmp_path / "full", tmp_path / "small", shrink=True)
        removed = type(model).from_pretrained(tmp_path / "small").eval()
        assert torch.allclose(removed(input_ids=inputs).logits, masked, atol=1e-5)
    assert not torch.allclose(masked, as_trained, atol=1e-3)


def test_frequency_and_reap_are_those_of_the_layer_computed_by_hand(task):
    model, inputs = task.build(0), task.text.train[:128].view(2, 64)
    sets = resolve_groups(model, "experts")
    frequency = mixtures.expert_scores(model, sets, inputs, "frequency").split([groups.count for groups in sets])
    reap = mixtures.expert_scores(model, sets, inputs, "reap").split([groups.count for groups in sets])
    layer = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    model(input_ids=inputs)
    handle.remove()
    (tokens,) = seen
    chosen = torch.topk((tokens @ layer.gate.weight.T).softmax(1), model.config.num_experts_per_tok)
    weights = chosen.values / chosen.values.sum(1, keepdim=True)
    for expert in range(sets[1].count):
        is_chosen = chosen.indices == expert
        assert float(frequency[1][expert]) == is_chosen.sum()
        gate, up = (tokens @ layer.experts.gate_up_proj[expert].T).chunk(2, dim=1)
        outputs = (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].T
        expected = ((weights * is_chosen).sum(1) * outputs.norm(dim=1)).sum() / max(1, is_chosen.sum())
        assert float(reap[1][expert]) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_taylors_criterion_of_an_experts_channel_is_of_that_expert(task):
    model = task.build(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = task.text.train[:64][None]
    run = runs.TrainingRun(model, optimizer, None, [], 0.5, 10, lambda: inputs)
    method = OneCut(run, criterion="taylor", groups="expert_channels")
    super(OneCut, method).start()
    scores = method.taylor_scores()
    model(input_ids=inputs, labels=inputs).loss.backward()
    experts = model.model.layers[1].mlp.experts
    effects = [(param * param.grad).abs().detach() for param in (experts.gate_up_proj, experts.down_proj)]
    count, width = experts.down_proj.shape[0], experts.down_proj.shape[2]
    assert scores.shape == (3 * count * width,)
    of_expert = scores.view(3, count, width)[1, 2]
    expected = effects[0][2].sum(1).view(2, width).sum(0) + effects[1][2].sum(0)
    assert torch.allclose(of_expert, expected, rtol=1e-4)


def test_balance_is_learnt_in_the_pretraining_alone(task):
    model = task.build(0).train()
    inputs, targets = task.text.train[:128].view(2, 64), task.text.train[1:129].view(2, 64)
    balanced = float(task.loss(model, inputs, targets))
    model.config.output_router_logits = False
    plain = float(task.loss(model, inputs, targets))
    assert plain + 0.005 < balanced < plain + 0.2
    assert float(task.loss(model.eval(), inputs, targets)) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"task": "llama"}, "--task llama: it must be lm, mixtral or qwen3_moe"),
        ({"model": "x"}, "--model is for --task lm"),
    ],
)
def test_what_it_cannot_do_is_told(tmp_path, arguments, says):
    values = dict(methods="cut", shares="50", seeds="0", groups="experts", steps=None, block=1, tokens=1)
    with pytest.raises(UsageError, match=says):
        command.structured(**{"task": "mixtral", "model": "", "text": "", "out": str(tmp_path)} | values | arguments)
