"""Training through `torch.compile`."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from stability_probe import StabilityProbe, find_skips, scale_skips
from stability_probe.probes import ProbeConfig, SensitivityConfig, per_sample_mse
from stability_probe.skips import parse_scaling
from tests.oracles.loops import recorded, same_bits, trained
from tests.oracles.recording import output_of
from tests.oracles.unchecked import nothing_compiled

STEPS = 3
QUICK = ProbeConfig(sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2))
WAYS = ("attached", "compiled", "given", "in place")
"""The probe is attached before the model is compiled; or after; or to what compiling returned; or
to a module that was compiled in place."""
ways = pytest.mark.parametrize("way", WAYS)
backends = pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"]
)
LONG = ("uvit", "unet2d")  # to compile
names = pytest.mark.parametrize(
    "name", ["add", *(pytest.param(name, marks=pytest.mark.slow) for name in ("concat", *LONG))]
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    with nothing_compiled(monkeypatch):
        yield


def batches_of(case):
    return [case.data(4, seed) for seed in range(STEPS)]


def compiled_training(case, backend, way, *, probed=True, **options):
    """The trace of a training through a compiled model, and its records."""
    torch.manual_seed(0)
    net = case.net()
    skips = case.skips(net)
    run = torch.compile(net, backend=backend) if way != "attached" else None
    if way == "in place":
        net.compile(backend=backend)
        run = net
    if way == "compiled":
        output_of(run, *case.data(4)[:2])  # compiled without hooks
    torch.manual_seed(0)
    options = {"every": 1, "sensitivity_every": 0, "config": QUICK} | options
    probe = StabilityProbe(run if way == "given" else net, skips, **options)
    with probe if probed else nullcontext():
        run = torch.compile(net, backend=backend) if run is None else run
        trace = trained(net, batches_of(case), forward=lambda _, x, t: output_of(run, x, t),
                        probe=probe if probed else None)  # fmt: skip
    return trace, probe.frame() if probed else None


def plain_training(case):
    torch.manual_seed(0)
    net = case.net()
    skips = case.skips(net)
    torch.manual_seed(0)
    with StabilityProbe(net, skips, every=1, sensitivity_every=0) as probe:
        trace = trained(net, batches_of(case), probe=probe)
    return trace, probe.frame()


def assert_same_records(found, expected, rtol=1e-5):
    rows = ["metric", "site", "level", "stat", "step"]
    found, expected = (f.set_index(rows).value.sort_index() for f in (found, expected))
    assert found.index.equals(expected.index)
    for metric in expected.index.unique("metric"):
        ours, theirs = (f.xs(metric, level="metric").to_numpy() for f in (found, expected))
        scale = expected["energy" if metric == "cross" else metric]  # a difference of energies
        largest = np.abs(scale).max()
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * largest)


@names
@ways
@backends
def test_records_are_those_of_the_uncompiled_model(cases, name, way, backend):
    case = cases[name]
    _, expected = plain_training(case)
    before = counters["stats"]["unique_graphs"]
    _, found = compiled_training(case, backend, way)
    assert counters["stats"]["unique_graphs"] > before  # it did compile
    assert found.step.unique().tolist() == list(range(1, STEPS + 1))
    assert_same_records(found, expected)


class Stage(nn.Module):
    """An encoder's stage: its feature goes on from inside of it, and comes out as a skip."""

    def __init__(self, bend):
        super().__init__()
        self.block, self.down, self.bend = nn.Linear(8, 8), nn.Linear(8, 8), bend

    def forward(self, v):
        u = self.block(v)
        u = u.tanh() if self.bend else u
        return self.down(u), u


class Merge(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 8)

    def forward(self, z, u):
        return self.out(torch.cat([z, u], 1))


class Staged(nn.Module):
    def __init__(self, bend):
        super().__init__()
        self.stage1, self.stage2 = Stage(bend), Stage(bend)
        self.middle, self.merge2, self.merge1 = nn.Linear(8, 8), Merge(), Merge()

    def forward(self, x, t=None):
        v, u1 = self.stage1(x)
        v, u2 = self.stage2(v)
        return self.merge1(self.merge2(self.middle(v).tanh(), u2), u1)


