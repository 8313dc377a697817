"""The trained baselines of the bench: ADMM, the trust region, the correction of survivors, and N:M patterns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.quality import SPARSITY, STEPS, gpt2, llama, tiny
from lp_dist.benchmarks import json_lines
from lp_dist.benchmarks.quality import methods, oneshot, runs, trust_region
from lp_dist.benchmarks.quality.methods import Spec, TrainingRun
from lp_dist.benchmarks.quality.tasks import Schedule
from lp_dist.errors import UsageError
from lp_dist.reconstruction.solver import damping_for


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LP_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def trained(line: str, make=lambda: gpt2(0), sparsity: float = SPARSITY) -> TrainingRun:
    return runs.train(tiny(), make(), 0, sparsity, Schedule(STEPS, 3e-3, 2), Spec.read(line))


def shares(line: str, monkeypatch, sparsity: float = SPARSITY) -> list[float]:
    """The share of zeros after each step of a run."""
    family, seen = methods.FAMILIES[line.partition(":")[0]], []
    after_step = family.after_step

    def watched(self, t):
        after_step(self, t)
        weights = list(self.run.weights.values())
        seen.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))

    monkeypatch.setattr(family, "after_step", watched)
    trained(line, sparsity=sparsity)
    monkeypatch.undo()
    return seen


# -- ELSA ---------------------------------------------------------------------


def test_elsa_by_hand_on_six_weights():
    """The rate is 0, so that w stays; β₂ = ½, so that v is ½·(g² of this step + ½·g² of the one before + ...)."""
    layer = nn.Linear(3, 2, bias=False)
    w = torch.tensor([[1.0, -2.0, 3.0], [0.5, -1.5, 2.5]])
    layer.weight.data.copy_(w)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0, betas=(0.9, 0.5))
    elsa = Spec.read("elsa:end=0.75,interval=1,penalty=0.5").method(
        TrainingRun(layer, optimizer, None, ["weight"], 0.5, 4, lambda: None)
    )
    elsa.start()

    def step(t: int, gradient: list[list[float]]) -> torch.Tensor:
        layer.weight.grad = torch.tensor(gradient)
        optimizer.step()
        elsa.after_step(t)
        return layer.weight.grad

    zero_gradient = [[0.0] * 3] * 2
    # |w|·|g| is 4, 2, 3 and 5, 1.5, 0.25; by |w| alone the largest would be others.
    gradient = [[4.0, 1.0, 1.0], [10.0, 1.0, 0.1]]
    assert torch.equal(step(1, gradient), torch.tensor(gradient)), "z = w and u = 0 at the start"
    assert elsa.sparse_copies["weight"].tolist() == [[1, 0, 3], [0.5, 0, 0]]
    assert elsa.duals["weight"].tolist() == [[0, -2, 0], [0, -1.5, 2.5]]
    # ½·(w − z + u). v·(w + u)² is then 8, 72, 4.5 and 12.5, 24.75, 156.4, each times ½.
    assert step(2, zero_gradient).tolist() == [[0, -2, 0], [0, -1.5, 2.5]]
    assert elsa.sparse_copies["weight"].tolist() == [[0, -4, 0], [0, -3, 5]]
    assert elsa.duals["weight"].tolist() == [[1, 0, 3], [0.5, 0, 0]]
    assert torch.equal(layer.weight.data, w), "until the end no weight is pruned"
    # v·(w + u)² is 20, 13, 333 and 25.25, 4.4, 29.3, each times ½.
    assert step(3, zero_gradient).tolist() == [[1, 1, 3], [0.5, 0.75, -1.25]]
    assert layer.weight.tolist() == [[0, 0, 3], [0.5, 0, 2.5]]
    assert step(4, gradient).tolist() == torch.tensor(gradient).tolist(), "no penalty after the end"
    layer.weight.data.fill_(1.0)
    elsa.after_step(4)
    assert layer.weight.tolist() == [[0, 0, 1], [1, 0, 1]], "the mask holds"


def test_elsa_projects_at_its_end_and_recovers_under_the_mask(monkeypatch):
    after = shares("elsa", monkeypatch)
    assert not any(after[: round(0.7 * STEPS) - 1]) and min(after[round(0.7 * STEPS) - 1 :]) == pytest.approx(
        SPARSITY, abs=1e-3
    )
    after = shares("elsa:end=1", monkeypatch)
    assert not any(after[:-1]) and after[-1] == pytest.approx(SPARSITY, abs=1e-3)


def test_elsas_interval_is_fitted_to_the_run(monkeypatch):
    projections = []
    project = methods.ELSA._project
    monkeypatch.setattr(methods.ELSA, "_project", lambda self: projections.append(0) or project(self))
    trained("elsa:end=1")
    assert len(projections) == 20
    projections.clear()
    trained("elsa:end=1,interval=16")
    assert len(projections) == 3, "after 16, 32 and 40 steps"


def test_a_larger_penalty_brings_the_weights_nearer_to_their_sparse_copy():
    def lost_by_the_projection(penalty: float) -> float:
        run = runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, Schedule(STEPS, 3e-3, 2))
        elsa = methods.ELSA(run, penalty=penalty, end=1.0)
        elsa.start()
        generator = torch.Generator().manual_seed(0)
        for t in range(1, STEPS):
            run.optimizer.zero_grad()
            tiny().loss(run.model, *tiny().text.batch(generator, 4, 16)).backward()
            run.optimizer.step()
            elsa.after_step(t)
        return sum(float((weight[elsa.sparse_copies[name] == 0] ** 2).sum()) for name, weight in run.weights.items())

    assert lost_by_the_projection(1.0) < 0.5 * lost_by_the_projection(1e-6)


# -- the trust region ---------------------------------------------------------


def test_a_step_is_halved_until_it_is_within_the_bound():
    tried = []

    def divergence(step: float) -> float:
        tried.append(step)
        return step**2

    assert trust_region.accepted_step(0.8, divergence, 0.05) == 0.2 and tried == [0.8, 0.4, 0.2], "0.64, 0.16, 0.04"
    assert trust_region.accepted_step(0.2, divergence, 0.2**2) == 0.2, "the bound itself is accepted"
    tried.clear()
    assert trust_region.accepted_step(1.0, lambda step: divergence(step) + 1, 0.5) == 0.0
    assert tried == [0.5**i for i in range(trust_region.HALVINGS + 1)]
    assert trust_region.accepted_step(1.0, lambda step: math.nan, 0.5) == 0.0


class Constant(nn.Module):
    """A model whose outputs are those of its parameter, and other ones in training mode."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids):
        noise = 100.0 * self.training
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, -1) + noise * torch.tensor([1.0, 0.0]))


