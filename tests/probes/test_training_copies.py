"""Copies of a probed model: deep, averaged, pickled."""

import copy
import io
import pickle

import pandas as pd
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stability_probe import StabilityProbe, find_skips, scale_skips
from stability_probe.probes import ProbeConfig, SensitivityConfig, per_sample_mse
from stability_probe.skips import parse_scaling
from tests.oracles.architectures import ZOO
from tests.oracles.loops import recorded
from tests.oracles.recording import output_of

QUICK = ProbeConfig(sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(net):
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)).module


WAYS = {
    "deepcopy": copy.deepcopy,
    "averaged": averaged,
    "pickled": lambda net: pickle.loads(pickle.dumps(net)),
    "saved": saved,
    "twice": lambda net: copy.deepcopy(pickle.loads(pickle.dumps(net))),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def watchers(net):
    """What looks at the features of a network."""
    hooks = [
        hook
        for module in net.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return [hook.fn.probe for hook in hooks if hasattr(getattr(hook, "fn", None), "probe")]


def step(net, batch, probe, loss_of=per_sample_mse):
    x, t, target = batch
    loss = loss_of(output_of(net, x, t), target)
    loss.mean().backward()
    probe.step(loss=loss)


@ways
@pytest.mark.parametrize(
    ("scheme", "when"),
    [
        ("unscaled", "before a pass"),
        ("ls-non-shared", "between passes"),
        ("ls-non-shared", "between the two"),
    ],
)
@pytest.mark.slow
def test_a_copy_computes_the_same_records_nothing_and_is_probed_anew(case, way, scheme, when):
    net = case.net().eval()
    skips, batch = case.skips(net), case.data(4)
    with scale_skips(net, skips, parse_scaling(scheme)):
        plain = recorded(net, skips, [batch], steps=2)
        net.zero_grad()
        with StabilityProbe(net, skips, every=1, sensitivity_every=0) as probe:
            if when != "before a pass":
                step(net, batch, probe)
            net.zero_grad()
            loss = None
            if when == "between the two":  # a forward pass and its backward pass
                loss = per_sample_mse(output_of(net, *batch[:2]), batch[2])
            twin = way(net)
            assert torch.equal(
                output_of(twin, *batch[:2]), output_of(copy.deepcopy(net), *batch[:2])
            )
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                assert p is not q and torch.equal(p, q)
            (100 * output_of(twin, *batch[:2])).square().sum().backward()
            assert watchers(twin)
            assert not any(watcher.norms or watcher.gradients for watcher in watchers(twin))
            if loss is not None:
                loss.mean().backward()
                probe.step(loss=loss)
            else:
                step(net, batch, probe)
            if when == "before a pass":
                net.zero_grad()
                step(net, batch, probe)
        pd.testing.assert_frame_equal(probe.frame(), plain)
        twin.zero_grad()
        again = recorded(twin, skips, [batch], steps=2)
    pd.testing.assert_frame_equal(again, plain)


@ways
def test_a_copy_can_be_measured_too(cases, way):
    case = cases["uvit"]
    net = case.net()
    skips, batch = case.skips(net), case.data(4)
    with StabilityProbe(net, skips, config=QUICK) as probe:
        step(net, batch, probe)
        twin = way(net)
    again = recorded(twin, skips, [batch], sensitivity_every=1, config=QUICK)
    pd.testing.assert_frame_equal(again, probe.frame())


@ways
def test_a_copy_of_a_model_that_was_probed_twice(cases, way):
    case = cases["concat"]
    net = case.net()
    skips, batch = case.skips(net), case.data(4)
    with (
        StabilityProbe(net, skips, sensitivity_every=0) as first,
        StabilityProbe(net, skips, sensitivity_every=0) as second,
    ):
        twin = way(net)
        output_of(twin, *batch[:2]).sum().backward()
        assert not first._features.seen and not second._features.seen
    pd.testing.assert_frame_equal(
        recorded(twin, skips, [batch]), recorded(net, skips, [batch])
    )  # fmt: skip


@ways
@pytest.mark.parametrize("name", ["additive", "shared-both"])
@pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")
def test_taps_inside_forwards_and_of_single_calls(name, way):
    entry = ZOO[name]
    net = entry.build()
    skips = find_skips(net, *entry.args)
    batch = (*entry.args[:1], torch.zeros(len(entry.args[0])), torch.zeros(()))

    def forward(net, x, t):
        return net(x)

    def frame(net):
        net.zero_grad()
        with StabilityProbe(net, skips, sensitivity_every=0) as probe:
            forward(net, *batch[:2]).square().sum().backward()
            probe.step()
            twin = way(net)
            forward(twin, *batch[:2]).square().sum().backward()
        return probe.frame(), twin

    plain, twin = frame(net)
    again, _ = frame(twin)
    pd.testing.assert_frame_equal(again, plain)
    assert "kappa" in set(plain.metric)
