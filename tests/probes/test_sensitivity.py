"""The scheduled measurements, each against a dense or by-hand float64 oracle."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe import (
    StabilityProbeError,
    TheoryUNet,
    UViT,
    UViTConfig,
    find_skips,
    scale_skips,
)
from stability_probe.probes import ProbeBatch, SensitivityConfig, SensitivityProbe
from stability_probe.probes.graph import feature_graph
from stability_probe.skips import parameter_blocks, parse_scaling
from stability_probe.theory import blockwise_bound, max_block_gain, robustness_bound
from tests.oracles.architectures import ZOO
from tests.oracles.dense import dense_jacobian
from tests.oracles.recording import blocks_at, energy, output_of, parts_of, run_pass

CONSTANT = ("unscaled", "inverse-sqrt2", "uniform:0", "cs:0.7")
SHARP = SensitivityConfig(rtol=1e-6, block_rtol=1e-6, max_products=600)


@contextmanager
def measuring(case, scheme="cs:0.7", *, n=3, dtype=torch.float64, seed=0, net=None, **options):
    """A network under a scheme with a probe for it: (probe, net)."""
    net = case.net(dtype) if net is None else net
    skips = case.skips(net)
    config = options.pop("config", SensitivityConfig())
    with scale_skips(net, skips, parse_scaling(scheme)):
        x, t, target = case.data(n, seed, dtype)
        batch = ProbeBatch((x, t), **({"target": target} | options))
        blocks = parameter_blocks(net, skips, x[:2], t[:2])
        yield SensitivityProbe(net, skips, blocks, batch, config), net


def by_site(found):
    return {key[:3]: value for key, value in found.items()}


def output_alone(net, t):
    """The network at one noise level (1,), as a function of x_t."""
    return lambda x: output_of(net, x, t.expand(len(x)))


class TestSecants:
    def test_are_the_largest_and_mean_ratio_over_random_directions(self, case):
        epsilons = (1e-3, 0.05, 0.5)
        config = SensitivityConfig(epsilons=epsilons, directions=3)
        with measuring(case, config=config) as (probe, net):
            net.eval()
            found = probe.secants(probe.batch, torch.Generator().manual_seed(5))
            generator = torch.Generator().manual_seed(5)
            x, t = probe.batch.args
            directions = [
                torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(3)
            ]
            found = by_site(found)
            sites = ["eps=0.001", "eps=0.05", "eps=0.5"]
            assert set(found) == {(m, e, 0) for m in ("secant", "secant_mean") for e in sites}
            for fraction, site in zip(epsilons, sites, strict=True):
                for s in range(len(x)):
                    here, level = x[s : s + 1], t[s : s + 1]
                    eps = fraction * here.norm()
                    ratios = []
                    for d in directions:
                        push = eps * d[s : s + 1] / d[s].norm()
                        assert push.norm() == pytest.approx(eps.item())
                        change = output_of(net, here + push, level) - output_of(net, here, level)
                        ratios.append((change.norm() / eps).item())
                    largest, mean = (found[m, site, 0][s] for m in ("secant", "secant_mean"))
                    assert largest.item() == pytest.approx(max(ratios), rel=1e-8)
                    assert mean.item() == pytest.approx(sum(ratios) / 3, rel=1e-8)

    @pytest.mark.parametrize("scheme", ["unscaled", "uniform:0", "ls"])
    def test_tend_to_at_most_sigma_max(self, case, scheme):
        config = SensitivityConfig(epsilons=(1e-6,), directions=8)
        with measuring(case, scheme, config=config, n=2, target=None) as (probe, _):
            found = by_site(probe.measure())
        secants, sigma = found["secant", "eps=1e-06", 0], found["sigma_max", "J", 0]
        assert (secants <= sigma * (1 + 1e-3)).all()
        assert (secants > 0.02 * sigma).all()  # and are not just small

    def test_of_a_linear_map_are_exact_at_every_size(self):
        net = TheoryUNet(8, 1).double()
        with torch.no_grad():  # x to relu(x) − relu(−x) is not possible here; stay where relu is x
            for p in net.parameters():
                p.copy_(torch.eye(8, dtype=torch.float64))
        x = torch.full((2, 8), 5.0, dtype=torch.float64)
        config = SensitivityConfig(epsilons=(1e-4, 0.1))
        probe = SensitivityProbe(net, find_skips(net, x), {}, ProbeBatch((x,)), config)
        found = by_site(probe.measure())
        for site in ("eps=0.0001", "eps=0.1"):  # u + u = 2x
            assert found["secant", site, 0].tolist() == pytest.approx([2.0, 2.0], rel=1e-9)
        assert found["sigma_max", "J", 0].tolist() == pytest.approx([2.0, 2.0], rel=1e-9)
        for kind, level in (("a", 1), ("mid", 0), ("b", 1)):
            assert found["lipschitz", kind, level].tolist() == pytest.approx([1, 1], rel=1e-9)


class TestJacobianNorms:
    @pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7", "ls"])
    def test_sigma_max_is_that_of_the_dense_jacobian_within_a_hundredth(self, case, scheme):
        with measuring(case, scheme, target=None) as (probe, net):
            found = by_site(probe.measure())
            x, t = probe.batch.args
            net.eval()
            dense = [
                dense_jacobian(output_alone(net, t[s : s + 1]), x[s : s + 1]) for s in range(len(x))
            ]
        sigma = torch.linalg.svdvals(torch.cat(dense))
        value, upper = found["sigma_max", "J", 0], found["sigma_max_upper", "J", 0]
        assert (value <= sigma[:, 0] * (1 + 1e-9)).all()
        assert (upper >= sigma[:, 0] * (1 - 1e-9)).all()
        assert (upper <= 1.01 * value * (1 + 1e-9)).all()

    @pytest.mark.parametrize("name", ["add", "concat", "uvit"])
    @pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7"])
    def test_lipschitz_constants_are_those_of_the_dense_blocks_and_never_below(
        self, cases, name, scheme
    ):
        with measuring(cases[name], scheme, n=2, config=SHARP) as (probe, net):
            found = by_site(probe.measure())
            x, t = probe.batch.args
            kappa = parse_scaling(scheme).coefficients(len(probe.skips))
            for s in range(len(x)):
                with torch.no_grad():
                    blocks, output = blocks_at(net, x[s][None], t[s][None], kappa)
                    torch.testing.assert_close(output, net(x[s][None], t[s][None]))
                assert {("lipschitz", *block) for block in blocks} == {
                    site for site in found if site[0] == "lipschitz"
                }
                for block, (fn, v) in blocks.items():
                    dense = torch.linalg.matrix_norm(dense_jacobian(fn, v)[0], ord=2)
                    low, high = (found[(m, *block)][s] for m in ("lipschitz", "lipschitz_upper"))
                    assert low <= dense * (1 + 1e-9), block
                    assert high >= dense * (1 - 1e-9), block
                    assert high <= low * (1 + 1e-5) + 1e-12, block

    def test_a_rough_norm_is_still_enclosed(self, cases):
        """After three products the bounds are far apart, and the truth between them."""
        rough = SensitivityConfig(max_products=3)
        with measuring(cases["concat"], "unscaled", n=8, config=rough) as (probe, net):
            found = by_site(probe.measure())
            x, t = probe.batch.args
            inside, apart = [], []
            for s in range(len(x)):
                blocks, _ = blocks_at(net, x[s][None], t[s][None], [1.0] * 3)
                for block, (fn, v) in blocks.items():
                    dense = torch.linalg.matrix_norm(dense_jacobian(fn, v)[0], ord=2)
                    low, high = (found[(m, *block)][s] for m in ("lipschitz", "lipschitz_upper"))
                    inside.append((low <= dense * (1 + 1e-9)).item() and (dense <= high).item())
                    apart.append((high / low).item())
        assert len(inside) == 8 * 10
        assert all(inside)
        assert max(apart) > 1.5

    def test_default_tolerances_cost_a_tenth_at_most(self, cases):
        for name in ("add", "concat", "uvit", "unet2d"):
            with measuring(cases[name], n=2) as (probe, _):
                rough = by_site(probe.measure())
                probe.config = SHARP
                sharp = by_site(probe.measure())
            for site, value in sharp.items():
                if site[0] == "lipschitz":
                    torch.testing.assert_close(rough[site], value, rtol=0.1, atol=0)

    @pytest.mark.parametrize("scheme", CONSTANT)
    def test_the_chain_of_bounds_holds_at_every_sample(self, case, scheme):
        """Secant ≤ exact ≤ blockwise ≤ paper."""
        config = SensitivityConfig(epsilons=(1e-6,), block_rtol=1e-3, max_products=200)
        with measuring(case, scheme, n=4, config=config, target=None) as (probe, _):
            found = by_site(probe.measure())
            n = len(probe.skips)
            kappa = parse_scaling(scheme).coefficients(n)
        a, b = (
            np.stack([found["lipschitz", kind, i].numpy() for i in range(1, n + 1)])
            for kind in ("a", "b")
        )
        middle = found["lipschitz", "mid", 0].numpy()
        exact = found["sigma_max", "J", 0].numpy()
        blockwise = blockwise_bound(kappa, a, b, middle)
        paper = robustness_bound(kappa, max_block_gain(a, b), middle)
        assert exact.shape == blockwise.shape == paper.shape == (4,)
        assert (found["secant", "eps=1e-06", 0].numpy() <= exact * (1 + 1e-3)).all()
        assert (exact <= blockwise).all()
        assert (blockwise <= paper * (1 + 1e-9)).all()
        assert (exact > 0).all()

    def test_the_chain_breaks_when_kappa_is_wrong(self, cases):
        """The bound of a network without skips does not hold for one whose skips are strong."""
        with measuring(cases["add"], "uniform:1e4") as (probe, _):
            found = by_site(probe.measure())
        a, b = (np.stack([found["lipschitz", kind, i].numpy() for i in (1, 2, 3)]) for kind in "ab")
        middle, exact = found["lipschitz", "mid", 0].numpy(), found["sigma_max", "J", 0].numpy()
        assert (exact > blockwise_bound([0.0] * 3, a, b, middle)).any()
        assert (exact <= blockwise_bound([1e4] * 3, a, b, middle)).all()

    def test_are_taken_on_the_leading_samples_alone(self, cases):
        with measuring(cases["uvit"], n=5, sensitive=2) as (probe, _):
            found = by_site(probe.measure())
            probe.batch = probe.batch.head(2)
            few = by_site(probe.measure())
        sizes = {metric: len(value) for (metric, *_), value in found.items()}
        assert sizes == {
            "secant": 2, "secant_mean": 2, "secant_worst": 2, "sigma_max": 2, "sigma_max_upper": 2,
            "lipschitz": 2, "lipschitz_upper": 2,
            "sample_energy": 5, "sample_kappa": 5, "sample_loss": 5, "sample_grad_energy": 5,
        }  # fmt: skip
        for site, value in few.items():
            torch.testing.assert_close(found[site][:2], value, rtol=1e-8, atol=0)


class TestPaths:
    """κ_i‖P_i‖ and what belongs to it."""

    PATHS = SensitivityConfig(rtol=1e-6, block_rtol=1e-6, max_products=600, paths=True)

    @pytest.mark.parametrize("name", ["add", "concat", "uvit"])
    @pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7", "uniform:0"])
    def test_norms_are_those_of_the_network_with_all_other_paths_detached(
        self, cases, name, scheme
    ):
        with measuring(cases[name], scheme, n=2, config=self.PATHS, target=None) as (probe, net):
            found = by_site(probe.measure())
            x, t = probe.batch.args
            kappa = parse_scaling(scheme).coefficients(len(probe.skips))
            for s in range(len(x)):
                for path, fn in paths_at(net, t[s][None], kappa).items():
                    dense = torch.linalg.matrix_norm(dense_jacobian(fn, x[s][None])[0], ord=2)
                    measured = found[("path", *path)][s]
                    torch.testing.assert_close(measured, dense, rtol=1e-4, atol=1e-12)
        assert not found["path", "around", 0].any()
        assert (found["path_gap", "J", 0] < 1e-12).all()

    def test_around_and_gap_of_a_global_residual(self, cases):
        net = Residual(TheoryUNet(16, 3).double())
        with measuring(cases["add"], "unscaled", net=net, config=self.PATHS, target=None) as (
            probe, _,
        ):  # fmt: skip
            found = by_site(probe.measure())
        torch.testing.assert_close(found["path", "around", 0], torch.full((3,), 2.0).double())
        assert (found["path_gap", "J", 0] < 1e-12).all()

    def test_a_second_way_out_of_the_middle_goes_around(self, cases):
        """z_N is read by the output too, which is no part of the path through the merge."""
        net = ReadsTheMiddle(TheoryUNet(16, 3).double())
        with measuring(cases["add"], "unscaled", net=net, config=self.PATHS, target=None) as (
            probe, _,
        ):  # fmt: skip
            found = by_site(probe.measure())
        assert (found["path", "around", 0] > 0.1).all()
        assert (found["path_gap", "J", 0] < 1e-12).all()

    @pytest.mark.parametrize(
        ("name", "gap"),
        [("attention-unet", True), ("skip-last", False), ("additive-in-place", False)],
    )
    def test_a_gate_that_looks_at_the_decoder_leaves_a_gap(self, name, gap):
        net, (x,) = ZOO[name].build().eval(), ZOO[name].args
        skips = find_skips(net, x)
        probe = SensitivityProbe(net, skips, {}, ProbeBatch((x,)), SensitivityConfig(paths=True))
        found = by_site(probe.jacobian_norms(probe.batch, torch.Generator().manual_seed(0)))
        assert (found["path_gap", "J", 0].max() > 5e-3) == gap
        assert (found["path_gap", "J", 0].max() < 1e-5) != gap

    @pytest.mark.slow
    def test_rows_of_frames_belong_to_their_sample(self):
        """A video's features have a row a frame; norms are of whole samples, and in order."""
        entry = ZOO["unet-motion"]
        net = entry.build().eval()
        skips = find_skips(net, *entry.args, **entry.kwargs)
        batch = ProbeBatch(entry.args, entry.kwargs, per_frame=frozenset({"encoder_hidden_states"}))
        probe = SensitivityProbe(net, skips, {}, batch, self.PATHS)
        with torch.no_grad(), feature_graph(net, skips, batch) as nodes:
            assert len(nodes["z", 1]) > len(batch.x)
        with sdpa_kernel(SDPBackend.MATH):
            found = by_site(probe.jacobian_norms(batch, torch.Generator().manual_seed(0)))
        assert {len(value) for value in found.values()} == {len(batch.x)}
        paths = [found["path", "skip", s.level] for s in skips]
        whole = sum(paths) + found["path", "mid", 0]
        assert (found["sigma_max", "J", 0] <= whole * (1 + 1e-3)).all()
        blocks = torch.ones(len(batch.x))
        for s, path in zip(skips, paths, strict=True):
            blocks = blocks * found["lipschitz", "a", s.level] * found["lipschitz", "b", s.level]
            assert (path <= blocks * found["lipschitz", "skip", s.level] * (1 + 1e-3)).all()

    def test_they_are_not_measured_unless_asked_for(self, case):
        with measuring(case, target=None) as (probe, _):
            assert not any(key.metric.startswith("path") for key in probe.measure())


