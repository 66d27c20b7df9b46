"""Gradients that are accumulated: one record an optimizer step, of all its samples."""

import copy

import pytest
import torch
from accelerate import Accelerator

from stability_probe import StabilityProbe
from stability_probe.probes import per_sample_mse
from tests.oracles.loops import recorded, step_that_goes_back_further
from tests.oracles.recording import DETAILED, assert_rows, expected_step, output_of

SIZES = (5, 2, 4)
"""Samples of the micro-batches of a step."""
ORDERS = ("each", "sum", "first", "last")
F64 = torch.float64


def batches_of(case, step=0):
    return [case.data(n, 10 * step + i, F64) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_sample_is_in_its_noise_bin_whatever_the_order_of_backward_passes(case, order):
    net, batches = case.net(F64).eval(), batches_of(case)
    frame = recorded(net, case.skips(net), batches, order=order)
    net.zero_grad()
    assert_rows(frame, expected_step(net, batches))


def test_a_record_is_of_the_micro_batches_of_its_own_step(case):
    """Every third step, and none of what passed in between."""
    net, expected = case.net(F64).eval(), {}
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with StabilityProbe(net, case.skips(net), every=3, **DETAILED) as probe:
        for step in range(1, 8):
            twin, losses = copy.deepcopy(net), []
            for x, t, target in batches_of(case, step):
                losses.append(per_sample_mse(output_of(net, x, t), target))
                (losses[-1].mean() / len(SIZES)).backward()
            probe.step(loss=torch.cat(losses))
            optimizer.step()
            optimizer.zero_grad()
            expected[step] = expected_step(twin, batches_of(case, step))
    frame = probe.frame()
    assert frame.step.unique().tolist() == [1, 3, 6]
    for step in (1, 3, 6):
        assert_rows(frame[frame.step == step], expected[step])


def test_the_gradient_of_an_earlier_steps_pass_is_not_taken_for_one_of_this_step(cases):
    """A graph that is kept is gone back through after its step has been recorded."""
    case = cases["add"]
    net, (early, late, _) = case.net(F64), batches_of(case)
    with StabilityProbe(net, case.skips(net), every=1, **DETAILED) as probe:
        step_that_goes_back_further(net, probe, early, late)
    net.zero_grad()
    assert_rows(probe.frame().query("step == 2"), expected_step(net, [late]))


def test_through_accelerate(case):
    """`accumulate` divides the losses, and the optimizer steps at every third micro-batch."""
    accelerator = Accelerator(gradient_accumulation_steps=len(SIZES), cpu=True)
    net, expected, losses, twin = case.net(F64).eval(), [], [], None
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    model, prepared = accelerator.prepare(net, optimizer)
    with StabilityProbe(model, case.skips(net), every=1, **DETAILED) as probe:
        for step in (1, 2):
            twin = copy.deepcopy(net)
            for x, t, target in batches_of(case, step):
                with accelerator.accumulate(model):
                    losses.append(per_sample_mse(output_of(model, x, t), target))
                    accelerator.backward(losses[-1].mean())
                    if accelerator.sync_gradients:
                        probe.step(loss=torch.cat(losses))
                        losses = []
                    prepared.step()
                    prepared.zero_grad()
            expected.append(expected_step(twin, batches_of(case, step)))
    frame = probe.frame()
    assert frame.step.unique().tolist() == [1, 2]
    for step, rows in enumerate(expected, start=1):
        assert_rows(frame[frame.step == step], rows)
