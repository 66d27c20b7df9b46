"""Outer products of linear and convolution layers, against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stability_probe.probes.outer_products import (
    layer_calls,
    layer_energies,
    outer_energy,
    windows,
)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("positions", [1, 2, 3, 50])  # Gram matrices for the first two
def test_energy_is_that_of_the_product(positions):
    a, g = randn(3, 2, 4, positions), randn(3, 2, 6, positions, seed=1)
    expected = torch.einsum("sgit,sgot->sgoi", a, g).square().sum((1, 2, 3))
    torch.testing.assert_close(outer_energy(a, g), expected, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_times_weight_is_the_convolution(data):
    """All strides, paddings, dilations, groups and modes, in one to three dimensions."""
    dims = data.draw(st.integers(1, 3))

    def each(least, most):
        return tuple(data.draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims)))

    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    groups = data.draw(st.sampled_from([1, 2]))
    mode = data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding = each(0, 2) if set(stride) != {1} else data.draw(st.sampled_from(["same", "valid"]))
    layer = CONVOLUTIONS[dims](
        4, 6, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode
    ).double()
    x = randn(2, 4, *each(5, 7))
    expected = layer(x).flatten(2)
    a = windows(layer, x).unflatten(1, (groups, -1))
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    torch.testing.assert_close((weight @ a).flatten(1, 2), expected, rtol=1e-10, atol=1e-12)


def energies_of(layer, x):
    """By layers and by autograd, of a loss with a different gradient everywhere."""
    weights = {"w": layer.weight}
    with layer_calls(nn.Sequential(layer), weights) as calls:
        losses = layer(x).sin().flatten(1).sum(1)
    found = layer_energies(weights, calls, losses)
    expected = [
        torch.autograd.grad(layer(one[None]).sin().sum(), layer.weight)[0].square().sum()
        for one in x
    ]
    return found, torch.stack(expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 5), (4,)),
        (nn.Linear(4, 5), (3, 4)),
        (nn.Linear(4, 5, bias=False), (3, 2, 4)),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (4, 8, 7)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="circular"), (4, 5, 6)),
        (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 4, 5)),
    ],
    ids=str,
)
def test_energies_are_those_of_autograd(layer, shape):
    found, expected = energies_of(layer.double(), randn(3, *shape))
    torch.testing.assert_close(found["w"].energy, expected, rtol=1e-10, atol=0)


def test_a_transposed_memory_layout():
    layer = nn.Conv2d(4, 6, 3).double()
    x = randn(3, 4, 7, 7).to(memory_format=torch.channels_last)
    found, expected = energies_of(layer, x)
    torch.testing.assert_close(found["w"].energy, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(4, 5), randn(4)), (nn.Conv2d(4, 6, 3), randn(4, 7, 7))],
    ids=["linear", "convolution"],
)
def test_calls_without_samples_are_not_taken(layer, x):
    with layer_calls(nn.Sequential(layer.double()), {"w": layer.weight}) as calls:
        layer(x)
    assert calls == []


def test_calls_without_a_graph_are_not_taken():
    layer = nn.Linear(4, 5).double()
    with layer_calls(nn.Sequential(layer), {"w": layer.weight}) as calls, torch.no_grad():
        layer(randn(2, 4))
    assert calls == []


def test_only_layers_of_the_wanted_weights_are_watched():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    with layer_calls(net, {"w": net[1].weight}) as calls:
        net(randn(2, 4))
    assert [call.layer for call in calls] == [net[1]]
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("rows", [3, 1, 0])
def test_rows_that_are_not_so_many_alike_give_nothing(rows):
    layer = nn.Linear(4, 5).double()
    with layer_calls(nn.Sequential(layer), {"w": layer.weight}) as calls:
        out = layer(randn(rows, 4))
    losses = out.sum() + torch.zeros(2, dtype=torch.float64)
    assert layer_energies({"w": layer.weight}, calls, losses) == {}
