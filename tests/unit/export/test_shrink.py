"""`export --shrink`: what is dead is gone, what stays is bit for bit what it was, and plain from_pretrained loads a
model that says the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from helpers.architectures import ARCHITECTURES
from helpers.export_runs import llama
from helpers.families import FAMILIES, GROUPED, model_of, slots
from helpers.families import kill as kill_groups
from helpers.model_directories import FORMS, rewritten, written
from lp_dist.cli import app
from lp_dist.errors import DiffersError, UsageError
from lp_dist.export import shrink
from lp_dist.export.writer import export
from lp_dist.report.schema import FILE
from lp_dist.structured import widths
from lp_dist.structured.budget import groups_to_prune
from lp_dist.structured.removal import foreseen_removals
from lp_dist.structured.resolve import recognised_groups, resolve_groups
from lp_dist.targets.group_controller import group_budget
from lp_dist.targets.target import SparsityTarget

TOKENS = torch.arange(24).view(2, 12) % 61
# By family: the key of the feed-forward width, and whether the size of a head is a key of its own, so that there can
# be fewer heads.
KEYS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"), ("intermediate_size", True)
    ),
    "mixtral": (None, True),
    "gpt_neox": ("intermediate_size", False),
    "gpt2": ("n_inner", False),
    "opt": ("ffn_dim", False),
    "bert": ("intermediate_size", False),
    "olmo2": ("intermediate_size", None),
    "falcon": ("ffn_hidden_size", None),
}


GEMMA3N = {
    **GROUPED,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 12,
    "laurel_rank": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}


def kill(model: nn.Module, kind: str, *layers: list[int]) -> dict[tuple[str, int], list[int]]:
    """Zeroes what reads these groups of each layer, and nothing else of theirs. Gives the indices that belong to them,
    by parameter and dimension.
    """
    indices: dict[tuple[str, int], list[int]] = {}
    for groups, dead in zip(resolve_groups(model, kind), layers):
        for group in dead:
            for slot in slots(model, groups, group, reads=True):
                slot.zero_()
            for member in groups.members:
                start = member.start + group * member.width
                indices.setdefault((member.name, member.dim), []).extend(range(start, start + member.width))
    return indices


def logits(model: nn.Module) -> torch.Tensor:
    """In double precision: in fp32 the sums of a smaller matrix differ by some last bits, by the processor."""
    model.config._experts_implementation = "eager"  # torch's grouped product knows no doubles
    with torch.no_grad():
        return model.double().eval()(TOKENS).logits


def loaded(directory: Path) -> nn.Module:
    """Loaded by plain from_pretrained, with nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def save(model: nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", KEYS)
def test_what_is_dead_is_gone_and_the_rest_says_the_same(family, tmp_path):
    model, (key, sized), gone, saved = model_of(family), KEYS[family], {}, 0
    if key:
        gone |= kill(model, "channels", [3, 17, 30, 40], [17, 18, 19, 40])
        kill(
            model, "channels", [], [1]
        )  # one more in layer 1; the layers have one width, so the first of its dead ones stays
        saved += sum(4 * groups.elements for groups in resolve_groups(model, "channels"))
    half = FAMILIES[family][1][2] // 2
    if half:
        heads = kill(model, "kv_groups", [*range(half)], [*range(half, 2 * half)])
        gone |= heads if sized else {}
        saved += sum(half * groups.elements for groups in resolve_groups(model, "kv_groups")) if sized else 0
    (save(model, tmp_path / "masked") / FILE).write_text("{}")
    done = export(tmp_path / "masked", tmp_path / "out", shrink=True, verify=True)
    assert not (tmp_path / "out" / FILE).exists(), "it tells of the model before it was shrunk"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("masked", "out"))
    assert (
        before.keys() == after.keys()
        and sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in after.values()) == 4 * saved
    )
    for name, tensor in before.items():
        wanted = tensor.numpy()
        for dim in range(tensor.ndim):
            wanted = np.delete(wanted, gone.get((name, dim), []), axis=dim)
        assert wanted.shape == after[name].shape and wanted.tobytes() == after[name].numpy().tobytes(), name
    model, small = loaded(tmp_path / "masked"), loaded(tmp_path / "out")
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-6)
    assert (
        done.verification["logits"] and done.verification["difference"] <= 1e-6 < done.verification["rounding"] < 1e-4
    )
    generated = [
        network.generate(TOKENS[:1, :4], max_new_tokens=6, do_sample=False, use_cache=True)
        for network in (model, small)
    ]
    assert torch.equal(*generated) and generated[0].shape == (1, 10)
    config = config_of(tmp_path / "masked")
    changes = {name: value for name, value in config_of(tmp_path / "out").items() if config.get(name) != value}
    stated = {"head_dim": 8} if sized and config.get("head_dim") is None else {}
    fewer = {"num_attention_heads": 2, "num_key_value_heads": 1, **stated} if sized else {}
    assert changes == ({key: FAMILIES[family][1][0] - 4} if key else {}) | fewer
    stays = [str(removal) for removal in done.shrink_plan.removals if not removal.removed]
    assert len(stays) == (sized is False)
    assert all(
        re.match(
            "4 of 8 attention heads are dead and stay: .* and with fewer the config makes a model of other ones, not"
            " of these$",
            message,
        )
        for message in stays
    )
    assert done.bytes_dense == sum(t.nbytes for t in before.values())


