"""What the code of a module does with its parameters, of modules that no library has."""

from __future__ import annotations

import functools
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lp_dist.modules.code import Product, Use, code_of


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Products(nn.Module):
    """A parameter for each way to multiply."""

    def __init__(self):
        super().__init__()
        self.linear, self.matmul, self.added = weights(6, 4), weights(4, 6), weights(4, 6)
        self.transposed, self.permuted, self.cast = weights(6, 4), weights(6, 4), weights(4, 6)
        self.einsummed, self.convolved, self.deconvolved = weights(4, 2, 3), weights(6, 4, 3), weights(4, 6, 3)
        self.scaled, self.bias = weights(6, 4), weights(6)
        self.gain = 0.5

    def helper(self, x, matrix):
        return x @ matrix

    def forward(self, x):
        a = F.linear(x, self.linear, self.bias)
        b = torch.matmul(x, self.matmul) + torch.addmm(self.bias, x, self.added)
        c = x @ self.transposed.t() + x.matmul(self.permuted.permute(1, 0))
        d = self.helper(x, self.cast.to(x.dtype))
        e = torch.einsum("bi,ihd->bhd", x, self.einsummed)
        f = nn.functional.conv1d(x[..., None], weight=self.convolved)
        g = F.conv_transpose1d(x[..., None], self.deconvolved)
        weight = self.scaled * self.gain
        return a + b + c + d + e + f + g + torch.nn.functional.linear(x, weight)


def test_operands_of_products_and_the_dimension_that_is_summed_over():
    code = code_of(Products())
    assert {name for name, uses in code.uses.items() if uses == {Use.PRODUCT}} == {
        "linear", "matmul", "added", "transposed", "permuted", "cast", "einsummed", "convolved", "deconvolved",
        "scaled",
    }  # fmt: skip
    assert code.uses["bias"] == {Use.ELEMENTWISE}
    assert {name: (product.inputs, product.outputs) for name, product in code.products.items()} == {
        "linear": (1, 0),
        "matmul": (0, 1),
        "added": (0, 1),
        "transposed": (1, 0),
        "permuted": (1, 0),
        "cast": (0, 1),
        "einsummed": (0, 2),
        "convolved": (1, 0),
        "deconvolved": (0, 1),
        "scaled": (1, 0),
    }


class Crowd(nn.Module):
    """Stacked matrices, each of which gets tokens of its own."""

    def __init__(self):
        super().__init__()
        self.rising, self.falling, self.batched, self.grouped = (weights(3, 8, 4) for _ in range(4))
        self.mixed = weights(3, 4, 8)

    def forward(self, x, where):
        total = torch.zeros_like(x)
        for i in where:
            rows = x[where == i]
            inner = F.linear(rows, self.rising[i])
            total.index_add_(0, where, inner @ self.falling[i])
        y = torch.bmm(x, self.batched.transpose(1, 2))
        z = torch._grouped_mm(y, self.grouped, where)
        return total + z + torch.einsum("eti,eio->eto", x, self.mixed)


def test_stacked_matrices_and_the_dimension_that_numbers_them():
    code = code_of(Crowd())
    assert code.products == {
        "rising": Product(2, 1, 0),
        "falling": Product(1, 2, 0),
        "batched": Product(2, 1, 0),
        "grouped": Product(1, 2, 0),
        "mixed": Product(1, 2, 0),
    }


class Others(nn.Module):
    """No operand of a product among them."""

    def __init__(self):
        super().__init__()
        self.table, self.offsets, self.rates = weights(9, 4), weights(9, 4), weights(4, 6)
        self.prefix, self.places, self.mix, self.base = weights(2, 4), weights(9, 4), weights(3, 4), weights(4, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, ids, distances):
        x = F.embedding(ids, self.table) + self.offsets[distances]
        x = torch.cat([self.prefix.expand(2, -1), x]) + self.places[: len(x)]
        decay = torch.exp(-torch.exp(self.rates))
        x = x * self.mix[0] * decay.sum()
        return self.inner(self.base - self.base.mean())


def test_what_is_no_operand():
    code = code_of(Others())
    assert code.products == {}
    assert code.uses == {
        "table": {Use.LOOKUP},
        "offsets": {Use.LOOKUP, Use.ELEMENTWISE},
        "prefix": {Use.TOKEN},
        "places": {Use.ELEMENTWISE},
        "rates": {Use.ELEMENTWISE},
        "mix": {Use.ELEMENTWISE},
        "base": {Use.COMPUTED},
    }


class Flow(nn.Module):
    """A stack, two layers at the end of which one chooses, and lists of layers that act beside each other."""

    def __init__(self):
        super().__init__()
        self.entry, self.stack = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.beside, self.scores, self.exit = nn.ModuleList([nn.Linear(4, 4)] * 2), nn.Linear(4, 2), nn.Linear(4, 5)
        self.last = "exit"
        self.norm, self.dropout = nn.LayerNorm(4), nn.Dropout()

    def rank(self, scores):
        return scores.softmax(-1).topk(1, dim=-1)

    def forward(self, x):
        states = self.entry(x)
        for layer in self.stack[:2]:
            states = states + layer(self.norm(states))
        values, _ = self.rank(self.scores(states))
        states = sum(layer(states) * values for layer in self.beside)
        logits = getattr(self, self.last)(self.dropout(self.norm(states)))
        return {"logits": logits, "features": states}


def test_where_the_outputs_of_submodules_go():
    code = code_of(Flow())
    assert code.choosing == {"scores"}
    assert code.feeding_themselves == {"stack"}
    assert "exit" in code.returned and "exit" not in code.feeding
    assert {"entry", "stack", "beside"} <= code.feeding and "beside" not in code.feeding_themselves


