"""What a merge bridges."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stability_probe.skips.span import Span
from stability_probe.skips.trace import trace

MAP = torch.ones(2, 4, 8, 8)


class Does(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x):
        return self.fn(self, x)


def span_of(fn, x=MAP, operand=1):
    """The last merge of a forward, as a bridge from the node where its operand branched off."""
    flow = trace(Does(fn), (x,), {})
    merge = next(n for n in reversed(flow.nodes) if n.merge)
    u = merge.merge.operands[operand][0]
    return Span(flow, merge.index, operand, 1 - operand, u)


def test_the_ends_and_the_length():
    span = span_of(lambda m, x: torch.cat([m.conv(m.conv(u := x.exp())).sin(), u], dim=1))
    assert (span.kind, span.start, span.end, span.length) == ("concat", 1, 5, 4)
    assert span.node.function == "cat"
    assert (span.operand_node(0), span.operand_node(1)) == (4, 1)
    assert span.operand_shape(0) == span.operand_shape(1) == (2, 4, 8, 8)


def test_the_nodes_that_are_bridged_are_of_the_main_path_alone():
    def forward(m, x):
        u = x.exp()
        beside = x.cos()
        z = m.conv(u) + beside
        gate = torch.sigmoid(m.conv(z).mean((2, 3), keepdim=True))
        return (z * gate).relu() + u

    span = span_of(forward)
    assert [n.function for n in span.bridged] == ["conv2d", "add", "mul", "relu"]


def up(x):
    return F.interpolate(x, scale_factor=2)


@pytest.mark.parametrize(
    ("main", "coarser"),
    [
        (lambda m, u: m.conv(u), False),
        (lambda m, u: up(m.pool(u)), True),
        (lambda m, u: F.pixel_shuffle(F.pixel_unshuffle(u, 2), 2), True),
        (lambda m, u: F.conv_transpose2d(F.avg_pool2d(u, 2), torch.ones(4, 4, 2, 2), stride=2), 1),
        (lambda m, u: F.avg_pool2d(up(u), 2), False),  # finer, and back
        (lambda m, u: u.mean((2, 3), keepdim=True).expand_as(u).clone(), False),  # no feature map
        (lambda m, u: m.conv(u)[:, :, :4].repeat(1, 1, 2, 1), False),
    ],
    ids=["same", "pooled", "unshuffled", "strided", "finer", "mean", "sliced"],
)
def test_coarser_is_a_feature_map_of_less_resolution_than_both_ends(main, coarser):
    span = span_of(lambda m, x: torch.cat([main(m, u := x.exp()), u], dim=1))
    assert span.coarser is bool(coarser)


def test_a_skip_that_is_pooled_itself_bridges_nothing_coarser():
    span = span_of(lambda m, x: torch.cat([m.pool(m.conv(u := x.exp())), m.pool(u)], dim=1))
    branch = Span(span.flow, span.merge, span.operand, span.main, branch=1)
    assert not branch.coarser


def test_tokens_have_no_resolution():
    span = span_of(lambda m, x: x.exp() + x, x=torch.ones(2, 5, 8))
    assert not span.coarser


def test_the_location_is_the_line_that_merges():
    span = span_of(lambda m, x: x.exp() + x)
    file, kind, line = span.location
    assert file == Does.forward.__code__.co_filename and kind == "add"
    assert line == Does.forward.__code__.co_firstlineno + 1


def test_a_location_without_a_line_is_told_by_its_order():
    class Sums(nn.Module):
        def forward(self, x):
            return (x + x.exp()) + x

    exported = torch.export.unflatten(torch.export.export(nn.Sequential(Sums()), (MAP,)))
    flow = trace(exported, (MAP,), {})
    places = {Span(flow, n.index, 1, 0, 0).location[2] for n in flow.nodes if n.merge}
    assert places == {-1, -2}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + x


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.adds = Block(), Adds()

    def forward(self, x):
        return self.adds(self.block(x), x)


class Adds(nn.Module):
    def forward(self, z, u):
        return z + u


def test_in_one_call_is_what_the_merging_module_does_all_by_itself():
    flow = trace(Whole(), (MAP,), {})
    inner, outer = (n.index for n in flow.nodes if n.merge)
    assert Span(flow, inner, 1, 0, 0).in_one_call
    assert not Span(flow, outer, 1, 0, 0).in_one_call
