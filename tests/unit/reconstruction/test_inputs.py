"""Which inputs of linear layers a sample takes, and which it leaves."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lp_dist.reconstruction.inputs import InputSample

CPU = torch.device("cpu")


class Block(nn.Module):
    """q and k are given the same tensor, o another one."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.recomputed = recomputed

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.recomputed else self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        normed = x * 2.0
        return self.o(self.q(normed) * self.k(normed))


def sample_of(model: nn.Module, tokens: int = 1000) -> InputSample:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sample = InputSample(model, layers, tokens)
    sample.open()
    return sample


def batch(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, 4, generator=torch.Generator().manual_seed(seed))


def products(x: Tensor) -> Tensor:
    rows = 2.0 * x.reshape(-1, 4)
    return rows.T @ rows


@pytest.mark.parametrize("recomputed", [False, True])
def test_each_forward_pass_counts_once_also_with_gradient_checkpointing(recomputed):
    model = Block(recomputed)
    sample = sample_of(model)
    for seed in range(2):
        model(batch(seed=seed)).sum().backward()
    assert sample.rows("q") == sample.rows("o") == 30
    torch.testing.assert_close(sample.products("q", 4, CPU), products(batch(seed=0)) + products(batch(seed=1)))


def test_layers_with_the_same_inputs_share_them():
    model = Block()
    sample = sample_of(model)
    model(batch())
    model(batch(seed=1))
    assert sample.parts("q") == sample.parts("k") != sample.parts("o") and len(sample.parts("o")) == 2


def test_evaluations_and_parts_that_are_called_by_themselves_do_not_count():
    model = Block()
    sample = sample_of(model)
    model.eval()
    model(batch())
    model.train()
    model.inner(batch())
    assert sample.rows("q") == 0 and sample.parts("q") == ()
    assert torch.equal(sample.products("q", 4, CPU), torch.zeros(4, 4))


def test_padding_is_left_out():
    model, mask = Block(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    sample = sample_of(model)
    model(batch(), attention_mask=mask)
    assert sample.rows("q") == sample.rows("o") == 9
    torch.testing.assert_close(sample.products("k", 4, CPU), products(batch()[mask.bool()]))
    model(batch(), attention_mask=torch.ones(3, 1, 5, 5))  # this is none of tokens
    assert sample.rows("q") == 24


def test_no_more_rows_are_kept_than_requested_and_these_are_of_the_latest_passes():
    model = Block()
    sample = sample_of(model, tokens=20)
    for seed in range(3):
        model(batch(seed=seed))
    torch.testing.assert_close(sample.products("q", 4, CPU), products(batch(seed=2)))
    model(batch(rows=9, seed=5))  # 45 rows: every third one
    torch.testing.assert_close(sample.products("q", 4, CPU), products(batch(rows=9, seed=5).reshape(-1, 4)[::3]))


def test_what_is_kept_does_not_change_and_holds_no_graph():
    model = Block()
    sample = sample_of(model)
    x = batch()
    model(x)
    before = sample.products("q", 4, CPU)
    with torch.no_grad():
        x.zero_()
    assert torch.equal(sample.products("q", 4, CPU), before) and not sample.products("q", 4, CPU).requires_grad


def test_an_input_that_was_freed_is_not_taken_for_another_one_at_its_address():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(20))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for layer in self.layers:
                    x = layer(x)
                    gc.collect()
            return x

    model = Chain()
    sample = sample_of(model)
    model(batch())
    parts = [sample.parts(f"layers.{i}") for i in range(20)]
    assert len(set(parts)) == 20


def test_low_precision_is_summed_in_fp32():
    model = Block().bfloat16()
    sample = sample_of(model)
    x = torch.ones(600, 1, 4, dtype=torch.bfloat16)  # 600 times 4: bf16 has no 2,400 in steps of 4
    model(x)
    gram = sample.products("q", 4, CPU)
    assert gram.dtype == torch.float32 and torch.equal(gram, torch.full((4, 4), 2400.0))


def test_closed_it_takes_nothing_has_nothing_and_leaves_no_hooks():
    model = Block()
    sample = sample_of(model)
    model(batch())
    sample.close()
    assert sample.rows("q") == 0 and not sample.is_open
    model(batch())
    assert sample.rows("q") == 0
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_forward_pass_that_fails_does_not_leave_it_inside():
    model = Block()
    sample = sample_of(model)
    model.o.weight.data = torch.ones(4, 5)
    with pytest.raises(RuntimeError):
        model(batch())
    assert sample.rows("q") == 15
    model.q(batch())
    assert sample.rows("q") == 15


def test_what_was_taken_before_a_save_can_be_forgotten_later():
    """By steps, and also what a save on another rank needs to be forgotten."""
    model = Block()
    sample = sample_of(model, tokens=40)
    for seed in range(4):
        model(batch(seed=seed))
        if seed == 2:
            model(batch(rows=1, seed=9))  # a second micro-batch
        sample.steps += 1
        if seed == 1:
            sample.note_save()
    assert sample.saved_at == 2 and sample.rows("q") == 35, "15 rows each, and the oldest are dropped"
    assert sample.rows_a_step == (4 * 15 + 5) / 4
    sample.forget_before(sample.saved_at)
    later = torch.cat(
        [batch(seed=2).reshape(-1, 4), batch(rows=1, seed=9).reshape(-1, 4), batch(seed=3).reshape(-1, 4)]
    )
    torch.testing.assert_close(sample.products("q", 4, CPU), products(later))
    assert sample.rows("q") == 35 and sample.rows_a_step == 35 / 2
    sample.forget_before(3)
    torch.testing.assert_close(sample.products("k", 4, CPU), products(batch(seed=3)))
    assert sample.rows_a_step == 15
    with pytest.raises(KeyError):
        sample.forget_before(4)
        sample.values("q")