def test_what_a_target_for_groups_takes_to_zero_is_what_goes(tmp_path):
    from lp_dist import LpAdamW, SparsityTarget, attach

    model = model_of("llama", tie_word_embeddings=True)
    optimizer = LpAdamW(model.parameters(), lr=3e-3)
    attached = attach(model, optimizer, target=SparsityTarget(0.5, groups=["channels", "kv_groups"]), total_steps=30)
    for _ in range(30):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step()
    done = export(save(model, tmp_path / "sparse"), tmp_path / "out", shrink=True, verify=True)
    assert [str(removal) for removal in done.shrink_plan.removals] == [
        "48 of 96 feed-forward channels are dead, 48 are removed: 48 → 24 in each of 2 layers",
        "2 of 4 groups of 2 attention heads are dead, 2 are removed: 2 → 1 in each of 2 layers",
    ]
    assert sum(zeros for zeros, _ in done.counts.values()) == 0
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)


def test_dead_heads_beyond_complete_groups_go_where_every_group_loses_as_many(tmp_path):
    """4 heads of queries for each of 2 of keys and values: two go of each, although one group has three dead ones, and
    single ones stay.
    """
    model = model_of("llama", hidden_size=48, num_attention_heads=8)
    gone = kill(model, "heads", [0, 2, 5, 6], [1, 3, 4, 5])
    kill(model, "heads", [], [7])
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    assert [str(removal) for removal in done.shrink_plan.removals] == [
        "9 of 16 attention heads in groups that stay are dead, 8 are removed: 8 → 4 in each of 2 layers; every group"
        " must lose as many, and one of model.layers.0.self_attn has 2 dead ones"
    ]
    before, small = load_file(tmp_path / "masked" / "model.safetensors"), loaded(tmp_path / "out")
    for (name, dim), indices in gone.items():
        assert np.array_equal(
            np.delete(before[name].numpy(), indices, axis=dim), small.get_parameter(name).detach().numpy()
        )
    torch.testing.assert_close(logits(small), logits(loaded(tmp_path / "masked")), rtol=0, atol=1e-6)
    config = config_of(tmp_path / "out")
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 6)


def test_numbers_of_heads_that_a_config_refuses_are_passed_over(tmp_path):
    model = model_of(
        "llama", hidden_size=48, num_attention_heads=8, num_key_value_heads=8
    )  # its width is to be a multiple of their number
    kill(model, "kv_groups", [0, 1, 6], [2, 3, 4, 5, 7])
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    assert [str(removal) for removal in done.shrink_plan.removals] == [
        "8 of 16 attention heads are dead, 4 are removed: 8 → 6 in each of 2 layers; all layers have one number,"
        " model.layers.0.self_attn needs 5, and the model's configuration takes no number below 6"
    ]
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "masked")), rtol=0, atol=1e-6
    )
    with pytest.raises(
        UsageError,
        match=(
            "can remove nothing: 2 of 8 attention heads are dead and stay: .* needs 3, and the model's configuration "
            "takes no smaller number$"
        ),
    ):
        model = model_of("llama", num_key_value_heads=4)
        kill(model, "kv_groups", [0], [0])
        export(save(model, tmp_path / "none"), tmp_path / "nothing", shrink=True)


