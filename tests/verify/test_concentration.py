import numpy as np
import pytest

from stability_probe.verify.concentration import concentration_verdict, depth_verdict
from stability_probe.verify.decays import Decays, coverage_table, fit_decays
from tests.oracles.random_networks import RHOS, networks


def verdicts(cells, rhos=RHOS):
    decays = fit_decays(coverage_table(cells, rhos), resamples=130)
    return concentration_verdict(decays, "r"), depth_verdict(decays, "r")


class TestVerdict:
    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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
