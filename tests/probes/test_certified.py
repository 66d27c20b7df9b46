"""Certified constants of blocks, against norms by hand and the blocks' dense Jacobians."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stability_probe import (
    ConstantScaling,
    LearnableScaling,
    StabilityProbeError,
    TheoryUNet,
    Uniform,
    find_skips,
    scale_skips,
)
from stability_probe.probes import ProbeBatch
from stability_probe.probes.certified import CertifiedConstants, certified_constants
from stability_probe.probes.graph import feature_graph
from stability_probe.skips import choose_skips
from stability_probe.theory import blockwise_bound
from stability_probe.theory.lipschitz import convolution_norm
from tests.oracles.zoo import CASES, hook_count, randomise


class ConvUNet(nn.Module):
    """Two skips, at 6x6 and 3x3; strided, transposed, batch-normalised, written in place."""

    def __init__(self, act=None, up=None, around=False):
        super().__init__()
        self.act, self.around = act or nn.ReLU(inplace=True), around
        self.inp = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.down = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.mid = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.deep = nn.Conv2d(6, 2, 3, padding=1)
        self.up = up or nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)
        randomise(self, seed=3, std=0.5)
        self.norm.running_var.copy_(torch.tensor([0.25, 4.0]))
        self.norm.running_mean.fill_(0.1)
        self.double()

    def forward(self, x):
        u1 = self.act(self.norm(self.inp(x)))
        u2 = self.act(self.down(u1))
        z1 = self.act(self.deep(torch.cat([self.mid(u2), u2], 1)))
        if self.around:
            z1 = z1 + F.avg_pool2d(x, 2)
        return self.out(torch.cat([self.up(z1), u1], 1))


def certify(net, x, scheme=None):
    skips = find_skips(net, x)
    assert skips
    if scheme is None:
        return certified_constants(net, skips, ProbeBatch((x,)))
    with scale_skips(net, skips, scheme):
        return certified_constants(net, skips, ProbeBatch((x,)))


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm_of(weight):
    return torch.linalg.svdvals(weight.double())[0].item()


def local_norms(net, x):
    """The norms of all blocks' dense Jacobians at one sample, by the constants that bound them."""
    skips = find_skips(net, x)
    n = len(skips)
    net.eval()
    with feature_graph(net, skips, ProbeBatch((x,))) as nodes:

        def norm(out, into):
            flat, rows = nodes[out].flatten(), []
            for k in range(len(flat)):
                (row,) = torch.autograd.grad(flat[k], nodes[into], retain_graph=True)
                rows.append(row.flatten())
            return torch.linalg.matrix_norm(torch.stack(rows), ord=2).item()

        x_or_f = [("x", 0), *(("f", i) for i in range(1, n))]
        ends = [("output", 0), *(("z", i) for i in range(1, n))]
        return CertifiedConstants(
            [norm(("f", i), x_or_f[i - 1]) for i in range(1, n + 1)],
            [norm(ends[i - 1], ("merged", i)) for i in range(1, n + 1)],
            norm(("z", n), ("f", n)),
            [norm(("ku", i), ("f", i)) for i in range(1, n + 1)],
        )


def numbers(constants):
    return [*constants.lip_a, *constants.lip_b, constants.l0, *constants.kappa]


class TestTheoryUNet:
    @pytest.mark.parametrize("merge", ["add", "concat"])
    @pytest.mark.parametrize("scheme", [None, ConstantScaling(0.5), Uniform(0.0)])
    def test_constants_are_products_of_the_weights_norms(self, merge, scheme):
        net, x = TheoryUNet(m=8, n_skips=3, merge=merge), torch.ones(2, 8)
        found = certify(net, x, scheme)

        def by_hand(block):
            return norm_of(block.layer2.weight) * norm_of(block.layer1.weight)

        assert found.lip_a == pytest.approx([by_hand(a) for a in net.encoder], rel=1e-9)
        assert found.lip_b == pytest.approx([by_hand(b.block) for b in net.decoder], rel=1e-9)
        assert found.l0 == pytest.approx(by_hand(net.middle), rel=1e-9)
        kappa = scheme.coefficients(3) if scheme else [1.0] * 3
        assert found.kappa == pytest.approx(kappa)

    def test_the_bound_holds_between_any_two_inputs(self):
        net = TheoryUNet(m=8, n_skips=2).double()
        found = certify(net, noise(1, 8))
        lip_a, lip_b = (torch.tensor(v).numpy() for v in (found.lip_a, found.lip_b))
        bound = float(blockwise_bound(found.kappa, lip_a, lip_b, found.l0))
        x, y = 100 * noise(2, 500, 8)
        ratios = (net(x) - net(y)).norm(dim=1) / (x - y).norm(dim=1)
        assert ratios.max().item() <= bound


