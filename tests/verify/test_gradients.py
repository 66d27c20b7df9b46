import numpy as np
import pandas as pd
import pytest

from stability_probe.verify import Evidence
from stability_probe.verify.gradients import (
    Gradients,
    gradient_bound_verdict,
    gradient_slope_verdict,
)
from stability_probe.verify.statistics import least_share_interval, ratio_units, student_interval
from tests.oracles.evidence import altered, bare, gradients, relabelled, tail_sums, trace, without


def bounds_of(evidence):
    """The calibrated bound per kind of block: (steps, levels, samples)."""
    found = Gradients.of(evidence).bounds()
    return {q: np.stack([found[q, i] for i in (1, 2, 3)], axis=1) for q in "ab"}


def steady(**law):
    """Samples whose losses are the same at all steps, as noise levels make them nearly."""
    evidence = gradients(**law)
    first = evidence.frame[(evidence.frame.step == 1)]
    later = [first.assign(step=step) for step in (1, 50, 100)]
    return Evidence(evidence.name, pd.concat(later, ignore_index=True), evidence.info)


SUMS = tail_sums((1.0, 0.7, 0.49))[:-1]
BOTH = pytest.mark.parametrize("verdict_of", [gradient_slope_verdict, gradient_bound_verdict])


class TestSlope:
    @pytest.mark.parametrize(
        ("power", "status", "meaning"),
        [
            (0.5, "HOLDS", "the order of the bound is right"),
            (0.9, "HOLDS", "the order of the bound is right"),
            (1.0, "INCONCLUSIVE", "a slope of 1 is inside the interval"),
            (1.1, "VIOLATED", "gradients grow faster than the bound"),
            (2.0, "VIOLATED", "gradients grow faster than the bound"),
        ],
    )
    def test_slope_of_a_power_law(self, power, status, meaning):
        verdict = gradient_slope_verdict(gradients(power=power, sums=SUMS))
        assert verdict.estimate == pytest.approx(power, abs=0.02)
        assert verdict.interval[0] < verdict.estimate < verdict.interval[1]
        assert verdict.interval[1] - verdict.interval[0] < 0.06
        assert (verdict.status, verdict.n, verdict.theorem) == (status, 96, "3.3")
        assert meaning in verdict.advice
        assert verdict.bound is None and verdict.slack is None

    def test_the_units_of_the_slope_are_samples(self):
        """The same records at three steps say no more than at one."""
        found = [gradient_slope_verdict(e) for e in (gradients(), steady())]
        assert found[0].confidence == found[1].confidence == pytest.approx(0.9)
        once, thrice = (v.interval[1] - v.interval[0] for v in found)
        assert thrice > 1.3 * once

    def test_the_interval_by_hand(self):
        evidence = steady(noise=0.3, sums=SUMS)
        loss, x = evidence.samples("sample_loss", "loss"), evidence.samples("sample_energy", "x")
        scale = np.log(loss * x * SUMS[:, None])[0]
        dx = scale - scale.mean()
        cross = square = 0
        for q in "ab":
            dy = np.log(evidence.samples("sample_grad_energy", q))[0]
            cross, square = cross + (dx * (dy - dy.mean())).sum(0), square + (dx**2).sum(0)
        expected = student_interval(ratio_units(cross, square), 0.98)
        assert gradient_slope_verdict(evidence, alpha=0.01).interval == pytest.approx(expected)

    def test_measured_is_the_median_of_all_gradient_energies(self):
        evidence = gradients(power=0.9)
        both = [evidence.samples("sample_grad_energy", q) for q in "ab"]
        assert gradient_slope_verdict(evidence).measured == pytest.approx(np.median(both))

    def test_constants_of_blocks_and_steps_do_not_matter(self):
        evidence = gradients(power=0.8, sums=SUMS)
        frame = evidence.frame.copy()
        here = (frame.metric == "sample_grad_energy") & (frame.site == "a") & (frame.step == 50)
        frame.loc[here, "value"] *= 1e6
        scaled = gradient_slope_verdict(Evidence("e", frame, evidence.info))
        assert scaled.estimate == pytest.approx(gradient_slope_verdict(evidence).estimate)

    def test_slopes_over_samples_and_over_levels_are_told_apart(self):
        verdict = gradient_slope_verdict(gradients(sums=SUMS**3, noise=0))
        assert "; 1 over samples within a level, 3 over levels" in verdict.advice
        assert verdict.status == "VIOLATED"

    def test_levels_below_the_last_skip_are_left_out(self):
        verdict = gradient_slope_verdict(gradients(kappa=(1.0, 0.0, 0.0), power=0.9))
        assert verdict.status == "HOLDS"
        assert verdict.estimate == pytest.approx(0.9, abs=0.02)

    def test_frozen_blocks_at_all_levels_that_have_skips(self):
        evidence = gradients(kappa=(1.0, 0.0, 0.0), power=0.9)
        gone = evidence.frame.eval("metric == 'sample_grad_energy' and level == 1")
        verdict = gradient_slope_verdict(Evidence("e", evidence.frame[~gone], evidence.info))
        assert verdict.status in ("INCONCLUSIVE", "ASSUMPTION_UNMET")

    def test_without_skips(self):
        verdict = gradient_slope_verdict(gradients(kappa=(0.0,) * 3))
        assert verdict.status == "ASSUMPTION_UNMET"
        assert "Σκ² = 0 without skips" in verdict.advice