def test_where_the_config_has_a_list_each_layer_has_its_own_width(tmp_path):
    """Gemma 3n. Its first layer's channels hang together (a threshold from the mean of all), its last two layers read
    others' keys and values.
    """
    model = model_of("gemma3n_text", **GEMMA3N)
    assert [groups.name for groups in resolve_groups(model, "channels") if groups.name.endswith("mlp")] == [
        f"model.layers.{i}.mlp" for i in (1, 2, 3)
    ]
    for layer, dead in ((0, [5]), (1, [3, 4, 5, 6]), (2, [47]), (3, range(48))):
        model.model.layers[layer].mlp.down_proj.weight.data[:, list(dead)] = 0
    for layer in model.model.layers:  # what is as long as a table of embeddings stays
        layer.per_layer_projection.weight.data[:, 2] = 0
    done = export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True, verify=True)
    assert config_of(tmp_path / "out")["intermediate_size"] == [48, 44, 47, 1]
    assert [str(removal) for removal in done.shrink_plan.removals] == [
        "53 of 144 feed-forward channels are dead, 52 are removed: 48 → 1 to 47 in each of 3 layers",
        (
            "4 of 48 feed-forward channels are dead and stay: no entry of config.json, changed alone, makes them fewer"
            " than 12"
        ),
    ]
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "masked")), rtol=0, atol=1e-6
    )
    export(tmp_path / "masked", tmp_path / "rounded", shrink=True, multiple=10)
    assert config_of(tmp_path / "rounded")["intermediate_size"] == [48, 48, 48, 10]


def half_dead(directory: Path) -> Path:
    """A Llama whose layers need 24 and 20 of 48 channels, its head tied to the embedding."""
    model = model_of("llama", tie_word_embeddings=True)
    kill(model, "channels", list(range(24)), list(range(28)))
    for channel, sign in ((40, 1), (41, -1)):  # alive, with zeros in them as their smallest or largest weights
        weights = model.model.layers[0].mlp.down_proj.weight.data[:, channel]
        weights.abs_().mul_(sign)[3:9] = 0
    return save(model, directory)


@pytest.fixture
def half(tmp_path) -> Path:
    return half_dead(tmp_path / "half")


@pytest.mark.parametrize("multiple, width", [(1, 24), (16, 32), (24, 24), (40, 40)])
def test_the_width_is_rounded_up(half, multiple, width, tmp_path):
    done = export(half, tmp_path / "out", shrink=True, multiple=multiple)
    assert (
        config_of(tmp_path / "out")["intermediate_size"]
        == loaded(tmp_path / "out").model.layers[1].mlp.up_proj.out_features
        == width
    )
    (message,) = map(str, done.shrink_plan.removals)
    rounded = f", rounded up to a multiple of {multiple}" if multiple > 1 else ""
    assert message.startswith(
        f"52 of 96 feed-forward channels are dead, {2 * (48 - width)} are removed: 48 → {width} in each of 2 layers; "
    )
    assert message.endswith(f"all layers have one width, and model.layers.0.mlp needs 24{rounded}")
    assert "lm_head.weight" not in done.counts


@pytest.mark.parametrize(
    "multiple, reason",
    [(48, "needs 24, rounded up to a multiple of 48"), (100, "needs 24, rounded up to a multiple of 100")],
)
def test_it_is_never_more_than_it_was(half, multiple, reason, tmp_path):
    with pytest.raises(
        UsageError, match=f"can remove nothing: 52 of 96 feed-forward channels are dead and stay: .* {reason}"
    ):
        export(half, tmp_path / "out", shrink=True, multiple=multiple)


