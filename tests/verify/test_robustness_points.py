"""Theorem 3.4's hierarchy at hundreds of points of random and trained networks."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

from stability_probe import TheoryUNet, find_skips, scale_skips
from stability_probe.probes import ProbeBatch, SensitivityConfig, SensitivityProbe
from stability_probe.probes.buffer import RecordBuffer
from stability_probe.probes.summaries import per_sample
from stability_probe.runs import TrainConfig, build_model, load_images, train
from stability_probe.skips import FixedScaling, parse_scaling
from stability_probe.verify import Evidence
from stability_probe.verify.robustness import robustness_chain, robustness_verdict
from tests.oracles.zoo import unet2d

SAMPLES = 20
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


def holds_the_chain(most):
    """The test of the chain at random networks, schemes, seeds and noise levels."""

    @settings(
        max_examples=most, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip
    @given(
        name=st.sampled_from(NETWORKS),
        scheme=st.sampled_from(SCHEMES),
        seed=st.integers(0, 10**6),
        t=st.integers(0, 999),
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    )
    @example(name="concat", scheme="uniform:3", seed=0, t=500, dtype=torch.float64)
    @example(name="uvit", scheme="cs:0.7", seed=0, t=200, dtype=torch.float32)
    def holds(name, scheme, seed, t, dtype):
        evidence = measured(name, scheme, seed, t, dtype)
        chain = robustness_chain(evidence)
        assert chain.rounding == (1e-6 if dtype == torch.float64 else 1e-4)
        dead = chain.upper.exact == 0  # a ReLU network that is 0 around the point
        assert (chain.sound | dead).all()
        assert dead.mean() < 0.5
        assert chain.ordered.all()
        assert (chain.gap[~dead] <= (1e-6 if dtype == torch.float64 else 1e-3)).all()
        tight = 1e-6 if dtype == torch.float64 else 1e-2
        bent = chain.secant > chain.upper.exact * (1 + tight)  # a kink of ReLU: 2 of 480 were seen
        assert bent.mean() <= (0 if dtype == torch.float64 else 0.1)

    return holds


@pytest.mark.parametrize("most", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_the_chain_holds(most):
    """Examples of 20 points: in float64 to 10⁻⁶, in float32 to 10⁻⁴ (secants 10⁻²)."""
    holds_the_chain(most)()


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("uvit", 1),
        ("add", 3),
        *(
            pytest.param(f"{name}-trained", i, marks=pytest.mark.slow)
            for name, i in (("uvit", 1), ("unet2d", 4))
        ),
    ],
)
def test_paths_that_are_masked_wrongly_break_it(name, masked):
    """Without the largest paths the others bound nothing; loose bounds need more of them gone."""
    evidence = measured(name, "unscaled", 1, 500, torch.float64)
    assert robustness_chain(evidence).ordered.all()
    frame = evidence.frame.copy()
    paths = frame[(frame.metric == "path_upper") & (frame.site == "skip")]
    largest = paths.groupby("level").value.mean().nlargest(masked).index
    gone = frame.metric.isin(["path", "path_upper"]) & frame.level.isin(largest)
    frame.loc[gone, "value"] = 0.0
    broken = robustness_chain(Evidence("broken", frame, evidence.info))
    assert not broken.ordered.all()


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


@pytest.mark.slow
def test_the_worst_direction_reaches_sigma_max():
    """Random directions do not; along the worst one the secant is σ_max(J)."""
    for name in ("add", "uvit", "unet2d"):
        chain = robustness_chain(measured(name, "unscaled", 1, 500, torch.float64))
        np.testing.assert_allclose(chain.secant, chain.exact, rtol=1e-3)
        assert (chain.random < 0.9 * chain.exact).all()


def linear_unet(a, b, middle):
    """Eq. 4 with matrices for blocks, b_1 first."""
    net = TheoryUNet(middle.shape[0], len(a)).double()
    net.encoder = nn.ModuleList(map(layer, a))
    net.middle = layer(middle)
    for decoder, matrix in zip(net.decoder, b, strict=True):
        decoder.block = layer(matrix)
    return net


def layer(matrix):
    found = nn.Linear(*reversed(matrix.shape), bias=False).double()
    found.weight.data = matrix.clone()
    return found


def linear_chain(a, b, middle, kappa):
    net, m = linear_unet(a, b, middle), middle.shape[0]
    x = torch.randn(3, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    skips = find_skips(net, x[:1])
    config = SensitivityConfig(paths=True, rtol=1e-9, block_rtol=1e-9, max_products=200)
    with scale_skips(net, skips, FixedScaling(kappa)):
        found = SensitivityProbe(net, skips, {}, ProbeBatch((x,)), config).measure()
    buffer = RecordBuffer()
    buffer.add(1, *per_sample(found))
    about = {"kappa": list(kappa), "dtype": "float64", "kind": "checkpoint"}
    return robustness_chain(Evidence("linear", buffer.frame(), about))


class TestLinearNetworks:
    """Every level by hand, and tight where it should be."""

    KAPPA = (1.0, 0.5, 0.25)

    def check(self, chain, exact, pathwise, blockwise, paper):
        for side in (chain.lower, chain.upper):
            found = (side.exact, side.pathwise, side.blockwise, side.paper)
            for values, expected in zip(found, (exact, pathwise, blockwise, paper), strict=True):
                np.testing.assert_allclose(values, expected, rtol=1e-6)
        np.testing.assert_allclose(chain.secant, exact, rtol=1e-6)

    def test_multiples_of_the_identity_make_all_levels_equal(self):
        """a_i = 2, b_i = ½·3 each: M₀ = 3, so all but the measurement of a path is the same."""
        eye = torch.eye(4, dtype=torch.float64)
        value = 1 * 3 + 0.5 * 9 + 0.25 * 27 + 27 * 0.7
        chain = linear_chain([2 * eye] * 3, [1.5 * eye] * 3, 0.7 * eye, self.KAPPA)
        self.check(chain, value, value, value, value)

    def test_unequal_blocks_loosen_the_papers_form_alone(self):
        eye = torch.eye(4, dtype=torch.float64)
        a, b = [eye, 2 * eye, 0.5 * eye], [eye, eye, 3 * eye]  # products 1, 2, 3
        blockwise = 1 * 1 + 0.5 * 2 + 0.25 * 3 + 3 * 2
        paper = 1 * 2 + 0.5 * 4 + 0.25 * 8 + 8 * 2
        chain = linear_chain(a, b, 2 * eye, self.KAPPA)
        self.check(chain, blockwise, blockwise, blockwise, paper)

    def test_rotations_loosen_all_bounds_by_what_paths_cancel(self):
        """a_i rotate by θ: path i turns by iθ, the middle's by 3θ + φ, and J is their sum."""
        theta, phi = 2.0, 0.5
        a, b = [rotation(theta)] * 3, [torch.eye(2, dtype=torch.float64)] * 3
        turns = np.exp(1j * theta * np.array([1, 2, 3]))
        exact = abs(np.dot(self.KAPPA, turns) + np.exp(1j * (3 * theta + phi)))
        bound = sum(self.KAPPA) + 1
        assert exact < 0.6 * bound
        self.check(linear_chain(a, b, rotation(phi), self.KAPPA), exact, bound, bound, bound)

    def test_blocks_that_annihilate_one_another_loosen_the_blockwise_bound_alone(self):
        """b_1 sees what a_1 never makes: every path is 0 but for what passes the second axis."""
        first, second = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ((1, 0), (0, 1)))
        eye = torch.eye(2, dtype=torch.float64)
        chain = linear_chain([first, eye], [second + 0.1 * first, eye], eye, (1.0, 1.0))
        self.check(chain, 0.3, 0.3, 3.0, 3.0)


def rotation(angle):
    c, s = np.cos(angle), np.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
