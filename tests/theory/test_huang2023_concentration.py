import numpy as np
import pytest

from stability_probe.runs.concentration import simulated_energies
from stability_probe.theory import log_energy_variance


def test_by_hand():
    # h_0 = b_1(h_1 + κu_1), E_0 = 5/4: everything passes a_1, b_1; 4/5 the middle block
    expected = 7 * (2 + 0.8**2) + 4 * 0.25 / 1.25**2
    np.testing.assert_allclose(log_energy_variance([0.5]), [expected, 14.0])


def test_without_skips_it_counts_blocks():
    np.testing.assert_allclose(log_energy_variance([0.0] * 3), 7 * np.array([7, 6, 5, 4]))


@pytest.mark.parametrize("kappa", [[1.0], [1.0, 0.5, 0.7], [0.9] * 6])
def test_measured(kappa):
    m, count = 2048, 40_000
    drawn = simulated_energies(m, kappa, count, np.random.default_rng(0))
    measured = m * np.log(drawn).var(0)
    # a variance has the relative standard error √(2/n); 1 % for what is of order 1/m
    np.testing.assert_allclose(
        measured, log_energy_variance(kappa), rtol=4 * (2 / count) ** 0.5 + 0.01
    )
