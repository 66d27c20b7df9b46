import math

import pytest

from stability_probe.verify import Evidence
from stability_probe.verify.input_energy import input_energy_verdict
from tests.oracles.evidence import INPUT, altered, bare, noised_inputs, relabelled


def test_the_lemma_holds():
    verdict = input_energy_verdict([noised_inputs()])
    assert (verdict.status, verdict.theorem, verdict.run) == ("HOLDS", "3.2", "cs:0.7")
    assert verdict.bound == pytest.approx((1 - 2 / 3 * 0.75) * 64)
    assert verdict.measured == pytest.approx(32, rel=0.01)
    assert verdict.estimate == pytest.approx(verdict.measured / 32)
    assert verdict.slack == pytest.approx(32 / verdict.measured)
    half = 1.96 * 0.05 / 200**0.5
    assert verdict.interval == pytest.approx(
        (verdict.estimate - half, verdict.estimate + half), abs=0.3 * half
    )
    assert (verdict.n, verdict.confidence) == (200, 0.95)
    assert input_energy_verdict([noised_inputs()], alpha=0.01).confidence == 0.99


@pytest.mark.parametrize(
    ("wrong", "ratio"),
    [
        ({"mean": 33.0}, 33 / 32),  # the inputs are not what they should be
        ({"mean": 31.0}, 31 / 32),
        ({"input": {**INPUT, "second_moment": 1.0}}, 0.5),  # the data are not
        ({"input": {**INPUT, "mean_alpha_squared": 0.5}}, 32 / (64 * 2 / 3)),  # the schedule is not
        ({"input": {**INPUT, "m": 128}}, 0.5),
    ],
)
def test_a_premise_that_is_wrong(wrong, ratio):
    verdict = input_energy_verdict([noised_inputs(**wrong)])
    assert verdict.status == "VIOLATED"
    assert verdict.estimate == pytest.approx(ratio, rel=0.01)
    assert "not what run.json says" in verdict.advice


def test_runs_of_one_seed_see_the_same_inputs_and_count_once():
    once, same, other = (noised_inputs(seed=seed) for seed in (0, 0, 1))
    assert input_energy_verdict([once, same]).n == 200
    verdict = input_energy_verdict([once, same, other])
    assert (verdict.n, verdict.run) == (400, "3 runs")


def test_runs_that_say_nothing_of_their_input_are_left_out():
    verdict = input_energy_verdict([bare(noised_inputs(50.0)), noised_inputs()])
    assert (verdict.status, verdict.n) == ("HOLDS", 200)


def test_records_without_a_run():
    verdict = input_energy_verdict([bare(noised_inputs())])
    assert (verdict.status, verdict.n, verdict.run) == ("INCONCLUSIVE", 0, "records")
    assert "pass a Run whose run.json has `input`" in verdict.advice


def test_one_step_says_nothing():
    verdict = input_energy_verdict([noised_inputs(steps=1)])
    assert (verdict.status, verdict.n, verdict.interval) == ("INCONCLUSIVE", 1, None)


def test_an_interval_too_wide_to_say_anything():
    evidence = noised_inputs(steps=30)
    swinging = evidence.frame.assign(
        value=evidence.frame.value * (1 + 0.9 * (-1) ** evidence.frame.step)
    )
    verdict = input_energy_verdict([Evidence("e", swinging, evidence.info)])
    assert verdict.status == "INCONCLUSIVE"
    width = verdict.interval[1] - verdict.interval[0]
    assert width > 0.1
    assert f"record about {math.ceil(30 * (width / 0.1) ** 2)} steps" in verdict.advice


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_broke_down_is_not_left_out(value):
    verdict = input_energy_verdict([altered(noised_inputs(), "energy", "x", value, step=3)])
    assert verdict.status == "ASSUMPTION_UNMET"


def test_nothing_recorded_yet():
    evidence = noised_inputs()
    verdict = input_energy_verdict([Evidence("e", evidence.frame.iloc[:0], evidence.info)])
    assert (verdict.status, verdict.n) == ("INCONCLUSIVE", 0)


def test_a_null_in_run_json_is_no_description():
    assert input_energy_verdict([relabelled(noised_inputs(), input=None)]).status == "INCONCLUSIVE"


def test_a_few_steps_raise_no_more_alarms_than_many():
    alarms = sum(
        input_energy_verdict([noised_inputs(steps=2, seed=s)]).status == "VIOLATED"
        for s in range(60)
    )
    assert (alarms - 0.05 * 60) / (60 * 0.05 * 0.95) ** 0.5 < 4


def test_of_runs_with_one_seed_the_longest_counts():
    long, short = noised_inputs(steps=100), noised_inputs(steps=30)
    assert input_energy_verdict([long, short]).n == input_energy_verdict([short, long]).n == 100