class Derived(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_function_of_torch_is_known_by_its_name_where_an_engine_has_replaced_it(monkeypatch):
    """As DeepSpeed does under ZeRO-3, for the process."""
    before = code_of(Products())
    monkeypatch.setattr(F, "linear", lambda input, weight, bias=None: torch.Tensor())
    after = code_of(Products())
    assert after.uses == before.uses and after.products == before.products


class Wrapped(nn.Module):
    """Its parameter is used by a method, a property's value, a nested function and a branch."""

    def __init__(self, choice):
        super().__init__()
        self.first, self.second, self.third = weights(4, 4), weights(4, 4), weights(4, 4)
        self.choice = choice

    @property
    def turned(self):
        return self.second.mT

    def forward(self, x):
        def apply(y):
            return y @ self.first

        x = apply(x) if self.choice else x @ self.turned
        return (lambda y: F.linear(y, self.third))(x)


@pytest.mark.parametrize("choice", [True, False])
def test_what_is_called_is_followed_on_both_sides_of_a_branch(choice):
    code = code_of(Wrapped(choice))
    assert code.products == {"first": Product(0, 1), "second": Product(1, 0), "third": Product(1, 0)}


def louder(forward):
    @functools.wraps(forward)
    def inner(self, *args):
        return forward(self, *args) * 2

    return inner


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = weights(4, 4)

    @louder
    def forward(self, x):
        return x @ self.weight


def test_a_decorator_that_keeps_the_function_is_looked_through():
    assert code_of(Decorated()).products == {"weight": Product(0, 1)}


def test_super_is_followed():
    assert code_of(Derived(4, 4)).products == {"weight": Product(1, 0)}


def test_code_without_a_source_is_not_read():
    namespace: dict = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    assert code_of(namespace["Hidden"]()) is None


class Compared(nn.Module):
    """Attention that keeps the best keys: what is ranked are products of activations, and nothing is chosen by weights
    alone.
    """

    def __init__(self):
        super().__init__()
        self.left, self.right, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        scores = torch.matmul(self.left(x), self.right(x).transpose(-1, -2)).softmax(-1)
        best = scores.topk(2, dim=-1).indices
        return x[best] * self.gate(x).topk(2)[0]


def test_what_attention_ranks_is_chosen_by_no_layer():
    assert code_of(Compared()).choosing == {"gate"}


class Looped(nn.Module):
    """Values that are no plain ones: a comparison of an array, an index that is none."""

    sizes = np.arange(3)

    def __init__(self):
        super().__init__()
        self.weight = weights(4, 4)

    def forward(self, x):
        call = self.sizes
        return call(x @ self.weight) if self.sizes[x] else x


class LinedUp(nn.Module):
    """Two matrices that are multiplied by at once, as DeepSpeed's experts with `gate_up_impl="fused"`; and a table of
    two parts, which is looked up in.
    """

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.first, self.second = (weights(6, 4) for _ in range(4))

    def forward(self, x, indices):
        rows = F.embedding(indices, torch.cat([self.first, self.second]))
        return F.linear(x + rows, torch.cat([self.gate, self.up], dim=0))


def test_matrices_that_are_lined_up_are_what_they_were():
    code = code_of(LinedUp())
    assert code.uses["gate"] == code.uses["up"] == {Use.PRODUCT}
    assert code.products["gate"] == code.products["up"] == Product(inputs=1, outputs=0)
    assert code.uses["first"] == code.uses["second"] == {Use.LOOKUP}


def test_objects_that_can_not_be_compared_are_no_trouble():
    assert code_of(Looped()).products == {"weight": Product(0, 1)}


def test_what_can_not_be_followed_is_told_and_left_to_shapes_and_names(monkeypatch, caplog):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = weights(4, 4)

        def forward(self, x):
            return x * self.plain

    monkeypatch.setattr("lp_dist.modules.code.view_of", lambda path, param: 1 / 0)
    module = Strange()
    assert code_of(module) is None and code_of(module) is None
    assert [record.getMessage() for record in caplog.records] == [
        "the code of Strange can't be followed (ZeroDivisionError: division by zero); its parameters are known by"
        " shape and name alone"
    ]


def read_once() -> list[weakref.ref]:
    """References to a module that was read, to its class, and to a model in the closure of its `forward`."""
    kept = nn.Linear(4, 4)

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weights(4, 4)

        @property
        def device(self):
            raise AssertionError("ran")

        def forward(self, x):
            assert self.device
            return kept(x @ self.weight)

    module = Once()
    assert code_of(module).products == {"weight": Product(0, 1)}
    return [weakref.ref(module), weakref.ref(Once), weakref.ref(kept)]


def test_reading_keeps_nothing_alive_and_runs_nothing():
    references = read_once()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_a_function_in_the_place_of_torchs_is_taken_for_it(monkeypatch):
    """ZeRO-3 replaces torch's linear for good, by a function that calls an autograd one."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, weight):
            return rows @ weight.t()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.plank = weights(6, 4)

        def forward(self, x):
            return F.linear(x, self.plank)

    monkeypatch.setattr(nn.functional, "linear", lambda rows, weight, bias=None: Doubled.apply(rows, weight))
    assert code_of(Layer()).products == {"plank": Product(1, 0)}


def test_of_two_ways_to_multiply_the_first_is_told_and_that_there_are_two():
    class Mirror(nn.Module):
        def __init__(self):
            super().__init__()
            self.glass, self.plain = weights(4, 4), weights(4, 4)

        def forward(self, x):
            return (x @ self.glass).tanh() @ self.glass.T + x @ self.plain + F.relu(x) @ self.plain

    code = code_of(Mirror())
    assert code.unclear == {"glass"} and code.products["glass"] == code.products["plain"] == Product(0, 1)
