"""The bench's page: tables, plots and names, of rows that are made up."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_hex

from helpers.quality import LINES, SPARSITY, STEPS, tiny
from lp_dist.benchmarks.quality import methods, page, runs, tasks
from lp_dist.benchmarks.quality.methods import Spec


@pytest.fixture
def rows():
    """One of each method, as they are read from a file; each has a loss of its own."""
    planned = runs.planned_rows(tiny(), map(Spec.read, LINES), [SPARSITY], [0])
    results = {
        "loss before": 3.0,
        "zeros": SPARSITY,
        "weights": 1000,
        "seconds": 1.0,
        "machine": "a CPU",
        "threads": 1,
        "versions": {},
    }
    return [json.loads(json.dumps({**row, **results, "loss": 2 + i / 16})) for i, row in enumerate(planned)]


def test_the_page_has_every_method_and_a_plot(rows, tmp_path):
    measured = rows
    other = {**measured[-1], "seed": 1, "loss": measured[-1]["loss"] + 0.5}
    assert "![" not in page.draw(measured, tmp_path).read_text() and not list(tmp_path.glob("*.png")), (
        "one sparsity is no curve"
    )
    other_sparsity = {**measured[-1], "sparsity": 0.95}
    text = page.draw([*measured, other, other_sparsity], tmp_path).read_text()
    assert (tmp_path / f"quality-tiny-{STEPS}.png").stat().st_size > 10_000
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 * 2 + len(LINES) and sum("GMP by \\|w\\| " in line for line in lines) == 1
    assert f"{measured[-1]['loss'] + 0.25:.3f} ± 0.250 | {measured[-1]['loss']:.3f} | 2 |" in text, (
        "mean and half of the range"
    )
    assert "diverged" in page.format_losses([1.0, None], False) and page.format_losses([2.0], True) == "2.000 (7.39)"


def test_tasks_of_one_name_and_length_have_sections_called_by_what_differs(rows, tmp_path):
    measured = [row for row in rows if row["method"] in ("dense", "lp")]
    measured.append({**measured[-1], "sparsity": 0.95})
    task = measured[0]["task"]
    another = [{**row, "task": {**task, "text": f"other.txt, 5 tokens{tasks.HELD_OUT}"}} for row in measured]
    unwarmed = [
        {**row, "task": {**task, "schedule": {**task["schedule"], "warmup": 0}}, "device": "NVIDIA H200"}
        for row in measured
    ]
    text = page.draw([*measured, *another, *unwarmed], tmp_path).read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## tiny, {STEPS} steps, counting, schedule warmup 2",
        f"## tiny, {STEPS} steps, other.txt, 5 tokens, schedule warmup 2",
        f"## tiny, {STEPS} steps, counting, schedule warmup 0, NVIDIA H200",
    ]
    assert len(set(tmp_path.glob("quality-*.png"))) == 3 and text.count("| lp_dist, survivors stay | ") == 3


def test_no_two_lines_of_a_plot_look_alike(rows):
    row = rows[-1]
    lines = [
        {
            **row,
            "method": method,
            "settings": Spec.read(method).settings,
            "sparsity": sparsity * (method != "dense"),
            "loss": 2 + sparsity + i + 50 * method.startswith(("wanda", "pat")),
        }
        for i, method in enumerate(["dense", *page.DRAWN])
        for sparsity in (0.5, 0.9)
    ]
    (axes,) = page.draw_figure("all", lines).axes
    drawn = {
        line.get_label(): (to_hex(line.get_color()), line.get_linestyle(), line.get_linewidth()) for line in axes.lines
    }
    assert set(drawn) == {page.name_of(method) for method in ("dense", *page.DRAWN)} and len(
        set(drawn.values())
    ) == len(drawn)
    for black in page.LP_STYLES:
        (axes_of_another,) = page.draw_figure(
            "all", [{**line, "loss": 2.0} if line["method"] == black else line for line in lines]
        ).axes
        styles = {
            (to_hex(line.get_color()), line.get_linestyle(), line.get_linewidth()) for line in axes_of_another.lines
        }
        assert len(styles) == len(drawn), "nor where another form of lp_dist is the black one"
    greys = [
        page.name_of(method)
        for method in page.DRAWN
        if len({drawn[page.name_of(method)][0][i : i + 2] for i in (1, 3, 5)}) == 1
    ]
    assert greys == [page.name_of(method) for method in page.DRAWN if method.startswith("lp")], (
        "lp_dist, and nothing else"
    )
    better = {
        **lines[0],
        "method": "dense:lr=0.5",
        "settings": Spec.read("dense:lr=0.5").settings,
        "sparsity": 0.0,
        "loss": 0.5,
    }
    dense = {
        line.get_label(): line.get_ydata()[0] for line in page.draw_figure("all", [*lines, better]).axes[0].lines
    }["dense"]
    assert dense == 0.5, "it has the best of its rates as well"
    low, high = axes.get_ylim()
    assert low < 2.5 and 3.9 + page.DRAWN.index("lp") < high < 50, (
        "of dense, GMP and lp_dist; what is far worse would flatten them"
    )


def test_the_form_of_lp_dist_that_is_lowest_most_often_is_black(rows):
    losses = {
        "lp": (3.0, 3.0, 3.0),
        "lp:precondition=0.5": (2.0, 2.9, 3.5),
        "lp:latent_windows=0": (1.0, 3.5, 3.5),
        "gmp": (0.5, 0.5, 0.5),
    }
    made_up = [
        {**rows[-1], "method": method, "settings": Spec.read(method).settings, "sparsity": sparsity, "loss": loss}
        for method, of_method in losses.items()
        for sparsity, loss in zip((0.5, 0.7, 0.9), of_method)
    ]

    def black(made_up):
        (axes,) = page.draw_figure("", made_up).axes
        return [line.get_label() for line in axes.lines if to_hex(line.get_color()) == "#000000"]

    assert black(made_up) == ["lp_dist, no latent weights"], "each is lowest once, and this is the first of them"
    higher = [
        {**row, "loss": 2.5} if row["method"] == "lp:precondition=0.5" and row["sparsity"] == 0.9 else row
        for row in made_up
    ]
    assert black(higher) == ["lp_dist, γ = ½"]
    faster = {**made_up[0], "method": "lp:lr=0.5", "settings": Spec.read("lp:lr=0.5").settings}
    assert black([*made_up, *({**faster, "sparsity": sparsity, "loss": 0.9} for sparsity in (0.7, 0.9))]) == [
        "lp_dist, survivors stay"
    ], "at its best rate"
    assert black([row for row in made_up if row["method"] == "gmp"]) == []


def test_each_device_and_each_length_of_run_has_a_section_of_its_own(rows, tmp_path):
    measured = [row for row in rows if row["method"] in ("dense", "gmp", "lp")]
    measured.append({**measured[-1], "sparsity": 0.95})
    gpu = [{**row, "device": "NVIDIA H200", "loss": row["loss"] + 1} for row in measured]
    longer = [{**row, "task": {**row["task"], "schedule": {**row["task"]["schedule"], "steps": 4000}}} for row in gpu]
    assert len({runs.key_of(row) for row in [*measured, *gpu, *longer]}) == 3 * len(measured)
    assert runs.key_of({key: value for key, value in measured[0].items() if key != "device"}) == runs.key_of(
        measured[0]
    ), "rows of before are of CPUs"
    text = page.draw([*measured, *gpu, *longer], tmp_path).read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## tiny, {STEPS} steps",
        f"## tiny, {STEPS} steps, NVIDIA H200",
        "## tiny, 4,000 steps, NVIDIA H200",
    ]
    pictures = [
        f"quality-tiny-{STEPS}.png",
        f"quality-tiny-{STEPS}-nvidia-h200.png",
        "quality-tiny-4000-nvidia-h200.png",
    ]
    assert all(f"![loss against sparsity]({name})" in text and (tmp_path / name).exists() for name in pictures)
    of_lp = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| lp_dist, survivors stay |")]
    assert of_lp == [
        f"{next(row['loss'] for row in group if row['method'] == 'lp'):.3f}" for group in (measured, gpu, longer)
    ]


def test_tables_are_of_what_is_compared_of_forms_and_of_the_rest(rows):
    measured, lr = rows, "lp:lr=0.5"
    a_form = Spec.from_settings("lp", Spec.read(methods.FORMS[0]).settings).line
    titles = {
        title: [cells[0] for cells in lines]
        for title, lines in page.tables([*measured, {**measured[-1], "method": lr}]).items()
    }
    assert list(titles) == ["", page.TUNED, page.OTHERS_TITLE] and page.name_of(lr) in titles[page.OTHERS_TITLE]
    more = [
        {**measured[-1], "method": method} for method in (a_form, "lp:latent_windows=0")
    ]  # the second is compared, and a form as well
    titles = {title: [cells[0] for cells in lines] for title, lines in page.tables([*measured, *more]).items()}
    assert (
        titles[page.FORMS_TITLE][1:] == [page.name_of(a_form), "lp_dist, no latent weights"]
        and "lp_dist, no latent weights" in titles[""]
    )
    assert page.name_of("gmp") in titles[""] and page.name_of("gmp") not in titles[page.FORMS_TITLE]
    assert list(page.tables([{**measured[-1], "method": lr}])) == [page.OTHERS_TITLE], (
        "nothing that is compared was run"
    )


def test_each_method_is_shown_at_the_best_of_its_learning_rates(rows):
    lp_row = {**next(row for row in rows if row["method"] == "lp"), "sparsity": 0.5}
    losses = {
        ("lp", 0): 1.0,
        ("lp", 1): 3.0,
        ("lp:lr=0.5", 0): 1.5,
        ("lp:lr=0.5", 1): 2.0,
        ("lp:lr=0.7", 0): 1.2,
        ("gmp", 0): 0.5,
    }
    measured = [{**lp_row, "method": method, "seed": seed, "loss": loss} for (method, seed), loss in losses.items()]
    title = page.TUNED
    columns, *cells = page.tables(measured)[title]
    assert columns == ["method", "50%", "learning rates, and windows"]
    assert cells == [["lp_dist, survivors stay", "1.750 ± 0.250 at 0.5", "0.003; 0.5; 0.7"]], (
        "each is below one other, and two have both seeds; GMP has one rate"
    )
    fewer = [row for row in measured if (row["method"], row["seed"]) != ("lp:lr=0.5", 0)]
    assert page.tables(fewer)[title][1][1] == "2.000 ± 1.000 at 0.003", (
        "two are not above one other, and this one has more seeds"
    )
    lower = [{**row, "loss": 0.9} if row["method"] == "lp:lr=0.7" else row for row in measured]
    assert page.tables(lower)[title][1][1] == "0.900 at 0.7", "with one seed it is below both"
    diverged = [{**row, "loss": None if row["method"] == "lp" else row["loss"]} for row in measured]
    assert page.tables(diverged)[title][1][1] == "1.200 at 0.7"
    lone = [*measured, {**measured[0], "sparsity": 0.9, "loss": 7.0}]
    assert page.tables(lone)[title][1] == [
        "lp_dist, survivors stay",
        "1.750 ± 0.250 at 0.5",
        "7.000 at 0.003",
        "0.003; 0.5; 0.7",
    ]
    falls = [*measured, {**measured[0], "method": "lp:lr=0.5,stable_fraction=0.7", "loss": 0.25}]
    assert page.tables(falls)[title][1] == [
        "lp_dist, survivors stay",
        "0.250 at 0.5, stable until 0.7",
        "0.003; 0.5; 0.5, stable until 0.7; 0.7",
    ]
    windows = [
        *falls,
        {**measured[0], "method": "lp:end=0.8,lr=0.5,stable_fraction=0.7", "loss": 0.2},
        {**measured[0], "method": "lp:end=0.9", "loss": 0.3},
    ]
    assert page.tables(windows)[title][1] == [
        "lp_dist, survivors stay",
        "0.200 at 0.5, stable until 0.7, window to 0.8",
        "0.003; 0.003, window to 0.9; 0.5; 0.5, stable until 0.7; 0.5, stable until 0.7, window to 0.8; 0.7",
    ]
    starts = [
        *measured,
        *(
            {**measured[0], "method": f"lp:{window}", "loss": loss}
            for window, loss in (("start=0", 0.2), ("start=0.4", 0.1), ("end=0.9,start=0.4", 0.3))
        ),
    ]
    assert page.tables(starts)[title][1] == [
        "lp_dist, survivors stay",
        "0.100 at 0.003, window from 0.4",
        "0.003; 0.003, window from 0; 0.003, window from 0.4; 0.003, window from 0.4 to 0.9; 0.5; 0.7",
    ]
    assert title not in page.tables([row for row in measured if "lr" not in row["method"]])


def test_a_method_has_a_name_for_people():
    assert page.name_of("gmp:c=0.33") == "GMP by |w|·(√v̂)^⅓" and page.name_of("gmp:c=0.5") == "gmp:c=0.5"
    assert page.name_of("lp:distill=0.5,lr=0.002") == "lp_dist, survivors stay, learning rate 0.002, distilled by 0.5"
    assert page.name_of("gmp:stable_fraction=0.7") == "GMP by |w|, stable until 0.7"
    named = {line for lines in methods.METHOD_SETS.values() if lines is not methods.FORMS for line in lines}
    assert all(page.name_of(line) != line for line in {*named, *page.DRAWN} - {"dense"})


def test_a_row_is_called_by_what_differs_from_the_defaults_of_now(rows, tmp_path):
    measured = rows
    lp = next(row for row in measured if row["method"] == "lp")
    old = {**lp, "settings": {**lp["settings"], "update_every": 7}, "loss": 9.0}  # from when another default held
    same = runs.planned_rows(tiny(), [Spec.read("lp:curve=cubic,end=0.7")], [SPARSITY], [0])[0]
    assert runs.key_of(old) != runs.key_of(lp) == runs.key_of(same)
    assert runs.key_of({**lp, "settings": {**lp["settings"], "precondition": 1}}) == runs.key_of(lp), "1 is 1.0"
    lines = page.draw([*measured, old], tmp_path).read_text().splitlines()
    assert sum("lp:update_every=7 | 9.000" in line for line in lines) == 1 and len(lines) == 1 + len(
        page.draw(measured, tmp_path).read_text().splitlines()
    )
