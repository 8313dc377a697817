"""The figures of a report: the numbers that they show are the report's, and what there is nothing for is not drawn."""

from __future__ import annotations

import math
import re
import struct
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex

from helpers import reports as cases
from lp_dist.report import canvas, figures

ALL = ["loss", "perplexity", "sparsity", "lambda", "heat", "weights"]


def drawn(of: dict) -> dict:
    return {drawing.name: figure for drawing in figures.DRAWINGS if (figure := drawing.draw(of)) is not None}


@pytest.fixture(scope="module")
def figure() -> dict:
    """Of the full report, by name."""
    return drawn(cases.full())


def curves(figure) -> dict[str, dict[float, float]]:
    """Lines by their label."""
    return {line.get_label(): dict(zip(*map(list, line.get_data()))) for line in figure.axes[0].lines}


def shade(figure) -> tuple[float, float]:
    (patch,) = [patch for patch in figure.axes[0].patches if patch.get_label() == "decay"]
    # A polygon up to matplotlib 3.8, and a rectangle since.
    edges = patch.get_patch_transform().transform(patch.get_path().vertices)[:, 0]
    return edges.min(), edges.max()


def only(key: str, of: dict, most: int) -> dict:
    """With the first `most` entries of its log that have the key."""
    kept = [entry for entry in of["log"] if key in entry][:most]
    return of | {"log": [entry for entry in of["log"] if key not in entry or entry in kept]}


@pytest.mark.parametrize(
    "of, names",
    [
        (cases.full(), ALL),
        (cases.stopped(), ALL),
        (cases.bare(), ALL[:4]),
        (cases.dense(), ["loss", "perplexity", "weights"]),
        (cases.by_lambda(), ["loss", "perplexity", "sparsity", "heat", "weights"]),
        (only("eval_perplexity", cases.full(), 1), [name for name in ALL if name != "perplexity"]),
        (only("eval_perplexity", cases.by_lambda(), 1), ["loss", "heat", "weights"]),
        (only("loss", cases.full(), 1), ["perplexity", "sparsity", "heat", "weights"]),
        (cases.full() | {"log": []}, ["heat", "weights"]),
    ],
    ids=["full", "stopped", "bare", "dense", "λ", "one evaluation", "λ, one evaluation", "one logged step", "no log"],
)
def test_what_there_is_nothing_for_is_left_out(of, names):
    assert list(drawn(of)) == names


def test_curves_are_the_log_s(figure):
    assert curves(figure["loss"]) == {
        "this run": {4: 2.75, 8: 2.5, 12: 2.25, 16: 2.0},
        "dense fine-tune": {4: 2.5, 16: 2.0},
    }
    lines = curves(figure["perplexity"])
    assert lines["this run"] == {0: 20.0, 4: 18.0, 8: 16.0, 12: 14.0, 16: 12.0} and lines["dense fine-tune"] == {
        0: 20.0,
        16: 11.25,
    }
    assert set(lines["before"].values()) == {20.0}
    assert curves(figure["sparsity"]) == {
        "counted": {4: 0.08, 8: 0.24, 12: 0.3, 16: 0.3},
        "planned": {4: 0.1, 8: 0.25, 12: 0.3, 16: 0.3},
        "at evaluations": {0: 0.0, 4: 0.08, 8: 0.24, 12: 0.3, 16: 0.3},
    }
    assert all(shade(figure[name]) == (2, 12) for name in ALL[:4])
    assert curves(figures.loss(cases.full() | {"reference": cases.full()["reference"] | {"zeros": 3}})).keys() == {
        "this run",
        "compared run",
    }


