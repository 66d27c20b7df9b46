"""The numbers of a run, each against its definition."""

import math

import numpy as np
import pandas as pd
import pytest

from stability_probe.regression import measures_of
from stability_probe.verify import Evidence
from tests.oracles.evidence import (
    bare,
    chain,
    checkpoint,
    complete,
    sampled,
    traced,
    training,
    with_paths,
    without,
)


def test_means_and_ranges_leave_the_transient_out():
    """Of 12 steps the first two are the first sixth."""
    h = np.stack([[100.0, 100, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.arange(12) * 2.0], axis=1)
    found = measures_of(training(traced("energy", "h", h))).tested
    assert found == {
        "energy.h_0": pytest.approx(5.5), "oscillation.h_0": 9.0,
        "energy.h_1": pytest.approx(13.0), "oscillation.h_1": 18.0,
    }  # fmt: skip


def test_gradients_are_summed_over_a_block_and_averaged_over_steps():
    rows = [
        (step, "grad_energy", f"{block}/{name}", level, "value", value * step)
        for step in (1, 2, 3)
        for block, name, level, value in (
            ("a", "w", 1, 1.0), ("a", "v", 1, 2.0), ("a", "w", 2, 10.0),
            ("mid", "w", 0, 5.0), ("other", "w", 0, 7.0),
        )
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["step", "metric", "site", "level", "stat", "value"])
    assert measures_of(Evidence("run", frame)).tested == {  # all three steps are after step 0.5
        "gradient.a_1": pytest.approx(6.0), "gradient.a_2": pytest.approx(20.0),
        "gradient.mid": pytest.approx(10.0), "gradient.other": pytest.approx(14.0),
    }  # fmt: skip


def test_sensitivity_is_that_of_the_last_measurement():
    exact = np.array([[1.0] * 8, [2.0] * 8, [3.0, 5.0] * 4])
    run = with_paths(chain(exact=exact), paths=(3.0, 1.5), middle=1.0)
    found = measures_of(run).tested
    assert found == {
        "gain.skip_1": 1.0, "gain.skip_2": 0.5,
        "sensitivity.exact": 4.0, "sensitivity.pathwise": 5.5,
        "path.skip_1": 3.0, "path.skip_2": 1.5, "path.mid": 1.0,
    }  # fmt: skip


def test_a_checkpoint_counts_all_its_noise_levels():
    exact = np.array([[1.0] * 8, [2.0] * 8, [6.0] * 8])
    norms = without(chain(exact=exact), "kappa", "sample_energy", "sample_kappa")
    steps = dict(zip(np.unique(norms.frame.step), (1, 2, 3), strict=True))
    frame = norms.frame.assign(step=norms.frame.step.map(steps))
    whole = without(checkpoint(), *norms.frame.metric.unique())
    run = Evidence("c", pd.concat([whole.frame, frame]), whole.info)
    found = measures_of(run)
    assert found.tested["sensitivity.exact"] == 3.0
    assert {k: v for k, v in found.hints.items() if "t=" in k} == {
        "sensitivity.exact.t=50": 1.0, "sensitivity.exact.t=500": 2.0,
        "sensitivity.exact.t=950": 6.0,
    }  # fmt: skip
    assert not any(name.startswith("oscillation") for name in found.tested)


def test_gradients_of_a_checkpoint_are_those_of_samples():
    table = np.arange(12.0).reshape(1, 3, 4)
    run = Evidence("c", sampled("sample_grad_energy", "b", table, first_level=1, steps=[1]),
                   {"kind": "checkpoint"})  # fmt: skip
    assert measures_of(run).tested == {
        "gradient.b_1": 1.5,
        "gradient.b_2": 5.5,
        "gradient.b_3": 9.5,
    }


def test_gains_are_tested_and_what_each_noise_bin_has_is_a_hint():
    bins = traced("loss", "loss", [[1.0]] * 6)
    bins = bins[bins.stat == "mean"]
    frames = [bins.assign(stat=f"t{b}", value=float(b)) for b in (0, 2, 10)]
    run = training(*frames, traced("kappa", "skip", [[0.7, 0.5]] * 6, first_level=1))
    found = measures_of(run)
    hints = found.hints
    assert found.tested["gain.skip_1"] == pytest.approx(0.7)
    assert found.tested["gain.skip_2"] == pytest.approx(0.5)
    assert hints == {
        "loss.t0": 0.0, "loss.t2": 2.0, "loss.t10": 10.0,
    }  # fmt: skip
    assert list(hints)[-1] == "loss.t10"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    run = complete()
    frame = run.frame.copy()
    here = (frame.metric == "loss") & (frame.step == frame.step.max())
    frame.loc[here, "value"] = bad
    found = measures_of(Evidence(run.name, frame, run.info)).tested
    assert not np.isfinite(found["loss"])
    assert np.isfinite(found["energy.h_0"])


def test_a_complete_run_has_a_number_at_every_level():
    found = measures_of(complete()).tested
    levels = {f"{kind}.h_{i}" for kind in ("energy", "oscillation") for i in range(4)}
    assert levels | {"loss", "sensitivity.exact"} <= set(found)
    assert all(v > 0 for v in found.values())


def test_records_without_a_run_and_no_records():
    assert measures_of(bare(complete())).tested["loss"] == measures_of(complete()).tested["loss"]
    empty = Evidence("none", pd.DataFrame({name: [] for name in complete().frame}))
    assert measures_of(empty).tested == measures_of(empty).hints == {}


def test_a_gain_in_the_networks_own_code_counts():
    run = training(traced("kappa", "skip", [[0.5, 0.5, 0.5]] * 6, first_level=1),
                   skips=[{"kappa": 2.0}, {"kappa": None}, {}])  # fmt: skip
    found = measures_of(run).tested
    assert [found[f"gain.skip_{i}"] for i in (1, 2, 3)] == pytest.approx([1.0, 0.5, 0.5])


def test_steps_that_a_scaler_skipped_do_not_count():
    rows = [(s, "grad_energy", "mid/w", 0, "value", math.inf if s == 3 else 2.0) for s in range(7)]
    rows += [(s, "skipped", "optimizer", 0, "value", float(s == 3)) for s in range(7)]
    frame = pd.DataFrame(rows, columns=["step", "metric", "site", "level", "stat", "value"])
    assert measures_of(Evidence("run", frame)).tested == {"gradient.mid": 2.0}