def test_it_goes_with_dtypes_shards_and_the_bitmask_form(half, tmp_path):
    direct = export(half, tmp_path / "direct", shrink=True, dtype="bfloat16", shard_size="4KB", verify=True)
    packed = export(
        half, tmp_path / "packed", shrink=True, dtype="bfloat16", shard_size="4KB", bitmask=True, verify=True
    )
    again = export(tmp_path / "packed", tmp_path / "again", shard_size="4KB")
    assert {file.name: file.read_bytes() for file in direct.out.iterdir()} == {
        file.name: file.read_bytes() for file in again.out.iterdir()
    }
    assert direct.verification["rounding"] < 1e-4, "logits of weights in bfloat16 are as exact as others"
    assert (
        len(direct.files) > 3 and packed.verification["logits"] is None and loaded(direct.out).dtype == torch.bfloat16
    )
    index = json.loads((direct.out / "model.safetensors.index.json").read_text())
    size = sum(t.nbytes for name in direct.files for t in load_file(direct.out / name).values())
    assert index["metadata"]["total_size"] == size < direct.bytes_dense
    rewritten(
        half, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"][:, :26].clamp_(-1e-9, 1e-9)
    )  # zero in float16 alone
    export(half, tmp_path / "float16", shrink=True, dtype="float16", verify=True)
    assert config_of(tmp_path / "float16")["intermediate_size"] == 22


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_engines_checkpoints_and_what_was_saved_without_its_head(half, tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 5:12] = 0
    written(tmp_path / "forms", model)
    for form in FORMS:
        done = export(tmp_path / "forms" / form, tmp_path / form, shrink=True, verify=True)
        assert [str(removal) for removal in done.shrink_plan.removals] == [
            "14 of 46 feed-forward channels are dead, 14 are removed: 23 → 16 in each of 2 layers"
        ]
        assert load_file(tmp_path / form / "model.safetensors").keys() == dict(model.named_parameters()).keys()
        torch.testing.assert_close(logits(loaded(tmp_path / form)), logits(model), rtol=0, atol=1e-6)
    assert len({(tmp_path / form / "model.safetensors").read_bytes() for form in FORMS}) == 1
    assert config_of(tmp_path / "zero")["intermediate_size"] == 16
    plain = model_of("gpt2")
    kill(plain, "channels", [0], [1])
    save(plain, tmp_path / "gpt2")
    rewritten(
        tmp_path / "gpt2",
        lambda tensors: [
            tensors.update({name.removeprefix("transformer."): tensors.pop(name)}) for name in [*tensors]
        ],
    )
    export(tmp_path / "gpt2", tmp_path / "small", shrink=True, verify=True)
    torch.testing.assert_close(logits(loaded(tmp_path / "small")), logits(plain), rtol=0, atol=1e-6)
    assert load_file(tmp_path / "small" / "model.safetensors")["h.0.mlp.c_fc.bias"].shape == (127,)


def test_widths_that_stand_in_several_places_are_changed_together_or_each_by_itself(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration, CLIPConfig, CLIPModel

    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    for decoder, after in ((32, (29, 29)), (48, (29, 45))):
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=decoder, **sizes)
        )
        kill(model, "channels", *[[0, 4, 9]] * 4)
        export(save(model, tmp_path / f"bart {decoder}"), tmp_path / f"out {decoder}", shrink=True, verify=True)
        config = config_of(tmp_path / f"out {decoder}")
        assert (config["encoder_ffn_dim"], config["decoder_ffn_dim"]) == after
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 64},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )
    kill(model, "channels", *[[0, 4, 9]] * 4)
    export(save(model, tmp_path / "clip"), tmp_path / "out", shrink=True)
    assert [config_of(tmp_path / "out")[key]["intermediate_size"] for key in ("text_config", "vision_config")] == [
        29,
        29,
    ]
    assert CLIPModel.from_pretrained(tmp_path / "out").text_model.encoder.layers[1].mlp.fc1.out_features == 29


def test_a_key_of_the_same_value_that_makes_another_model_is_not_taken(half, tmp_path, monkeypatch):
    model = model_of("llama", vocab_size=48, bos_token_id=0)
    kill(model, "channels", [0], [0])
    monkeypatch.setattr(widths, "_FEED_FORWARD", re.compile("vocab|inter"))
    export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True)
    config = config_of(tmp_path / "out")
    assert (config["intermediate_size"], config["vocab_size"]) == (47, 48)


