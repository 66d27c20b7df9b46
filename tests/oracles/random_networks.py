"""Energies of random networks of Eq. 4 over widths, for the probability of Theorem 3.1."""

import numpy as np

from stability_probe.runs.concentration import simulated_energies
from stability_probe.theory import feature_energy_law

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
