import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import StabilityProbeError, TheoryUNet
from tests.oracles.eq4 import eq4_features

MERGES = pytest.mark.parametrize("merge", ["add", "concat"])


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@MERGES
@pytest.mark.parametrize("unit_gain", [False, True])
@pytest.mark.parametrize("n_skips", [1, 2, 5])
def test_is_equation_four(merge, unit_gain, n_skips):
    net = TheoryUNet(m=16, n_skips=n_skips, merge=merge, unit_gain=unit_gain)
    x = inputs(3, 16)
    expected = eq4_features(net.state_dict(), x, [1.0] * n_skips, concat=merge == "concat")[0]
    torch.testing.assert_close(net(x), expected)


def test_has_no_other_parameters_than_the_blocks():
    shapes = {name: tuple(p.shape) for name, p in TheoryUNet(m=4, n_skips=2).named_parameters()}
    blocks = ["encoder.0", "encoder.1", "middle", "decoder.0.block", "decoder.1.block"]
    assert shapes == {f"{b}.layer{k}.weight": (4, 4) for b in blocks for k in (1, 2)}
    concat = dict(TheoryUNet(m=4, n_skips=2, merge="concat").named_parameters())
    assert concat["decoder.1.block.layer1.weight"].shape == (4, 8)
    assert concat["decoder.1.block.layer2.weight"].shape == (4, 4)


@MERGES
@settings(deadline=None, derandomize=True, max_examples=25)
@given(c=st.floats(0.0, 1e3), seed=st.integers(0, 100))
def test_is_positively_homogeneous(merge, c, seed):
    net = TheoryUNet(m=16, n_skips=3, merge=merge).double()
    x = inputs(2, 16, seed=seed).double()
    torch.testing.assert_close(net(c * x), c * net(x), rtol=1e-9, atol=1e-9)


def test_is_not_linear():
    net, x = TheoryUNet(m=16, n_skips=2), inputs(2, 16)
    assert not torch.allclose(net(-x), -net(x), atol=1e-3)


@MERGES
def test_takes_images(merge):
    net = TheoryUNet(m=64, n_skips=2, merge=merge)
    x = inputs(3, 1, 8, 8)
    out = net(x)
    assert out.shape == x.shape
    assert torch.equal(out.flatten(1), net(x.flatten(1)))
    columns = x.transpose(2, 3)  # not contiguous
    assert torch.equal(net(columns), net(columns.contiguous()))


def test_ignores_the_noise_level():
    net, x = TheoryUNet(m=8, n_skips=1), inputs(2, 8)
    assert torch.equal(net(x, torch.tensor([3, 900])), net(x))


def test_samples_do_not_interact():
    net, x = TheoryUNet(m=8, n_skips=2), inputs(4, 8)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


def test_weights_have_the_variances_of_the_premises():
    m = 256
    variances = {
        gain: {
            name: float(p.detach().var() * m)
            for name, p in TheoryUNet(m, 1, unit_gain=gain, merge="concat").named_parameters()
        }
        for gain in (False, True)
    }
    assert len(variances[True]) == 6
    for name in variances[True]:
        second = 1 if "layer2" in name else 2
        assert variances[False][name] == pytest.approx(2, rel=0.05)
        assert variances[True][name] == pytest.approx(second, rel=0.05)


def test_final_relu_is_the_last_step_of_every_block():
    net, plain = (TheoryUNet(m=8, n_skips=2, final_relu=relu) for relu in (True, False))
    x = inputs(4, 8)
    for block, bare in zip([*net.encoder, net.middle], [*plain.encoder, plain.middle], strict=True):
        assert torch.equal(block(x), bare(x).relu())
        assert (bare(x) < 0).any()
    assert (net(x) >= 0).all()


def test_weights_come_from_the_generator_alone():
    before = torch.random.get_rng_state()
    nets = [TheoryUNet(m=8, n_skips=2, generator=g) for g in (None, None)]
    other = TheoryUNet(m=8, n_skips=2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    x = inputs(2, 8)
    assert torch.equal(nets[0](x), nets[1](x))
    assert not torch.equal(nets[0](x), other(x))
    weights = list(nets[0].parameters())
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "m must be at least 1, got 0"),
        ({"n_skips": 0}, "n_skips must be at least 1, got 0"),
        ({"n_skips": -2}, "n_skips must be at least 1, got -2"),
        ({"merge": "mean"}, 'merge must be "add" or "concat", got \'mean\''),
    ],
)
def test_errors(options, message):
    with pytest.raises(StabilityProbeError, match=message):
        TheoryUNet(**options)
