"""Several probes on one model, and schemes that come and go while a probe watches."""

import copy
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from stability_probe import StabilityProbe, TheoryUNet, find_skips, scale_skips
from stability_probe.probes import ProbeConfig, SensitivityConfig, per_sample_mse
from stability_probe.skips import ArgumentTap, FreeU, OutputTap, SliceTap, parse_scaling
from stability_probe.skips.taps import Observer
from tests.oracles.architectures import ZOO
from tests.oracles.loops import same_bits
from tests.oracles.recording import DETAILED, assert_rows, expected_step, output_of

QUICK = ProbeConfig(sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2))
F64 = torch.float64
STEPS = 3
PROBES = (
    {"every": 1, "sensitivity_every": 2},
    {"every": 2, "sensitivity_every": 0},
    {"every": 3, "sensitivity_every": 3, "config": replace(QUICK, updates=True)},
)


def train(net, batches, probes, trace=None):
    """Train with probes that have been entered."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    for x, t, target in batches:
        optimizer.zero_grad()
        loss = per_sample_mse(output_of(net, x, t), target)
        loss.mean().backward()
        for probe in probes:
            probe.step(loss=loss)
        optimizer.step()
        if trace is not None:
            trace += [p.detach().clone() for p in net.parameters()]


def batches_of(case):
    return [case.data(4, seed) for seed in range(STEPS)]


def made(net, skips, options):
    return StabilityProbe(net, skips, **{"config": QUICK, **options})


def alone(case, options, net=None):
    """The records of a probe that is the only one."""
    net = net or case.net().eval()
    with made(net, case.skips(net), options) as probe:
        train(net, batches_of(case), [probe])
    return probe.frame()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_each_probe_has_the_records_that_it_would_have_alone(cases, order):
    case = cases["uvit"]
    net = case.net().eval()
    skips = case.skips(net)
    with ExitStack() as stack:
        probes = {i: stack.enter_context(made(net, skips, PROBES[i])) for i in order}
        train(net, batches_of(case), probes.values())
    for i, options in enumerate(PROBES):
        pd.testing.assert_frame_equal(probes[i].frame(), alone(case, options))


def test_training_with_several_probes_is_the_same_to_the_last_bit(case):
    traces = [], []
    for trace in traces:
        torch.manual_seed(0)
        net = case.net()
        skips = case.skips(net)
        torch.manual_seed(0)
        with ExitStack() as stack:
            probes = [made(net, skips, options) for options in PROBES if trace is traces[1]]
            for probe in probes:
                stack.enter_context(probe)
            train(net, batches_of(case), probes, trace)
    assert same_bits(*traces)
    assert all(tensor.isfinite().all() for tensor in traces[0])


@pytest.mark.parametrize("name", ["concat", "unet2d"])
@pytest.mark.parametrize("left", range(3))
@pytest.mark.slow
def test_one_that_is_left_leaves_the_others_as_they_are(cases, name, left):
    case = cases[name]
    net = case.net().eval()
    skips, batches = case.skips(net), batches_of(case)
    probes = [made(net, skips, options) for options in PROBES]
    for probe in probes:
        probe.__enter__()
    train(net, batches[:2], probes)
    probes[left].__exit__(None, None, None)
    others = [probe for probe in probes if probe is not probes[left]]
    train(net, batches[2:], others)
    for probe in others:
        probe.__exit__(None, None, None)
    for probe, options in zip(probes, PROBES, strict=True):
        expected = alone(case, options)
        if probe is probes[left]:
            expected = expected[expected.step <= 2].reset_index(drop=True)
        pd.testing.assert_frame_equal(probe.frame(), expected, check_categorical=False)
    assert not any(module._forward_hooks for module in net.modules())


def test_one_that_comes_later_learns_nothing_from_the_measurements_of_the_first(cases):
    """The first pass that it sees is one of training."""
    case = cases["concat"]
    net = case.net()
    skips, batches = case.skips(net), batches_of(case)
    with made(net, skips, PROBES[0]) as first:
        train(net, batches[:1], [first])
        twin = copy.deepcopy(net)
        with made(net, skips, PROBES[1]) as second:
            first.step()  # measures
            train(net, batches[1:], [first, second])
    with made(twin, skips, PROBES[1]) as expected:
        train(twin, batches[1:], [expected])
    pd.testing.assert_frame_equal(second.frame(), expected.frame())
    assert {"grad_energy", "feature_grad_energy"} <= set(second.frame().metric)


def test_a_probe_inside_and_one_around(cases):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, t):
            return self.inner(x, t)

    case, frames = cases["uvit"], []
    for which in ((0,), (1,), (0, 1)):
        net = case.net().eval()
        outer = Around(net)
        models = [outer, net]
        found = [find_skips(model, *case.data(1)[:2]) for model in models]
        probes = [made(models[i], found[i], PROBES[0]) for i in which]
        with ExitStack() as stack:
            for probe in probes:
                stack.enter_context(probe)
            train(outer, batches_of(case), probes)
        frames.append([probe.frame() for probe in probes])
    (around,), (inside,), both = frames
    pd.testing.assert_frame_equal(both[0], around)
    pd.testing.assert_frame_equal(both[1], inside)


# ── schemes that come while a probe watches ──────────────────────────────────────────────────────


def records_of_a_scheme(case, scheme, *, late):
    net = case.net(F64).eval()
    skips, batch = case.skips(net), case.data(4, dtype=F64)
    with ExitStack() as stack:
        probe = StabilityProbe(net, skips, sensitivity_every=1, config=QUICK)
        for which in (probe, scale_skips)[:: 1 if late else -1]:
            if which is probe:
                stack.enter_context(probe)
            else:
                stack.enter_context(scale_skips(net, skips, scheme))
        train(net, [batch], [probe])
        twin = copy.deepcopy(net)
    return probe.frame(), twin, batch


def test_a_scheme_may_come_after_the_probe(case, scheme):
    late, *_ = records_of_a_scheme(case, parse_scaling(scheme), late=True)
    early, *_ = records_of_a_scheme(case, parse_scaling(scheme), late=False)
    pd.testing.assert_frame_equal(late, early)


@pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")
@pytest.mark.parametrize("name", ["additive", "skip-last", "shared-both", "scaled-additive"])
def test_a_scheme_may_come_after_the_probe_wherever_merges_are(name):
    """Inside a module's own forward, in a part of a tensor, at one of a module's calls."""
    entry, frames = ZOO[name], []
    for late in (True, False):
        net = entry.build().eval()
        skips = find_skips(net, *entry.args)
        with ExitStack() as stack:
            probe = StabilityProbe(net, skips, sensitivity_every=0)
            if late:
                stack.enter_context(probe)
            stack.enter_context(scale_skips(net, skips, parse_scaling("cs:0.5")))
            if not late:
                stack.enter_context(probe)
            net(*entry.args).square().mean().backward()
            probe.step()
        frames.append(probe.frame())
    pd.testing.assert_frame_equal(*frames)
    gains = frames[0].query("metric == 'kappa' and stat == 'mean'").set_index("level").value
    assert gains.to_dict() == pytest.approx({i: 0.5 ** (i - 1) for i in gains.index}, rel=1e-5)
    assert len(gains) == len(skips) > 1


class Sees(Observer):
    """Keeps what it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, tensor):
        self.seen.append(tensor.detach().clone())


