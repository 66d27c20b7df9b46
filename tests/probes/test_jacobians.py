"""Shares of the worst case and the terms of gates, against dense Jacobians."""

import pytest
import torch
from torch import nn

from stability_probe import LearnableScaling, TheoryUNet, find_skips, scale_skips
from stability_probe.probes import ProbeBatch
from stability_probe.probes.graph import feature_graph
from stability_probe.probes.jacobians import Jacobians
from stability_probe.skips import parse_scaling
from tests.oracles.dense import dense_jacobian
from tests.probes.test_sensitivity import Residual, paths_at


def jacobians(net, skips, x, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Jacobians(net, skips, ProbeBatch((x,)), generator, 1e-9, 1e-9, 500)


def inputs(n=3, m=16):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def theory_unet(merge="add"):
    net = TheoryUNet(16, 3, merge=merge).double().eval()
    return net, find_skips(net, inputs(1))


@pytest.mark.parametrize("merge", ["add", "concat"])
@pytest.mark.parametrize("scheme", ["unscaled", "cs:0.7"])
def test_shares_and_alignments_are_those_of_the_dense_paths(merge, scheme):
    net, skips = theory_unet(merge)
    x = inputs()
    with scale_skips(net, skips, parse_scaling(scheme)):
        found, worst = jacobians(net, skips, x).measure(paths=True)
    found = {key[:3]: value for key, value in found.items()}
    kappa = parse_scaling(scheme).coefficients(3)
    for s in range(len(x)):
        t = torch.zeros(1)
        dense = {p: dense_jacobian(fn, x[s][None])[0] for p, fn in paths_at(net, t, kappa).items()}
        u, sigma, vt = torch.linalg.svd(sum(dense.values()))
        assert abs(vt[0] @ worst[s]).item() == pytest.approx(1, abs=1e-6)
        for path, matrix in dense.items():
            share = u[:, 0] @ matrix @ vt[0] / sigma[0]
            torch.testing.assert_close(found[("path_share", *path)][s], share, rtol=1e-5, atol=1e-7)
            norm = torch.linalg.matrix_norm(matrix, ord=2)
            aligned = (matrix @ vt[0]).norm() / norm
            torch.testing.assert_close(
                found[("path_alignment", *path)][s], aligned, rtol=1e-5, atol=0
            )
    total = sum(found["path_share", "skip", i] for i in (1, 2, 3)) + found["path_share", "mid", 0]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-8, atol=0)


def test_what_goes_around_has_its_share():
    net = Residual(theory_unet()[0]).double().eval()
    x = inputs()
    skips = find_skips(net, x[:1])
    found, _ = jacobians(net, skips, x).measure(paths=True)
    shares = [value for key, value in found.items() if key.metric == "path_share"]
    assert len(shares) == 5
    torch.testing.assert_close(sum(shares), torch.ones(3).double(), rtol=1e-8, atol=0)


class TestGates:
    def gated(self, seed=0):
        net, skips = theory_unet()
        scheme = LearnableScaling(generator=torch.Generator().manual_seed(seed)).double()
        return net, skips, scheme

    def test_term_and_bound_are_those_of_the_dense_jacobians(self):
        net, skips, scheme = self.gated()
        x = inputs(2)
        with scale_skips(net, skips, scheme):
            scheme.double()
            found, _ = jacobians(net, skips, x).measure(paths=False)
            found = {key[:3]: value for key, value in found.items()}
            for s in skips:

                def features(v, level=s.level):
                    return feature(net, skips, v, level)

                def gate(v, level=s.level):
                    return scheme.gate(features(v), level)

                u = features(x)
                du, dk = dense_jacobian(features, x), dense_jacobian(gate, x)
                whole = dense_jacobian(lambda v: gate(v) * features(v), x)
                term = torch.einsum("bi,bij->bij", u, dk)
                torch.testing.assert_close(whole, term + gate(x)[:, :, None] * du)
                norm = torch.linalg.matrix_norm(term, ord=2)
                low = found["gate_term", "skip", s.level]
                torch.testing.assert_close(low, norm, rtol=1e-6, atol=0)
                bound = u.norm(dim=1) * torch.linalg.matrix_norm(dk, ord=2)
                high = found["gate_bound", "skip", s.level]
                torch.testing.assert_close(high, bound, rtol=1e-6, atol=0)
                assert (low <= high).all()

    @pytest.mark.parametrize("small", [1e-2, 1e-6])
    def test_a_small_term_is_not_lost_in_the_rounding_of_the_skip(self, small):
        """In float32, gates whose last layer is nearly flat; the term is proportional to it."""
        terms = []
        for factor in (1.0, small):
            net, skips, scheme = self.gated()
            net.float()
            with scale_skips(net, skips, scheme):
                scheme.float()
                for name, p in scheme.named_parameters():
                    if name.endswith("layer2.weight"):
                        p.data.mul_(factor)
                    if name.endswith("layer2.bias"):
                        p.data.zero_()
                found, _ = jacobians(net, skips, inputs().float()).measure(paths=False)
            terms.append({k.level: v for k, v in found.items() if k.metric == "gate_term"})
        for level, flat in terms[1].items():
            steep = terms[0][level]
            assert ((flat >= 0.5 * small * steep) & (flat <= 2 * small * steep + 1e-30)).all()

    def test_constants_have_none(self):
        net, skips = theory_unet()
        with scale_skips(net, skips, parse_scaling("cs:0.7")):
            found, _ = jacobians(net, skips, inputs()).measure(paths=False)
        assert not any(key.metric.startswith("gate") for key in found)

    def test_gates_that_do_not_move_have_a_term_of_zero(self):
        net, skips, scheme = self.gated()
        with scale_skips(net, skips, scheme):
            scheme.double()
            for module in scheme.modules():
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.weight)
            found, _ = jacobians(net, skips, inputs()).measure(paths=False)
        terms = [value for key, value in found.items() if key.metric.startswith("gate")]
        assert len(terms) == 9
        assert all((value.abs() < 1e-12).all() for value in terms)


def feature(net, skips, x, level):
    """u_i as a function of x, with its graph."""
    u = x
    for block in list(net.encoder)[:level]:
        u = block(u)
    return u


def test_the_graph_is_left_without_hooks():
    net, skips = theory_unet()
    jacobians(net, skips, inputs()).measure(paths=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with feature_graph(net, skips, ProbeBatch((inputs(),))) as nodes:
        assert ("ku", 1) in nodes
