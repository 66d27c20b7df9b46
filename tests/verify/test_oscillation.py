import numpy as np
import pytest

from stability_probe.verify import Evidence
from stability_probe.verify.oscillation import oscillation_table, oscillation_verdict
from tests.oracles.evidence import altered, trace, traced, training


def runs(n, amplitude=lambda kappa: 32 * kappa**2):
    """n runs of one skip with κ from 0.1 to 1, whose energies swing by `amplitude(κ)`."""
    kappas = np.linspace(0.1, 1, n)
    swings = np.array([amplitude(k) for k in kappas])
    return [
        trace((k,), scheme=f"uniform:{k:.3g}", amplitude=float(a))
        for k, a in zip(kappas, swings, strict=True)
    ]


class TestTable:
    def test_by_hand(self):
        table = oscillation_table([trace((1.0, 0.5), x=10.0, scheme="a", amplitude=7.0)])
        assert list(table.run) == ["a"] * 3
        assert list(table.level) == [0, 1, 2]
        # Σ_{j≥i} κ_j² of the paper: over all skips at h_0 and at h_1
        np.testing.assert_allclose(table.skip_energy, [12.5, 12.5, 2.5])
        np.testing.assert_allclose(table["range"], [7.0] * 3)

    def test_the_first_sixth_of_training_is_left_out(self):
        energy = np.arange(60.0)[:, None] + [0.0, 0.0]
        table = oscillation_table(
            [training(traced("energy", "h", energy), traced("energy", "x", energy), kappa=[1.0])]
        )
        assert list(table["range"]) == [49.0, 49.0]  # of steps 11..60

    def test_several_runs_stand_below_each_other(self):
        table = oscillation_table([trace(scheme="a"), trace((1.0,), scheme="b")])
        assert list(table.run) == ["a"] * 4 + ["b"] * 2


class TestVerdict:
    def test_ranges_that_rise_with_the_sum(self):
        verdict = oscillation_verdict(runs(6))
        assert (verdict.status, verdict.theorem) == ("HOLDS", "3.1")
        assert verdict.estimate == pytest.approx(1)
        assert verdict.interval[0] > 0.9
        assert (verdict.n, verdict.run, verdict.bound) == (6, "6 runs", None)
        assert verdict.measured == pytest.approx(32 * (0.46**2 + 0.64**2) / 2)  # the median

    def test_ranges_that_fall_with_the_sum(self):
        verdict = oscillation_verdict(runs(6, lambda kappa: 100 * (1.1 - kappa)))
        assert verdict.status == "VIOLATED"
        assert verdict.estimate == pytest.approx(-1)
        assert "oscillate less" in verdict.advice

    def test_ranges_that_have_nothing_to_do_with_the_sum(self):
        rng = np.random.default_rng(0)
        verdict = oscillation_verdict(runs(10, lambda kappa: rng.uniform(1, 100)))
        assert verdict.status == "INCONCLUSIVE"
        assert verdict.interval[0] < 0 < verdict.interval[1]
        assert "add runs with more seeds or schemes" in verdict.advice

    @pytest.mark.parametrize("n", [2, 4])
    def test_too_few_runs(self, n):
        verdict = oscillation_verdict(runs(n))
        assert (verdict.status, verdict.n, verdict.interval) == ("INCONCLUSIVE", n, None)
        assert "needs at least 5" in verdict.advice

    @pytest.mark.parametrize("same", ["kappa", "range"])
    def test_nothing_that_varies(self, same):
        constant = [trace(scheme=f"s{i}", amplitude=1.0 + i) for i in range(5)]
        verdict = oscillation_verdict(constant if same == "kappa" else runs(5, lambda _: 3.0))
        assert (verdict.status, verdict.interval) == ("INCONCLUSIVE", None)

    def test_a_run_without_skips_is_named(self):
        bare = trace((0.0,), scheme="uniform:0", amplitude=500.0)
        verdict = oscillation_verdict([*runs(5), bare])
        assert "uniform:0 (no skips) counts too" in verdict.advice
        assert verdict.estimate < 0.5
        assert "no skips" not in oscillation_verdict(runs(5)).advice

    def test_runs_of_different_depth_are_compared_where_both_are(self):
        deeper = trace((1.0,) * 3, scheme="deep", amplitude=1000.0)
        assert oscillation_verdict([*runs(5), deeper]).status == "HOLDS"

    def test_a_run_that_broke_down_is_not_left_out(self):
        broken = altered(trace((0.01,), scheme="x"), "energy", "h", float("nan"), step=90)
        verdict = oscillation_verdict([*runs(6), broken])
        assert verdict.n == 7
        assert -1 <= verdict.estimate < 0.9  # it has the largest range, at the smallest κ

    def test_a_run_with_nothing_recorded_yet(self):
        assert oscillation_verdict([*runs(6), training(scheme="new")]).n == 6

    def test_runs_of_one_name(self):
        again = [Evidence("same", run.frame, run.info) for run in runs(6)]
        assert oscillation_verdict(again).n == 6


def test_five_runs_in_order_are_hardly_a_coincidence_and_three_of_five_are():
    """One order of 120 is the best of all: p = 1/120."""
    ordered = oscillation_verdict(runs(5))
    assert ordered.status == "HOLDS" and "p = 0.0083" in ordered.advice
