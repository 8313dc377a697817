"""Why a parameter decays or stays dense: a module that no library has for each rule, under names that say nothing."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lp_dist.sparsity.selection import Choice, Reason, choices, decayed_names, matrix_names


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Kubla(nn.Module):
    """A block: a matrix of its own on the right of a product, and one of torch."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.khan, self.xanadu = weights(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.xanadu(torch.relu(x @ self.khan))


class Stack(nn.Module):
    """A few blocks."""

    def __init__(self, block=Kubla, depth: int = 2):
        super().__init__()
        self.storeys = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x):
        for storey in self.storeys:
            x = storey(x)
        return x


def reasons(model: nn.Module) -> dict[str, str]:
    """{parameter: its reason's name}, without biases and norms."""
    return {name: choice.reason.name for name, choice in choices(model).items() if choice.reason != Reason.VECTOR}


def test_operands_of_products_decay_whatever_they_are_called():
    assert reasons(Kubla()) == {"khan": "MATRIX", "xanadu.weight": "MATRIX"}
    assert matrix_names(Kubla()) == {"khan", "xanadu.weight"}


class Alph(nn.Module):
    """What has two dimensions above 1, and is no matrix."""

    def __init__(self):
        super().__init__()
        self.river, self.cavern, self.sea = weights(5, 8), weights(9, 8), weights(8, 4)
        self.walls, self.towers, self.gardens = weights(3, 8), weights(2, 8), weights(8, 8)
        self.sunny = weights(1, 8)

    def forward(self, x, ids):
        x = torch.cat([self.river.expand(len(x), -1, -1), x])  # queries, registers
        x = x + self.cavern[ids]  # relative positions
        state = -torch.exp(self.sea.float())  # a state space's
        x = x * self.walls[0] + x * self.towers[1]  # time mixes, scales by layer
        x = x * torch.tanh(self.gardens)
        return (x[..., None] * state).sum(-1) * self.sunny


def test_scales_tables_tokens_and_state_spaces_stay_dense():
    assert reasons(Alph()) == {
        "river": "TOKEN",
        "cavern": "LOOKUP",
        "sea": "ELEMENTWISE",
        "walls": "ELEMENTWISE",
        "towers": "ELEMENTWISE",
        "gardens": "ELEMENTWISE",
    }
    assert choices(Alph())["sunny"] == Choice(False, Reason.VECTOR)
    assert matrix_names(Alph()) == set()


