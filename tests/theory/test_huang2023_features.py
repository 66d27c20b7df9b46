import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import ConstantScaling, TheoryUNet, Unscaled, find_skips, scale_skips
from stability_probe.theory import feature_band, feature_energy_law, skip_energy_sum

laws = settings(deadline=None, derandomize=True, max_examples=100)
gain = st.floats(0.1, 3.0)
coefficient = st.floats(0.0, 2.0)


@st.composite
def networks(draw, least=0):
    """(kappa, alpha, beta, gamma) of a network of up to six skips."""
    n = draw(st.integers(least, 6))
    kappa, alpha, beta = (
        draw(st.lists(values, min_size=n, max_size=n)) for values in (coefficient, gain, gain)
    )
    return kappa, alpha, beta, draw(gain)


def double_sum(kappa, alpha, beta, gamma):
    """The law as it is printed: a sum over skips of products over blocks."""
    n = len(kappa)
    return [
        sum(
            kappa[j - 1] ** 2 * np.prod(beta[i:j]) * np.prod(alpha[:j]) for j in range(i + 1, n + 1)
        )
        + gamma * np.prod(beta[i:]) * np.prod(alpha)
        for i in range(n + 1)
    ]


@pytest.mark.parametrize(
    ("index", "expected"),
    [("paper", [5.3125, 5.3125, 4.3125, 4.0625, 4.0]), ("tight", [5.3125, 4.3125, 4.0625, 4, 0])],
)
def test_skip_energy_sum_by_hand(index, expected):
    kappa = [1.0, 0.5, 0.25, 2.0]  # squares 1, .25, .0625, 4
    assert [skip_energy_sum(kappa, level, index) for level in range(5)] == expected


@pytest.mark.parametrize("index", ["paper", "tight"])
def test_skip_energy_sum_without_skips_is_zero(index):
    assert skip_energy_sum([], 0, index) == 0.0


def test_skip_energy_sum_takes_the_papers_index_by_default():
    assert skip_energy_sum([1.0, 3.0], 1) == 10.0


@pytest.mark.parametrize("level", [-1, 3])
def test_skip_energy_sum_rejects_a_level_outside_the_network(level):
    with pytest.raises(ValueError, match=rf"level must lie in 0\.\.2 .* got {level}"):
        skip_energy_sum([1.0, 1.0], level)


def test_skip_energy_sum_rejects_an_unknown_index():
    # under pytest the type checker sees the wrong literal first, so call what it wraps
    with pytest.raises(ValueError, match='index must be "paper" or "tight", got \'loose\''):
        inspect.unwrap(skip_energy_sum)([1.0], 0, "loose")


def test_law_by_hand():
    # u: 2, 6; h_2 = 4 * 6; h_1 = .5 * (4 * 6 + 24); h_0 = 1 * (.25 * 2 + 24)
    law = feature_energy_law([0.5, 2.0], alpha=[2.0, 3.0], beta=[1.0, 0.5], gamma=4.0)
    np.testing.assert_allclose(law, [24.5, 24.0, 24.0])


def test_law_of_unit_gains_is_one_plus_the_tight_sum():
    kappa = [1.0, 0.7, 0.49, 0.343, 0.2401]
    tight = [1 + skip_energy_sum(kappa, i, "tight") for i in range(6)]
    np.testing.assert_allclose(feature_energy_law(kappa), tight)
    np.testing.assert_allclose(tight, [2.91, 1.91, 1.42, 1.18, 1.06, 1.0], atol=0.005)


def test_law_without_skips_is_the_middle_block():
    np.testing.assert_array_equal(feature_energy_law([], gamma=3.0), [3.0])


@laws
@given(networks())
def test_law_is_the_printed_double_sum(network):
    np.testing.assert_allclose(feature_energy_law(*network), double_sum(*network), rtol=1e-12)


@laws
@given(networks(), st.floats(0.0, 3.0))
def test_law_is_affine_in_the_squared_coefficients(network, s):
    kappa, *gains = network
    bare = feature_energy_law([0.0] * len(kappa), *gains)
    skips = feature_energy_law(kappa, *gains) - bare
    scaled = feature_energy_law([s * k for k in kappa], *gains)
    np.testing.assert_allclose(scaled, bare + s**2 * skips, rtol=1e-9, atol=1e-12)


@laws
@given(networks(least=1), st.data())
def test_law_grows_with_each_coefficient_at_the_levels_it_feeds(network, data):
    kappa, *gains = network
    j = data.draw(st.integers(1, len(kappa)))
    more = list(kappa)
    more[j - 1] += data.draw(st.floats(0.1, 1.0))
    before, after = feature_energy_law(kappa, *gains), feature_energy_law(more, *gains)
    assert (after[:j] > before[:j]).all()
    np.testing.assert_array_equal(after[j:], before[j:])


