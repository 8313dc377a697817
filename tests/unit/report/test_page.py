"""The page of a report: complete, of itself, escaped, the same twice; what a report does not have is not on it; and
the command that draws it.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from helpers import reports as cases
from lp_dist import cli
from lp_dist.errors import UsageError
from lp_dist.report import page, schema
from lp_dist.training import finetune

_VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that every element is closed; keeps the elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(" ".join(data.split()))

    def count(self, tag: str) -> int:
        return sum(tag == name for name, _ in self.elements)


@pytest.fixture(scope="module")
def full() -> str:
    return page.build(cases.full())


def test_it_is_complete_and_needs_nothing_beside_it(full):
    read = Page(full)
    assert read.count("script") == 0 and read.count("figure") == 6 and read.count("svg") == 6 and read.count("h1") == 1
    loaded = [
        (tag, key, value)
        for tag, attrs in read.elements
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href", "srcset", "action", "data") and not value.startswith(("#", "data:"))
    ]
    assert not loaded
    assert (
        not re.findall(r"https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", full))
        and "@import" not in full
        and not re.search(r"url\((?!#)", full)
    )
    assert any(attrs.get("name") == "viewport" for tag, attrs in read.elements if tag == "meta")
    assert "color-scheme: light dark" in full and "prefers-color-scheme: dark" in full
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_every_figure_says_what_it_is_to_those_who_do_not_see_it(full):
    labels = [attrs["aria-label"] for _, attrs in Page(full).elements if attrs.get("role") == "img"]
    assert (
        len(labels) == len(set(labels)) == 6 and "Where the zeros are: Share of exact zeros in each matrix." in labels
    )


def test_it_says_what_one_wants_to_know(full):
    text = Page(full).text
    for words in (
        "small, 30.00 % zeros",
        "12.00",
        "dense fine-tune 11.25, before 20.00",
        "48 of 160 weights that decay",
        "1.235 M",
        "1 h 02 min",
        "1,234,567, of which 0.00 % are zero",
        "learning rate 0.001, seed 7",
        "lp-dist finetune --model hub/small --sparsity 0.3",
        "Target 30.00 % reached: 29.00 % became zero in the window, 1.00 % pruned in the final step.",
        "hub/text",
        "DeepSpeed ZeRO-2",
        "a processor",
        "2.13.0",
        "This command, on each of 2 ranks that a launcher such as torchrun started:",
        "python -c \"print('next')\"",
        '{"num_cycles": 2}',
        "true",
    ):
        assert any(words in line for line in text), words
    share = r'<td class="share" style="--share: ([\d.]+)%">([\d.]+) %</td>'
    rows = re.findall(rf'<tr><th scope="row">(\w+)</th>\s*{share}\s*<td>([\d,]+)</td><td>([\d,]+)</td>', full)
    assert rows == [
        ("down_proj", "6.25", "6.25", "4", "64"),
        ("q_proj", "62.50", "62.50", "20", "32"),
        ("up_proj", "37.50", "37.50", "24", "64"),
        ("0", "25.00", "25.00", "20", "80"),
        ("1", "35.00", "35.00", "28", "80"),
    ]


def test_nothing_of_a_run_is_taken_for_html():
    bad = "<script>alert('&\"')</script>"
    of = cases.full()
    of |= {
        **dict.fromkeys(("model", "dataset", "command", "next", "output_dir", "engine"), bad),
        "versions": {bad: bad},
        "environment": {bad: bad},
        "configuration": {bad: {bad: bad}},
        "kinds": {bad: [1, 2]},
        "tensors": {f"layers.0.{bad}.weight": [1, 2]},
        "reference": of["reference"] | {"output_dir": bad},
    }
    html = page.build(of)
    assert "<script" not in html and Page(html).count("script") == 0 and Page(html).count("svg") == 6
    assert html.count("&lt;script&gt;alert(") > 10


def test_what_is_empty_in_a_report_is_left_out():
    read = Page(page.build(cases.bare()))
    words = " ".join(read.text)
    assert read.count("figure") == 4 and "runs/sparse" not in words.split("Drawn by")[0]
    assert (
        "Time" not in words
        and "None" not in words
        and "none" not in words
        and "cutoff" in words
        and "Exact" not in words
    )
    assert words.count("kind of layer") == 1 and " layer " not in words.replace("kind of layer", "")


def test_a_dense_run_and_one_without_a_log_have_no_empty_sections():
    dense = page.build(cases.dense())
    assert (
        "small, a dense fine-tune" in dense
        and "Zeros, counted" not in dense
        and Page(dense).count("figure") == 3
        and "nan" not in dense
    )
    bare = page.build(cases.bare() | {"log": [], "perplexity_before": None, "target": None})
    assert "How it went" not in bare and "not measured" in bare and "Target" not in bare


@pytest.mark.parametrize(
    "change, words",
    [
        (cases.stopped(), "Target 30.00 % not reached: the run was stopped before its window ended."),
        (
            {"perplexity_after": "nan", "perplexity_before": "inf"},
            "Perplexity on held-out text is nan, and was inf before.",
        ),
        ({"perplexity_after": 1e304}, "1e+304"),
        ({"seconds": 59.6}, "1 min 00 s"),
        ({"seconds": 9}, "9 s"),
        ({"parameters": 8_030_261_248}, "8.03 B"),
        ({"parameters": 999}, "999"),
        ({"world_size": 1}, "This command:"),
        ({"configuration": {"resume_from_checkpoint": "true"}}, "since it was resumed, evaluations included"),
    ],
)
def test_what_differs_between_runs(change, words, monkeypatch):
    monkeypatch.setattr("lp_dist.report.figures.DRAWINGS", ())
    assert any(words in line for line in Page(page.build(cases.full() | change)).text)


# -- the command --------------------------------------------------------------


def lp_dist(*words: str):
    return CliRunner().invoke(cli.app, ["report", *map(str, words)])


def test_the_command_draws_a_run_again_and_its_figures_for_papers(tmp_path, full):
    schema.write(tmp_path, cases.full())
    shown = lp_dist(tmp_path, "--png")
    assert shown.exit_code == 0, shown.output
    names = ("loss", "perplexity", "sparsity", "lambda", "heat", "weights")
    written = [tmp_path / "report.html", *(tmp_path / f"report-{name}.png" for name in names)]
    assert shown.output.split() == list(map(str, written))
    assert written[0].read_text() == full, "the same report, the same page"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "no report of a finished run at"),
        ("{", "no report of a finished run at"),
        ("[]", "is of version 'list', and this lp_dist reads version 3"),
        (
            '{"version": 2}',
            "is of version 2, and this lp_dist reads version 3; install the lp_dist that wrote it, or repeat the run",
        ),
        ('{"version": 4}', "is of version 4, and this lp_dist reads version 3; install the lp_dist that wrote it"),
        ("{}", "is of version None"),
    ],
)
def test_without_a_report_that_it_can_read_it_says_so_in_one_line(text, words, tmp_path):
    if text is not None:
        (tmp_path / schema.FILE).write_text(text)
    with pytest.raises(UsageError, match=re.escape(words)):
        schema.read(tmp_path)
    shown = lp_dist(tmp_path)
    assert (
        shown.exit_code == 1
        and "lp-dist: error: " in shown.output + str(shown.exception)
        and not (tmp_path / "report.html").exists()
    )


def test_a_file_that_can_not_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lp_dist.report.figures.DRAWINGS", ())
    with pytest.raises(
        UsageError, match=r"can't write .*nowhere/page.html: No such file .*; name a file in a directory"
    ):
        page.write(cases.full(), tmp_path / "nowhere" / "page.html")


def test_drawing_alone_needs_matplotlib(monkeypatch):
    assert not {"canvas", "figures"} & {name for module in (page, schema, cli, finetune) for name in vars(module)}, (
        "imported where they are used"
    )
    for name in ("lp_dist.report.figures", "lp_dist.report.canvas", "matplotlib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("lp_dist.report.figures", raising=False)
    monkeypatch.delattr("lp_dist.report.canvas", raising=False)
    with pytest.raises(UsageError, match=r"needs matplotlib; install the extra: pip install '.\[finetune\]'"):
        page.build(cases.full())


def test_a_page_that_can_not_be_drawn_costs_no_run(tmp_path, monkeypatch, caplog):
    schema.write(tmp_path, cases.full())

    def fail(of):
        raise ZeroDivisionError("of a figure")

    monkeypatch.setattr(page, "build", fail)
    with caplog.at_level("WARNING"):
        assert finetune.draw_page(str(tmp_path)) is None
    (warning,) = caplog.records
    assert (
        "ZeroDivisionError: of a figure" in warning.getMessage()
        and f"`lp-dist report {tmp_path}` draws it" in warning.getMessage()
        and warning.exc_info
    )
