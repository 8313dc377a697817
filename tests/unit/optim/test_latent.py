"""Latent weights: zero in the model, learning in Adam's first moments, and back when they are above the threshold."""

import math

import pytest
import torch
from torch import nn

from helpers.targets import END, FINAL_PRUNING, MATRICES, START, TOTAL, TargetRun, half_dead, layerwise
from lp_dist import LpAdamW, LpLion, LpSGD, SparsityTarget, add_lp_decay
from lp_dist.errors import UsageError
from lp_dist.sparsity.quantiles import ScoredSlice, restore_latent, thresholds_at

IMPLEMENTATIONS = ("reference", "foreach", "fused")


def weights_of(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def step(optimizer: LpAdamW, param: nn.Parameter, *grads: float) -> tuple[list[float], list[float]]:
    """The weights and what is in the first moments after a step."""
    param.grad = torch.tensor(grads)
    optimizer.step()
    return param.tolist(), optimizer.state[param]["exp_avg"].tolist()


# -- a step by hand -----------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_weight_becomes_latent_learns_and_comes_back_at_full_size(implementation):
    """p = 1, so x = |w|; no averages in Adam, so that its step is α·sign(g) but for ε; the pull, αλ = 1e-9, is next to
    nothing.
    """
    param = weights_of(0.95, -0.5, 2.0)
    optimizer = LpAdamW(
        [param],
        lr=0.3,
        betas=(0.0, 0.0),
        eps=1e-12,
        weight_decay=1e-9 / 0.3,
        p=1.0,
        cutoff=1.0,
        latent=True,
        implementation=implementation,
    )

    def near(*values):
        return [pytest.approx(value, abs=1e-6) for value in values]

    weights, latents = step(
        optimizer, param, 1.0, -1.0, 1.0
    )  # x of after the step counts: 0.65 and 0.2 are not above 1
    assert weights == near(0.0, 0.0, 1.7) and latents[:2] == near(0.65, -0.2)
    weights, latents = step(optimizer, param, -1.0, 1.0, 1.0)  # learning on, unseen
    assert weights == near(0.0, 0.0, 1.4) and latents[:2] == near(0.95, -0.5)
    weights, latents = step(
        optimizer, param, -1.0, 1.0, 1.0
    )  # 1.25 is above, so the first is a weight again, with no momentum yet
    assert weights == near(1.25, 0.0, 1.1) and latents[0] == 0.0 and latents[1] == near(-0.8)[0]
    weights, latents = step(optimizer, param, 1.0, -1.0, 1.0)  # it is latent again, and so is the last
    assert weights == near(0.0, 0.0, 0.0) and latents == near(0.95, -0.5, 0.8)
    assert [math.copysign(1.0, weight) for weight in weights] == [1.0] * 3, "no negative zeros"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_latent_weight_steps_without_momentum_and_decays_as_any_weight(implementation):
    """Its decay, x of its latent value with regrowth, is that of a weight of the same size in a model without
    latent weights; its v goes on.
    """
    latent_param, plain_param = weights_of(0.0), weights_of(0.02)
    settings = {
        "lr": 0.01,
        "weight_decay": 0.02,
        "p": 0.5,
        "precondition": 0.5,
        "cutoff": 1.0,
        "regrowth_below": 0.01,
        "implementation": implementation,
    }
    optimizers = (
        LpAdamW([latent_param], latent=True, **settings),
        LpAdamW([plain_param], betas=(0.0, 0.999), **settings),
    )  # β1 = 0: no momentum
    state = {"step": torch.tensor(1.0), "exp_avg_sq": torch.tensor([4e-6])}
    optimizers[0].state[latent_param] = {
        **{key: t.clone() for key, t in state.items()},
        "exp_avg": torch.tensor([0.02]),
    }
    optimizers[1].state[plain_param] = {**{key: t.clone() for key, t in state.items()}, "exp_avg": torch.zeros(1)}
    for gradient in (0.5, 0.3, -0.2):
        (weight,), (latent,) = step(optimizers[0], latent_param, gradient)
        (other,), _ = step(optimizers[1], plain_param, gradient)
        assert weight == 0.0 and latent == pytest.approx(other, rel=1e-5) and latent != 0.02
        assert torch.equal(
            optimizers[0].state[latent_param]["exp_avg_sq"], optimizers[1].state[plain_param]["exp_avg_sq"]
        )


@pytest.mark.parametrize(
    "off", [{"cutoff": 0.0}, {"phase": "off"}, {"phase": "frozen"}, {"weight_decay": 0.0}], ids=str
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_nothing_decays_no_weight_is_latent(implementation, off):
    """Frozen, off, λ = 0: bit for bit as without."""
    results = []
    for latent in (False, True):
        param = weights_of(0.5, 0.0, -1e-3, 2.0)
        optimizer = LpAdamW(
            [param],
            **{
                "lr": 0.01,
                "weight_decay": 0.1,
                "p": 1.0,
                "cutoff": 1.0,
                "latent": latent,
                "implementation": implementation,
                **off,
            },
        )
        results.append([step(optimizer, param, 0.1, 0.2, 0.3, -0.4) for _ in range(3)])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "form",
    [
        {"p": 0.5},
        {"p": -1.0, "precondition": 0.37},
        {"p": 0.8, "precondition": 1.0, "regrowth_below": 0.0},
        {"p": 1.0, "l2": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_with_a_learning_rate_of_zero_leaves_weights_and_what_is_latent(implementation, form):
    """As a schedule may have in the window: what is latent stays so, and loses nothing; the fused step divides by 1 in
    its own way, so by a last bit.
    """
    param = weights_of(9.0, 0.02, -0.03, 3e-5)
    optimizer = LpAdamW(
        [param],
        **{
            "lr": 1e-2,
            "weight_decay": 1e-5,
            "cutoff": 0.2,
            "regrowth_below": 0.02,
            "latent": True,
            "implementation": implementation,
            **form,
        },
    )
    before, latent = step(optimizer, param, 0.1, 0.2, -0.3, 0.4)
    second = optimizer.state[param]["exp_avg_sq"].clone()
    assert before[0] > 8 and before[1:] == [0.0] * 3 and 0.0 not in latent
    optimizer.param_groups[0]["lr"] = 0.0
    now, latents = step(optimizer, param, 0.1, 0.2, -0.3, 0.4)
    assert (
        now == before
        and latents[1:] == pytest.approx(latent[1:], rel=0.0 if implementation != "fused" else 2.0**-22)
        and latents[0] > latent[0]
    )
    assert (optimizer.state[param]["exp_avg_sq"] > second).all()  # moments go on, as Adam's do
    optimizer.param_groups[0]["lr"] = 1e-2
    now, latents = step(optimizer, param, 0.1, 0.2, -0.3, 0.4)
    assert now[1:] == [0.0] * 3 and all(
        new < old for new, old in zip(latents[1:2] + latents[3:], latent[1:2] + latent[3:])
    )


def test_what_can_not_be_is_refused():
    for cls, settings, words in [
        (LpAdamW, {"latent": True}, "latent=True with cutoff=inf would make every weight zero; set the cutoff"),
        (LpAdamW, {"latent": 1, "cutoff": 1.0}, "latent=1 must be True or False"),
        (LpAdamW, {"latent": True, "cutoff": 1.0, "lag": 0.5}, "latent=True and lag=0.5 can't be together"),
    ]:
        with pytest.raises(ValueError, match=words):
            cls([weights_of(1.0)], **settings)
    hooked = torch.optim.AdamW([weights_of(1.0)], weight_decay=0.0)
    with pytest.raises(
        ValueError, match="latent=True keeps latent weights .* of which add_lp_decay knows nothing; use LpAdamW"
    ):
        add_lp_decay(hooked).check({**hooked.param_groups[0], "latent": True, "cutoff": 1.0})
    for cls in (LpSGD, LpLion):
        with pytest.raises(
            ValueError, match=f"latent=True keeps latent weights .* which {cls.__name__} has not or needs; use LpAdamW"
        ):
            cls([{"params": [weights_of(1.0)], "latent": True, "cutoff": 1.0}])


# -- order statistics ---------------------------------------------------------


def scored_slice_of(weights: torch.Tensor, exp_avg: torch.Tensor | None) -> ScoredSlice:
    return ScoredSlice("a", weights, None, {"p": 1.0}, 0.0, exp_avg)


def test_thresholds_see_latent_weights_and_those_above_them_are_restored():
    torch.manual_seed(0)
    latent = torch.randn(3000)
    is_latent = torch.rand(3000) < 0.6
    weights, exp_avg = latent.masked_fill(is_latent, 0.0), torch.where(is_latent, latent, torch.randn(3000))
    threshold = thresholds_at([scored_slice_of(weights, exp_avg)], {"a": 1500}, passes=3)["a"]
    assert threshold == latent.abs().sort().values[1499]
    restore_latent([scored_slice_of(weights, exp_avg)], {"a": threshold})
    restored = ~is_latent | (latent.abs() > threshold)
    assert torch.equal(weights, torch.where(restored, latent, 0.0))
    assert (exp_avg[is_latent] == 0).all() and (exp_avg[~is_latent] != 0).all(), (
        "a weight that comes back has no momentum yet; others keep theirs"
    )
    with pytest.raises(RuntimeError, match="not contiguous"):
        restore_latent([scored_slice_of(torch.zeros(4, 3).t(), torch.zeros(4, 3).t())], {"a": 1.0})


def test_a_sample_has_the_latent_values_of_its_weights():
    run = TargetRun(layerwise(0.6)).to(20)
    shard = next(shard for shard in run.attached.shards if shard.name == "0.weight")
    values = {"p": 0.5, "precondition": 0.0}
    scores, sampled_scores = (
        torch.cat([x for *_, x in ScoredSlice.from_shard("a", shard, values, stride=stride, latent=True).saliency()])
        for stride in (1, 7)
    )
    assert (
        torch.equal(sampled_scores, scores[::7]) and (scores > 0).all() and int((shard.local.values == 0).sum()) > 1000
    )


# -- under a target -----------------------------------------------------------


@pytest.mark.parametrize(
    "sparsity, form",
    [
        (0.9, {}),
        (0.5, {"p": -1.0, "precondition": 1.0, "scope": "global"}),
        (0.7, {"latent_windows": 3.0, "update_every": 1}),
    ],
)
def test_zeros_follow_the_plan_and_come_back_until_its_end(sparsity, form):
    run = TargetRun(layerwise(sparsity, **form))
    control = run.attached.weight_controller
    ahead, restored, late = control.update_every, 0, 0
    before = {}
    while run.taken < TOTAL:
        latent = any(map(control.keeps_latent, control.shards))  # the final pruning restores some
        run.to(run.taken + 1)
        now = {name: weight == 0 for name, weight in run.weights().items() if name in MATRICES}
        back = sum(int((before[name] & ~now[name]).sum()) for name in before)
        restored, late, before = restored + back * latent, late + back * (not latent), now
        if START + 1 < run.taken <= FINAL_PRUNING:
            share = sum(int(zeros.sum()) for zeros in now.values()) / sum(MATRICES.values())
            low, high = (
                sparsity * control.planned_share(min(max(run.taken + shift, START), FINAL_PRUNING))
                for shift in (-1, ahead)
            )
            # Between two updates the cutoff stands still, and weights cross it both ways
            assert low - 0.03 <= share <= high + 0.03, (
                f"at step {run.taken} {share:.4f} are zeros, and {low:.4f} to {high:.4f} were planned"
            )
    assert restored > 100 and late == 0
    assert sum(run.zeros().values()) == sum(round(sparsity * elements) for elements in MATRICES.values())
    assert 0 <= control.final_pruning["pruned_at_end"] < 0.02 * sparsity, (
        "nearly all became zero before the final pruning"
    )


def test_a_weight_comes_back_at_its_size_if_its_gradient_needs_it_in_time():
    """Two small weights without a gradient; from step 14 on one has a large one, after the window the other."""
    run = TargetRun(layerwise(0.5, update_every=4), lr=1e-2)
    weight = run.model[0].weight
    weight.data[0, :2] = 1e-3

    def gradient(grad):
        grad = grad.clone()
        grad[0, 0] = -1.0 if run.taken >= 14 else 0.0
        grad[0, 1] = -1.0 if run.taken >= FINAL_PRUNING else 0.0
        return grad

    weight.register_hook(gradient)
    run.to(14)
    exp_avg = run.optimizer.state[weight]["exp_avg"]
    assert (weight[0, :2] == 0).all() and (exp_avg[0, :2] > 0).all() and (exp_avg[0, :2] < 1e-3).all(), (
        "latent, and a little less for the decay"
    )
    sizes = []
    while not weight[0, 0]:
        run.to(run.taken + 1)
        sizes.append(float(exp_avg[0, 0]))
        assert run.taken < 34
    assert sizes[:-1] == sorted(sizes[:-1]) and weight[0, 0] >= sizes[-2], (
        "it has grown where nobody saw it, and is all there at once"
    )
    run.to(TOTAL)
    assert weight[0, 0] != 0 and weight[0, 1] == 0


def test_the_final_pruning_chooses_among_latent_weights_too_and_then_none_is():
    """No momentum is left in zeros, so that without freeze they start from rest."""
    run = TargetRun(layerwise(0.6, freeze=False)).to(FINAL_PRUNING - 1)
    assert all(run.optimizer.parameter_map.values(name)["latent"] for name in MATRICES)
    run.step()
    latent = {
        name: torch.where(param == 0, run.optimizer.state[param]["exp_avg"], param).detach().clone()
        for name, param in run.model.named_parameters()
        if name in MATRICES
    }
    run.attached.after_step()
    run.taken = FINAL_PRUNING
    assert not any(map(run.attached.weight_controller.keeps_latent, run.attached.weight_controller.shards))
    for name, weights in run.weights().items():
        if name in MATRICES:
            threshold = latent[name].abs().flatten().sort().values[round(0.6 * MATRICES[name]) - 1]
            assert torch.equal(weights, torch.where(latent[name].abs() > threshold, latent[name], 0.0))
    for name, param in run.model.named_parameters():
        if name in MATRICES:
            assert (run.optimizer.state[param]["exp_avg"][param == 0] == 0).all()
    run.to(END)
    before = run.weights()
    run.to(END + 1)
    moved = max(float((run.weights()[name] - before[name]).abs().max()) for name in MATRICES)
    assert moved < 4 * run.optimizer.param_groups[0]["lr"], "zeros move as the others do"


def test_a_run_that_ends_while_weights_are_latent_ends_at_its_target():
    run = TargetRun(layerwise(0.6)).to(30)
    control = run.attached.weight_controller
    assert all(map(control.keeps_latent, control.shards))
    control.finish()
    assert run.zeros() == {name: round(0.6 * elements) for name, elements in MATRICES.items()} and not any(
        map(control.keeps_latent, control.shards)
    )


@pytest.mark.parametrize("curve", ["cubic", lambda u: max(0.0, 2 * u - 1)], ids=["cubic", "flat at first"])
def test_the_momentum_of_zeros_that_were_there_before_is_no_weight(curve):
    """A mask of before holds zeros whose gradients are large, until something is to be pruned."""
    run = TargetRun(layerwise(0.8, curve=curve, update_every=4), model=half_dead())
    weight, dead = run.model[2].weight, run.model[2].weight == 0

    def begun():
        return run.optimizer.parameter_map.values("2.weight").get("cutoff", 0.0) > 0.0

    weight.register_hook(lambda grad: torch.where(dead, 0.0 if begun() else 100.0, grad))
    while not begun():
        assert run.taken < 30
        run.step()
        with torch.no_grad():
            weight[dead] = 0.0
        assert (run.optimizer.state[weight]["exp_avg"][dead] > 1.0).all()
        run.attached.after_step()
    assert (run.optimizer.state[weight]["exp_avg"][dead] == 0).all()
    assert (run.to(TOTAL).model[2].weight[dead] == 0).all(), "with a gradient of zero none comes back"
    assert run.zeros() == {name: round(0.8 * elements) for name, elements in MATRICES.items()}


def test_latent_weights_are_for_lpadamw_with_a_cap_of_one():
    assert TargetRun(SparsityTarget(0.5)).attached.weight_controller.target.latent_windows == 8.0
    assert TargetRun(SparsityTarget(0.5, cap=2.0)).attached.weight_controller.target.latent_windows == 0.0
    assert TargetRun(SparsityTarget(0.5, regrowth=0.0)).attached.weight_controller.target.latent_windows == 0.0
    assert TargetRun(SparsityTarget(0.5), make=LpLion).attached.weight_controller.target.latent_windows == 0.0

    def hooked(params, lr):
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        add_lp_decay(optimizer)
        return optimizer

    assert TargetRun(SparsityTarget(0.5), make=hooked).attached.weight_controller.target.latent_windows == 0.0

    def lagging(params, lr):
        return LpAdamW(params, lr=lr, lag=0.5)

    assert TargetRun(SparsityTarget(0.5), make=lagging).attached.weight_controller.target.latent_windows == 0.0
    for make, name in ((LpSGD, "LpSGD"), (hooked, "AdamW"), (lagging, "LpAdamW with lag")):
        with pytest.raises(
            UsageError,
            match=(
                f"latent_windows=0.5 needs LpAdamW without lag, .* the optimizer is {name}; use LpAdamW, or"
                " latent_windows=0"
            ),
        ):
            TargetRun(SparsityTarget(0.5, latent_windows=0.5), make=make)
    with pytest.raises(
        UsageError,
        match=(
            "latent_windows=1 keeps weights latent below the planned threshold, and so needs cap=1, not None; set"
            " cap=1, or latent_windows=0"
        ),
    ):
        TargetRun(SparsityTarget(0.5, latent_windows=1.0, cap=None))
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="latent_windows=.* must be a finite number >= 0, of windows"):
            SparsityTarget(0.5, latent_windows=bad)
