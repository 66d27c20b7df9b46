import numpy as np
import pytest
import torch
from scipy import stats

from stability_probe.errors import StabilityProbeError
from stability_probe.models import TheoryUNet
from stability_probe.runs.concentration import simulated_energies
from stability_probe.theory import feature_energy_law
from tests.oracles.eq4 import eq4_features

KAPPA = {1: [0.8], 4: [1.0, 0.5, 0.9, 0.7]}


def simulated(m, kappa, networks=20_000, seed=0, **kwargs):
    return simulated_energies(m, kappa, networks, np.random.default_rng(seed), **kwargs)


def real_energies(m, kappa, networks, merge, unit_gain):
    """‖h_i‖²/‖x‖² of networks that were really drawn, for one input each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, m, generator=generator)
    energies = []
    for _ in range(networks):
        net = TheoryUNet(m, len(kappa), merge=merge, unit_gain=unit_gain, generator=generator)
        h = eq4_features(net.state_dict(), x, kappa, concat=merge == "concat")
        energies.append(torch.cat(h).square().sum(1) / x.square().sum())
    return torch.stack(energies).double().numpy()


def p_values(real, drawn):
    """Of two-sample Kolmogorov–Smirnov tests, one a level."""
    return np.array([stats.ks_2samp(a, b).pvalue for a, b in zip(real.T, drawn.T, strict=True)])


@pytest.mark.parametrize("unit_gain", [True, False])
@pytest.mark.parametrize("merge", ["add", "concat"])
@pytest.mark.parametrize(("m", "n"), [
    (16, 4), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(32, 1), (16, 1), (32, 4)]),
])  # fmt: skip
def test_the_law_is_that_of_networks_with_weights(m, n, merge, unit_gain):
    real = real_energies(m, KAPPA[n], 150, merge, unit_gain)
    drawn = simulated(m, KAPPA[n], merge=merge, unit_gain=unit_gain)
    assert (p_values(real, drawn) > 1e-4).all()
    ratios = [np.arctan2(levels[:, :1], levels[:, -1:]) for levels in (real, drawn)]
    assert p_values(*ratios) > 1e-4, "levels depend on each other as they should"
    assert (p_values(real, drawn * 4) < 1e-4).all(), "a gain that is wrong is seen"
    other = simulated(4 * m, KAPPA[n], merge=merge, unit_gain=unit_gain)
    assert p_values(real, other).min() < 1e-4, "and so is a width that is wrong"


@pytest.mark.parametrize("merge", ["add", "concat"])
@pytest.mark.parametrize(("unit_gain", "gain"), [(True, 1.0), (False, 2.0)])
@pytest.mark.parametrize("n", [1, 4])
def test_the_mean_is_that_of_the_law(n, unit_gain, gain, merge):
    drawn = simulated(64, KAPPA[n], 40_000, merge=merge, unit_gain=unit_gain)
    z = _z(drawn, feature_energy_law(KAPPA[n], gain, gain, gain))
    assert np.abs(z).max() < 4
    wrong = _z(drawn, feature_energy_law(KAPPA[n], 1.1 * gain, gain, gain))
    assert np.abs(wrong).min() > 10


def _z(drawn, expected):
    error = drawn.std(0, ddof=1) / len(drawn) ** 0.5
    return (drawn.mean(0) - expected) / error


def squares(m, kappa, merge):
    """E‖h_0‖⁴ and E‖h_1‖⁴ for one skip, unit gains and ‖x‖ = 1, by hand."""
    q = (1 + 5 / m) * (1 + 2 / m)  # E G² of one block; ‖h_1‖² = G G', ‖u_1‖² = G
    cross = 4 * kappa**2 * q / m if merge == "add" else 0.0  # E cos² = 1/m
    return np.array([q * (q**2 + kappa**4 * q + 2 * kappa**2 * q + cross), q**2])


@pytest.mark.parametrize("merge", ["add", "concat"])
@pytest.mark.parametrize("m", [8, 64])
def test_second_moments_by_hand(m, merge):
    drawn = simulated(m, [0.8], 400_000, merge=merge) ** 2
    assert np.abs(_z(drawn, squares(m, 0.8, merge))).max() < 4
    if m == 64:
        other = squares(m, 0.8, "concat" if merge == "add" else "add")
        assert abs(_z(drawn, other)[0]) > 6, "a cross term too many or too few is seen"


def test_no_skip_is_a_chain_of_blocks():
    drawn = simulated(16, [0.0, 0.0], 100_000)
    expected = ((1 + 5 / 16) * (1 + 2 / 16)) ** np.array([5, 4, 3])
    assert np.abs(_z(drawn**2, expected)).max() < 4


def test_a_narrow_network_may_die():
    drawn = simulated(2, [1.0], 4000)
    assert (drawn == 0).any()
    assert np.isfinite(drawn).all()
    assert (drawn >= 0).all()


def test_the_generator_decides():
    a, b, c = (simulated(16, [1.0, 0.5], 10, seed=seed) for seed in (0, 0, 1))
    assert a.shape == (10, 3)
    assert (a == b).all()
    assert (a != c).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": 1}, "m must be at least 2, got 1"),
        ({"networks": 0}, "networks must be at least 1, got 0"),
        ({"kappa": []}, "N must be at least 1, got 0"),
        ({"merge": "mean"}, 'merge must be "add" or "concat", got \'mean\''),
    ],
)
def test_bad_input_is_refused(arguments, message):
    good = {"m": 8, "kappa": [1.0], "networks": 3, "generator": np.random.default_rng(0)}
    with pytest.raises(StabilityProbeError, match=message):
        simulated_energies(**{**good, **arguments})
