"""Advice names what the maker of a run can change, and blames nothing else."""

import pytest

from stability_probe.verify.advice import MOST, larger_batch
from stability_probe.verify.feature_band import feature_band_verdict
from stability_probe.verify.gradients import gradient_bound_verdict, gradient_slope_verdict
from stability_probe.verify.input_energy import input_energy_verdict
from stability_probe.verify.robustness import robustness_verdict
from tests.oracles.evidence import band, bare, gradients, relabelled, trace

SCHEDULED = (
    feature_band_verdict,
    gradient_slope_verdict,
    gradient_bound_verdict,
    robustness_verdict,
)
BATCH = "pass StabilityProbe(..., batch=ProbeBatch((x, t), target=noise)) with"


@pytest.mark.parametrize("verdict_of", SCHEDULED)
@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"probe_settings": {"sensitivity_every": 0}}, "set sensitivity_every above 0"),
        ({}, "set sensitivity_every above 0"),
        (
            {"probing": {"sensitivity_every": 0}},
            "set sensitivity_every above 0 (train --sensitivity-every)",
        ),
    ],
)
def test_where_nothing_was_scheduled(verdict_of, info, told):
    verdict = verdict_of(relabelled(trace(), **info))
    assert verdict.status == "INCONCLUSIVE"
    assert verdict.advice == f"no measurement on a probe batch was scheduled; {told}"


@pytest.mark.parametrize("verdict_of", SCHEDULED)
def test_where_it_was_scheduled_and_not_recorded(verdict_of):
    run = relabelled(trace(), probe_settings={"sensitivity_every": 100})
    assert verdict_of(run).advice.endswith("are scheduled, and none was recorded")


def test_where_there_is_no_target():
    advice = gradient_bound_verdict(band(8)).advice
    expected = f"the probe batch has no target; {BATCH} 38 samples or more"
    assert advice == f"no gradients of single samples were measured: {expected}"
    probed = relabelled(band(8), kind="checkpoint")
    assert gradient_slope_verdict(probed).advice.endswith("pass --target to `probe`")


def test_where_the_input_is_not_described():
    advice = input_energy_verdict([bare(trace())]).advice
    assert 'about={"input": stability_probe.runs.input_moments(images, schedule)}' in advice


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({}, f"{BATCH} 38 samples"),
        ({"probing": {}}, "pass --probe-samples 38 to `train`"),
        ({"kind": "checkpoint"}, "pass --batch 38 to `probe`"),
    ],
)
def test_where_there_are_too_few_samples(info, told):
    for verdict in (
        feature_band_verdict(relabelled(band(8), **info)),
        gradient_bound_verdict(relabelled(gradients(8), **info)),
    ):
        assert verdict.advice.endswith(f"needed: {told}")


def test_a_batch_that_nobody_can_take_is_not_advised():
    assert larger_batch(trace(), MOST).endswith(f"with {MOST} samples")
    for samples, many in ((MOST + 1, f"about {MOST + 1}"), (None, "very many")):
        expected = f"more samples are no way to tell: {many} would be needed"
        assert larger_batch(trace(), samples) == expected
