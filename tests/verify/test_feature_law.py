from collections import Counter
from functools import cache

import numpy as np
import pytest

from stability_probe.runs import EnsembleConfig, record_ensemble
from stability_probe.verify import Evidence
from stability_probe.verify.feature_law import feature_law_verdict, law_table
from stability_probe.verify.statistics import mean_interval
from tests.oracles.evidence import KAPPA, altered, ensemble, relabelled

SCHEMES = ("unscaled", "inverse-sqrt2", "uniform:0.5", "uniform:0", "cs:0.7", "ls", "ls-non-shared")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """200 random networks of Eq. 4, m = 256, N = 5, under every scheme."""
    runs = record_ensemble(
        EnsembleConfig(gradients=False), SCHEMES, tmp_path_factory.mktemp("ensemble")
    )
    return {run.info["scheme"]: Evidence.of(run) for run in runs}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """100 random networks of m = 64 with some setting changed, recorded once, by scheme."""

    @cache
    def record(**setting):
        config = EnsembleConfig(**{"networks": 100, "m": 64, "gradients": False, **setting})
        runs = record_ensemble(config, ["unscaled", "cs:0.7"], tmp_path_factory.mktemp("changed"))
        return {run.info["scheme"]: Evidence.of(run) for run in runs}

    return record


@pytest.mark.slow
class TestRealNetworks:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_the_law_holds_under_every_scheme(self, networks, scheme):
        verdict = feature_law_verdict(networks[scheme])
        assert verdict.status == "HOLDS"
        assert verdict.interval[0] <= 1 <= verdict.interval[1]
        assert verdict.interval[1] - verdict.interval[0] < 0.2
        assert (verdict.theorem, verdict.n, verdict.run) == ("3.1", 200, scheme)
        assert verdict.slack == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize(
        ("scheme", "bound"),
        [("unscaled", 6), ("inverse-sqrt2", 3.5), ("uniform:0", 1), ("cs:0.7", 2.9054)],
    )
    def test_the_bound_is_the_prediction_for_the_output(self, networks, scheme, bound):
        assert feature_law_verdict(networks[scheme]).bound == pytest.approx(bound, abs=1e-4)

    def test_wrong_kappa_in_run_json(self, networks):
        mislabelled = relabelled(networks["cs:0.7"], kappa=[1.0] * 5)
        verdict = feature_law_verdict(mislabelled)
        assert verdict.status == "VIOLATED"
        assert "a premise fails: κ as stated" in verdict.advice

    def test_wrong_block_gain_in_run_json(self, networks):
        verdict = feature_law_verdict(relabelled(networks["unscaled"], block_gain=2.0))
        assert verdict.status == "VIOLATED"

    def test_learned_gates_taken_for_no_scaling(self, networks):
        assert feature_law_verdict(relabelled(networks["ls"], kappa=[1.0] * 5)).status == "VIOLATED"

    def test_too_few_networks(self, networks):
        one = networks["unscaled"].frame.query("step == 1")
        verdict = feature_law_verdict(Evidence("one", one, networks["unscaled"].info))
        assert (verdict.status, verdict.n, verdict.interval) == ("INCONCLUSIVE", 1, None)
        assert "too few networks" in verdict.advice

    @pytest.mark.slow
    @pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7"])
    def test_concatenating_merges(self, changed, scheme):
        assert feature_law_verdict(changed(merge="concat", m=128)[scheme]).status == "HOLDS"

    @pytest.mark.slow
    @pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7"])
    def test_block_gain_2(self, changed, scheme):
        found = changed(unit_gain=False)[scheme]
        assert found.info["block_gain"] == 2.0
        assert feature_law_verdict(found).status == "HOLDS"
        assert feature_law_verdict(relabelled(found, block_gain=1.0)).status == "VIOLATED"

    @pytest.mark.slow
    @pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7"])
    def test_final_relus_break_a_premise(self, changed, scheme):
        assert feature_law_verdict(changed(final_relu=True)[scheme]).status == "VIOLATED"


def test_table_by_hand():
    predicted, measured = law_table(ensemble(4, noise=0, kappa=(1.0, 0.5)))
    np.testing.assert_allclose(predicted, [2.25, 1.25, 1.0])
    np.testing.assert_allclose(measured, np.tile(predicted, (4, 1)))


def test_table_with_gain_2_by_hand():
    predicted, _ = law_table(ensemble(2, kappa=(0.5,), block_gain=2.0))
    np.testing.assert_allclose(predicted, [2 * (0.25 * 2 + 4), 4])


