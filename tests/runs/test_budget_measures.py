"""Norms and energies with multiplied skips, against dense Jacobians and hand-made passes."""

import numpy as np
import pytest
import torch

from stability_probe import StabilityProbeError, TheoryUNet, find_skips
from stability_probe.probes import ProbeBatch, SensitivityConfig
from stability_probe.runs.budget_measures import BudgetedNetwork
from tests.oracles.dense import dense_jacobian

M = np.array([0.9, 0.3])


def network(n=3, **changes):
    net = TheoryUNet(m=8, n_skips=2, **changes).double()
    xs = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = [ProbeBatch((x,), sensitive=2) for x in xs]
    config = SensitivityConfig(rtol=1e-4, block_rtol=1e-4, paths=True)
    calls = []
    skips = find_skips(net, xs[0])
    return BudgetedNetwork(net, skips, points, config, 0, lambda: calls.append(1)), calls


def scaled(net, m):
    """The network's pass by hand, with a number at every skip."""

    def fn(x):
        u1 = net.encoder[0](x)
        u2 = net.encoder[1](u1)
        z1 = net.decoder[1](net.middle(u2), m[1] * u2)
        return net.decoder[0](z1, m[0] * u1)

    return fn


def norms(fn, x):
    return torch.linalg.matrix_norm(dense_jacobian(fn, x), ord=2).numpy()


def test_sigma_max_is_that_of_the_scaled_network_and_above_it():
    network_, calls = network()
    found = network_.norms(M)
    assert len(calls) == 1
    dense = np.concatenate([norms(scaled(network_.model, M), p.x[:2]) for p in network_.points])
    assert found.sigma_max.shape == found.rest.shape == (4,) and found.paths.shape == (2, 4)
    assert (found.sigma_max >= dense * (1 - 1e-9)).all()
    np.testing.assert_allclose(found.sigma_max, dense, rtol=2e-2)
    assert (found.pathwise >= dense).all()


def test_every_path_is_measured_by_itself():
    """With m = 0 at all skips but one, and the middle's weights 0, a path is all there is."""
    network_, _ = network()
    torch.nn.init.zeros_(network_.model.middle.layer2.weight)
    alone = network_.norms(np.array([0.0, 0.7]))
    np.testing.assert_allclose(alone.paths[1], alone.sigma_max, rtol=2e-2)
    assert (alone.paths[0] == 0).all() and (alone.rest < 1e-12).all()
    assert (alone.gap < 1e-6).all()


def test_energies_are_means_of_ratios_over_all_samples():
    network_, calls = network(n=5)
    expected = [
        (scaled(network_.model, M)(p.x).square().sum(1) / p.x.square().sum(1)).mean().item()
        for p in network_.points
    ]
    np.testing.assert_allclose(network_.energies(M), expected, rtol=1e-9)
    without = network_.energies_without()
    assert without.shape == (2, 2)
    np.testing.assert_allclose(without[0], network_.energies(np.array([0.0, 1.0])), rtol=1e-12)
    assert len(calls) == 4


def test_the_network_is_left_as_it_was():
    network_, _ = network()
    x = network_.points[0].x
    before = network_.model(x)
    network_.norms(M)
    network_.energies(M)
    assert torch.equal(network_.model(x), before)
    assert network_.model.training


@pytest.mark.parametrize("what", ["norms", "energies"])
def test_values_that_are_not_finite(what):
    network_, _ = network()
    torch.nn.init.constant_(network_.model.decoder[0].block.layer2.weight, torch.nan)
    with pytest.raises(StabilityProbeError, match=r"TheoryUNet has .* not finite at the samples"):
        getattr(network_, what)(np.ones(2))
