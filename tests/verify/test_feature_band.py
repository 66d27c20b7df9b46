import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stability_probe.verify.feature_band import (
    COVERED,
    WIDEST,
    feature_band_verdict,
    fit_band,
    fit_bands,
)
from stability_probe.verify.statistics import least_share_interval, share_interval
from tests.oracles.evidence import altered, band, bare, relabelled, tail_sums, trace

laws = settings(deadline=None, derandomize=True, max_examples=30)


def noisy(signal, c1, c2, noise, seed=0):
    rng = np.random.default_rng(seed)
    return (c1 * signal + c2) * np.exp(noise * rng.normal(size=signal.shape))


class TestFit:
    signal = np.linspace(1, 50, 400)

    @laws
    @given(st.floats(0.01, 100), st.floats(0.01, 100))
    def test_constants_of_a_line_are_found(self, c1, c2):
        band = fit_band(self.signal, noisy(self.signal, c1, c2, 0))
        np.testing.assert_allclose(
            band.c1 * self.signal + band.c2, c1 * self.signal + c2, rtol=1e-3
        )
        assert band.rho < 1e-3

    @laws
    @given(st.floats(1e-6, 1e6))
    def test_constants_scale_with_the_energies_and_rho_does_not(self, factor):
        energy = noisy(self.signal, 2, 5, 0.2)
        band, scaled = fit_band(self.signal, energy), fit_band(self.signal, factor * energy)
        np.testing.assert_allclose([scaled.c1, scaled.c2], factor * np.array([band.c1, band.c2]),
                                   rtol=1e-3)  # fmt: skip
        assert scaled.rho == pytest.approx(band.rho, rel=1e-3)

    @pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
    def test_the_band_covers_the_share_it_is_made_for(self, noise):
        energy = noisy(self.signal, 2, 5, noise)
        band = fit_band(self.signal, energy)
        ratio = energy / (band.c1 * self.signal + band.c2)
        inside = ((1 - band.rho) ** 2 <= ratio) & (ratio <= (1 + band.rho) ** 2)
        assert COVERED - 0.01 <= inside.mean() <= COVERED + 0.01

    def test_rho_of_a_known_spread(self):
        energy = np.where(np.arange(400) % 2, 4.0, 1.0)  # √ from 1 to 2: ρ = (2−1)/(2+1)
        band = fit_band(np.zeros(400), energy)
        assert band.c1 == 0
        assert band.rho == pytest.approx(1 / 3)
        assert band.c2 == pytest.approx(2.25)  # (1−ρ)² 2.25 = 1 and (1+ρ)² 2.25 = 4

    def test_rho_has_a_limit(self):
        assert fit_band(self.signal, noisy(self.signal, 2, 5, 4.0)).rho == WIDEST

    def test_a_band_that_cannot_cover_everything_lies_in_the_middle(self):
        """It leaves out as much above as below."""
        signal = np.linspace(1, 50, 20_000)
        energy = noisy(signal, 2, 5, 1.5)
        band = fit_band(signal, energy)
        ratio = energy / (band.c1 * signal + band.c2)
        above, below = (ratio > (1 + WIDEST) ** 2).mean(), (ratio < (1 - WIDEST) ** 2).mean()
        expected = stats.norm.sf(np.log((1 + WIDEST) / (1 - WIDEST)) / 1.5)
        assert above == pytest.approx(expected, rel=0.15)
        assert below == pytest.approx(expected, rel=0.15)

    def test_a_band_for_every_step(self):
        bands = fit_bands(band(noise=0, c1=2, c2=30))
        np.testing.assert_allclose([b.c1 for b in bands], [2, 20, 200], rtol=1e-3)
        np.testing.assert_allclose([b.c2 for b in bands], [30, 300, 3000], rtol=1e-3)

    def test_odd_samples_are_not_seen_by_the_fit(self):
        assert fit_bands(band(odd=1000.0)) == fit_bands(band())


