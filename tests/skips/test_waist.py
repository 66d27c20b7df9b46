"""Which candidates are long skips: each rule with a network that it decides."""

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.skips.trace import trace
from stability_probe.skips.waist import long_skips


class Tokens(nn.Module):
    """A forward that is given, with layers for it."""

    def __init__(self, forward):
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(9))
        self.join = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))
        self.fn = forward

    def forward(self, x):
        return self.fn(self.f, self.join, x)


def levels(forward):
    flow = trace(Tokens(forward), (torch.randn(2, 5, 8),), {})
    return [(s.start, s.end) for s in long_skips(flow, "Tokens")]


def cat(z, u):
    return torch.cat([z, u], dim=-1)


def test_nested_concatenations_are_found_outermost_first():
    def net(f, join, x):
        u1 = f[0](x)
        u2 = f[1](u1)
        z = f[3](join[1](cat(f[2](u2), u2)))
        return f[4](join[0](cat(z, u1)))

    (outer, inner) = levels(net)
    assert outer[0] < inner[0] < inner[1] < outer[1]


def test_residuals_one_after_the_other_are_ordinary():
    def net(f, join, x):
        for layer in f:
            x = x + layer(x)
        return x

    assert levels(net) == []


def test_a_feature_that_one_line_reads_again_and_again_is_ordinary():
    def net(f, join, x):
        u, z = f[0](x), x
        for layer in (f[1], f[2], f[3]):
            z = layer(z + u)
        return f[4](z)

    assert levels(net) == []


def test_sums_that_overlap_in_a_row_are_ordinary():
    def net(f, join, x):
        image = None
        for layer, out in zip(f[:4], f[4:8], strict=True):
            x = layer(x)
            image = out(x) if image is None else image + out(x)
        return f[8](image)

    assert levels(net) == []


@pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")
def test_features_that_enter_crossing_merges_are_refused():
    def net(f, join, x):
        u1 = f[0](x)
        u2 = f[1](u1)
        z = join[0](cat(f[2](u2), u1))  # the first in comes first: not nested
        return f[4](join[1](cat(f[3](z), u2)))

    with pytest.raises(StabilityProbeError, match="Tokens has nested dense skips"):
        levels(net)


def test_branches_of_one_feature_that_one_merge_joins_belong_to_a_block():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
            self.out = nn.Linear(24, 8)

        def forward(self, x):
            b = self.b(x).tanh()
            return self.out(torch.cat([self.a(x), b, self.c(b).tanh().tanh()], dim=-1))

    model = nn.Sequential(nn.Linear(8, 8), Branching(), nn.Linear(8, 8))
    assert long_skips(trace(model, (torch.randn(2, 5, 8),), {}), "Branching") == []
