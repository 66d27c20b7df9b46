"""Gradient checkpointing: parts of a forward pass, or all of it, run again in the backward pass."""

import copy
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stability_probe import StabilityProbe, StabilityProbeError, TheoryUNet, scale_skips
from stability_probe.probes import per_sample_mse
from stability_probe.probes.sensitivity import SensitivityProbe
from stability_probe.skips import parse_scaling
from tests.oracles.loops import checkpointing, recorded, same_bits, step_that_goes_back_further
from tests.oracles.recording import DETAILED, assert_rows, expected_step, output_of

F64 = torch.float64
BLOCKS = {
    "add": ("encoder.1", "encoder.2", "middle", "decoder.2", "decoder.1", "decoder.0"),
    "concat": ("encoder.1", "encoder.2", "middle", "decoder.2", "decoder.1", "decoder.0"),
    "uvit": ("in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"),
    "unet2d": (
        "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0", "down_blocks.1.resnets.0",
        "mid_block", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0",
        "up_blocks.1.resnets.0", "up_blocks.1.resnets.1",
    ),
}  # fmt: skip
"""Modules of each network that are checkpointed: all but the first, whose input has no gradient."""
KINDS = {
    "non-reentrant": (False,),
    "reentrant": (True,),
    "reentrant inside": (True, False),
    "reentrant around": (False, True),
}
ORDERS = ("each", "sum", "first", "last")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net.train()


def whole(reentrant):
    """A forward pass that is checkpointed as a whole."""

    def forward(net, x, t):
        x = x.clone().requires_grad_()
        return checkpoint(partial(output_of, net), x, t, use_reentrant=reentrant)

    return forward


def batches_of(case, dtype=F64):
    return [case.data(n, seed, dtype) for n, seed in ((4, 1), (3, 2))]


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_are_recorded_once_and_their_gradients_are_right(case, kind, order):
    net = without_dropout(case.net(F64))
    skips, twin, passes = case.skips(net), copy.deepcopy(net), []
    first = net.get_submodule(BLOCKS[case.name][0])
    first.register_forward_pre_hook(lambda *args: passes.append(1))
    for reentrant in KINDS[kind]:
        for path in BLOCKS[case.name]:
            checkpointing(net.get_submodule(path), reentrant)
    frame = recorded(net, skips, batches_of(case), order=order)
    assert_rows(frame, expected_step(twin, batches_of(case)))
    assert len(passes) > 1 + 2 * len(KINDS[kind])  # two of training, and repetitions of both


class Spanning(TheoryUNet):
    """Eq. 4 with one checkpoint around all between the outermost encoder and decoder block."""

    reentrant = False

    def forward(self, x, t=None):
        def inside(u):
            z, skips = u, []
            for a in self.encoder[1:]:
                z = a(z)
                skips.append(z)
            z = self.middle(z)
            for b in reversed(self.decoder[1:]):
                z = b(z, skips.pop())
            return z

        u = self.encoder[0](x)
        return self.decoder[0](checkpoint(inside, u, use_reentrant=self.reentrant), u)


@REENTRANT
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", ["unscaled", "ls-non-shared"])
def test_a_checkpoint_around_skips_and_merges(cases, reentrant, order, scheme):
    case = cases["concat"]
    net, plain = Spanning(16, 3, merge="concat").double(), case.net(F64)
    net.reentrant = reentrant
    skips = case.skips(plain)
    plain_scheme, scheme = parse_scaling(scheme), parse_scaling(scheme)
    with scale_skips(net, skips, scheme), scale_skips(plain, skips, plain_scheme):
        plain_scheme.load_state_dict(scheme.state_dict())
        frame = recorded(net, skips, batches_of(case), order=order)
        assert_rows(frame, expected_step(plain, batches_of(case)))


@REENTRANT
@pytest.mark.parametrize("order", ORDERS)
def test_through_diffusers(cases, reentrant, order):
    case = cases["unet2d"]
    net = without_dropout(case.net(F64))
    skips, twin = case.skips(net), copy.deepcopy(net)
    net.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    frame = recorded(net, skips, batches_of(case), order=order)
    assert_rows(frame, expected_step(twin, batches_of(case)))