@pytest.mark.parametrize(
    "tap",
    [
        OutputTap("decoder.0"),
        ArgumentTap("decoder.0", "u"),
        SliceTap(ArgumentTap("decoder.0.block", "v"), dim=1, length=4),
    ],
    ids=lambda tap: type(tap).__name__,
)
def test_an_observer_sees_what_later_functions_make_of_a_tensor(tap):
    net = TheoryUNet(4, 1, merge="concat")
    first, last = Sees(), Sees()
    where = tap.whole if isinstance(tap, SliceTap) else tap
    where.attach(net, first, first=True)
    where.attach(net, last)
    for factor in (2.0, 3.0):
        tap.attach(net, lambda tensor, factor=factor: factor * tensor)
    net(torch.ones(2, 4))
    (before,), (after,) = first.seen, last.seen
    part = slice(0, 4) if isinstance(tap, SliceTap) else slice(None)
    torch.testing.assert_close(after[:, part], 6 * before[:, part])


@pytest.mark.parametrize("version", [1, 2])
def test_a_scheme_that_changes_both_operands_may_come_after_the_probe(cases, version):
    case, frames = cases["unet2d"], []
    for late in (True, False):
        frames.append(records_of_a_scheme(case, FreeU(version=version), late=late)[0])
    pd.testing.assert_frame_equal(*frames)


def test_schemes_may_follow_one_another(case):
    """Each step has the gains of its own scheme, whichever probe came before it or after it."""
    net = case.net(F64).eval()
    skips, batch = case.skips(net), case.data(4, dtype=F64)
    schemes = ["unscaled", "cs:0.5", "uniform:0", "ls", "cs:0.7"]
    with ExitStack() as stack:
        probes = [stack.enter_context(made(net, skips, PROBES[1] | {"every": 1} | DETAILED))]
        expected = []
        for scheme in schemes:
            with scale_skips(net, skips, parse_scaling(scheme)):
                twin = copy.deepcopy(net)
                net.zero_grad()
                loss = per_sample_mse(output_of(net, *batch[:2]), batch[2])
                loss.mean().backward()
                probes[0].step(loss=loss)
                expected.append(expected_step(twin, [batch]))
    frame = probes[0].frame()
    features = "energy cross kappa feature_grad_energy loss samples"
    for step, rows in enumerate(expected, start=1):
        assert_rows(frame[frame.step == step], rows, metrics=features)
    gains = frame.query("metric == 'kappa' and stat == 'max'").groupby("step").value.min()
    assert gains.nunique() == len(schemes)


@pytest.mark.parametrize("first", [0, 1])
def test_a_probe_from_before_the_scheme_and_one_from_after_it(case, first):
    net = case.net(F64).eval()
    skips, batch = case.skips(net), case.data(4, dtype=F64)
    with ExitStack() as stack:
        probes = [stack.enter_context(made(net, skips, PROBES[0]))]
        stack.enter_context(scale_skips(net, skips, parse_scaling("cs:0.5")))
        probes.append(stack.enter_context(made(net, skips, PROBES[0])))
        train(net, [batch], probes[:: 1 if first == 0 else -1])
        pd.testing.assert_frame_equal(probes[0].frame(), probes[1].frame())
    expected, *_ = records_of_a_scheme(case, parse_scaling("cs:0.5"), late=False)
    pd.testing.assert_frame_equal(probes[0].frame(), expected)