class TestConvUNet:
    def test_constants_by_hand_where_layers_have_them(self):
        net = ConvUNet()
        found = certify(net, noise(1, 1, 6, 6))
        gamma = net.norm.weight.double() / (net.norm.running_var + net.norm.eps).sqrt()
        inp = convolution_norm(net.inp.weight, [6, 6], padding=1)
        assert found.lip_a[0] == pytest.approx(inp * gamma.abs().max().item())
        down = convolution_norm(net.down.weight, [6, 6], 2, 1)
        assert found.lip_a[1] == pytest.approx(down)
        assert found.l0 == pytest.approx(convolution_norm(net.mid[0].weight, [3, 3], 1, 1))
        up = convolution_norm(net.up.weight, [6, 6], 2, 1)
        deep = convolution_norm(net.deep.weight, [3, 3], 1, 1)
        assert found.lip_b[1] == pytest.approx(deep * up)
        assert found.lip_b[0] == pytest.approx(convolution_norm(net.out.weight, [6, 6], 1, 1))

    @settings(max_examples=12, deadline=None)
    @given(
        seed=st.integers(0, 999),
        size=st.sampled_from([0.1, 1.0, 10.0]),
        act=st.sampled_from([nn.ReLU(inplace=True), nn.LeakyReLU(-2.0), nn.ELU(3.0), nn.Sigmoid()]),
        up=st.sampled_from([None, nn.Upsample(scale_factor=2)]),
        kappa=st.sampled_from([1.0, 0.3, 2.0]),
    )
    def test_no_local_norm_exceeds_them(self, seed, size, act, up, kappa):
        net, x = ConvUNet(act, up), size * noise(1, 1, 6, 6, seed=seed)
        with scale_skips(net, find_skips(net, x), Uniform(kappa)):
            certified = numbers(certify(net, x))
            local = numbers(local_norms(net, x))
        for bound, norm in zip(certified, local, strict=True):
            assert norm <= bound * (1 + 1e-9)

    def test_a_wrong_constant_would_be_seen(self):
        """The largest ratio of local to certified is near 1, so a bound of half breaks the law."""
        net = ConvUNet()
        certified = numbers(certify(net, noise(1, 1, 6, 6)))
        ratios = [
            norm / bound
            for seed in range(5)
            for norm, bound in zip(
                numbers(local_norms(net, noise(1, 1, 6, 6, seed=seed))), certified, strict=True
            )
        ]
        assert 0.5 < max(ratios[: len(certified) - 2]) <= 1

    def test_the_network_is_left_as_it_was(self):
        net, x = ConvUNet(), noise(2, 1, 6, 6)
        net.train()
        hooks, state = hook_count(net), {k: v.clone() for k, v in net.state_dict().items()}
        certify(net, x)
        assert net.training and net.norm.training
        assert hook_count(net) == hooks
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())

    def test_an_input_that_is_a_skip_itself_has_an_encoder_block_of_constant_1(self):
        class Short(nn.Module):
            def __init__(self):
                super().__init__()
                self.down, self.out = nn.Linear(4, 4), nn.Linear(8, 4)

            def forward(self, x):
                return self.out(torch.cat([F.relu(self.down(x)), x], dim=1))

        net, x = Short(), torch.ones(1, 4)
        skips = choose_skips([("", "out")], net, x)
        assert skips[0].feature is None
        found = certified_constants(net, skips, ProbeBatch((x,)))
        assert found.lip_a == [1.0] and found.kappa == [1.0]
        assert found.l0 == pytest.approx(norm_of(net.down.weight))