def test_a_model_of_another_scale_is_not_taken_either(tmp_path, monkeypatch):
    """Llama with the size of a head taken from their number in one place alone, where no shape tells."""
    from transformers.models.llama import modeling_llama

    right = modeling_llama.LlamaAttention.__init__

    def wrong(self: Any, config: Any, layer_idx: int) -> None:
        right(self, config, layer_idx)
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", wrong)
    model = model_of("llama")
    kill(model, "kv_groups", [0], [0])
    with pytest.raises(
        UsageError,
        match=(
            "2 of 4 groups of 2 attention heads are dead and stay: .* with fewer the config makes a model of other"
            " ones"
        ),
    ):
        export(save(model, tmp_path / "masked"), tmp_path / "out", shrink=True)


MAMBA = dict(hidden_size=16, num_hidden_layers=2, vocab_size=61, state_size=4, bos_token_id=0, eos_token_id=0)


def of(family: str, **more: Any) -> Any:
    return lambda directory: save(model_of(family, **more), directory)


def uneven(directory: Path) -> None:
    model = model_of("llama")
    kill(model, "channels", [], [3])
    save(model, directory)


def without_a_config(directory: Path) -> None:
    (save(model_of("llama"), directory) / "config.json").unlink()


def of_other_names(directory: Path) -> None:
    save(model_of("llama"), directory)
    rewritten(directory, lambda tensors: [tensors.update({f"x.{name}": tensors.pop(name)}) for name in [*tensors]])


