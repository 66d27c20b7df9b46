"""The test of two samples of runs, against scipy's and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stability_probe.regression.compare import (
    ASSUMED_SPREAD,
    Comparison,
    _holm,
    compare,
    flip_chance,
    flips,
)


def one(then, now, **settings):
    (found,) = compare({"loss": then}, {"loss": now}, **settings)
    return found


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_p_is_that_of_students_test_on_logarithms(margin):
    rng = np.random.default_rng(0)
    then, now = rng.lognormal(0, 0.3, 5).tolist(), rng.lognormal(0.4, 0.3, 7).tolist()
    shifted = np.log(then) + math.log1p(margin)
    expected = stats.ttest_ind(np.log(now), shifted, alternative="greater")
    found = one(then, now, margin=margin)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.ratio == pytest.approx(stats.gmean(now) / stats.gmean(then))


def test_one_run_is_held_against_a_prediction_interval():
    then = np.exp([0.1, -0.1, 0.2, -0.2, 0.0]).tolist()
    limit = 1.1 * math.exp(stats.t.ppf(0.95, 4) * np.std(np.log(then), ddof=1) * math.sqrt(1.2))
    assert one(then, [limit * 1.001]).change == "worse"
    assert one(then, [limit * 0.999]).change == "same"
    assert one(then, [1.0]).visible == pytest.approx(limit)
    assert (
        one([1.0], [limit * v * 1.001 for v in then]).change == "worse"
    )  # and the other way round


def test_of_two_single_runs_a_usual_spread_is_assumed():
    limit = 1.1 * math.exp(stats.norm.ppf(0.95) * ASSUMED_SPREAD * math.sqrt(2))
    assert one([1.0], [limit * 1.001]).change == "worse"
    assert one([1.0], [limit * 0.999]).change == "same"


@pytest.mark.parametrize(
    ("now", "change"), [(1.099, "same"), (1.101, "worse"), (0.92, "same"), (0.9, "better")]
)
def test_without_any_spread_the_margin_decides(now, change):
    assert one([1.0] * 3, [now] * 3).change == change


def test_what_is_visible_is_where_worse_begins():
    then, now = {f"n{i}": [1.0, 1.2, 0.9] for i in range(4)}, {}
    for i in range(4):
        now[f"n{i}"] = [1.0, 1.2, 0.9]
    visible = compare(then, now)[0].visible
    for factor, change in ((1.001, "worse"), (0.999, "same")):
        now["n0"] = [v * visible * factor for v in (1.0, 1.2, 0.9)]
        assert {c.name: c.change for c in compare(then, now)}["n0"] == change


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_worse(bad):
    found = one([1.0, 1.1, 0.9], [1.0, bad, 1.0])
    assert (found.change, found.p, found.percent) == ("worse", 0.0, "not finite")


@pytest.mark.parametrize(
    ("then", "now", "change"),
    [
        ([0.0, 0.0], [0.0, 0.0], "same"),
        ([0.0, 0.0], [1.0, 2.0], "worse"),
        ([1.0, 2.0], [0.0, 0.0], "better"),
        ([0.0, 1.0], [1.0, 0.0], "same"),
        ([1.0] * 5, [1e6] * 4 + [0.0], "worse"),
        ([0.9, 1.0, 1.1, 1.0, 0.0], [1e6] * 5, "worse"),
    ],
)
def test_zeros_have_no_logarithm(then, now, change):
    assert one(then, now).change == change
    if change == "worse" and not any(then):
        assert one(then, now).percent == "from 0"


@pytest.mark.parametrize(
    ("then", "now"), [([-3.0] * 5, [-1.0] * 5), ([-0.1] * 5, [0.001] * 5), ([1.0] * 5, [-1.0] * 5)]
)
def test_signed_numbers_are_not_compared_and_it_shows(then, now):
    found = one(then, now)
    assert (found.change, found.visible) == ("same", math.inf)


def test_a_spread_that_nothing_can_be_seen_under_is_no_error():
    """Two seeds far apart and one new run among forty numbers: t is 255."""
    then = {str(i): [0.01, 1.0] for i in range(40)}
    assert compare(then, {name: [0.1] for name in then})[0].visible == math.inf


def test_the_worst_comes_first_and_then_the_better():
    then = {name: [1.0, 1.01, 0.99] for name in "abcd"}
    factors = {"a": 1.0, "b": 0.5, "c": 3.0, "d": 2.0}
    now = {name: [f * v for v in (1.0, 1.01, 0.99)] for name, f in factors.items()}
    assert [c.name for c in compare(then, now)] == ["c", "d", "b", "a"]


def test_only_what_both_have_is_compared():
    found = compare({"a": [1.0], "b": [1.0]}, {"b": [1.0], "c": [1.0]})
    assert [c.name for c in found] == ["b"]


def test_percent():
    assert Comparison("x", (1.0,), (0.5,), 0.5, 1.0, 1.1, "better").percent == "-50 %"


@pytest.mark.parametrize("n", [1, 2, 5])
def test_false_alarms_among_many_numbers_are_at_most_alpha(n):
    """At the edge of the margin, where most are given: 20 independent numbers, 300 checks."""
    rng, alarms, checks = np.random.default_rng(n), 0, 300
    spread = 0.2
    for _ in range(checks):
        then = {str(i): rng.lognormal(0, spread, 5).tolist() for i in range(20)}
        now = {i: rng.lognormal(math.log(1.1), spread, n).tolist() for i in then}
        alarms += any(c.change == "worse" for c in compare(then, now))
    z = (alarms - 0.05 * checks) / math.sqrt(0.05 * 0.95 * checks)
    assert abs(z) < 3.5  # and not far below either: the numbers are independent


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    st.floats(0.01, 100),
)
def test_units_do_not_matter(then, now, unit):
    a, b = one(then, now), one([unit * v for v in then], [unit * v for v in now])
    assert a.ratio == pytest.approx(b.ratio, rel=1e-6)
    assert a.p == pytest.approx(b.p, rel=1e-3, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.floats(1.0, 5.0))
def test_a_larger_rise_is_no_less_worse(values, factor):
    little, much = (
        one(values, [1.2 * v for v in values]),
        one(values, [1.2 * factor * v for v in values]),
    )
    assert much.p <= little.p + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=8))
def test_holm_against_its_definition(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    expected = [False] * len(p)
    for rank, i in enumerate(order):
        if any(p[order[r]] > 0.05 / (len(p) - r) for r in range(rank + 1)):
            break
        expected[i] = True
    assert _holm(p, 0.05) == expected


class TestFlips:
    def test_all_that_held_and_are_violated_now(self):
        (flip,) = flips({"3.1: a": ["HOLDS"] * 5}, {"3.1: a": ["VIOLATED"] * 5})
        assert (flip.claim, flip.change) == ("3.1: a", "worse")
        (flip,) = flips({"3.1: a": ["VIOLATED"] * 5}, {"3.1: a": ["HOLDS"] * 5})
        assert flip.change == "better"

    @pytest.mark.parametrize("seeds", [(1, 1), (5, 1), (5, 2), (3, 3)])
    def test_of_few_runs_it_may_be_chance(self, seeds):
        n, m = seeds
        (flip,) = flips({"c": ["HOLDS"] * n}, {"c": ["VIOLATED"] * m})
        assert flip.change == "same"

    @pytest.mark.parametrize(
        ("then", "now"),
        [
            (["HOLDS"] * 4 + ["INCONCLUSIVE"], ["VIOLATED"] * 5),
            (["HOLDS"] * 5, ["VIOLATED"] * 4 + ["HOLDS"]),
            (["HOLDS"] * 5, ["INCONCLUSIVE"] * 5),
            (["HOLDS"] * 5, ["HOLDS"] * 5),
        ],
    )
    def test_all_else_is_none(self, then, now):
        assert flips({"c": then}, {"c": now}) == []

    def test_a_claim_that_is_not_in_both_is_none(self):
        assert flips({"a": ["HOLDS"] * 5}, {"b": ["VIOLATED"] * 5}) == []

    @pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 2), (1, 4)])
    def test_the_chance_is_the_largest_over_p(self, n, m):
        p = np.linspace(0, 1, 10001)
        assert flip_chance(n, m) == pytest.approx(((1 - p) ** n * p**m).max(), rel=1e-6)
