"""Theorem 3.1 on one network under multiples of its κ."""

import numpy as np
import pytest

from stability_probe.verify.counterfactual import LINEAR, Counterfactual, counterfactual_verdict
from stability_probe.verify.statistics import least_mean_interval, ratio_units
from tests.oracles.evidence import (
    FACTORS,
    altered,
    checkpoint,
    relabelled,
    tail_sums,
    trace,
    without,
)


class TestRecords:
    def test_signal_and_energy_by_hand(self):
        found = Counterfactual.of(checkpoint(noise=0))
        np.testing.assert_array_equal(found.factors, FACTORS)
        np.testing.assert_allclose(found.signal[-1], [1.25, 0.25, 0.0])
        np.testing.assert_allclose(found.signal[2], [0.3125, 0.0625, 0.0])
        assert found.energy.shape == (5, 3, 3, 40)
        np.testing.assert_allclose(found.energy[-1, 0, :, 0], 2 * tail_sums((1.0, 0.5)) + 3)

    def test_every_sample_has_its_line(self):
        slope, residual, total = Counterfactual.of(checkpoint(noise=0)).fits()
        np.testing.assert_allclose(slope[:, :2], np.full((3, 2, 40), 2.0))
        assert np.isnan(slope[:, 2]).all()  # no skip feeds h_N
        assert (residual[:, :2] < 1e-20).all()
        spread = np.var([2 * 0.25 * s**2 for s in FACTORS]) * len(FACTORS)
        np.testing.assert_allclose(total[:, 1], np.full((3, 40), spread))

    def test_nothing_recorded(self):
        assert not len(Counterfactual.of(trace()).factors)


class TestVerdict:
    def test_a_line_holds(self):
        verdict = counterfactual_verdict(checkpoint(noise=0))
        assert (verdict.status, verdict.theorem, verdict.n) == ("HOLDS", "3.1", 40)
        assert verdict.estimate == pytest.approx(1.0)
        assert verdict.slack == pytest.approx(1.0)
        assert "least slope c₁ = 2 [2, 2]" in verdict.advice

    def test_a_noisy_line_holds(self):
        verdict = counterfactual_verdict(checkpoint(noise=0.005))
        assert verdict.status == "HOLDS"
        assert LINEAR < verdict.interval[0] < verdict.estimate < verdict.interval[1] < 1

    def test_the_interval_is_of_the_smallest_of_six(self):
        evidence = checkpoint(noise=0.02)
        verdict = counterfactual_verdict(evidence)
        slope, residual, total = (
            v[:, :2].reshape(6, 40) for v in Counterfactual.of(evidence).fits()
        )
        expected = least_mean_interval(1 - ratio_units(residual, total), 0.05, 12)
        assert verdict.interval == pytest.approx(expected)
        assert verdict.confidence == pytest.approx(0.9)
        low, high = least_mean_interval(slope, 0.05, 12)
        assert f"[{low:.3g}, {high:.3g}]" in verdict.advice

    def test_inconclusive_says_how_many_samples_are_needed(self):
        verdict = counterfactual_verdict(checkpoint(noise=0.026))
        assert verdict.status == "INCONCLUSIVE"
        assert verdict.interval[0] < LINEAR < verdict.interval[1]
        assert "; too few samples to tell: pass --batch " in verdict.advice

    def test_a_falling_line_is_violated(self):
        verdict = counterfactual_verdict(checkpoint(slope=-1.0, noise=0))
        assert verdict.status == "VIOLATED"
        assert verdict.estimate == pytest.approx(1.0)

    def test_a_parabola_is_violated(self):
        """‖h‖² that rises and falls again with Σκ²."""
        verdict = counterfactual_verdict(checkpoint(slope=4.0, bend=-3.2, noise=0))
        assert verdict.status == "VIOLATED"
        assert verdict.estimate < LINEAR
        assert "h_0 at t = 50" in verdict.statistic

    def test_energy_that_noise_alone_moves_is_violated(self):
        assert counterfactual_verdict(checkpoint(slope=0.0, noise=0.1)).status == "VIOLATED"

    def test_the_worst_noise_level_decides(self):
        evidence = checkpoint(noise=0)
        assert counterfactual_verdict(evidence).status == "HOLDS"
        bent = altered(evidence, "counterfactual_energy", "s=1", 1.0, step=2, level=1)
        verdict = counterfactual_verdict(bent)
        assert verdict.status == "VIOLATED"
        assert "h_1 at t = 500" in verdict.statistic

    def test_the_bound_is_drawn_on_from_smaller_s(self):
        verdict = counterfactual_verdict(checkpoint(bend=0.4, noise=0))
        assert verdict.measured == pytest.approx(2 * 1.25 + 0.4 * 1.25**2 + 3)
        x = 1.25 * np.square(FACTORS[:-1])
        slope, offset = np.polyfit(x, 2 * x + 0.4 * x**2 + 3, 1)
        assert verdict.bound == pytest.approx(offset + 1.25 * slope)

    def test_own_constants_of_the_network_scale_the_signal(self):
        halved = relabelled(checkpoint(noise=0), skips=[{"kappa": 0.5}, {"kappa": 0.5}])
        assert "least slope c₁ = 8 " in counterfactual_verdict(halved).advice

    @pytest.mark.parametrize(
        ("evidence", "status", "advice"),
        [
            (checkpoint(samples=19), "INCONCLUSIVE", "19 samples were measured and 20 are needed"),
            (without(checkpoint(), "counterfactual_energy"), "INCONCLUSIVE", "0 samples"),
            (checkpoint(kappa=(0.0, 0.0)), "ASSUMPTION_UNMET", "every κ is 0"),
            (
                altered(checkpoint(), "counterfactual_energy", "s=0.5", np.nan, stat="s3"),
                "ASSUMPTION_UNMET", "infinite or NaN",
            ),
            (checkpoint(slope=0.0, noise=0), "ASSUMPTION_UNMET", "does not change with κ at all"),
        ],
    )  # fmt: skip
    def test_records_that_cannot_carry_the_claim(self, evidence, status, advice):
        verdict = counterfactual_verdict(evidence)
        assert verdict.status == status
        assert advice in verdict.advice

    def test_a_network_without_noise_levels(self):
        verdict = counterfactual_verdict(relabelled(checkpoint(noise=0), noise_levels=None))
        assert verdict.statistic.endswith("worst: h_1 (needs 0.9)") or "h_0 (" in verdict.statistic
