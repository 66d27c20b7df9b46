"""What is recorded of a scaled network is the same whether its skips were found before or after."""

import pandas as pd
import pytest
import torch

from stability_probe import (
    ConstantScaling,
    InverseSqrt2,
    LearnableScaling,
    Run,
    StabilityProbe,
    TheoryUNet,
    Uniform,
    find_skips,
    scale_skips,
    verify,
)
from stability_probe.probes import ProbeConfig, SensitivityConfig
from stability_probe.verify import gather
from stability_probe.verify.robustness import sensitivity_table
from tests.oracles.architectures.unets import Scaled

CONFIG = ProbeConfig(
    sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=20, paths=True)
)
NETWORKS = {
    "plain": (lambda: TheoryUNet(64, 2), 1.0),
    "own constant": (Scaled, 2**-0.5),
}
SCHEMES = {
    "cs": (lambda: ConstantScaling(kappa=0.7), [1.0, 0.7]),
    "inverse-sqrt2": (InverseSqrt2, [2**-0.5] * 2),
    "uniform": (lambda: Uniform(0.3), [0.3] * 2),
    "ls": (LearnableScaling, None),
}


def recorded(build, scheme, folder, found_after):
    """A step of a network whose skips the probe knows from before or after they were scaled."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    skips = find_skips(model, x)
    scale_skips(model, skips, scheme())
    if found_after:
        skips = find_skips(model, x)
    probe = StabilityProbe(
        model, skips, run=Run(folder), every=1, sensitivity_every=1, config=CONFIG
    )
    with probe:
        loss = (model(x) - x).square().flatten(1).mean(1)
        loss.mean().backward()
        probe.step(loss=loss)
    return Run.open(folder)


@pytest.mark.parametrize(
    "scheme", ["cs", "inverse-sqrt2", pytest.param("uniform", marks=pytest.mark.slow), "ls"]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_kappa_bounds_and_verdicts_are_the_same(tmp_path, network, scheme):
    (build, own), (make, kappa) = NETWORKS[network], SCHEMES[scheme]
    before, after = (recorded(build, make, tmp_path / f"{k}" / "run", k) for k in (False, True))
    assert [s["kappa"] for s in after.info["skips"]] == pytest.approx([own] * 2)
    (expected,), (found,) = gather(before), gather(after)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert found.kappa == expected.kappa
    if kappa is not None:
        assert found.kappa == pytest.approx([own * k for k in kappa])
    assert sensitivity_table(found) == sensitivity_table(expected)
    assert verify(after) == verify(before)
