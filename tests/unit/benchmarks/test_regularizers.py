"""The penalties of other papers in the bench of quality, and Lion as its optimizer."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from helpers.quality import SPARSITY, STEPS, gpt2, tiny
from lp_dist.benchmarks.quality import methods, page, regularizers, runs
from lp_dist.benchmarks.quality.methods import Spec
from lp_dist.benchmarks.quality.tasks import Schedule
from lp_dist.benchmarks.row_names import current_names
from lp_dist.errors import UsageError

SCHEDULE = Schedule(STEPS, 3e-3, 2)
# Of a fraction of zeros: half a weight of each of the 8 matrices, among all of their weights.
ROUNDING = 8 * 0.5 / (2 * 16 * (48 + 16 + 64 + 64))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LP_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def measured(line: str, sparsity: float = SPARSITY) -> dict:
    return runs.measure_row(tiny(), {"method": line, "sparsity": sparsity, "seed": 0})


# -- the gradients ------------------------------------------------------------


def test_norm_decay_by_hand():
    weight = torch.tensor([[1.0, -2.0], [3.0, -0.5]])
    assert regularizers.norm_decay(weight, 0).tolist() == [[0, 0], [1, -1]], "rows sum to 3 and 3.5"
    assert regularizers.norm_decay(weight, 1).tolist() == [[1, 0], [1, 0]], "columns sum to 4 and 2.5"


@pytest.mark.parametrize("dim, norm", [(0, float("inf")), (1, 1)])
def test_norm_decay_is_the_gradient_of_the_norm_of_a_linear_map(dim, norm):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    torch.linalg.matrix_norm(weight, norm).backward()
    assert torch.equal(regularizers.norm_decay(weight.detach(), dim), weight.grad)


def penalty(matrices: list[torch.Tensor], norms: float, direction: float) -> torch.Tensor:
    product = torch.stack([matrix.square().sum().sqrt() for matrix in matrices]).prod()
    directions = sum((matrix / matrix.square().sum().sqrt()).abs().sum() for matrix in matrices)
    return norms * product.log() + direction * directions


def test_the_invariant_penalty_by_hand():
    weight = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    by_norm, by_direction = (regularizers.scale_shift_invariant(weight, *factors) for factors in ((1, 0), (0, 1)))
    assert by_norm.tolist() == [pytest.approx([3 / 25, -4 / 25])]
    assert by_direction.tolist() == [pytest.approx([1 / 5 - 7 * 3 / 125, -1 / 5 + 7 * 4 / 125])]
    assert not regularizers.scale_shift_invariant(torch.zeros(2, 3), 1.0, 1.0).any(), "and no nan"


def test_the_invariant_penalty_is_a_function_of_the_product_of_norms_and_of_directions():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (3, 5))]
    shifted = [matrices[0] * 8.0, matrices[1] / 8.0]
    torch.testing.assert_close(penalty(matrices, 0.3, 0.7), penalty(shifted, 0.3, 0.7))
    for matrix in matrices:
        matrix.requires_grad_()
    penalty(matrices, 0.3, 0.7).backward()
    for matrix in matrices:
        torch.testing.assert_close(regularizers.scale_shift_invariant(matrix.detach(), 0.3, 0.7), matrix.grad)


# -- as methods ---------------------------------------------------------------


@pytest.mark.parametrize(
    "line, dims",
    [("normdecay:at=0.5,beta=2", 1), ("normdecay:at=0.5,beta=2,norm=columns", 0), ("weissi:at=0.5,norms=3", None)],
)
def test_before_each_step_the_gradient_times_the_rate_is_taken_off_until_it_prunes(cache, line, dims):
    """Held against a twin that has no method. GPT-2's matrices are [inputs, outputs], so a row is a column there."""
    run, twin = (runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, SCHEDULE) for _ in range(2))
    method, generator = Spec.read(line).method(run), torch.Generator().manual_seed(0)
    method.start()
    for t in range(1, 24):
        batch = tiny().text.batch(generator, 4, 16)
        for each_run in (run, twin):
            each_run.optimizer.zero_grad()
            tiny().loss(each_run.model, *batch).backward()
        rate = twin.optimizer.param_groups[0]["lr"]
        if t <= 20:
            for weight in twin.weights.values():
                gradient = (
                    2.0 * regularizers.norm_decay(weight, dims)
                    if dims is not None
                    else regularizers.scale_shift_invariant(weight, 3.0, 1.0)
                )
                weight.sub_(rate * gradient)
        for each_run in (run, twin):
            each_run.optimizer.step()
            each_run.scheduler.step()
        method.after_step(t)
        if t < 20:
            assert all(torch.equal(run.weights[name], weight) for name, weight in twin.weights.items()), t
        elif t == 20:
            masks = {name: weight != 0 for name, weight in run.weights.items()}
        for name, weight in twin.weights.items():
            weight.mul_(masks[name] if t >= 20 else 1.0)
            assert torch.equal(run.weights[name], weight), f"{name} after {t} steps"


