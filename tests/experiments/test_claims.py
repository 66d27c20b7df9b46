"""What every claim finds on runs whose truth is known, and the other way round."""

import importlib

import numpy as np
import pandas as pd
import pytest

from experiments.findings import answer_all
from experiments.studies import LABELS, OTHERS, OUTERMOST, label
from tests.oracles.planted import SCHEMES, kappa_of, planted


def examine(claim, *studies):
    return importlib.import_module(f"experiments.{claim}.claim").examine(studies)


ORDER = {"uniform:0": 1.0, "ls": 2.0, "cs:0.7": 3.0, "inverse-sqrt2": 4.0, "unscaled": 5.0}
"""Of stability, as the paper claims it."""


def statuses(found):
    return {f.question.text: f.status for f in answer_all(found.questions)}


def by_skips(scheme):
    """Proportional to Σκ²."""
    return float(np.square(kappa_of(scheme)).sum()) + 0.01


def opposite(scheme):
    return 1 / by_skips(scheme)


class TestOscillation:
    def test_it_is_found_where_it_is(self):
        found = examine("oscillation", planted(features=by_skips, parameters=by_skips))
        assert set(statuses(found).values()) == {"REPRODUCED"}
        row = found.table.query("kind == '‖h_0‖²' and scheme == '1/√2'").iloc[0]
        assert row["over unscaled"] == pytest.approx(0.5, rel=0.05)
        assert row["Σκ²"] == pytest.approx(1.5)

    def test_and_not_where_it_is_not(self):
        found = statuses(examine("oscillation", planted(features=opposite)))
        features = [v for k, v in found.items() if "‖h_" in k]
        assert set(features) == {"NOT REPRODUCED AT THIS SCALE"}
        assert "REPRODUCED" not in found.values()


class TestKappaTradeoff:
    def test_the_claimed_order(self):
        study = planted(ORDER.get, loss=lambda s: 2.0 if s == "uniform:0" else 1.0)
        assert set(statuses(examine("kappa_tradeoff", study)).values()) == {"REPRODUCED"}

    def test_the_reverse_order(self):
        study = planted(lambda s: 6 - ORDER[s], loss=lambda s: 0.5 if s == "uniform:0" else 1.0)
        assert set(statuses(examine("kappa_tradeoff", study)).values()) == {
            "NOT REPRODUCED AT THIS SCALE"
        }


@pytest.mark.parametrize(
    ("effect", "status"),
    [(by_skips, "REPRODUCED"), (opposite, "NOT REPRODUCED AT THIS SCALE")],
)
def test_gradients(effect, status):
    found = examine("gradients", planted(gradients=effect))
    assert set(statuses(found).values()) == {status}
    expected = 1 if effect is by_skips else -1
    for question in found.questions:
        assert np.mean(question.values) == pytest.approx(expected, abs=0.1)


class TestConvergence:
    def test_what_is_faster_takes_fewer_steps(self):
        study = planted(faster=lambda s: 1.0 if s == "unscaled" else 2.0)
        found = examine("convergence", study)
        assert set(statuses(found).values()) == {"REPRODUCED"}
        row = found.table.query("scheme == '1/√2'").iloc[0]
        assert row["steps over unscaled"] < 0.6 and row["got there"] == row["of"] == 5

    def test_what_never_gets_there_is_no_faster(self):
        study = planted(loss=lambda s: 1.0 if s == "unscaled" else 9.0)
        found = examine("convergence", study)
        assert set(statuses(found).values()) == {"NOT REPRODUCED AT THIS SCALE"}
        assert found.table.query("scheme == '1/√2'")["got there"].item() == 0


class TestLearnedCoefficients:
    def test_the_exponential_is_fitted(self):
        found = examine("learned_coefficients", planted(schemes=("unscaled", "ls")))
        row = found.table.iloc[0]
        assert row["r"] == pytest.approx((0.85 / 0.95) ** 0.5, rel=1e-3)
        assert row["κ_1"] == pytest.approx(0.95)
        assert {q.text: q.answer().status for q in found.questions}["fitted κ_(i+1) / κ_i"] == (
            "REPRODUCED"
        )

    def test_only_the_least_learning_rate_counts(self):
        slow = planted(schemes=("ls",), learning_rate=0.01).members
        fast = planted(schemes=("ls",), learning_rate=0.03).members
        study = type(planted())("planted", [*slow, *fast])
        found = examine("learned_coefficients", study)
        assert found.table.seeds.item() == 5


class TestDepthAndRate:
    def test_what_is_rescued(self):
        study = planted(failed=lambda c: c.scheme == "unscaled", learning_rate=0.03)
        found = examine("depth_and_rate", study)
        assert set(statuses(found).values()) == {"REPRODUCED"}
        assert found.table.query("scheme == 'unscaled'").failed.item() == 5

    def test_what_needs_no_rescue(self):
        found = examine("depth_and_rate", planted(learning_rate=0.03))
        assert set(statuses(found).values()) == {"NOT REPRODUCED AT THIS SCALE"}

    def test_useless_is_failed(self):
        study = planted(loss=lambda s: 9.0 if s == "unscaled" else 1.0, learning_rate=0.03)
        assert (
            examine("depth_and_rate", study).table.query("scheme == 'unscaled'").failed.item() == 5
        )


def test_schemes_have_names():
    assert label(OUTERMOST) == LABELS[OUTERMOST]
    assert label("cs:0.7") == "CS (κ = 0.7)"
    assert label(OTHERS) != label(OUTERMOST)


def test_tables_have_a_row_a_seed_and_a_column_a_scheme():
    table = planted().table(lambda member: member.config.seed)
    assert list(table.columns) == list(SCHEMES)
    assert table.index.tolist() == list(range(5))
    pd.testing.assert_series_equal(table["ls"], table["unscaled"], check_names=False)
