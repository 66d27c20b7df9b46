"""Which tensors are looked at, when, and how they are reduced.

Their energies are held against the oracle in `test_probe.py`.
"""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from stability_probe import TheoryUNet, Uniform, find_skips, scale_skips
from stability_probe.probes import Key, features
from stability_probe.probes.features import FeatureProbe, sample_energy
from tests.oracles.recording import energy, run_pass


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4), (2, 3, 4, 4), (1, 1)])
def test_energy_is_the_sum_of_squares_of_each_sample(shape):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sample_energy(v), v.pow(2).flatten(1).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_energy_is_accumulated_in_float32_at_least(dtype, kept):
    found = sample_energy(torch.full((2, 400), 32.0, dtype=dtype))
    assert found.dtype == kept
    assert found.tolist() == [409600.0, 409600.0]  # more than a float16 holds


def test_energy_has_no_graph_and_leaves_its_argument():
    v = torch.ones(2, 3, requires_grad=True)
    assert not sample_energy(v).requires_grad
    assert v.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_energy_of_a_bad_sample_is_bad_and_of_the_others_is_not(bad):
    v = torch.ones(3, 4)
    v[1, 2] = bad
    found = sample_energy(v)
    assert found[[0, 2]].tolist() == [4.0, 4.0]
    assert not found[1].isfinite()


STRIDED = {
    "slice of the last dimension": lambda v: v[..., 3:5],
    "slice of the channels": lambda v: v[:, 1:3],
    "transposed": lambda v: v.transpose(1, 2),
    "every other": lambda v: v[..., ::2],
    "channels last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "slice of channels last": lambda v: v.contiguous(memory_format=torch.channels_last)[:, 1:3],
    "expanded": lambda v: v[:, :, :1].expand(-1, -1, 6, -1),
    "one column": lambda v: v[..., :1],
}


@pytest.mark.parametrize("way", STRIDED)
def test_energy_is_the_same_wherever_the_entries_lie(way):
    v = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strided = STRIDED[way](v)
    expected = strided.contiguous().pow(2).flatten(1).sum(1)
    torch.testing.assert_close(sample_energy(strided), expected, rtol=1e-12, atol=0)


def watch(net, *args, active=True, backward=True, skips=None, **kwargs):
    """The features of one forward and backward pass."""
    probe = FeatureProbe(find_skips(net, *args, **kwargs) if skips is None else skips)
    with ExitStack() as stack:
        probe.attach(net, stack)
        probe.active = active
        out = net(*args, **kwargs)
        if backward:
            out.square().mean().backward()
    return probe


NET = TheoryUNet(8, 2)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SITES = {("x", 0), ("output", 0), ("h", 0), ("h", 1), ("h", 2)} | {
    (site, i) for site in ("u", "ku", "merged") for i in (1, 2)
}


def test_every_tensor_of_eq_4_is_seen_once_a_pass():
    probe = watch(NET, X)
    assert set(probe.norms) == SITES
    assert all(len(parts) == 1 for parts in probe.norms.values())
    assert set(probe.gradients) == {("u", 1), ("u", 2), ("h", 0), ("h", 1), ("h", 2)}
    found = probe.samples(1.0)
    for i in (1, 2):  # z_i = h_i is looked at once and recorded under both names
        assert torch.equal(found[Key("energy", "z", i, "")], probe.norms["h", i][0].square())


def test_a_model_called_twice_is_recorded_twice():
    probe = FeatureProbe(find_skips(NET, X))
    with ExitStack() as stack:
        probe.attach(NET, stack)
        probe.active = True
        (NET(X).sum() + NET(2 * X[:1]).sum()).backward()
    found = probe.samples(1.0)
    assert {len(v) for v in found.values()} == {5}
    assert probe.norms["x", 0][1] == pytest.approx(2 * probe.norms["x", 0][0][:1], rel=1e-6)
    probe.clear()
    assert probe.samples(1.0) == {}


def test_nothing_is_seen_while_inactive_or_without_gradients():
    assert not watch(NET, X, active=False).norms
    with torch.no_grad():
        assert not watch(NET, X, backward=False).norms


def test_nothing_is_seen_after_the_stack_is_closed():
    probe = watch(NET, X)
    NET(X)
    assert all(len(parts) == 1 for parts in probe.norms.values())


def test_gradients_alone_are_missing_before_the_backward_pass():
    probe = watch(NET, X, backward=False)
    assert set(probe.norms) == SITES
    assert not probe.gradients


def test_u_is_seen_before_the_scaling_and_ku_after_it():
    skips = find_skips(NET, X)
    with scale_skips(NET, skips, Uniform(0.25)):
        found = watch(NET, X, skips=skips).samples(1.0)
    for i in (1, 2):
        assert found[Key("kappa", "skip", i, "")].tolist() == [0.25] * 4
        u, ku = (found[Key("energy", site, i, "")] for site in ("u", "ku"))
        torch.testing.assert_close(ku, u / 16)
        exact = energy(run_pass(NET, X, torch.zeros(4)).u[i])
        torch.testing.assert_close(u.double(), exact, rtol=1e-5, atol=0)