@laws
@given(networks(least=1), st.data())
def test_a_zero_coefficient_removes_its_skip(network, data):
    """Without skip j, blocks j and j + 1 (or j and the middle) are one block."""
    kappa, alpha, beta, gamma = network
    n = len(kappa)
    j = data.draw(st.integers(1, n))
    kappa[j - 1] = 0.0
    full = feature_energy_law(kappa, alpha, beta, gamma)
    if j == n:
        fewer = feature_energy_law(kappa[:-1], alpha[:-1], beta[:-1], alpha[-1] * gamma * beta[-1])
    else:
        fewer = feature_energy_law(
            kappa[: j - 1] + kappa[j:],
            [*alpha[: j - 1], alpha[j - 1] * alpha[j], *alpha[j + 1 :]],
            [*beta[: j - 1], beta[j - 1] * beta[j], *beta[j + 1 :]],
            gamma,
        )
    np.testing.assert_allclose(np.delete(full, j), fewer, rtol=1e-12)


def test_band_by_hand():
    lower, upper = feature_band(
        [2.0, 1.0], 1, np.array([1.0, 10.0]), rho=0.5, c1=2.0, c2=4.0, c3=8.0
    )
    np.testing.assert_allclose(lower, [0.25 * (2 * 5 + 4), 0.25 * (20 * 5 + 4)])
    np.testing.assert_allclose(upper, [2.25 * (2 * 5 + 8), 2.25 * (20 * 5 + 8)])
    tight = feature_band([2.0, 1.0], 1, 10.0, rho=1.0, index="tight")
    assert [float(side) for side in tight] == [0.0, 40.0]


@laws
@given(networks(), st.data())
def test_band_of_the_derived_constants_holds_the_law(network, data):
    """With unit gains, c_1 = 1 and c_2 = c_3 = ‖x‖², both indices' bands, as far as they must."""
    kappa = network[0]
    level, rho = data.draw(st.integers(0, len(kappa))), data.draw(st.floats(0.01, 1.0))
    law = 3.0 * feature_energy_law(kappa)[level]
    band = {
        index: feature_band(kappa, level, 3.0, rho=rho, c2=3.0, c3=3.0, index=index)
        for index in ("paper", "tight")
    }
    assert band["tight"][0] <= law <= band["tight"][1] <= band["paper"][1]


@pytest.mark.parametrize("rho", [0.0, -0.5, 1.01, float("nan")])
def test_band_rejects_rho(rho):
    with pytest.raises(ValueError, match=rf"rho must lie in \(0, 1\], got {rho}"):
        feature_band([1.0], 0, 1.0, rho=rho)


# ── the law on random networks ───────────────────────────────────────────────────────────────────

M, N, NETWORKS = 128, 3, 60


def z_scores(law, scheme=None, **options):
    """How many standard errors the mean of ‖h_i‖²/‖x‖² over networks lies above the law, per i."""
    ratios = []
    for seed in range(NETWORKS):
        generator = torch.Generator().manual_seed(seed)
        net = TheoryUNet(M, N, generator=generator, **options)
        x = torch.randn(1, M, generator=generator)  # one sample: networks are what varies
        h = {}
        for i, module in enumerate([*net.decoder, net.middle]):
            module.register_forward_hook(lambda _m, _a, out, i=i, h=h: h.update({i: out}))
        with torch.no_grad(), scale_skips(net, find_skips(net, x), scheme or Unscaled()):
            net(x)
        energies = torch.stack([h[i].square().sum(1) for i in range(N + 1)])
        ratios.append((energies / x.square().sum(1)).mean(1).double().numpy())
    ratios = np.array(ratios)
    return (ratios.mean(0) - law) / (ratios.std(0, ddof=1) / NETWORKS**0.5)


@pytest.mark.parametrize(
    ("kappa", "scheme", "options"),
    [
        ([1.0, 1.0, 1.0], None, {"unit_gain": True}),
        ([1.0, 0.7, 0.49], ConstantScaling(0.7), {"unit_gain": True}),
        ([1.0, 1.0, 1.0], None, {"unit_gain": True, "merge": "concat"}),
        ([1.0, 0.7, 0.49], ConstantScaling(0.7), {"unit_gain": True, "merge": "concat"}),
    ],
    ids=["unscaled", "cs", "concat", "concat-cs"],
)
def test_unit_gain_networks_follow_the_law(kappa, scheme, options):
    z = z_scores(feature_energy_law(kappa), scheme, **options)
    assert np.abs(z).max() < 4, z


def test_kaiming_networks_follow_the_law_of_gain_two():
    z = z_scores(feature_energy_law([1.0, 1.0, 1.0], alpha=2.0, beta=2.0, gamma=2.0))
    assert np.abs(z).max() < 4, z
    assert z_scores(feature_energy_law([1.0, 1.0, 1.0])).min() > 4  # the power of the test above


def test_a_final_relu_breaks_the_law_where_features_merge():
    """Kaiming weights and a final ReLU: gain 1, but u and z are positive, so they correlate."""
    z = z_scores(feature_energy_law([1.0, 1.0, 1.0]), final_relu=True)
    assert (z[: N - 1] > 4).all(), z  # two merges or more
    assert abs(z[N]) < 4  # h_N has met no merge: its gain is 1