@backends
@pytest.mark.parametrize("bend", [False, True])
def test_gradients_of_features_that_a_graph_goes_on_with(bend, backend):
    """Where a part of a gradient stays inside a compiled graph, no gradient is recorded."""
    torch.manual_seed(0)
    net, frames = Staged(bend), []
    x, target = torch.randn(4, 8), torch.randn(4, 8)
    skips = find_skips(net, x)
    for run in (net, torch.compile(net, backend=backend)):
        batches = [(x, torch.zeros(4), target)]
        frames.append(recorded(net, skips, batches, forward=lambda _, x, t, run=run: run(x, t)))
    plain, compiled = frames
    if bend and backend == "aot_eager":
        plain = plain[~((plain.metric == "feature_grad_energy") & (plain.site == "u"))]
    assert_same_records(compiled, plain)


@names
@ways
def test_training_is_that_of_a_compiled_model_without_a_probe(cases, name, way):
    bare, _ = compiled_training(cases[name], "eager", way, probed=False)
    probed, _ = compiled_training(cases[name], "eager", way, every=2, sensitivity_every=2)
    assert same_bits(bare, probed)


@ways
def test_a_scaled_model(cases, way):
    case = cases["concat"]
    net = case.net()
    skips = case.skips(net)
    run = torch.compile(net, backend="eager") if way in ("compiled", "given") else None
    with scale_skips(net, skips, parse_scaling("cs:0.5")):
        probe = StabilityProbe(run if way == "given" else net, skips, sensitivity_every=0)
        with probe:
            if way == "in place":
                net.compile(backend="eager")
                run = net
            run = torch.compile(net, backend="eager") if run is None else run
            per_sample_mse(run(*case.data(4)[:2]), case.data(4)[2]).mean().backward()
            probe.step()
    gains = probe.frame().query("metric == 'kappa' and stat == 'mean'").set_index("level").value
    np.testing.assert_allclose(gains, [1, 0.5, 0.25], rtol=1e-6)


@ways
def test_one_graph_is_refused_with_the_reason_and_a_way_out(cases, way):
    case = cases["concat"]
    net = case.net()
    skips = case.skips(net)
    if way == "in place":
        net.compile(backend="eager", fullgraph=True)
    run = net if way == "in place" else torch.compile(net, backend="eager", fullgraph=True)
    if way == "compiled":
        run(*case.data(4)[:2])
    with (
        pytest.raises(torch._dynamo.exc.Unsupported) as refused,
        StabilityProbe(run if way == "given" else net, skips),
    ):
        run(*case.data(4)[:2])
    message = " ".join(str(refused.value).split())
    assert "the hooks of a StabilityProbe keep records, which cannot be traced" in message
    assert "compile the model without fullgraph=True" in message
    run(*case.data(4)[:2])  # without the probe it is one graph again


@ways
@pytest.mark.slow
def test_scheduled_measurements_run_eagerly_and_let_nothing_be_compiled_again(cases, way):
    case, ran, compiled = cases["add"], [], []

    def counting(graph, inputs):
        compiled.append(graph)

        def run(*args):
            ran.append(1)
            return graph(*args)

        return run

    net = case.net()
    skips = case.skips(net)
    if way == "in place":
        net.compile(backend=counting)
    run = net if way == "in place" else torch.compile(net, backend=counting)
    if way == "compiled":
        run(*case.data(4)[:2])
    history = []
    with StabilityProbe(
        run if way == "given" else net, skips, every=2, sensitivity_every=1, config=QUICK
    ) as probe:
        for seed in range(6):
            x, t, target = case.data(4, seed)
            loss = per_sample_mse(run(x, t), target)
            loss.mean().backward()
            before = len(ran), len(compiled)
            probe.step(loss=loss)
            assert (len(ran), len(compiled)) == before
            history.append((len(compiled), counters["stats"]["unique_graphs"]))
    assert history[0][0] > 0
    assert len(ran) > 6
    assert set(history) == {history[0]}  # all of it was compiled for the first step
    assert probe.frame().query("metric == 'sigma_max'").step.nunique() == 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_default_backend(cases):
    case = cases["add"]
    _, expected = plain_training(case)
    _, found = compiled_training(case, "inductor", "attached")
    assert_same_records(found, expected, rtol=1e-4)