SCALED = {
    "not": (lambda u: None, 1.0),
    "by another tensor": (lambda u: 0.5 * u, 0.5),
    "in place": (lambda u: u.mul_(0.5), 0.5),
    "by a copy": (lambda u: u.clone(), 1.0),
}


@pytest.mark.parametrize("way", SCALED)
def test_what_is_done_to_a_skip_on_its_way_is_seen(monkeypatch, way):
    """κu is reduced for itself but where it is u itself, untouched."""
    net, (scale, kappa) = TheoryUNet(8, 2), SCALED[way]
    for module in net.encoder:  # a view's gradient could not be told when it is written to
        module.register_forward_hook(lambda m, a, out: out.clone())
    skips, reduced = find_skips(net, X), []
    norm = features._norm
    monkeypatch.setattr(features, "_norm", lambda v: reduced.append(v) or norm(v))
    with ExitStack() as stack:
        for s in skips:
            stack.callback(s.skip.attach(net, scale).remove)
        found = watch(net, X, skips=skips, backward=False).samples(1.0)
    for i in (1, 2):
        assert found[Key("kappa", "skip", i, "")].tolist() == pytest.approx([kappa] * 4)
    assert len(reduced) == len(SITES) - (2 if way == "not" else 0)


def test_gradients_are_unscaled_by_the_loss_scale():
    probe = watch(NET, X)
    one, eighth = probe.samples(1.0), probe.samples(8.0)
    for key, value in one.items():
        factor = 64 if key.metric == "feature_grad_energy" else 1
        assert torch.equal(value, factor * eighth[key])


def test_the_gradient_of_a_feature_is_of_all_its_uses():
    """u_1 feeds both the skip and a_2: the gradient is their sum, as a finite difference says."""
    net, x = TheoryUNet(6, 2, merge="concat").double(), torch.ones(1, 6, dtype=torch.float64)
    found = watch(net, x).samples(1.0)[Key("feature_grad_energy", "u", 1, "")]

    def loss(push):
        hook = net.encoder[0].register_forward_hook(lambda m, a, out: out + push)
        with torch.no_grad():
            value = net(x).square().mean()
        hook.remove()
        return value

    steps = 1e-6 * torch.eye(6, dtype=torch.float64)
    slopes = torch.stack([(loss(s) - loss(-s)) / 2e-6 for s in steps])
    assert found.item() == pytest.approx(slopes.square().sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (None, None),
        (torch.tensor([1, 2, 3, 4]), [1.0, 2.0, 3.0, 4.0]),
        (torch.tensor([[1.5], [2], [3], [4]]), [1.5, 2.0, 3.0, 4.0]),
        (torch.tensor(7), [7.0] * 4),
        (torch.tensor([7]), [7.0] * 4),
        (torch.ones(4, 3), None),
        (torch.ones(3), None),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_the_noise_level_is_the_second_tensor_if_it_is_a_number_a_sample(t, expected, by_name):
    probe = watch(NET, X, t=t) if by_name else watch(NET, X, t)
    found = [level.tolist() for level in probe.noise_level]
    assert found == ([] if expected is None else [expected])


def test_a_module_without_skips_has_an_input_and_an_output():
    net = nn.Linear(3, 2)
    probe = watch(net, torch.ones(2, 3), skips=[])
    assert set(probe.norms) == {("x", 0), ("output", 0)}
    assert probe.norms["x", 0][0].tolist() == pytest.approx([3**0.5] * 2)


def test_each_backward_pass_gives_a_gradient_of_its_own():
    probe = FeatureProbe(find_skips(NET, X))
    with ExitStack() as stack:
        probe.attach(NET, stack)
        probe.active = True
        out = NET(X)
        out.sum().backward(retain_graph=True)
        (3 * out.sum()).backward()
    (pass_of_first, first), (pass_of_second, second) = probe.gradients["h", 1]
    assert pass_of_first == pass_of_second == 0
    torch.testing.assert_close(second, 3 * first)
    assert len(probe.norms["h", 1]) == 1


def test_a_copy_is_not_probed():
    net = copy.deepcopy(NET)
    probe = FeatureProbe(find_skips(net, X))
    with ExitStack() as stack:
        probe.attach(net, stack)
        probe.active = True
        copy.deepcopy(net)(X).sum().backward()
        assert not probe.norms
        net(X)
    assert set(probe.norms) == SITES


def test_frozen_inputs_are_seen_without_gradients():
    """Features that nothing flows back to have an energy and no gradient energy."""
    net = TheoryUNet(8, 2)
    net.encoder.requires_grad_(False)
    probe = watch(net, X)
    assert set(probe.norms) == SITES
    assert set(probe.gradients) == {("h", 0), ("h", 1), ("h", 2)}