@pytest.mark.parametrize("ending", ["tagger", "as wide", "deep", "parameter", "in a list", "wrapped"])
def test_the_layer_whose_output_is_returned_is_a_head(ending):
    class Abora(nn.Module):
        def __init__(self):
            super().__init__()
            self.mount = Stack()
            if ending == "parameter":
                self.dulcimer = weights(8, 5)
            elif ending == "in a list":
                self.chorus = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
            elif ending == "deep":
                self.song = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
            else:
                self.song = nn.Linear(8, 8 if ending == "as wide" else 5)

        def forward(self, x, labels=None):
            features = self.mount(x)
            if ending == "parameter":
                return features @ self.dulcimer
            if ending == "in a list":
                return torch.stack([voice(features) for voice in self.chorus])
            logits = self.song(features)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"loss": loss, "start": logits, "features": x}

    class Maid(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Abora()

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = Maid() if ending == "wrapped" else Abora()
    heads = {name for name, reason in reasons(model).items() if reason == "HEAD"}
    expected = {"parameter": "dulcimer", "in a list": "chorus", "wrapped": "inner.song"}.get(ending, "song")
    assert heads and all(name.startswith(expected) for name in heads)
    assert {name for name in matrix_names(model) if "mount" in name} == {
        f"{'inner.' * (ending == 'wrapped')}mount.storeys.{i}.{name}"
        for i in (0, 1)
        for name in ("khan", "xanadu.weight")
    }
    assert not heads & matrix_names(model) and {n for n in heads if "weight" in n or n == "dulcimer"} <= matrix_names(
        model, include_embeddings=True
    )


class Tower(nn.Module):
    """A stack, and several layers behind it that pool what comes out."""

    def __init__(self):
        super().__init__()
        self.walls, self.roof = Stack(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return self.roof(self.walls(x).mean(1))


class Dome(nn.Module):
    """Features of two towers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = Tower(), Tower(), nn.Linear(8, 4)

    def forward(self, x, y):
        return self.first(x), self.last(self.second(y))


def test_layers_that_pool_are_a_head_but_in_a_tower_beside_others():
    assert {name for name, reason in reasons(Tower()).items() if reason == "HEAD"} >= {
        "roof.0.weight",
        "roof.1.weight",
    }
    assert {name for name, reason in reasons(Dome()).items() if reason == "HEAD"} == {"last.weight", "last.bias"}
    assert "first.roof.0.weight" in matrix_names(Dome())


def test_the_head_of_a_compiled_model_stays_dense():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.song = Stack(), nn.Linear(8, 3)

        def forward(self, x):
            return self.song(self.body(x))

    assert {name for name, reason in reasons(torch.compile(Model())).items() if reason == "HEAD"} == {
        "_orig_mod.song.weight",
        "_orig_mod.song.bias",
    }


def test_a_sequence_or_a_stack_has_no_head():
    assert matrix_names(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))) == {"0.weight", "2.weight"}
    assert len(matrix_names(Stack())) == 4


class Porlock(nn.Module):
    """Experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.person, self.business = self.make_experts(), self.make_router()
        self.common, self.honey = nn.Linear(8, 8), nn.Linear(8, 1)

    def make_experts(self):
        return weights(3, 8, 8)

    def expert(self, i, x):
        return F.linear(x, self.person[i])

    def forward(self, x):
        shares = self.shares(self.scores(x))
        total = self.common(x) * torch.sigmoid(self.honey(x))
        for i in range(shares.shape[-1]):
            total = total + self.expert(i, x) * shares[..., i, None]
        return total


class InAList(Porlock):
    """Experts in a list."""

    def make_experts(self):
        return nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def expert(self, i, x):
        return self.person[i](x)


class InAModule(Porlock):
    """Experts in a module of their own, beside the router."""

    def make_experts(self):
        return Guests()

    def expert(self, i, x):
        return self.person(i, x)


class Guests(nn.Module):
    """Experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.all = weights(3, 8, 8)

    def forward(self, i, x):
        return x @ self.all[i]


class Layer:
    """A router that is a layer."""

    def make_router(self):
        return nn.Linear(8, 3)

    def scores(self, x):
        return self.business(x)


class Bare:
    """A router that is a parameter of the block."""

    def make_router(self):
        return weights(3, 8)

    def scores(self, x):
        return F.linear(x, self.business)


class Ranked:
    """The best two experts act."""

    def shares(self, scores):
        return torch.topk(scores.softmax(-1), 2, dim=-1)[0]


class Mixed:
    """All experts act, so that the router is known by its width alone."""

    def shares(self, scores):
        return scores.softmax(-1)


@pytest.mark.parametrize("shares", [Ranked, Mixed])
@pytest.mark.parametrize("router", [Layer, Bare])
@pytest.mark.parametrize(
    ("experts", "name"), [(Porlock, "person"), (InAList, "person.1.weight"), (InAModule, "person.all")]
)
def test_what_chooses_among_experts_stays_dense(experts, name, router, shares):
    model = Stack(type("Block", (router, shares, experts), {}))
    routers = {name for name, reason in reasons(model).items() if reason == "ROUTER"}
    assert {name.removesuffix(".bias").removesuffix(".weight") for name in routers} == {
        f"storeys.{i}.{router}" for i in (0, 1) for router in ("business", "honey")
    }
    assert {"storeys.0.common.weight", f"storeys.0.{name}"} <= matrix_names(model)


class Shifted(Layer):
    """Its scores pass a module whose only parameter is a vector in two dimensions, as loads of experts are."""

    def shares(self, scores):
        return torch.topk(self.loads(scores.softmax(-1)), 2, dim=-1)[0]


class Loads(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = weights(1, 3)

    def forward(self, scores):
        return scores + self.each.squeeze()


def test_scores_that_are_shifted_by_a_vector_are_still_those_of_the_router():
    class Block(Shifted, InAModule):
        def __init__(self):
            super().__init__()
            self.loads = Loads()

        def make_router(self):
            return nn.Linear(8, 5, bias=False)  # experts of no number that is known

    assert reasons(Stack(Block))["storeys.0.business.weight"] == "ROUTER"


class Places(nn.Module):
    """Makes features, and hands on where they were."""

    def __init__(self):
        super().__init__()
        self.made = nn.Linear(8, 8)

    def forward(self, x, places):
        places = places + 1
        return self.made(x), places


@pytest.mark.parametrize("ranked", ["places", "likeness"])
def test_order_of_tokens_and_likeness_of_features_make_no_router(ranked):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.then = Places(), Kubla()

        def forward(self, x, places):
            features, places = self.into(x, places)
            likeness = 1 - F.cosine_similarity(features[:, 1:], features[:, :-1], dim=-1)
            order = torch.argsort(places if ranked == "places" else likeness, dim=1)
            return self.then(torch.gather(features, 1, order[..., None]))

    assert reasons(Block()) == {
        "into.made.weight": "MATRIX",
        "then.khan": "MATRIX",
        "then.xanadu.weight": "MATRIX",
    }


def test_a_layer_that_is_as_wide_as_a_stack_is_deep_is_no_router():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.deep = nn.Linear(8, 8), nn.ModuleList(Kubla() for _ in range(8))
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            x = self.into(x)
            for storey in self.deep:
                x = storey(x)
            return self.out(x)

    assert reasons(Vision())["into.weight"] == "MATRIX"


def test_short_depthwise_convolutions_over_time_stay_dense_and_others_decay():
    model = nn.Sequential(
        nn.Conv1d(8, 8, 4, groups=8), nn.Conv1d(8, 8, 31, groups=8), nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 7, groups=8)
    )
    assert choices(model)["0.weight"] == Choice(False, Reason.SHORT_CONVOLUTION)
    assert matrix_names(model) == {"1.weight", "2.weight", "3.weight"}


def test_vectors_that_are_written_in_two_dimensions_stay_dense():
    class Thin(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.plane, self.point = weights(1, 8), weights(8, 8), weights(1, 1, 8)

        def forward(self, x):
            return (x @ self.plane + x @ self.line.T) * self.point

    model = nn.Sequential(Thin(), nn.LayerNorm((4, 8)), nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert matrix_names(model) == {"0.plane", "2.in_proj_weight", "2.out_proj.weight"}


class Dream(nn.Module):
    """Marks parameters as without weight decay in the three ways that are in use."""

    def __init__(self):
        super().__init__()
        self.marked, self.optimized, self.listed, self.keyed, self.free = (weights(8, 8) for _ in range(5))
        self.marked._no_weight_decay = True
        self.optimized._optim = {"weight_decay": 0.0}

    def no_weight_decay(self):
        return {"listed"}

    def no_weight_decay_keywords(self):
        return {"keye"}

    def forward(self, x):
        return torch.relu(x @ self.marked @ self.optimized @ self.listed @ self.keyed @ self.free) * 2


def test_what_the_model_exempts_from_weight_decay_stays_dense():
    class Sleeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.dream, self.last = Dream(), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.dream(x))

    assert reasons(Sleeper()) == {
        **dict.fromkeys(("dream.marked", "dream.optimized", "dream.listed", "dream.keyed"), "EXEMPT"),
        "dream.free": "MATRIX",
        "last.weight": "HEAD",
        "last.bias": "HEAD",
    }


def unreadable(**params: nn.Parameter) -> nn.Module:
    """A module whose code has no source."""
    namespace: dict = {"nn": nn}
    exec("class Sealed(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    module = namespace["Sealed"]()
    for name, param in params.items():
        module.register_parameter(name, param)
    return module


def test_without_code_shapes_and_names_decide_and_the_log_names_what_was_taken(caplog):
    model = nn.Sequential(
        nn.Linear(8, 8),
        unreadable(
            plain=weights(8, 8), stacked=weights(3, 8, 8), flat=weights(1, 8, 8), thin=weights(8, 1),
            query_tokens=weights(4, 8), A_log=weights(8, 4), time_mix=weights(2, 8), pos=weights(4, 8),
            rel_pos_h=weights(4, 8), logit_scale=weights(2, 8), probe=weights(2, 8),
        ),
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "lp_dist"):
        assert decayed_names(model) == {"0.weight", "1.plain", "1.stacked"}
    assert "1.plain (Sealed), 1.stacked (Sealed); names= chooses otherwise" in caplog.text
    assert choices(model)["1.plain"].reason == Reason.FOREIGN_MATRIX


def test_matrices_of_other_classes_are_named_once_for_all_layers(caplog):
    with caplog.at_level(logging.INFO, "lp_dist"):
        decayed_names(Stack())
    assert "decay too: storeys.*.khan (Kubla); names=" in caplog.text and caplog.text.count("khan") == 1


def test_what_peft_trains_beside_stays_dense_and_nothing_but_that_is_refused():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"model_type": "base"}
            self.low, self.high, self.words = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(9, 8)
            self.tail = nn.Linear(8, 3)

        def forward(self, ids):
            return self.tail(self.high(self.low(self.words(ids))))

    config = peft.LoraConfig(target_modules=["low"], modules_to_save=["tail", "high"])
    model = peft.get_peft_model(Base(), config)
    trained = {name: c for name, c in choices(model).items() if model.get_parameter(name).requires_grad}
    assert {name for name in trained if "modules_to_save" in name and "weight" in name}, "peft's layout has changed"
    assert {choice.reason for choice in trained.values()} == {Reason.ADAPTER}
    with pytest.raises(ValueError, match="only adapters are trained"):
        decayed_names(model)


def test_weights_that_are_computed_stay_dense():
    class Mirrored(nn.Module):
        def __init__(self):
            super().__init__()
            self.gilded, self.other = weights(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.other(F.linear(x, self.gilded - self.gilded.mean())) + 1

    assert reasons(Mirrored())["gilded"] == "COMPUTED"


class Marked(nn.Module):
    """Products with what is no matrix by its name, or not only; and a matrix beside a tensor that is called alike."""

    def __init__(self):
        super().__init__()
        self.mode_router, self.rel_pos, self.codebook = nn.Linear(8, 8), weights(5, 8), weights(5, 8)
        self.seg_embed = weights(2, 8)
        self.shared, self.up_proj = weights(8, 8), weights(8, 8)
        self.up = torch.ones(2)

    def forward(self, x):
        x = self.mode_router(x) @ self.up_proj
        shared = self.shared + 1.0
        return torch.relu(x @ self.shared + x @ shared), x @ self.rel_pos.T, x @ self.codebook.T, x @ self.seg_embed.T


def test_names_decide_where_use_does_not():
    assert reasons(Stack(Marked)) == {
        f"storeys.{i}.{name}": reason
        for i in (0, 1)
        for name, reason in {
            "mode_router.weight": "ROUTER",
            "mode_router.bias": "ROUTER",
            "rel_pos": "NO_MATRIX",
            "codebook": "NO_MATRIX",
            "seg_embed": "NO_MATRIX",
            "shared": "COMPUTED",
            "up_proj": "MATRIX",
        }.items()
    }


class Placed(nn.Module):
    """A bias of attention from positions, by a layer and by a small network; a layer of what comes in is a matrix."""

    def __init__(self):
        super().__init__()
        self.mix, self.pos_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.rel_pos_x_bias = nn.Linear(8, 8, bias=False)
        self.continuous_position_bias_net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x, places):
        bias = self.rel_pos_x_bias(F.one_hot(places, 8).float()) + self.continuous_position_bias_net(places.float())
        return self.mix(self.pos_proj(x)) + bias


def test_a_layer_that_makes_a_bias_of_positions_stays_dense():
    chosen = reasons(nn.ModuleDict({"a": Placed(), "b": nn.Linear(8, 3)}))
    assert chosen["a.rel_pos_x_bias.weight"] == "TOKEN"
    assert {chosen[f"a.continuous_position_bias_net.{i}.weight"] for i in (0, 2)} == {"TOKEN"}
    assert chosen["a.pos_proj.weight"] == chosen["a.mix.weight"] == "MATRIX"


def test_the_rules_are_the_same_on_the_meta_device():
    for model in (Stack(type("Block", (Bare, Ranked, Porlock), {})), Kubla(), Alph()):
        assert choices(model) == choices(model.to("meta"))


class Steered(nn.Module):
    """A vector that grows with the input is none by a later reason: the first rule decides."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, x):
        return x @ self.table.weight


def test_an_embedding_stays_one_where_it_is_multiplied_too():
    assert choices(Steered())["table.weight"] == Choice(False, Reason.EMBEDDING)
    assert matrix_names(Steered(), include_embeddings=True) == {"table.weight"}


@pytest.mark.parametrize("first", ["table", "layer"])
def test_an_embedding_that_is_tied_to_a_layer_stays_one(first):
    class Mirrored(nn.Module):
        def __init__(self):
            super().__init__()
            modules = {"table": nn.Embedding(5, 8), "layer": nn.Linear(8, 5)}
            self.before, self.after = nn.ModuleList([modules.pop(first)]), nn.ModuleList(modules.values())
            self.after[0].weight = self.before[0].weight
            self.deep = Kubla()

    assert choices(Mirrored())["before.0.weight"] == Choice(False, Reason.EMBEDDING)
