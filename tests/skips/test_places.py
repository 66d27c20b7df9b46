"""From a merge in the data flow to taps: which kind, where, and what the model multiplies by."""

import pytest
import torch
from torch import nn

from stability_probe import find_skips
from stability_probe.skips import ArgumentTap, OperandTap, OutputTap, SliceTap, choose_skips
from tests.oracles.architectures import ZOO
from tests.oracles.architectures.unets import SmallUNet
from tests.oracles.zoo import CASES

X = torch.ones(2, 1, 8, 8)


def small(merge, **names):
    """A UNet of two skips whose merges are what a function says."""

    class Net(SmallUNet):
        def merge1(self, z, u):
            return merge(z, u)

        merge2 = merge1

    return Net()


def skips_of(entry):
    return find_skips(entry.build(), *entry.args, **getattr(entry, "kwargs", {}))


# ── the model's own κ ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "kappa"),
    [
        (lambda u: u, 1),
        (lambda u: 0.5 * u, 0.5),
        (lambda u: u * 0.5, 0.5),
        (lambda u: u / 2**0.5, 2**-0.5),
        (lambda u: u * 0, 0),
        (lambda u: -u, -1),
        (lambda u: 3 * (-u).clone() / 2, -1.5),
        (lambda u: torch.mul(u, torch.tensor(0.25)), 0.25),
        (lambda u: u[:, :].contiguous(), 1),
        (lambda u: u.tanh(), None),
        (lambda u: u + 1, None),
        (lambda u: u * u.mean((2, 3), keepdim=True), None),
    ],
)
def test_kappa_on_the_way_to_the_merge(change, kappa):
    found = find_skips(small(lambda z, u: torch.cat([z, change(u)], dim=1)), X)
    expected = None if kappa is None else pytest.approx(kappa)
    assert [s.kappa for s in found] == [expected] * 2


@pytest.mark.parametrize(
    ("merge", "kappa"),
    [
        (lambda z, u: z + u, 1),
        (lambda z, u: u + z, 1),
        (lambda z, u: torch.add(z, u, alpha=0.5), 0.5),
        (lambda z, u: torch.add(u, z, alpha=0.5), None),  # it multiplies z
        (lambda z, u: z - u, -1),
        (lambda z, u: torch.sub(z, u, alpha=3), -3),
        (lambda z, u: torch.sub(z, 0.5 * u, alpha=3), -1.5),
        (lambda z, u: torch.rsub(u, z, alpha=2), -2),
        (lambda z, u: u - z, None),
    ],
)
def test_kappa_of_a_sum(merge, kappa):
    class Net(ADDITIVE):
        def merge1(self, z, u):
            return merge(z, u)

        merge2 = merge1

    found = find_skips(Net(), X)
    assert [(s.merge, s.kappa) for s in found] == [("add", kappa)] * 2


ADDITIVE = type(ZOO["additive"].build())


def test_kappa_of_the_zoo():
    assert [s.kappa for s in skips_of(ZOO["skip-last"])] == [1, 1]
    assert [s.kappa for s in skips_of(ZOO["normalised"])] == [None, None]
    assert all(s.kappa not in (None, 1) for s in skips_of(ZOO["scaled"]))


# ── which tap ────────────────────────────────────────────────────────────────────────────────────


class Joins(nn.Module):
    """A decoder block that is given both operands; `other` uses u once more."""

    def __init__(self, other=False, tuple_=False):
        super().__init__()
        self.conv, self.other, self.tuple_ = nn.Conv2d(2, 1, 3, padding=1), other, tuple_

    def forward(self, z, u):
        u = u[-1] if self.tuple_ else u
        merged = torch.cat([z, u], dim=1)
        return self.conv(merged) + (u.mean() if self.other else 0)


class Net(nn.Module):
    def __init__(self, block, tuple_=False):
        super().__init__()
        self.enc = nn.Conv2d(1, 1, 3, padding=1)
        self.down, self.up = nn.Conv2d(1, 1, 2, stride=2), nn.Upsample(scale_factor=2)
        self.dec, self.head, self.tuple_ = block, nn.Conv2d(1, 1, 1), tuple_

    def forward(self, x):
        u = self.enc(x)
        z = self.up(self.down(u))
        return self.head(self.dec(z, (u, u) if self.tuple_ else u))