def test_slope_and_intercept_are_estimated():
    verdict = feature_law_verdict(ensemble(50, slope=0.9, intercept=0.3, noise=0.01))
    assert verdict.estimate == pytest.approx(0.9, abs=0.01)
    assert "; intercept 0.3 [0.3, 0.3]" in verdict.advice
    law = 0.9 * (1 + sum(k**2 for k in KAPPA)) + 0.3
    assert verdict.measured == pytest.approx(law, rel=0.01)
    assert verdict.bound == pytest.approx(1 + sum(k**2 for k in KAPPA))
    assert verdict.slack == pytest.approx(verdict.bound / verdict.measured)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({}, "HOLDS"),
        ({"slope": 1.2}, "VIOLATED"),
        ({"slope": 0.8}, "VIOLATED"),
        ({"intercept": 0.3}, "VIOLATED"),  # slope 1, and yet not the law
        ({"intercept": -0.3}, "VIOLATED"),
    ],
)
def test_slope_and_intercept_decide(wrong, status):
    verdict = feature_law_verdict(ensemble(200, seed=1, **wrong))
    assert verdict.status == status


@pytest.mark.parametrize(("slope", "status"), [(1.0, "HOLDS"), (1.3, "VIOLATED")])
def test_without_skips_the_line_goes_through_the_origin(slope, status):
    verdict = feature_law_verdict(ensemble(200, kappa=(0.0,) * 3, slope=slope))
    assert verdict.status == status
    assert "line through the origin" in verdict.advice


def test_an_interval_too_wide_to_say_anything():
    verdict = feature_law_verdict(ensemble(30, noise=1.2, seed=2))
    assert verdict.interval[0] <= 1 <= verdict.interval[1]
    assert verdict.interval[1] - verdict.interval[0] > 0.5
    assert verdict.status == "INCONCLUSIVE"


def test_false_alarms_are_rare():
    trials, allowed = 100, 0.05
    counts = Counter(
        feature_law_verdict(ensemble(120, noise=0.35, seed=s)).status for s in range(trials)
    )
    z = (counts["VIOLATED"] - allowed * trials) / (trials * allowed * (1 - allowed)) ** 0.5
    assert z < 4
    assert counts["HOLDS"] > 0.8 * trials


@pytest.mark.parametrize("slope", [0.8, 1.2])
def test_power(slope):
    evidence = (ensemble(150, noise=0.4, slope=slope, seed=100 + s) for s in range(25))
    counts = Counter(feature_law_verdict(e).status for e in evidence)
    assert counts["VIOLATED"] >= 0.9 * 25


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_broke_down_is_not_left_out(value):
    verdict = feature_law_verdict(altered(ensemble(60), "energy", "h", value, step=3))
    assert verdict.status == "ASSUMPTION_UNMET"


def test_only_broken_networks():
    verdict = feature_law_verdict(altered(ensemble(60), "energy", "h", float("nan")))
    assert verdict.status == "ASSUMPTION_UNMET"


def test_nothing_recorded_yet():
    evidence = ensemble()
    verdict = feature_law_verdict(Evidence("e", evidence.frame.iloc[:0], evidence.info))
    assert (verdict.status, verdict.n) == ("INCONCLUSIVE", 0)


def test_a_few_networks_raise_no_more_alarms_than_many():
    counts = Counter(feature_law_verdict(ensemble(2, seed=s)).status for s in range(60))
    assert (counts["VIOLATED"] - 6) / 5.4**0.5 < 4


def test_slope_and_intercept_share_alpha():
    evidence = ensemble(60)
    predicted, measured = law_table(evidence)
    lines = np.array([np.polyfit(predicted, network, 1) for network in measured])
    verdict = feature_law_verdict(evidence, alpha=0.1)
    assert verdict.confidence == pytest.approx(0.95)
    assert verdict.interval == pytest.approx(mean_interval(lines[:, 0], 0.95))
    low, high = mean_interval(lines[:, 1], 0.95)
    assert f"[{low:.2g}, {high:.2g}]" in verdict.advice


def test_a_slope_alone_has_all_of_alpha():
    assert feature_law_verdict(ensemble(kappa=(0.0,) * 3)).confidence == pytest.approx(0.95)


def test_too_wide_an_interval_says_how_many_networks_are_needed():
    verdict = feature_law_verdict(ensemble(30, noise=1.2, seed=2))
    width = verdict.interval[1] - verdict.interval[0]
    assert f"record about {int(np.ceil(30 * (width / 0.5) ** 2))}" in verdict.advice


def test_the_law_without_noise():
    verdict = feature_law_verdict(ensemble(60, noise=0))
    assert verdict.estimate == pytest.approx(1)
    assert verdict.status == "HOLDS"
