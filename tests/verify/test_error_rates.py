"""Verdicts err as often as they say: fewer replications of `benchmarks/error_rates.py`."""

import numpy as np
import pytest

from stability_probe.verify import feature_law, gradients, input_energy
from tests.oracles.simulation import CASES, plausible, recorded, shared_noise, simulate

EXACT = {
    "law, 3.1, fewest networks": (feature_law, "mean_interval", 120),
    "input energy, 3.2": (input_energy, "mean_interval", 120),
    "slope, 3.3: ≤ 1": (gradients, "student_interval", 80),
}
"""Claims that are tested at 5 %, not at most 5 %: where their intervals come from, replications."""


def case(claim, state):
    (found,) = (c for c in CASES if (c.claim, c.state) == (claim, state))
    return found


@pytest.mark.parametrize("claim", EXACT)
def test_false_alarms_are_as_frequent_as_stated(claim):
    n = EXACT[claim][2]
    assert plausible(simulate(case(claim, "true"), n, seed=1).counts["VIOLATED"], n, 0.05)


@pytest.mark.parametrize("claim", EXACT)
def test_an_interval_of_half_the_width_is_caught(claim, monkeypatch):
    module, name, n = EXACT[claim]
    stated = getattr(module, name)

    def halved(values, confidence):
        low, high = stated(values, confidence)
        middle = float(values.mean())
        return (low + middle) / 2, (high + middle) / 2

    monkeypatch.setattr(module, name, halved)
    assert not plausible(simulate(case(claim, "true"), n, seed=1).counts["VIOLATED"], n, 0.05)


@pytest.mark.parametrize(
    ("claim", "n"), [("law, 3.1, fewest networks", 30), ("input energy, 3.2", 30)]
)
def test_broken_claims_are_found(claim, n):
    assert simulate(case(claim, "broken"), n, seed=1).counts["VIOLATED"] >= 0.8 * n


def test_every_claim_is_simulated_true_and_broken():
    claims = {c.claim for c in CASES}
    assert {(c.claim, c.state) for c in CASES} >= {
        (c, s) for c in claims for s in ("true", "broken")
    }


def test_plausible_counts():
    assert plausible(50, 1000, 0.05)
    assert not plausible(75, 1000, 0.05) and not plausible(25, 1000, 0.05)


def test_rates_are_exact_binomial():
    rates = simulate(case("input energy, 3.2", "true"), 10, seed=0)
    share, low, high = rates.rate("ASSUMPTION_UNMET")
    assert (share, low) == (0, 0) and high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_noise_of_a_unit_is_shared():
    z = shared_noise(np.random.default_rng(0), (2, 2, 20_000))
    correlation = np.corrcoef(z.reshape(4, -1))
    np.testing.assert_allclose(np.diag(np.cov(z.reshape(4, -1))), 1, atol=0.05)
    np.testing.assert_allclose(correlation[0], [1, 0.7, 0.7, 0.5], atol=0.03)


def test_drawn_records_are_read_as_written():
    from tests.oracles.simulation import Rows

    h, g = np.arange(6.0).reshape(3, 2), np.arange(24.0).reshape(3, 2, 4)
    rows = (Rows("energy", "h", h), Rows("sample_grad_energy", "a", g, first_level=1))
    evidence = recorded(*rows, steps=(1, 5, 9), kappa=(1.0, 0.5))
    np.testing.assert_array_equal(evidence.series("energy", "h").to_numpy(), h)
    assert list(evidence.series("energy", "h").index) == [1, 5, 9]
    np.testing.assert_array_equal(evidence.samples("sample_grad_energy", "a"), g)