@pytest.mark.parametrize(
    "make, words",
    [
        (
            of("llama"),
            [
                (
                    "finds nothing to remove: of 96 feed-forward channels and 8 attention heads of LlamaForCausalLM"
                    " none is dead."
                ),
                'groups="channels"',
            ],
        ),
        (
            of("mixtral"),
            ["of 8 attention heads and 16 experts and 768 channels of experts of MixtralForCausalLM none is dead"],
        ),
        (of_other_names, ["the checkpoint's tensors have other names than those of LlamaForCausalLM"]),
        (
            uneven,
            [
                "can remove nothing: 1 of 96 feed-forward channels are dead and stay: all layers have one width, and"
                " model.layers.0.mlp needs 48"
            ],
        ),
        (
            of("mamba", **MAMBA),
            [
                "nothing to look at: no feed-forward channels are recognised in MambaForCausalLM",
                "; no attention heads are",
            ],
        ),
        (without_a_config, ["--shrink rewrites the model's config.json", "--config MODEL"]),
    ],
    ids=["nothing dead", "a mixture", "other names", "uneven", "neither", "no config"],
)
def test_what_can_not_be_shrunk_says_why(make, words, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(UsageError) as caught:
        export(tmp_path / "model", tmp_path / "out", shrink=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists() and "groups_of" not in str(caught.value)


def test_a_multiple_of_nothing_is_refused(half, tmp_path):
    with pytest.raises(UsageError, match="--multiple says what --shrink rounds widths up to"):
        export(half, tmp_path / "out", multiple=8)


def test_verify_tells_of_a_nonzero_channel_that_was_removed_and_of_another_model(half, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            shrink,
            "find_dead",
            lambda weight_groups, *_: {
                groups.label: torch.arange(groups.count) < 30 * (groups.kind == "channels") for groups in weight_groups
            },
        )
        with pytest.raises(
            DiffersError,
            match="layers.0.mlp.down_proj.weight in .*half has other weights than zeros in what was removed from",
        ):
            export(half, tmp_path / "out", shrink=True, verify=True)
    monkeypatch.setattr(
        "lp_dist.export.writer.loadable_config", lambda config, dtype: {**config, "rms_norm_eps": 1e-5}
    )
    with pytest.raises(
        DiffersError, match=r"logits of .* are up to .* away from those of .*half, and rounding explains .*e-05"
    ):
        export(half, tmp_path / "out", shrink=True, verify=True)


def test_the_command_tells_what_went_and_what_stayed(half, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    printed = (
        CliRunner()
        .invoke(app, ["export", str(half), str(tmp_path / "out"), "--shrink", "--multiple", "16", "--verify"])
        .stdout
    )
    assert (
        "52 of 96 feed-forward channels are dead, 32 are removed: 48 → 32 in each of 2 layers; all layers have one"
        " width, and model." in printed
    )
    assert (
        re.search(r"after, shrunk +│ +\d", printed)
        and "what the checkpoint has, without these, bit for bit; 915 logits differ by" in printed
    )


@pytest.mark.parametrize(
    "family, arguments, wanted",
    [
        ("llama", {"groups": ["channels", "kv_groups"]}, [(48, 96), (2, 4)]),
        # Which heads die is not known, and the layers may lose other ones.
        ("llama", {"groups": "heads"}, [(0, 4), (0, 8)]),
        ("gpt2", {"groups": "channels"}, [(128, 256)]),
        ("gpt2", {"groups": "heads"}, [(0, 8)]),
        ("falcon", {"groups": "channels", "scope": "global"}, [(128, 256)]),
        ("qwen3", {"sparsity": None, "budget": 24_288, "groups": "channels"}, [(14, 96)]),
    ],
)
def test_what_can_be_cut_out_is_known_before_a_run(family, arguments, wanted):
    """(gone, all) of each kind; what stays says why."""
    model = model_of(family)
    target = SparsityTarget(**{"sparsity": 0.5, **arguments})
    total = sum(param.numel() for param in model.parameters())
    counts = groups_to_prune(group_budget(target), resolve_groups(model, target.groups), total)
    removals = foreseen_removals(type(model), model.config, counts).removals
    assert [(removal.removed, sum(removal.before)) for removal in removals] == wanted
    assert all(removal.removed or removal.why for removal in removals)
    assert family != "gpt2" or all(
        removal.removed or "makes a model of other ones" in str(removal) for removal in removals
    )


def test_the_program_says_before_the_run_what_will_stay(tmp_path, topics, tiny_model, caplog):
    """Heads of GPT-2 become zero and stay: its configuration has no head size of its own."""
    from transformers import AutoTokenizer

    from lp_dist.report import schema
    from lp_dist.training import finetune

    directory = save(
        model_of("gpt2", vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)), n_positions=64), tmp_path / "gpt2"
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    finetune.main(
        [
            "--model",
            str(directory),
            "--dataset",
            str(topics),
            "--block_size",
            "32",
            "--max_steps",
            "16",
            "--per_device_train_batch_size",
            "2",
            "--use_cpu",
            "true",
            "--report_to",
            "none",
            "--max_eval_blocks",
            "2",
            "--output_dir",
            str(tmp_path / "out"),
            "--groups",
            "heads",
            "--group_sparsity",
            "0.5",
            "--logging_steps",
            "4",
        ]
    )
    said = [record.getMessage() for record in caplog.records]
    at = next(
        i
        for i, line in enumerate(said)
        if "lp-dist export --shrink will not remove these groups" in line and "4 of 8 attention heads" in line
    )
    assert any("Lp decay on" in line for line in said[at:]), "before the decay is attached"
    saved = schema.read(tmp_path / "out")
    measured = [entry["lp/measured"] for entry in saved["log"] if "lp/measured" in entry]
    assert measured[-1] == pytest.approx(saved["sparsity"]) and 0.0 < saved["sparsity"] < 0.3, (
        "of all that may decay, in the log as at the end"
    )


def test_groups_that_the_files_have_together_are_named_where_others_are_cut(tmp_path, caplog):
    """NomicBert's queries, keys and values are one tensor in its files; its channels are not."""
    model = ARCHITECTURES["NomicBertForMaskedLM"].model()
    recognised, _ = recognised_groups(model)
    with torch.no_grad():
        for groups in recognised["channels"]:
            kill_groups(model, groups, range(groups.count // 2))
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "small", shrink=True)
    count = len(recognised["heads"]) + len(recognised["kv_groups"])
    assert f"{count} of {sum(map(len, recognised.values()))} sets of groups are not looked at" in caplog.text
