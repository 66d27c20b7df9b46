"""Questions to runs over seeds, and their answers."""

import math

import numpy as np
import pytest

from experiments.findings import Finding, Question, answer_all, overall
from stability_probe.verify.statistics import student_interval


def question(values, side="below", **options):
    return Question("grid", "text", values, side, **options)


@pytest.mark.parametrize(
    ("values", "side", "status"),
    [
        ([0.5, 0.52, 0.48, 0.51, 0.5], "below", "REPRODUCED"),
        ([0.5, 0.52, 0.48, 0.51, 0.5], "above", "NOT REPRODUCED AT THIS SCALE"),
        ([2.0, 2.1, 1.9, 2.0, 2.05], "above", "REPRODUCED"),
        ([2.0, 2.1, 1.9, 2.0, 2.05], "below", "NOT REPRODUCED AT THIS SCALE"),
        ([0.5, 2.0, 0.7, 1.5, 0.9], "below", "INCONCLUSIVE"),
        ([0.99, 1.0, 1.01, 1.0, 0.995], "below", "NOT REPRODUCED AT THIS SCALE"),  # next to nothing
        ([0.9, 0.91, 0.92, 0.9, 0.91], "below", "REPRODUCED"),
        ([0.5], "below", "INCONCLUSIVE"),
        ([], "below", "INCONCLUSIVE"),
        ([0.5, math.inf, 0.5], "below", "INCONCLUSIVE"),
        ([0.5, math.nan, 0.5], "below", "INCONCLUSIVE"),
        ([0.5, 0.0, 0.5], "below", "INCONCLUSIVE"),
    ],
)
def test_a_ratio_is_held_against_one(values, side, status):
    assert question(values, side).answer().status == status


def test_the_limit_itself_is_not_the_claim():
    """Cheaper than 2 % is claimed, and 1 % found."""
    assert question([1.01, 1.012, 1.008], limit=1.02).answer().status == "REPRODUCED"
    straddling = question([1.01, 1.03, 1.02, 1.015, 1.02], limit=1.02)
    assert straddling.answer().status == "INCONCLUSIVE"
    assert question([1.1, 1.11, 1.09], limit=1.02).answer().status == "NOT REPRODUCED AT THIS SCALE"


def test_a_ratio_has_the_geometric_mean_and_a_value_the_arithmetic():
    values = [1.0, 4.0]
    assert question(values).answer().estimate == pytest.approx(2.0)
    assert question(values, ratio=False).answer().estimate == pytest.approx(2.5)


def test_the_interval_is_students_at_a_level_for_all_questions_together():
    values = [1.0, 1.5, 0.8, 1.2, 1.1]
    found = question(values).answer(10)
    low, high = student_interval(np.log(values), 0.995)
    assert found.confidence == pytest.approx(0.995)
    assert found.interval == pytest.approx((math.exp(low), math.exp(high)))
    alone = question(values).answer()
    assert alone.interval[0] > found.interval[0]
    assert [f.confidence for f in answer_all([question(values)] * 5)] == pytest.approx([0.99] * 5)


def test_true_claims_are_seldom_called_not_reproduced():
    """Of 2,000 questions whose truth is a small effect, at most 5 % are; ten a claim."""
    rng = np.random.default_rng(0)
    draws = np.exp(rng.normal(math.log(0.9), 0.2, (2000, 5)))
    wrong = [question(list(v)).answer().status.startswith("NOT") for v in draws]
    assert sum(wrong) <= 0.05 * 2000


def test_a_row_says_what_was_claimed_and_found():
    row = question([0.5, 0.5, 0.501]).answer().as_dict()
    assert row["claimed"] == "< 1"
    assert row["estimate"] == 0.5
    assert row["n"] == 3
    assert question([math.nan, 1.0]).answer().as_dict()["estimate"] is None
    assert question([0.0, 1.0]).answer().as_dict()["estimate"] is None


def test_a_row_has_the_values_of_the_seeds():
    assert question([0.51234, 0.5, math.nan]).answer().as_dict()["values"] == [0.5123, 0.5, None]


def test_an_interval_that_ends_at_the_limit_has_more_digits():
    asked = question([1.03] * 5, limit=1.05)
    row = Finding(asked, 1.0312, (1.0123, 1.0503), 0.99, "INCONCLUSIVE").as_dict()
    assert (row["estimate"], row["low"], row["high"]) == (1.03, 1.01, 1.0503)


def test_a_claim_is_what_its_findings_are():
    yes = question([0.5, 0.51, 0.5]).answer()
    no = question([2.0, 2.01, 2.0]).answer()
    unknown = question([0.5, 3.0, 1.0]).answer()
    assert overall([yes, yes]) == "REPRODUCED"
    assert overall([no]) == "NOT REPRODUCED AT THIS SCALE"
    assert overall([unknown]) == "INCONCLUSIVE"
    assert overall([yes, no, unknown]) == "PARTLY REPRODUCED (1 of 3; 1 not, 1 inconclusive)"
    assert overall([no, no, unknown]).startswith("NOT REPRODUCED AT THIS SCALE (0 of 3")
    assert overall([no, unknown, unknown]) == "INCONCLUSIVE (0 of 3; 1 not, 2 inconclusive)"