def only(model, x=X):
    (skip,) = find_skips(model, x)
    return skip


def test_an_argument_where_it_is_used_for_the_merge_alone():
    skip = only(Net(Joins()))
    assert (skip.skip, skip.main) == (ArgumentTap("dec", "u"), ArgumentTap("dec", "z"))
    assert skip.merged == ArgumentTap("dec.conv", "input")
    assert skip.feature == OutputTap("enc")
    assert skip.decoded == OutputTap("dec")
    assert (skip.source, skip.sink) == ("enc", "dec.conv")


def test_a_slice_of_what_is_merged_where_the_argument_is_used_again():
    skip = only(Net(Joins(other=True)))
    assert skip.skip == SliceTap(ArgumentTap("dec.conv", "input"), dim=1, length=1, start=1)
    assert skip.main == ArgumentTap("dec", "z")


def test_an_argument_that_is_given_twice_is_not_told_apart():
    skip = only(Net(Joins(tuple_=True), tuple_=True))
    assert isinstance(skip.skip, SliceTap)


def test_the_function_call_where_neither_is_exact():
    class Reused(Joins):
        def forward(self, z, u):
            merged = torch.cat([z, u], dim=1)
            return self.conv(merged) + merged.mean() + u.mean()

    skip = only(Net(Reused()))
    line = Reused.forward.__code__.co_firstlineno + 1
    assert skip.skip == OperandTap("dec", "concat", line, 0, 1)
    assert skip.merged == ArgumentTap("dec.conv", "input")


def test_sums_inside_a_forward_are_function_calls():
    found = skips_of(ZOO["additive"])
    assert {type(s.skip) for s in found} == {type(s.main) for s in found} == {OperandTap}
    assert all(s.skip.operand != s.main.operand for s in found)


def test_a_module_that_is_called_several_times_has_numbered_taps():
    found = skips_of(ZOO["shared-both"])
    assert [s.feature for s in found] == [OutputTap("encoders.0", call) for call in (0, 1, 2)]
    wholes = [s.skip.whole for s in found]
    assert [(w.module, w.call) for w in wholes] == [("decoders.0", call) for call in (2, 1, 0)]
    assert all(s.feature.call is None for s in skips_of(ZOO["unshared-blocks"]))


def test_the_input_itself_has_no_source():
    class FromInput(Net):
        def forward(self, x):
            return self.head(self.dec(self.up(self.down(self.enc(x))), x))

    skip = only(FromInput(Joins()))
    assert (skip.source, skip.feature) == ("", None)
    assert skip.skip == ArgumentTap("dec", "u")


def test_every_block_puts_out_what_the_next_merge_reads():
    for name, entry in CASES.items():
        found = skips_of(entry)
        assert [s.decoded for s in found[1:]] == [s.main for s in found[:-1]], name


def test_the_shape_is_that_of_what_enters_the_merge():
    found = skips_of(ZOO["unpadded-3d"])
    assert [s.shape for s in found] == [(2, 4, 4, 4), (4, 4, 4, 4)]


def test_levels_are_counted_from_the_outermost_that_is_described():
    model = ZOO["skip-last"].build()
    (inner,) = choose_skips([("enc2", "dec2")], model, *ZOO["skip-last"].args)
    assert (inner.level, inner.source, inner.sink) == (1, "enc2", "dec2")


def test_taps_say_where_they_are_in_the_same_terms_for_every_model_of_a_class():
    entry = ZOO["additive"]
    assert skips_of(entry) == skips_of(entry)


def test_a_scripted_module_takes_no_part_in_descriptions_that_need_hooks():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(Joins())
            self.net.down = torch.jit.script(self.net.down)

        def forward(self, x):
            return self.net(x)

    skip = only(Around())
    assert (skip.source, skip.sink) == ("net.enc", "net.dec.conv")
