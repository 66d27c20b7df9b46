"""Training in low precision: autocast, and gradients that a scaler has multiplied."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from stability_probe import StabilityProbe, verify
from stability_probe.probes import ProbeBatch, per_sample_mse
from tests.oracles.loops import recorded, same_bits, trained
from tests.oracles.recording import DETAILED, assert_rows, expected_step, output_of

MEASURED = "energy kappa feature_grad_energy loss samples grad_energy param_energy"
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
FP16 = partial(torch.autocast, "cpu", torch.float16)


def under(context):
    """A forward pass under autocast."""

    def forward(net, x, t):
        with context():
            return output_of(net, x, t)

    return forward


def crosses(frame):
    """Every cross term as recorded, and as the three energies that it is made of say."""
    means = frame[frame.stat == "mean"].set_index(["metric", "site", "level"]).value.sort_index()
    merged, z, ku = (means.xs(("energy", site)) for site in ("merged", "z", "ku"))
    expected = merged - z - ku
    return means.xs(("cross", "merge"))[expected.index], expected


# ── autocast ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("context", [BF16, FP16], ids=["bf16", "fp16"])
def test_energies_are_those_of_the_tensors_that_autocast_makes(case, context):
    net, batches = case.net(), [case.data(5, seed=1), case.data(3, seed=2)]
    torch.manual_seed(0)  # dropout
    frame = recorded(net, case.skips(net), batches, forward=under(context))
    torch.manual_seed(0)
    net.zero_grad()
    expected = expected_step(net, batches, within=context)
    assert_rows(frame, expected, rtol=1e-5, metrics=MEASURED)
    largest = max(value for (metric, *_), value in expected.items() if metric == "energy")
    np.testing.assert_allclose(*crosses(frame), rtol=1e-4, atol=1e-5 * largest)
    torch.manual_seed(0)
    net.zero_grad()
    whole = expected_step(net, batches)
    assert any(abs(v / whole[row] - 1) > 1e-4 for row, v in expected.items() if row[0] == "energy")


@pytest.mark.parametrize("context", [BF16, FP16], ids=["bf16", "fp16"])
def test_training_under_autocast_is_the_same_to_the_last_bit(case, context):
    batches, traces = [case.data(4, seed) for seed in range(3)], []
    for probed in (False, True):
        torch.manual_seed(0)
        net = case.net()
        skips = case.skips(net)
        if not probed:
            traces.append(trained(net, batches, forward=under(context)))
            continue
        with StabilityProbe(net, skips, every=1, sensitivity_every=2) as probe:
            traces.append(trained(net, batches, forward=under(context), probe=probe))
    assert same_bits(*traces)


def test_what_step_measures_is_the_same_inside_autocast(cases):
    """Scheduled measurements are of the network as it is, in the precision of its parameters."""
    case, frames = cases["add"], []
    for inside in (False, True):
        net = case.net()
        x, t, target = case.data(4)
        with StabilityProbe(net, case.skips(net)) as probe:
            loss = per_sample_mse(under(BF16)(net, x, t), target)
            loss.mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                probe.step(loss=loss)
        frames.append(probe.frame())
    pd.testing.assert_frame_equal(*frames)


# ── gradient scaling ─────────────────────────────────────────────────────────────────────────────

BAD, STEPS = 3, 5
"""The step whose loss is infinite, and how many steps there are."""
WAYS = ("before", "unscaled", "after")
"""When `step` is called: before the scaler's step, after `unscale_`, or after the scaler's step."""


def spoilt(loss, net, where):
    """A loss with an infinite slope in every parameter, or in one alone."""
    if where == "everywhere":
        return (loss * torch.inf).mean()
    one = next(p for p in net.parameters() if p.ndim > 1)
    return loss.mean() + torch.inf * (one.abs() + 1).sum()


def scaled_training(case, way, *, as_tensor=False, where="everywhere"):
    """Train in float16 with a GradScaler.

    Returns:
        The records; for every step the rows of the oracle; and the steps that the scaler skipped.
    """
    net, expected, skipped = case.net().eval(), {}, []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=100)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with StabilityProbe(net, case.skips(net), every=1, **DETAILED) as probe:
        for step in range(1, STEPS + 1):
            batch = case.data(4, seed=step)
            twin, before = copy.deepcopy(net), [p.detach().clone() for p in net.parameters()]
            loss = per_sample_mse(under(FP16)(net, *batch[:2]), batch[2])
            whole = spoilt(loss, net, where) if step == BAD else loss.mean()
            scaler.scale(whole).backward()
            scale = scaler.get_scale()
            told = {"loss": loss, "grad_scale": torch.tensor(scale) if as_tensor else scale}
            if way == "before":
                probe.step(**told)
            if way == "unscaled":
                scaler.unscale_(optimizer)
                probe.step(**told, grads_unscaled=True)
            scaler.step(optimizer)
            if way == "after":
                probe.step(**told, grads_unscaled=True)
            scaler.update()
            optimizer.zero_grad()
            if same_bits(before, [p.detach() for p in net.parameters()]):
                skipped.append(step)
                assert scaler.get_scale() == scale / 2
            expected[step] = expected_step(twin, [batch], grad_scale=scale, within=FP16)
    return probe.frame(), expected, skipped


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("way", WAYS)
def test_scaled_gradients_are_recorded_unscaled(cases, way, as_tensor):
    frame, expected, _ = scaled_training(cases["uvit"], way, as_tensor=as_tensor)
    rows = "energy kappa feature_grad_energy loss samples grad_energy"
    rows += " param_energy" if way != "after" else ""  # which are those after the update
    for step, oracle in expected.items():
        found = frame[frame.step == step]
        usable = rows if step != BAD else "energy kappa loss samples"
        assert_rows(found, oracle, rtol=1e-5, metrics=usable)


@pytest.mark.parametrize("where", ["everywhere", "one parameter"])
@pytest.mark.parametrize("way", WAYS)
def test_the_marked_steps_are_those_that_the_scaler_skips(case, way, where):
    frame, expected, skipped = scaled_training(case, way, where=where)
    marks = frame[frame.metric == "skipped"]
    assert skipped == [BAD]
    assert marks.step.tolist() == list(range(1, STEPS + 1))
    assert marks[marks.value == 1].step.tolist() == skipped
    assert set(marks.value) == {0.0, 1.0}
    assert np.isfinite(frame[frame.step != BAD].value).all()
    gradients = frame[(frame.step == BAD) & frame.metric.str.endswith("grad_energy")]
    sound = np.isfinite(gradients.value)
    assert (~sound).sum() == (1 if where == "one parameter" else len(gradients))
    if where == "one parameter":
        for row in gradients[sound].itertuples():
            exact = expected[BAD][row.metric, row.site, row.level, row.stat]
            assert row.value == pytest.approx(exact, rel=1e-5, abs=1e-12)


def test_gradients_of_a_skipped_step_make_no_difference_to_a_verdict(cases):
    case = cases["uvit"]
    net = case.net()
    x, t, target = case.data(8)
    batch = ProbeBatch((x, t), target=target)
    with StabilityProbe(net, case.skips(net), every=1, sensitivity_every=2, batch=batch) as probe:
        for step in range(1, STEPS + 1):
            loss = per_sample_mse(net(x, t), target) * (torch.inf if step == BAD else 1)
            loss.mean().backward()
            probe.step(loss=loss, grad_scale=1.0)
            net.zero_grad()
    frame = probe.frame()
    spoilt = (frame.step == BAD) & ~np.isfinite(frame.value)
    assert spoilt.sum() > 10
    with_them, without = (verify(f.reset_index(drop=True)) for f in (frame, frame[~spoilt]))
    assert with_them == without
    assert {"HOLDS", "INCONCLUSIVE"} <= {verdict.status for verdict in with_them}


def test_the_scale_makes_no_difference(cases):
    """Powers of two change no digit but of what would have been too small for a float16."""
    case, found = cases["uvit"], []
    for scale in (1.0, 2.0**12):
        net = case.net().eval()
        x, t, target = case.data(4)
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            loss = per_sample_mse(under(FP16)(net, x, t), target)
            (scale * loss.mean()).backward()
            probe.step(loss=loss, grad_scale=scale)
        found.append(probe.frame())
    plain, scaled = found
    gradients = plain.metric.isin(["grad_energy", "feature_grad_energy"])
    assert plain[~gradients].equals(scaled[~gradients])
    np.testing.assert_allclose(scaled[gradients].value, plain[gradients].value, rtol=0.1)
    assert not scaled[gradients].equals(plain[gradients])
