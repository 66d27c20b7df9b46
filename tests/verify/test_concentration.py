import numpy as np
import pandas as pd
import pytest
from scipy.special import erfc

from stability_probe.runs.concentration import simulated_energies
from stability_probe.theory import feature_energy_law
from stability_probe.verify.concentration import (
    Decays,
    concentration_verdict,
    coverage_table,
    depth_verdict,
    fit_decays,
    fit_exponent,
    fit_slope,
    needed_rho,
    slopes_by_rho,
    usable,
)

WIDTHS = (32, 64, 128, 256, 512)
RHOS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def networks(depths=(1,), count=4000, kappa=1.0, seed=0):
    """‖h_i‖²/E‖h_i‖² of random networks of Eq. 4."""
    rng = np.random.default_rng(seed)
    return {
        (m, n): simulated_energies(m, [kappa] * n, count, rng) / feature_energy_law([kappa] * n)
        for n in depths
        for m in WIDTHS
    }


def verdicts(cells, rhos=RHOS):
    decays = fit_decays(coverage_table(cells, rhos), resamples=130)
    return concentration_verdict(decays, "r"), depth_verdict(decays, "r")


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


class TestVerdict:
    def test_gaussian_networks(self):
        decay, depth = verdicts(networks((1, 2, 4), count=10_000))
        assert (decay.status, decay.theorem, decay.n) == ("HOLDS", "3.1", 14 * 10_000)
        assert 0.9 < decay.interval[0] < decay.estimate < decay.interval[1] < 1.3
        assert "exponentially surer; c = 0.1" in decay.advice
        assert "c goes as N^-0." in decay.advice
        assert depth.status == "VIOLATED"
        assert -0.9 < depth.interval[0] < depth.interval[1] < -0.5
        assert "changes with depth" in depth.advice

    def test_chance_is_divided_among_depths_and_their_two_tests(self):
        """An exponent surely below 0.75 in 97.5 % of resamples: enough for one N, not for four."""
        low, high = np.full(190, 0.6), np.full(10, 0.8)
        drawn = np.concatenate([[0.65], low[:-4], high[:4]])  # 2 % above
        sure = np.full(len(drawn), 1.0)
        for k, status in ((1, "VIOLATED"), (4, "INCONCLUSIVE")):
            exponent = np.stack([drawn, *[sure] * (k - 1)], axis=1)
            ones = np.ones_like(exponent)
            decays = Decays(tuple(range(1, k + 1)), ones, ones, exponent, ones[0], (100,) * k)
            verdict = concentration_verdict(decays, "r")
            assert (verdict.status, verdict.confidence) == (status, 1 - 0.05 / k)

    def test_few_resamples_show_no_interval(self):
        decays = fit_decays(coverage_table(networks(), RHOS), resamples=39)
        verdict = concentration_verdict(decays, "r")
        assert verdict.status == "INCONCLUSIVE"
        assert "39 resamples cannot show an interval of 95.0%; 40 can" in verdict.advice

    def test_a_chain_of_blocks_of_fixed_length_is_free_of_depth(self):
        one = networks(count=10_000)
        cells = {(m, n): one[m, 1] for m, _ in one for n in (1, 2, 3)}
        assert verdicts(cells)[1].status == "HOLDS"

    def test_a_scale_shared_by_all_weights_of_a_network(self):
        rng = np.random.default_rng(1)
        cells = networks()
        shared = {k: e * np.exp(rng.normal(0, 0.6, (len(e), 1))) for k, e in cells.items()}
        decay = verdicts(shared)[0]
        assert decay.status == "VIOLATED"
        assert decay.interval[1] < 0.4
        assert "heavy-tailed or dependent weights" in decay.advice

    def test_heavy_tailed_weights(self):
        rng = np.random.default_rng(0)

        def normal(shape):
            return rng.standard_normal(shape, dtype=np.float32)

        def student(shape):  # 3 degrees of freedom, of variance 1
            return normal(shape) / np.sqrt(2 * rng.standard_gamma(1.5, shape, dtype=np.float32))

        light = {(m, 1): one_skip(m, 1000, normal) for m in (16, 32, 64)}
        heavy = {(m, 1): one_skip(m, 2000, student) for m in (16, 32, 64)}
        far = (0.6, 0.8, 1.0)  # where a single entry, and not the sum of many, takes h_i out
        assert verdicts(light, far)[0].status == "HOLDS"
        decay = verdicts(heavy, far)[0]
        assert decay.status == "VIOLATED"
        assert decay.estimate < 0.7

    def test_failures_that_grow_with_width(self):
        rng = np.random.default_rng(0)
        cells = {
            (m, 1): np.exp(rng.normal(0, 0.02 * m**0.5, (2000, 2))) for m in (32, 64, 128, 256)
        }
        decay = verdicts(cells)[0]
        assert decay.status == "VIOLATED"
        assert decay.interval[1] < 0

    def test_few_networks(self):
        decay = verdicts({k: e for k, e in networks(count=30).items() if k[0] in (64, 128)})[0]
        assert decay.status == "INCONCLUSIVE"
        assert "too few networks or widths" in decay.advice

    def test_depths_that_are_close_together(self):
        depth = verdicts(networks((4, 5, 6), count=25))[1]
        assert depth.status == "INCONCLUSIVE"
        assert depth.interval[0] < -0.1 < depth.interval[1]
        assert "too few networks or depths" in depth.advice

    def test_nothing_to_fit(self):
        decay, depth = verdicts({(8, 1): np.ones((10, 2))})
        assert (decay.status, depth.status) == ("INCONCLUSIVE", "INCONCLUSIVE")
        assert "two widths m ≥ 7(N+1)" in decay.advice
        assert "fewer than three numbers of skips" in depth.advice

    def test_one_width_has_a_slope_but_no_exponent(self):
        decay = verdicts({k: e for k, e in networks().items() if k[0] == 64})[0]
        assert decay.status == "INCONCLUSIVE"
        assert decay.n == 4000


def one_skip(m, count, draw):
    """‖h_i‖²/E‖h_i‖² of `count` networks of one skip, κ = 1, with entries from `draw`."""

    def block(v):
        first, second = (draw((len(v), m, m)) * np.float32((s / m) ** 0.5) for s in (2, 1))
        hidden = np.maximum(np.einsum("nij,nj->ni", first, v), 0)
        return np.einsum("nij,nj->ni", second, hidden)

    parts = []
    for _ in range(count // 200):
        u = block(np.full((200, m), m**-0.5, np.float32))
        z = block(u)
        parts.append(np.stack([(block(z + u) ** 2).sum(1) / 2, (z**2).sum(1)], axis=1))
    return np.concatenate(parts).astype(float)
