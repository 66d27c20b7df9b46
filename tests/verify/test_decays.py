import numpy as np
import pandas as pd
import pytest
from scipy.special import erfc

from stability_probe.verify.decays import (
    coverage_table,
    fit_decays,
    fit_exponent,
    fit_slope,
    needed_rho,
    slopes_by_rho,
    usable,
)
from tests.oracles.random_networks import RHOS, networks


def rows(p, m, rho, count=10**6):
    """Rows of a table whose shares of failures are exactly p."""
    failures = np.round(np.asarray(p) * count).astype(int)
    return pd.DataFrame(
        {
            "m": m, "n_skips": 1, "rho": rho, "m_rho2": m * rho**2, "event": "all",
            "side": "both", "failures": failures, "networks": count,
        }
    )  # fmt: skip


def widths_and_rhos():
    m, rho = np.meshgrid([32.0, 64, 128, 256], [0.1, 0.2, 0.3], indexing="ij")
    return m.ravel(), rho.ravel()


class TestTable:
    def test_by_hand(self):
        relative = np.array([[1.0, 0.64], [1.21, 1.0], [4.0, 1.0], [1.0, 1.0]])
        table = coverage_table({(50, 1): relative}, [0.15, 0.5, 1.0])
        mine = table.set_index(["event", "side", "rho"]).failures
        assert mine["all", "both"].tolist() == [2, 1, 0]  # .2 below, .1 above, 1 above
        assert mine["all", "lower"].tolist() == [1, 0, 0]
        assert mine["all", "upper"].tolist() == [1, 1, 0]
        assert mine["h0", "both"].tolist() == [1, 1, 0]
        assert table.m_rho2[:3].tolist() == pytest.approx([50 * 0.0225, 12.5, 50])
        assert (table.coverage == 1 - table.failures / 4).all()

    def test_interval_is_clopper_pearson(self):
        table = coverage_table({(50, 1): np.r_[np.full(9, 1.0), 9.0][:, None]}, [0.5])
        row = table[table.event == "all"].iloc[0]
        assert (row.low, row.high) == pytest.approx((0.5550, 0.9975), abs=1e-4)

    def test_each_network_needs_a_rho(self):
        relative = np.exp(np.random.default_rng(0).normal(size=(100, 3)))
        needed = needed_rho(relative).max(1)
        for rho in (0.2, 0.5, 0.9):
            inside = ((1 - rho) ** 2 <= relative) & (relative <= (1 + rho) ** 2)
            np.testing.assert_array_equal(inside.all(1), needed <= rho)

    @pytest.mark.parametrize("rhos", [[], [0.0, 0.5], [0.5, 1.1], [0.5, 0.2]])
    def test_bad_rhos_are_refused(self, rhos):
        with pytest.raises(ValueError, match="rhos must rise within"):
            coverage_table({(8, 1): np.ones((2, 2))}, rhos)

    def test_narrow_or_few_networks_and_frequent_failures_are_not_used(self):
        energy = np.array([[2.0, 1.0]] * 9 + [[1.0, 1.0]] * 11)  # 9 of 20 need ρ = .41
        cells = {(13, 1): energy, (14, 1): energy, (15, 1): energy[1:], (16, 1): energy[:, ::-1]}
        cells[(17, 1)] = np.r_[energy[:10], energy[:10]]  # 18 of 20 do
        used = usable(coverage_table(cells, [0.2, 0.9]))
        found = list(zip(used.m, used.rho, strict=True))
        assert found == [(14, 0.2), (14, 0.9), (16, 0.2), (16, 0.9), (17, 0.9)]


class TestFits:
    def test_slope_of_exact_exponentials(self):
        m, rho = widths_and_rhos()
        prefactor, slope = fit_slope(rows(0.4 * np.exp(-0.2 * m * rho**2), m, rho))
        assert (prefactor, slope) == pytest.approx((0.4, 0.2), rel=2e-3)

    def test_slope_where_failures_grow(self):
        m, rho = widths_and_rhos()
        growing = rows(0.01 * np.exp(0.1 * m * rho**2), m, rho)
        assert fit_slope(growing)[1] == pytest.approx(-0.1, rel=0.01)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.3])
    def test_exponent_of_exact_tails(self, gamma):
        m, rho = widths_and_rhos()
        rate = np.select([rho == 0.1, rho == 0.2], [0.5, 0.8], 1.7)  # no law in ρ
        p = erfc(np.sqrt(rate * (m / 64) ** gamma))
        assert fit_exponent(rows(p, m, rho)) == pytest.approx(gamma, abs=0.01)

    def test_exponent_needs_two_widths_and_failures(self):
        assert np.isnan(fit_exponent(rows([0.1, 0.2], np.array([32, 32]), np.array([0.2, 0.1]))))
        assert np.isnan(fit_exponent(rows([0.0, 0.0], np.array([32, 64]), np.array([0.2, 0.2]))))

    def test_zero_failures_speak_for_a_steeper_slope(self):
        m, rho = np.array([100.0, 200.0, 400.0]), np.full(3, 0.2)
        some = rows([0.2, 0.05, 0.0], m, rho, count=100)
        assert fit_slope(some)[1] > fit_slope(some.assign(failures=[20, 5, 1]))[1]

    def test_bootstrap_keeps_failures_nested_and_has_the_binomial_spread(self):
        table = coverage_table(networks(count=1000), RHOS)
        decays = fit_decays(table, resamples=30)
        again = fit_decays(coverage_table(networks(count=1000, seed=1), RHOS), resamples=0)
        spread = decays.slope[1:, 0].std()
        assert abs(again.slope[0, 0] - decays.slope[0, 0]) < 5 * spread
        assert 0.005 < spread / decays.slope[0, 0] < 0.1
        np.testing.assert_array_equal(decays.slope, fit_decays(table, resamples=30).slope)

    def test_sides(self):
        table = coverage_table(networks(count=20_000), RHOS)
        at = {
            side: slopes_by_rho(table, "h0", side).set_index("rho").slope
            for side in ("upper", "lower")
        }
        # log(1 + ρ) < ρ < −log(1 − ρ)
        assert at["upper"][0.4] < at["lower"][0.4]
        assert at["upper"][0.8] < at["upper"][0.4]
        least = fit_decays(table, resamples=0).least
        assert least == pytest.approx(slopes_by_rho(table).slope.min())
