"""The one-shot baselines of the bench: that they are what they are called."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.quality import gpt2, llama
from lp_dist.benchmarks.quality import oneshot, runs
from lp_dist.benchmarks.quality.methods import Spec


def test_what_is_calibrated_goes_through_no_dropout(monkeypatch):
    seen = []
    monkeypatch.setattr(oneshot, "wanda", lambda model, *_: seen.append(model.training) or {})
    run = SimpleNamespace(model=gpt2(0).train(), names=[], sparsity=0.5, steps=4, weights={}, inputs=lambda: None)
    Spec.read("wanda").method(run).start()
    assert seen == [False] and run.model.training


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_smallest_scores_are_pruned_in_every_scope(sizes, sparsity):
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = {str(i): torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    layer, overall = (oneshot.keep_largest(scores, sparsity, scope) for scope in ("layer", "global"))
    for name, score in scores.items():
        assert int((~layer[name]).sum()) == round(sparsity * len(score))
        assert (
            not (~layer[name]).any() or not layer[name].any() or score[~layer[name]].max() <= score[layer[name]].min()
        )
    all_scores, kept = torch.cat(list(scores.values())), torch.cat([overall[name] for name in scores])
    assert int((~kept).sum()) == round(sparsity * len(all_scores))
    assert kept.all() or not kept.any() or all_scores[~kept].max() <= all_scores[kept].min()


@pytest.mark.parametrize("make", [partial(gpt2, 0), llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("block", [0, 1])
def test_wanda_is_what_its_paper_says(make, block):
    """|w|·‖x‖, the smallest of each output go; x is what comes out of the blocks before, pruned already. In a block's
    first layer that can be seen when all is done."""
    model = make()
    inputs = torch.randint(17, (5, 16), generator=torch.Generator().manual_seed(1))
    ends = (f"h.{block}.attn.c_attn", f"layers.{block}.self_attn.q_proj")
    name, module = next((name, module) for name, module in model.named_modules() if name.endswith(ends))
    before = module.weight.detach().clone()
    masks = oneshot.wanda(model, sorted(runs.decayed_names(model)), 0.5, inputs)
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(input_ids=inputs)
    hook.remove()

    def outputs(w):
        return w.t() if "c_attn" in name else w

    scores = outputs(before).abs() * seen[0].flatten(0, 1).norm(dim=0)
    for score, kept in zip(scores, outputs(masks[f"{name}.weight"])):
        assert int(kept.sum()) == 8 and score[~kept].max() <= score[kept].min() * (1 + 1e-5)
    assert torch.equal(module.weight, before * masks[f"{name}.weight"]), "what stays is as it was"


def test_sparsegpt_mends_by_least_squares():
    """Two inputs with correlation ρ: without the first, the best weight of the second is w2 + ρ·w1."""
    rho, weight = 0.8, torch.tensor([[0.1, 2.0], [0.3, -1.0]], dtype=torch.float64)
    gram = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    kept = oneshot.sparsegpt_layer(weight, gram, 0.5, damping=0.0)
    assert kept.tolist() == [[False, True], [False, True]]
    assert weight.mul_(kept).flatten().tolist() == pytest.approx([0.0, 2.0 + rho * 0.1, 0.0, -1.0 + rho * 0.3])


def test_sparsegpt_of_inputs_that_say_nothing_of_each_other_is_magnitude():
    """Its score is then w², within each of its blocks of inputs; and nothing is mended."""
    torch.manual_seed(0)
    weight = torch.randn(6, 300)
    before = weight.clone()
    kept = oneshot.sparsegpt_layer(weight, 3 * torch.eye(300), 0.4)
    for first in (0, 128, 256):
        columns = before[:, first : first + 128].abs()
        assert torch.equal(kept[:, first : first + 128], oneshot.keep_largest({"w": columns}, 0.4, "layer")["w"])
    assert torch.allclose(weight * kept, before * kept)


def test_sparsegpt_comes_near_the_best_weights_for_its_mask():
    """Inputs that say much of each other. The best weights are those of least squares, output by output; magnitude
    mends nothing.
    """
    torch.manual_seed(0)
    x = torch.randn(3000, 10) @ torch.randn(10, 192) + 1.6 * torch.randn(3000, 192)
    weight, gram = torch.randn(30, 192), x.t() @ x
    mended = weight.clone()
    kept = oneshot.sparsegpt_layer(mended, gram, 0.5)
    best = torch.zeros_like(weight)
    for row, (mask, w) in enumerate(zip(kept, weight)):
        best[row, mask] = torch.linalg.solve(gram[mask][:, mask], gram[mask] @ w)
    plain = weight * oneshot.keep_largest({"w": weight.abs()}, 0.5, "layer")["w"]

    def error(w):
        return float((x @ (w - weight).t()).norm())

    assert int((~kept).sum()) == 30 * 96
    assert error(best) < error(mended * kept) < 1.35 * error(best) and error(mended * kept) < 0.7 * error(plain)


def test_unused_inputs_need_no_weights():
    weight, gram = torch.randn(4, 8), torch.eye(8)
    gram[3, 3] = 0
    oneshot.sparsegpt_layer(weight, gram, 0.25)
    assert not weight[:, 3].any() and weight.isfinite().all()
