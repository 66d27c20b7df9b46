"""Theorem 3.4's hierarchy at hundreds of points of random and trained networks."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stability_probe import TheoryUNet, find_skips, scale_skips
from stability_probe.probes import ProbeBatch, SensitivityConfig, SensitivityProbe
from stability_probe.probes.records import RecordBuffer
from stability_probe.probes.summaries import per_sample
from stability_probe.runs import TrainConfig, build_model, load_images, train
from stability_probe.skips import parse_scaling
from stability_probe.verify import Evidence
from stability_probe.verify.robustness import robustness_chain, robustness_verdict
from tests.oracles.zoo import unet2d

SAMPLES = 10
"""Points of one example."""
NETWORKS = ("add", "concat", "uvit", "unet2d", "uvit-trained", "unet2d-trained")
SCHEMES = ("unscaled", "inverse-sqrt2", "cs:0.7", "uniform:0", "uniform:3")
STEP = {torch.float64: 1e-7, torch.float32: 1e-3}
"""ε_δ/‖x_t‖ of the secants, such that neither rounding nor curvature weighs."""


@cache
def network(name, seed):
    """A network and the shape of its samples."""
    if name in ("add", "concat"):
        generator = torch.Generator().manual_seed(seed)
        return TheoryUNet(12, 3, merge=name, generator=generator), (12,)
    kind, _, trained = name.partition("-")
    if kind == "unet2d" and not trained:
        torch.manual_seed(seed)
        return unet2d(), (1, 8, 8)
    width = 16 if kind == "uvit" else 8
    config = TrainConfig(model=kind, n_skips=4, width=width, steps=40, batch_size=16, seed=seed % 2)
    images = load_images("digits")
    net = build_model(config, images.shape[1:])
    for _ in train(net, images, config) if trained else ():
        pass
    return net, (1, 8, 8)


def measured(name, scheme, seed, t, dtype, config=None):
    """The evidence of SAMPLES points."""
    net, shape = network(name, seed % 3)
    net = net.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, *shape, generator=generator).to(dtype)
    batch = ProbeBatch((x, torch.full((SAMPLES,), t)), sensitive=SAMPLES)
    skips = find_skips(net, *batch.head(1).args)
    config = config or SensitivityConfig(paths=True, epsilons=(STEP[dtype],), directions=2)
    with scale_skips(net, skips, parse_scaling(scheme)) as scaled:
        found = SensitivityProbe(net, skips, {}, batch, config, seed).measure()
        kappa = scaled.kappa
    buffer = RecordBuffer()
    buffer.add(1, *per_sample(found))
    about = {"kappa": kappa, "dtype": str(dtype).removeprefix("torch."), "kind": "checkpoint"}
    return Evidence(name, buffer.frame(), {**about, "skips": [s.as_dict() for s in skips]})


@settings(max_examples=51, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NETWORKS),
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 10**6),
    t=st.integers(0, 999),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
)
@example(name="concat", scheme="uniform:3", seed=0, t=500, dtype=torch.float64)
def test_the_chain_holds(name, scheme, seed, t, dtype):
    """52 examples of 10 points: in float64 to 10⁻⁶, in float32 to 10⁻⁴ (secants 10⁻²)."""
    evidence = measured(name, scheme, seed, t, dtype)
    chain = robustness_chain(evidence)
    assert chain.rounding == (1e-6 if dtype == torch.float64 else 1e-4)
    assert chain.sound.all()
    assert chain.ordered.all()
    assert (chain.gap <= (1e-6 if dtype == torch.float64 else 1e-3)).all()
    tight = 1e-6 if dtype == torch.float64 else 1e-2
    assert (chain.secant <= chain.upper.exact * (1 + tight)).all()
    assert (chain.random <= chain.secant).all()


@pytest.mark.parametrize("name", ["add", "uvit-trained", "unet2d"])
def test_a_path_that_is_masked_wrongly_breaks_it(name):
    """Without the largest path the others bound nothing, and do not add up to J."""
    evidence = measured(name, "unscaled", 1, 500, torch.float64)
    assert robustness_chain(evidence).ordered.all()
    frame = evidence.frame.copy()
    paths = frame[(frame.metric == "path_upper") & (frame.site == "skip")]
    largest = paths.groupby("level").value.mean().idxmax()
    frame.loc[frame.metric.str.startswith("path") & (frame.level == largest), "value"] = 0.0
    broken = robustness_chain(Evidence("broken", frame, evidence.info))
    assert not broken.ordered.any()


@pytest.mark.parametrize("wrong", [("f", 2), ("ku", 2)])
def test_a_path_that_is_isolated_at_the_wrong_place_leaves_a_gap(monkeypatch, wrong):
    """The path of skip 1 is taken through a tensor that other paths pass as well."""
    from stability_probe.probes import jacobians

    feature_graph = jacobians.feature_graph

    def mistaken(*args, **kwargs):
        graph = feature_graph(*args, **kwargs)

        class Mistaken:
            def __enter__(self):
                nodes = graph.__enter__()
                return nodes if kwargs else {**nodes, ("ku", 1): nodes[wrong]}

            def __exit__(self, *error):
                return graph.__exit__(*error)

        return Mistaken()

    monkeypatch.setattr(jacobians, "feature_graph", mistaken)
    config = SensitivityConfig(paths=True)
    evidence = measured("add", "unscaled", 1, 500, torch.float64, config)
    assert (robustness_chain(evidence).gap > 0.05).all()
    assert robustness_verdict(evidence).status == "ASSUMPTION_UNMET"


def test_the_worst_direction_reaches_sigma_max():
    """Random directions do not; along the worst one the secant is σ_max(J)."""
    for name in ("add", "uvit", "unet2d"):
        chain = robustness_chain(measured(name, "unscaled", 1, 500, torch.float64))
        np.testing.assert_allclose(chain.secant, chain.exact, rtol=1e-3)
        assert (chain.random < 0.9 * chain.exact).all()