class Residual(torch.nn.Module):
    """2x + net(x)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t=None):
        return self.net(x) + 2 * x


class ReadsTheMiddle(TheoryUNet):
    """The sum of a network's output and of a linear reading of its middle block's."""

    def __init__(self, net):
        super().__init__(16, 3)
        self.load_state_dict(net.state_dict())
        self.double()
        self.middle.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.kept = output

    def forward(self, x, t=None):
        out = super().forward(x)
        return out + self.kept


def paths_at(net, t, kappa):
    """By hand: the network with a gradient through one path alone, as functions of x."""

    def path(only):
        def fn(x):
            a, b, mid, merge = parts_of(net, x, t.expand(len(x)))
            u, v = [], x
            for block in a:
                v = block(v)
                u.append(v)
            z = mid(v) if only == "mid" else mid(v).detach()
            for i in reversed(range(len(a))):
                skip = kappa[i] * u[i]
                z = b[i](merge(z, skip if only == i + 1 else skip.detach()))
            return z

        return fn

    levels = range(1, len(kappa) + 1)
    return {("skip", i): path(i) for i in levels} | {("mid", 0): path("mid")}


class TestSampleEnergies:
    def test_are_those_of_the_oracle(self, case, scheme):
        with measuring(case, scheme) as (probe, net):
            net.eval()
            found = by_site(probe.sample_energies())
            seen = run_pass(net, *probe.batch.args)
        n = len(probe.skips)
        expected = {("sample_energy", "x", 0): energy(seen.x)}
        for i in range(n + 1):
            h = seen.h[i] if i < n else seen.z[n]
            expected["sample_energy", "h", i] = energy(h)
        for i in range(1, n + 1):
            gain = (energy(seen.ku[i]) / energy(seen.u[i])).sqrt()
            expected["sample_kappa", "skip", i] = gain
            expected["sample_energy", "ku", i] = energy(seen.ku[i])
            expected["sample_energy", "z", i] = energy(seen.z[i])
        assert found.keys() == expected.keys()
        for site, value in expected.items():
            torch.testing.assert_close(found[site], value, rtol=1e-9, atol=1e-12)


class TestMeasure:
    def test_leaves_everything_as_it_was(self, case):
        """Modes, parameters, gradients, buffers, the batch, and the global random state."""
        with measuring(case, "ls", dtype=torch.float32) as (probe, net):
            net.train()
            next(iter(net.children())).eval()
            output_of(net, *probe.batch.args).sum().backward()
            tensors = [*net.parameters(), *net.buffers(), *probe.batch.tensors()]
            tensors += [p.grad for p in net.parameters() if p.grad is not None]
            before = [v.detach().clone() for v in tensors]
            modes, state = [m.training for m in net.modules()], torch.get_rng_state()
            probe.measure()
            assert [m.training for m in net.modules()] == modes
            assert torch.equal(torch.get_rng_state(), state)
            assert len(before) > 20
            assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
            assert not any(v.requires_grad for v in probe.batch.tensors())

    def test_is_the_same_every_time_and_another_with_another_seed(self, case):
        with measuring(case) as (probe, _):
            first, second = by_site(probe.measure()), by_site(probe.measure())
            probe.seed = 1
            third = by_site(probe.measure())
        assert first.keys() == second.keys() == third.keys()
        assert all(torch.equal(first[site], second[site]) for site in first)
        assert not torch.equal(first["secant", "eps=0.1", 0], third["secant", "eps=0.1", 0])
        drawn = ("secant", "sigma_max", "lipschitz", "gate")
        for site, value in first.items():
            if not site[0].startswith(drawn):
                assert torch.equal(value, third[site])

    def test_works_under_no_grad_and_holds_no_graph(self, cases):
        with measuring(cases["uvit"]) as (probe, _):
            expected = by_site(probe.measure())
            with torch.no_grad():
                found = by_site(probe.measure())
        for site, value in expected.items():
            assert torch.equal(found[site], value), site
            assert not value.requires_grad

    def test_ignores_dropout(self, cases):
        with measuring(cases["unet2d"]) as (probe, net):
            net.train()
            trained = by_site(probe.measure())
            net.eval()
            evaluated = by_site(probe.measure())
        assert all(torch.equal(trained[site], evaluated[site]) for site in trained)

    def test_arguments_by_keyword(self, cases):
        """`return_dict=False` makes a UNet2DModel return a tuple; t may come by name."""
        case = cases["unet2d"]
        with measuring(case) as (probe, _):
            plain = by_site(probe.measure())
            x, t = probe.batch.args
            target = probe.batch.target
            for kwargs in ({"return_dict": False}, {"timestep": t, "return_dict": False}):
                args = (x,) if "timestep" in kwargs else (x, t)
                probe.batch = ProbeBatch(args, kwargs, target=target)
                found = by_site(probe.measure())
                assert found.keys() == plain.keys()
                for site, value in plain.items():
                    torch.testing.assert_close(found[site], value, rtol=1e-9, atol=1e-15)

    @pytest.mark.parametrize("name", ["add", "uvit"])  # the derivative of a ReLU at NaN is 0
    def test_a_sample_that_is_nan_is_nan_and_the_others_are_not(self, cases, name):
        with measuring(cases[name], n=4, config=SHARP) as (probe, _):
            clean = by_site(probe.measure())
            probe.batch.x[1] = float("nan")
            found = by_site(probe.measure())
        others = [0, 2, 3]
        for site, value in found.items():
            if not site[0].startswith("secant"):
                torch.testing.assert_close(value[others], clean[site][others], rtol=1e-4, atol=0)
        for site in (
            ("secant", "eps=0.1", 0), ("sigma_max", "J", 0), ("lipschitz", "a", 1),
            ("lipschitz", "mid", 0), ("lipschitz", "b", 1), ("sample_loss", "loss", 0),
            ("sample_energy", "x", 0), ("sample_energy", "h", 0), ("sample_grad_energy", "a", 1),
        ):  # fmt: skip
            assert found[site].isnan().tolist() == [False, True, False, False], site

    def test_labels(self):
        """A third batched argument follows its sample."""
        net = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2, num_classes=3)).double()
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        t, y = torch.tensor([1, 500, 900]), torch.tensor([2, 0, 1])
        skips = find_skips(net, x, t, y)
        blocks = parameter_blocks(net, skips, x, t, y)
        batch = ProbeBatch((x, t, y), target=x.flip(0), sensitive=1)
        probe = SensitivityProbe(net, skips, blocks, batch)
        losses = by_site(probe.measure())["sample_loss", "loss", 0]
        with torch.no_grad():
            expected = (net(x, t, y) - x.flip(0)).square().flatten(1).mean(1)
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)

    @settings(max_examples=8, deadline=None)
    @given(c=st.floats(1e-2, 1e2), seed=st.integers(0, 50))
    def test_homogeneity(self, c, seed):
        """Inputs and targets times c: norms stay, energies go as c², gradients' as c⁴."""
        net = TheoryUNet(8, 2).double()
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        skips = find_skips(net, x)
        blocks = parameter_blocks(net, skips, x)

        def found(c):
            batch = ProbeBatch((c * x,), target=c * y)
            return by_site(SensitivityProbe(net, skips, blocks, batch, SHARP).measure())

        powers = {"sample_energy": 2, "sample_loss": 2, "sample_grad_energy": 4}
        one, scaled = found(1.0), found(c)
        for site, value in one.items():
            power = powers.get(site[0], 0)
            torch.testing.assert_close(scaled[site], c**power * value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": ()}, r"epsilons must be positive fractions, got \(\)"),
        ({"epsilons": (0.1, 0.0)}, "epsilons must be positive fractions"),
        ({"directions": 0}, "directions must be at least 1, got 0"),
        ({"max_products": 0}, "max_products must be at least 1, got 0"),
        ({"memory": 0}, "memory must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(StabilityProbeError, match=message):
        SensitivityConfig(**options)