class TestVerdict:
    def test_energies_that_the_sum_explains(self):
        verdict = feature_band_verdict(band())
        assert verdict.status == "HOLDS"
        assert verdict.n == 48
        assert 0.95 < verdict.estimate <= 1
        assert verdict.interval[0] > 0.85
        assert 1 < verdict.slack < 2

    def test_without_noise_the_band_is_a_line(self):
        verdict = feature_band_verdict(band(noise=0))
        assert (verdict.status, verdict.estimate) == ("HOLDS", 1.0)
        assert verdict.interval == (pytest.approx(0.05 ** (1 / 48)), 1.0)
        assert verdict.confidence == pytest.approx(0.9)
        assert verdict.slack == pytest.approx(1, abs=1e-3)

    def test_measured_and_bound_are_those_of_one_sample(self):
        evidence = band()
        verdict = feature_band_verdict(evidence)
        x, h = evidence.samples("sample_energy", "x"), evidence.samples("sample_energy", "h")
        t, i, s = np.argwhere(h == verdict.measured)[0]
        fitted = fit_bands(evidence)[t]
        line = fitted.c1 * x[t, 0, s] * tail_sums(evidence.kappa)[i] + fitted.c2
        assert s % 2 == 1  # held out
        assert verdict.bound == pytest.approx((1 + fitted.rho) ** 2 * line)

    @pytest.mark.parametrize("odd", [3.0, 1 / 3, 1000.0])
    def test_a_held_out_half_that_is_different(self, odd):
        verdict = feature_band_verdict(band(odd=odd))
        assert (verdict.status, verdict.estimate) == ("VIOLATED", 0.0)

    def test_energies_that_the_sum_does_not_explain(self):
        verdict = feature_band_verdict(band(noise=3))
        assert verdict.status == "VIOLATED"
        assert "energies spread more than Σκ² and ρ ≤ 0.8 allow" in verdict.advice

    def test_wrong_kappa_in_run_json(self):
        evidence = band(kappa=(1.0, 0.1, 0.01), c2=1e-3)  # h_0..h_3 over four decades
        assert feature_band_verdict(evidence).status == "HOLDS"
        reversed_ = relabelled(evidence, kappa=[0.01, 0.1, 1.0])
        assert feature_band_verdict(reversed_).status == "VIOLATED"

    def test_the_papers_sum_is_looser(self):
        tight, paper = (feature_band_verdict(band(), index) for index in ("tight", "paper"))
        assert "tight sum" in tight.claim and "paper sum" in paper.claim
        assert tight.slack < paper.slack

    def test_without_skips_the_constant_is_left(self):
        verdict = feature_band_verdict(band(kappa=(0.0,) * 3))
        assert verdict.status == "HOLDS"

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("stat", ["s2", "s3"])
    def test_broken_energies(self, value, stat):
        verdict = feature_band_verdict(altered(band(), "sample_energy", "h", value, stat=stat))
        assert (verdict.status, verdict.n) == ("ASSUMPTION_UNMET", 48)
        assert "broken down" in verdict.advice

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("stat", ["s2", "s3"])
    def test_broken_inputs(self, value, stat):
        verdict = feature_band_verdict(altered(band(), "sample_energy", "x", value, stat=stat))
        assert verdict.status == "ASSUMPTION_UNMET"

    @pytest.mark.parametrize(("samples", "held_out"), [(36, 18), (37, 18), (1, 0)])
    def test_too_few_samples(self, samples, held_out):
        verdict = feature_band_verdict(band(samples))
        assert (verdict.status, verdict.n) == ("INCONCLUSIVE", held_out)
        assert f"{held_out} held-out samples; a probe batch of 38 is needed" in verdict.advice

    def test_enough_samples_to_try_and_too_few_to_tell(self):
        missed = altered(band(38), "sample_energy", "h", 1e6, stat="s1")
        verdict = feature_band_verdict(missed)
        assert (verdict.status, verdict.n) == ("INCONCLUSIVE", 19)
        assert verdict.interval[0] < 0.85 < verdict.interval[1]
        assert "too few samples to tell; pass StabilityProbe(..., batch=" in verdict.advice

    def test_a_smaller_alpha_needs_more_samples(self):
        verdict = feature_band_verdict(band(38), alpha=0.01)
        assert (verdict.status, verdict.interval) == ("INCONCLUSIVE", None)
        assert "a probe batch of 58 is needed" in verdict.advice
        assert feature_band_verdict(band(58, noise=0), alpha=0.01).status == "HOLDS"

    def test_the_alarm_is_corrected_for_the_number_of_levels(self):
        """Of 48 held out some 35 inside at one level of four: less than 85 % on its own."""
        evidence = band(96)
        for sample in range(1, 24, 2):
            evidence = altered(evidence, "sample_energy", "h", 1e9, stat=f"s{sample}", level=0)
        verdict = feature_band_verdict(evidence)
        assert 35 / 48 < verdict.estimate < 36 / 48
        assert share_interval(verdict.estimate, 48, 0.9)[1] < 0.85
        assert verdict.interval == least_share_interval(verdict.estimate, 48, 0.05, 4)
        assert verdict.status == "INCONCLUSIVE"

    def test_nothing_recorded(self):
        verdict = feature_band_verdict(trace())
        assert (verdict.status, verdict.n) == ("INCONCLUSIVE", 0)

    def test_records_without_a_run(self):
        verdict = feature_band_verdict(bare(band()))
        assert (verdict.status, verdict.run) == ("HOLDS", "records")
        assert verdict.estimate == feature_band_verdict(band()).estimate

    def test_measured_gains_are_said_to_be_such(self):
        note = "κ is the mean measured gain"
        assert note in feature_band_verdict(relabelled(band(), kappa=None)).advice
        assert note not in feature_band_verdict(band()).advice


def test_one_level_that_is_never_inside_is_not_averaged_away():
    """h_0 of every held-out sample is far outside, the other levels are inside."""
    evidence = band(96)
    for sample in range(1, 96, 2):
        evidence = altered(evidence, "sample_energy", "h", 1e9, stat=f"s{sample}", level=0)
    verdict = feature_band_verdict(evidence)
    assert (verdict.status, verdict.estimate) == ("VIOLATED", 0)
    assert "h_0" in verdict.statistic


def test_the_advice_says_how_much_the_sum_explains():
    clear = feature_band_verdict(band(96, noise=0.0)).advice
    assert "Σκ²‖x_t‖² explains 100% of the variation" in clear