def test_the_divergence_is_from_the_model_before_to_the_one_after():
    inputs, model = torch.zeros(3, 5, dtype=torch.int64), Constant([0.5, 0.5])
    before = trust_region.logits(model, inputs)
    assert trust_region.mean_divergence(model, inputs, before) == pytest.approx(0.0, abs=1e-6)
    model.weight.data.copy_(torch.tensor([0.9, 0.1]).log())
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert trust_region.mean_divergence(model, inputs, before) == pytest.approx(expected, rel=1e-5)
    assert model.training, "as it was"


def test_with_a_bound_that_never_binds_it_is_gradual_pruning(monkeypatch):
    class PruningForGood(methods.GMP):
        """What an update has pruned is zero in the next one, whatever a step of the optimizer has made of it."""

        def choose(self, sparsity, is_last):
            self._mask_weights()
            return super().choose(sparsity, is_last)

    monkeypatch.setitem(methods.FAMILIES, "gmp", PruningForGood)
    free, gmp = trained("trust_region:bound=1000"), trained("gmp:c=1,scope=global")
    assert all(torch.equal(free.weights[name], weight) for name, weight in gmp.weights.items())


def test_each_update_but_the_last_is_within_the_bound(monkeypatch):
    """Measured anew, around each update: what is pruned stays within the bound, and twice as much would not."""
    bound, updates = 3e-6, []
    choose = methods.TrustRegion.choose

    def watched(self, sparsity, is_last):
        reached = self._sparsity
        masks = choose(self, sparsity, is_last)
        scores, before = self._scores(), {name: weight.clone() for name, weight in self.run.weights.items()}

        def divergence(total: float) -> float:
            kept = oneshot.keep_largest(scores, total, "global")
            logits = trust_region.logits(self.run.model, self._batch)
            for name, weight in self.run.weights.items():
                weight.mul_(kept[name])
            kl = trust_region.mean_divergence(self.run.model, self._batch, logits)
            for name, weight in self.run.weights.items():
                weight.copy_(before[name])
            return kl

        if not is_last:
            step, pruned = self._sparsity - reached, sum(int((~mask).sum()) for mask in masks.values())
            assert pruned == round(self._sparsity * sum(mask.numel() for mask in masks.values()))
            assert divergence(self._sparsity) <= bound
            halved = step < sparsity - reached
            assert not halved or divergence(reached + 2 * step) > bound
            updates.append(halved)
        return masks

    monkeypatch.setattr(methods.TrustRegion, "choose", watched)
    run = trained(f"trust_region:bound={bound},update_every=4")
    assert True in updates and False in updates, "a bound that halves some of them"
    zeros = sum(int((weight == 0).sum()) for weight in run.weights.values())
    assert zeros == round(SPARSITY * sum(weight.numel() for weight in run.weights.values())), "the last one ends there"