class TestBound:
    def test_the_derived_law_is_bounded_tightly(self):
        verdict = gradient_bound_verdict(gradients(noise=0.01))
        assert verdict.status == "HOLDS"
        assert verdict.slack == pytest.approx(1, abs=0.05)
        assert verdict.n == 48

    def test_constants_are_those_of_the_derived_law(self):
        constants = Gradients.of(gradients(c=3.0, noise=0)).constants()
        assert set(constants) == {"a", "b"}
        np.testing.assert_allclose(constants["a"], [3, 3, 3])
        np.testing.assert_allclose(constants["b"], [30, 30, 30])

    def test_constants_are_the_least_that_cover_the_easy_half(self):
        evidence = gradients(noise=0.5)
        loss, x = evidence.samples("sample_loss", "loss"), evidence.samples("sample_energy", "x")
        g = evidence.samples("sample_grad_energy", "a")
        overall = (loss * x)[:, 0].prod(axis=0)
        easy = overall <= np.median(overall)
        for t, c in enumerate(Gradients.of(evidence).constants()["a"]):
            size = loss[t, 0] * x[t, 0]
            ratio = g[t][:, easy] / ((SUMS + 1)[:, None] * size[easy])
            assert c == pytest.approx(ratio.max())

    def test_bounds_by_hand(self):
        evidence = gradients(noise=0)
        loss, x = evidence.samples("sample_loss", "loss"), evidence.samples("sample_energy", "x")
        bounds = bounds_of(evidence)
        np.testing.assert_allclose(bounds["a"], 3 * loss * x * (SUMS + 1)[:, None])
        np.testing.assert_allclose(bounds["b"], 10 * bounds["a"])

    def test_gradients_that_grow_slower(self):
        verdict = gradient_bound_verdict(steady(power=0.9))
        assert (verdict.status, verdict.estimate) == ("HOLDS", 1.0)
        assert verdict.interval == (pytest.approx(0.05 ** (1 / 48)), 1.0)
        assert verdict.confidence == pytest.approx(0.9)
        assert verdict.slack > 1

    def test_gradients_that_grow_as_the_square(self):
        verdict = gradient_bound_verdict(steady(power=2))
        assert verdict.status == "VIOLATED"
        assert "do not cover the hard ones" in verdict.advice

    def test_measured_and_bound_are_those_of_one_hard_sample(self):
        evidence = gradients(noise=0.5)
        verdict = gradient_bound_verdict(evidence)
        (q,) = (q for q in "ab" if verdict.measured in evidence.samples("sample_grad_energy", q))
        t, i, s = np.argwhere(evidence.samples("sample_grad_energy", q) == verdict.measured)[0]
        assert s in Gradients.of(evidence).halves[1]
        assert verdict.bound == pytest.approx(bounds_of(evidence)[q][t, i, s])

    def test_without_skips_the_constant_is_left(self):
        assert gradient_bound_verdict(gradients(kappa=(0.0,) * 3, power=0.9)).status == "HOLDS"

    def test_enough_samples_to_try_and_too_few_to_tell(self):
        evidence = gradients(38, power=0.9)
        worst = f"s{Gradients.of(evidence).halves[1][-1]}"
        missed = altered(evidence, "sample_grad_energy", "a", 1e9, stat=worst)
        verdict = gradient_bound_verdict(missed)
        assert (verdict.status, verdict.n) == ("INCONCLUSIVE", 19)
        assert "too few samples to tell; " in verdict.advice

    def test_no_sample_is_calibrated_on_and_held_out(self):
        """What happens to a sample of the larger half at one step moves no constant at another."""
        evidence = gradients()
        easy, hard = Gradients.of(evidence).halves
        assert sorted([*easy, *hard]) == list(range(96)) and len(easy) == 48
        before = Gradients.of(evidence).constants()
        for s in hard:
            evidence = altered(evidence, "sample_grad_energy", "a", 1e6, step=50, stat=f"s{s}")
        after = Gradients.of(evidence).constants()
        np.testing.assert_array_equal(after["a"], before["a"])

    def test_the_interval_is_of_the_smallest_of_six_shares(self):
        verdict = gradient_bound_verdict(steady(power=1.3, noise=0.3))
        assert verdict.estimate < 1
        assert verdict.interval == least_share_interval(verdict.estimate, 48, 0.05, 6)