def test_lambda_is_shown_in_its_window_and_where_something_was_to_be_pruned(figure):
    axes = figure["lambda"].axes[0]
    assert dict(zip(*map(list, axes.lines[0].get_data()))) == {
        4: 1e-4,
        8: 2e-4,
    }  # 1e-30 at 12; 16 is beyond the window
    (band,) = axes.collections
    assert {(x, y) for x, y in band.get_paths()[0].vertices.tolist()} == {(4, 5e-5), (4, 2e-4), (8, 1e-4), (8, 4e-4)}
    assert axes.get_yscale() == "log" and axes.get_xlim()[1] > 16


def test_weights_near_zero_are_shown_where_they_are_not_zero_yet():
    log = [
        entry | ({"lp/near_zero": 0.2} if entry.get("lp/measured") == 0.08 else {}) for entry in cases.full()["log"]
    ]
    assert curves(figures.sparsity(cases.full() | {"log": log}))["near zero"] == {4: 0.2, 8: 0.24, 12: 0.3, 16: 0.3}


def test_a_run_that_was_stopped_is_shaded_to_its_end():
    assert shade(figures.loss(cases.stopped())) == (2, 8)
    with pytest.raises(ValueError, match="not enough values"):
        shade(figures.loss(cases.stopped() | {"window": [9, 12]}))


@pytest.mark.parametrize("word", ["nan", "inf"])
def test_numbers_that_a_report_has_as_text_are_gaps(word):
    of = cases.full()
    for entry in of["log"]:
        if entry["step"] == 12:
            entry.update({key: word for key in entry if key != "step"})
    of["perplexity_before"] = word
    figure = drawn(of)
    assert list(figure) == ALL and "before" not in curves(figure["perplexity"])
    assert math.isnan(curves(figure["loss"])["this run"][12]) and curves(figure["loss"])["this run"][16] == 2.0
    for entry in of["log"]:
        entry.update({key: word for key in entry if key != "step"})
    assert list(drawn(of)) == ["heat", "weights"]
    assert all(canvas.svg(name, figure[name]) for name in ALL[:4])


def test_of_many_logged_values_means_are_shown():
    log = [
        {"loss": float(step % 2) if step > 2 else math.nan, "step": step}
        for step in range(1, 2 * figures.MAX_POINTS + 2)
    ]
    means = figures.points(log, "loss")
    assert figures.values_per_point(log, "loss") == 3 and len(means) == math.ceil(len(log) / 3)
    assert means[3] == 1.0 and means[6] == 1 / 3 and means[9] == 2 / 3 and max(means) == len(log)
    assert "Means of 3 logged values" in figures.DRAWINGS[0].caption(cases.full() | {"log": log})
    assert "50 % of it comes from the teacher" in figures.DRAWINGS[0].caption(
        cases.full() | {"decay": {"teacher": "runs/dense", "distill": 0.5}}
    )


