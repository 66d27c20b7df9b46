import warnings

import numpy as np
import pytest
from scipy import stats

from stability_probe.verify.statistics import (
    at_most_status,
    bootstrap_interval,
    equality_status,
    share_interval,
    share_status,
)


def mean_interval(values, **kwargs):
    return bootstrap_interval(lambda units: float(values[units].mean()), len(values), **kwargs)


def test_bootstrap_agrees_with_normal_theory():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, trials, covered = np.random.default_rng(1), 150, 0
    for _ in range(trials):
        low, high = mean_interval(rng.normal(1.0, 1.0, 60), resamples=300)
        covered += low <= 1.0 <= high
    z = (covered - 0.95 * trials) / (trials * 0.95 * 0.05) ** 0.5
    assert abs(z) < 4


def test_bootstrap_is_seeded():
    values = np.random.default_rng(0).normal(size=30)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=0) != mean_interval(values, seed=1)


def test_bootstrap_resamples_all_units_with_replacement():
    drawn = []

    def record(units):
        drawn.append(units)
        return 0.0

    bootstrap_interval(record, 7, resamples=50)
    table = np.stack(drawn)
    assert table.shape[1] == 7
    assert set(table.ravel()) == set(range(7))
    assert any(len(set(units)) < 7 for units in drawn)


@pytest.mark.parametrize("n", [0, 1])
def test_bootstrap_needs_two_units(n):
    assert bootstrap_interval(lambda units: 1.0, n) is None


def test_bootstrap_of_an_undefined_statistic_is_none():
    assert bootstrap_interval(lambda units: float("nan"), 20) is None


def test_bootstrap_leaves_out_undefined_resamples():
    def mean_of_odd(units):  # undefined for a resample of even units alone
        return float(np.mean([u for u in units if u % 2])) if (units % 2).any() else float("nan")

    low, high = bootstrap_interval(mean_of_odd, 4)
    assert (low, high) == (1.0, 3.0)


def test_bootstrap_of_a_constant_is_a_point_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval(lambda units: 2.5, 10) == (2.5, 2.5)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 48), (48, 48), (1, 20), (17, 20)])
def test_share_interval_is_clopper_pearson(hits, n):
    exact = stats.binomtest(hits, n).proportion_ci(method="exact")
    np.testing.assert_allclose(share_interval(hits / n, n), exact, atol=1e-12)


def test_share_interval_of_fractional_counts_rises_and_contains_the_share():
    shares = np.linspace(0, 1, 81)  # quarters of a unit
    low, high = np.transpose([share_interval(float(share), 20) for share in shares])
    assert (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()
    assert (low <= shares).all() and (shares <= high).all()


@pytest.mark.parametrize(
    ("interval", "status"),
    [
        ((0.85, 1.0), "HOLDS"),
        ((0.8499, 1.0), "INCONCLUSIVE"),
        ((0.2, 0.85), "INCONCLUSIVE"),
        ((0.2, 0.8499), "VIOLATED"),
    ],
)
def test_share_status(interval, status):
    assert share_status(interval, 0.85) == status


@pytest.mark.parametrize(
    ("interval", "status"),
    [
        ((1.0, 1.2), "HOLDS"),
        ((0.8, 1.0), "HOLDS"),
        ((0.75, 1.25), "HOLDS"),  # as wide as it may be
        ((0.74, 1.25), "INCONCLUSIVE"),
        ((1.001, 5.0), "VIOLATED"),  # however wide
        ((0.1, 0.999), "VIOLATED"),
        (None, "INCONCLUSIVE"),
    ],
)
def test_equality_status(interval, status):
    assert equality_status(interval, 1.0, 0.5) == status


@pytest.mark.parametrize(
    ("interval", "status"),
    [
        ((0.2, 1.0), "HOLDS"),
        ((0.2, 1.001), "INCONCLUSIVE"),
        ((1.0, 1.2), "INCONCLUSIVE"),
        ((1.001, 1.2), "VIOLATED"),
        (None, "INCONCLUSIVE"),
    ],
)
def test_at_most_status(interval, status):
    assert at_most_status(interval, 1.0) == status