# -- the correction of survivors ----------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, transposed: bool, inputs: int = 6) -> None:
        super().__init__()
        self.layer = Conv1D(3, inputs) if transposed else nn.Linear(inputs, 3)

    def forward(self, x):
        return self.layer(x)

    def rows(self) -> torch.Tensor:
        weight = self.layer.weight.data
        return weight.t() if isinstance(self.layer, Conv1D) else weight


def least_squares(before: torch.Tensor, kept: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """The survivors that take over what is pruned, row by row in closed form. parts: inputs of each forward pass."""
    x = torch.cat(parts).double()
    gram = x.t() @ x
    damping = damping_for(*x.shape) * gram.diagonal()
    moved = torch.zeros_like(before, dtype=torch.float64)
    for row, (mask, w) in enumerate(zip(kept, before.double())):
        damped = gram[mask][:, mask] + damping[mask].diag()
        moved[row, mask] = w[mask] + torch.linalg.solve(damped, gram[mask][:, ~mask] @ w[~mask])
    return moved.float()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_corrected_gmp_comes_to_the_least_squares_solution(transposed):
    """Two updates with inputs of their own. A weight that the first has pruned, and a step of the optimizer has moved
    since, counts as zero in the second.
    """
    torch.manual_seed(0)
    model = OneLayer(transposed)
    model.rows().copy_(torch.randn(3, 6))
    run = TrainingRun(model, torch.optim.Adam(model.parameters()), None, ["layer.weight"], 2 / 3, 10, lambda: None)
    gmp = Spec.read("gmp:correct=1,curve=linear,end=0.5,start=0.1,update_every=2").method(run)
    gmp.start()
    mixing = torch.randn(6, 6)
    first, second = torch.randn(200, 6) @ mixing, torch.randn(50, 6) @ mixing
    before = model.rows().clone()
    model(first)
    model.eval()
    model(100 * torch.randn(9, 6))
    model.train()
    gmp.after_step(3)
    kept = oneshot.keep_largest({"w": before.abs()}, 1 / 3, "layer")["w"]
    torch.testing.assert_close(model.rows(), least_squares(before, kept, first), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model.rows(), before * kept, atol=0.05), "they have moved"
    before = model.rows().clone()
    model.rows()[~kept] += 1e-3
    model(second)
    gmp.after_step(5)
    kept = oneshot.keep_largest({"w": before.abs()}, 2 / 3, "layer")["w"]
    expected = least_squares(before, kept, second)
    # Inputs that are pruned in a row already count as zero in `before`.
    torch.testing.assert_close(model.rows(), expected, rtol=1e-3, atol=1e-4)
    model.rows().fill_(1.0)
    gmp.after_step(6)
    assert torch.equal(model.rows(), kept.float()), "after the last update the mask alone acts"
    assert not model._forward_pre_hooks and not model.layer._forward_pre_hooks


def test_every_layer_of_a_model_is_corrected_by_its_own_inputs():
    run = runs.prepare_run(tiny(), llama().train(), 0, 0.75, Schedule(10, 0.0, 2))
    gmp = Spec.read("gmp:correct=1,end=0.5").method(run)
    gmp.start()
    inputs, modules = {}, dict(run.model.named_modules())

    def keep_inputs(module, args):
        inputs[module] = args[0].detach().flatten(0, 1)

    layers = {name: modules[name.removesuffix(".weight")] for name in run.names}
    hooks = [layer.register_forward_pre_hook(keep_inputs) for layer in layers.values()]
    run.model(input_ids=torch.randint(17, (40, 16), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
    before = {name: weight.clone() for name, weight in run.weights.items()}
    gmp.after_step(5)
    for name, layer in layers.items():
        kept = oneshot.keep_largest({"w": before[name].abs()}, 0.75, "layer")["w"]
        expected = least_squares(before[name], kept, inputs[layer])
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=0.02, atol=2e-3, msg=name)


@pytest.mark.parametrize("line", ["gmp:c=0.67,correct=1,scope=global", "trust_region:correct=1"])
def test_corrected_runs_end_at_their_sparsity_and_with_other_weights(line):
    corrected, plain = trained(line), trained(line.replace(",correct=1", "").replace(":correct=1", ""))
    total = sum(weight.numel() for weight in corrected.weights.values())
    assert sum(int((weight == 0).sum()) for weight in corrected.weights.values()) == round(SPARSITY * total)
    assert any(not torch.equal(plain.weights[name], weight) for name, weight in corrected.weights.items())


@pytest.mark.parametrize("line, updates", [("gmp", 20), ("gmp:correct=1", 5), ("trust_region:correct=1", 20)])
def test_the_number_of_updates_in_a_window(line, updates, monkeypatch):
    chosen = []
    family = methods.FAMILIES[line.partition(":")[0]]
    choose = family.choose
    monkeypatch.setattr(family, "choose", lambda *args: chosen.append(0) or choose(*args))
    run = runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, Schedule(100, 3e-3, 2))
    tiny().loss(run.model, *tiny().text.batch(torch.Generator(), 4, 16)).backward()
    run.optimizer.step()
    method = Spec.read(f"{line}{',' if ':' in line else ':'}start=0.1,end=0.9").method(run)
    method.start()
    for t in range(1, 101):
        method.after_step(t)
    assert len(chosen) == updates + 1, "and the start of the window, where nothing is pruned"


# -- N:M patterns -------------------------------------------------------------


def blocks_of(run: TrainingRun, name: str) -> torch.Tensor:
    """The weights as [outputs, blocks, 4], of a GPT-2 and a Llama."""
    weight = run.weights[name]
    return (weight.t() if "c_" in name else weight).unflatten(-1, (-1, 4))


@pytest.mark.parametrize("make", [lambda: gpt2(0), llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "line", ["sparsegpt:pattern=2:4", "pat:pattern=2:4", "pat:c=0.67,pattern=2:4", "gmp:pattern=2:4", "lp:pattern=2:4"]
)
def test_each_block_of_four_inputs_has_two_zeros(line, make):
    run = trained(line, make, 0.5)
    for name in run.names:
        assert ((blocks_of(run, name) == 0).sum(-1) == 2).all(), name


def test_a_pattern_is_pruned_gradually_and_the_least_of_all_blocks_go_first():
    scores = {"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0, 9.0, 8.0, 7.0, 1.5]])}
    kept = methods.keep_blocks(nn.Linear(8, 1), scores, "2:4")["weight"]
    assert kept.tolist() == [[math.inf, math.inf, 2.0, 1.0, math.inf, math.inf, 7.0, 1.5]]
    assert oneshot.keep_largest({"w": kept}, 0.25, "layer")["w"].tolist() == [
        [True] * 3 + [False] + [True] * 3 + [False]
    ]
    scores = {"layer.weight": torch.rand(8, 3)}
    transposed = methods.keep_blocks(OneLayer(True, 8), scores, "2:4")["layer.weight"]
    assert ((transposed.t().unflatten(-1, (2, 4)) == math.inf).sum(-1) == 2).all()


def test_sparsegpt_chooses_each_block_when_those_before_it_are_done():
    """Input 2 says much of input 7. When its weight goes, that of input 7 becomes the largest of its block."""
    weight = torch.tensor([[3.0, 2.9, 0.5, 0.4, 1.0, 0.9, 0.8, 0.7]], dtype=torch.float64)
    rho, gram = 0.8, torch.eye(8, dtype=torch.float64)
    gram[2, 7] = gram[7, 2] = rho
    before = weight.clone()
    kept = oneshot.sparsegpt_layer(weight, gram, 0.5, damping=0.0, pattern="2:4")
    assert kept.tolist() == [[True, True, False, False, True, False, False, True]]
    assert weight[0, 7].item() == pytest.approx(before[0, 7] + rho * before[0, 2])
    plain = torch.eye(8, dtype=torch.float64)
    kept = oneshot.sparsegpt_layer(before.clone(), plain, 0.5, damping=0.0, pattern="2:4")
    assert kept.tolist() == [[True, True, False, False] * 2], "by magnitude, where inputs say nothing of each other"


def test_a_pattern_needs_inputs_that_divide():
    with pytest.raises(UsageError, match="its number of inputs, 6, is no multiple of 4"):
        oneshot.sparsegpt_layer(torch.randn(2, 6), torch.eye(6), 0.5, pattern="2:4")
    with pytest.raises(UsageError, match="its number of inputs, 6, is no multiple of 4"):
        methods.keep_blocks(OneLayer(False), {"layer.weight": torch.rand(3, 6)}, "2:4")


def test_a_pattern_is_run_once_at_its_own_sparsity():
    planned = runs.planned_rows(tiny(), methods.read_specs("patterns gmp"), [0.7, 0.9], [0])
    assert {(row["method"], row["sparsity"]) for row in planned} == {
        ("dense", 0.0),
        *((line, 0.5) for line in methods.PATTERNS[1:]),
        ("gmp", 0.7),
        ("gmp", 0.9),
    }
    assert len(planned) == len(methods.PATTERNS) + 2


# -- lines and rows -----------------------------------------------------------


@pytest.mark.parametrize(
    "line, word",
    [
        ("elsa:penalty=0", "penalty=0 must be above 0"),
        ("elsa:penalty=large", "penalty=large must be above 0"),
        ("elsa:interval=1.5", "interval=1.5 must be a number of steps"),
        ("elsa:end=2", "end=2 must be above 0 and at most 1"),
        ("trust_region:bound=0", "bound=0 must be above 0"),
        ("trust_region:correct=2", "correct=2 must be 0, or 1"),
        ("gmp:correct=yes", "correct=yes must be 0, or 1"),
        ("pat:correct=1", "pat has no 'correct'"),
        ("gmp:pattern=3:4", "'3:4' is neither"),
        ("lp:pattern=half", "pattern='half' must be one of 2:4, 4:8"),
    ],
)
def test_a_setting_out_of_its_range_is_named(line, word):
    with pytest.raises(UsageError, match=word):
        methods.read_specs(line)


def test_sets_of_rows_are_read_and_printed_again():
    specs = methods.read_specs("rivals patterns")
    assert len(specs) == len(methods.RIVALS) + len(methods.PATTERNS) - 1, "dense is in both"
    assert all(Spec.read(spec.line) == spec for spec in specs)


def test_a_row_from_before_the_new_settings_is_the_same_run(tmp_path):
    for line, added in (("gmp:c=0.33", ("pattern", "correct")), ("pat", ("pattern",)), ("sparsegpt", ("pattern",))):
        row = json.loads(json.dumps(runs.planned_rows(tiny(), [Spec.read(line)], [SPARSITY], [0])[0]))
        old = {**row, "settings": {key: value for key, value in row["settings"].items() if key not in added}}
        path = tmp_path / f"{line}.jsonl"
        json_lines.append(path, old)
        assert old != row and json_lines.read(path) == [row]


def test_committed_rows_are_those_that_are_planned_now():
    """None of them is run again for a setting that came after it."""
    rows = json_lines.read(Path(runs.__file__).resolve().parents[3] / "docs" / "results" / "quality.jsonl")
    for row in rows:
        spec = Spec.read(row["method"])
        assert set(row["settings"]) == set(spec.settings), row["method"]