@BOTH
@pytest.mark.parametrize("samples", [1, 37])
def test_too_few_samples(verdict_of, samples):
    verdict = verdict_of(gradients(samples, power=0.9))
    assert (verdict.status, verdict.n) == ("INCONCLUSIVE", samples)
    assert f"gradients of {samples} samples were recorded; 38 are needed" in verdict.advice


@BOTH
def test_nothing_recorded(verdict_of):
    verdict = verdict_of(trace())
    assert (verdict.status, verdict.n, verdict.measured) == ("INCONCLUSIVE", 0, None)


@BOTH
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("site", ["a", "b"])
def test_broken_gradients(verdict_of, site, value):
    verdict = verdict_of(altered(gradients(), "sample_grad_energy", site, value, stat="s3"))
    assert (verdict.status, verdict.n) == ("ASSUMPTION_UNMET", 96)
    assert "broken down" in verdict.advice


@BOTH
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_broken_losses(verdict_of, value):
    verdict = verdict_of(altered(gradients(), "sample_loss", "loss", value, stat="s3"))
    assert verdict.status == "ASSUMPTION_UNMET"


@BOTH
@pytest.mark.parametrize(
    ("metric", "site", "value"),
    [
        ("sample_loss", "loss", float("inf")),
        ("sample_energy", "x", 0.0),
        ("sample_energy", "x", float("nan")),
        ("sample_energy", "x", float("inf")),
    ],
)
def test_broken_scales(verdict_of, metric, site, value):
    verdict = verdict_of(altered(gradients(power=0.9), metric, site, value, stat="s3"))
    assert verdict.status == "ASSUMPTION_UNMET"


@BOTH
@pytest.mark.parametrize("frozen", ["a", "b", "a_2"])
def test_frozen_blocks_have_no_gradients(verdict_of, frozen):
    evidence = gradients(power=0.9)
    if frozen == "a_2":
        here = evidence.frame.eval("metric == 'sample_grad_energy' and site == 'a' and level == 2")
        evidence = Evidence("e", evidence.frame[~here], evidence.info)
    else:
        evidence = without(evidence, f"sample_grad_energy/{frozen}")
    assert verdict_of(evidence).status in ("HOLDS", "INCONCLUSIVE")


@BOTH
def test_records_without_a_run(verdict_of):
    evidence = gradients(power=0.9)
    stated, measured = verdict_of(evidence), verdict_of(bare(evidence))
    assert (measured.status, measured.run) == ("HOLDS", "records")
    assert measured.estimate == pytest.approx(stated.estimate)


@BOTH
def test_measured_gains_are_said_to_be_such(verdict_of):
    note = "κ is the mean measured gain"
    assert note in verdict_of(relabelled(gradients(power=0.9), kappa=None)).advice
    assert note not in verdict_of(gradients(power=0.9)).advice


def test_one_block_that_always_exceeds_its_bound_is_not_averaged_away():
    evidence = gradients(96, power=0.9)
    for sample in Gradients.of(evidence).halves[1]:
        where = {"stat": f"s{sample}", "level": 1}
        evidence = altered(evidence, "sample_grad_energy", "a", 1e12, **where)
    verdict = gradient_bound_verdict(evidence)
    assert (verdict.status, verdict.estimate) == ("VIOLATED", 0)
    assert "a_1" in verdict.statistic