@REENTRANT
def test_training_with_checkpointed_blocks_is_the_same_to_the_last_bit(case, reentrant):
    gradients = []
    for probed in (False, True):
        torch.manual_seed(0)
        net = case.net()
        skips = case.skips(net)
        for path in BLOCKS[case.name]:
            checkpointing(net.get_submodule(path), reentrant)
        if probed:
            recorded(net, skips, batches_of(case, torch.float32))
        else:
            for x, t, target in batches_of(case, torch.float32):
                (per_sample_mse(output_of(net, x, t), target).mean() / 2).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert same_bits(*gradients)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loss_that_is_not_of_the_output(cases, passes):
    """With two passes it cannot be told whose repetition it is: no gradient, and no wrong one."""
    case, frames = cases["add"], []
    for net in (case.net(F64), Spanning(16, 3).double()):
        net.reentrant, inner = True, []
        net.decoder[0].register_forward_pre_hook(lambda m, args, inner=inner: inner.append(args[0]))
        with StabilityProbe(net, case.skips(case.net(F64)), sensitivity_every=0) as probe:
            for x, t, _ in batches_of(case)[:passes]:
                net(x, t)
            losses = [z.square().mean() for z in inner[-passes:]]  # the probe has made a pass too
            torch.stack(losses).sum().backward()
            probe.step()
        frame = probe.frame().query("metric == 'feature_grad_energy'")
        frames.append(frame.set_index(["site", "level", "stat"]).value.sort_index())
    plain, spanning = frames
    if passes == 2:
        plain = plain[plain.index.get_level_values("level") == 1]  # the others are inside
    pd.testing.assert_series_equal(spanning, plain)


def test_a_repetition_of_an_earlier_steps_pass_is_not_taken_for_one_of_this_step(cases):
    case = cases["add"]
    net, (early, late) = case.net(F64), batches_of(case)
    skips, twin = case.skips(net), copy.deepcopy(net)
    for path in BLOCKS["add"]:
        checkpointing(net.get_submodule(path), True)
    with StabilityProbe(net, skips, every=1, **DETAILED) as probe:
        step_that_goes_back_further(net, probe, early, late)
    assert_rows(probe.frame().query("step == 2"), expected_step(twin, [late]))


# ── the whole model ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("blocks", [None, False, True], ids=["", "blocks", "reentrant blocks"])
def test_a_repeated_pass_of_the_whole_model_is_no_second_one(case, order, blocks):
    net = without_dropout(case.net(F64))
    skips, twin = case.skips(net), copy.deepcopy(net)
    for path in BLOCKS[case.name] if blocks is not None else ():
        checkpointing(net.get_submodule(path), blocks)
    frame = recorded(net, skips, batches_of(case), order=order, forward=whole(False))
    assert_rows(frame, expected_step(twin, batches_of(case)))


class TestWholeModelReentrant:
    """Its training pass has no gradients, and what repeats it comes too late."""

    MATCH = (
        "the whole model is inside .* use_reentrant=True.* use_reentrant=False, or checkpoint its"
    )

    def test_it_is_refused(self, case):
        net = without_dropout(case.net(F64))
        with pytest.raises(StabilityProbeError, match=self.MATCH):
            recorded(net, case.skips(net), batches_of(case), forward=whole(True))

    def test_it_is_refused_beside_a_plain_pass(self, case):
        net = without_dropout(case.net(F64))
        ways = iter([output_of, whole(True)])
        forward = lambda *args: next(ways)(*args)  # noqa: E731
        with pytest.raises(StabilityProbeError, match=self.MATCH):
            recorded(net, case.skips(net), batches_of(case), forward=forward)


def test_selective_checkpointing_of_the_whole_model_is_the_same_to_the_last_bit(cases):
    """What is saved of a pass is found again by its place among the calls."""
    case, gradients = cases["unet2d"], []  # with dropout

    def policy(ctx, op, *args, **kwargs):
        saved = op == torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def forward(net, x, t):
        return checkpoint(partial(output_of, net), x, t, use_reentrant=False, context_fn=contexts)

    batch = case.data(4)
    for probed in (False, True):
        torch.manual_seed(0)
        net = case.net().train()
        skips = case.skips(net)
        if probed:
            recorded(net, skips, [batch], forward=forward)
        else:
            per_sample_mse(forward(net, *batch[:2]), batch[2]).mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert same_bits(*gradients)


# ── scheduled measurements ───────────────────────────────────────────────────────────────────────


def test_scheduled_measurements_of_a_checkpointed_network_are_those_of_a_plain_one(case):
    net = without_dropout(case.net())
    skips, twin = case.skips(net), copy.deepcopy(net)
    for path in BLOCKS[case.name]:
        checkpointing(net.get_submodule(path), False)
    batch = case.data(3)
    frames = [recorded(n, skips, [batch], sensitivity_every=1) for n in (twin, net)]
    assert frames[0].equals(frames[1])
    assert "sigma_max" in set(frames[0].metric)


def test_scheduled_measurements_refuse_reentrant_checkpointing(case):
    net = without_dropout(case.net())
    skips = case.skips(net)
    for path in BLOCKS[case.name]:
        checkpointing(net.get_submodule(path), True)
    with pytest.raises(StabilityProbeError, match="pass use_reentrant=False, or leave them away"):
        recorded(net, skips, [case.data(3)], sensitivity_every=1)


def test_other_errors_of_the_scheduled_measurements_are_left_as_they_are(cases, monkeypatch):
    def fails(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SensitivityProbe, "measure", fails)
    net = cases["add"].net()
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        recorded(net, cases["add"].skips(net), [cases["add"].data(3)], sensitivity_every=1)
