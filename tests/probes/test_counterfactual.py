"""Energies under multiples of κ."""

import pytest
import torch

from stability_probe import ConstantScaling, TheoryUNet, Uniform, find_skips, scale_skips
from stability_probe.probes import ProbeBatch, counterfactual_energies
from stability_probe.probes.counterfactual import FACTORS
from stability_probe.probes.records import Key
from tests.oracles.eq4 import eq4_features


@pytest.mark.parametrize("merge", ["add", "concat"])
def test_energies_are_those_of_eq_4_with_every_kappa_times_s(merge):
    net = TheoryUNet(16, 3, merge=merge).double()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    skips = find_skips(net, x)
    with scale_skips(net, skips, ConstantScaling(0.6)):
        found = counterfactual_energies(net, skips, ProbeBatch((x,)))
    assert len(found) == len(FACTORS) * 4
    for s in FACTORS:
        kappa = [s, s * 0.6, s * 0.36]
        h = eq4_features(net.state_dict(), x, kappa, concat=merge == "concat")
        for i in range(4):
            energy = found[Key("counterfactual_energy", f"s={s:g}", i, "")]
            torch.testing.assert_close(energy, h[i].square().sum(1))


def test_zero_and_one_are_no_skips_and_the_network_itself(case):
    net = case.net(torch.float64).eval()
    x, t, _ = case.data(3, dtype=torch.float64)
    skips = case.skips(net)
    found = counterfactual_energies(net, skips, ProbeBatch((x, t)), (0.0, 1.0))
    for s in (0.0, 1.0):
        with scale_skips(net, skips, Uniform(s)):
            again = counterfactual_energies(net, skips, ProbeBatch((x, t)), (1.0,))
        for i in range(len(skips) + 1):
            one = again[Key("counterfactual_energy", "s=1", i, "")]
            assert torch.equal(found[Key("counterfactual_energy", f"s={s:g}", i, "")], one)


def test_the_model_is_left_as_it_was(case):
    net = case.net().train()
    x, t, _ = case.data(3)
    counterfactual_energies(net, case.skips(net), ProbeBatch((x, t)))
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
