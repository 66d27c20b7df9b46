import warnings

import numpy as np
import pytest
from scipy import stats

from stability_probe.verify.statistics import (
    at_most_status,
    equality_status,
    fewest_for_share,
    least_mean_interval,
    least_share_interval,
    mean_interval,
    mean_limits,
    ratio_units,
    share_interval,
    share_status,
    student_interval,
    units_needed,
)
from tests.oracles.simulation import plausible


class TestMean:
    def test_students_interval_of_symmetric_units(self):
        half = np.random.default_rng(0).normal(1.0, 2.0, 20)
        values = np.concatenate([half, 2 - half])  # skewness 0
        expected = stats.t.interval(0.9, 39, values.mean(), stats.sem(values))
        np.testing.assert_allclose(mean_interval(values, 0.9), expected, rtol=1e-6)

    def test_the_transformation_is_inverted(self):
        """g(T), spelled out, is the quantile at either limit."""
        values = np.random.default_rng(1).lognormal(size=30)
        n, s = 30, values.std(ddof=1)
        skew = (((values - values.mean()) / s) ** 3).mean()
        for limit, quantile in zip(
            mean_interval(values, 0.95), stats.t.ppf([0.975, 0.025], n - 1), strict=True
        ):
            t = n**0.5 * (values.mean() - limit) / s
            g = t + skew * t**2 / (3 * n**0.5) + skew**2 * t**3 / (27 * n) + skew / (6 * n**0.5)
            assert g == pytest.approx(quantile)

    @pytest.mark.parametrize("n", [20, 60])
    def test_skewed_units_err_less_often_than_by_students_interval(self, n):
        """Log-normal, skewness 1.75: one-sided errors against 5 %, over 20,000 samples."""
        trials, truth = 20_000, np.exp(0.5**2 / 2)
        values = np.random.default_rng(2).lognormal(0, 0.5, (trials, n))
        low, high = mean_limits(values, 0.9)
        rates = np.array([(low > truth).mean(), (high < truth).mean()])
        half = stats.t.ppf(0.95, n - 1) * stats.sem(values, axis=1)
        students = np.array([
            (values.mean(1) - half > truth).mean(), (values.mean(1) + half < truth).mean()
        ])  # fmt: skip
        assert np.abs(rates - 0.05).max() < 0.5 * np.abs(students - 0.05).max()
        assert rates.max() < {20: 0.07, 60: 0.06}[n] and students.max() > {20: 0.09, 60: 0.07}[n]

    def test_equivariance(self):
        values = np.random.default_rng(3).lognormal(size=25)
        low, high = mean_interval(values, 0.95)
        assert mean_interval(3 * values + 7, 0.95) == pytest.approx((3 * low + 7, 3 * high + 7))
        assert mean_interval(-values, 0.95) == pytest.approx((-high, -low))

    def test_many_samples_at_once(self):
        values = np.random.default_rng(4).lognormal(size=(2, 3, 25))
        low, high = mean_limits(values, 0.95)
        assert low.shape == high.shape == (2, 3)
        assert (low[1, 2], high[1, 2]) == mean_interval(values[1, 2], 0.95)

    def test_a_constant_is_a_point(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert mean_interval(np.full(20, 2.5), 0.95) == (2.5, 2.5)

    def test_the_smallest_of_several_means(self):
        shift = np.array([[0.0], [0.1], [5.0], [5.0]])
        values = np.random.default_rng(5).normal(size=(4, 30)) + shift
        low, high = least_mean_interval(values, 0.05, 4)
        assert low == min(mean_interval(v, 0.9)[0] for v in values)
        assert high == min(mean_interval(v, 1 - 2 * 0.05 / 4)[1] for v in values)

    def test_the_smallest_of_equal_means_errs_no_more_often_than_stated(self):
        trials = 2000
        values = np.random.default_rng(6).normal(size=(trials, 6, 40))
        found = np.array([least_mean_interval(v, 0.05, 6) for v in values])
        assert plausible(int((found[:, 1] < 0).sum()), trials, 0.05)  # independent places
        assert (found[:, 0] > 0).mean() < 0.01
        naive = np.array([least_mean_interval(v, 0.05, 1) for v in values])
        assert (naive[:, 1] < 0).mean() > 0.2


class TestStudent:
    def test_it_is_students_interval(self):
        values = np.random.default_rng(0).lognormal(size=30)
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
        np.testing.assert_allclose(student_interval(values, 0.9), expected)

    def test_heavy_tails(self):
        """Where Hall's correction errs too often, Student's interval does not."""
        trials, rng = 20_000, np.random.default_rng(1)
        values = rng.lognormal(0, 0.5, (trials, 40)) * rng.normal(size=(trials, 40))
        mean, half = values.mean(1), stats.t.ppf(0.95, 39) * stats.sem(values, axis=1)
        assert 0.045 < (mean - half > 0).mean() < 0.053
        assert (mean_limits(values, 0.9)[0] > 0).mean() > 0.055


class TestRatio:
    def test_pseudo_values_are_those_of_the_jackknife(self):
        rng = np.random.default_rng(0)
        above, below = rng.lognormal(size=(2, 9))
        units = ratio_units(above, below)
        left_out = [np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(9)]
        expected = 9 * above.sum() / below.sum() - 8 * np.array(left_out)
        np.testing.assert_allclose(units, expected)

    def test_the_interval_covers_the_ratio_as_often_as_stated(self):
        rng, trials = np.random.default_rng(1), 4000
        below = rng.lognormal(0, 0.5, (trials, 60))
        above = 2 * below + rng.normal(size=below.shape)
        low, high = mean_limits(ratio_units(above, below), 0.95)
        assert plausible(int(((low > 2) | (high < 2)).sum()), trials, 0.05, 0.9999)


def test_the_smallest_of_several_shares():
    assert least_share_interval(0.9, 50, 0.05, 1) == share_interval(0.9, 50, 0.9)
    low, high = least_share_interval(0.9, 50, 0.05, 7)
    assert low == share_interval(0.9, 50, 0.9)[0]
    assert high == share_interval(0.9, 50, 1 - 0.1 / 7)[1]


@pytest.mark.parametrize("alpha", [0.05, 0.01, 1e-4])
def test_the_fewest_units_on_which_a_share_can_hold(alpha):
    n = fewest_for_share(0.85, alpha)
    assert share_status(share_interval(1.0, n, 1 - 2 * alpha), 0.85) == "HOLDS"
    assert share_status(share_interval(1.0, n - 1, 1 - 2 * alpha), 0.85) == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("estimate", "limit", "words"),
    [(1.0, 0.9, "about 400"), (1.0, 1.05, "about 1600"), (1.0, 1.0, "very many")],
)
def test_units_needed(estimate, limit, words):
    assert units_needed(100, estimate, (0.8, 1.2), limit) == words


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 48), (48, 48), (1, 20), (17, 20)])
def test_share_interval_is_clopper_pearson(hits, n):
    for level in (0.9, 0.95, 0.9999):
        exact = stats.binomtest(hits, n).proportion_ci(level, method="exact")
        np.testing.assert_allclose(share_interval(hits / n, n, level), exact, atol=1e-12)
    assert share_interval(hits / n, n) == share_interval(hits / n, n, 0.95)


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
