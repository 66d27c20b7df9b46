"""What a probe lets a device do: no copies of activations, and nothing that is waited for."""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stability_probe import StabilityProbe, scale_skips
from stability_probe.probes import ProbeConfig, features, gradients, per_sample_mse, probe
from stability_probe.skips import parse_scaling
from tests.oracles.loops import recorded
from tests.oracles.recording import DETAILED, assert_rows, expected_step, output_of

F64 = torch.float64
COPIES = {"clone", "copy", "copy_", "_to_copy", "_foreach_copy_", "repeat", "contiguous"}
READS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim",
    "_unique2", "allclose", "_pin_memory", "record_stream",
}  # fmt: skip
CONFIG = ProbeConfig(updates=True)


class Launched(TorchDispatchMode):
    """Counts operations, with how large their results are, and refuses those that read values."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        assert name not in READS, f"{name} waits for the device"
        result = func(*args, **kwargs)
        inputs, outputs = (
            [v for v in tree_leaves(tree) if isinstance(v, Tensor)]
            for tree in ((args, kwargs), result)
        )
        where = {v.device for v in (*inputs, *outputs) if v.ndim or v.device.type != "cpu"}
        assert len(where) < 2, f"{name} goes from one device to another"
        self.count[name, max((v.numel() for v in outputs), default=0)] += 1
        return result


def step_of(net, batch, probe=None, context=nullcontext):
    """A step of training."""
    x, t, target = batch
    with context():
        out = output_of(net, x, t)
    loss = per_sample_mse(out, target)
    (8 * loss.mean()).backward()
    if probe is not None:
        scale = torch.full((), 8.0, device=x.device)
        probe.step(loss=loss, grad_scale=scale)
    net.zero_grad()


def launched(net, batch, probe=None, context=nullcontext):
    with Launched() as mode:
        step_of(net, batch, probe, context)
    return mode.count


def channels_last(net, batch):
    x, t, target = (v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
                    for v in batch)  # fmt: skip
    return net.to(memory_format=torch.channels_last), (x, t, target)


# ── copies ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "bf16"])
def test_hooks_and_step_launch_no_copy_of_an_activation(case, layout):
    """By comparison with the same step without a probe."""
    net, batch = case.net(), case.data(32)
    context = partial(torch.autocast, "cpu", torch.bfloat16) if layout == "bf16" else nullcontext
    if layout == "channels last":
        net, batch = channels_last(net, batch)
    skips = case.skips(net)
    bare = launched(net, batch, context=context)
    with StabilityProbe(net, skips, every=1, **DETAILED) as probe:
        step_of(net, batch, probe, context)  # the first step finds out about the model
        probed = launched(net, batch, probe, context)
        rows = {("copy_", ring.room.shape[1]) for ring in probe._buffer._rings.values()}
    more = probed - bare
    assert not bare - probed
    assert more["linalg_vector_norm", len(batch[0])] > 4 * len(skips)
    copies = {key for key in more if key[0] in COPIES and key[1] >= batch[0].numel()}
    assert copies <= rows  # numbers that hooks have found, of all samples and features


def test_channels_last_has_the_same_records(cases):
    case = cases["unet2d"]
    net, twin = case.net(F64).eval(), case.net(F64).eval()
    batch = case.data(4, dtype=F64)
    net, moved = channels_last(net, batch)
    seen = []
    net.mid_block.register_forward_hook(lambda m, a, out: seen.append(out))
    frame = recorded(net, case.skips(net), [moved])
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert not seen[-1].is_contiguous()
    assert_rows(frame, expected_step(twin, [batch]))


# ── waiting for the device ───────────────────────────────────────────────────────────────────────


def on_meta(case):
    """A network whose tensors have no values, with its skips and a batch."""
    net = case.net()
    skips = case.skips(net)
    scale_skips(net, skips, parse_scaling("cs:0.5"))
    return net.to("meta"), skips, [v.to("meta") for v in case.data(4)]


def steps_on_meta(case, steps=3):
    """How many steps are made before something reads a value."""
    net, skips, batch = on_meta(case)
    made = 0
    with (
        pytest.raises((NotImplementedError, RuntimeError, TypeError), match="meta"),
        StabilityProbe(net, skips, every=1, sensitivity_every=0, config=CONFIG) as probe,
    ):
        for _ in range(steps):
            step_of(net, batch, probe)
            made += 1
    return made


def test_a_step_without_values(case):
    """On the meta device to read a value is an error: only the flush at the end makes it."""
    assert steps_on_meta(case) == 3


def test_no_step_reads_a_value_or_goes_to_another_device(case):
    net, batch = case.net(), case.data(4)
    with StabilityProbe(net, case.skips(net), every=2, sensitivity_every=0, config=CONFIG) as probe:
        for _ in range(4):
            assert launched(net, batch, probe)
    assert set(probe.frame().step) == {1, 2, 4}


WAYS = {
    "hook": (features, "_norm"),
    "waiting": (probe, "waiting"),
    "read": (gradients.ParameterProbe, "read"),
}


def reads_too(fn, read):
    """A function that reads a value of what it gives."""

    def reading(*args, **kwargs):
        result = fn(*args, **kwargs)
        read(result if isinstance(result, Tensor) else result[1])
        return result

    return reading


@pytest.mark.parametrize("read", [lambda v: v[0].item(), lambda v: bool((v > 0).all())])
@pytest.mark.parametrize("way", WAYS)
def test_a_read_would_be_noticed(cases, monkeypatch, way, read):
    owner, name = WAYS[way]
    monkeypatch.setattr(owner, name, reads_too(getattr(owner, name), read))
    assert steps_on_meta(cases["add"]) == 0
    net = cases["add"].net()
    skips = cases["add"].skips(net)
    with (
        pytest.raises(AssertionError, match="waits for the device"),
        StabilityProbe(net, skips, sensitivity_every=0) as probe,
    ):
        launched(net, cases["add"].data(4), probe)


def test_a_copy_would_be_noticed(cases, monkeypatch):
    case = cases["unet2d"]
    norm = features._norm
    monkeypatch.setattr(features, "_norm", lambda tensor: norm(tensor.clone()))
    with pytest.raises(AssertionError):
        test_hooks_and_step_launch_no_copy_of_an_activation(case, "channels last")
