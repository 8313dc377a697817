"""Whatever a script calls in whatever order: it is told what is wrong, or what it is told is what is in the file.

On ranks the same draw goes to both of them, and they must come to the same end.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, event, example, given, settings
from hypothesis import strategies as st

from helpers.courses import follow, follow_on_ranks

CALLS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 7), st.just(True)),
    st.tuples(st.just("step"), st.integers(1, 7), st.booleans()),
    st.tuples(st.just("attach"), st.sampled_from([0.5, 0.5, 0.3, None])),
    st.tuples(st.just("save")),
    st.tuples(st.just("load"), st.booleans()),
    st.tuples(st.just("unfreeze")),
    st.tuples(st.just("freeze")),
    st.tuples(st.just("set_weight_decay"), st.sampled_from([0.0, 5.0])),
    st.tuples(st.just("add_group")),
    st.tuples(st.just("replace")),
    st.tuples(st.just("finish")),
)
# As one does it, with calls in between; and any.
LEGAL = st.lists(CALLS, max_size=3).flatmap(
    lambda between: st.permutations([("step", 3, True), ("step", 4, True), ("step", 7, True), *between]).map(
        lambda calls: [("wrap",), ("attach", 0.5), *calls, ("finish",)]
    )
)
ANY = st.lists(st.one_of(CALLS, st.just(("wrap",))), min_size=2, max_size=9).map(lambda calls: [*calls, ("finish",)])
COURSES = st.one_of(LEGAL, ANY)


def check(seen: dict, calls: list[tuple]) -> None:
    for said, counted in seen["checks"]:
        assert said == counted, f"said {said:.2%}, and the file holds {counted:.2%}"
    if seen["raised"]:
        event("refused" if seen["by_lp_dist"] else "raised by torch or the engine")
        kind = seen["raised"].split(": ")[1]
        assert not seen["by_lp_dist"] or kind in ("UsageError", "ValueError", "RuntimeError"), seen["raised"]
        return
    assert seen["elsewhere"] <= 0, "what may not decay has got zeros"
    if seen["finished"] and seen["checks"]:
        event("reached")


@pytest.mark.parametrize("examples", [120, pytest.param(2000, marks=pytest.mark.long)])
def test_alone(examples):
    ends = []

    @settings(max_examples=examples, deadline=None)
    @given(calls=COURSES)
    # A layer has the zeros of the first target, and has no gradient when the window of the second one begins.
    @example(calls=[("attach", 0.5), ("finish",), ("attach", 0.5), ("freeze",), ("step", 1, True), ("finish",)])
    def course(calls):
        seen = follow("plain", calls)
        check(seen, calls)
        ends.append("reached" if seen["finished"] and seen["checks"] and not seen["raised"] else seen["raised"])

    course()
    assert ends.count("reached") > examples / 10 and sum(map(bool, ends)) - ends.count("reached") > examples / 10


@pytest.mark.parametrize("examples", [8, pytest.param(80, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "kind", ["zero2", "fsdp2", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("zero1", "zero3"))]
)
def test_on_two_ranks(kind, examples, rank_pool):
    # Not made smaller where it fails: ranks that wait for each other take a minute each time.
    @settings(max_examples=examples, deadline=None, phases=(Phase.explicit, Phase.generate))
    @given(calls=COURSES)
    def course(calls):
        first, second = rank_pool(follow_on_ranks, kind, calls)
        assert first["raised"].split(":")[0] == second["raised"].split(":")[0], (first["raised"], second["raised"])
        check(first, calls)
        check(second, calls)

    course()
