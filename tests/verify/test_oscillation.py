import itertools
from collections import Counter

import numpy as np
import pytest

from stability_probe.verify import Evidence
from stability_probe.verify.oscillation import (
    PERMUTATIONS,
    _orders,
    oscillation_table,
    oscillation_verdict,
)
from tests.oracles.evidence import altered, relabelled, trace, traced, training


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
        assert 0 < verdict.interval[0] < 1 == verdict.interval[1]
        assert verdict.confidence == pytest.approx(0.9)
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


def five(order, seeds=(0,) * 5):
    """Five runs of rising κ whose ranges have an order."""
    kappas = np.linspace(0.2, 1, 5)
    return [
        trace((float(k),), steps=12, amplitude=float(rank + 1), seed=seed)
        for k, rank, seed in zip(kappas, order, seeds, strict=True)
    ]


def test_the_false_alarm_rate_is_exact():
    """Of all 120 orders, α · 120 and no more are VIOLATED, and as many HOLD."""
    kappas = np.linspace(0.2, 1, 5)
    runs = {
        (k, rank): trace((float(kappas[k]),), steps=12, amplitude=float(rank + 1))
        for k in range(5)
        for rank in range(5)
    }
    counts = Counter(
        oscillation_verdict([runs[pair] for pair in enumerate(order)]).status
        for order in itertools.permutations(range(5))
    )
    assert counts == {"VIOLATED": 5, "HOLDS": 5, "INCONCLUSIVE": 110}  # a sixth ties with others


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (0, 1, 2, 4, 3), (4, 3, 2, 1, 0), (2, 0, 1, 4, 3)]
)
def test_the_interval_leaves_out_0_exactly_if_the_verdict_is_decided(order):
    for alpha in (0.001, 0.01, 0.05, 0.2):
        verdict = oscillation_verdict(five(order), alpha)
        low, high = verdict.interval
        assert low <= verdict.estimate <= high
        assert (verdict.status == "HOLDS") == (low > 0)
        assert (verdict.status == "VIOLATED") == (high < 0)


def test_too_few_orders_for_a_small_alpha():
    verdict = oscillation_verdict(five(range(5)), alpha=0.001)
    assert verdict.status == "INCONCLUSIVE"
    assert "120 orders of these runs can show no p below 0.001" in verdict.advice
    assert "can show no p" not in oscillation_verdict(five((2, 0, 1, 4, 3))).advice


class TestOrders:
    def test_runs_of_a_seed_are_shuffled_among_themselves(self):
        orders = _orders([0, 0, 0, 1, 1])
        assert len(orders) == len({tuple(order) for order in orders}) == 6 * 2
        assert all(set(order[:3]) == {0, 1, 2} for order in orders)

    def test_runs_with_seeds_of_their_own_are_shuffled_among_each_other(self):
        orders = _orders(["a", 0, 0, "b", "c"])
        assert len(orders) == 2 * 6
        assert {order[0] for order in orders} == {0, 3, 4}

    def test_many_orders_are_drawn_with_the_identity(self):
        orders = _orders([0] * 6 + [1] * 6)
        assert len(orders) == PERMUTATIONS
        np.testing.assert_array_equal(orders[0], np.arange(12))
        np.testing.assert_array_equal(
            np.sort(orders[:, :6]), np.tile(np.arange(6), (PERMUTATIONS, 1))
        )
        assert (orders[1:, 0] == 3).mean() == pytest.approx(1 / 6, abs=0.02)


def test_what_a_seed_does_to_all_its_runs_does_not_hide_the_order():
    """Ranges rise with κ under every seed, of which one has ten times larger ranges."""
    runs = [
        trace((float(k),), steps=12, amplitude=float(k * 10**seed), seed=seed)
        for seed in (0, 1)
        for k in (0.2, 0.4, 0.6, 0.8)
    ]
    verdict = oscillation_verdict(runs)
    assert verdict.status == "HOLDS"
    alone = [relabelled(run, seed=i) for i, run in enumerate(runs)]
    assert oscillation_verdict(alone).status == "INCONCLUSIVE"