@pytest.mark.parametrize("off", ["normdecay:beta=0", "weissi:direction=0,norms=0"])
def test_without_its_penalty_it_is_pruning_by_magnitude_at_the_same_time(cache, off):
    on = off.partition(":")[0]
    for at in ("at=0.7", "at=1"):
        by_magnitude, penalized = measured(f"magnitude:{at}"), measured(f"{on}:{at}")
        assert measured(f"{off},{at}")["loss"] == by_magnitude["loss"] != penalized["loss"]
        assert penalized["zeros"] == by_magnitude["zeros"] == pytest.approx(SPARSITY, abs=ROUNDING)
    assert Spec.read(on).settings["at"] == 0.7


@pytest.mark.parametrize(
    "line, words",
    [
        ("normdecay:at=0", "at=0 must be above 0"),
        ("weissi:at=1.5", "at=1.5 must be above 0, .* at most 1"),
        ("normdecay:norm=both", "norm=both must be rows or columns"),
    ],
)
def test_what_a_penalty_cannot_do_is_told(cache, line, words):
    with pytest.raises(UsageError, match=words):
        Spec.read(line).method(runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, SCHEDULE))


def test_norm_decay_refuses_what_has_no_rows():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = nn.Sequential(nn.Linear(2, 2), Scale())
    with pytest.raises(UsageError, match=r"1\.weight is not the weight of a linear layer"):
        regularizers.output_dims(model, ["0.weight", "1.weight"])


# -- Lion ---------------------------------------------------------------------


def test_lion_steps_by_signs_at_a_third_of_the_rate():
    """Its first step, written out: β1 = 0.9 of no momentum, so the sign of the gradient."""
    spec = Spec.read("dense:optimizer=lion")
    assert runs.schedule_for(tiny(), spec).lr == pytest.approx(1e-3)
    assert runs.schedule_for(tiny(), Spec.read("dense:lr=2e-3,optimizer=lion")).lr == 2e-3
    run = runs.prepare_run(tiny(), gpt2(0), 0, SPARSITY, SCHEDULE, "lion")
    rate = run.optimizer.param_groups[0]["lr"]
    before = {name: weight.clone() for name, weight in run.weights.items()}
    tiny().loss(run.model, *tiny().text.batch(torch.Generator().manual_seed(0), 4, 16)).backward()
    run.optimizer.step()
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, before[name] - rate * run.model.get_parameter(name).grad.sign())


def test_lion_is_the_optimizer_of_the_dense_fine_tune_and_of_every_method(cache):
    dense = measured("dense:lr=0.001,optimizer=lion", 0.0)
    assert dense["loss"] != measured("dense:lr=0.001", 0.0)["loss"] and dense["loss"] < dense["loss before"] - 0.1
    assert measured("magnitude:at=1,lr=0.001,optimizer=lion", 0.0)["loss"] == dense["loss"]
    for line in ("gmp:lr=0.001,optimizer=lion", "lp:latent_windows=0,lr=0.001,optimizer=lion,precondition=0"):
        row, with_adam = measured(line), measured(line.replace("optimizer=lion", "optimizer=adamw"))
        assert row["zeros"] == with_adam["zeros"] == pytest.approx(SPARSITY, abs=ROUNDING)
        assert row["loss"] != with_adam["loss"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("gmp:optimizer=sgd", "optimizer=sgd must be adamw or lion"),
        ("gmp:c=0.33,optimizer=lion", "lion has not Adam's moments, which gmp would use; add c=0$"),
        ("lp:optimizer=lion", "which lp would use; add precondition=0,latent_windows=0$"),
    ],
)
def test_what_lion_cannot_do_is_told(line, words):
    with pytest.raises(UsageError, match=words):
        Spec.read(line)


def test_a_row_from_before_there_were_optimizers_is_one_of_adamw():
    row = json.loads(json.dumps(runs.planned_rows(tiny(), [Spec.read("gmp")], [SPARSITY], [0])[0]))
    old = {**row, "settings": {key: value for key, value in row["settings"].items() if key != "optimizer"}}
    assert "optimizer" in row["settings"] and runs.key_of(current_names(old)) == runs.key_of(row)
    other = runs.planned_rows(tiny(), [Spec.read("gmp:optimizer=lion")], [SPARSITY], [0])[0]
    assert runs.key_of(other) != runs.key_of(row)


def test_their_names_on_the_page():
    assert page.name_of("gmp:optimizer=lion") == "GMP by |w|, with Lion at a third of the learning rate"
    assert page.name_of("gmp:lr=0.001,optimizer=lion") == "GMP by |w|, with Lion, learning rate 0.001"
    for spec in methods.read_specs("regularizers"):
        assert Spec.read(spec.line) == spec
    assert page.name_of("normdecay") == "norm decay, then magnitude at 0.7 of the steps"
