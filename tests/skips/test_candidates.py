"""Merges that could be long skips, in flows of small functions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stability_probe.skips.candidates import candidates, unknown_joins
from stability_probe.skips.trace import trace


class Net(nn.Module):
    """A forward that is given, with three layers for it."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.fn = forward

    def forward(self, x):
        return self.fn(self, x)


def found(forward, x=None):
    flow = trace(Net(forward), (torch.ones(2, 6) if x is None else x,), {})
    return [(s.kind, s.operand, s.start, s.end) for s in candidates(flow)]


def test_the_shallower_operand_is_the_skip():
    assert found(lambda n, x: n.c(n.b(x) + x)) == [("add", 1, 0, 2)]
    assert found(lambda n, x: n.c(x + n.b(x))) == [("add", 0, 0, 2)]
    assert found(lambda n, x: n.c(torch.cat([n.b(x), x], 0))) == []  # along the batch
    assert found(lambda n, x: n.b(x).mul(1).add(1)) == []  # one tensor


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.b(n.a(x)) + x,  # no parameter after it
        lambda n, x: n.c(n.a(x)) * (n.b(n.a(x)) + x).mean(),  # only a gate
        lambda n, x: n.c(n.a(x) + torch.ones(2, 6)),  # not of the input
        lambda n, x: n.c(n.a(n.a(x)) + n.b(n.b(x))),  # two branches alike
        lambda n, x: n.c(n.a(x) + x.mean(1, keepdim=True)),  # of another shape
    ],
)
def test_what_is_no_skip(forward):
    assert found(forward) == []


def test_a_mask_that_most_of_the_network_makes_counts():
    def masked(n, x):
        return x * n.c(n.b(n.a(x)) + n.a(x)).sigmoid()

    assert [kind for kind, *_ in found(masked)] == ["add"]


def test_a_factor_that_is_spread_is_a_gate_however_deep_the_other():
    def scaled(n, x):
        return n.c(n.b(n.a(x)) + n.a(x)) * x.std(1, keepdim=True)

    assert [kind for kind, *_ in found(scaled)] == ["add"]


def coarse(n, x, join):
    u = n.a(x)
    z = F.interpolate(F.avg_pool1d(u, 2), size=6)
    return n.c(join(z, u))


@pytest.mark.parametrize(
    ("join", "names"),
    [
        (torch.maximum, {"maximum"}),
        (lambda z, u: torch.where(u > 0, u, z), {"where"}),
        (lambda z, u: torch.stack([z, u]).sum(0), {"stack"}),
        (lambda z, u: z + u, set()),
        (lambda z, u: z * u, set()),
        (lambda z, u: torch.cat([z, u], 1)[:, :4], set()),
    ],
)
def test_joins_that_are_no_merges_are_named(join, names):
    flow = trace(Net(lambda n, x: coarse(n, x, join)), (torch.randn(2, 4, 6),), {})
    assert unknown_joins(flow) == names


def test_joins_at_one_resolution_are_nobodys_business():
    flow = trace(Net(lambda n, x: n.c(torch.maximum(n.b(n.a(x)), x))), (torch.ones(2, 4, 6),), {})
    assert unknown_joins(flow) == set()