def test_the_heat_map_has_the_shares_of_the_report(figure):
    axes, _ = figure["heat"].axes
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array(), [[8 / 16, 12 / 16], [8 / 32, 16 / 32], [4 / 32, 0.0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "q_proj",
        "up_proj",
        "down_proj",
    ] and axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert {text.get_text(): text.get_position() for text in axes.texts}["75.0 %"] == (1.5, 0.5)
    assert mesh.get_clim() == (0.0, 0.75)


def test_layers_are_few_or_many_and_some_weights_belong_to_none():
    name = "model.layers.{}.{}.weight"
    layers, kinds, shares = figures.zero_shares(
        {
            **{
                name.format(layer, f"mlp.experts.{expert}.up_proj"): [layer * expert, 10]
                for layer in (0, 10, 2)
                for expert in (0, 1)
            },
            name.format(2, "mlp.c_proj"): [4, 8],
            name.format(2, "attn.c_proj"): [2, 8],
            "lm_head.weight": [1, 4],
        }
    )
    nan = math.nan
    assert layers == [0, 2, 10, None] and kinds == ["up_proj", "mlp.c_proj", "attn.c_proj", "lm_head"]
    np.testing.assert_array_equal(
        shares, [[0.0, 0.1, 0.5, nan], [nan, 0.5, nan, nan], [nan, 0.25, nan, nan], [nan, nan, nan, 0.25]]
    )
    many = {
        name.format(layer, f"part.{'very_long_' * 3}{kind}"): [layer, 100] for layer in range(80) for kind in "abc"
    } | {"head.weight": [1, 2]}
    axes = figures.heat(cases.full() | {"tensors": many}).axes[0]
    assert len(axes.get_xticks()) <= 9 and not axes.texts and axes.collections[0].get_array().shape == (4, 81)
    assert max(len(label.get_text()) for label in axes.get_yticklabels()) <= 20


def test_areas_of_the_histogram_are_shares_of_the_weights(figure):
    figure = figure["weights"]
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    steps = {
        when: [outline.get_data() for outline in outlines if to_hex(outline.get_edgecolor()) == canvas.COLOURS[colour]]
        for when, colour in (("before", "muted"), ("after", "primary"))
    }
    area = {
        label: [float(np.sum(outline.values * np.diff(np.log2(outline.edges)))) for outline in drawn_steps]
        for label, drawn_steps in steps.items()
    }
    assert area["before"] == pytest.approx([1.0])  # no zeros, no bar
    assert area["after"] == pytest.approx([112 / 160, 48 / 160])
    assert steps["after"][1].edges[1] < steps["after"][0].edges[0] == 0.125
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["before, 0.0 % zeros", "after, 30.0 % zeros"]
    assert "0" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_as_svg_they_are_complete_take_the_page_s_colours_and_do_not_disturb_each_other(figure):
    ids: set[str] = set()
    for name in ALL:
        text = canvas.svg(name, figure[name])
        root = ElementTree.fromstring(text)
        own_ids = [node.get("id") for node in root.iter() if node.get("id")]
        assert own_ids and not set(own_ids) & ids and len(own_ids) == len(set(own_ids))
        ids |= set(own_ids)
        wanted = {in_url or in_href for in_url, in_href in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)}
        assert wanted <= ids and "href" not in re.sub(r'href="#|xmlns:xlink', "", text), "what is referred to is there"
        assert (
            "<style" not in text
            and "font-family" not in text
            and "<?xml" not in text
            and root.get("width") is None
            and root.get("viewBox")
        )
        assert not any(colour in text for colour in canvas.COLOURS.values()) and (
            "var(--primary)" in text or name == "heat"
        )
        assert len(re.findall("<text ", text)) == len(re.findall(r"<text [^>]*fill: (?:var\(--|#)", text)), (
            "what has no colour is black in the dark"
        )


def test_the_same_report_gives_the_same_bytes(tmp_path):
    first, second = (drawn(cases.full()) for _ in range(2))
    assert all(canvas.svg(name, first[name]) == canvas.svg(name, second[name]) for name in ALL)
    for name, of in (("a", first), ("b", second)):
        canvas.png(of["loss"], tmp_path / name)
    picture = (tmp_path / "a").read_bytes()
    assert picture == (tmp_path / "b").read_bytes() and picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1200, 840)  # 300 dots an inch


def test_perplexities_far_apart_have_a_log_axis(figure):
    far = [entry | ({"eval_perplexity": 1e9} if entry["step"] == 0 else {}) for entry in cases.full()["log"]]
    assert (
        figures.perplexity(cases.full() | {"log": far}).axes[0].get_yscale() == "log"
        and figure["perplexity"].axes[0].get_yscale() == "linear"
    )


def test_every_colour_has_one_for_the_dark_and_is_there_once():
    assert canvas.COLOURS.keys() == canvas.DARK.keys() and len(set(canvas.COLOURS.values())) == len(canvas.COLOURS)


def test_powers_of_ten():
    assert [canvas.power(x) for x in (1e-5, 2e-5, 1.0, 5e3, 1e-10)] == ["10⁻⁵", "2·10⁻⁵", "10⁰", "5·10³", "10⁻¹⁰"]