class TestRefusals:
    @pytest.mark.parametrize(
        ("case", "message"),
        [
            (
                "uvit",
                r"layer_norm in 'in_blocks\.0\.norm1': it divides by a sample's own deviation",
            ),
            ("unet2d", r"group_norm in 'down_blocks\.0\.resnets\.0\.norm1': it divides by"),
        ],
    )
    def test_name_the_operation_and_the_module(self, case, message):
        net, args = CASES[case].build(), CASES[case].args
        hooks, skips = hook_count(net), find_skips(net, *args)
        with pytest.raises(StabilityProbeError, match=message):
            certified_constants(net, skips, ProbeBatch(args))
        assert hook_count(net) == hooks

    @pytest.mark.parametrize(
        ("act", "message"),
        [
            (nn.SiLU(), "silu in 'act': its slope exceeds 1"),
            (nn.GELU(), "gelu in 'act': its slope exceeds 1"),
            (nn.Softmax(1), "softmax in 'act': attention multiplies features"),
            (nn.Hardswish(), "hardswish in 'act': no constant of it is known here"),
            (nn.GroupNorm(1, 2, affine=False), "group_norm in 'act'"),
        ],
    )
    def test_activations_that_are_not_certified(self, act, message):
        net = ConvUNet(up=nn.Sequential(act, nn.Upsample(scale_factor=2)))
        with pytest.raises(StabilityProbeError, match=message.replace("'act'", r"'up\.0'")):
            certify(net, noise(1, 1, 6, 6))

    def test_gates_that_look_at_the_feature(self):
        net, x = TheoryUNet(m=16, n_skips=2), torch.ones(1, 16)
        message = "mul in .*: a product of two tensors that both depend on the input"
        with pytest.raises(StabilityProbeError, match=message):
            certify(net, x, LearnableScaling())

    def test_paths_around_the_blocks(self):
        net, x = ConvUNet(around=True), noise(1, 1, 6, 6)
        skips = find_skips(net, x)
        with pytest.raises(StabilityProbeError, match="b_2 depends on x around its own input"):
            certified_constants(net, skips[:2], ProbeBatch((x,)))

    def test_a_block_that_cannot_be_followed(self):
        class Foreign(nn.Module):
            def forward(self, v):
                return torch.from_numpy(v.numpy() * 1.0)

        net, x = TheoryUNet(m=8, n_skips=1), torch.ones(1, 8)
        skips = find_skips(net, x)
        net.middle = Foreign()
        with pytest.raises(StabilityProbeError, match="middle block could not be followed"):
            certified_constants(net, skips, ProbeBatch((x,)))

    def test_scripted_modules(self):
        net, x = TheoryUNet(m=8, n_skips=1), torch.ones(1, 8)
        skips = find_skips(net, x)
        net.middle = torch.jit.script(nn.Linear(8, 8))
        with pytest.raises(StabilityProbeError, match="'middle' is scripted and cannot be"):
            certified_constants(net, skips, ProbeBatch((x,)))

    def test_a_network_without_skips(self):
        net, x = nn.Linear(4, 4), torch.ones(1, 4)
        with pytest.raises(StabilityProbeError, match=r"Linear has no long skips \(N = 0\)"):
            certified_constants(net, [], ProbeBatch((x,)))

    def test_lists_of_different_lengths(self):
        with pytest.raises(StabilityProbeError, match=r"one number a level .* got 1, 2 and 1"):
            CertifiedConstants([1.0], [1.0, 1.0], 1.0, [1.0])

    def test_an_error_in_the_model_leaves_no_hook(self):
        net, x = ConvUNet(), noise(1, 1, 6, 6)
        skips, hooks = find_skips(net, x), hook_count(net)
        net.deep.forward = lambda input: 1 / 0
        with pytest.raises(ZeroDivisionError):
            certified_constants(net, skips, ProbeBatch((x,)))
        assert hook_count(net) == hooks


def test_constants_are_finite_and_positive_for_all_of_a_network_by_default():
    assert all(0 < v < math.inf for v in numbers(certify(ConvUNet(), noise(1, 1, 6, 6))))
