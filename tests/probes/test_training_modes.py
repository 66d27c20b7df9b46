"""`no_grad`, `inference_mode` and DataParallel around a probed model or around `step`."""

from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch import nn

from stability_probe import StabilityProbe, StabilityProbeError
from stability_probe.probes import ProbeConfig, SensitivityConfig, per_sample_mse
from tests.oracles.recording import output_of

QUICK = SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2, paths=True)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


# ── without gradients ────────────────────────────────────────────────────────────────────────────


@modes
@pytest.mark.parametrize("inside", ["the pass", "all of it"])
def test_a_pass_without_gradients_is_no_training_pass(case, mode, inside):
    net = case.net()
    skips = case.skips(net)
    with (
        mode() if inside == "all of it" else nullcontext(),
        pytest.raises(StabilityProbeError, match="with gradients enabled, inside the block"),
        StabilityProbe(net, skips) as probe,
    ):
        with mode():
            output_of(net, *case.data(4)[:2])
        probe.step()


def recorded_within(case, mode, inside=range(3), **options):
    """Records of steps of which some are called inside a mode, after a usual backward pass."""
    net = case.net().eval()
    config = ProbeConfig(updates=True, flush_every=2, sensitivity=QUICK)
    with StabilityProbe(net, case.skips(net), every=1, config=config, **options) as probe:
        for seed in range(3):
            x, t, target = case.data(4, seed)
            loss = per_sample_mse(output_of(net, x, t), target)
            loss.mean().backward()
            with mode() if seed in inside else nullcontext():
                probe.step(loss=loss, grad_scale=torch.tensor(2.0))
        with mode():
            probe.flush()
    return probe.frame()


@modes
@pytest.mark.parametrize("sensitivity_every", [0, 3])
def test_a_step_inside_a_mode_records_the_same(case, mode, sensitivity_every):
    frames = [
        recorded_within(case, m, sensitivity_every=sensitivity_every) for m in (nullcontext, mode)
    ]
    pd.testing.assert_frame_equal(*frames)
    assert ("sigma_max" in set(frames[0].metric)) is bool(sensitivity_every)


@modes
@pytest.mark.parametrize("inside", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.slow
def test_some_steps_may_be_inside_a_mode(cases, mode, inside):
    case = cases["concat"]
    frames = [recorded_within(case, mode, i, sensitivity_every=2) for i in (inside, ())]
    pd.testing.assert_frame_equal(*frames)


@modes
def test_a_probe_that_is_entered_inside_a_mode_watches_training_outside(cases, mode):
    case, frames = cases["uvit"], []
    for around in (nullcontext, mode):
        net = case.net()
        probe = StabilityProbe(net, case.skips(net), sensitivity_every=0)
        with around():
            probe.__enter__()
        x, t, target = case.data(4)
        per_sample_mse(net(x, t), target).mean().backward()
        probe.step()
        with around():
            probe.__exit__(None, None, None)
        frames.append(probe.frame())
    pd.testing.assert_frame_equal(*frames)


# ── DataParallel ─────────────────────────────────────────────────────────────────────────────────


ADVICE = "its copies' records would be lost; use torch.nn.parallel.DistributedDataParallel, one pro"


def replica(module):
    """A copy as DataParallel makes it, of a module and all that is inside."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(copied, name, parameter if parameter is None else parameter * 1)
    return copied


def test_a_model_in_data_parallel_is_refused(case):
    net = case.net()
    skips = case.skips(net)
    with pytest.raises(StabilityProbeError, match=f"the model is in DataParallel: {ADVICE}"):
        StabilityProbe(nn.DataParallel(net), skips).__enter__()


@pytest.mark.parametrize("path", ["encoder.1", "middle", "decoder.0.block.layer1"])
def test_a_part_in_data_parallel_is_refused(cases, path):
    net = cases["add"].net()
    skips = cases["add"].skips(net)
    net.set_submodule(path, nn.DataParallel(net.get_submodule(path)))
    with pytest.raises(StabilityProbeError, match=f"the model is in DataParallel: {ADVICE}"):
        StabilityProbe(net, skips).__enter__()
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("active", [True, False])
def test_a_replica_of_a_probed_model_is_refused(case, active):
    """Also at a step that is not recorded: it is wrong from the beginning."""
    net = case.net()
    x, t, _ = case.data(4)
    with StabilityProbe(net, case.skips(net), every=10, sensitivity_every=0) as probe:
        if not active:
            output_of(net, x, t).mean().backward()
            probe.step()
        with pytest.raises(
            StabilityProbeError, match=r"as a replica of torch\.nn\.DataParallel.*, one"
        ):
            output_of(replica(net), x, t)


@pytest.mark.parametrize("name", ["add", "concat", "uvit"])
def test_a_replica_of_a_model_computes_what_the_model_computes(cases, name):
    """So that the test above imitates what it says."""
    case = cases[name]
    net = case.net().eval()
    x, t, _ = case.data(4)
    assert torch.equal(output_of(replica(net), x, t), output_of(net, x, t))


def test_a_part_that_is_put_into_data_parallel_later_is_refused(cases):
    case = cases["concat"]
    net = case.net()
    with (
        pytest.raises(StabilityProbeError, match=r"no such module; was the skip .* a wrapped one"),
        StabilityProbe(net, case.skips(net), sensitivity_every=0),
    ):
        net.decoder[1] = nn.DataParallel(net.decoder[1])
        net(*case.data(4)[:2])
